"""Runs passes in order and holds them to what they state.

1. Before a pass, every fact that it requires is there.
2. After it, every fact that it ensures is there, and its own check of the result finds nothing.
3. A failure names the pass and what ran before it, and chains its cause. Bad input passes through as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from passes.errors import InputError, PassError, let_memory_errors_pass
from passes.infra.compilation import Pass, Unit


def run_passes(passes: Sequence[Pass], unit: Unit) -> bool:
    """Run `passes` on `unit` in order; return whether any of them modified the model.

    Raises:
        InputError: from a pass, when the input can't be compiled.
        PassError: a pass lacks what it requires, failed, or did not leave what it ensures.
    """
    modified = False
    for position, each in enumerate(passes):
        before = [p.name for p in passes[:position]]
        _require(each, each.requires, unit, "requires", before)
        try:
            modified |= each.run(unit)
            problem = each.check(unit)
        except InputError:
            raise
        except Exception as error:
            let_memory_errors_pass(error)
            raise PassError(f"pass {each.name!r} failed ({_ran(before)}): {error}") from error
        _require(each, each.ensures, unit, "did not leave", before)
        if problem is not None:
            raise PassError(f"pass {each.name!r} left a wrong result ({_ran(before)}): {problem}")
    return modified


def _require(each: Pass, facts: tuple[str, ...], unit: Unit, verb: str, before: list[str]) -> None:
    missing = [fact for fact in facts if not unit.knows(fact)]
    if missing:
        raise PassError(f"pass {each.name!r} {verb} {', '.join(missing)} ({_ran(before)})")


def _ran(before: list[str]) -> str:
    return f"ran before it: {', '.join(before) or 'nothing'}"
