"""Conversion of a saved state to this optimizer's settings, where that has a meaning."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments import lowrank
from lightning_adapm.moments.second import block_means
from lightning_adapm.roles.context import normalize
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.find import has_values
from lightning_adapm.state.sharded import Stateful, fits, full_entry, import_entry, localise

_FIRST = ("exp_avg", "exp_avg_l", "exp_avg_r", "seeded")
_SECOND = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq_l", "exp_avg_sq_r")


def restored_state(optimizer: Stateful, saved: Mapping[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """Make new state for every parameter that has saved state, without changing anything.

    Raises:
        ValueError: The state is another optimizer's, has another shape, or has parameters in another order.
    """
    restored: dict[Tensor, dict[str, Any]] = {}
    for old, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        _check_order(old.get("param_names"), group["param_names"])
        for key, name, param in zip(old["params"], group["param_names"], group["params"], strict=True):
            entry = import_entry(optimizer, param, group, saved["state"].get(key))
            if not entry:
                continue
            others = _others(name, entry, optimizer.pieces[param], ours="format_version" in old)
            entry = {key: value for key, value in entry.items() if key not in others}
            layout = optimizer.placement(param).layout
            if layout is None:
                restored[param] = _whole_state(optimizer, name, param, group, entry)
            elif fits(optimizer, param, group, entry):
                restored[param] = localise(optimizer, param, group, entry)
            else:
                whole = _whole_state(optimizer, name, param, group, full_entry(entry))
                restored[param] = localise(optimizer, param, group, whole)
            for key, value in others.items():
                restored[param][key] = value.to(param.device, copy=True) if isinstance(value, Tensor) else value
    return restored


def _whole_state(
    optimizer: Stateful, name: str, param: Tensor, group: Mapping[str, Any], entry: Mapping[str, Any]
) -> dict[str, Any]:
    """Convert the state of a whole parameter, however little of it this process holds."""
    layout = optimizer.placement(param).layout
    state = optimizer.make_state(param, group, param, whole=True)
    state["step"].fill_(float(entry["step"]))
    like = param if layout is None else torch.empty(layout.shape, device="meta")
    _check_shapes(name, entry, optimizer.pieces[param], like.shape)
    for piece in optimizer.pieces[param]:
        _restore_momentum(entry, state, piece, like)
        _restore_second_moment(entry, state, piece, like)
    return state


def _check_order(saved: list[str] | None, current: list[str]) -> None:
    before, now = [normalize(name) for name in saved or current], [normalize(name) for name in current]
    if before != now and sorted(before) == sorted(now):
        moved = next((a, b) for a, b in zip(before, now, strict=True) if a != b)
        raise ValueError(
            f"the saved optimizer holds the same parameters in another order: {moved[0]} where this one has {moved[1]};"
            " build the parameter groups in the order they were saved in"
        )


def _others(name: str, entry: Mapping[str, Any], pieces: tuple[Piece, ...], ours: bool) -> dict[str, Any]:
    """Find the entries that wrappers such as Lookahead keep in a parameter's state; ``ours`` are all others.

    Raises:
        ValueError: The state is another optimizer's, or that of other roles.
    """
    known = {"step", *_FIRST, *_SECOND} | {piece.prefix + key for piece in pieces for key in _FIRST + _SECOND}
    others = {key: value for key, value in entry.items() if key not in known}
    if unknown := sorted(key for key in others if not ours or key.rpartition(".")[2] in _FIRST + _SECOND):
        raise ValueError(
            f"the saved state of {name} holds {', '.join(unknown)}, which AdaPM has no meaning for; it loads states of"
            " AdaPM with the same roles and of torch.optim.AdamW"
        )
    return others


def _check_shapes(name: str, entry: Mapping[str, Any], pieces: tuple[Piece, ...], shape: torch.Size) -> None:
    own = {piece.prefix + kind: (kind, piece.shape(shape)) for piece in pieces for kind in _FIRST + _SECOND}
    for key, value in entry.items():
        kind, matrix = own.get(key, ("exp_avg", shape))  # one entry for all pieces of a fused weight: as large as it
        fits = not isinstance(value, Tensor) or value.shape == shape or _fits(kind, value.shape, matrix)
        if key != "step" and not fits:
            raise ValueError(
                f"the saved state of {name} does not fit its shape {tuple(shape)}: {key} {tuple(value.shape)}"
            )


def _fits(kind: str, found: torch.Size, matrix: torch.Size) -> bool:
    """Whether a saved entry can be one of a matrix, at any rank and for blocks of any size."""
    batch, rows, columns = matrix[:-2], matrix[:-1], matrix[-1:]
    if kind.endswith("_l"):
        return found[:-1] == rows
    if kind.endswith("_r"):
        return (found[:-2], found[-1:]) == (batch, columns)
    if kind.endswith("_row"):
        return found == (*rows, 1)
    if kind.endswith("_col"):
        return found == (*batch, 1, *columns)
    if kind == "exp_avg":
        return found == matrix
    sizes = zip(matrix, found, strict=False)
    return found.numel() == 1 or (len(found) == len(matrix) and all(size % max(1, count) == 0 for size, count in sizes))


def _saved(entry: Mapping[str, Any], piece: Piece, key: str, param: Tensor) -> Any:
    """Find the entry of a piece: its own, or its rows of the whole parameter's entry; None without one."""
    if piece.prefix + key in entry:
        return entry[piece.prefix + key]
    whole = entry.get(key)
    if whole is None or whole.shape != param.shape:
        return None
    return piece.matrix(whole)


