"""Weights of a checkpoint are read once, to where they are trained, and nothing is drawn or held in their place."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from finetuning import CONFIG, write_instructions, write_tokenizer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from litgpt import GPT, Config
from litgpt.data import JSON
from torch import nn
from trainers import quiet_trainer

from lightning_adapm.litgpt import reading
from lightning_adapm.litgpt.checkpoint import write_checkpoint
from lightning_adapm.litgpt.module import LitGPTModule
from lightning_adapm.trainer.cli import AdaPMCLI

LORA = {"lora_r": 2, "lora_alpha": 4, "lora_query": True, "lora_value": True}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def base(request, tmp_path_factory):
    """A litgpt checkpoint directory of random weights."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    module = LitGPTModule(config=CONFIG, tokenizer_dir=str(write_tokenizer(folder / "tokenizer"))).to(request.param)
    write_checkpoint(folder / "model", module, module.state_dict())
    return folder / "model"


def read_the_old_way(base):
    """litgpt's model, drawn at random and then overwritten."""
    model = GPT(Config.from_checkpoint(base))
    model.load_state_dict(torch.load(base / "lit_model.pth"))
    return model


def in_file(tensor):
    """Whether a tensor's memory is mapped from a checkpoint."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(edge, 16) for edge in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.endswith("lit_model.pth")
    return False


def trained(module, tmp_path, precision, steps=1):
    run = quiet_trainer(tmp_path, max_steps=steps, precision=precision, limit_val_batches=0, enable_checkpointing=False)
    data = JSON(write_instructions(tmp_path / "instructions.json"), val_split_fraction=0.25, num_workers=0)
    run.fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"tie_embeddings": True}])
def test_nothing_is_drawn_where_the_checkpoint_has_all(base, options):
    before = torch.get_rng_state()
    module = LitGPTModule(checkpoint_dir=str(base), **options)
    assert all(in_file(param) for param in module.parameters())
    module.configure_model()
    assert torch.equal(torch.get_rng_state(), before)
    expected = read_the_old_way(base)
    if options.get("tie_embeddings"):
        assert module.model.lm_head.weight is module.model.transformer.wte.weight
        expected.lm_head.weight = expected.transformer.wte.weight
    tokens = torch.randint(0, 300, (2, 9))
    assert torch.equal(module(tokens), expected(tokens))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_training_has_the_precisions_dtype_and_leaves_the_file_alone(base, tmp_path, precision):
    kept = (base / "lit_model.pth").read_bytes()
    module = LitGPTModule(checkpoint_dir=str(base), max_seq_length=64, adapm={"lr": 0.0, "weight_decay": 0.0})
    trained(module, tmp_path, precision)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    for name, weight in read_the_old_way(base).named_parameters():
        param = module.model.get_parameter(name)
        assert not in_file(param)
        assert param.dtype == dtype
        assert torch.equal(param, weight.to(dtype)), name
    trained(LitGPTModule(checkpoint_dir=str(base), max_seq_length=64, adapm={"lr": 1.0}), tmp_path, precision)
    assert (base / "lit_model.pth").read_bytes() == kept


@pytest.mark.parametrize("tied", [False, True])
def test_modules_leave_the_file_one_after_another(base, tied):
    """As FSDP1 asks for them; the dtype changes on the device."""
    module = LitGPTModule(checkpoint_dir=str(base), tie_embeddings=tied)
    strategy = FSDPStrategy(parallel_devices=[torch.device("cpu")], cluster_environment=LightningEnvironment())
    module._trainer = SimpleNamespace(strategy=strategy)
    with FSDPPrecision("bf16-true").module_init_context():
        module.configure_model()
    place = strategy.kwargs["param_init_fn"]
    assert all(param.is_meta and param.dtype == torch.bfloat16 for param in module.parameters())
    for each in module.modules():
        place(each)
    assert (module.model.lm_head.weight is module.model.transformer.wte.weight) == tied
    for name, weight in read_the_old_way(base).named_parameters():
        param = module.model.get_parameter(name)
        assert not in_file(param)
        if not (tied and name == "lm_head.weight"):
            assert torch.equal(param, weight.bfloat16()), name


@pytest.mark.parametrize("how", ["changed", "replaced", "deleted"])
def test_weights_that_are_not_those_of_the_file_are_kept(base, tmp_path, how):
    """A module's weights are what it shows, whatever has become of the file."""
    folder = shutil.copytree(base, tmp_path / "model")
    module = LitGPTModule(checkpoint_dir=str(folder))
    if how == "changed":
        module.model.lm_head.weight.data.fill_(3.0)
    else:
        (folder / "lit_model.pth").unlink()
    if how == "replaced":
        (folder / "lit_model.pth").write_bytes(bytes((base / "lit_model.pth").stat().st_size))
    expected = {name: param.clone() for name, param in module.named_parameters()}
    module.configure_model()
    for name, param in module.named_parameters():
        assert not in_file(param) and torch.equal(param, expected[name].float()), name


