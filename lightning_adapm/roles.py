"""Roles: what a parameter is in the transformer.

Found by module type first (an ``nn.Embedding``'s weight is an embedding, whatever its name), then by attention
structure (projections that lie beside each other), then by name; the tables are in :mod:`lightning_adapm.rules`. A
linear layer of a transformer that is neither in an attention module nor in a recurrent mixer is an MLP's: projections
between widths, poolers, connectors. A matrix that nothing matches is reported, never guessed. Which rows of a fused
weight are whose is the business of :mod:`lightning_adapm.attention`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_adapm import rules
from lightning_adapm.layout import shape_of

ROLES = ("embedding", "query", "key", "value", "attn_out", "mlp", "lm_head", "norm", "bias", "adapter")
"""What a piece of a parameter can be."""

FUSED = ("qkv", "kv")
"""Roles of weights that hold the rows of several; their pieces have roles from :data:`ROLES`."""

UNMATCHED = "unmatched"
POLICIES = ("none", "low_rank", "full")

_WRAPPERS = re.compile(
    r"(^|(?<=\.))(_forward_module|_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer"
    r"|original_module|modules_to_save\.\w+)\."
)


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that has one role: all of it, or a slice ``start`` to ``stop`` of each of ``groups``
    equal groups of rows (of columns, where the weight is ``transposed``) of a fused weight.

    ``heads`` is how many equal row blocks it consists of, for Adam-mini's second moment, where that is known; ``flat``
    says that all dimensions but the first are one (a convolution), where a third dimension is else a stack of matrices;
    ``transposed`` says that outputs are columns (Hugging Face's ``Conv1D``); ``dim`` is how many dimensions the
    parameter had when its role was found; ``block`` is the number of the transformer block around it, 0 outside;
    ``part`` is its name where several pieces have one role (a fused gate and up projection).
    """

    role: str
    start: int = 0
    stop: int | None = None
    groups: int = 1
    heads: int | None = None
    flat: bool = False
    transposed: bool = False
    dim: int = 2
    block: int = 0
    part: str = ""

    @property
    def whole(self) -> bool:
        return self.stop is None

    @property
    def prefix(self) -> str:
        """Of this piece's keys in the optimizer's state."""
        return "" if self.whole else f"{self.part or self.role}."

    def view(self, tensor: Tensor) -> Tensor:
        """This piece of a tensor of the parameter's shape; shares memory with it."""
        if self.stop is None:
            return tensor
        axis, length = int(self.transposed), self.stop - self.start
        if self.groups == 1:
            return tensor.narrow(axis, self.start, length)
        return tensor.unflatten(axis, (self.groups, -1)).narrow(axis + 1, self.start, length)

    def shape(self, whole: torch.Size) -> torch.Size:
        """Of the :meth:`matrix` of a parameter of shape ``whole``."""
        return self.matrix(torch.empty(whole, device="meta")).shape

    def matrix(self, tensor: Tensor) -> Tensor:
        """:meth:`view` as a matrix or a stack of matrices; as it is where it has fewer than two dimensions."""
        view = self.view(tensor)
        if self.flat:
            return view.flatten(1)
        axis = int(self.transposed)
        return view.flatten(axis, axis + 1) if self.groups > 1 else view


@dataclass
class Named:
    """One parameter with what is known about it."""

    name: str
    param: Tensor
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

    def __post_init__(self) -> None:
        self.shape = shape_of(self.param)

    @cached_property
    def path(self) -> str:
        """The normalised name without ``.weight``."""
        return re.sub(r"(\.(linear|inner_linear)|(?<=to_out)\.0)?\.weight$", "", normalize(self.name))

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


def child_role(child: str) -> str | None:
    """What a projection would be if it lay in an attention module, by its own name."""
    return next((role for role, pattern in rules.CHILD_RULES if re.fullmatch(pattern, child)), None)


def is_attention(children: Iterable[str]) -> bool:
    """Whether matrices of these names, lying beside each other, are those of an attention module."""
    roles = {child_role(child) for child in children}
    if "query" in roles:
        return bool(roles & {"key", "value", "kv", "qkv"})
    return "qkv" in roles or {"key", "value", "attn_out"} <= roles  # the latter ask with a learned vector


def find_role(item: Named, taught: Mapping[str, str] | None = None) -> tuple[str | None, str]:
    """The role of one parameter (one of :data:`ROLES` or :data:`FUSED`; None where nothing matches), and why.

    ``taught`` (regular expressions on the normalised name, searched in order) come before everything else; their values
    are roles, which apply to matrices, or policies.
    """
    name = normalize(item.name)
    for pattern, role in (taught or {}).items():
        if re.search(pattern, name) and fits(role, item.shape):
            return role, f"roles[{pattern!r}]"
    return _by_type(item) or _by_structure(item) or _by_name(item) or (None, "nothing matches")


def _by_type(item: Named) -> tuple[str | None, str] | None:
    stem, kinds = item.path.lower(), [type(user).__name__ for user in item.users]
    if item.in_adapter:
        return "adapter", "held by an adapter"
    if found := re.search(rules.ADAPTER, stem):
        return "adapter", _named(found)
    if any(isinstance(user, nn.Embedding) for user in item.users):
        return "embedding", "used by nn.Embedding"
    if len(item.shape) < 2 or item.shape.numel() == max(item.shape):
        return ("bias" if stem.endswith("bias") else "norm"), "a vector"
    if any(re.search(r"norm(\dd)?$", kind, re.IGNORECASE) for kind in kinds):
        return "norm", "used by a norm"
    if found := re.search(rules.BIASES, stem):
        return "bias", _named(found)
    if item.name.endswith(".weight") and any(kind.endswith("Embedding") for kind in kinds):
        return "embedding", "used by an embedding"
    return None


