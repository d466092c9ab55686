"""What survives a kill: files that are whole or absent."""
