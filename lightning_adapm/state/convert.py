"""Conversion of a saved state to this optimizer's settings, where that has a meaning."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments.base import Moment, Momentum, SecondMoment
from lightning_adapm.moments.storage import Entry, Storage, decoded
from lightning_adapm.roles.context import normalize
from lightning_adapm.sharding.find import local, shape_of
from lightning_adapm.state.sharded import fits, full_entry, import_entry, localize
from lightning_adapm.step.parts import Part, new_state

Parts = tuple[Part, ...]


def restored_state(
    groups: Iterable[Mapping[str, Any]], parts_of: Callable[[Tensor], Parts], saved: Mapping[str, Any]
) -> dict[Tensor, dict[str, Any]]:
    """Make new state for every parameter that the saved optimizer had state for, without changing anything.

    Args:
        groups: Parameter groups of this optimizer.
        parts_of: Function that returns the parts of a parameter.
        saved: State dict of the saved optimizer.

    Raises:
        ValueError: The state is another optimizer's, has another shape, or is for parameters in another order.
    """
    groups = list(groups)
    restored: dict[Tensor, dict[str, Any]] = {}
    _check_order(saved["param_groups"], groups)
    for old, group in zip(saved["param_groups"], groups, strict=True):
        for key, param in zip(old["params"], group["params"], strict=True):
            parts = parts_of(param)
            entry = import_entry(parts, saved["state"].get(key))
            if not entry:
                continue
            others = _others(parts, entry, ours="format_version" in old)
            entry = {key: value for key, value in entry.items() if key not in others}
            if parts[0].layout is None:
                restored[param] = _whole_state(parts, entry)
            elif fits(parts, entry):
                restored[param] = localize(parts, entry)
            else:
                restored[param] = localize(parts, _whole_state(parts, full_entry(entry)))
            for key, value in others.items():
                restored[param][key] = value.to(param.device, copy=True) if isinstance(value, Tensor) else value
    return restored


def _whole_state(parts: Parts, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Make the state of a whole parameter, however little of it this process holds."""
    device, state = local(parts[0].param).device, new_state((), parts[0].param.device)
    state["step"].fill_(float(entry["step"]))
    for part in parts:
        saved = _saved(part, entry, shape_of(part.param))
        for moment, family, new in zip(
            (part.first, part.second), (Momentum, SecondMoment), part.moments_made(device, whole=True), strict=True
        ):
            if new:
                _fill(part, moment, family, saved, new)
            state |= {part.piece.prefix + key: value for key, value in new.items()}
    return state


def _saved(part: Part, entry: Mapping[str, Any], shape: torch.Size) -> dict[str, Any]:
    """Select the saved entries of a part, by key without prefix: its own, or its rows of the whole parameter's."""
    piece = part.piece
    whole = {
        key: piece.matrix(v).reshape(part.shape)
        for key, v in entry.items()
        if isinstance(v, Tensor) and v.shape == shape
    }
    if piece.whole:
        return {**entry, **whole}
    for key, value in entry.items():
        if "." not in key and key != "step" and key not in whole and isinstance(value, Tensor):
            raise _misfit(part, key, value)
    own = {key.removeprefix(piece.prefix): v for key, v in entry.items() if key.startswith(piece.prefix)}
    return {**whole, **own}


def _misfit(part: Part, key: str, value: Tensor) -> ValueError:
    return ValueError(
        f"the saved state of {part.name} does not fit its shape {tuple(shape_of(part.param))}: {key}"
        f" {tuple(value.shape)}"
    )


def _unlike(part: Part, entries: Mapping[str, Entry], values: Mapping[str, Any]) -> ValueError:
    """Error about the first of a moment's entries that is missing, or saved in another shape."""
    key = next(key for key, entry in entries.items() if getattr(values.get(key), "shape", None) != entry.shape)
    if key in values:
        return _misfit(part, part.piece.prefix + key, values[key])
    return ValueError(
        f"the saved state of {part.name} has no {part.piece.prefix}{key}; load a state that an optimizer with the same"
        " settings has saved, or begin without a state"
    )


def _fill(part: Part, moment: Moment, family: type[Moment], saved: Mapping[str, Any], new: dict[str, Any]) -> None:
    """Fill the new state of a part's moment from the saved state of a moment of the same family.

    Raises:
        ValueError: The state has another shape, cannot be converted, or some of it would be lost.
    """
    values, entries = decoded(saved), moment.entries(part.shape)
    source = _source(part, family, values)
    own = source is None or source.keys <= entries.keys()
    if own and _filled_alike(saved, values, entries, new):
        return
    if source is None:
        _check_nothing_lost(part, family, entries, values, new)
    elif not (source.keys == moment.keys and moment.resized(values, new)):
        _convert(part, moment, source, values, new)


def _source(part: Part, family: type[Moment], values: Mapping[str, Any]) -> type[Moment] | None:
    """Find the moment that saved some values of a part; None if there is none of the ``family``.

    Raises:
        ValueError: The values of all candidates have other shapes.
    """
    # AdamW's kinds are defined first: torch.distributed.checkpoint may have added this optimizer's own new entries
    known = [kind for kind in family.kinds() if kind.keys and kind.keys <= values.keys()]
    for kind in known:
        if kind.fits(values, part.shape):
            return kind
    if known:
        key = min(known[0].keys)
        raise _misfit(part, part.piece.prefix + key, values[key])
    return None


