"""Callbacks under a real Trainer, also in projects that know nothing of this package."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from foreign import CLI_CONFIG, CLI_PROJECT, Foreign, fit, logged, run_script
from models import PlainLM
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_adapm import (
    AdaPM,
    AdaPMMixin,
    ClosingTable,
    OptimizerStateMonitor,
    OptimizerSummary,
    PartialMuon,
    ResidualNormMonitor,
)
from lightning_adapm.report.diagnostics import StateReport
from lightning_adapm.report.plan import StateBytes, measure
from lightning_adapm.report.tables import show_bytes
from lightning_adapm.trainer.callbacks import run
from lightning_adapm.trainer.callbacks.closing import RunResult, closing_table
from lightning_adapm.trainer.callbacks.figures import state_figure


@pytest.mark.parametrize("optimizer", [AdaPM, torch.optim.AdamW, torch.optim.SGD])
def test_state_monitor_logs_bytes_of_any_optimizer(tmp_path, optimizer):
    trainer = fit(tmp_path, Foreign(optimizer), [OptimizerStateMonitor(every_n_steps=5, log_key_prefix="o/")])
    total = logged(trainer, "o/total_bytes")
    assert list(total) == [0, 5, 10]
    assert total[10] == measure(trainer.optimizers[0]).total
    assert logged(trainer, "o/ratio_to_adamw")[10] == pytest.approx(total[10] / logged(trainer, "o/adamw_bytes")[10])
    if optimizer is not torch.optim.SGD:
        assert logged(trainer, "o/total_bytes_by_role/value")[10] > 0
    png = Path(trainer.log_dir) / "optimizer_state.png"
    assert png.stat().st_size > 5000
    assert f"| total | {show_bytes(measure(trainer.optimizers[0]).momentum)} |" in shown_text(tmp_path / "tb")


def shown_text(folder):
    """Text that TensorBoard shows under ``optimizer_state``."""
    events = EventAccumulator(str(next(folder.rglob("events.*")).parent)).Reload()
    (event,) = events.Tensors("optimizer_state/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_no_bar_of_the_state_ends_at_an_axis():
    mib = 2**20
    sizes = {"embedding": StateBytes(0, 1000 * mib), "value": StateBytes(1), "norm": StateBytes()}
    (axes,) = state_figure(StateReport(sizes, sizes), "AdaPM").axes
    low, high = axes.get_ylim()
    assert low < 0 and high > max(bar.get_y() + bar.get_height() for bar in axes.patches)
    assert {"1000.0\nMiB", "1\nB", "0\nB"} == {text.get_text() for text in axes.texts}


def test_a_file_that_cannot_be_written_does_not_end_the_training(tmp_path, monkeypatch):
    """As on a full disk: the model, which the run was for, may be written after these files."""

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "get_filesystem", lambda folder: SimpleNamespace(makedirs=refuse))
    with pytest.warns(UserWarning, match=r"result.json is not written: \[Errno 28\] No space left on device"):
        trainer = fit(tmp_path, Foreign(AdaPM), [OptimizerStateMonitor(), ClosingTable()])
    assert trainer.state.finished


def test_residual_monitor_logs_only_on_its_steps(tmp_path):
    monitor = ResidualNormMonitor(every_n_steps=4)
    seen = []

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            seen.append(trainer.optimizers[0].observer is not None)

    trainer = fit(tmp_path, Foreign(AdaPM, rank=2, clip_threshold=1.0), [monitor, Watch()])
    norms = logged(trainer, "residual/norm_mean/mlp")
    assert list(norms) == [0, 4, 8]
    assert all(0 < value < 3 for value in norms.values())
    assert logged(trainer, "residual/norm_max/all")[8] >= logged(trainer, "residual/norm_mean/all")[8]
    assert set(logged(trainer, "residual/norm_by_layer/1")) == {0, 4, 8}
    assert set(logged(trainer, "residual/stationarity/all")) == {4, 8}
    assert 0 <= logged(trainer, "residual/clamped/all")[8] <= 1
    assert trainer.optimizers[0].observer is None
    assert (Path(trainer.log_dir) / "residual_norm.png").stat().st_size > 5000
    events = list((tmp_path / "tb").rglob("events.*"))
    assert events and sum(p.stat().st_size for p in events) > 10_000  # the picture is in there


def test_residual_monitor_counts_optimizer_steps_under_accumulation(tmp_path):
    trainer = fit(
        tmp_path, Foreign(AdaPM), [ResidualNormMonitor(every_n_steps=2)], accumulate_grad_batches=3, max_steps=4
    )
    assert len(logged(trainer, "residual/norm_mean/all")) == 2


def test_residual_monitor_names_parameters_whose_gradients_are_not_finite(tmp_path):
    class Breaking(Foreign):
        def on_before_optimizer_step(self, optimizer):
            if self.global_step in (1, 2, 9):
                self.net.layers[1].mlp[0].weight.grad[0, 0] = float("nan")

    with pytest.warns(UserWarning, match="taken as zero") as caught:
        trainer = fit(tmp_path, Breaking(AdaPM, rank=2), [ResidualNormMonitor(every_n_steps=4)])
    said = [str(w.message) for w in caught if "taken as zero" in str(w.message)]
    assert [s.rpartition(": ")[2] for s in said] == [f"net.layers.1.mlp.0.weight ({n})" for n in (2, 1)]
    assert logged(trainer, "residual/nonfinite_gradients") == {0: 0, 4: 2, 8: 2}
    assert all(p.isfinite().all() for p in trainer.lightning_module.parameters())


def test_residual_monitor_says_that_there_is_no_residual(tmp_path):
    with pytest.warns(UserWarning, match="has no low-rank momentum") as caught:
        fit(tmp_path, Foreign(AdaPM, momentum="full"), [ResidualNormMonitor()])
    assert sum("no low-rank momentum" in str(w.message) for w in caught) == 1


def test_residual_monitor_is_silent_in_a_run_of_adamw_to_compare_with(tmp_path, recwarn, capfd):
    """A recipe's twin with AdamW keeps the callbacks, and nothing about it is to be changed."""
    fit(tmp_path, Foreign(torch.optim.AdamW), [ResidualNormMonitor()], max_steps=1)
    assert not any("low-rank" in str(warning.message) for warning in recwarn)
    assert "ResidualNormMonitor" not in "".join(capfd.readouterr())


