"""The two sweeps over the chunks of a sequence. Tensors and callables only; no model, no data."""
