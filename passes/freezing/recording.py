"""Recording: a frozen form keeps the decisions by which it is run; so does the model, if they are to be relied on."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

from passes.freezing.asking import ASKED, ORIGINAL
from passes.freezing.choosing.decisions import Decisions, attach_decisions
from passes.freezing.choosing.forms import FORM
from passes.freezing.comparing.checking import DOUBT
from passes.freezing.rewrites.rewrite import UNFUSED
from passes.infra.compilation import Compilation, Fact, Facts, Pass

FROZEN = Fact[nn.Module]("frozen")  # what is handed out


class Recording(Pass):
    """Put the decisions together, and leave them with the form and the model."""

    name = "recording"
    requires = (ORIGINAL, ASKED, FORM, UNFUSED, DOUBT)
    ensures = (FROZEN,)

    def run(self, compilation: Compilation) -> Facts:
        """Leave them there."""
        form, asked = compilation[FORM], compilation[ASKED]
        notes = dict.fromkeys((asked.note, *form.note.split("; "), compilation[DOUBT]))  # those of before, each once
        note = "; ".join(filter(None, notes))
        decisions = Decisions(asked.machine, form.layers, form.milliseconds, note, compilation[UNFUSED])
        if form.is_lasting:
            attach_decisions(compilation[ORIGINAL], decisions)
        frozen: Any = form.model
        frozen.decisions = decisions
        if isinstance(frozen, fx.GraphModule):
            frozen.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = {"decisions": decisions}  # which copies of it keep
        return {FROZEN: frozen}
