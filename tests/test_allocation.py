from __future__ import annotations

import ctypes
import itertools
import types

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.allocation import Option, least_harmful, predicted_frontier, total_cost, total_damage
from featherweight.errors import BudgetError

NUMBERS = st.floats(0, 10, allow_nan=False).map(lambda value: round(value, 3))


@st.composite
def layers(draw: st.DrawFn) -> list[Option]:
    count = draw(st.integers(1, 4))
    return [
        Option(f"layer{layer}", str(bits), draw(NUMBERS), draw(NUMBERS))
        for layer in range(count)
        for bits in range(draw(st.integers(1, 3)))
    ]


def all_choices(options: list[Option]) -> list[dict[str, Option]]:
    names = list(dict.fromkeys(option.layer for option in options))
    groups = [[option for option in options if option.layer == name] for name in names]
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*groups)]


@given(layers(), st.floats(0.01, 30))
@settings(max_examples=60, deadline=None)
def test_nothing_that_keeps_to_the_bound_does_less_damage(options, bound):
    fitting = [choices for choices in all_choices(options) if total_cost(choices) <= bound]
    if not fitting:
        with pytest.raises(BudgetError, match=r"the cheapest add up to.*leave layers out"):
            least_harmful(options, bound)
        return
    found = least_harmful(options, bound)
    assert list(found) == list(dict.fromkeys(option.layer for option in options))
    assert total_cost(found) <= bound * (1 + 1e-5)
    assert total_damage(found) <= min(map(total_damage, fitting)) * (1 + 1e-3) + 1e-9


def test_small_damages_are_told_apart_beside_large_ones():
    """Of two layers the cheaper option does a damage that is tiny beside what others do, and yet twice the other's."""
    options = [Option("a", "8", 1e-9, 8.0), Option("a", "4", 4e-9, 4.0), Option("a", "1", 1e3, 1.0)]
    options += [Option("b", "8", 1e-9, 8.0), Option("b", "4", 8e-9, 4.0), Option("b", "1", 1e3, 1.0)]
    assert {layer: o.choice for layer, o in least_harmful(options, 12.0).items()} == {"a": "4", "b": "8"}


@given(layers())
@settings(max_examples=30, deadline=None)
def test_the_frontier_goes_from_little_damage_to_little_cost(options):
    found = predicted_frontier(options)
    costs = [total_cost(choices) for choices in found]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)
    assert costs[-1] <= min(map(total_cost, all_choices(options))) + 1e-3


def test_the_frontier_goes_down_in_even_steps_from_where_all_are_changed():
    ways = ((0.0, 32.0), (0.001, 8.0), (0.1, 4.0), (1.0, 2.0), (9.0, 1.0))
    options = [Option(f"layer{i}", str(cost), damage * (1 + i), cost) for i in range(200) for damage, cost in ways]
    costs = [total_cost(choices) for choices in predicted_frontier(options)]
    assert (costs[0], costs[-1], len(costs)) == (1600.0, 200.0, 36)
    ratios = [after / before for before, after in itertools.pairwise(costs)]
    assert max(ratios) < 0.96 and min(ratios) > 0.92


def test_hundreds_of_layers_take_no_time():
    options = [
        Option(f"layer{i}", str(bits), (1 + i % 7) * 4.0**-bits, (1 + i % 11) * bits)
        for i in range(300)
        for bits in (2, 3, 4, 8)
    ]
    uniform = {o.layer: o for o in options if o.choice == "3"}
    found = least_harmful(options, total_cost(uniform))
    assert total_cost(found) <= total_cost(uniform) and total_damage(found) < total_damage(uniform)


def test_what_the_solver_writes_is_dropped_and_what_it_gets_wrong_not_taken(monkeypatch, capfd):
    """It is C code that writes, past Python; and it may say that all is chosen, or nothing."""
    options = [Option(layer, bits, 8 / int(bits), float(bits)) for layer in "ab" for bits in ("8", "4")]
    libc = ctypes.CDLL(None)
    for chosen in (1.0, 0.0):

        def wrong(damages, chosen=chosen, **_):
            libc.puts(b"from within")
            return types.SimpleNamespace(x=np.full(len(damages), chosen))

        monkeypatch.setattr(scipy.optimize, "milp", wrong)
        print("before")
        found = least_harmful(options, 12.0)
        print("after")
        assert {layer: option.choice for layer, option in found.items()} == {"a": "4", "b": "4"}
    libc.fflush(None)
    assert capfd.readouterr().out.split() == ["before", "after"] * 2
