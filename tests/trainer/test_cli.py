"""The command line: whole runs as a user starts them, and what the CLI adds to Lightning's."""

import sys

import pytest
import torch
from commands import QUICKSTART, logged, run, shrunk
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

import lightning_adapm
from lightning_adapm.__main__ import main
from lightning_adapm.trainer import cli


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """The quick start with AdamW and then with AdaPM, as ``make pretrain`` does; what the second prints is a file."""
    folder = tmp_path_factory.mktemp("runs")
    small = ["--model.init_args.adapm.warmup_steps=2", *shrunk(corpus, folder, steps=6)]
    adamw = ["--config=recipe:pretrain/quickstart", "--config", "recipe:pretrain/quickstart-adamw"]
    run(folder, "fit", *adamw, *small)
    printed = run(folder, "fit", "--config", QUICKSTART, *small).stdout
    (folder / "runs" / "quickstart" / "printed").write_text(printed)
    return folder / "runs" / "quickstart"


@pytest.fixture
def in_process(monkeypatch):
    """The command line in this process, which is faster; LightningCLI reads ``sys.argv``."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["lightning-adapm", *map(str, words)])
        main()

    return call


def test_quickstart_leaves_logs_and_checkpoints(runs):
    for name in ("adapm", "adamw"):
        folder = runs / name / "version_0"
        assert (folder / "checkpoints" / "last.ckpt").is_file()
        assert (folder / "config.yaml").is_file()
        first, *_, last = map(float, logged(folder, "val_loss"))
        assert last < first
        assert len(logged(folder, "val_loss")) == 3
        assert list((runs / "tensorboard" / name / "version_0").glob("events.*"))


def test_quickstart_ends_with_both_losses_and_pictures(runs):
    (row,) = [line for line in (runs / "printed").read_text().splitlines() if "validation loss" in line]
    losses = [float(logged(runs / name / "version_0", "val_loss")[-1]) for name in ("adapm", "adamw")]
    assert [float(word) for word in row.split()[2:4]] == pytest.approx(losses, abs=1e-3)
    assert list((runs / "adapm" / "version_0").glob("*.png"))


def test_adamw_twin_differs_in_the_optimizer_only(runs):
    ours, theirs = (runs / name / "version_0" for name in ("adapm", "adamw"))
    (rate,) = {key for key in (ours / "metrics.csv").read_text().splitlines()[0].split(",") if key.startswith("lr-")}
    # Warm-up and cosine are the same...
    rates = logged(theirs, "lr-AdamW")
    assert logged(ours, rate) == rates
    assert len(rates) == 6
    assert float(rates[0]) < float(rates[2]) > float(rates[5])
    # ...and so are initialization and batches: the first loss comes before any update.
    assert logged(ours, "train_loss")[0] == logged(theirs, "train_loss")[0]
    states = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
        for folder in (ours, theirs)
    ]
    assert states[0]["TextDataModule"] == states[1]["TextDataModule"]
    assert states[0]["TextDataModule"]["train_loader"]["position"] == 6
    assert states[0]["optimizer_states"][0]["state"].keys() == states[1]["optimizer_states"][0]["state"].keys()


def test_resume_from_the_command_line(corpus, tmp_path, in_process, monkeypatch):
    """Stopped at step 3 of 6 and resumed, the run ends with the weights of the uninterrupted one.

    What is written for the resumed run counts, and not what the checkpoint was trained with: another optimizer, too.
    """
    weights, dtypes = {}, {}
    for name, steps, options in (
        ("whole", 6, []),
        ("stopped", 3, []),
        ("resumed", 6, ["--ckpt_path", tmp_path / "stopped.ckpt"]),
        ("changed", 6, ["--ckpt_path", tmp_path / "stopped.ckpt", "--model.init_args.adapm.state_dtype=float16"]),
        ("adamw", 6, ["--ckpt_path", tmp_path / "stopped.ckpt", "--optimizer=torch.optim.AdamW"]),
    ):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        # Constant: the cosine's length is the number of steps, which differs here.
        settings = ["--model.init_args.adapm.warmup_steps=2", "--model.init_args.adapm.schedule=constant"]
        in_process(
            *("fit", "--config", QUICKSTART, *shrunk(corpus, tmp_path, steps), *settings, *options),
            "--trainer.val_check_interval=3",
        )
        (last,) = (tmp_path / name).rglob("last.ckpt")
        last.rename(tmp_path / f"{name}.ckpt")
        checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert checkpoint["global_step"] == steps
        weights[name] = checkpoint["state_dict"]
        states = checkpoint["optimizer_states"][0]["state"].values()
        dtypes[name] = {state["exp_avg"].dtype for state in states if "exp_avg" in state}
    assert dtypes["changed"] == {torch.float16} and dtypes["resumed"] == {torch.float32}
    for name, weight in weights["whole"].items():
        assert torch.equal(weights["resumed"][name], weight), name
        assert not torch.equal(weights["stopped"][name], weight), name


def test_validate_a_checkpoint(runs, corpus, tmp_path, in_process, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = runs / "adapm" / "version_0"
    small = [word for word in shrunk(corpus, tmp_path) if "--trainer" not in word]
    in_process(
        *("validate", "--config", QUICKSTART, *small, "--ckpt_path", folder / "checkpoints" / "last.ckpt"),
        *("--trainer.limit_val_batches=1", "--trainer.accelerator=cpu", "--trainer.callbacks=null"),
        *("--trainer.logger=false", "--trainer.enable_progress_bar=false"),
    )
    expected = float(logged(folder, "val_loss")[-1])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "val_loss" in line]
    assert any(abs(float(word) - expected) < 1e-5 for word in line.split() if word[0].isdigit())


# Precision


@pytest.mark.parametrize(
    ("has_bf16", "options", "expected"),
    [
        (True, [], "bf16-mixed"),
        (False, [], None),
        (True, ["--trainer.accelerator=cpu"], None),
        (True, ["--trainer.precision=16-mixed"], "16-mixed"),
    ],
)
def test_precision_follows_the_hardware_unless_given(monkeypatch, has_bf16, options, expected):
    class ParsedError(Exception):
        pass

    def stop(self):
        raise ParsedError(self.config.fit.trainer.precision)

    monkeypatch.setattr(cli, "_cuda_has_bf16", lambda: has_bf16)
    monkeypatch.setattr(cli.AdaPMCLI, "instantiate_classes", stop)
    monkeypatch.setattr(sys, "argv", ["lightning-adapm"])
    with pytest.raises(ParsedError) as parsed:
        cli.AdaPMCLI(["fit", "--config", str(QUICKSTART), *options])
    assert parsed.value.args == (expected,)


def test_a_recipe_runs_without_its_progress_bar(monkeypatch):
    class ParsedError(Exception):
        pass

    def stop(self):
        raise ParsedError([callback.class_path.rpartition(".")[2] for callback in self.config.fit.trainer.callbacks])

    monkeypatch.setattr(cli.AdaPMCLI, "instantiate_classes", stop)
    monkeypatch.setattr(sys, "argv", ["lightning-adapm"])
    for option, first in (("true", "RichProgress"), ("false", "LearningRateMonitor")):
        with pytest.raises(ParsedError) as parsed:
            cli.AdaPMCLI(["fit", "--config", str(QUICKSTART), f"--trainer.enable_progress_bar={option}"])
        assert parsed.value.args[0][0] == first


def test_null_turns_an_option_off(corpus, tmp_path, in_process, monkeypatch):
    class BuiltError(Exception):
        pass

    def stop(self, *args, **kwargs):
        raise BuiltError(self.adapm_options["clip_threshold"])

    monkeypatch.setattr(cli.AdaPMMixin, "configure_optimizers", stop)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuiltError) as built:
        in_process("fit", "--config", QUICKSTART, *shrunk(corpus, tmp_path), "--model.adapm.clip_threshold=null")
    assert built.value.args == (None,)


# Schedule


def test_a_scheduler_of_the_users_own_stays():
    module = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    command_line = object.__new__(cli.AdaPMCLI)  # without a run
    assert command_line.configure_optimizers(module, optimizer, scheduler) == ([optimizer], [scheduler])
    assert command_line.configure_optimizers(module, optimizer, None) is optimizer


# Help and bad input


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["litgpt", "--help"]])
def test_help_names_the_commands_without_loading_lightning(in_process, capsys, monkeypatch, words):
    monkeypatch.setitem(sys.modules, "lightning_adapm.trainer.cli", None)  # an import would fail
    in_process(*words)
    assert "lightning-adapm fit --config" in capsys.readouterr().out
    in_process("--version")
    assert capsys.readouterr().out == f"lightning-adapm {lightning_adapm.__version__}\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.init_args.vocab_size=3", "`vocab_size` must be at least 257"),
        ("--data.init_args.path=no/such/folder", "`path`: there is no 'no/such/folder'"),
        ("--data.init_args.blok_size=3", "has no option 'blok_size'; did you mean 'block_size'?"),
        ("--model.init_args.config.n_heads=3", "no field 'n_heads'; did you mean 'n_head'?"),
        ("--trainer.max_stepz=3", "arguments: --trainer.max_stepz=3; did you mean --trainer.max_steps?"),
        ("--model.init_args.adapm.rnak=3", "adapm has no option 'rnak'; did you mean 'rank'?"),
        ("--ckpt_path=nowhere.ckpt", "error: `ckpt_path`: 'nowhere.ckpt' does not exist; give"),
        (
            "--optimizer=lightning_adapm.Adapm",
            "error: optimizer: there is no class 'lightning_adapm.Adapm'; did you mean 'AdaPM'?",
        ),
        ("--trainer.strategy=fsdp", "error: The strategy `fsdp` requires a GPU accelerator"),
        ("--trainer.strategy=deepspeed", "error: To use the `DeepSpeedStrategy`, you must have DeepSpeed installed"),
    ],
)
def test_bad_input_is_named_without_a_traceback(corpus, tmp_path, in_process, capsys, monkeypatch, option, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        in_process("fit", "--config", QUICKSTART, *shrunk(corpus, tmp_path), option)
    assert end.value.code != 0
    assert message in (end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err)


@pytest.mark.parametrize("command", ["fit", "plan"])
@pytest.mark.parametrize("words", [["--config", "utf16.yaml"], ["--config=utf16.yaml"]])
def test_a_configuration_in_another_encoding(in_process, tmp_path, monkeypatch, command, words):
    """As PowerShell's ``>`` writes it."""
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("utf16.yaml").write_text("seed_everything: 1", encoding="utf-16")
    with pytest.raises(SystemExit) as end:
        in_process(command, *words)
    assert "--config: utf16.yaml is not text in UTF-8; save it in that encoding" in end.value.code


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "which model? Give --config recipe:NAME"),
        ("", "empty or not a mapping. Give"),
    ],
)
def test_a_run_without_a_model(in_process, tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("own.yaml").write_text(content or "")
    with pytest.raises(SystemExit, match="lightning-adapm: error: ") as end:
        in_process("fit", *([] if content is None else ["--config", "own.yaml"]))
    assert message in end.value.code


@pytest.mark.parametrize(
    ("word", "message"), [("plam", "did you mean 'plan'?"), ("xyz", "the commands are recipes, plan, prepare, fit")]
)
def test_a_command_that_there_is_not(in_process, word, message):
    """Lightning's parser would list its own commands only."""
    with pytest.raises(SystemExit) as end:
        in_process(word, "--model_name", "Llama-3-8B")
    assert f"there is no command {word!r}; {message}" in end.value.code


def test_errors_that_are_not_about_input_keep_their_traceback(in_process, monkeypatch):
    def broken(self, args=None):
        raise ZeroDivisionError

    monkeypatch.setattr(cli.LightningCLI, "__init__", lambda *args, **kwargs: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        in_process("fit")


def test_a_checkpoint_that_cannot_be_read_is_refused_before_any_work(tmp_path):
    saved = tmp_path / "a run" / "checkpoints" / "last.ckpt"
    saved.parent.mkdir(parents=True)
    with pytest.raises(ValueError, match="a run' is a folder and no checkpoint; it holds none, so give another"):
        cli.check_checkpoint(str(tmp_path / "a run"))
    torch.save({"state_dict": {"weight": torch.zeros(1000)}}, saved)
    cli.check_checkpoint(str(saved))
    with pytest.raises(ValueError, match="a run' is a folder and no checkpoint; give '.*last.ckpt'"):
        cli.check_checkpoint(str(tmp_path / "a run"))
    saved.write_bytes(saved.read_bytes()[:2000])
    with pytest.raises(ValueError, match="last.ckpt' of 2000 bytes is no complete checkpoint; give an earlier one"):
        cli.check_checkpoint(str(saved))
    for path in (None, "last", "s3://runs/last.ckpt"):
        cli.check_checkpoint(path)
    for name in (".metadata", "latest"):  # of torch.distributed.checkpoint and of DeepSpeed
        saved = tmp_path / name.removeprefix(".")
        saved.mkdir()
        (saved / name).touch()
        cli.check_checkpoint(str(saved))


@pytest.mark.parametrize(("raised", "status"), [(SIGTERMException, 143), (KeyboardInterrupt, 130)])
def test_an_interrupted_run_does_not_end_with_status_0(in_process, monkeypatch, capsys, raised, status):
    """Lightning's SIGTERMException would end with 0, after which `fit && generate` would go on."""

    def interrupted(*args, **kwargs):
        raise raised

    monkeypatch.setattr(cli.LightningCLI, "__init__", interrupted)
    with pytest.raises(SystemExit) as end:
        in_process("fit")
    assert end.value.code == status
    assert "--ckpt_path continues from a checkpoint" in capsys.readouterr().err
    monkeypatch.setattr("lightning_adapm.commands.recipes.run", interrupted)
    with pytest.raises(SystemExit) as end:
        in_process("recipes")
    assert end.value.code == status
    assert "--ckpt_path" not in capsys.readouterr().err  # which only training has


@pytest.mark.parametrize("reader", ["lightning.pytorch.trainer.connectors.checkpoint_connector", "a_user_s_module"])
def test_weights_that_do_not_fit_are_blamed_on_ckpt_path_only_where_it_is_read(in_process, monkeypatch, reader):
    names = {"__name__": reader, "weights": {"bias": torch.zeros(3)}, "layer": torch.nn.Linear(2, 3)}
    exec("def load(*args, **kwargs):\n    layer.load_state_dict(weights)", names)
    monkeypatch.setattr(cli.LightningCLI, "__init__", names["load"])
    is_ckpt_path = reader.startswith("lightning")
    with pytest.raises(SystemExit if is_ckpt_path else RuntimeError, match="ckpt_path" if is_ckpt_path else "Missing"):
        in_process("fit")


@pytest.mark.parametrize("package", ["lightning_adapm.made_up", "elsewhere"])
@pytest.mark.parametrize(
    "error", [ValueError, TypeError, FileNotFoundError, ModuleNotFoundError, MisconfigurationException, KeyError]
)
def test_one_line_is_for_errors_of_input_that_this_package_raises(in_process, monkeypatch, package, error):
    names = {"__name__": package, "error": error}
    exec("def build(*args, **kwargs):\n    refuse = error('bad; write good')\n    raise refuse", names)  # has no source
    monkeypatch.setattr(cli.LightningCLI, "__init__", names["build"])
    one_line = package.startswith("lightning_adapm") and error is not KeyError
    with pytest.raises(SystemExit if one_line else error) as end:
        in_process("fit")
    if one_line:
        assert end.value.code == (
            "lightning-adapm: error: bad; write good (LIGHTNING_ADAPM_TRACEBACK=1 shows the traceback)"
        )
    monkeypatch.setenv("LIGHTNING_ADAPM_TRACEBACK", "1")
    with pytest.raises(error, match="bad; write good"):
        in_process("fit")


FSDP2 = ("--config", QUICKSTART, "--config", QUICKSTART.with_name("quickstart-fsdp2.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["lightning_adapm.AdaPM", "torch.optim.AdamW"])
def test_an_optimizer_of_the_command_line_trains_under_fsdp2(corpus, tmp_path, optimizer):
    """LightningCLI builds it before the parameters are replaced."""
    run(tmp_path, "fit", *FSDP2, *shrunk(corpus, tmp_path), "--optimizer", optimizer, "--optimizer.lr=0.01")
    folder = tmp_path / "runs" / "quickstart" / "adapm" / "version_0"
    first, last = map(float, logged(folder, "val_loss"))
    assert last < first - 0.1
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    state = saved["optimizer_states"][0]["state"]
    assert len(state) == len(saved["state_dict"])
    assert {float(each["step"]) for each in state.values()} == {4.0}


@pytest.mark.slow
def test_the_recipes_for_two_processes_train_as_one_device(corpus, tmp_path):
    """With the batch of the recipes: every process takes its part of the same batches, in training and validation."""
    losses = {}
    for name in ("single", "ddp", "fsdp2"):
        recipe = () if name == "single" else ("--config", QUICKSTART.with_name(f"quickstart-{name}.yaml"))
        small = [word for word in shrunk(corpus, tmp_path, steps=6) if "batch_size" not in word]
        (tmp_path / name).mkdir()
        run(tmp_path / name, "fit", "--config", QUICKSTART, *recipe, *small)
        losses[name] = [float(loss) for loss in logged(tmp_path / name / "runs/quickstart/adapm/version_0", "val_loss")]
    assert losses["single"][-1] < losses["single"][0]
    assert losses["ddp"] == pytest.approx(losses["single"], rel=1e-4)
    assert losses["fsdp2"] == pytest.approx(losses["single"], rel=1e-4)


def test_tensor_parallelism_is_refused_before_training(corpus, tmp_path):
    sizes = ["--trainer.strategy.init_args.data_parallel_size=1", "--trainer.strategy.init_args.tensor_parallel_size=2"]
    result = run(tmp_path, "fit", *FSDP2, *shrunk(corpus, tmp_path), *sizes, check=False)
    assert result.returncode
    assert "`tensor_parallel_size` 2" in result.stderr
    assert "`ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)`" in result.stderr
    assert "Traceback" not in result.stderr