def test_summary_and_closing_table(tmp_path, capsys):
    fit(tmp_path / "adamw", Foreign(torch.optim.AdamW), [ClosingTable()])
    adamw = capsys.readouterr().out
    assert "AdamW: 12 steps" in adamw
    compare = ClosingTable(compare_with=str(tmp_path / "adamw"), compare_command="make it")
    trainer = fit(tmp_path / "adapm", Foreign(AdaPM), [OptimizerSummary(), compare])
    out = capsys.readouterr().out
    for word in ("attn_out", "low_rank", "Saved of AdamW's momentum", "validation loss", "a real run with lr 0.003"):
        assert word in out
    result = json.loads((Path(trainer.log_dir) / "result.json").read_text())
    assert result["state_bytes"] == measure(trainer.optimizers[0]).total
    assert result["val_loss"] == pytest.approx(trainer.callback_metrics["val_loss"].item())


def test_closing_table_shows_runs_side_by_side(tmp_path, capsys):
    for make in (torch.optim.AdamW, AdaPM, PartialMuon):
        last = ClosingTable(compare_with=str(tmp_path))
        trainer = fit(tmp_path / make.__name__, Foreign(make), [last])
    header = next(line for line in capsys.readouterr().out.splitlines()[::-1] if "Saved" in line)
    assert header.split() == ["PartialMuon", "AdaPM", "AdamW", "Saved"]
    assert (Path(trainer.log_dir) / "losses.png").exists()
    assert [step for step, _, _ in last.result.curve] == sorted({step for step, _, _ in last.result.curve})
    assert last.result.curve[-1][2] == last.result.val_loss


