"""Where the gradients of parameters gather, and how they are delivered."""
