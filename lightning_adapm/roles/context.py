"""Context of parameters: names without wrappers, modules, and matrices in the same module."""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lightning_adapm.roles import rules
from lightning_adapm.roles.live import children_of, parameters_of, walk
from lightning_adapm.sharding.find import shape_of

_WRAPPERS = re.compile(
    r"(^|(?<=\.))(_forward_module|_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer"
    r"|original_module|modules_to_save\.\w+)\."
)
# A reparametrized weight's matrix: under torch's parametrizations, the older weight and spectral norms, and pruning.
_REPARAMETRIZED = re.compile(
    r"(?:^|(?<=\.))parametrizations\.(\w+)\.original1?$|(?<=weight)_(?:v|orig)$|(?<=bias)_orig$"
)


@dataclass
class Named:
    """A parameter and its context."""

    name: str
    """Name in the model, from which the role follows."""
    param: Tensor
    label: str = ""
    """Name in the optimizer, which is unique there and as the caller chose it."""
    shape: torch.Size = field(init=False)
    """Shape of the whole parameter, however little of it this process holds."""
    users: list[nn.Module] = field(default_factory=list)
    """Modules that use the parameter; a tied weight has several."""
    around: list[nn.Module] = field(default_factory=list)
    """Each of these modules with the modules around it, from the inside out."""
    beside: dict[str, "Named"] = field(default_factory=dict)
    """Matrices in the same module by their own names, such as key, value and output next to a query."""
    in_transformer: bool = False
    """Whether the model has an attention module."""
    block_path: str | None = None
    """Name of the transformer block around the parameter."""
    output_found: bool = False
    """Whether the attention of the block has its output projection in the same module."""
    holds_attention: bool = False
    """Whether the parameter's module contains an attention module."""
    joins_heads: bool = False
    """Whether the parameter projects the values of attention heads that lie in a list next to it."""
    in_one_head: bool = False
    """Whether the parameter is of one of several attention heads, each of which is a module."""
    in_stem: bool = False
    """Whether the parameter is next to transformer blocks, in the module that holds them."""
    is_head: bool = False
    """Whether the parameter is outside every block and has the shape of the largest embedding of its width."""
    found: tuple[str | None, str] | None = None
    """Role and reason, once they have been looked for."""

    def __post_init__(self) -> None:
        if is_lazy(self.param):
            raise ValueError(
                f"{self.name} has no shape yet: its lazy module gets one in its first forward. Run the model on one"
                " batch before the optimizer is built, model(batch), in Lightning in configure_model()"
            )
        self.shape = shape_of(self.param, self.name)
        self.label = self.label or self.name

    @cached_property
    def path(self) -> str:
        """Normalized name without ``.weight``."""
        own = re.sub(r"((?<=to_out)\.0)?\.weight$", "", plain(self.name))
        beside = children_of(self.around[1]) if len(self.around) > 1 else ()
        if rules.is_attention(name.lower() for name in beside):
            return own  # without adapters, whose wrapped layer would be called linear
        return re.sub(r"\.(linear|inner_linear)$", "", own)

    @property
    def block(self) -> int:
        """First number in the path that does not number experts; 0 without one."""
        number = re.search(r"(?:^|(?<!experts)\.)(\d+)(?=\.|$)", self.path)
        return int(number[1]) if number else 0

    @property
    def parent(self) -> str:
        """Path of the module around the parameter."""
        return self.path.rpartition(".")[0]

    @property
    def child(self) -> str:
        """Last name in the path, in lower case: ``q_proj`` of ``h.0.attn.q_proj.weight``."""
        return self.path.rpartition(".")[2].lower()

    @property
    def is_linear(self) -> bool:
        """Whether a linear layer uses the parameter, or such a convolution: pointwise, or on separate patches."""
        return any(_is_linear(user) for user in self.users)

    @property
    def is_own(self) -> bool:
        """Whether the parameter is no layer's weight but a module's own."""
        layers = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
        return not self.name.endswith("weight") and not any(isinstance(user, layers) for user in self.users)

    @property
    def packed(self) -> bool:
        """Whether each element holds several quantized numbers, so that the shape means nothing."""
        return not (self.param.is_floating_point() or self.param.is_complex())

    @property
    def in_attention(self) -> bool:
        """Whether the parameter is in a module that is called attention and is not the whole block."""
        inner = self.path.removeprefix(f"{self.block_path}.").lower()
        held = self.parent != self.block_path and self._held_by(rules.ATTENTION_CLASSES)
        return held or bool(re.search(rules.ATTENTION, inner))

    @property
    def in_adapter(self) -> bool:
        """Whether peft has added the parameter to a layer."""
        bases = {base.__name__ for module in self.around[:3] for base in type(module).__mro__}
        return "BaseTunerLayer" in bases and ".base_layer." not in self.name

    @property
    def in_mixer(self) -> bool:
        """Whether the parameter is in a recurrent or state-space mixer."""
        if any(isinstance(user, nn.RNNBase) for user in self.users):
            return True
        if any(name in module._parameters for module in self.around[:2] for name in rules.MIXER_PARAMETERS):
            return True
        if re.search(rules.MIXERS, self.path.lower()) or self._held_by(rules.MIXER_CLASSES):
            return True
        is_attention = self._held_by(rules.ATTENTION_CLASSES) and rules.is_attention(self.beside)
        return bool(re.search(rules.ANY_MIXER, self.path.lower())) and not is_attention

    def _held_by(self, classes: str) -> bool:
        return any(re.search(classes, type(module).__name__) for module in self.around[:2])


