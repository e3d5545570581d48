"""States that were saved with other settings or by another optimizer: what is said, and what is refused."""

import copy

import pytest
import torch
from models import PlainLM, tiny_gpt, token_batches, train
from saved import OPTIONS, trained

from lightning_adapm import AdaLomo, AdaPM, LoRAPre
from lightning_adapm.moments.policy import PRESETS


class TestSettingsThatDiffer:
    """Hyperparameters of the checkpoint win, and the structure of the code, and one line says so."""

    def loaded(self, optimizer, **options):
        model = tiny_gpt()
        other = AdaPM(model.parameters(), **(OPTIONS | options))
        other.load_state_dict(optimizer.state_dict())
        return other.param_groups[0]

    def test_one_warning_names_them_all(self):
        _, optimizer = trained(weight_decay=0.1)
        one_full = {**PRESETS["compact"], "mlp": "full"}
        with pytest.warns(UserWarning, match="AdaPM goes on with") as caught:
            group = self.loaded(optimizer, lr=1e-2, weight_decay=0, rank=4, momentum=one_full, betas=(0.8, 0.9))
        (warning,) = caught
        for words in (
            "lr=0.003 (the code has 0.01)",
            "betas=[0.9, 0.999] (the code has [0.8, 0.9])",
            "weight_decay=0.1 (the code has 0)",
            "rank=4 (the checkpoint has 2)",
            "momentum={'mlp': 'full'} (the checkpoint has {'mlp': 'low_rank'})",
        ):
            assert words in str(warning.message)
        assert (group["lr"], group["weight_decay"], group["betas"]) == (3e-3, 0.1, (0.9, 0.999))
        assert (group["rank"], group["momentum"]["mlp"]) == (4, "full")
        assert warning.filename == __file__

    def test_it_is_said_again_when_the_loaded_state_was_saved(self):
        _, optimizer = trained()
        with pytest.warns(UserWarning, match="lr=0.003"):
            self.loaded(optimizer, lr=1e-2)
        model = tiny_gpt()
        other = AdaPM(model.parameters(), **(OPTIONS | {"lr": 1e-2}))
        with pytest.warns(UserWarning, match="lr=0.003"):
            other.load_state_dict(optimizer.state_dict())
        with pytest.warns(UserWarning, match="lr=0.003"):
            self.loaded(other, lr=1e-2)

    def test_nothing_is_said_of_what_schedules_changed(self, recwarn):
        model, optimizer = trained()
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
        train(model, optimizer, token_batches(2))
        schedule.step()
        optimizer.param_groups[0]["weight_decay"] = 0.5
        group = self.loaded(optimizer)
        assert group["weight_decay"] == 0.5
        assert group["lr"] == optimizer.param_groups[0]["lr"] != 3e-3
        assert not [w for w in recwarn if "goes on with" in str(w.message)]

    def test_of_torch_adamw(self):
        model = tiny_gpt()
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.optim.lr_scheduler.LinearLR(adamw)
        train(model, adamw, token_batches(1))
        with pytest.warns(UserWarning, match=r"lr=0.001 \(the code has 0.003\)"):
            assert self.loaded(adamw)["lr"] == adamw.param_groups[0]["lr"]

    def test_coupled_decay_of_torch_adam_is_left_behind(self):
        model = tiny_gpt()
        adam = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=0.5)
        train(model, adam, token_batches(1))
        with pytest.warns(UserWarning, match=r"weight_decay=0.01 \(the checkpoint's 0.5 was added to gradients\)"):
            assert self.loaded(adam)["weight_decay"] == 0.01


