"""The inference form: norms, sums and activations fused into the layers before, each layer run in its fastest way.

| file | what it does |
|---|---|
| `asking`, `hooks` | what is asked for; a model in which a hook changes something is refused |
| `parts` | the parts of a model that can be traced, as rewritten graphs |
| `recipe` | the modules of the inference form that call the library, and the algebra of folding a norm |
| `rewrites` | passes over an eval graph: norms, sums, activations, constants and more move into layers |
| `choosing`, `candidates` | the fastest form of each layer, on its real shape; the ways to run one |
| `decisions`, `recording` | what was measured and chosen, and on what machine; where it is kept |
| `packing` | a layer as the kernel takes it |
| `placing` | lets a layer write into the padded plane that the next one reads |
| `chaining` | packed layers that follow each other run in one call |
| `assembling`, `forms` | the parts of a model put together; the fastest form of the whole |
| `checking`, `locating`, `doubt` | compared with the model; where it differs first; what rounding explains |
| `stopwatch` | the one clock |
| `time_budget`, `timing` | ratios at which the frozen model takes so many milliseconds; what these were |
"""

from passes.freezing.asking import ASKED, ORIGINAL, Asked, checked_strategy
from passes.freezing.choosing.choosing import chosen_layers, chosen_macs, filters_of
from passes.freezing.choosing.decisions import Decisions, LayerDecision, attach_decisions, decisions_of, machine
from passes.freezing.hooks import check_hooks, check_weights
from passes.freezing.parts import quiet_copy
from passes.freezing.recording import FROZEN
from passes.freezing.time_budget import TimeBudget
from passes.freezing.timing import Timing, hand_on_times, timing_of

__all__ = [
    "ASKED",
    "FROZEN",
    "ORIGINAL",
    "Asked",
    "Decisions",
    "LayerDecision",
    "TimeBudget",
    "Timing",
    "attach_decisions",
    "check_hooks",
    "check_weights",
    "checked_strategy",
    "chosen_layers",
    "chosen_macs",
    "decisions_of",
    "filters_of",
    "hand_on_times",
    "machine",
    "quiet_copy",
    "timing_of",
]
