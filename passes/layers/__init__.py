"""The layers that the compiler emits: masked (between pruning steps) and grouped (what `compile` returns)."""

from passes.layers.channel_cut import Cut, apply_cuts, channel_dim, cut_of, cuts
from passes.layers.encoding import as_tensor, decode, decode_whole, encode
from passes.layers.former_buffers import former_structure
from passes.layers.grouped import Form, Grouped, GroupedLinear
from passes.layers.known.geometry import is_layer, is_linear
from passes.layers.masked import Masked
from passes.layers.plain import make_exportable
from passes.layers.plan import LayerPlan, LayerShape, layer_shape, network_ratios, plan_of, plans
from passes.layers.structured import Structured
from passes.layers.surgery import hook_dicts

__all__ = [
    "Cut",
    "Form",
    "Grouped",
    "GroupedLinear",
    "LayerPlan",
    "LayerShape",
    "Masked",
    "Structured",
    "apply_cuts",
    "as_tensor",
    "channel_dim",
    "cut_of",
    "cuts",
    "decode",
    "decode_whole",
    "encode",
    "former_structure",
    "hook_dicts",
    "is_layer",
    "is_linear",
    "layer_shape",
    "make_exportable",
    "network_ratios",
    "plan_of",
    "plans",
]
