"""Updates inside backward, under Lightning's automatic optimization: as after it, or refused."""

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from models import PlainLM, PlainTraining, token_batches
from torch import nn
from torch.utils.checkpoint import checkpoint
from trainers import quiet_trainer

from lightning_adapm import AdaLomo, AdaPM, AdaPMMixin, OptimizerStateMonitor, ResidualNormMonitor


class Module(PlainTraining, L.LightningModule):
    def __init__(self, now, make=AdaPM, layers=2, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = PlainLM(bias=False, layers=layers).double()
        self.now, self.make, self.options = now, make, options

    def configure_optimizers(self):
        optimizer = self.make(self.parameters(), lr=1e-2, update_in_backward=self.now, **self.options)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)]


class AliveGradients(Callback):
    """The most bytes of gradients at once."""

    def __init__(self):
        self.most = 0

    def on_train_start(self, trainer, module):
        def look(_):
            held = sum(p.grad.numel() for p in module.parameters() if p.grad is not None)
            self.most = max(self.most, held)

        for param in module.parameters():
            param.register_post_accumulate_grad_hook(look)


def fit(tmp_path, module, steps=8, ckpt_path=None, callbacks=(), **options):
    trainer = quiet_trainer(
        tmp_path,
        max_steps=steps,
        logger=CSVLogger(tmp_path) if callbacks else False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def weights(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
    ],
    ids=["plain", "accumulation", "clipping by value", "bf16-mixed"],
)
@pytest.mark.parametrize("make", [AdaPM, AdaLomo])
def test_as_after_backward(tmp_path, options, make):
    early, late = Module(True, make), Module(False, make)
    fit(tmp_path, early, **options)
    fit(tmp_path, late, **options)
    torch.testing.assert_close(weights(early), weights(late), rtol=0, atol=1e-9)


def test_accumulation_says_what_it_costs(tmp_path):
    module = Module(True)
    total = sum(p.nbytes for p in module.parameters()) / 2**20
    with pytest.warns(UserWarning, match=rf"saves no gradient memory here: {total:.1f} MiB"):
        fit(tmp_path, module, steps=1, accumulate_grad_batches=4)


def test_gradients_never_exist_together(tmp_path):
    alive = {now: AliveGradients() for now in (True, False)}
    for now, watch in alive.items():
        module = Module(now, layers=6)
        fit(tmp_path, module, steps=2, callbacks=[watch])
    total = sum(p.numel() for p in module.parameters())
    block = sum(p.numel() for p in module.net.layers[0].parameters())
    largest = max(p.numel() for p in module.parameters())
    assert alive[False].most == total
    assert alive[True].most <= block + largest < total / 4


def test_scheduler_and_gradient_norm_are_true(tmp_path):
    class Norms(Callback):
        def __init__(self):
            self.norms = []

        def on_train_batch_end(self, trainer, module, *args):
            self.norms.append(float(trainer.optimizers[0].gradient_norm))

    class Measured(Module):
        def on_before_optimizer_step(self, optimizer):
            squares = [p.grad.double().square().sum() for p in self.parameters()]
            self.norms = [*getattr(self, "norms", []), float(torch.stack(squares).sum().sqrt())]

    seen, late = Norms(), Measured(False)
    monitor = OptimizerStateMonitor(every_n_steps=1)
    trainer = fit(tmp_path, Module(True), callbacks=[seen, monitor, LearningRateMonitor("step")])
    fit(tmp_path, late)
    assert seen.norms == pytest.approx(late.norms, rel=1e-9)
    assert [figures["optimizer/gradient_norm"] for _, figures in monitor.history] == pytest.approx(late.norms, rel=1e-6)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2)  # a scheduler of epochs, in the first


def test_resumed_is_uninterrupted(tmp_path):
    whole = Module(True)
    fit(tmp_path, whole, steps=8)
    first = Module(True)
    fit(tmp_path, first, steps=5).save_checkpoint(tmp_path / "five.ckpt")
    second = Module(True)
    # the loader starts anew: what was seen is skipped by hand
    second.train_dataloader = lambda: token_batches(30)[5:]
    state = torch.load(tmp_path / "five.ckpt", weights_only=True)
    second.load_state_dict(state["state_dict"])
    optimizer = AdaPM(second.parameters(), lr=1e-2, update_in_backward=True)
    optimizer.load_state_dict(state["optimizer_states"][0])
    for tokens in token_batches(30)[5:8]:

        def closure(tokens=tokens):
            optimizer.zero_grad()
            loss = second.net(tokens)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert torch.equal(weights(second), weights(whole))


def test_clipping_by_norm_is_refused_before_a_parameter_moves(tmp_path):
    module = Module(True)
    before = weights(module)
    with pytest.raises(ValueError, match="gradient_clip_algorithm='value'"):
        fit(tmp_path, module, gradient_clip_val=1.0)
    assert torch.equal(weights(module), before)

    class Mixed(AdaPMMixin, PlainTraining, L.LightningModule):
        adapm = {"update_in_backward": True}  # noqa: RUF012

        def training_step(self, batch, batch_idx):
            raise AssertionError("training has begun")

    with pytest.raises(ValueError, match="by norm needs the gradients of the whole model at once"):
        fit(tmp_path, Mixed(), gradient_clip_val=1.0)


