"""The CPU kernel: a GEMM that reads rows of pixels through offsets, for grouped, dense and depthwise layers.

One row of a result (a filter's picture) is a weighted sum of rows of the input. A row is contiguous, so gathering the
inputs of a group is a table of channel numbers and a kernel's taps are offsets into a picture with margins: nothing is
copied, and the permutations of eq. 17 are address arithmetic. The parts, in the order in which data flows:

| part | what it does |
|---|---|
| `layout.geometry` | kernel, stride, padding, dilation; the margins around a picture |
| `layout.packing` | from blocks of weights to tables: pure tensor functions |
| `layout.schedule` | for one input size: what is copied, which pixels, how the work is cut: pure integers |
| `layout.plane_schedule` | the same of steps that read pictures as they are |
| `codegen.target`, `activations`, `micro_kernel` | micro-kernels as LLVM IR for this machine's vectors |
| `codegen.plane_kernels`, `window_kernel` | the same of steps that take each channel for itself |
| `codegen.object_code`, `cache` | the same compiled, and kept on disk |
| `runtime` | the compiled loops, and torch's own threads to run them |
| `form` | what is known of a step's calls before there are tensors |
| `program`, `layout.memory` | steps that run in one call, and memory for it |
| `ops`, `packed_layer`, `plane_step` | operations of torch; the layer, and the other step, that calls one |
| `packed_chain` | steps one after the other |

`supported` says whether this machine can run it. `pack_blocks` compiles what is needed, so that no request has to wait
for it; it is given plain data, and nothing here knows the compiler. numba and llvmlite are imported when that happens.
"""

from passes.kernel.codegen.target import Target, host, supported
from passes.kernel.form import NO_PLACEMENT, Form, Placement, PlaneForm, prepare
from passes.kernel.layout.geometry import NO_MARGINS, Geometry, Margins
from passes.kernel.layout.packing import Block
from passes.kernel.layout.schedule import DEFAULT_TILING, Tiling
from passes.kernel.packed_layer import PackedConv2d, PackedLinear, pack_blocks, tilings

__all__ = [
    "DEFAULT_TILING",
    "NO_MARGINS",
    "NO_PLACEMENT",
    "Block",
    "Form",
    "Geometry",
    "Margins",
    "PackedConv2d",
    "PackedLinear",
    "Placement",
    "PlaneForm",
    "Target",
    "Tiling",
    "host",
    "pack_blocks",
    "prepare",
    "supported",
    "tilings",
]
