"""The joint benchmark: time and memory of the same gradient, ours and others', in one table. `python -m benchmarks`."""
