"""Which process holds which elements of a parameter, and sums over all of them."""
