"""What survives a kill: files that are whole or absent, snapshots of any model and optimiser, journals, run folders."""
