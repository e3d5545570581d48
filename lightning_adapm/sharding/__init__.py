"""Division of parameters among processes, and sums over all processes."""
