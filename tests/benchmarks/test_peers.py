"""The optimizers that the benchmarks measure side by side, on models of published shapes."""

import json
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from litgpt import GPT, Config
from torch import nn

from benchmarks import docs, step_time, step_time_sharded, training_time
from benchmarks.costs import peers
from benchmarks.costs.memory import state_bytes
from benchmarks.costs.models import MODELS, materialize, numel, shorten
from benchmarks.costs.peers import PEERS, Peer, attempt, build, chosen, select
from benchmarks.costs.timing import INTERVAL
from benchmarks.step_time import Measured, Plan, measure, summarize
from benchmarks.studies.decoder import Decoder, Shape
from benchmarks.studies.optimizers import OURS, Parameters, UnavailableError
from lightning_adapm import AdaPM, explain
from lightning_adapm.report.plan import measure as planner_measure

TINY = Shape(layers=1, width=32, n_head=4, n_query_groups=2, context=8, vocab=64, llama=True)
PUBLISHED = {
    "pythia-160m": "pythia-160m",
    "llama-3.2-1b": "Llama-3.2-1B",
    "llama-3-8b": "Llama-3-8B",
    "gpt2-1.5b": None,
}


@pytest.fixture(autouse=True)
def _eager():
    """torchao compiles every shape, which takes minutes and changes nothing here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def litgpt_model(name):
    with torch.device("meta"):
        if PUBLISHED[name] is not None:
            model = GPT(Config.from_name(PUBLISHED[name]))
        else:
            sizes = {"n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024, "padded_vocab_size": 50257}
            model = GPT(Config(**sizes, bias=True))
            model.wpe = nn.Embedding(1024, 1600)
        if MODELS[name].tied:
            model.lm_head.weight = model.transformer.wte.weight
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_parameters_are_those_of_the_published_model(name):
    theirs = litgpt_model(name)
    with torch.device("meta"):
        ours = Decoder(MODELS[name])
    shapes = [Counter(tuple(param.shape) for param in model.parameters()) for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert numel(MODELS[name]) == sum(param.numel() for param in theirs.parameters())
    plans = [
        Counter((row.role, row.shape, row.bytes) for row in explain(model).rows if len(row.shape) == 2)
        for model in (ours, theirs)
    ]
    assert plans[0] == plans[1]


def test_as_many_layers_as_fit():
    shape = MODELS["llama-3-8b"]
    one, all_of_it = numel(replace(shape, layers=1)), numel(shape)
    assert shorten(shape, 4, 4 * all_of_it) == shape
    assert shorten(shape, 4, 4 * all_of_it - 1).layers == shape.layers - 1
    assert shorten(shape, 4, 4 * one).layers == 1
    assert shorten(shape, 4, 4 * one - 1) is None


def built(peer, model, **options):
    """The peer, or a skipped test with the reason that the table would show."""
    try:
        return build(peer, Parameters.of(model), 60, **options)
    except UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.mark.filterwarnings("ignore")  # the packages' own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_every_peer_trains_all_parameters(peer, dtype):
    torch.manual_seed(0)
    model = materialize(TINY, "cpu", dtype)
    optimizer = built(peer, model, lr=0.1)
    before = [param.detach().clone() for param in model.parameters()]

    def closure():
        loss = model(torch.arange(TINY.vocab).view(8, 8)).float().logsumexp(-1).sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.zero_grad()
        if peer.in_backward:
            optimizer.step(closure)
        else:  # galore-torch and apollo-torch run a closure without gradients
            closure()
            optimizer.step()
    assert all(param.isfinite().all() for param in model.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_hidden_matrices_are_those_inside_the_blocks():
    of = Parameters.of(Decoder(replace(TINY, llama=False)))
    names = {id(param): name for name, param in of.named}
    assert {names[id(param)] for param in of.hidden} == {
        f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")
    }
    assert len(of.hidden) + len(of.other) == len(of.named)


def test_state_is_counted_wherever_a_package_keeps_it():
    model = Decoder(TINY)
    optimizer = AdaPM(model.parameters(), second_moment="block")
    galore = [built(peer, model) for peer in PEERS if peer.name == "galore-torch"]
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    for each in (optimizer, *galore):
        each.step()
    assert state_bytes(optimizer) == planner_measure(optimizer).total
    for each in galore:
        projectors = sum(min(param.shape) ** 2 for param in Parameters.of(model).hidden)
        assert state_bytes(each) == 4 * (projectors + 2 * numel(TINY))  # rank 128 is all of so small a matrix


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    (peer,) = chosen("bitsandbytes")
    result, reason = attempt(peer, lambda: build(peer, Parameters.of(Decoder(TINY)), 1))
    assert result is None and "not importable" in reason and "bitsandbytes" in reason
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    (peer,) = chosen("torch Muon")
    assert "has no Muon" in attempt(peer, lambda: build(peer, Parameters.of(Decoder(TINY)), 1))[1]


def test_what_a_peer_raises_is_a_reason_and_what_ours_raise_is_an_error():
    def fail(error):
        raise error

    theirs, ours = chosen("adam_mini")[0], chosen("AdaLomo")[0]
    assert attempt(theirs, lambda: fail(RuntimeError("no such device\nmore"))) == (None, "RuntimeError: no such device")
    assert attempt(ours, lambda: fail(torch.OutOfMemoryError())) == (None, peers.OUT_OF_MEMORY)
    with pytest.raises(RuntimeError, match="no such device"):
        attempt(ours, lambda: fail(RuntimeError("no such device")))
    assert {peer.name for peer in PEERS if peer.ours} == {
        p.name for p in PEERS if p.name.split(",")[0].split()[0] in OURS
    }


def test_a_refresh_by_svds_that_takes_too_long_is_a_reason():
    (galore,) = chosen("galore")
    with pytest.raises(UnavailableError, match="SVDs"):
        build(galore, Parameters.of(Decoder(TINY)), 0.0)


def test_peers_are_chosen_by_a_part_of_their_name():
    assert [peer.name for peer in select([chosen("AdamW, f"), chosen("fused")])] == ["AdamW, foreach", "AdamW, fused"]
    assert select(None) == PEERS
    with pytest.raises(Exception, match="'XX' is in none"):
        chosen("XX")


def test_the_floor_and_the_ratios_are_of_means_over_whole_intervals():
    counts = {"state_bytes": 40, "floor_bytes": 200, "transient_bytes": 0, "launched": 1}
    fused = Measured(chosen("fused")[0], turns=[[1.0, 1.0], [2.0, 4.0]], counts=counts)
    galore = Measured(Peer("galore", "GaLore", interval=4), turns=[[1.0]], refresh=9.0, counts=counts)
    gone = Measured(chosen("Lomo")[0], skipped="why")
    rows = summarize([fused, galore, gone], speed=100.0)
    assert rows["AdamW, fused"]["mean_ms"] == 2000 and rows["AdamW, fused"]["worst_ms"] == 4000
    assert rows["AdamW, fused"]["turns_ms"] == [1000, 3000]
    assert rows["AdamW, fused"]["floor_ms"] == 2000 and rows["AdamW, fused"]["over_floor"] == 1
    assert rows["galore"]["mean_ms"] == 3000 and rows["galore"]["worst_ms"] == 9000
    assert rows["galore"]["ratios"] == {"AdamW, fused": 1.5}
    assert rows["AdaLomo"] == {"skipped": "why"}


@pytest.mark.parametrize("together", [True, False])
def test_what_a_step_moves_and_launches(together):
    torch.manual_seed(0)
    peers = [*chosen("AdamW, fused"), *chosen("AdaPM block"), *chosen("Lomo")]
    peers = [peer for peer in peers if not peer.training_only]
    rows = measure(Decoder(TINY), peers, Plan("cpu", repeats=2, steps=1, warmup=1, together=together))
    by_name = {row.peer.name: row for row in rows}
    size = 4 * numel(TINY)
    fused = by_name["AdamW, fused"].counts
    steps = 4 * len(list(Decoder(TINY).parameters()))
    assert fused["state_bytes"] == 2 * size + steps and fused["floor_bytes"] == 3 * size + 2 * fused["state_bytes"]
    assert fused["launched"] < by_name["AdaPM block"].counts["launched"]
    assert [len(turn) for turn in by_name["AdaPM block"].turns] == [INTERVAL] * 2
    assert by_name["Lomo"].counts["floor_bytes"] == pytest.approx(3 * size, rel=0.01)


def test_no_time_left_is_a_reason():
    (row,) = measure(Decoder(TINY), chosen("Lomo")[1:], Plan("cpu", deadline=0.0))
    assert row.skipped == "no time left (--time-limit)"


def test_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(step_time, "MODELS", {"llama": TINY})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    words = ["step_time", "--all", "--peers", "AdamW, f", "AdaPM block", "bitsandbytes", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*words, "--repeats", "1", "--steps", "1", "--warmup", "1"])
    step_time.main()
    for dtype in ("float32", "bfloat16"):
        page = (tmp_path / f"step_time-cpu-llama-{dtype}.md").read_text()
        assert "| AdaPM block |" in page and "| bitsandbytes 8-bit | skipped: " in page
        assert (tmp_path / f"step_time-cpu-llama-{dtype}.json").exists()
        assert (tmp_path / f"step_time-cpu-llama-{dtype}.svg").exists()


def test_training_steps_are_timed_with_and_without_an_optimizer(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training_time, "MODELS", {"llama": TINY})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    words = ["training_time", "--autocast", "--batch", "2", "--length", "16", "--output", str(tmp_path)]
    words += ["--repeats", "2", "--peers", "AdamW, fused", "AdaPM block, in backward", "AdaLomo", "bitsandbytes"]
    monkeypatch.setattr(sys, "argv", [*words, "--accumulate", "2"])
    with pytest.raises(SystemExit):
        training_time.main()
    assert "update inside backward" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*words, "--together"])
    training_time.main()
    page = (tmp_path / "training_time-cpu-llama-float32-autocast-2x16.md").read_text()
    assert "| bitsandbytes 8-bit | skipped: " in page and "| forward and backward | " in page
    assert "over 2 turns, one optimizer after the other, of whole" in page
    rows = json.loads((tmp_path / "training_time-cpu-llama-float32-autocast-2x16.json").read_text())["rows"]
    alone = rows.pop("forward and backward")
    del rows["bitsandbytes 8-bit"]
    assert list(rows) == ["AdamW, fused", "AdaPM block, in backward", "AdaLomo"]
    for row in (alone, *rows.values()):
        assert len(row["turns_ms"]) == 2
        assert row["added_ms"] == pytest.approx(row["mean_ms"] - alone["mean_ms"])
        assert row["tokens_per_second"] == pytest.approx(32 / (1e-3 * row["mean_ms"]))


@pytest.mark.slow
def test_steps_are_timed_on_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(step_time_sharded, "MODELS", {"llama": TINY})
    words = ["step_time_sharded", "--length", "8", "--repeats", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(
        sys, "argv", [*words, "--peers", "fused", "bases", "PartialMuon", "alone", "--profile", "fused"]
    )
    step_time_sharded.main()
    name = "step_time_sharded-fsdp2-2-cpu-llama-float32"
    assert "AdamW, fused: 21 steps" in (tmp_path / f"{name}-profile.txt").read_text()
    assert "| AdaPM block, bases sharded |" in (tmp_path / f"{name}.md").read_text()
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    assert rows["AdamW, fused"]["exchanged"] == {"step": 0, "most": 0}
    replicated, sharded = (rows[f"AdaPM block, bases {how}"] for how in ("replicated", "sharded"))
    assert replicated["exchanged"]["step"] < sharded["exchanged"]["step"] < sharded["exchanged"]["most"]
    assert replicated["state_bytes"] > sharded["state_bytes"]
    assert [len(row["step"]["turns_ms"]) for row in rows.values()] == [2] * 6
    alone, besides = "Newton-Schulz alone", "PartialMuon without Newton-Schulz"
    assert {name for name in rows if "training" not in rows[name]} == {alone, besides}
    longer = min(rows["PartialMuon"]["step"]["turns_ms"]) - min(rows[alone]["step"]["turns_ms"])
    assert f"PartialMuon's step takes {longer:.2f} ms longer than {alone}" in (tmp_path / f"{name}.md").read_text()
    whole, besides = rows["PartialMuon"], rows[besides]
    assert whole["exchanged"] == besides["exchanged"] and whole["state_bytes"] == besides["state_bytes"]


def test_what_an_optimizer_adds_is_not_known_without_forward_and_backward_alone():
    alone, row = Measured(training_time.NOTHING, skipped="out of memory"), Measured(chosen("fused")[0], turns=[[2e-3]])
    found = training_time.summarize([alone, row], tokens=4)
    assert found == {
        "forward and backward": {"skipped": "out of memory"},
        "AdamW, fused": {"mean_ms": 2.0, "turns_ms": [2.0], "added_ms": None, "ratio": 1.0, "tokens_per_second": 2000},
    }


def test_the_documentation_shows_the_results():
    for page, sections in docs.PAGES.items():
        text = page.read_text()
        assert docs.filled(text, sections) == text  # or run: python -m benchmarks.docs
    with pytest.raises(ValueError, match="lacks the marks <!-- peak_memory -->"):
        docs.filled("# Benchmarks", ["peak_memory"])


def test_a_section_has_a_row_for_each_result(tmp_path):
    """Cells of rows that were not measured are empty."""
    made = {"device": "cuda", "hardware": "GPU, 2 cores", "model": "m", "dtype": "float32"}
    rows = {"AdamW, fused": {"mean_ms": 2.0}, "AdaPM": {"mean_ms": 3.0}, "AdaPM block": {"skipped": "no time left"}}
    (tmp_path / "defaults-step_time-a.json").write_text(json.dumps(made | {"rows": rows}))
    (tmp_path / "defaults-step_time-b.json").write_text(json.dumps(made | {"rows": {}}))
    (tmp_path / "step_time-c.json").write_text("{}")
    link = "[m, float32, GPU](../benchmarks/results/defaults-step_time"
    assert docs.section("defaults-step_time", tmp_path).splitlines()[2:] == [
        f"| {link}-a.md) | 2.00 ms | 1.50 |  |  |  |  |",
        f"| {link}-b.md) |  |  |  |  |  |  |",
    ]
    peaks = {"AdamW, fused": {"plain": {"peak": 2**30}, "checkpointing": {"skipped": "out of memory"}}}
    (tmp_path / "peak_memory-a.json").write_text(json.dumps(made | {"device": "cpu", "rows": peaks}))
    assert docs.section("peak_memory", tmp_path).splitlines()[2:] == [
        "| [m, float32, CPU](../benchmarks/results/peak_memory-a.md) | 1.0 GiB |  |  |  |  |",
        "| [m, float32, checkpointing, CPU](../benchmarks/results/peak_memory-a.md) |  |  |  |  |  |",
    ]
    turns = {"AdamW, fused": [2.0, 9.0], "AdaPM": [3.2, 3.0]}  # the fastest: a step may be disturbed
    shards = {name: {"step": {"mean_ms": sum(ms) / 2, "turns_ms": ms}} for name, ms in turns.items()}
    made |= {"strategy": "fsdp2", "processes": 2, "rows": shards}
    (tmp_path / "step_time_sharded-a.json").write_text(json.dumps(made))
    (row,) = docs.section("step_time_sharded", tmp_path).splitlines()[2:]  # none of training steps that there are not
    assert "a.md) | 2.00 ms | 1.50 |" in row
    assert docs.section("training_time", tmp_path) == "Nothing is measured yet."
