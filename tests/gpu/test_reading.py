"""Weights that are read from a mapped file to a GPU."""

import pytest
import torch
from on_gpu import NEEDED

from lightning_adapm.litgpt.reading import Files, placed

pytestmark = NEEDED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_read_to_a_gpu(tmp_path, dtype):
    """Of more bytes than one thread reads at a time, and changed in dtype there."""
    path, device = tmp_path / "weights.pth", torch.device("cuda", torch.cuda.current_device())
    saved = {f"{rows}": torch.randn(rows, 4096, dtype=torch.float32).bfloat16() for rows in (1, 5000, 300, 1025)}
    torch.save(saved, path)
    mapped = torch.load(path, mmap=True)
    found = list(placed(mapped.values(), device, dtype))
    assert Files()._regions  # pages were not copied on writing
    for tensor, expected in zip(found, saved.values(), strict=True):
        assert tensor.device == device and torch.equal(tensor.cpu(), expected.to(dtype))
