"""Steps of pieces of parameters, by torch's operations or by Triton kernels."""
