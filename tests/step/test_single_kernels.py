"""Single kernels of a CUDA step, interpreted on a CPU: what they compute, and the sizes of their tiles."""

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from commands import HELPERS

from lightning_adapm.moments import lowrank
from lightning_adapm.step import averages, bases, kernels, moves, reading
from lightning_adapm.step.averages import advance
from lightning_adapm.step.launch import Matrices
from lightning_adapm.step.moves import Divisors, move
from lightning_adapm.step.reading import Reading, combine, read
from lightning_adapm.step.rounding import StochasticRounding, Stream

pytest.importorskip("triton", reason="the kernels are Triton's")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(37,), (5, 37), (5, 38), (3, 5, 38)])
def test_the_same_numbers_are_rounded_as_without_kernels(interpreted, dtype, shape):
    """Bit by bit: of any size, subnormal and large ones, infinities and NaN; of two matrices or stacks of them."""
    generator = torch.Generator().manual_seed(0)
    number = 2 * torch.Size(shape).numel()
    values = torch.randn(number, generator=generator) * torch.logspace(-10, 5, number)
    values[::12] = torch.tensor([float("inf"), float("nan"), 7e4, 3.4e38, -3.4e38]).repeat(number)[: len(values[::12])]
    values = list(values.view(2, *shape).unbind())
    start = 2**32 - 12 + shape[-1] % 2  # of an even place where rows are even
    rounding = StochasticRounding((Stream(0x9E3779B9, 7, 0), Stream(3, 0x85A308D3, start)), 12345)
    params, expected = ([torch.zeros(shape, dtype=dtype) for _ in values] for _ in range(2))
    negative = [-value for value in values]  # kernels hold addresses only
    directions = Matrices.of(negative)
    divisors = Divisors(torch.ones(len(directions.addresses), directions.shape[0]), 1.0, 0.0)
    move(params, directions, divisors, lr=1.0, decay=0.0, rounding=rounding)
    assert interpreted == ["move"]
    rounding.write(expected, [value.clone() for value in values])
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("second_moment", ["block", "factored", "elementwise"])
def test_programs_that_hold_their_left_factor(interpreted, monkeypatch, second_moment):
    """Rows and columns of several tiles and of a rest, moved by programs of some tiles each as by one for each tile."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    m, n, r, elementwise = 40, 107, 6, second_moment == "elementwise"
    grads, basis, left = [draw(m, n), draw(m, n)], draw(2, r, n), torch.zeros(2, m, kernels.padded(r))
    left[..., :r] = draw(2, m, r)
    for name in ("HELD", "HELD_ELEMENTWISE", "MOVE_ALONG", "MOVE_ALONG_ELEMENTWISE"):
        monkeypatch.setattr(moves, name, (16, 16, 4, 2))
    monkeypatch.setattr(moves, "HELD_COLUMNS", 48)
    found = []
    for most in (moves.HELD_RANKS, 0):
        monkeypatch.setattr(moves, "HELD_RANKS", most)
        params = [torch.ones(m, n, dtype=torch.bfloat16) for _ in grads]
        averages = [torch.ones(m, n) for _ in grads]
        roots = Matrices.of(averages) if elementwise else torch.ones(2, m)
        columns = torch.arange(1.0, n + 1).expand(2, n).contiguous() if second_moment == "factored" else None
        divisors = Divisors(roots, 1.0, 1e-8, 0.9 if elementwise else None, columns)
        flaws, factors = torch.tensor([0, 1], dtype=torch.int32), (left, Matrices.of([basis]))
        move(params, Matrices.of(grads), divisors, lr=0.1, decay=0.1, flaws=flaws, factors=factors)
        found.append(torch.stack([*map(torch.Tensor.float, params), *averages]))
    assert torch.equal(found[0], found[1])
    divisor = found[0][2].sqrt() if elementwise else 1.0 if columns is None else columns[0]
    expected = 0.99 - 0.1 * (grads[0] + left[0, :, :r] @ basis[0]) / divisor
    torch.testing.assert_close(found[0][0], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 16, 64, 128, 256, 257, 4096, 100_000])
@pytest.mark.parametrize("low_rank", [False, True])
def test_tiles_are_bounded_whatever_a_head_has(monkeypatch, rows, low_rank):
    tiles = []
    monkeypatch.setattr(averages, "launch", lambda *_, **constants: tiles.append(constants))
    found = Reading(torch.zeros(1, 2 * rows), torch.zeros(1, dtype=torch.int32), None)
    left, average = (Matrices.of([torch.zeros(2 * rows, columns)]) for columns in (70, 1))
    projected = torch.zeros(1, 2 * rows, 80)
    lefts = (projected, left) if low_rank else (None, None)
    factors, roots = advance(found, *lefts, None, average, torch.Size((2 * rows, 8)), 2, (0.9, 0.999), 0.1)
    assert (factors is not None) == low_rank and roots.shape == (1, 2 * rows)
    for tile in tiles:
        assert tile["BLOCK_M"] <= 1024 and (not tile["LOW_RANK"] or tile["BLOCK_M"] * tile["BLOCK_R"] <= 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_more_rows_and_ranks_than_a_program_has(interpreted, monkeypatch, dtype):
    """From the left they are sums over parts that do not divide a tall matrix: a table of tokens occupies a device."""
    monkeypatch.setattr(reading, "RANKS", 16)
    monkeypatch.setattr(reading, "MOST_RANKS", 16)
    grads, weights, bases = torch.randn(3, 600, 20), torch.randn(3, 600, 18), torch.randn(3, 18, 20)
    matrices = Matrices.of(list(grads.to(dtype).unbind()))
    grads = grads.to(dtype).float()
    product = combine(matrices, weights, torch.tensor([0, 1, 0], dtype=torch.int32))
    expected = weights.mT @ grads * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-4)
    projected, found = read(matrices, 3, Matrices.of([bases]), 18, None, columns=True)
    torch.testing.assert_close(projected[..., :18], grads @ bases.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.columns, grads.square().sum(dim=1))
    torch.testing.assert_close(found.squares, grads.square().sum(dim=2))
    assert ("sum_squares" in interpreted) == (dtype == torch.bfloat16)


@pytest.mark.parametrize(("ranks", "rows"), [(18, 300), (40, 60), (40, 300), (70, 300)])
def test_products_in_two_blocks_of_ranks(interpreted, monkeypatch, ranks, rows):
    """A program has both where that saves a reading of the gradients, larger ones where there are enough rows."""
    for name, value in {"RANKS": 16, "MORE_RANKS": 16, "MOST_RANKS": 32, "MOST_MORE_RANKS": 16}.items():
        monkeypatch.setattr(reading, name, value)
    monkeypatch.setattr(reading, "FEW_ROWS", 16)
    monkeypatch.setattr(reading, "PROGRAMS_FURTHER", 4)
    grads, bases = torch.randn(2, rows, 80), torch.randn(2, ranks, 80)
    projected, found = read(Matrices.of(list(grads.unbind())), 2, Matrices.of([bases]), ranks, None)
    torch.testing.assert_close(projected[..., :ranks], grads @ bases.mT, rtol=1e-4, atol=1e-4)
    assert not projected[..., ranks:].any()
    torch.testing.assert_close(found.squares, grads.square().sum(dim=2))


@pytest.mark.parametrize(("products", "columns"), [(False, False), (True, False), (False, True)])
def test_squares_beyond_float32_are_no_flaws(interpreted, monkeypatch, products, columns):
    """Only an entry that is not finite is: squares overflow, but the gradient counts."""
    grads = torch.ones(4, 70, 20, dtype=torch.bfloat16 if columns else torch.float32)
    grads[1:, 0, 0] = torch.tensor([1e30, float("inf"), float("nan")])
    basis = Matrices.of([torch.ones(4, 2, 20)]) if products else None
    for name, value in (("SUM_SQUARES", (16, 16, 4, 3)), ("SUMMED_ROWS", 32), ("PROGRAMS", 2)):
        monkeypatch.setattr(reading, name, value)
    with np.errstate(over="ignore", invalid="ignore"):
        _, found = read(Matrices.of(list(grads.unbind())), 4, basis, 2, None, columns)
    assert (found.flaws != 0).tolist() == [False, False, True, True]
    assert found.squares[1, 0] == float("inf") and found.squares[:, 1:].eq(20).all()
    if columns:
        assert interpreted == ["sum_squares"] and found.columns is not None and found.columns[:, 1:].eq(70).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_without_a_basis_are_sketched(interpreted, monkeypatch, dtype):
    """Wherever a row ends, whose columns are copied some at a time; none of those that are there changes."""
    monkeypatch.setattr(bases, "SKETCHED", 16)
    rows = torch.randn(2, 3, 37).to(dtype)
    rows[1, 2], rows[0, 1, :36] = 0.0, 0.0
    joined, sketched = bases.sketch(Matrices.of(list(rows.unbind())))
    torch.testing.assert_close(joined, rows.float(), rtol=0, atol=0)
    torch.testing.assert_close(sketched, lowrank.sketched(rows.float()), rtol=0, atol=0)
    assert sketched[1, 2].all()


def test_tiles_fit_smaller_gpus():
    """Those of compute capability 8.6, 8.9 and 12.0 have 99 KiB of shared memory for a block; no GPU is needed."""
    command = [sys.executable, HELPERS / "compile_kernels.py", "86"]
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=compiled, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    needed = json.loads(done.stdout)
    assert len(needed) == 18 and all(each["shared"] <= 99 * 1024 for each in needed.values()), needed
    registers = 8  # of 4 bytes: more in memory would be read and written in every round of a tile's loop
    assert all(each["spilled"] <= 4 * registers for each in needed.values()), needed
