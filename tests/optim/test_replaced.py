"""Parameters replaced or changed after the optimizer was built: followed, or refused by name; never silently wrong."""

import copy
import gc
import os
import pickle
import warnings
import weakref

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from models import PlainLM, token_batches
from torch import nn
from torch.nn.utils import parametrizations

from lightning_adapm import AdaPM
from lightning_adapm.optim.replaced import Places

HANDED_OVER = {
    "parameters()": lambda model: model.parameters(),
    "named_parameters()": lambda model: model.named_parameters(),
    "names": lambda model: list(model.named_parameters()),
    "tensors": lambda model: list(model.parameters()),
    "groups": lambda model: [{"params": [each]} for each in model.parameters()],
}


def step(model, optimizer):
    optimizer.zero_grad()
    model(token_batches(1)[0]).backward()
    optimizer.step()


def new_head(model):
    model.lm_head = nn.Linear(32, 61, bias=False)


def new_head_of_another_size(model):
    model.lm_head = nn.Linear(32, 70, bias=False)


def new_weight(model):
    model.lm_head.weight = nn.Parameter(torch.zeros(61, 32))


def resized_data(model):
    model.lm_head.weight.data = torch.zeros(70, 32)


def reparametrized(model):
    parametrizations.weight_norm(model.lm_head)


REPLACED = (new_head, new_head_of_another_size, new_weight, resized_data, reparametrized)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("replace", REPLACED)
@pytest.mark.parametrize("how", HANDED_OVER)
def test_a_replaced_parameter_is_refused_by_name_in_the_next_step(how, replace, steps):
    model = PlainLM(layers=1)
    optimizer = AdaPM(HANDED_OVER[how](model), rank=2)
    for _ in range(steps):
        step(model, optimizer)
    replace(model)
    with pytest.raises(RuntimeError, match=r"^lm_head\..*(would not be trained|had the shape)"):
        step(model, optimizer)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("what", ["loaded", "copied", "pickled"])
@pytest.mark.parametrize("replace", REPLACED)
def test_loading_and_copying_leave_the_check_armed(what, replace, steps):
    model = PlainLM(layers=1)
    optimizer = AdaPM(model.parameters(), rank=2)
    for _ in range(steps):
        step(model, optimizer)
    if what == "loaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif what == "copied":
        model, optimizer = copy.deepcopy((model, optimizer))
    else:
        model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    replace(model)
    with pytest.raises(RuntimeError, match=r"^lm_head\..*(would not be trained|had the shape)"):
        step(model, optimizer)


def test_a_copy_without_its_model_steps_as_torch_has_it():
    model = PlainLM(layers=1)
    optimizer = AdaPM(model.parameters())
    step(model, optimizer)
    copied = copy.deepcopy(optimizer)
    for param in copied.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    copied.step()
    step(model, optimizer)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("steps", [0, 1])
def test_resized_token_embeddings(steps, tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=61, n_positions=32, tie_word_embeddings=tied
    )
    model = transformers.GPT2LMHeadModel(config)
    optimizer = AdaPM(model.parameters())
    batch = token_batches(1)[0]
    for _ in range(steps):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.resize_token_embeddings(70, mean_resizing=False)
    model(batch, labels=batch).loss.backward()
    with pytest.raises(RuntimeError, match=r"(wte|lm_head)\.weight .*(would not be trained|had the shape)"):
        optimizer.step()


def test_a_model_that_gets_its_memory_after_the_optimizer_was_built():
    with torch.device("meta"):
        model = PlainLM(layers=1)
    optimizer = AdaPM(model.parameters())
    model.to_empty(device="cpu")
    for param in model.parameters():
        nn.init.normal_(param, std=0.1)
    with pytest.raises(RuntimeError, match=r"^embed_tokens\.weight and \d+ more of PlainLM would not be trained"):
        step(model, optimizer)


def test_parameters_that_conversion_replaces():
    model = PlainLM(layers=1)
    optimizer = AdaPM(model.parameters())
    step(model, optimizer)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    with pytest.raises(RuntimeError, match="embed_tokens"):
        step(model, optimizer)


def test_a_head_of_another_name_is_warned_of_once():
    model = PlainLM(layers=1)
    optimizer = AdaPM(model.parameters())
    step(model, optimizer)
    model.lm_head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 61))
    with pytest.warns(UserWarning, match=r"lm_head\.0\.weight, .*of PlainLM will not be trained.*has lm_head\.weight"):
        step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("other", ["another optimizer", "a group", "nobody, frozen"])
def test_a_replacement_on_purpose_is_no_error(other, steps):
    model = PlainLM(layers=1)
    optimizer = AdaPM(model.parameters())
    for _ in range(steps):
        step(model, optimizer)
    new_head(model)
    if other == "another optimizer":
        kept = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    elif other == "a group":
        optimizer.add_param_group({"params": list(model.lm_head.named_parameters()), "role": "lm_head"})
        kept = None
    else:
        kept = model.lm_head.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)
        step(model, optimizer)
    del kept


