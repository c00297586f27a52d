"""Settings say what they take, and refuse everything else with a message that tells what to do."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherweight.errors import FeatherweightError, SettingError
from featherweight.settings import Choice, Range, Setting, check, settings_of


@dataclass(frozen=True)
class Example:
    count: int
    share: Annotated[float, Range(0.0, 0.95)] = 0.5
    bits: Annotated[int, Choice(4, 8)] = 8
    rule: Annotated[str, "a note", Choice("minmax", "mse")] = "mse"
    symmetric: bool = True
    damping: float = 0.01


@dataclass(frozen=True)
class Nothing:
    pass


def refusal(values: dict[Any, Any], owner: type = Example) -> str:
    with pytest.raises(SettingError) as refused:
        check(owner, values, "step 2")
    return str(refused.value)


def test_settings_are_the_fields_in_order() -> None:
    assert list(settings_of(Example)) == ["count", "share", "bits", "rule", "symmetric", "damping"]
    assert settings_of(Example)["share"] == Setting("share", float, Range(0.0, 0.95), 0.5)
    assert settings_of(Example)["rule"].limits == Choice("minmax", "mse")
    assert settings_of(Example)["count"].default is MISSING
    assert settings_of(Example)["damping"].limits is None
    assert settings_of(Nothing) == {}


@given(st.floats(0.0, 0.95), st.sampled_from([4, 8]), st.sampled_from(["minmax", "mse"]), st.booleans(), st.integers())
def test_good_values_pass_unchanged(share: float, bits: int, rule: str, symmetric: bool, count: int) -> None:
    given_values = {"count": count, "share": share, "bits": bits, "rule": rule, "symmetric": symmetric}
    assert check(Example, given_values, "step 1") == given_values


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@given(
    st.dictionaries(ANYTHING.filter(lambda x: not isinstance(x, list)) | st.sampled_from(["share", "bits"]), ANYTHING)
)
def test_whatever_text_holds_is_taken_or_refused_by_our_own_error(values: dict[Any, Any]) -> None:
    try:
        checked = check(Example, values, "step 1")
    except FeatherweightError as error:
        assert str(error).startswith("step 1: ")
    else:
        for name, value in checked.items():
            known = settings_of(Example)[name]
            assert type(value) is known.type
            assert known.limits is None or value in known.limits


def test_whole_numbers_become_floats_but_not_the_other_way() -> None:
    checked = check(Example, {"share": 0}, "step 1")
    assert checked == {"share": 0.0}
    assert type(checked["share"]) is float
    assert refusal({"bits": 8.0}) == (
        "step 2: bits=8.0 is a float, but it takes a int, one of 4, 8. Write it as one."
    )  # fmt: skip


@pytest.mark.parametrize("value", [True, "0.5", None, [0.5]])
def test_wrong_types_are_named(value: object) -> None:
    message = refusal({"share": value})
    assert message == (
        f"step 2: share={value!r} is a {type(value).__name__}, but it takes a float, 0 to 0.95. Write it as one."
    )


@pytest.mark.parametrize("value", [0.96, -0.001, math.nan, math.inf, 10**400])
def test_numbers_out_of_range_are_refused_with_the_range(value: float) -> None:
    message = refusal({"share": value})
    assert message.endswith("is out of range: it takes 0 to 0.95. Change it to a value in that range.")


def test_free_floats_must_be_finite() -> None:
    assert check(Example, {"damping": 1e300}, "step 1") == {"damping": 1e300}
    for value in (math.nan, -math.inf, 10**400):
        assert "it takes a finite number" in refusal({"damping": value})


def test_booleans_are_no_whole_numbers_nor_the_reverse() -> None:
    assert "symmetric=1 is a int" in refusal({"symmetric": 1})
    assert "count=True is a bool" in refusal({"count": True})


def test_choices_are_listed() -> None:
    assert "rule='max' is out of range: it takes one of minmax, mse." in refusal({"rule": "max"})
    assert "bits=3 is out of range: it takes one of 4, 8." in refusal({"bits": 3})


def test_choice_tells_true_from_one() -> None:
    assert 1 in Choice(1)
    assert True not in Choice(1)
    assert 1.0 not in Choice(1)


def test_unknown_names_get_the_nearest_or_all() -> None:
    assert refusal({"shere": 0.5}) == "step 2: there is no setting 'shere'. Did you mean 'share'?"
    assert refusal({"zzz": 0.5}).endswith("It takes: count, share, bits, rule, symmetric, damping.")
    assert refusal({None: 0.5}).startswith("step 2: there is no setting None.")
    assert refusal({"share": 0.5}, Nothing).endswith("It takes none.")


@given(st.floats(allow_nan=False), st.floats(allow_nan=False), st.floats())
def test_range_includes_its_ends_and_never_nan(a: float, b: float, value: float) -> None:
    low, high = min(a, b), max(a, b)
    assert low in Range(low, high)
    assert high in Range(low, high)
    assert (value in Range(low, high)) == (low <= value <= high)
    assert "text" not in Range(low, high)
