"""Writes passes.md, targets.md and commands.md from the code itself: docstrings, settings and options.

    python docs/generate.py

A test keeps what is committed equal to what this writes.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from featherweight import cli, passes, targets
from featherweight.passes import Pass
from featherweight.settings import settings_of

HERE = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py: change the docstrings, then run it again. -->"


def explanations(kind: type) -> dict[str, str]:
    """What the Args in the docstrings of a class, and of those it derives from, say of each name.

    >>> class Prune:
    ...     '''Prunes.
    ...
    ...     Args:
    ...         share: of the weights,
    ...             the smallest first.
    ...         scope: of the competition.
    ...     '''
    >>> explanations(Prune)
    {'share': 'of the weights, the smallest first.', 'scope': 'of the competition.'}
    """
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        found |= _explained(inspect.cleandoc(base.__doc__ or ""))
    return found


def _explained(docstring: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in docstring.partition("Args:\n")[2].splitlines():
        if start := re.fullmatch(r" {4}(\w+): (.*)", line):
            name = start[1]
            found[name] = start[2]
        elif found and line.startswith(" " * 8):
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return found


def markdown(docstring: str | None) -> str:
    """A docstring as Markdown: its indented blocks are code already, its quoted words too."""
    return inspect.cleandoc(docstring or "").replace("``", "`")


def passes_page() -> str:
    """Every pass with its mathematics, its source and its settings."""
    parts = ["# Passes", NOTE, "A recipe names them by the titles below. Every pass also takes `where`: "
             + explanations(Pass)["where"]]  # fmt: skip
    for name in passes.names():
        kind = passes.find(name)
        parts += [f"## {name}", markdown(inspect.getmodule(kind).__doc__)]
        own = {key: setting for key, setting in settings_of(kind).items() if key not in settings_of(Pass)}
        said = explanations(kind)
        if own:
            rows = [
                f"| `{key}` | {setting.limits or setting.type.__name__} | `{setting.default}` | {said.get(key, '')} |"
                for key, setting in own.items()
            ]
            parts.append("\n".join(["| setting | takes | default | |", "| --- | --- | --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def targets_page() -> str:
    """Every target with what it writes and what it needs."""
    parts = ["# Targets", NOTE]
    for name in targets.names():
        module = importlib.import_module(f"featherweight.targets.{name}")
        (kind,) = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, targets.Target) and value.__module__ == module.__name__
        ]
        parts += [f"## {name}", markdown(module.__doc__), f"Needs {', '.join(f'`{r}`' for r in kind.requires)}: "
                  f"`pip install 'featherweight[{kind.extra}]'`."]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """Every command with its options."""
    (choices,) = [action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)]
    helps = {action.dest: action.help for action in choices._choices_actions}
    parts = ["# Commands", NOTE]
    for name, command in choices.choices.items():
        rows = [f"| `{spelling}` | {said} |" for spelling, said in _options(command)]
        said = helps[name] or ""
        parts += [f"## featherweight {name}", f"{said[:1].upper()}{said[1:]}.",
                  "\n".join(["| argument | |", "| --- | --- |", *rows])]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _options(command: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in command._actions:
        if action.dest == "help":
            continue
        shown = str(action.metavar or "|".join(action.choices or ()) or "").replace("|", "\\|")
        words = [action.option_strings[0], shown] if action.option_strings else [shown]
        yield " ".join(word for word in words if word), (action.help or "").replace("%%", "%").replace("|", "\\|")


PAGES = {"passes.md": passes_page, "targets.md": targets_page, "commands.md": commands_page}


def main(folder: Path = HERE) -> None:
    """Writes all pages into `folder`."""
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
