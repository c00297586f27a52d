"""The exception tree is the one that its module draws."""

from __future__ import annotations

import re

from featherweight import errors


def test_the_docstring_draws_every_error_with_its_meaning() -> None:
    drawn = dict(re.findall(r"[├└]── (\w+) +(.+)", errors.__doc__ or ""))
    defined = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert {"FeatherweightError", *drawn} == set(defined)
    for name, meaning in drawn.items():
        assert defined[name].__bases__ == (errors.FeatherweightError,)
        assert str(defined[name].__doc__).lower() == f"{meaning}.".lower()
    assert errors.FeatherweightError.__bases__ == (Exception,)
