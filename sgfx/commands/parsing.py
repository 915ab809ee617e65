"""Flags and config files: jsonargparse reads them into a dataclass, and mistakes are said in one line."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser, Namespace  # type: ignore[attr-defined]

O = TypeVar("O")  # noqa: E741 - options


class Parser(ArgumentParser):
    """A parser of the fields of a dataclass whose errors are one line on stderr, and exit status 2."""

    def __init__(self, options: type, *, prog: str, description: str) -> None:
        """Make the flags: a field is one, whose help is its metadata; those of a nested dataclass have dotted names."""
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.add_argument("--config", action=ActionConfigFile, help="a YAML file of these options; later flags win")
        self._names: list[str] = []
        self._positional: set[str] = set()
        self._hints: dict[str, Any] = {}
        self._add(options, "")

    def _add(self, options: type, prefix: str) -> None:
        hints = get_type_hints(options)
        for each in fields(options):
            name, hint = prefix + each.name, hints[each.name]
            if is_dataclass(hint):
                self._add(hint, f"{name}.")  # type: ignore[arg-type]
                continue
            self._names.append(name)
            self._hints[name] = hint
            if hint is bool:
                self.add_argument(f"--{name}", action=ActionYesNo, default=each.default, help=each.metadata["help"])
            elif each.metadata.get("positional"):
                self._positional.add(name)
                self.add_argument(name, type=hint, help=each.metadata["help"])
            else:
                self.add_argument(f"--{name}", type=hint, **_default(each), help=each.metadata["help"])

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, and end."""
        print(f"{self.prog}: error: {self._brief(message)}", file=sys.stderr)
        sys.exit(2)

    def _brief(self, message: str) -> str:
        """One line, with the option that may have been meant."""
        if found := re.search(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL):
            name = found[1]
            given = re.search(r"(?:Given value|Got value): (.*)", found[2])
            if name in self._hints and given:
                return f"--{name} is to be {_words(self._hints[name])}, not {given[1].strip()!r}"
            return f"--{name}: {' '.join(found[2].split())}"
        if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
            return self._unknown(f"{found[1]}.{found[2]}")
        if found := re.search(r"Option '([\w.]+)' is not accepted", message):
            return self._unknown(found[1])
        if found := re.search(r"unrecognized arguments: (\S+)", message, re.IGNORECASE):
            return self._unknown(found[1].partition("=")[0])
        if found := re.search(r"arguments are required: (.*)", message):
            names = [name.strip() for name in found[1].split(",")]
            flags = ", ".join(name.upper() if name in self._positional else f"--{name}" for name in names)
            return f"{flags} must be given"
        return " ".join(message.split())

    def _unknown(self, name: str) -> str:
        plain = name.lstrip("-")
        near = difflib.get_close_matches(plain, self._names, n=2) or [
            each for each in self._names if each.split(".")[-1] == plain
        ]
        meant = f"did you mean {' or '.join(near)}?" if near else f"see {self.prog} --help"
        return f"there is no option {name!r}; {meant}"


def _default(field: Field[Any]) -> dict[str, Any]:
    if field.default is not MISSING:
        return {"default": field.default}
    if field.default_factory is not MISSING:
        return {"default": field.default_factory()}
    return {"required": True}


def _words(hint: Any) -> str:
    """A type in the words of a user."""
    text = re.sub(r"typing\.|<class '|'>", "", str(hint) if not isinstance(hint, type) else hint.__name__)
    for name, words in {"int": "whole number", "float": "number", "str": "text", "bool": "true or false"}.items():
        text = re.sub(rf"\b{name}\b", words, text)
    return text.replace(" | None", "").replace(" | ", " or ")


def parse(options: type[O], arguments: Sequence[str], *, prog: str, description: str) -> O:
    """Read flags and the config files that they name; what neither gives has its default.

    Raises:
        SystemExit: help or the config was asked for (0), or something is wrong (2).
    """
    parser = Parser(options, prog=prog, description=description)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # jsonargparse's, about itself
        found = parser.parse_args(list(arguments))
    return build(options, found.as_dict() if isinstance(found, Namespace) else found)


def build(options: type[O], values: dict[str, Any]) -> O:
    """A dataclass of plain values; what it doesn't know is left out."""
    hints = get_type_hints(options)
    made = {}
    for each in fields(options):  # type: ignore[arg-type]
        if each.name in values:
            value, hint = values[each.name], hints[each.name]
            made[each.name] = build(hint, value) if is_dataclass(hint) else value  # type: ignore[arg-type]
    return options(**made)


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file of options."""
    import yaml

    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def write_config(values: dict[str, Any]) -> str:
    """Options as YAML, in their order."""
    import yaml

    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text
