"""Submodules with the name of a Python keyword (``"in"``, ``"class"``), which the code of a graph can't say plainly.

torch.fx writes ``self.in(x)``. Code for such names is mended as it is generated; what is handed out, where torch
generates code anew, gets other names for them.
"""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram


def make_callable(graph: fx.Graph) -> None:
    """Let the code that is generated for a graph call all of its submodules, in place."""
    unsayable = {str(node.target) for node in _places(graph) if _has_keyword(str(node.target))}
    if unsayable:
        pairs = {_plain(target): _spelt(target) for target in sorted(unsayable, key=len, reverse=True)}
        graph.on_generate_code(lambda _: _Mend(pairs))


def rename_keywords(graph: fx.GraphModule) -> None:
    """Register what has a Python keyword in its path under another one, in place."""
    tensors = set()
    for node in _places(graph.graph):
        if _has_keyword(str(node.target)):
            path = _other(str(node.target))
            if node.op == "call_module":
                graph.add_submodule(path, graph.get_submodule(str(node.target)))
            else:
                _hold(graph, path, attrgetter(str(node.target))(graph))
                tensors.add(str(node.target))
            node.target = path
    for target in tensors:  # tracing anew would find the first name of a tensor
        prefix, _, name = target.rpartition(".")
        delattr(graph.get_submodule(prefix), name)


def rename_in_program(program: ExportedProgram) -> None:
    """The same for the tensors of an exported program."""
    for spec in program.graph_signature.input_specs:
        if spec.target is not None and _has_keyword(spec.target):
            for tensors in (program.state_dict, program.constants):
                if spec.target in tensors:
                    tensors[_other(spec.target)] = tensors.pop(spec.target)
            spec.target = _other(spec.target)


def _other(path: str) -> str:
    return ".".join(f"{name}_" if keyword.iskeyword(name) else name for name in path.split("."))


def _hold(graph: fx.GraphModule, path: str, value: Any) -> None:
    """Let a graph hold a tensor, or whatever else an attribute was, at a path."""
    prefix, _, name = path.rpartition(".")
    if prefix and prefix not in dict(graph.named_modules()):
        graph.add_submodule(prefix, nn.Module())
    holder = graph.get_submodule(prefix)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        holder.register_buffer(name, value)
    else:
        setattr(holder, name, value)


def _places(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op in ("call_module", "get_attr")]


def _has_keyword(target: str) -> bool:
    return any(keyword.iskeyword(name) for name in target.split("."))


def _plain(target: str) -> str:
    """How torch.fx writes a path."""
    text = "self"
    for name in target.split("."):
        text = f"{text}.{name}" if name.isidentifier() else f'getattr({text}, "{name}")'
    return text


def _spelt(target: str) -> str:
    """How Python can read it."""
    text = "self"
    for name in target.split("."):
        said = name.isidentifier() and not keyword.iskeyword(name)
        text = f"{text}.{name}" if said else f'getattr({text}, "{name}")'
    return text


@dataclass(frozen=True)
class _Mend:
    """Replaces text in generated code, the longest first."""

    pairs: dict[str, str]

    def __call__(self, body: list[str]) -> list[str]:
        for old, new in self.pairs.items():
            place = re.compile(rf"(?<!\w){re.escape(old)}(?!\w)")
            body = [place.sub(lambda _, new=new: new, line) for line in body]  # type: ignore[misc]
        return body
