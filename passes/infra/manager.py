"""Runs passes in order and holds them to what they state.

1. Before a pass, every fact that it requires is known, and it gets no others.
2. What it returns is what it ensures: nothing is missing, and nothing is there that it does not state.
3. Its own check of the result finds nothing. Facts that it ends are gone.
4. A failure names the pass and what ran before it, and chains its cause. Bad input passes through as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from passes.errors import InputError, PassError, let_memory_errors_pass
from passes.infra.compilation import Compilation, Fact, Facts, Pass


def run_passes(passes: Sequence[Pass], compilation: Compilation) -> Compilation:
    """Run `passes` on `compilation` in order, and return it.

    Raises:
        InputError: from a pass, when the input can't be compiled.
        PassError: a pass lacks what it requires, failed, or did not leave what it states.
    """
    for position, each in enumerate(passes):
        before = f"ran before it: {', '.join(p.name for p in passes[:position]) or 'nothing'}"
        if missing := [fact for fact in each.requires if fact not in compilation]:
            raise PassError(f"pass {each.name!r} requires {_names(missing)} ({before})")
        try:
            found = dict(each.run(compilation.only(*each.requires)) or {})
            broken = _broken_promise(each, found)
            compilation.learn(found)
            problem = None if broken else each.check(compilation.only(*each.requires, *each.ensures))
        except InputError:
            raise
        except Exception as error:
            let_memory_errors_pass(error)
            raise PassError(f"pass {each.name!r} failed ({before}): {error}") from error
        if broken:
            raise PassError(f"pass {each.name!r} {broken} ({before})")
        if problem is not None:
            raise PassError(f"pass {each.name!r} left a wrong result ({before}): {problem}")
        compilation.end(each.ends)
    return compilation


def _broken_promise(each: Pass, found: Facts) -> str | None:
    """What a pass has returned otherwise than it states, or None."""
    if missing := [fact for fact in each.ensures if fact not in found]:
        return f"did not leave {_names(missing)}"
    if more := [fact for fact in found if fact not in each.ensures]:
        return f"left {_names(more)}, which it does not state"
    return None


def _names(facts: Collection[Fact[Any]]) -> str:
    return ", ".join(fact.name for fact in facts)
