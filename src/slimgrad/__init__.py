"""slimgrad."""
