"""State: what is kept, how it is saved, what of another setting can be loaded."""

import copy
import pickle

import pytest
import torch
from models import relative_difference, tiny_gpt, token_batches, train
from saved import OPTIONS, trained

from lightning_adapm import AdaPM


def reloaded(model, optimizer, path, **options):
    """A copy of the model with a new optimizer whose state went through a file."""
    torch.save(optimizer.state_dict(), path)
    twin = copy.deepcopy(model)
    new = AdaPM(twin.parameters(), **(OPTIONS | options))
    new.load_state_dict(torch.load(path, weights_only=True))
    return twin, new


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize("steps", [4, 6])  # the next step is a refresh; is not one
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_resume_is_bit_identical(tmp_path, second_moment, steps, state_dtype):
    options = {"second_moment": second_moment, "state_dtype": state_dtype}
    torch.manual_seed(0)
    model, optimizer = trained(steps, **options)
    twin, resumed = reloaded(model, optimizer, tmp_path / "state.pt", **options)
    rest = token_batches(12)[steps:]
    train(model, optimizer, rest)
    train(twin, resumed, rest)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("through", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_deepcopy_and_pickle_keep_everything(through):
    model, optimizer = trained()
    twin, copied = through([model, optimizer])
    assert copied.param_groups[0]["roles"] == optimizer.param_groups[0]["roles"]
    rest = token_batches(5, seed=1)
    train(model, optimizer, rest)
    train(twin, copied, rest)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_loading_does_not_share_memory():
    model, optimizer = trained()
    twin = copy.deepcopy(model)
    other = AdaPM(twin.parameters(), **OPTIONS)
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    train(twin, other, token_batches(3))
    for key, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(before[key][k])) for k, v in entry.items())