def normalize(name: str) -> str:
    """Remove the prefixes of wrappers (FSDP, ``torch.compile``, Fabric, peft and others) from a name."""
    return _WRAPPERS.sub("", name)


def plain(name: str) -> str:
    """Normalize a name, and undo reparametrization: ``q_proj.weight`` for the matrix of its weight norm."""
    return _REPARAMETRIZED.sub(r"\1", normalize(name))


def describe(named: Iterable[tuple[str, Tensor]], module: nn.Module | None) -> list[Named]:
    """Join names with the modules that use a parameter and those around them."""
    places = {} if module is None else _places(module)
    items = []
    for name, param in named:
        place = places.get(id(param), _Place(param))
        items.append(Named(name, param, users=place.users, around=place.around))
    link(items)
    return items


def describe_whole(module: nn.Module, wanted: Container[int]) -> dict[int, tuple[Named, list[str]]]:
    """Describe every parameter of a module by its identity, each with all names that it has there.

    A parameter that has no shape yet, or none that is supported, is left out unless its identity is ``wanted``.
    """
    found: dict[int, tuple[Named, list[str]]] = {}
    for key, place in _places(module).items():
        try:
            item = Named(place.names[0], place.param, users=place.users, around=place.around)
        except (TypeError, ValueError, RuntimeError):
            if key in wanted:
                raise
        else:
            found[key] = item, place.names
    link(item for item, _ in found.values())
    return found


@dataclass
class _Place:
    """Places at which modules hold a parameter."""

    param: Tensor
    names: list[str] = field(default_factory=list)
    users: list[nn.Module] = field(default_factory=list)
    around: list[nn.Module] = field(default_factory=list)


def _places(module: nn.Module) -> dict[int, _Place]:
    places: dict[int, _Place] = {}
    for path, around in walk(module):
        for name, param in parameters_of(around[0]).items():
            place = places.setdefault(id(param), _Place(param))
            place.names.append(f"{path}.{name}" if path else name)
            place.users.append(_user(around)[0])
            place.around.extend(_user(around))
    return places


