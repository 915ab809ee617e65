"""Stepping: what stands between packed layers is put in the kernel's form, so that a program need not be left for it.

1. Known are the mean of each picture, sums and products of two pictures, products of a picture with one number of each
   channel (gates), and activations alone; poolings are chosen before, like layers.
2. They become steps only in a row with a packed layer: alone, the library does them as well.
3. What is one pixel for every input, not only for the example, follows from what it was made by. A linear layer that
   reads such pixels is the convolution of them, and is flattened behind instead of before.
4. What is computed in place on a tensor that others read stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from passes.freezing.choosing.choosing import LAYERS
from passes.freezing.choosing.recipe import LibraryLayer
from passes.freezing.rewrites.concatenation import append
from passes.freezing.rewrites.rewrite import SHAPES, graph_of
from passes.freezing.rewrites.sums import inputs_behind
from passes.infra.compilation import Compilation, Pass
from passes.kernel import PackedConv2d, PackedLinear, PlaneForm
from passes.kernel.plane_step import PlaneStep
from passes.layers.known.as_torch_made_it import is_as_torch_made_it
from passes.layers.plan import attach_plan, plan_of
from passes.tracing.mutation import is_held_elsewhere, works_in_place
from passes.tracing.operations import activation_of, is_product, is_sum, module_of

Step = PackedConv2d | PlaneStep
_MEANS, _FLAT = (torch.mean, "mean"), (torch.flatten, "flatten")


class Stepping(Pass):
    """Put what stands between packed layers in the kernel's form."""

    name = "stepping"
    requires = (SHAPES, LAYERS)

    def run(self, compilation: Compilation) -> None:
        """Find rows of layers and known operations, and make steps of these."""
        graph = graph_of(compilation)
        _flatten_behind(graph)
        forms = _forms(graph)
        for row in rows(graph, set(forms)):
            if any(type(module_of(graph, node)) is PackedConv2d for node in row) and len(row) > 1:
                for node in row:
                    if node in forms:
                        _put_step(graph, node, *forms[node])
        graph.delete_all_unused_submodules()
        graph.graph.lint()
        graph.recompile()

    def check(self, compilation: Compilation) -> str | None:
        """No known operation is left between two steps."""
        graph = graph_of(compilation)
        steps, forms = steps_of(graph), _forms(graph)
        left = (node for node in forms if node not in steps and node.prev in steps and node.next in steps)
        return next((f"{node.name} stands between two steps, and is none" for node in left), None)


def steps_of(graph: fx.GraphModule) -> dict[fx.Node, Step]:
    """The calls of packed convolutions and other steps, in the order of the graph; a packed linear layer is none."""
    modules = {node: module_of(graph, node) for node in graph.graph.nodes}
    return {node: module for node, module in modules.items() if type(module) in (PackedConv2d, PlaneStep)}  # type: ignore[misc]


def rows(graph: fx.GraphModule, others: set[fx.Node]) -> list[list[fx.Node]]:
    """Steps that follow each other in the graph, `others` and additions to growing concatenations among them."""
    steps, found = steps_of(graph), [[]]  # type: ignore[var-annotated]
    for node in graph.graph.nodes:
        if node in steps or node in others or _adds_results_of(node, found[-1]):
            found[-1].append(node)
        else:
            found.append([])
    return found


def _adds_results_of(node: fx.Node, row: list[fx.Node]) -> bool:
    """Whether a step of a growing concatenation adds nothing but results of `row`, for nobody else."""
    if node.target is not append or any(node in user.args[1:] for user in node.users):  # no residual has more channels
        return False
    parts: Any = node.args[1]
    return bool(parts) and all(part in row and part.op == "call_module" and len(part.users) == 1 for part in parts)


def _forms(graph: fx.GraphModule) -> dict[fx.Node, tuple[PlaneForm, bool]]:
    """The form of every operation that can be a step, and whether the second of what it reads is the picture."""
    pixels: set[fx.Node] = set()
    found = {}
    for node in graph.graph.nodes:
        form = _form(graph, node, pixels)
        if form is not None:
            found[node] = form, form.does == "gate" and node.all_input_nodes[0] in pixels
        made_of_pixels = set(node.all_input_nodes) <= pixels and (form is not None or _keeps(graph, node))
        if made_of_pixels or (form is not None and form.does == "mean"):
            pixels.add(node)
    return found


