"""Whatever a project hands over trains as the whole model's named parameters do, or is refused by name."""

import copy
import gc
from itertools import chain

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from models import PlainLM, PlainTraining, names_alone, tiny_gpt
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from towers import Classifier, Tower, TwoTowers, by_parameter, steps
from trainers import quiet_trainer

from lightning_adapm import AdaPM, explain
from lightning_adapm.roles.live import find_roots

WAYS = {
    "list": lambda m: list(m.parameters()),
    "what is trained": lambda m: [p for p in m.parameters() if p.requires_grad],
    "filter": lambda m: filter(lambda p: p.requires_grad, m.parameters()),
    "generator expression": lambda m: (p for p in m.parameters()),
    "chain": lambda m: chain(m.wide.parameters(), m.narrow.parameters(), [m.logit_scale]),
    "sum of lists": lambda m: [*m.wide.parameters(), *m.narrow.parameters(), m.logit_scale],
    "named parts": lambda m: chain(m.wide.named_parameters(), m.narrow.named_parameters(), [("t", m.logit_scale)]),
    "names and tensors mixed": lambda m: [*m.wide.named_parameters(), *m.narrow.parameters(), m.logit_scale],
    "a group a tower": lambda m: [
        {"params": m.wide.parameters()},
        {"params": m.narrow.parameters()},
        {"params": [m.logit_scale]},
    ],
    "a group a block": lambda m: [
        *({"params": block.parameters()} for tower in (m.wide, m.narrow) for block in tower.blocks),
        {"params": m.logit_scale},
    ],
    "a group a parameter": lambda m: [{"name": n, "params": [p]} for n, p in m.named_parameters()],
    "empty groups": lambda m: [{"params": []}, {"params": m.parameters()}, {"params": iter(())}],
    "AdamW's groups": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2).param_groups,
    "AdamW's groups with names": lambda m: torch.optim.AdamW(m.named_parameters(), lr=1e-2).param_groups,
    "AdaPM's groups": lambda m: AdaPM(m.parameters(), lr=1e-2).param_groups,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_is_the_whole_model_s(way):
    torch.manual_seed(0)
    model = TwoTowers().double()
    other = copy.deepcopy(model)
    whole = AdaPM(other.named_parameters(), lr=1e-2)
    optimizer = AdaPM(way(model), lr=1e-2)
    twins = dict(zip(model.parameters(), other.parameters(), strict=True))
    assert {twins[p]: found for p, found in by_parameter(optimizer).items()} == by_parameter(whole)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert len(set(names)) == len(twins)
    for mine, theirs in zip(steps(model, optimizer), steps(other, whole), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_equal_names_of_unrelated_models_are_told_apart():
    wide, narrow = Tower(64), Tower(32)
    optimizer = AdaPM(chain(wide.named_parameters(), narrow.named_parameters()))
    for tower, width in ((wide, 64), (narrow, 32)):
        pieces = optimizer.pieces[tower.blocks[1].attn.qkv.weight]
        assert [(p.start, p.stop, p.block) for p in pieces] == [(width * i, width * (i + 1), 1) for i in range(3)]
    names = optimizer.param_groups[0]["param_names"]
    assert names[0] == "Tower1.blocks.0.norm.weight"
    assert names[-1] == "Tower2.blocks.1.mlp.2.bias"
    wide.blocks[0].attn.qkv.weight.grad = torch.full_like(wide.blocks[0].attn.qkv.weight, torch.nan)
    optimizer.step()
    assert {name.split(" ")[0] for name in optimizer.nonfinite_gradients()} == {"Tower1.blocks.0.attn.qkv.weight"}
    assert len({row.name for row in explain(optimizer)}) == len(names)


def test_equal_names_without_a_model_are_refused():
    named = names_alone(Tower(64)) + names_alone(Tower(32))
    with pytest.raises(ValueError, match=r"several parameters are called blocks.0.norm.weight"):
        AdaPM(named)


def test_names_are_the_model_s_own_and_those_that_were_given_stay():
    model = TwoTowers()
    assert AdaPM(list(model.parameters())).param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    optimizer = AdaPM([(f"my.{n}", p) for n, p in model.wide.named_parameters()])
    assert optimizer.param_groups[0]["param_names"][0] == "my.blocks.0.norm.weight"
    assert optimizer.pieces[model.wide.blocks[0].attn.qkv.weight][0].heads == 4
    compiled = torch.compile(model)
    assert AdaPM(list(compiled.parameters())).param_groups[0]["param_names"][0] == "logit_scale"


class Lit(L.LightningModule):
    """A classifier inside of a LightningModule, trained for three epochs."""

    def __init__(self, params=lambda self: self.net.head.parameters()):
        super().__init__()
        self.net, self.params = Classifier(), params

    @property
    def backbone(self):
        return self.net.backbone

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self):
        return DataLoader([(torch.randn(4, 32), index % 5) for index in range(6)], batch_size=2)

    def configure_optimizers(self):
        return AdaPM(self.params(self), lr=1e-2)


def fit(module, tmp_path, *callbacks, **options):
    trainer = quiet_trainer(tmp_path, max_epochs=3, enable_checkpointing=False, callbacks=list(callbacks), **options)
    trainer.fit(module)
    return trainer.optimizers[0]


@pytest.mark.parametrize("hand", [lambda s: s.net.head.parameters(), lambda s: list(s.net.head.named_parameters())])
def test_an_optimizer_of_the_head_alone_sees_the_whole_module(tmp_path, hand):
    module = Lit(hand)
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    optimizer = fit(module, tmp_path, finetuning)
    assert by_parameter(optimizer) == by_parameter(AdaPM(module.named_parameters()))
    assert optimizer.state[module.backbone.blocks[1].attn.qkv.weight]["step"] == 6
    assert optimizer.param_groups[1]["param_names"][0] == "net.backbone.blocks.0.norm.weight"


