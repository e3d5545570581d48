"""How parameters are divided among processes, and sums over all processes."""