def _keeps(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a layer or an activation makes one pixel of one pixel."""
    module: Any = module_of(graph, node)
    if type(module) is PackedConv2d:
        return module.form.geometry.output_size(1, 1) == (1, 1)
    if isinstance(module, LibraryLayer) and module.weight.dim() == 4:
        return module.weight.shape[2:] == (1, 1) and module.padding in (0, (0, 0)) and not module.pads
    return activation_of(graph, node) is not None and bool(node.all_input_nodes)


def _form(graph: fx.GraphModule, node: fx.Node, pixels: set[fx.Node]) -> PlaneForm | None:
    """The step that an operation is, or None."""
    read = node.all_input_nodes
    if node.op == "placeholder" or not read or not all(map(_is_pictures, (node, *read))):
        return None
    if any(each.target is append for each in read):  # a tensor that grows: only layers read a part of its channels
        return None
    if works_in_place(graph, node) and is_held_elsewhere(read[0], node):
        return None
    if is_sum(node) or is_product(node):
        return _of_two(node, pixels)
    if len(read) > 1:
        return None
    if _is_mean(graph, node):
        return PlaneForm("mean")
    name = activation_of(graph, node)
    return None if name is None else PlaneForm("nothing", name)


def _of_two(node: fx.Node, pixels: set[fx.Node]) -> PlaneForm | None:
    """A sum, a product, or a gate, which is the second argument then."""
    read = node.all_input_nodes
    if len(read) != 2 or inputs_behind(read[0]) != inputs_behind(read[1]):
        return None
    shapes = [each.meta["val"].shape for each in read]
    gates = sum(each in pixels for each in read)
    if gates == 1:
        return PlaneForm("gate") if is_product(node) and shapes[0][:2] == shapes[1][:2] else None
    return PlaneForm("sum" if is_sum(node) else "product") if shapes[0] == shapes[1] else None


def _is_pictures(node: fx.Node) -> bool:
    value = node.meta.get("val")
    fits = isinstance(value, Tensor) and value.dim() == 4 and value.dtype == torch.float32
    return fits and value.device.type == "cpu"  # type: ignore[union-attr]


def _is_mean(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node gives the mean of each picture."""
    module = module_of(graph, node)
    if type(module) is nn.AdaptiveAvgPool2d:
        return is_as_torch_made_it(module) and module.output_size in (1, (1, 1), [1, 1])
    if node.target is F.adaptive_avg_pool2d:
        return node.args[1] in (1, (1, 1), [1, 1])
    return node.target in _MEANS and _over_pictures(node) and node.args[2:] == (True,) and not node.kwargs


def _over_pictures(node: fx.Node) -> bool:
    dims = node.args[1] if len(node.args) > 1 and _is_pictures(node.all_input_nodes[0]) else ()
    return isinstance(dims, tuple | list) and sorted(dim % 4 for dim in dims if isinstance(dim, int)) == [2, 3]


def _put_step(graph: fx.GraphModule, node: fx.Node, form: PlaneForm, picture_last: bool) -> None:
    """Call a step instead of an operation."""
    read = node.all_input_nodes[::-1] if picture_last else node.all_input_nodes
    name = f"step_{node.name}"
    graph.add_submodule(name, PlaneStep(form))
    with graph.graph.inserting_before(node):
        step = graph.graph.call_module(name, tuple(read))
    _take_over(graph, node, step)


def _take_over(graph: fx.GraphModule, node: fx.Node, other: fx.Node) -> None:
    other.meta.update(node.meta)
    other.meta.pop("written", None)
    node.replace_all_uses_with(other)
    graph.graph.erase_node(node)


def _flatten_behind(graph: fx.GraphModule) -> None:
    """Let linear layers read pixels as they are, and flatten what they give."""
    for node in list(graph.graph.nodes):
        if node.target in _MEANS and len(node.args) == 2 and not node.kwargs and _over_pictures(node):
            with graph.graph.inserting_before(node):
                mean = graph.graph.call_function(torch.mean, (node.args[0], (2, 3), True))
                mean.meta["val"] = node.meta["val"][:, :, None, None]
                flattened = graph.graph.call_function(torch.flatten, (mean, 1))
            _take_over(graph, node, flattened)
    for node in list(graph.graph.nodes):
        flat = node.args[0] if len(node.args) == 1 else None
        module = module_of(graph, node)
        if type(module) is PackedLinear and isinstance(flat, fx.Node) and _flattens_pixels(graph, flat):
            _read_pixels(graph, node, flat, module)


def _flattens_pixels(graph: fx.GraphModule, node: fx.Node) -> bool:
    before = node.args[0] if node.args else None
    flat = node.target in _FLAT and node.args[1:] == (1,) and not node.kwargs
    return flat and isinstance(before, fx.Node) and _is_pictures(before) and _is_mean(graph, before)


def _read_pixels(graph: fx.GraphModule, node: fx.Node, flat: fx.Node, linear: PackedLinear) -> None:
    convolution: Any = PackedConv2d(linear.tables, linear.form)
    for name in ("path", "kept_weights"):
        setattr(convolution, name, getattr(linear, name))
    if (plan := plan_of(linear)) is not None:
        attach_plan(convolution, plan)
    graph.set_submodule(str(node.target), convolution)
    with graph.graph.inserting_before(node):
        pixels = graph.graph.call_module(str(node.target), (flat.args[0],))
        pixels.meta["val"] = node.meta["val"][:, :, None, None]
        behind = graph.graph.call_function(torch.flatten, (pixels, 1))
    _take_over(graph, node, behind)
    if not flat.users:
        graph.graph.erase_node(flat)
