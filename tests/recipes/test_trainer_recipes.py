"""Every recipe for the Lightning CLI runs, shrunk, exactly as its file says otherwise."""

import pytest
import yaml
from commands import RECIPES, logged, run, shrunk

FILES = sorted((RECIPES / "trainer").rglob("*.yaml"))


def configs(path):
    """The files to give: a recipe without a model is a change to the one whose name its own begins with."""
    if "model" in yaml.safe_load(path.read_text()):
        return [path]
    (base,) = [other for other in FILES if path.stem.startswith(f"{other.stem}-") and other.parent == path.parent]
    return [*configs(base), path]


class StrictLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys and says nothing; in a recipe that is a mistake."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"twice the same key{node.start_mark}"
        return super().construct_mapping(node, deep)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_no_key_is_given_twice(path):
    yaml.load(path.read_text(), StrictLoader)


def test_there_are_recipes():
    assert {"quickstart", "quickstart-adamw"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_recipe_runs(path, corpus, tmp_path):
    words = [word for config in configs(path) for word in ("--config", config)]
    run(tmp_path, "fit", *words, *shrunk(corpus, tmp_path))
    (table,) = tmp_path.rglob("metrics.csv")
    losses = [float(value) for value in logged(table.parent, "val_loss")]
    assert len(losses) == 2
    assert losses[1] < losses[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_recipe_says_how_to_run_it(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "lightning-adapm fit" in header
    for config in configs(path):
        assert config.relative_to(RECIPES.parent).as_posix() in header
