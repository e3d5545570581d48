"""Gram matrices, by which regressors of gradients fit their factors."""

import pytest
import torch

from lightning_adapm.moments import regression


@pytest.mark.parametrize("n", [0, 7, 8, 16, 23])
def test_gram_matrices_are_float64_s_rounded_once(monkeypatch, n):
    """Parts of columns are added up apart, the last of which may be short; rows may lie in memory as columns."""
    monkeypatch.setattr(regression, "_ADDED_APART", 8)
    columns = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(0))
    columns[:, : n // 2] *= 1e4
    for rows in (columns.mT, columns.mT.contiguous()):
        exact = rows.double() @ rows.double().mT
        torch.testing.assert_close(regression._gram(rows), exact.float(), rtol=1.5e-7, atol=0)
