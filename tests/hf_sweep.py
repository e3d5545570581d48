"""Every model class of the installed transformers that builds on the meta device: what AdaPM makes of it.

``python tests/hf_sweep.py`` writes docs/architectures.md. Nothing is downloaded and no weight gets memory: classes are
built from their default configurations, with fewer layers and experts.
"""

import functools
import os
import re
import warnings
from dataclasses import dataclass, field

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from observed import observe
from torch import nn
from transformers.modeling_utils import no_init_weights
from transformers.models.auto import configuration_auto, modeling_auto

from lightning_adapm import AdaPM

LAYERS = r"(num_(hidden_|encoder_|decoder_)?layers|n_layers?|(encoder|decoder)_(num_(hidden_)?)?layers|depth|num_blocks)$"
EXPERTS = r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$"


@dataclass
class Result:
    outcome: str
    """``by rule``, ``taught``, ``refused`` or ``not built``."""
    names: list[str] = field(default_factory=list)
    """Of the refused matrices, numbers as N; or why it was not built."""
    taught: dict[str, str] = field(default_factory=dict)
    confirmed: int = 0
    """Attention weights whose role was also seen in a forward."""
    wrong: list[str] = field(default_factory=list)
    """What contradicts an expectation; always empty, or a test fails."""


def model_classes():
    """``{class name: model type}`` of all that transformers' tables list."""
    tables = [name for name in dir(modeling_auto) if re.fullmatch(r"MODEL_\w*MAPPING_NAMES", name)]
    found = {}
    for table in tables:
        for kind, names in getattr(modeling_auto, table).items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, kind)
    return dict(sorted(found.items()))


def shrunk(config):
    """Keyword arguments that make a configuration smaller."""
    smaller = {}
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            smaller |= {key: inner} if (inner := shrunk(value)) else {}
        elif type(value) is int and value > 8 and re.search(LAYERS, key):
            smaller[key] = 8
        elif type(value) is int and value > 4 and re.search(EXPERTS, key):
            smaller[key] = 4
    return smaller


def small_config(kind):
    make = configuration_auto.CONFIG_MAPPING[kind]
    config = make()
    try:
        return make(**shrunk(config))
    except Exception:
        return config


def build(name, kind):
    config = small_config(kind)
    config._attn_implementation = "eager"
    with torch.device("meta"), no_init_weights():
        return getattr(transformers, name)(config).to("meta")


def examine(model, teach=()):
    result = Result("by rule")
    try:
        optimizer = AdaPM(model.parameters())
        AdaPM(model.named_parameters(), second_moment="block")
    except ValueError as error:
        result.outcome = "refused"
        result.names = refused_names(str(error))
        optimizer = AdaPM(model.parameters(), unmatched="full")
    check(model, optimizer, result)
    return result


def refused_names(message):
    names = re.findall(r"^  (\S+)  \(.*\)$", message, re.MULTILINE) or [message.partition(" of shape")[0]]
    return list(dict.fromkeys(re.sub(r"\d+", "N", name) for name in names))


def check(model, optimizer, result):
    """Compare roles with what the model itself says and does."""
    names = {param: name for name, param in model.named_parameters()}
    pieces = {param: {piece.role for piece in optimizer.pieces[param]} for param in names}
    expected = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            expected[module.weight] = {"embedding"}
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and module.weight is not None:
            expected[module.weight] = {"norm"}
    for param, roles in observe(model).items():
        if param in names and roles & {"query", "key", "value", "attn_out"}:
            if "_a_" in names[param]:  # latent attention: values are made from its latent by another weight
                roles |= pieces[param] & {"value"}
            if roles == {"query", "key"} and len(pieces[param]) == 1:  # one weight for both: Reformer, DeBERTa
                roles = roles & pieces[param] or roles
            expected.setdefault(param, roles)
            result.confirmed += pieces[param] == roles
    for param, roles in expected.items():
        if param in names and pieces[param] not in (roles, {"unmatched"}, {"adapter"}):
            result.wrong.append(f"{names[param]}: {'/'.join(sorted(pieces[param]))}, but is {'/'.join(sorted(roles))}")


def sweep(only=None):
    """``{class name: Result}``."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    results = {}
    for name, kind in model_classes().items():
        if only and not re.search(only, name):
            continue
        try:
            model = build(name, kind)
        except Exception as error:
            results[name] = Result("not built", [f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"])
            continue
        results[name] = examine(model)
    return results
