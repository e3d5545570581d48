"""What other libraries hand to the constructor, or do with the optimizer: Hugging Face's, hydra, wrappers."""

import copy
import pickle
from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.optim.optimizer import Optimizer
from towers import TwoTowers, by_parameter, steps

from lightning_adapm import AdaLomo, AdamMini, AdaPM, Lomo, LoRAPre, PartialMuon

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

OPTIONS = {"lr": 1e-2, "rank": 2}


def tiny_llama():
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def token_dicts():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(61, (12, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def hugging_face(model, folder, trainer=transformers.Trainer, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, report_to=[], save_steps=3, use_cpu=True,
        weight_decay=0.1, disable_tqdm=True, logging_steps=1000, seed=0,
    )  # fmt: skip
    return trainer(model=model, args=arguments, train_dataset=token_dicts(), **options)


def checkpoint_of(folder):
    return str(folder / "checkpoint-3")


class OwnGroups(transformers.Trainer):
    """Decays matrices and nothing else, as many subclasses do."""

    def create_optimizer(self):
        params = [param for param in self.model.parameters() if param.requires_grad]
        groups = [
            {"params": [param for param in params if param.dim() > 1], "weight_decay": 0.1},
            {"params": [param for param in params if param.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = AdaPM(groups, **OPTIONS)
        return self.optimizer


@pytest.mark.parametrize(
    ("trainer", "options"),
    [(transformers.Trainer, {"optimizer_cls_and_kwargs": (AdaPM, OPTIONS)}), (OwnGroups, {})],
    ids=["class and keywords", "a subclass's groups"],
)
def test_hugging_face_s_trainer_trains_and_resumes(tmp_path, trainer, options):
    uninterrupted = hugging_face(tiny_llama(), tmp_path, trainer, **options)
    uninterrupted.train()
    optimizer = uninterrupted.optimizer.optimizer
    assert [len(group["params"]) > 0 for group in optimizer.param_groups] == [True, True]
    assert by_parameter(optimizer) == by_parameter(AdaPM(uninterrupted.model.named_parameters()))
    resumed = hugging_face(tiny_llama(), tmp_path, trainer, **options)
    resumed.train(resume_from_checkpoint=checkpoint_of(tmp_path))
    for mine, theirs in zip(resumed.model.parameters(), uninterrupted.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_accelerate_prepares_model_and_optimizer():
    model = TwoTowers()
    twin = copy.deepcopy(model)
    plain = AdaPM(twin.parameters(), **OPTIONS)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, AdaPM(list(model.parameters()), **OPTIONS))
    for mine, theirs in zip(steps(prepared, optimizer), steps(twin, plain), strict=True):
        assert torch.equal(mine, theirs)
    optimizer.load_state_dict(optimizer.state_dict())
    late = AdaPM([p for p in prepared.parameters() if p.requires_grad])
    assert by_parameter(late) == by_parameter(optimizer.optimizer)


def test_peft_s_adapters_as_bare_tensors():
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    optimizer = AdaPM([param for param in model.parameters() if param.requires_grad])
    assert set(optimizer.param_groups[0]["roles"]) == {"adapter"}
    whole = by_parameter(AdaPM(model.named_parameters()))
    assert by_parameter(optimizer).items() <= whole.items()
    assert optimizer.param_groups[0]["param_names"][0].startswith("base_model.model.model.layers.0.self_attn.q_proj")


class SAM(Optimizer):
    """As the published code has it: the inner optimizer is built from the groups of the outer one."""

    def __init__(self, params, inner, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.inner = inner(self.param_groups, **options)
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None]).norm()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param]["old"] = param.data.clone()
                    param.add_(param.grad * (group["rho"] / norm))

    @torch.no_grad()
    def step(self, closure=None):
        for param, state in self.state.items():
            param.data = state["old"]
        self.inner.step()


def sharpness_aware(model, make):
    optimizer = make(model.parameters())
    generator = torch.Generator().manual_seed(1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(3):
        x = torch.randn(3, 4, 64, generator=generator)

        def closure(x=x, backward=True):
            optimizer.zero_grad()
            loss = model(x).square().sum()
            if backward:
                loss.backward()
            return loss

        closure()
        optimizer.first_step()
        closure()
        optimizer.step()
        schedule.step()
    return optimizer


def test_sharpness_aware_minimization():
    torch.manual_seed(0)
    model = TwoTowers()
    twin = copy.deepcopy(model)
    optimizer = sharpness_aware(model, partial(SAM, inner=AdaPM, **OPTIONS))
    assert optimizer.inner.param_groups[0]["lr"] == OPTIONS["lr"] / 8  # the schedule reaches the inner optimizer
    assert by_parameter(optimizer.inner) == by_parameter(AdaPM(model.parameters()))
    sharpness_aware(twin, lambda params: SAM(({"params": [p]} for p in params), AdaPM, **OPTIONS))
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("saved", [False, True], ids=["straight", "saved and loaded"])
def test_wrappers_that_share_the_optimizer_s_state(saved):
    torch.manual_seed(0)
    model = TwoTowers()
    wrapper = pytorch_optimizer.SAM(model.parameters(), AdaPM, **OPTIONS)
    x = torch.randn(3, 4, 64)
    for _ in range(3):
        model(x).square().sum().backward()
        wrapper.first_step(zero_grad=True)
        model(x).square().sum().backward()
        wrapper.second_step(zero_grad=True)
        if saved:
            wrapper.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    assert {int(state["step"]) for state in wrapper.base_optimizer.state.values()} == {3}
    assert "exp_avg_l" in wrapper.base_optimizer.state[model.wide.blocks[0].mlp[0].weight]


def test_lookahead_keeps_its_own_entries_in_the_state():
    model = TwoTowers()

    class Lookahead:
        """As timm has it: slow weights lie in the fast optimizer's state."""

        def __init__(self, fast):
            self.fast, self.count = fast, 0

        def zero_grad(self):
            self.fast.zero_grad()

        def step(self):
            for group in self.fast.param_groups:
                for param in group["params"]:
                    slow = self.fast.state[param].setdefault("lookahead_slow_buff", param.detach().clone())
            self.fast.step()
            for group in self.fast.param_groups:
                for param in group["params"]:
                    slow = self.fast.state[param]["lookahead_slow_buff"]
                    slow.add_(param.detach() - slow, alpha=0.5)
                    param.data.copy_(slow)

    optimizer = Lookahead(AdaPM(list(model.parameters()), **OPTIONS))
    steps(model, optimizer)
    saved = copy.deepcopy(optimizer.fast.state_dict())
    optimizer.fast.load_state_dict(saved)
    after = optimizer.fast.state[model.logit_scale]["lookahead_slow_buff"]
    torch.testing.assert_close(after, model.logit_scale.detach())
    steps(model, optimizer)
    library = pytorch_optimizer.Lookahead(AdaPM(list(model.parameters()), **OPTIONS), k=2)
    steps(model, library)


CONFIG = {
    "betas": [0.9, 0.95],
    "momentum": {"mlp": "none"},
    "no_decay": ["norm"],
    "roles": {"gadget": "full"},
    "state_dtype": {"full": "bfloat16"},
}


@pytest.mark.parametrize("convert", ["none", "partial", "all"])
def test_hydra_partials(convert):
    """Lists and dictionaries are OmegaConf's own, or plain ones, as ``_convert_`` says."""
    config = OmegaConf.create(
        {"_target_": "lightning_adapm.AdaPM", "_partial_": True, "_convert_": convert, "lr": 1e-2, **CONFIG}
    )
    model = TwoTowers()
    optimizer = instantiate(config)(params=model.parameters())
    expected = AdaPM(model.parameters(), lr=1e-2, **CONFIG)
    defaults = [{**each.defaults, "betas": tuple(each.defaults["betas"])} for each in (optimizer, expected)]
    assert defaults[0] == defaults[1]
    assert type(optimizer.param_groups[0]["no_decay"]) is list
    steps(model, optimizer, 1)
    saved = optimizer.state_dict()
    expected.load_state_dict(saved)
    assert "omegaconf" not in pickle.dumps(saved).decode("latin-1")


@pytest.mark.parametrize("make", [AdaPM, AdamMini, AdaLomo, Lomo, LoRAPre, PartialMuon], ids=lambda make: make.__name__)
def test_hydra_instantiates_every_optimizer_with_the_parameters(make):
    model = TwoTowers()
    config = OmegaConf.create({"_target_": f"lightning_adapm.{make.__name__}", "lr": 1e-2})
    optimizer = instantiate(config, model.parameters())
    steps(model, optimizer, 1)
    assert optimizer.defaults == make(model.parameters(), lr=1e-2).defaults


def test_groups_of_configurations():
    model = TwoTowers()
    options = OmegaConf.create({"betas": [0.8, 0.9], "no_decay": ["bias"]})
    optimizer = AdaPM([{"params": model.parameters(), **options}])
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    steps(model, optimizer, 1)
