"""How the reverse sweep finds the state before each chunk, one file per schedule."""