def _filled_alike(
    saved: Mapping[str, Any], values: Mapping[str, Any], entries: Mapping[str, Entry], new: dict[str, Any]
) -> bool:
    """Fill a new state from one with the same entries, in any storage; return whether the saved state has them."""
    coded = (_in_any_storage(entries) - entries.keys()) & saved.keys()
    return _copied(saved if coded <= new.keys() else values, new) or _written(values, entries, new)


def _convert(part: Part, moment: Moment, source: type[Moment], values: Mapping[str, Any], new: dict[str, Any]) -> None:
    """Convert the values of another moment by way of a dense tensor.

    Raises:
        ValueError: One of the two moments has no dense form.
    """
    try:
        moment.from_dense(source.dense(values, part.shape), new)
    except ValueError as error:
        if source is type(moment):
            raise _unlike(part, moment.entries(part.shape), values) from error
        raise ValueError(
            f"the saved state of {part.name} does not fit: {error}; load it into the optimizer that saved it, or"
            " begin without a state"
        ) from error


def _check_nothing_lost(
    part: Part, family: type[Moment], entries: Mapping[str, Entry], values: Mapping[str, Any], new: Iterable[str]
) -> None:
    """Refuse to start a moment from zero if some of it was saved. A second moment never starts from zero.

    Raises:
        ValueError: State would be lost, or a second moment is missing.
    """
    if entries.keys() & values.keys():
        raise _unlike(part, entries, values)
    if family is not SecondMoment:
        return
    held = sorted(values.keys() & {key for kind in family.kinds() for key in kind.keys})
    if not held:
        raise ValueError(
            f"the saved state of {part.name} has no second moment, which {', '.join(new)} cannot do without; load"
            " it into the optimizer that saved it, or begin without a state"
        )
    raise ValueError(
        f"the saved second moment of {part.name} is {', '.join(held)} and cannot become {', '.join(new)}; load it"
        " into an optimizer with the second moment and the rank that it was saved with"
    )


def _written(values: Mapping[str, Any], entries: Mapping[str, Entry], new: dict[str, Any]) -> bool:
    """Write values through the storages of their entries if all have the right shapes; return whether they did."""
    if any(key not in values or getattr(values[key], "shape", None) != entry.shape for key, entry in entries.items()):
        return False
    for key, entry in entries.items():
        if entry.shape is None:
            new[key] = int(values[key])
        else:
            entry.storage.write([new], key, [values[key]])
    return True


def _copied(saved: Mapping[str, Any], new: dict[str, Any]) -> bool:
    """Copy entries if the same ones were saved in the same shapes; return whether they were."""
    shapes = {key: value.shape if isinstance(value, Tensor) else None for key, value in new.items()}
    if not new.keys() <= saved.keys() or shapes != {key: getattr(saved[key], "shape", None) for key in new}:
        return False
    for key, value in new.items():
        if isinstance(value, Tensor):
            value.copy_(saved[key])
        else:
            new[key] = int(saved[key])
    return True


def _check_order(saved: Iterable[Mapping[str, Any]], groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse parameters in another order, within a group or over all groups, because states are found by position."""
    before: list[str] = []
    now: list[str] = []
    for old, group in zip(saved, groups, strict=True):
        before += map(normalize, old.get("param_names") or group["param_names"])
        now += map(normalize, group["param_names"])
    if before != now and sorted(before) == sorted(now):
        moved = next((a, b) for a, b in zip(before, now, strict=True) if a != b)
        raise ValueError(
            f"the saved optimizer holds the same parameters in another order: {moved[0]} where this one has {moved[1]};"
            " build the parameter groups in the order they were saved in"
        )


def _others(parts: Parts, entry: Mapping[str, Any], ours: bool) -> dict[str, Any]:
    """Select the entries that wrappers such as Lookahead keep in a parameter's state, if the rest is ``ours``.

    Raises:
        ValueError: The state is another optimizer's, or that of other roles.
    """
    kinds = (*Momentum.kinds(), *SecondMoment.kinds())
    moments = _in_any_storage(key for kind in kinds for key in kind.keys)
    known = {"step"} | moments
    for part in parts:
        known |= {part.piece.prefix + key for key in moments | _in_any_storage(part.entries)}
    others = {key: value for key, value in entry.items() if key not in known}
    if unknown := sorted(key for key in others if not ours or key.rpartition(".")[2] in moments):
        raise ValueError(
            f"the saved state of {parts[0].name} holds {', '.join(unknown)}, which has no meaning here; load a"
            " state of this optimizer with the same roles, or of torch.optim.AdamW"
        )
    return others


def _in_any_storage(keys: Iterable[str]) -> set[str]:
    """Keys of entries, and of the tensors that other storages keep in place of them."""
    found = set(keys)
    return found | {key + suffix for kind in Storage.kinds() for key in found for suffix in kind.suffixes}