def _restore_momentum(entry: Mapping[str, Any], state: dict[str, Any], piece: Piece, param: Tensor) -> None:
    full, left, right, seeded = (_saved(entry, piece, key, param) for key in _FIRST)
    if full is not None:
        # beside factors only where torch.distributed.checkpoint fills an AdamW state up with new ones
        left = right = None
    if left is not None and (seeded is None) is (piece.prefix + "seeded" in state):
        full, left = left.float() @ right.float(), None  # only AdaPM's right factors are orthonormal
    if piece.prefix + "exp_avg" in state:
        average = state[piece.prefix + "exp_avg"]
        if full is not None:
            average.copy_(piece.matrix(full) if full.shape != average.shape else full)
        elif left is not None:
            average.copy_(left.float() @ right.float())
    elif piece.prefix + "exp_avg_l" in state:
        new_left, new_right = state[piece.prefix + "exp_avg_l"], state[piece.prefix + "exp_avg_r"]
        if left is not None and left.shape == new_left.shape and right.shape == new_right.shape:
            new_left.copy_(left)
            new_right.copy_(right)
            if seeded is not None:
                state[piece.prefix + "seeded"] = int(seeded)
        elif left is not None or full is not None:
            factors = _factorize(full, new_left, new_right) if left is None else _resize(left, right, new_right)
            new_left.copy_(factors[0])
            new_right.copy_(factors[1])
            if piece.prefix + "seeded" in state:
                state[piece.prefix + "seeded"] = int(not has_values(new_right) or new_right.any())


def _factorize(full: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factor a full average by three subspace iterations."""
    dtype = torch.float64 if full.dtype == torch.float64 else torch.float32
    batch = full.to(dtype).reshape(-1, *full.shape[-2:])
    if right.shape[-2] == right.shape[-1]:
        return full, right
    basis = batch.new_zeros(batch.shape[0], *right.shape[-2:])
    nothing = batch.new_zeros(batch.shape[0], *left.shape[-2:])
    for _ in range(3):
        basis = lowrank.refresh_basis(batch, nothing, basis, beta1=0.0)
    return (batch @ basis.mT).view(left.shape), basis.view(right.shape)


def _resize(left: Tensor, right: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Change the rank of factors: keep the strongest directions, or add empty ones."""
    rank, n = like.shape[-2:]
    left, right = left.double(), right.double()
    if rank == n:
        return left @ right, torch.eye(n, dtype=right.dtype, device=right.device).expand(*right.shape[:-2], n, n)
    missing = rank - right.shape[-2]
    if missing > 0:
        return torch.nn.functional.pad(left, (0, missing)), torch.nn.functional.pad(right, (0, 0, 0, missing))
    strongest = torch.linalg.eigh(left.mT @ left).eigenvectors.flip(-1)[..., :rank]
    return left @ strongest, strongest.mT @ right


def _restore_second_moment(entry: Mapping[str, Any], state: dict[str, Any], piece: Piece, param: Tensor) -> None:
    targets = {key: state[piece.prefix + key] for key in _SECOND if piece.prefix + key in state}
    sources = {key: value for key in _SECOND if (value := _saved(entry, piece, key, param)) is not None}
    if {key: value.shape for key, value in sources.items()} != {key: value.shape for key, value in targets.items()}:
        if not targets:
            return
        if not sources or "exp_avg_sq_l" in targets:
            raise ValueError(
                f"a saved second moment of {', '.join(sources) or 'nothing'} cannot become one of {', '.join(targets)};"
                " load it into an optimizer with the second moment and the rank that it was saved with"
            )
        dense = _expand(sources, piece.matrix(param).shape)
        sources = {key: _reduce(dense, target) for key, target in targets.items()}
    for key, target in targets.items():
        target.copy_(sources[key])


def _expand(sources: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """Expand any second moment to an elementwise one."""
    if "exp_avg_sq_row" in sources:
        row, column = sources["exp_avg_sq_row"], sources["exp_avg_sq_col"]
        return row * column / row.mean(dim=-2, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)
    if "exp_avg_sq_l" in sources:
        return (sources["exp_avg_sq_l"] @ sources["exp_avg_sq_r"]).square()
    (dense,) = sources.values()
    if dense.numel() == shape.numel():
        return dense.reshape(shape)
    for dim in (-2, -1) if dense.dim() >= 2 else ():
        if dense.shape[dim] not in (1, shape[dim]):
            dense = dense.repeat_interleave(shape[dim] // dense.shape[dim], dim=dim)
    return dense.expand(shape)


def _reduce(dense: Tensor, target: Tensor) -> Tensor:
    """Reduce an elementwise second moment to the block or factored one of ``target``'s shape."""
    if target.shape == dense.shape:
        return dense
    if target.dim() < 2:
        return dense.mean()
    for dim in (-2, -1):
        if target.shape[dim] != dense.shape[dim]:
            dense = block_means(dense, target.shape[dim], dim)
    return dense
