"""Roles seen in a model's forward, independently of any name: what a weight makes is what its product is used for.

A product of two activations whose result goes through a softmax is queries times keys; what the softmax is multiplied
with is values; the next weight that this product meets is the attention's output projection. All of it can be read from
the autograd graph, which also exists on the meta device.
"""

import inspect
from collections import defaultdict
from contextlib import nullcontext
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

PRODUCTS = ("MmBackward", "AddmmBackward", "BmmBackward", "BaddbmmBackward", "ConvolutionBackward", "MvBackward")
VIEWS = ("TBackward", "TransposeBackward", "PermuteBackward", "ViewBackward", "ExpandBackward", "UnsqueezeBackward",
         "ReshapeAliasBackward", "UnsafeViewBackward", "AliasBackward", "ToCopyBackward", "SqueezeBackward",
         "SliceBackward", "SelectBackward", "SplitBackward", "SplitWithSizesBackward", "CloneBackward")  # fmt: skip


class Keep(TorchFunctionMode):
    """Holds every result, so that the graph of a forward that stops half-way is kept up to there."""

    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("item", "__bool__", "__contains__"):  # nothing to read on the meta device
            return 0
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(item, torch.Tensor) and item.grad_fn is not None:
                self.results.append(item)
        return result


def is_a(node, names):
    return node is not None and node.name().startswith(tuple(names))


class Graph:
    def __init__(self, roots):
        self.nodes, stack = {}, [tensor.grad_fn for tensor in roots]
        while stack:
            node = stack.pop()
            if node is not None and node not in self.nodes:
                self.nodes[node] = [n for n, _ in node.next_functions if n is not None]
                stack.extend(self.nodes[node])
        self.weights = {node: self._split(node) for node in self.nodes if is_a(node, PRODUCTS)}

    def _split(self, node):
        """The matrix that a product multiplies with (None: both are activations), and its other operands."""
        weight, rest = None, []
        for operand in self.nodes[node]:
            end = operand
            while is_a(end, VIEWS) and self.nodes[end]:
                end = self.nodes[end][0]
            if end.name().startswith("torch::autograd::AccumulateGrad"):
                if end.variable.dim() >= 2:
                    weight = end.variable
            else:
                rest.append(operand)
        return weight, rest

    def back(self, start):
        """What lies behind ``start``, up to the first product with a weight: those products and all nodes passed."""
        found, passed, stack = [], set(), [start]
        while stack:
            node = stack.pop()
            if node in passed:
                continue
            passed.add(node)
            if self.weights.get(node, (None,))[0] is not None:
                found.append(self.weights[node][0])
            else:
                stack.extend(self.nodes[node])
        return found, passed


def observed_roles(roots):
    """For each weight of an attention the roles it was seen in."""
    graph, seen = Graph(roots), defaultdict(set)
    attentions = {}
    for node in graph.nodes:
        if "Softmax" not in node.name():
            continue
        _, passed = graph.back(node)
        scores = [p for p in passed if graph.weights.get(p, (0,))[0] is None and _nearest_product(graph, node, p)]
        if scores:
            attentions[node] = scores
    for scores in attentions.values():
        for product in scores:
            operands = graph.weights[product][1][-2:]
            for role, operand in zip(("query", "key"), operands, strict=False):
                for weight in graph.back(operand)[0]:
                    seen[weight].add(role)
    for node, (weight, rest) in graph.weights.items():
        if weight is None:
            for index, operand in enumerate(rest):
                if attentions.keys() & _same_tensor(graph, operand):
                    for value in (other for at, operands in enumerate(rest) if at != index for other in graph.back(operands)[0]):
                        seen[value].add("value")
        elif rest and attentions.keys() & graph.back(rest[-1])[1]:
            seen[weight].add("attn_out")
    return seen


def _nearest_product(graph, softmax, product):
    """Whether ``product`` of two activations is the first behind the softmax."""
    stack, passed = list(graph.nodes[softmax]), set()
    while stack:
        node = stack.pop()
        if node is product:
            return True
        if node in passed or node in graph.weights:
            continue
        passed.add(node)
        stack.extend(graph.nodes[node])
    return False


def _same_tensor(graph, start):
    """Nodes behind ``start`` up to the next product."""
    stack, passed = [start], set()
    while stack:
        node = stack.pop()
        if node not in passed:
            passed.add(node)
            if node not in graph.weights:
                stack.extend(graph.nodes[node])
    return passed


def made_up_inputs(model, images):
    """Inputs for the forward of a Hugging Face model, as far as its signature and configuration say."""
    config, names = model.config, inspect.signature(model.forward).parameters
    first, vision = model.main_input_name, getattr(model.config, "vision_config", model.config)
    inputs = {}
    if "input_ids" in names:
        inputs["input_ids"] = torch.zeros(1, 64, dtype=torch.long)
    if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.zeros(1, 64, dtype=torch.long)
    if "pixel_values" in names and (images or first == "pixel_values"):
        size = getattr(vision, "image_size", None) or 224
        size = size if isinstance(size, (list, tuple)) else (size, size)
        inputs["pixel_values"] = torch.zeros(1, getattr(vision, "num_channels", 3), *size)
    if "input_features" in names and first == "input_features":
        length, bins = 2 * getattr(config, "max_source_positions", 100), getattr(config, "num_mel_bins", 80)
        inputs["input_features"] = torch.zeros(1, bins, length)
    if "input_values" in names:
        inputs["input_values"] = torch.zeros(1, 16000)
    return inputs


def observe(model):
    """Run ``model``, on the meta device, on inputs made up for it: :func:`observed_roles` of its weights.

    What depends on data cannot run there: what was seen before counts.
    """
    keep, autocast = Keep(), torch.autocast
    model.eval()

    def patched(device_type, *args, **kwargs):  # autocast knows no meta device
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    with mock.patch("torch.autocast", patched), torch.device("meta"), keep:
        for images in (False, True):
            try:
                model(**made_up_inputs(model, images))
            except Exception:
                continue
            break
    return observed_roles(keep.results)