def link(items: Iterable[Named]) -> None:
    """Find the matrices next to each parameter, and the transformer block around it."""
    items = list(items)
    modules: dict[str, dict[str, Named]] = {}
    embeddings: dict[int, int] = {}  # rows by width, of the largest: positions and token types identify no head
    for item in items:
        if len(item.shape) >= 2 and not item.name.endswith("bias"):
            modules.setdefault(item.parent, {})[item.child] = item
        if len(item.shape) == 2 and any(isinstance(user, nn.Embedding) for user in item.users):
            rows, width = item.shape
            embeddings[width] = max(rows, embeddings.get(width, 0))
    attentions = [
        path
        for path, children in modules.items()
        if rules.is_attention(children)
        or rules.is_list_of_projections(path, {child: item.shape for child, item in children.items()})
    ]
    rules_met = ((item, rules.first_match(rules.NAME_RULES, item.path.lower())) for item in items)
    attentions += [item.parent for item, met in rules_met if met and met[0] in rules.FUSED]
    joined = _outputs_of_heads(attentions, modules)
    heads = {path for path in attentions if _holder_of(path) in joined}
    attentions += joined
    blocks = {block for path in attentions if path not in heads and (block := _block_around(path))}
    complete = {_block_around(path) for path in attentions if _has_output(modules.get(path, ()))}
    inside = {prefix for path in attentions for prefix in _prefixes(path)}
    stems = {prefix for block in blocks for prefix in ("", *_prefixes(block))}
    for item in items:
        item.beside = modules.get(item.parent, {})
        item.in_transformer = bool(attentions)
        item.block_path = max(_prefixes(item.path) & blocks, key=len, default=None)
        item.output_found = item.block_path in complete
        item.holds_attention = item.parent in inside
        item.joins_heads = joined.get(item.parent) is item
        item.in_one_head = item.parent in heads
        item.in_stem = item.parent in stems
        item.is_head = item.block_path is None and len(item.shape) == 2 and _is_head(item.shape, embeddings)


def _outputs_of_heads(attentions: Iterable[str], modules: Mapping[str, Mapping[str, Named]]) -> dict[str, Named]:
    """Output projections of lists of attention heads that have none themselves, by the modules that hold the lists."""
    values: dict[str, list[torch.Size]] = {}
    for path in attentions:
        children = modules.get(path, {})
        if path.rpartition(".")[2].isdigit() and not _has_output(children):
            shapes = [item.shape for child, item in children.items() if rules.child_role(child) == "value"]
            values.setdefault(_holder_of(path), []).extend(shapes)
    found: dict[str, Named] = {}
    for path, shapes in values.items():
        for child, item in modules.get(path, {}).items():
            wanted = sum(rows for rows, *_ in shapes)
            if len(shapes) > 1 and _has_output([child]) and item.shape == (shapes[0][-1], wanted):
                found[path] = item
    return found


def _holder_of(path: str) -> str:
    """Path of the module that holds the list of a numbered module."""
    return path.rpartition(".")[0].rpartition(".")[0]


def _has_output(children: Iterable[str]) -> bool:
    return "attn_out" in map(rules.child_role, children)


def _is_head(shape: torch.Size, embeddings: Mapping[int, int]) -> bool:
    rows, width = shape
    return rows != width and embeddings.get(width) == rows


def _block_around(path: str) -> str | None:
    """Path of an attention's block, up to the last number."""
    match = re.match(r"(.*\.)?\d+(?=\.|$)", path)
    return match.group() if match else None


def _prefixes(path: str) -> set[str]:
    return {path[: dot.start()] for dot in re.finditer(r"\.", path)}


def _is_linear(user: nn.Module) -> bool:
    if isinstance(user, nn.modules.conv._ConvNd):
        padded = user.padding != "valid" and any(user.padding)
        return user.kernel_size == user.stride and user.groups == 1 and not padded and not user.transposed
    return isinstance(user, nn.Linear) or type(user).__name__.endswith(("Linear", "Conv1D"))


def _user(around: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """Modules from the one that uses a parameter outwards; under parametrizations that is the layer."""
    return around[2:] if isinstance(around[0], ParametrizationList) and len(around) > 2 else around