def _by_structure(item: Named) -> tuple[str | None, str] | None:
    if item.in_mixer:
        return None, "in a recurrent or state-space mixer"
    if not is_attention(item.beside):
        return None
    role = child_role(item.child)
    if role == "qkv" and "q_attn" in item.beside:  # GPT-2's cross-attention
        role = "kv"
    return (role, "lies in an attention module") if role else None


def _by_name(item: Named) -> tuple[str | None, str] | None:
    stem = item.path.lower()
    if _is_table(item) and (found := re.search(rules.EMBEDDINGS, stem)):
        return "embedding", _named(found)
    if rule := _rule(rules.NAME_RULES, stem):
        return rule
    if item.in_attention:
        role = child_role(item.child)
        if role in ("query", "key", "value") or (role == "attn_out" and item.holds_attention):
            return role, f"name {item.child!r}"
        return None, "in an attention module, of an unknown name"
    if item.is_head:
        return "lm_head", "has the shape of an embedding"
    if item.block_path is None and (found := re.search(rules.HEADS, stem)):
        return "lm_head", _named(found)
    if re.fullmatch(rules.INPUT_ONLY, item.child) or _holds_more(item):
        return None, "may hold an attention's inputs or outputs as well as an MLP's"
    return _rule(rules.NAME_RULES_OUTSIDE, stem) or _by_place(item)


def _holds_more(item: Named) -> bool:
    """Whether the first layer of two gives other than the second takes: Flux fuses attention into both of them."""
    first, second = item.beside.get("linear1"), item.beside.get("linear2")
    if first is None or second is None or len(first.shape) != 2 or len(second.shape) != 2:
        return False
    width = second.shape[1]
    return (item is first or item is second) and first.shape[0] not in (width, 2 * width)


def _rule(table: Iterable[tuple[str | None, str]], stem: str) -> tuple[str | None, str] | None:
    """The first rule of a table that a name matches; one whose role is None refuses it."""
    matches = ((role, re.search(pattern, stem)) for role, pattern in table)
    return next(((role, _named(found)) for role, found in matches if found), None)


def _named(found: re.Match[str]) -> str:
    return f"name {found.group().strip('._')!r}"


def _by_place(item: Named) -> tuple[str | None, str] | None:
    if is_attention(item.beside):
        return None, "beside an attention's projections, of an unknown name"
    role = child_role(item.child)
    if role not in (None, "attn_out") or (re.fullmatch(rules.OUTPUT_ONLY, item.child) and not item.output_found):
        return None, "called as in attention, but not found in one"
    if item.block_path is not None:
        return "mlp", "in a transformer block, outside its attention"
    if item.in_transformer and item.is_linear:
        return "mlp", "a linear layer of a transformer, outside attention"
    if item.in_stem and _is_convolution(item):
        return "mlp", "a convolution beside transformer blocks"
    return None


def fits(role: str, shape: torch.Size) -> bool:
    """Whether a parameter can have this role or policy: a bias is no MLP, though an MLP's rule may match its name."""
    return len(shape) >= 2 or role in POLICIES or role in ("norm", "bias", "adapter")


def describe(named: Iterable[tuple[str, Tensor]], module: nn.Module | None) -> list[Named]:
    """Join names with what the module tree says: which modules use a parameter, and what lies around them."""
    users: dict[int, list[nn.Module]] = {}
    around: dict[int, list[nn.Module]] = {}
    modules = dict(module.named_modules(remove_duplicate=False)) if module is not None else {}
    for path, user in modules.items():
        for param in user._parameters.values():
            if param is not None:
                users.setdefault(id(param), []).append(user)
                around.setdefault(id(param), []).extend(_ancestors(path, modules))
    items = [Named(name, param, users.get(id(param), []), around.get(id(param), [])) for name, param in named]
    link(items)
    return items


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
    attentions = [path for path, children in modules.items() if is_attention(children)]
    rules_met = ((item, _rule(rules.NAME_RULES, item.path.lower())) for item in items)
    attentions += [item.parent for item, met in rules_met if met and met[0] in FUSED]
    blocks = {block for path in attentions if (block := _block_around(path))}
    complete = {_block_around(path) for path in attentions if "attn_out" in map(child_role, modules.get(path, ()))}
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


def _is_table(item: Named) -> bool:
    """Rows that are looked up or learned, as far as the modules that use them, or the shape alone, say."""
    if item.users:
        return not (item.is_linear or _is_convolution(item))
    return len(item.shape) == 2 or item.shape[0] == 1


def _is_convolution(item: Named) -> bool:
    return any(isinstance(user, nn.modules.conv._ConvNd) for user in item.users)


def _is_linear(user: nn.Module) -> bool:
    if isinstance(user, nn.modules.conv._ConvNd):
        padded = user.padding != "valid" and any(user.padding)
        return user.kernel_size == user.stride and user.groups == 1 and not padded and not user.transposed
    return isinstance(user, nn.Linear) or type(user).__name__.endswith(("Linear", "Conv1D"))


def _ancestors(path: str, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The module at ``path`` and those around it up to the root, nearest first."""
    parts = path.split(".") if path else []
    return [modules[prefix] for end in range(len(parts), -1, -1) if (prefix := ".".join(parts[:end])) in modules]
