"""The package's architecture: imports point one way, and AdaPM needs torch alone."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import lightning_adapm

ROOT = Path(lightning_adapm.__file__).parent
LAYERS = {
    "data": 0,  # a leaf
    "sharding": 1,
    "roles": 2,
    "moments": 3,
    "step": 4,
    "state": 4,
    "optim": 5,
    "report": 6,
    "trainer": 7,
    "litgpt": 8,
    "commands": 9,
    "__main__": 10,
}
"""A folder imports from its own number and smaller ones; of the same number step and state, state from step."""

LAZY = {"__init__.py", "litgpt/__init__.py"}
"""Their imports for type checkers only stand for lazy exports."""

NO_LIGHTNING = ("sharding", "roles", "moments", "step", "state", "optim", "report")


def modules():
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8")) for path in ROOT.rglob("*.py")}


def imported(nodes):
    """Modules named by import statements."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module):
    return LAYERS[module.split(".")[1] if module.startswith("lightning_adapm.") else module]


def test_nothing_else_is_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", "__main__"}
    assert {path.parent.name for path in ROOT.glob("*/*.py")} == LAYERS.keys() - {"__main__"}


def test_imports_point_one_way():
    wrong = []
    for path, tree in modules().items():
        if path == "__init__.py":
            continue
        own = path.split("/")[0].removesuffix(".py")
        for name in imported(ast.walk(tree)):
            if name.startswith("lightning_adapm.") and name != "lightning_adapm.__version__":
                other = name.split(".")[1]
                backwards = layer(name) > LAYERS[own] or (own, other) == ("step", "state")
                if backwards:
                    wrong.append(f"{path} imports {name}")
    assert not wrong


def test_no_type_checking_hides_a_circle():
    hidden = []
    for path, tree in modules().items():
        blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        ours = [name for block in blocks for name in imported(ast.walk(block)) if name.startswith("lightning_adapm")]
        if ours and path not in LAZY:
            hidden.append(f"{path}: {ours}")
    assert not hidden


def test_no_module_imports_itself_through_others():
    """At module level; imports inside functions may come later."""
    trees = modules()
    names = {
        "lightning_adapm." + path.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in trees
    }
    graph = {}
    for path, tree in trees.items():
        name = "lightning_adapm." + path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        found = {next((n for n in (each, each.rpartition(".")[0]) if n in names), None) for each in imported(tree.body)}
        graph[name] = found - {None, name, "lightning_adapm"}
    done = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_folders_from_trainer_on_import_lightning():
    wrong = [
        f"{path} imports {name}"
        for path, tree in modules().items()
        if path.startswith(NO_LIGHTNING)
        for name in imported(ast.walk(tree))
        if name.split(".")[0] in ("lightning", "pytorch_lightning", "torchmetrics")
    ]
    assert not wrong


def test_adapm_loads_nothing_of_lightning_and_fsdp():
    code = (
        "import sys, torch; before = set(sys.modules); from lightning_adapm import AdaPM;"
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "lightning_adapm" in loaded
    assert not loaded & {"lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics", "rich", "litgpt"}
    # each takes longer than everything else together, and only those who shard need them
    assert not loaded & {"torch.distributed.tensor", "torch.distributed.fsdp"}


def test_rich_is_imported_where_tables_are_drawn():
    trees = modules()
    assert not [path for path, tree in trees.items() if any(n.split(".")[0] == "rich" for n in imported(tree.body))]


def exists(reference):
    """Whether a dotted name is a module, or something in one: an attribute, an annotated field."""
    parts = reference.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("lightning_adapm"):  # a package that is not installed, such as Triton
                return True
            continue
        for part in parts[count:]:
            if part in getattr(found, "__annotations__", {}):
                return True
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_references_in_docstrings_name_what_exists():
    pattern = re.compile(r":(?:class|func|mod|meth|data|attr):`~?(lightning_adapm\.[\w.]+)`")
    references = {
        reference: path for path in ROOT.rglob("*.py") for reference in pattern.findall(path.read_text("utf-8"))
    }
    assert len(references) > 20
    assert not [f"{path.name}: {reference}" for reference, path in references.items() if not exists(reference)]
