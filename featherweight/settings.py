"""Settings: one annotation on a dataclass field validates, documents and spans the search.

    share: Annotated[float, Range(0.0, 0.95)] = 0.5
    range: Annotated[str, Choice("minmax", "percentile", "mse")] = "mse"

`check` looks at values that came from text before anything is constructed from them. Nothing here knows what
a setting means.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from featherweight.errors import SettingError


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True, init=False)
class Choice:
    """One of a few values."""

    options: tuple[Any, ...]

    def __init__(self, *options: Any) -> None:
        object.__setattr__(self, "options", options)

    def __contains__(self, value: object) -> bool:
        return any(value == option and type(value) is type(option) for option in self.options)

    def __str__(self) -> str:
        return "one of " + ", ".join(str(option) for option in self.options)


@dataclass(frozen=True)
class Setting:
    """What is known of one field: its name, type, limits (or None) and default."""

    name: str
    type: type
    limits: Range | Choice | None
    default: Any


@cache
def settings_of(owner: type) -> dict[str, Setting]:
    """The settings of a dataclass by name, in the order of its fields."""
    hints = get_type_hints(owner, include_extras=True)
    found = {}
    for field in dataclasses.fields(owner):
        hint = hints[field.name]
        kind, limits = hint, None
        if get_origin(hint) is Annotated:
            kind, *notes = get_args(hint)
            limits = next((note for note in notes if isinstance(note, (Range, Choice))), None)
        found[field.name] = Setting(field.name, kind, limits, field.default)
    return found


def check(owner: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` as `owner` takes them, or a SettingError that names the setting, the limits and `where`.

    Whole numbers are taken for floats (`1` for `1.0`), never the other way, and booleans are not numbers.

    >>> @dataclass(frozen=True)
    ... class Prune:
    ...     share: Annotated[float, Range(0.0, 0.95)] = 0.5
    >>> check(Prune, {"share": 0}, "step 1")
    {'share': 0.0}
    >>> check(Prune, {"share": 2.0}, "step 1")
    Traceback (most recent call last):
    featherweight.errors.SettingError: step 1: share=2.0 is out of range: it takes 0 to 0.95.
        Change it to a value in that range.
    """
    known = settings_of(owner)
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise SettingError(f"{where}: there is no setting {name!r}.{_suggestion(name, known)}")
        checked[name] = _checked_value(known[name], value, where)
    return checked


def _checked_value(setting: Setting, value: Any, where: str) -> Any:
    if setting.type is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if type(value) is not setting.type:
        raise SettingError(
            f"{where}: {setting.name}={value!r} is a {type(value).__name__}, but it takes a "
            f"{setting.type.__name__}{f', {setting.limits}' if setting.limits else ''}. Write it as one."
        )
    finite = not isinstance(value, float) or math.isfinite(value)
    if not finite or (setting.limits is not None and value not in setting.limits):
        raise SettingError(
            f"{where}: {setting.name}={value!r} is out of range: it takes {setting.limits or 'a finite number'}. "
            "Change it to a value in that range."
        )
    return value


def _suggestion(name: object, known: Mapping[str, Setting]) -> str:
    close = get_close_matches(str(name), known, 1)  # a key in YAML may be a number or null
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" It takes: {', '.join(known)}." if known else " It takes none."
