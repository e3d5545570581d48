"""One recipe per mode as a user runs it, shrunk by options only; each starts from what the one before has written."""

import pytest
import torch
from commands import RECIPES, logged, run
from finetuning import CONFIG, write_instructions, write_preferences
from litgpt_commands import run_litgpt

TRAINER = RECIPES / "trainer"
SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.accumulate_grad_batches=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.num_sanity_val_steps=0",
]
PRETRAIN = [
    *SHORT,
    "--trainer.val_check_interval=20",
    "--model.init_args.torch_compile=false",
    "--model.init_args.tokenizer_dir=null",
    "--model.init_args.adapm.warmup_steps=2",
    "--model.init_args.adapm.lr=1e-2",
    *(f"--model.init_args.config.{name}={value}" for name, value in CONFIG.items()),
    "--model.init_args.config.block_size=512",  # an Alpaca prompt in a vocabulary of 300
    "--data=lightning_adapm.data.TextDataModule",
    "--data.pattern=*.txt",
    "--data.vocab_size=300",
    "--data.block_size=64",
    "--data.cache_dir=cache",
    "--data.val_fraction=0.2",
]


def finetune(start, out, lr):
    """Options for the recipes that start from a checkpoint directory."""
    return [
        *SHORT,
        "--trainer.max_epochs=6",
        f"--trainer.default_root_dir={out}",
        "--model.init_args.model_name=null",
        f"--model.init_args.checkpoint_dir={start}",
        f"--model.init_args.adapm.lr={lr}",
        "--model.init_args.max_seq_length=512",
        "--data.num_workers=0",
        "--data.val_split_fraction=0.25",
    ]


def fit(folder, recipe, *words):
    run(folder, "fit", "--config", TRAINER / recipe, *words)
    (metrics,) = (folder / "runs" / recipe).with_suffix("").rglob("metrics.csv")
    return metrics.parent


def falls(log, share=0.9):
    losses = [float(value) for value in logged(log, "val_loss")]
    return losses[-1] < share * losses[0]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, corpus):
    """A folder with data, and a model pretrained by the recipe in runs/pretrain/gpt2-124m/final."""
    folder = tmp_path_factory.mktemp("workplace")
    write_instructions(folder / "instructions.json", 40)
    write_preferences(folder / "preferences.json", 40)
    keep = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"
    each = ["--trainer.callbacks.every_n_train_steps=20", "--trainer.callbacks.save_top_k=-1"]
    kept = [keep, *each, "--trainer.callbacks.dirpath=kept"]
    log = fit(folder, "pretrain/gpt2-124m.yaml", *PRETRAIN, f"--data.path={corpus}", "--trainer.max_steps=60", *kept)
    assert falls(log)
    return folder


PRETRAINED = "runs/pretrain/gpt2-124m/final"


def generate(folder, directory):
    pytest.importorskip("requests")  # litgpt's command line needs it and does not require it
    return run_litgpt(folder, "generate", directory, "--prompt=say red", "--max_new_tokens=4").stdout


def test_litgpt_generates_from_what_was_pretrained(workplace):
    assert "say red" in generate(workplace, PRETRAINED)


def test_resumed_equals_uninterrupted(workplace, corpus):
    (kept,) = (workplace / "kept").glob("*step=40.ckpt")
    resumed = ["--trainer.max_steps=60", f"--ckpt_path={kept}"]
    words = [*PRETRAIN, f"--data.path={corpus}", *resumed]
    whole = torch.load(workplace / PRETRAINED / "lit_model.pth")
    (workplace / PRETRAINED / "lit_model.pth").write_bytes(b"")
    run(workplace, "fit", "--config", TRAINER / "pretrain/gpt2-124m.yaml", *words)
    again = torch.load(workplace / PRETRAINED / "lit_model.pth")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["finetune/pythia-1b-full", "finetune/llama-3-8b-full-24gb", "finetune/llama-3-8b-lora"]
)
def test_finetuning_from_it(workplace, recipe):
    words = finetune(PRETRAINED, f"runs/{recipe}", 1e-2)
    words += ["--data.json_path=instructions.json", "--model.init_args.micro_batch_size=6"]
    assert falls(fit(workplace, f"{recipe}.yaml", *words))
    assert "say red" in generate(workplace, f"runs/{recipe}/final")


@pytest.mark.slow
def test_preferences_from_it(workplace):
    recipe = "preference/tinyllama-1.1b-dpo"
    words = finetune(PRETRAINED, f"runs/{recipe}", 3e-3)
    words += ["--data.json_path=preferences.json", "--model.init_args.micro_batch_size=6"]
    assert falls(fit(workplace, f"{recipe}.yaml", *words))
    assert "say red" in generate(workplace, f"runs/{recipe}/final")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.init_args.model_name=pythia-15m"], "no model_name 'pythia-15m'; did you mean"),
        (["--model.init_args.config.n_embd=64"], "of another model"),
        (["--model.init_args.adapm.rnak=3"], "no option 'rnak'; did you mean 'rank'"),
        (["--model.init_args.checkpoint_dir=nowhere"], "'nowhere' does not exist"),
        (["--model.init_args.tokenizer_dir=kept"], "neither tokenizer.json nor tokenizer.model"),
        (["--data=litgpt.data.TextFiles", "--data.train_data_path=kept"], "0 .txt files"),
    ],
)
def test_what_is_wrong_is_one_line(workplace, words, message):
    start = finetune(PRETRAINED, "runs/refused", 1e-2)
    config = TRAINER / "finetune/pythia-1b-full.yaml"
    if not words[0].startswith("--data="):
        start += ["--data.json_path=instructions.json"]
    else:
        start = [word for word in start if not word.startswith("--data")]
    result = run(workplace, "fit", "--config", config, *start, *words, check=False)
    assert result.returncode
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("lightning-adapm: error: ")
    assert message in last
