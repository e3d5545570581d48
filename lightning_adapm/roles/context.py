"""Parameters with what is known about them: their names without wrappers, their modules, and what lies beside them."""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lightning_adapm.roles import rules
from lightning_adapm.roles.live import parameters_of, walk
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
    """One parameter with what is known about it."""

    name: str
    """In the model; what the parameter is follows from it."""
    param: Tensor
    label: str = ""
    """What the optimizer calls it, where that is not its name: unique there, and as the caller named it."""
    shape: torch.Size = field(init=False)
    """Of the whole parameter, whatever this process holds of it."""
    users: list[nn.Module] = field(default_factory=list)
    """Modules that hold it, and those around them, from the inside out."""
    around: list[nn.Module] = field(default_factory=list)
    beside: dict[str, "Named"] = field(default_factory=dict)
    """Matrices in the same module, by their own names: of a query projection the key's, the value's, the output's."""
    in_transformer: bool = False
    """Some attention module was found."""
    block_path: str | None = None
    """Of the transformer block that it is in."""
    output_found: bool = False
    """The attention of its block has its output projection beside it."""
    holds_attention: bool = False
    """An attention module lies inside the module that it is in."""
    in_stem: bool = False
    """In a module that holds transformer blocks, beside them."""
    is_head: bool = False
    """Outside every block, and of the shape of the largest embedding of its width."""
    found: tuple[str | None, str] | None = None
    """Its role and why, once that was looked for."""

    def __post_init__(self) -> None:
        if is_lazy(self.param):
            raise ValueError(
                f"{self.name} has no shape yet: its lazy module gets one in its first forward. Run the model on one"
                " batch before AdaPM is built, model(batch), in Lightning in configure_model()"
            )
        self.shape = shape_of(self.param)
        self.label = self.label or self.name

    @cached_property
    def path(self) -> str:
        """The normalised name without ``.weight``."""
        return re.sub(r"(\.(linear|inner_linear)|(?<=to_out)\.0)?\.weight$", "", plain(self.name))

    @property
    def block(self) -> int:
        """The first number in the path that does not number experts; 0 where there is none."""
        number = re.search(r"(?:^|(?<!experts)\.)(\d+)(?=\.|$)", self.path)
        return int(number[1]) if number else 0

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def child(self) -> str:
        return self.path.rpartition(".")[2].lower()

    @property
    def is_linear(self) -> bool:
        """Used by a linear layer, or by a convolution that is one: pointwise, or on patches that do not overlap."""
        return any(_is_linear(user) for user in self.users)

    @property
    def is_own(self) -> bool:
        """No layer's weight, but a parameter that a module made for itself."""
        layers = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
        return not self.name.endswith("weight") and not any(isinstance(user, layers) for user in self.users)

    @property
    def packed(self) -> bool:
        """Holds several quantized numbers in each of its own, so that its shape says nothing."""
        return not (self.param.is_floating_point() or self.param.is_complex())

    @property
    def in_attention(self) -> bool:
        """In something that calls itself attention and is not the whole block."""
        inner = self.path.removeprefix(f"{self.block_path}.").lower()
        held = self.parent != self.block_path and self._held_by(rules.ATTENTION_CLASSES)
        return held or bool(re.search(rules.ATTENTION, inner))

    @property
    def in_adapter(self) -> bool:
        """What peft adds to a layer; not the layer itself."""
        bases = {base.__name__ for module in self.around[:3] for base in type(module).__mro__}
        return "BaseTunerLayer" in bases and ".base_layer." not in self.name

    @property
    def in_mixer(self) -> bool:
        """In a recurrent or state-space mixer."""
        if any(isinstance(user, nn.RNNBase) for user in self.users):
            return True
        if any(name in module._parameters for module in self.around[:2] for name in rules.MIXER_PARAMETERS):
            return True
        return bool(re.search(rules.MIXERS, self.path.lower())) or self._held_by(rules.MIXER_CLASSES)

    def _held_by(self, classes: str) -> bool:
        return any(re.search(classes, type(module).__name__) for module in self.around[:2])


def normalize(name: str) -> str:
    """A parameter's name without what wrappers (FSDP, ``torch.compile``, Fabric, peft and others) put into it."""
    return _WRAPPERS.sub("", name)


def plain(name: str) -> str:
    """The normalized name that a reparametrized weight had before: ``q_proj.weight`` of a weight norm's matrix."""
    return _REPARAMETRIZED.sub(r"\1", normalize(name))


def describe(named: Iterable[tuple[str, Tensor]], module: nn.Module | None) -> list[Named]:
    """Join names with what the module tree says: which modules use a parameter, and what lies around them."""
    places = {} if module is None else _places(module)
    items = []
    for name, param in named:
        place = places.get(id(param), _Place(param))
        items.append(Named(name, param, users=place.users, around=place.around))
    link(items)
    return items


def describe_whole(module: nn.Module, wanted: Container[int]) -> dict[int, tuple[Named, list[str]]]:
    """Every parameter of a module by its identity, each with all names that it has there.

    What has no shape yet, or none that is supported, is left out unless its identity is ``wanted``.
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
    """Where modules hold a parameter."""

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
    """Tell each parameter what lies beside it, and whether it is inside a transformer block."""
    items = list(items)
    modules: dict[str, dict[str, Named]] = {}
    embeddings: dict[int, int] = {}  # rows by width, of the largest: positions and token types tell no head
    for item in items:
        if len(item.shape) >= 2 and not item.name.endswith("bias"):
            modules.setdefault(item.parent, {})[item.child] = item
        if len(item.shape) == 2 and any(isinstance(user, nn.Embedding) for user in item.users):
            rows, width = item.shape
            embeddings[width] = max(rows, embeddings.get(width, 0))
    attentions = [path for path, children in modules.items() if rules.is_attention(children)]
    rules_met = ((item, rules.first_match(rules.NAME_RULES, item.path.lower())) for item in items)
    attentions += [item.parent for item, met in rules_met if met and met[0] in rules.FUSED]
    blocks = {block for path in attentions if (block := _block_around(path))}
    complete = {
        _block_around(path) for path in attentions if "attn_out" in map(rules.child_role, modules.get(path, ()))
    }
    inside = {prefix for path in attentions for prefix in _prefixes(path)}
    stems = {prefix for block in blocks for prefix in ("", *_prefixes(block))}
    for item in items:
        item.beside = modules.get(item.parent, {})
        item.in_transformer = bool(attentions)
        item.block_path = max(_prefixes(item.path) & blocks, key=len, default=None)
        item.output_found = item.block_path in complete
        item.holds_attention = item.parent in inside
        item.in_stem = item.parent in stems
        item.is_head = item.block_path is None and len(item.shape) == 2 and _is_head(item.shape, embeddings)


def _is_head(shape: torch.Size, embeddings: Mapping[int, int]) -> bool:
    rows, width = shape
    return rows != width and embeddings.get(width) == rows


def _block_around(path: str) -> str | None:
    """Of an attention: up to the last number in its path."""
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
    """The module that uses what the innermost one holds, with those around it: of parametrizations, the layer."""
    return around[2:] if isinstance(around[0], ParametrizationList) and len(around) > 2 else around