def test_what_another_part_of_the_model_does_is_its_own_business():
    """Two optimizers, each with its part; the other part is rebuilt, and the own one loses a layer."""
    model = PlainLM(layers=3)
    optimizer = AdaPM(model.layers.parameters())
    step(model, optimizer)
    new_head(model)
    del model.layers[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)


def test_nothing_is_kept_alive():
    model = PlainLM(layers=1)
    optimizer = AdaPM(model.parameters())
    step(model, optimizer)
    gone = weakref.ref(model.layers[0])
    del model
    for _ in range(3):  # some objects take several passes
        gc.collect()
    assert gone() is None
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()


def square_fused():
    """A fused weight ``(12, 12)``: two heads of 2 for each of query, key and value."""
    attn = nn.Module()
    attn.num_heads, attn.qkv, attn.proj = 2, nn.Linear(12, 12, bias=False), nn.Linear(4, 12, bias=False)
    model = nn.Module()
    model.attn = attn
    return model


def moved_storage(data):
    return data.clone()


def transposed(data):
    return data.t()


def with_gaps(data):
    wide = torch.zeros(data.shape[0], 2 * data.shape[1], dtype=data.dtype)
    wide[:, ::2] = data
    return wide[:, ::2]


def inside_a_flat_buffer(data):
    flat = torch.zeros(5 + data.numel(), dtype=data.dtype)
    flat[5:] = data.flatten()
    return flat[5:].view_as(data)


@pytest.mark.parametrize("change", [moved_storage, transposed, with_gaps, inside_a_flat_buffer])
@pytest.mark.parametrize("options", [{}, {"momentum": "full"}, {"second_moment": "block"}, {"momentum": "none"}])
def test_steps_follow_the_storage_and_the_strides_of_a_fused_weight(change, options):
    """As a model whose weight was that from the start, with the same state."""
    torch.manual_seed(0)
    model, grads = square_fused(), torch.randn(4, 12, 12)
    optimizer = AdaPM(model.parameters(), lr=0.1, rank=1, update_proj_gap=3, **options)
    weight = model.attn.qkv.weight
    for grad in grads[:2]:
        weight.grad = grad.clone()
        optimizer.step()
    expected = copy.deepcopy((model, optimizer))
    weight.data = change(weight.data)
    expected[0].attn.qkv.weight.data = change(expected[0].attn.qkv.weight.data).contiguous().clone()
    expected[1]._drop_caches()
    for each in ((model, optimizer), expected):
        for grad in grads[2:]:
            each[0].attn.qkv.weight.grad = grad.clone()
            each[1].step()
    torch.testing.assert_close(weight.data, expected[0].attn.qkv.weight.data, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("steps", [0, 1])
def test_training_goes_on_in_another_dtype(dtype, steps):
    model = PlainLM(layers=1)
    optimizer = AdaPM(model.parameters(), rank=2)
    for _ in range(steps):
        step(model, optimizer)
    model.to(dtype)
    before = model.lm_head.weight.detach().clone()
    step(model, optimizer)
    assert model.lm_head.weight.dtype == dtype
    assert not torch.equal(before, model.lm_head.weight)


def test_state_on_another_device_is_named():
    model = PlainLM(layers=1)
    optimizer = AdaPM(model.parameters())
    step(model, optimizer)
    state = optimizer.state[model.lm_head.weight]
    state["exp_avg_sq"] = state["exp_avg_sq"].to("meta")
    optimizer._drop_caches()  # as a parameter's new device does
    with pytest.raises(RuntimeError, match=r"lm_head\.weight is on cpu and its state .* on meta: the model was moved"):
        step(model, optimizer)


@pytest.mark.parametrize(
    ("option", "value"),
    [("rank", 4), ("second_moment", "factored"), ("momentum", "full"), ("state_dtype", "bfloat16"),
     ("basis", "shard")],
)  # fmt: skip
@pytest.mark.parametrize("steps", [0, 1])
def test_structural_options_changed_on_a_live_group_are_refused_by_name(option, value, steps):
    model = PlainLM(layers=1)
    optimizer = AdaPM(model.parameters(), rank=2)
    for _ in range(steps):
        step(model, optimizer)
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=rf"embed_tokens\.weight had {option}=.*load this one's state_dict"):
        step(model, optimizer)


def test_policies_changed_in_place_are_refused():
    model = PlainLM(layers=1)
    optimizer = AdaPM(model.parameters(), rank=2)
    step(model, optimizer)
    optimizer.param_groups[0]["momentum"]["mlp"] = "full"
    with pytest.raises(ValueError, match="had momentum="):
        step(model, optimizer)


def test_options_that_shape_no_state_may_change():
    model = PlainLM(layers=1)
    optimizer = AdaPM(model.parameters(), rank=2)
    step(model, optimizer)
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.0, betas=(0.8, 0.9), no_decay=["norm"], update_proj_gap=2)
    step(model, optimizer)


def test_nothing_is_looked_for_while_nothing_changes():
    model = PlainLM(layers=2)
    held = {param: name for name, param in model.named_parameters()}
    places, optimizer = Places([model], held), torch.optim.SGD(model.parameters())
    assert places.check(held, optimizer) is places
    model.layers[0].mlp = nn.Identity()
    assert places.check(held, optimizer) is not places
