"""Settings of parameter groups on loading: precedence, and the warning where checkpoint and code differ."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

AS_BUILT = "as_built"
"""Entry of a parameter group with the hyperparameters given in code, which schedules do not change."""

_OWN = ("roles", "param_names", "no_decay", "format_version")
"""Group entries that keep this optimizer's values, like those in ``structure``."""

_FOREIGN = ("amsgrad", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
"""Options of torch's optimizers without a meaning here."""


def as_built(group: Mapping[str, Any], options: Iterable[str], structure: Iterable[str]) -> dict[str, Any]:
    """Hyperparameters of a new group: the ``options`` that a checkpoint overrides."""
    return {key: _plain(group[key]) for key in options if key in group and key not in (*_OWN, *structure)}


def kept_settings(
    saved: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    version: int,
    structure: Sequence[str],
    foreign: Collection[str] = (),
) -> tuple[list[dict[str, Any]], list[str]]:
    """Merge saved groups with this optimizer's: hyperparameters of the former, and what shapes the state of the latter.

    Returns:
        The groups to continue with, and the options whose values differ, in words.

    Raises:
        ValueError: The groups do not correspond, or the state is from a newer format or an unsupported AdamW variant.
    """
    sizes, wanted = [len(group["params"]) for group in saved], [len(group["params"]) for group in groups]
    if sizes != wanted:
        raise ValueError(f"the saved optimizer has parameter groups of {sizes} parameters, this one of {wanted}")
    kept: list[dict[str, Any]] = []
    words: list[str] = []
    for old, new in zip(saved, groups, strict=True):
        _check(old, version)
        rest = {key: value for key, value in old.items() if key in new or key not in (*_FOREIGN, *foreign)}
        built = _built(old, new)
        if coupled := old.get("decoupled_weight_decay") is False and old["weight_decay"]:
            words.append(f"weight_decay={new['weight_decay']} (the checkpoint's {coupled} was added to gradients)")
            rest["weight_decay"], built["weight_decay"] = new["weight_decay"], new[AS_BUILT]["weight_decay"]
        words += _differences(built, new[AS_BUILT], built, "the code has")
        words += _differences(new, old, structure, "the checkpoint has")
        own = {key: new[key] for key in (*_OWN, *structure)}
        kept.append({**new, **rest, **own, AS_BUILT: {**new[AS_BUILT], **built}})
    return kept, list(dict.fromkeys(words))


def _check(old: Mapping[str, Any], version: int) -> None:
    if old.get("format_version", version) > version:
        raise ValueError(
            f"the saved state has format version {old['format_version']}, newer than {version}, the newest that this"
            " version of lightning-adapm reads; update it"
        )
    if old.get("amsgrad"):
        raise ValueError("the saved state is AdamW's with amsgrad=True, which has no counterpart here")


def _built(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Saved hyperparameters as they were given in code; another optimizer's as they were when it was saved.

    A rate with another meaning, as of some of ``torch.optim.Muon``, is left out of ``old``.
    """
    of_start = {"lr": old["initial_lr"]} if "initial_lr" in old else {}
    given = old.get(AS_BUILT) or {**old, **of_start}
    return {key: _plain(given[key]) for key in new[AS_BUILT] if key in given}


def _differences(used: Mapping[str, Any], other: Mapping[str, Any], keys: Iterable[str], has: str) -> Iterator[str]:
    for key in keys:
        one, two = _plain(used[key]), _plain(other.get(key, used[key]))
        if isinstance(one, dict) and isinstance(two, dict):
            one, two = ({k: v for k, v in each.items() if one.get(k) != two.get(k)} for each in (one, two))
        if _differ(one, two):
            yield f"{key}={one} ({has} {two})"


def _plain(value: Any) -> Any:
    """Convert a value for comparing and saving: tensors to numbers, tuples to lists."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return not math.isclose(one, other, rel_tol=1e-6)  # float32 tensors hold learning rates, too
    return bool(one != other)