@pytest.mark.parametrize("base", [torch.float32], indirect=True)
def test_resuming_reads_the_resumed_checkpoint_alone(base, tmp_path, monkeypatch):
    data = write_instructions(tmp_path / "instructions.json")
    settings = {
        "model": {"class_path": "lightning_adapm.litgpt.LitGPTModule", "init_args": {"checkpoint_dir": str(base)}},
        "data": {"class_path": "litgpt.data.JSON", "init_args": {"json_path": str(data), "val_split_fraction": 0.25}},
        "trainer": {"max_steps": 1, "limit_val_batches": 0, "accelerator": "cpu", "logger": False},
    }
    settings["trainer"] |= {"default_root_dir": str(tmp_path), "enable_progress_bar": False}
    settings["data"]["init_args"]["num_workers"] = 0
    settings["model"]["init_args"]["max_seq_length"] = 64
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    words = ["fit", "--config", str(tmp_path / "run.yaml")]
    AdaPMCLI(words)
    (path,) = tmp_path.glob("**/*.ckpt")
    saved = torch.load(path, weights_only=False)
    saved["state_dict"] = {name: value + 1 for name, value in saved["state_dict"].items()}
    torch.save(saved, path)
    monkeypatch.setattr(reading.Files, "source", lambda *args: pytest.fail("weights are read"))
    resumed = AdaPMCLI([*words, "--ckpt_path", str(path)]).model
    assert resumed.state_dict().keys() == saved["state_dict"].keys()
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in resumed.state_dict().items())


def test_weights_are_read_where_a_checkpoint_may_lack_some(base):
    module = LitGPTModule(checkpoint_dir=str(base))
    module.resumes, module.strict_loading = True, False
    module.configure_model()
    assert torch.equal(module.model.lm_head.weight, read_the_old_way(base).lm_head.weight.float())


def test_what_the_checkpoint_lacks_is_made_as_ever(base):
    expected = LitGPTModule(config=CONFIG | LORA).model
    module = LitGPTModule(checkpoint_dir=str(base), config=LORA)
    module.configure_model()
    assert torch.equal(module.model.cos, expected.cos) and torch.equal(module.model.sin, expected.sin)
    for layer in (block.attn.qkv for block in module.model.transformer.h):
        assert layer.lora_B.count_nonzero() == 0
        assert 0 < layer.lora_A.abs().max() <= 1 / 32**0.5  # Kaiming's bound for 32 inputs
        assert layer.lora_A.requires_grad and not layer.linear.weight.requires_grad
    assert {param.dtype for param in module.parameters()} == {torch.float32}


def test_weights_of_training_are_loaded_in_their_own_dtype(base, tmp_path):
    module = LitGPTModule(checkpoint_dir=str(base))
    module.configure_model()
    nn.init.constant_(module.model.lm_head.weight, 1 + 2**-20)
    run = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    again = LitGPTModule.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu")
    assert torch.equal(again.model.lm_head.weight, module.model.lm_head.weight)


def test_a_file_that_is_not_what_was_mapped(tmp_path):
    """Another file in its place is not read, and one that has become shorter is an error."""
    path, saved = tmp_path / "lit_model.pth", torch.arange(1 << 20, dtype=torch.float32)
    torch.save({"weight": saved}, path)
    mapped = torch.load(path, mmap=True)["weight"]
    place = torch.device("cpu"), torch.float32
    path.rename(tmp_path / "before.pth")
    torch.save({"weight": -saved}, path)
    assert torch.equal(next(reading.placed([mapped], *place)), saved)
    mapped = torch.load(path, mmap=True)["weight"]
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(EOFError, match=r"ends at byte \d+, in the middle of a tensor; copy it again"):
        next(reading.placed([mapped], *place))


_PEAKS = """
import json, resource, sys
import torch
from lightning_adapm.litgpt.module import LitGPTModule

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

LitGPTModule(config=json.loads(sys.argv[1]))  # imports
peaks = [peak()]
module = LitGPTModule(checkpoint_dir=sys.argv[2], config=json.loads(sys.argv[3]))
peaks.append(peak())
torch.set_default_dtype(torch.bfloat16)
module.configure_model()
print(*peaks, peak())
"""


def test_building_holds_no_weights_and_training_holds_them_once(tmp_path):
    config = CONFIG | {"n_embd": 1024, "n_layer": 8, "intermediate_size": 4096, "padded_vocab_size": 8192}
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in GPT(Config(**config)).state_dict().items()}
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    size = sum(weight.nbytes for weight in weights.values()) / 1024
    torch.save(weights, tmp_path / "lit_model.pth")
    words = [sys.executable, "-c", _PEAKS, json.dumps(CONFIG), str(tmp_path), json.dumps(config)]
    result = subprocess.run(words, capture_output=True, text=True, check=True, timeout=200)
    start, built, placed = map(int, result.stdout.split())
    assert built - start < 0.1 * size
    assert placed - start < 1.2 * size  # not the file's pages, too
