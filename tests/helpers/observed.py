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
    """The autograd graph behind some results. An edge is a node and the number of one of its outputs."""

    def __init__(self, results):
        self.edges, stack = {}, [tensor.grad_fn for tensor in results]
        while stack:
            node = stack.pop()
            if node is not None and node not in self.edges:
                self.edges[node] = [edge for edge in node.next_functions if edge[0] is not None]
                stack.extend(behind for behind, _ in self.edges[node])
        self.products = {node: self._operands(node) for node in self.edges if is_a(node, PRODUCTS)}
        self.attentions = {node: scores for node in self.edges if (scores := self._scores(node))}

    def _operands(self, node):
        """The matrix parameter that a product multiplies with (None where there is none), and its other operands."""
        weight, rest = None, []
        for edge in self.edges[node]:
            end = edge[0]
            while is_a(end, VIEWS) and self.edges[end]:
                end = self.edges[end][0][0]
            if not is_a(end, ("torch::autograd::AccumulateGrad",)):
                rest.append(edge)
            elif end.variable.dim() >= 2:
                weight = end.variable
        return weight, rest

    def _scores(self, node):
        """The products of two activations that a softmax is taken of; empty where there is none."""
        if "Softmax" not in node.name():
            return []
        reached = self._reach([behind for behind, _ in self.edges[node]], lambda n: n in self.products)
        return [n for n in reached if n in self.products and self.products[n][0] is None]

    def _reach(self, start, stop):
        """All nodes behind ``start``, those where ``stop`` says so without what is behind them."""
        reached, stack = set(), list(start)
        while stack:
            node = stack.pop()
            if node not in reached:
                reached.add(node)
                if not stop(node):
                    stack.extend(behind for behind, _ in self.edges[node])
        return reached

    def _weighted(self, node):
        return node in self.products and self.products[node][0] is not None

    def weights(self, edge):
        """The nearest matrices behind an edge."""
        return [self.products[n][0] for n in self._reach([edge[0]], self._weighted) if self._weighted(n)]

    def operands(self):
        """Every operand of an attention: its role and its edge."""
        for score in {score for scores in self.attentions.values() for score in scores}:
            yield from zip(("query", "key"), self.products[score][1][-2:], strict=False)
        for weight, operands in self.products.values():
            for edge in operands if weight is None else ():
                if self.attentions.keys() & self._reach([edge[0]], lambda n: n in self.products):
                    yield from (("value", other) for other in operands if other is not edge)

    def outputs(self):
        """The weights that multiply an attention's result."""
        for weight, operands in self.products.values():
            data = [edge[0] for edge in operands[-1:]]
            if weight is not None and self.attentions.keys() & self._reach(data, self._weighted):
                yield weight


def observed_roles(results):
    """For each weight of an attention the roles that it was seen in."""
    graph, seen = Graph(results), defaultdict(set)
    for role, edge in graph.operands():
        for weight in graph.weights(edge):
            seen[weight].add(role)
    for weight in graph.outputs():
        seen[weight].add("attn_out")
    return seen


def observed_rows(results, weight, axis=0):
    """Which rows (of ``axis``) of a weight the queries, the keys and the values are made of, by their derivatives."""
    graph, rows = Graph(results), {}
    for role, (node, number) in graph.operands():
        if not any(weight is found for found in graph.weights((node, number))):
            continue
        shape = node._input_metadata[number].shape
        edge = torch.autograd.graph.GradientEdge(node, number)
        (grad,) = torch.autograd.grad([edge], [weight], [torch.randn(*shape, dtype=weight.dtype)], retain_graph=True)
        found = grad.flatten(1).abs().sum(1 - axis).nonzero().flatten()
        assert role not in rows or rows[role].equal(found)
        rows[role] = found
    return rows


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
