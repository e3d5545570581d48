"""Dtype of products of matrices, by what a device multiplies fast."""

from functools import lru_cache

import torch


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the products for matrices of ``dtype``: bfloat16 where the device has instructions for it."""
    if dtype == torch.float64:
        return dtype
    return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


@lru_cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