def test_closing_table_does_not_compare_what_does_not_compare(tmp_path, capsys):
    fit(tmp_path / "adamw", Foreign(torch.optim.AdamW), [ClosingTable()], max_steps=5)
    capsys.readouterr()
    compare = ClosingTable(compare_with=str(tmp_path / "adamw"), compare_command="make it")
    fit(tmp_path / "adapm", Foreign(AdaPM), [compare])
    out = capsys.readouterr().out
    assert "not run" in out and "does not compare: steps 5 and not 12" in out and "make it" in out


def test_closing_table_compares_a_share_of_the_state_with_a_share(tmp_path):
    """A run on two processes, beside AdamW's on one."""
    rest = {"steps": 9, "seconds": 1.0, "trainable_parameters": 7}
    sizes = {"momentum_bytes": 8 * 2**20, "state_bytes": 16 * 2**20}
    alone = RunResult("AdamW", 1e-3, 2.0, **sizes, **{f"adamw_{key}": size for key, size in sizes.items()}, **rest)
    share = {f"adamw_{key}": size // 2 for key, size in sizes.items()}
    sharded = replace(alone, optimizer="AdaPM", momentum_bytes=2**20, state_bytes=2**21, **share)
    assert list(closing_table(sharded, alone).columns[2].cells)[2:] == ["4.0 MiB", "8.0 MiB"]
    assert list(closing_table(replace(alone, optimizer="AdaPM"), alone).columns[2].cells)[2:] == ["8.0 MiB", "16.0 MiB"]


def test_several_optimizers_and_manual_optimization(tmp_path):
    class Manual(Foreign):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.other = PlainLM()

        def configure_optimizers(self):
            return AdaPM(self.net.parameters(), lr=1e-3), torch.optim.AdamW(self.other.parameters(), lr=1e-3)

        def training_step(self, batch, batch_idx):
            for net, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(net(batch[0]))
                optimizer.step()

    callbacks = [OptimizerStateMonitor(2), ResidualNormMonitor(2), OptimizerSummary(by="parameter"), ClosingTable()]
    trainer = fit(tmp_path, Manual(), callbacks)
    assert logged(trainer, "residual/norm_mean/all")
    total = list(logged(trainer, "optimizer/total_bytes").values())[-1]
    assert total == sum(measure(o).total for o in trainer.optimizers)


def test_yaml_only_in_a_foreign_project(tmp_path):
    (tmp_path / "config.yaml").write_text(CLI_CONFIG)
    done = run_script(tmp_path, CLI_PROJECT, "fit", "--config", "config.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["optimizer"] == "AdaPM"
    assert "residual/norm_mean/query" in (result.parent / "metrics.csv").read_text()


DDP_SCRIPT = """
import os, sys
import lightning as L, torch
from foreign import Foreign, fit
from pathlib import Path
from lightning_adapm import *

torch.manual_seed(0)
# Only the first process finds the other run, as where the second looks before that is written.
closing = ClosingTable(compare_with=None if "LOCAL_RANK" in os.environ else "adamw")
callbacks = [OptimizerStateMonitor(2), ResidualNormMonitor(2), OptimizerSummary(), closing]
trainer = fit(Path("."), Foreign(AdaPM), callbacks, devices=2, strategy="ddp", max_steps=6)
sums = torch.stack([p.detach().double().sum() for p in trainer.lightning_module.parameters()])
same = trainer.strategy.all_gather(sums)
assert torch.equal(same[0], same[1])
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down
"""


def test_two_processes(tmp_path):
    fit(tmp_path / "adamw", Foreign(torch.optim.AdamW), [ClosingTable()], max_steps=6, limit_train_batches=6)
    done = run_script(tmp_path, DDP_SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.rglob("result.json"))) == 2
    assert len(list(tmp_path.rglob("losses.png"))) == 1
    assert done.stdout.count("validation loss") == 1


def test_the_mixin_and_callbacks_keep_checkpoints_loadable(tmp_path):
    class Module(AdaPMMixin, Foreign):
        configure_optimizers = AdaPMMixin.configure_optimizers

    callbacks = [OptimizerStateMonitor(2), ResidualNormMonitor(2)]
    trainer = fit(tmp_path, Module(), callbacks, max_steps=3)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["global_step"] == 3