def test_clipping_is_refused_for_an_optimizer_from_before_its_module(tmp_path):
    net = PlainLM()
    optimizer, before = AdaPM(net.parameters(), update_in_backward=True), weights(net)

    class Around(PlainTraining, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def configure_optimizers(self):
            return optimizer

    with pytest.raises(ValueError, match="by norm needs the gradients of the whole model at once"):
        fit(tmp_path, Around(), gradient_clip_val=1.0)
    assert torch.equal(weights(net), before)


@pytest.mark.parametrize("unused", [False, True], ids=["all used", "with an unused layer"])
def test_gradients_that_are_changed_after_backward_are_noticed(unused):
    model = PlainLM()
    model.unused = nn.Linear(1, 1) if unused else None  # gradients wait for its own to the end of backward
    optimizer = AdaPM(model.parameters(), update_in_backward=True, roles={"unused": "mlp"})

    def closure():
        model(token_batches(1)[0]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    with pytest.raises(RuntimeError, match="gradients were changed after backward"):
        optimizer.step(closure)


def test_a_module_that_clips_in_its_own_way_is_refused(tmp_path):
    class Clipping(Module):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")

    module = Clipping(True)
    before = weights(module)
    with pytest.raises(ValueError, match=r"Clipping\.configure_gradient_clipping\(\) finds no gradients"):
        fit(tmp_path, module)
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_optimizer_step"])
def test_hooks_that_find_no_gradients_are_named(tmp_path, hook):
    watched = type("Watched", (Module,), {hook: lambda self, *_: None})
    with pytest.warns(UserWarning, match=rf"Watched\.{hook}\(\) finds no gradients"):
        fit(tmp_path, watched(True), steps=1)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_residuals_are_logged_as_after_backward(tmp_path, accumulated):
    histories = []
    for now in (True, False):
        monitor = ResidualNormMonitor(every_n_steps=2)
        fit(tmp_path, Module(now), steps=6, callbacks=[monitor], accumulate_grad_batches=accumulated)
        histories.append(monitor.history)
    assert [step for step, _ in histories[0]] == [0, 2, 4]
    for (step, early), (same, late) in zip(*histories, strict=True):
        assert step == same
        assert early == pytest.approx(late, abs=1e-9)


def test_one_process_of_ddp_takes_each_gradient_once(tmp_path):
    trained = []
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for now in (True, False):
            torch.manual_seed(0)
            model = PlainLM(bias=False).double()
            wrapped = nn.parallel.DistributedDataParallel(model)
            optimizer = AdaLomo(model.parameters(), lr=1e-2, update_in_backward=now)
            for tokens in token_batches(3):

                def closure(tokens=tokens, optimizer=optimizer, wrapped=wrapped):
                    optimizer.zero_grad()
                    loss = wrapped(tokens)
                    loss.backward()
                    return loss

                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    optimizer.step(closure)
            assert {int(state["step"]) for state in optimizer.state.values()} == {3}
            trained.append(weights(model))
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(*trained, rtol=0, atol=1e-12)


def test_a_step_without_closure_is_an_ordinary_one():
    torch.manual_seed(0)
    model = PlainLM()
    optimizer = AdaPM(model.parameters(), update_in_backward=True)
    model(token_batches(1)[0]).backward()
    before = weights(model)
    with pytest.warns(UserWarning, match="frees no gradient early here: step\\(\\) got no closure"):
        optimizer.step()
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize("whole", [True, False], ids=["of all", "of some"])
@pytest.mark.parametrize("before", [0, 2])
def test_two_backward_passes_are_refused(before, whole):
    model = PlainLM()
    optimizer = AdaPM(model.parameters(), update_in_backward=True)

    def closure():
        model(token_batches(1)[0]).backward()

    def twice():
        closure()
        closure() if whole else model.layers[0].mlp[0].weight.square().sum().backward()

    for _ in range(before):
        optimizer.step(closure)
    with pytest.raises(RuntimeError, match="ran backward twice"):
        optimizer.step(twice)


class Tied(nn.Module):
    """With a tied, a frozen and an unused weight, and a block that is used twice."""

    def __init__(self, checkpointing):
        super().__init__()
        self.embed, self.unused = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.mlp, self.twice = nn.Linear(4, 4), nn.Linear(4, 4)
        self.mlp.weight.requires_grad_(False)
        self.checkpointing = checkpointing

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in (self.twice, self.mlp, self.twice):
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return (x @ self.embed.weight.T).square().mean()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_frozen_unused_tied_and_repeated_parameters(checkpointing):
    trained, norms = [], []
    for now in (True, False):
        torch.manual_seed(0)
        model = Tied(checkpointing).double()
        optimizer = AdaPM(model.parameters(), update_in_backward=now, roles={"unused|mlp|twice": "mlp"})

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(torch.arange(7))
            loss.backward()
            return loss

        for _ in range(4):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer.step(closure)
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norms.append(optimizer.gradient_norm if now else nn.utils.get_total_norm(grads))
        trained.append(weights(model))
    assert torch.equal(*trained)
    torch.testing.assert_close(norms[:4], norms[4:])