class TestRefusals:
    def test_a_state_of_another_optimizer(self):
        model = tiny_gpt()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        train(model, sgd, token_batches(1))
        _, optimizer = trained()
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match="lm_head.weight holds momentum_buffer"):
            optimizer.load_state_dict(sgd.state_dict())
        assert str(optimizer.state_dict()) == str(before)

    def test_another_shape(self):
        _, optimizer = trained(model=PlainLM(width=48))
        _, other = trained(model=PlainLM(width=32))
        with pytest.raises(ValueError, match=r"embed_tokens.weight does not fit its shape \(61, 32\)"):
            other.load_state_dict(optimizer.state_dict())

    def test_another_shape_of_a_fused_weight(self):
        with pytest.raises(ValueError, match=r"qkv.weight does not fit its shape \(64, 32\): exp_avg \(96, 32\)"):
            AdaPM(tiny_gpt().parameters(), **OPTIONS).load_state_dict(self.of_more_groups())

    def of_more_groups(self):
        model = tiny_gpt(n_query_groups=4)
        adamw = torch.optim.AdamW(model.parameters(), lr=3e-3)
        train(model, adamw, token_batches(1))
        return adamw.state_dict()

    @pytest.mark.parametrize(
        "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: not enough memory")]
    )
    def test_want_of_memory_is_no_other_shape(self, monkeypatch, error):
        _, optimizer = trained()
        saved = optimizer.state_dict()

        def copy_(*_):
            raise error

        monkeypatch.setattr(torch.Tensor, "copy_", copy_)
        with pytest.raises(type(error), match="memory"):
            optimizer.load_state_dict(saved)

    def test_another_order(self):
        model = PlainLM()
        named = list(model.named_parameters())
        optimizer, swapped = AdaPM(named), AdaPM([*named[1:], named[0]])
        train(model, optimizer, token_batches(1))
        with pytest.raises(ValueError, match="another order: embed_tokens.weight"):
            swapped.load_state_dict(optimizer.state_dict())

    def test_groups_in_another_order(self):  # of blocks, whose shapes do not tell
        def by_block(*order):
            return AdaPM([{"params": model.transformer.h[index].parameters()} for index in order])

        model = tiny_gpt()
        optimizer = by_block(0, 1)
        train(model, optimizer, token_batches(1))
        with pytest.raises(ValueError, match=r"another order: transformer.h.0.\S+ where this one has transformer.h.1."):
            by_block(1, 0).load_state_dict(optimizer.state_dict())

    def test_other_groups(self):
        _, optimizer = trained()
        state = optimizer.state_dict()
        state["param_groups"][0]["params"] = state["param_groups"][0]["params"][:-1]
        with pytest.raises(ValueError, match="parameter groups of"):
            optimizer.load_state_dict(state)

    def test_a_newer_format(self):
        _, optimizer = trained()
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0]["format_version"] = 99
        with pytest.raises(ValueError, match="format version 99"):
            optimizer.load_state_dict(state)

    def test_amsgrad(self):
        model = tiny_gpt()
        adamw = torch.optim.AdamW(model.parameters(), amsgrad=True)
        train(model, adamw, token_batches(1))
        with pytest.raises(ValueError, match="amsgrad"):
            AdaPM(model.parameters()).load_state_dict(adamw.state_dict())


class TestLoRAPre:
    """Factors of LoRA-Pre, made from what another optimizer has saved, and made into that."""

    def pairs(self, optimizer, other):
        """States of the same matrices, where the first optimizer has factors."""
        for param, state in optimizer.state.items():
            if "exp_avg_l" in state:
                yield state, other.state[param]

    def test_adapm_goes_on_with_its_moments(self):
        model = PlainLM()
        optimizer = LoRAPre(model.parameters(), rank=2)
        train(model, optimizer, token_batches(4))
        other = AdaPM(model.parameters(), momentum="full")
        with pytest.warns(UserWarning, match=r"rank=0.05 \(the checkpoint has 2\)"):
            other.load_state_dict(optimizer.state_dict())
        compared = list(self.pairs(optimizer, other))
        assert compared
        for state, dense in compared:
            torch.testing.assert_close(dense["exp_avg"], state["exp_avg_l"] @ state["exp_avg_r"])
            root = state["exp_avg_sq_l"] @ state["exp_avg_sq_r"]
            torch.testing.assert_close(dense["exp_avg_sq"], root.square())

    def test_sums_of_gradients_are_made_of_averages_and_keep_their_strongest_directions(self):
        model = PlainLM()
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
        train(model, adamw, token_batches(4))
        wide, narrow = (LoRAPre(model.parameters(), rank=rank, variant="muon") for rank in (12, 3))
        wide.load_state_dict(adamw.state_dict())
        with pytest.warns(UserWarning, match=r"rank=3 \(the checkpoint has 12\)"):
            narrow.load_state_dict(wide.state_dict())
        compared = list(self.pairs(wide, adamw))
        assert compared
        for (state, dense), (_, fewer) in zip(compared, self.pairs(wide, narrow), strict=True):
            summed, found = dense["exp_avg"] / (1 - 0.9), state["exp_avg_l"] @ state["exp_avg_r"]
            left_out = torch.linalg.svdvals(summed)[12:].norm()
            assert (found - summed).norm() <= 1.3 * left_out < 0.5 * summed.norm()
            u, s, vh = torch.linalg.svd(found, full_matrices=False)
            torch.testing.assert_close(fewer["exp_avg_l"] @ fewer["exp_avg_r"], u[:, :3] * s[:3] @ vh[:3])
        train(model, narrow, token_batches(1))
        with pytest.raises(ValueError, match=r"weight has no second moment, which exp_avg_sq cannot do without"):
            AdaPM(model.parameters()).load_state_dict(narrow.state_dict())


def test_adalomo_goes_on_with_the_second_moment_of_adamw():
    model = PlainLM()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, token_batches(2))
    optimizer = AdaLomo(model.parameters(), lr=1e-3, weight_decay=1e-2, update_in_backward=False)
    optimizer.load_state_dict(adamw.state_dict())
    weight = model.layers[0].mlp[0].weight
    state, squares = optimizer.state[weight], adamw.state[weight]["exp_avg_sq"]
    torch.testing.assert_close(state["exp_avg_sq_row"].flatten(), squares.mean(dim=1))
    torch.testing.assert_close(state["exp_avg_sq_col"].flatten(), squares.mean(dim=0))


def test_a_state_that_a_moment_cannot_be_made_from_is_refused_by_name():
    model, optimizer = trained(steps=1)
    with pytest.raises(ValueError, match=r"saved state of \S+weight does not fit: a LowRank.* begin without a state$"):
        LoRAPre(model.parameters()).load_state_dict(optimizer.state_dict())
