"""Is it really exact? Chunked gradients against plain backpropagation, for models and for steps."""
