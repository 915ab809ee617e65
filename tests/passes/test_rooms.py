"""The rooms of the compiler stand in one order, and a module imports from its own room and earlier ones alone."""

import ast
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import passes

ROOT = Path(passes.__file__).parent
# As data flows. The kernel stands early: it knows nothing of the compiler.
ORDER = (
    "errors", "kernel", "infra", "layers", "options", "models", "tracing", "compression", "elimination",
    "calibration", "freezing", "pipeline",
)  # fmt: skip


def rooms_imported(source: str) -> Iterator[tuple[int, str]]:
    """The line and the room of every import from `passes`, also in functions and for type checkers alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: write whole names, from {node.module} can't be followed"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "passes":
                yield node.lineno, rest.partition(".")[0]


def test_imports_are_seen_wherever_they_stand():
    source = """
import passes.tracing.trace
from passes import kernel
from passes.errors import InputError
from torch import nn
if TYPE_CHECKING:
    from passes.elimination.analysis import Channels
def late():
    from passes.models.values import leaves
"""
    found = [room for _, room in rooms_imported(source)]
    assert sorted(found) == ["elimination", "errors", "kernel", "models", "tracing"]


def test_every_room_has_its_place():
    places = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert places - {"__init__"} == set(ORDER)


def taken_by_sgfx() -> Iterator[tuple[str, str, str]]:
    """The place, the module of `passes` and the name of everything that `sgfx` imports from there."""
    for file in sorted((ROOT.parent / "sgfx").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "passes":
                for alias in node.names:
                    yield f"{file.relative_to(ROOT.parent)}:{node.lineno}", str(node.module), alias.name


def test_rooms_offer_what_sgfx_takes_and_no_more():
    """The kernel, which is offered to the other rooms, has a face of its own."""
    taken: dict[str, set[str]] = {room: set() for room in ORDER}
    for place, module, name in taken_by_sgfx():
        if module != "passes":  # a room as such
            assert module.count(".") == 1, f"{place} imports {name} from {module}: import it from the room"
            taken[module.partition(".")[2]].add(name)
    for room in ORDER:
        if (ROOT / room).is_dir() and room != "kernel":
            assert set(import_module(f"passes.{room}").__all__) == taken[room]


@pytest.mark.parametrize("room", ORDER)
def test_imports_go_from_later_rooms_to_earlier_ones(room):
    allowed = set(ORDER[: ORDER.index(room) + 1])
    files = sorted((ROOT / room).rglob("*.py")) or [ROOT / f"{room}.py"]
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports from {other}"
        for file in files
        for line, other in rooms_imported(file.read_text(encoding="utf-8"))
        if other not in allowed
    ]
    assert not wrong


def test_the_kernel_is_given_plain_data():
    """It imports errors and itself, and of what others wrote numpy, torch and what compiles it."""
    allowed = {"passes", "numpy", "torch", "numba", "llvmlite", *sys.stdlib_module_names}
    for file in (ROOT / "kernel").rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        assert {room for _, room in rooms_imported(source)} <= {"errors", "kernel"}, file
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= allowed, (file, names)


def test_what_grouped_layers_keep_for_themselves_is_read_by_them_alone():
    """Others take `dense_shape`, `packed_rows`, `group_blocks` and the public tables."""
    private = {"_rows", "_places", "_blocks", "_dense_shape", "_spatial_dims"}
    own = {ROOT / "layers" / name for name in ("grouped.py", "custom.py")}
    for file in {*ROOT.rglob("*.py"), *(ROOT.parent / "sgfx").rglob("*.py")} - own:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                assert node.attr not in private, f"{file}:{node.lineno} reads {node.attr}"
