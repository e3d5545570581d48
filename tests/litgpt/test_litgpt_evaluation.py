"""``litgpt evaluate`` on a result: its conversion for Hugging Face, and where lm-eval is installed all of it."""

import json

import pytest
import torch
from finetuning import write_instructions, write_tokenizer
from litgpt import GPT, Config
from litgpt_commands import FINETUNE, optimizer, run_litgpt
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

pytest.importorskip("requests", reason="litgpt's command line needs it")
pytestmark = pytest.mark.slow

PYTHIA_14M = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "max_position_embeddings": 512,
    "vocab_size": 50304,
    "rotary_pct": 0.25,
}


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """Finetuned by litgpt from a model in Hugging Face's format, as `litgpt download` leaves one."""
    folder = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    start = folder / "pythia-14m"
    GPTNeoXForCausalLM(GPTNeoXConfig(**PYTHIA_14M)).save_pretrained(start, safe_serialization=False)
    write_tokenizer(start)
    run_litgpt(folder, "convert_to_litgpt", "pythia-14m", "--model_name=pythia-14m")
    words = ["finetune_full", "pythia-14m", "--data=JSON", f"--data.json_path={write_instructions(folder / 'x.json')}"]
    words += [*FINETUNE, "--out_dir=out", "--train.max_steps=2", "--train.lr_warmup_steps=1", "--train.epochs=1"]
    run_litgpt(folder, *words, optimizer("lightning_adapm.AdaPM", lr=1e-3))
    return folder


def test_the_conversion_of_evaluate(finetuned):
    """To the same logits."""
    final, converted = finetuned / "out" / "final", finetuned / "converted"
    run_litgpt(finetuned, "convert_from_litgpt", "out/final", "converted")
    torch.save(torch.load(converted / "model.pth"), converted / "pytorch_model.bin")  # as evaluate does
    (converted / "config.json").write_bytes((final / "config.json").read_bytes())
    own = GPT(Config.from_file(final / "model_config.yaml"))
    own.load_state_dict(torch.load(final / "lit_model.pth")["model"])
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)(tokens).logits
        torch.testing.assert_close(own(tokens), theirs, rtol=0, atol=2e-4)
    moved = torch.load(finetuned / "pythia-14m" / "lit_model.pth")["lm_head.weight"] - own.lm_head.weight
    assert moved.norm() > 0


def test_evaluate(finetuned):
    """On the task `sciq`, whose questions are in a folder of its name, where datasets looks before the network."""
    pytest.importorskip("lm_eval", reason="litgpt evaluate needs it")
    row = {"support": "The sky is blue.", "question": "Which colour is the sky?", "correct_answer": "blue"}
    row |= {f"distractor{index}": colour for index, colour in enumerate(("red", "green", "white"), 1)}
    (finetuned / "sciq").mkdir()
    for part in ("train", "validation", "test"):
        (finetuned / "sciq" / f"{part}.jsonl").write_text("\n".join([json.dumps(row)] * 4))
    words = ["evaluate", "out/final", "--tasks=sciq", "--device=cpu", "--batch_size=2"]
    run_litgpt(finetuned, *words, HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=finetuned / "datasets")
    results = json.loads((finetuned / "out" / "final" / "evaluate" / "results.json").read_text())
    assert results["results"]["sciq"]["acc,none"] in (0.0, 1.0)
