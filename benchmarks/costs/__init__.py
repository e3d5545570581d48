"""Measurement of what an optimizer costs: time, memory, and the optimizers to compare."""
