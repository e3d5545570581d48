"""What a parameter is in a transformer, found from its module, its neighbors and its name."""
