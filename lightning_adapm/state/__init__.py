"""Saving and loading optimizer state, on any number of processes."""
