"""Measurements behind what the documentation claims; see README.md."""