def test_modules_around_it_do_not_matter():
    class Broken(nn.Module):
        def __init__(self):
            pass

    class Odd(nn.Module):
        """Holds the model, with a ``named_parameters`` and properties that fail."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def named_parameters(self, *args, **options):
            raise NotImplementedError

        parameters = property(named_parameters)
        config = property(named_parameters)
        __class__ = property(lambda self: 1 / 0)

    class Circle(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            inner.outer = self

    broken, model = Broken(), TwoTowers()
    wanted = {p: (r, pieces) for p, (r, pieces) in by_parameter(AdaPM(list(model.parameters()))).items()}
    odd, clone = Odd(model), copy.deepcopy(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    assert by_parameter(AdaPM(list(model.parameters()))) == wanted
    circle = Circle(model)
    assert by_parameter(AdaPM(list(model.parameters()))) == wanted
    del broken, odd, clone, average, circle


def test_the_lightning_module_goes_before_what_is_around_it():
    module = Lit()
    outer = nn.ModuleDict({"wrapped": module})
    loss = nn.ModuleDict({"student": module.net.head})
    assert find_roots(module.net.head.parameters()) == [module]
    logits = nn.Parameter(torch.zeros(3))
    outer.logits = logits
    assert find_roots([*module.parameters(), logits]) == [outer]
    assert loss["student"] is module.net.head


def test_wrappers_are_not_the_model(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = TwoTowers()
        wrapped = DistributedDataParallel(torch.compile(model))
        assert find_roots(wrapped.parameters()) == [model]
        optimizer = AdaPM(list(wrapped.parameters()))
        assert optimizer.param_groups[0]["param_names"][1] == "wide.blocks.0.norm.weight"
    finally:
        torch.distributed.destroy_process_group()


def test_models_that_nothing_holds_together_are_each_seen_whole():
    generator, discriminator = tiny_gpt(), Classifier()
    optimizer = AdaPM([*generator.parameters(), *discriminator.parameters()])
    expected = by_parameter(AdaPM(generator.parameters())) | by_parameter(AdaPM(discriminator.parameters()))
    assert by_parameter(optimizer) == expected


REFUSED = {
    "a set": (lambda m: set(m.parameters()), TypeError, "params is a set"),
    "a set in a group": (lambda m: [{"params": set(m.parameters())}], TypeError, "params is a set"),
    "a tensor": (lambda m: m.logit_scale, TypeError, "params is one tensor"),
    "a dict": (lambda m: dict(m.named_parameters()), TypeError, "params is a dict"),
    "nothing": (lambda m: [], ValueError, "empty parameter list"),
    "no parameters": (lambda m: nn.Identity().parameters(), ValueError, "empty parameter list"),
    "numbers": (lambda m: [1.0], TypeError, "params holds 1.0"),
    "groups and tensors": (lambda m: [{"params": m.parameters()}, m.logit_scale], TypeError, "mixes .* Parameter"),
    "two groups": (
        lambda m: [{"params": m.parameters()}, {"params": [m.logit_scale]}],
        ValueError,
        "appear in more than one parameter group",
    ),
    "no leaf": (lambda m: [{"params": m.logit_scale * 2, "role": "full"}], ValueError, "non-leaf"),
    "another's momentum": (
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9).param_groups,
        ValueError,
        "momentum must be one of 'none'.*, or policies by role, but got 0.9; the decay .* betas or mu",
    ),
    "roles": (
        lambda m: [{"params": m.parameters(), "roles": {"x": "mlp"}}],
        ValueError,
        "roles={'x': 'mlp'} in a parameter group: roles is an option of all groups; pass it to the optimizer",
    ),
    "unmatched": (lambda m: [{"params": m.parameters(), "unmatched": "full"}], ValueError, "an option of all groups"),
    "heads as text": (
        lambda m: [{"params": m.parameters(), "n_head": "4"}],
        ValueError,
        "n_head must be an int >= 1, but got '4', which is text",
    ),
    "amsgrad": (lambda m: [{"params": m.parameters(), "amsgrad": True}], ValueError, "no counterpart of amsgrad"),
}


@pytest.mark.parametrize(("way", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(way, error, words):
    with pytest.raises(error, match=words):
        AdaPM(way(TwoTowers()))


def test_tensors_of_no_module_with_a_policy_for_what_is_unknown():
    weights = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(3))]
    with pytest.warns(UserWarning, match="full momentum to matrices"):
        optimizer = AdaPM(weights, unmatched="full")
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert optimizer.param_groups[1]["param_names"] == ["group1.full.0"]


def test_the_search_for_modules_is_fast():
    model = PlainLM(layers=70)
    gc.collect()
    seconds = min(_seconds(lambda: find_roots(list(model.parameters()))) for _ in range(3))
    assert seconds < 0.3


def _seconds(call):
    import time

    start = time.process_time()
    call()
    return time.process_time() - start


class Training(PlainTraining, L.LightningModule):
    def configure_optimizers(self):
        return AdaPM([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_bare_tensors_in_a_lightning_module(tmp_path):
    module = Training()
    optimizer = fit(module, tmp_path, limit_train_batches=2)
    assert by_parameter(optimizer) == by_parameter(AdaPM(module.named_parameters()))
    assert optimizer.param_groups[0]["param_names"][0] == "net.embed_tokens.weight"
