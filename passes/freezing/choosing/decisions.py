"""Decisions: how each layer of a frozen model is run, what was measured, and on what machine."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passes import kernel
from passes.errors import InputError
from passes.freezing.choosing.stopwatch import fastest
from passes.layers.attached import Attached

VERSION = 1
_SHOWN, _MOST_LINES = 3, 8  # places of each reason, and reasons, that a summary names
LEAVING = 0.04  # milliseconds: a program ends, the library is called, another program begins
WAYS = ("library", "channels_last", "kernel", "dense")


@dataclass(frozen=True)
class LayerDecision:
    """How one layer is run.

    Attributes:
        way: ``"library"``, ``"channels_last"`` (the library in that memory format), ``"kernel"``, or ``"dense"``, the
            kernel with the dense weight of a regrouped layer.
        tiling: of the kernel: vectors of a strip, tasks per thread; empty for the library, and for a pooling.
        milliseconds: what each candidate took, by its name; empty if nothing was measured.
        macs: multiply-adds for the example inputs; 0 of a pooling.
        shape: of the input, for the example inputs.
        numbers: what the input holds, such as ``"float32 on cpu"``.
    """

    way: str
    tiling: tuple[int, ...] = ()
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    macs: int = 0
    shape: tuple[int, ...] = ()
    numbers: str = ""

    @classmethod
    def of(cls, name: str, milliseconds: Mapping[str, float], like: LayerDecision) -> LayerDecision:
        """The decision for the candidate with this name, of the same layer as another one."""
        way, *tiling = name.split()
        return replace(like, way=way, tiling=tuple(map(int, tiling)), milliseconds=milliseconds)

    @property
    def name(self) -> str:
        """The candidate's name."""
        return " ".join([self.way, *map(str, self.tiling)])

    @property
    def ms(self) -> float | None:
        """What the chosen candidate took, in milliseconds; None if it was not measured."""
        return self.milliseconds.get(self.name)

    @property
    def ms_library(self) -> float | None:
        """What the library took with the dense weight, at best; None if it was not measured."""
        library = ("library", "channels_last")
        return min((ms for name, ms in self.milliseconds.items() if name in library), default=None)

    def is_alike(self, other: LayerDecision) -> bool:
        """Whether another decision is about the same work, so that times of the one are times of the other."""
        return (self.macs, self.shape, self.numbers) == (other.macs, other.shape, other.numbers)

    def without_groups(self) -> LayerDecision:
        """The fastest way that was measured for a regrouped layer with its dense weight; others stay as they are."""
        if not any(name.startswith("dense") for name in self.milliseconds):
            return self
        ungrouped = {name: ms for name, ms in self.milliseconds.items() if not name.startswith("kernel")}
        return LayerDecision.of(fastest(ungrouped), self.milliseconds, self)

    def within_program(self) -> LayerDecision:
        """The kernel's fastest way, unless the library saves more than leaving the kernel's program for it costs."""
        kernels = {name: ms for name, ms in self.milliseconds.items() if name.split()[0] in ("kernel", "dense")}
        if not kernels or self.ms is None or self.ms + LEAVING < min(kernels.values()):
            return self
        return LayerDecision.of(fastest(kernels), self.milliseconds, self)


@dataclass(frozen=True)
class Decisions:
    """How a model is run.

    Attributes:
        machine: what it was measured on.
        layers: by module path (with ``#2``, … for further calls of a layer).
        milliseconds: the whole model as chosen, in programs as long as can be, with dense weights alone, and with the
            library alone; empty if nothing was measured.
        note: what is worth knowing about the choice, or "".
        unfused: norms, sums and activations that are no part of a layer, and layers that are run as they are: why, by
            the path of a module, or by the name of an operation and the module in whose forward it stands.
    """

    machine: str
    layers: Mapping[str, LayerDecision]
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    unfused: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Decisions:
        """The decisions in plain data.

        Raises:
            InputError: the data is not what `to_dict` gives.
        """
        try:
            if data["version"] != VERSION:
                raise InputError(f"decisions have version {data['version']}, this sgfx reads version {VERSION}")
            layers = {
                path: LayerDecision(
                    way=d["way"],
                    tiling=tuple(d["tiling"]),
                    milliseconds=dict(d["milliseconds"]),
                    macs=int(d["macs"]),
                    shape=tuple(d.get("shape", ())),
                    numbers=str(d.get("numbers", "")),
                )
                for path, d in data["layers"].items()
            }
            for path, layer in layers.items():
                _check(path, layer)
            unfused = dict(data.get("unfused", {}))  # which decisions of before did not have
            return cls(str(data["machine"]), layers, dict(data["milliseconds"]), str(data["note"]), unfused)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError("these are no decisions (as the to_dict() of a frozen model's decisions gives)") from error

    def __str__(self) -> str:
        """A table for the terminal."""
        from tabulate import tabulate

        rows = []
        for path, layer in self.layers.items():
            rate = f"{layer.macs / layer.ms / 1e6:.1f}" if layer.ms else ""
            rows.append([path, layer.name, _ms(layer.ms_library), _ms(layer.ms), f"{layer.macs / 1e6:.2f}M", rate])
        head = ["layer", "chosen", "ms library", "ms chosen", "MACs", "GMAC/s"]
        table = tabulate(rows, head, colalign=["left", "left", *["right"] * 4], disable_numparse=True)
        return f"{table}\n{self.summary()}"

    def summary(self) -> str:
        """The machine, the times of the whole model, the note, and what could not be fused, a line each."""
        whole = ", ".join(f"{name} {ms:.2f} ms" for name, ms in self.milliseconds.items())
        lines = [f"measured on {self.machine}", whole, self.note, *self._unfused_lines()]
        return "\n".join(line for line in lines if line)

    def _unfused_lines(self) -> list[str]:
        """What could not be fused, those of one reason together."""
        names: dict[str, list[str]] = {}
        for name, reason in self.unfused.items():
            names.setdefault(reason, []).append(name)
        lines = []
        for reason, those in names.items():
            more = f" and {len(those) - _SHOWN} more" if len(those) > _SHOWN else ""
            lines.append(f"not fused: {', '.join(those[:_SHOWN])}{more}: {reason}")
        rest = len(lines) - _MOST_LINES
        return [*lines[:_MOST_LINES], f"and {rest} more reasons, in decisions.unfused"] if rest > 0 else lines


def _check(path: str, layer: LayerDecision) -> None:
    """Refuse what names no way to run a layer."""
    whole = all(isinstance(number, int) and number > 0 for number in layer.tiling)
    lengths = {"kernel": (0, 2), "dense": (2,)}.get(layer.way, (0,))  # a pooling of the kernel has no tiling
    if layer.way not in WAYS or not whole or len(layer.tiling) not in lengths:
        raise InputError(
            f"the decision for layer {path!r} must be one of {', '.join(WAYS)}, the last two with a tiling of two "
            f"positive integers, not {layer.name!r}"
        )


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def machine() -> str:
    """What kind of machine this is, and whether it lacks the kernel; what was measured elsewhere does not hold here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    lacking = "" if kernel.supported() is None else ", without the kernel"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads{lacking}"


_DECISIONS = Attached("decisions", Decisions)


def attach_decisions(model: nn.Module, decisions: Decisions | None) -> None:
    """Keep decisions with the model that they were made for, instead of any before; `sgfx.save` writes them."""
    if decisions is None:
        _DECISIONS.take_off(model)
    else:
        _DECISIONS.put(model, decisions)


def decisions_of(model: nn.Module) -> Decisions | None:
    """Return the decisions that were made for a model, or None."""
    return _DECISIONS.of(model)
