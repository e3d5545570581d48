"""Roles of parameters in a transformer, found from modules, neighbors and names."""
