"""Placing: a layer writes into the padded plane that the next one reads, so that nothing is copied to be padded.

A tensor gets margins where a packed layer makes it, all who read it are packed layers of stride 1 (or add it as a
residual), and one of them wants margins. They are the largest that any of them wants.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx


def place(graph: fx.GraphModule) -> None:
    """Give margins to the tensors between packed layers of `graph`, in place."""
    if not any(type(module).__name__ == "PackedConv2d" for module in graph.modules()):
        return
    from passes.kernel import Margins, PackedConv2d

    packed = {}
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(module) is PackedConv2d:
            packed[node] = module
    for node, layer in packed.items():
        if not node.users or not all(user in packed for user in node.users):
            continue
        wanted = [packed[user].form.geometry.margins() for user in node.users if user.args[0] is node]
        strided = any(max(packed[user].form.geometry.stride) > 1 for user in node.users if user.args[0] is node)
        margins = Margins(*(max((getattr(m, side) for m in wanted), default=0) for side in ("top", "bottom", "right")))
        if strided or margins == Margins():
            continue
        layer.form = replace(layer.form, placement=replace(layer.form.placement, writes=margins))
        for user in node.users:
            form = packed[user].form
            roles = [role for role, read in zip(("reads", "adds"), user.args, strict=False) if read is node]
            packed[user].form = replace(form, placement=replace(form.placement, **dict.fromkeys(roles, margins)))