def test_every_key_exists_after_the_first_step_with_zero_gradients():
    """As torch.distributed.checkpoint initializes a state that it is about to load."""
    model = tiny_gpt()
    reference = trained()[1]
    optimizer = AdaPM(model.parameters(), **OPTIONS)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    before = copy.deepcopy(model.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    keys = [{k: getattr(v, "shape", None) for k, v in state.items()} for state in optimizer.state.values()]
    assert keys == [{k: getattr(v, "shape", None) for k, v in state.items()} for state in reference.state.values()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_state_holds_tensors_and_numbers_only():
    _, optimizer = trained()
    for state in optimizer.state.values():
        assert all(isinstance(value, (torch.Tensor, int, float)) for value in state.values())
    assert optimizer.state_dict()["param_groups"][0]["format_version"] == 1


def test_second_moment_of_bfloat16_parameters_stays_float32(tmp_path):
    model = tiny_gpt().bfloat16()
    options = {"second_moment": "block", "state_dtype": None}
    _, optimizer = trained(model=model, **options)
    _, new = reloaded(model, optimizer, tmp_path / "state.pt", **options)
    for old, restored in zip(optimizer.state.values(), new.state.values(), strict=True):
        for key, value in old.items():
            if isinstance(value, torch.Tensor):
                assert restored[key].dtype == value.dtype == torch.float32
                assert torch.equal(restored[key], value)


def test_hyperparameters_come_from_the_checkpoint_and_structure_from_the_optimizer(tmp_path):
    model, optimizer = trained(lr=1e-4, weight_decay=0.3)
    _, new = reloaded(model, optimizer, tmp_path / "state.pt", lr=5e-2, rank=3)
    (group,) = new.param_groups
    assert (group["lr"], group["weight_decay"], group["rank"]) == (1e-4, 0.3, 3)


class TestConversion:
    def momentum(self, optimizer, name):
        """Every momentum of a parameter as dense matrices by piece."""
        param = dict(zip(optimizer.param_groups[0]["param_names"], optimizer.param_groups[0]["params"], strict=True))[
            name
        ]
        state, dense = optimizer.state[param], {}
        for piece in optimizer.pieces[param]:
            if piece.prefix + "exp_avg_l" in state:
                dense[piece.role] = state[piece.prefix + "exp_avg_l"] @ state[piece.prefix + "exp_avg_r"]
            elif piece.prefix + "exp_avg" in state:
                dense[piece.role] = state[piece.prefix + "exp_avg"]
        return dense

    def test_larger_rank_keeps_the_momentum(self, tmp_path):
        model, optimizer = trained(state_dtype=None)
        twin, new = reloaded(model, optimizer, tmp_path / "state.pt", rank=5, state_dtype=None)
        for name in ("transformer.h.0.attn.qkv.weight", "transformer.h.1.mlp.fc_1.weight", "lm_head.weight"):
            before, after = self.momentum(optimizer, name), self.momentum(new, name)
            assert before.keys() == after.keys()
            for role in before:
                torch.testing.assert_close(after[role], before[role], rtol=1e-5, atol=1e-8)
        train(twin, new, token_batches(6))  # the added rows fill at the next refresh
        rows = new.state[twin.lm_head.weight]["exp_avg_r"].norm(dim=-1)
        torch.testing.assert_close(rows, torch.ones(5))

    def test_smaller_rank_keeps_the_strongest_directions(self, tmp_path):
        model, optimizer = trained(rank=6, state_dtype=None)
        _, new = reloaded(model, optimizer, tmp_path / "state.pt", rank=3, state_dtype=None)
        before, after = self.momentum(optimizer, "lm_head.weight"), self.momentum(new, "lm_head.weight")
        u, s, vh = torch.linalg.svd(before["lm_head"].double(), full_matrices=False)
        best = u[:, :3] * s[:3] @ vh[:3]
        assert relative_difference(after["lm_head"], best) < 1e-5

    def test_from_torch_adamw(self, tmp_path):
        model = tiny_gpt()
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
        train(model, adamw, token_batches(20))
        twin, new = reloaded(model, adamw, tmp_path / "state.pt", rank=20, second_moment="block")
        qkv = model.transformer.h[0].attn.qkv.weight
        state, old = new.state[twin.transformer.h[0].attn.qkv.weight], adamw.state[qkv]
        assert state["step"] == 20
        assert torch.equal(state["value.exp_avg"], old["exp_avg"][48:])
        torch.testing.assert_close(
            state["query.exp_avg_sq"].flatten(), old["exp_avg_sq"][:32].unflatten(0, (4, 8)).mean(dim=(1, 2))
        )
        head = self.momentum(new, "lm_head.weight")["lm_head"]
        s = torch.linalg.svdvals(adamw.state[model.lm_head.weight]["exp_avg"])
        assert (head - adamw.state[model.lm_head.weight]["exp_avg"]).norm() < 1.3 * s[20:].norm()
        losses = train(twin, new, token_batches(10))
        assert all(loss < 6 for loss in losses)

    @pytest.mark.parametrize("old", ["elementwise", "block", "factored"])
    @pytest.mark.parametrize("new", ["elementwise", "block", "factored"])
    def test_second_moments(self, tmp_path, old, new):
        """Sums over every block are kept exactly; what finer state there is becomes the average of coarser blocks."""
        model, optimizer = trained(second_moment=old)
        twin, loaded = reloaded(model, optimizer, tmp_path / "state.pt", second_moment=new)
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            for piece in optimizer.pieces[param]:
                shape = piece.matrix(param).shape
                means = []
                for state in (optimizer.state[param], loaded.state[other]):
                    if piece.prefix + "exp_avg_sq_row" in state:
                        means.append(state[piece.prefix + "exp_avg_sq_row"].mean())
                    else:
                        means.append(state[piece.prefix + "exp_avg_sq"].mean())
                assert len(shape) and relative_difference(means[1], means[0]) < 1e-4, (piece.role, shape)
        assert all(loss < 6 for loss in train(twin, loaded, token_batches(4)))

    def test_other_policies(self, tmp_path):
        model, optimizer = trained(momentum="full")
        twin, new = reloaded(model, optimizer, tmp_path / "state.pt", momentum="paper")
        assert "exp_avg" not in new.state[twin.transformer.wte.weight]
        _, back = reloaded(twin, new, tmp_path / "back.pt", momentum={"mlp": "full", "embedding": "full"})
        assert self.momentum(back, "transformer.h.0.mlp.proj.weight")["mlp"].norm() > 0
        assert self.momentum(back, "transformer.wte.weight")["embedding"].norm() == 0


class TestHooks:
    """torch's hooks see what they see of torch.optim.AdamW."""

    def test_a_hook_that_wraps_and_one_that_unwraps(self):
        model, optimizer = trained()
        before = optimizer.state_dict()
        optimizer.register_state_dict_post_hook(lambda _, state: {"optimizer": state, "by": "me"})
        wrapped = optimizer.state_dict()
        assert wrapped["by"] == "me"
        assert str(wrapped["optimizer"]) == str(before)
        twin = copy.deepcopy(model)
        other = AdaPM(twin.parameters(), **OPTIONS)
        other.register_load_state_dict_pre_hook(lambda _, state: state["optimizer"])
        other.load_state_dict(wrapped)
        assert str(other.state_dict()) == str(before)

    def test_a_hook_that_filters(self):
        _, optimizer = trained()
        optimizer.register_state_dict_post_hook(lambda _, state: {"state": {}, "param_groups": []})
        assert optimizer.state_dict() == {"state": {}, "param_groups": []}

    def test_a_hook_after_loading_sees_the_state(self):
        _, optimizer = trained()
        seen = []
        optimizer.register_load_state_dict_post_hook(lambda loaded: seen.append(len(loaded.state)), prepend=True)
        optimizer.load_state_dict(optimizer.state_dict())
        assert seen == [len(optimizer.state)]


def test_entries_that_belong_to_no_parameter_survive():
    model, optimizer = trained()
    optimizer.state["phase"] = {"index": 2}
    optimizer.state["mean"] = torch.ones(3)
    _, loaded = trained(model=copy.deepcopy(model))
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.state["phase"] == {"index": 2}
    assert torch.equal(loaded.state["mean"], torch.ones(3))
    assert loaded.state_dict()["state"]["phase"] == {"index": 2}


def test_what_wrappers_keep_with_a_parameter_survives():
    model, optimizer = trained()
    weight = model.transformer.wte.weight
    optimizer.state[weight]["slow"] = weight.detach().clone()
    twin = copy.deepcopy(model)
    _, loaded = trained(model=twin)
    saved = optimizer.state_dict()
    loaded.load_state_dict(saved)
    slow = loaded.state[twin.transformer.wte.weight]["slow"]
    assert torch.equal(slow, weight)
    assert slow is not optimizer.state[weight]["slow"]
    train(twin, loaded, token_batches(1))
    assert loaded.state[twin.transformer.wte.weight]["slow"] is slow


def test_loading_in_inference_mode(tmp_path):
    model, optimizer = trained()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twin = copy.deepcopy(model)
    other = AdaPM(twin.parameters(), **OPTIONS)
    with torch.inference_mode():
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
    rest = token_batches(3, seed=1)
    assert train(twin, other, rest) == train(model, optimizer, rest)
