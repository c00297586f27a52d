from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.allocation import Option, cheapest, predicted_frontier, total_cost, total_damage
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
def test_nothing_that_keeps_to_the_bound_is_cheaper(options, bound):
    fitting = [choices for choices in all_choices(options) if total_damage(choices) <= bound]
    if not fitting:
        with pytest.raises(BudgetError, match=r"least harmful add up to.*leave layers out"):
            cheapest(options, bound)
        return
    found = cheapest(options, bound)
    assert list(found) == list(dict.fromkeys(option.layer for option in options))
    assert total_damage(found) <= bound * (1 + 1e-5)
    assert total_cost(found) <= min(map(total_cost, fitting)) + 1e-4 * max(option.cost for option in options)


@given(layers())
@settings(max_examples=30, deadline=None)
def test_the_frontier_goes_from_little_damage_to_little_cost(options):
    found = predicted_frontier(options)
    costs = [total_cost(choices) for choices in found]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)
    assert costs[-1] <= min(map(total_cost, all_choices(options))) + 1e-3


def test_hundreds_of_layers_take_no_time():
    options = [
        Option(f"layer{i}", str(bits), (1 + i % 7) * 4.0**-bits, (1 + i % 11) * bits)
        for i in range(300)
        for bits in (2, 3, 4, 8)
    ]
    found = cheapest(options, 20.0)
    uniform = {o.layer: o for o in options if o.choice == "3"}
    assert total_damage(uniform) < 20.0 and total_cost(found) < total_cost(uniform)
