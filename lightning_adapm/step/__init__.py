"""How the pieces of parameters are moved: by torch's operations or by Triton kernels."""
