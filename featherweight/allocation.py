"""Which option each layer gets: the choice that costs no more than a bound and whose damages add up to the least.

A multiple-choice knapsack, solved exactly as a mixed-integer programme by HiGHS. That damages of single layers add up
is an assumption, which the search corrects by what it measures; where options come from is `damage_table`'s affair.

Source: Dong et al. 2020, HAWQ-V2, arXiv:1911.03852, who choose bits so; as an integer programme Yao et al. 2021,
HAWQ-V3, arXiv:2011.10680.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from featherweight.errors import BudgetError


@dataclass(frozen=True)
class Option:
    """One way to treat one layer.

    Args:
        layer: its name.
        choice: what is done with it, in a word that all layers share; "" for nothing.
        damage: to the network's outputs where this layer alone is treated so, zero or more.
        cost: what is to be made small, bytes say; of this layer alone.
    """

    layer: str
    choice: str
    damage: float
    cost: float


ROUNDING = 1e-9  # of a bound
TOLERANCE = 1e-5  # the solver's, of a bound, and some more
CLOSE = 1e-4  # of the damage: what is not worth another try to find less

Choices = Mapping[str, Option]  # by layer


def least_harmful(options: Sequence[Option], most_cost: float) -> dict[str, Option]:
    """One option for each layer: of those that together cost no more than `most_cost`, those that do least damage.

    Raises:
        BudgetError: even the cheapest options cost more.

    >>> a = [Option("a", "8", 0.1, 8.0), Option("a", "4", 1.0, 4.0)]
    >>> b = [Option("b", "8", 0.1, 80.0), Option("b", "4", 1.1, 40.0)]
    >>> {layer: option.choice for layer, option in least_harmful([*a, *b], 50.0).items()}
    {'a': '8', 'b': '4'}
    """
    layers = list(dict.fromkeys(option.layer for option in options))
    found = {layer: min((o for o in options if o.layer == layer), key=lambda o: (o.cost, o.damage)) for layer in layers}
    if total_cost(found) > most_cost * (1 + ROUNDING):
        raise BudgetError(
            f"No choice of options costs as little as {most_cost:.4g}: the cheapest add up to {total_cost(found):.4g}. "
            "Allow more, or leave layers out."
        )
    while True:  # what does more damage alone than all that is known is no option: so the solver sees small damages too
        known = total_damage(found)
        better = _solved([o for o in options if o.damage <= known], most_cost, unit=known)
        if better is None or total_damage(better) >= (1 - CLOSE) * known:
            return found
        found = better


def _solved(options: Sequence[Option], most_cost: float, unit: float) -> dict[str, Option] | None:
    """The least harmful, told apart to a small part of `unit`; None where the solver's tolerance leaves no choice."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    layers = list(dict.fromkeys(option.layer for option in options))
    rows = [layers.index(option.layer) for option in options]
    one_each = csr_array((np.ones(len(options)), (rows, range(len(options)))), shape=(len(layers), len(options)))
    costs = np.array([option.cost for option in options])
    damages = np.array([option.damage for option in options])
    with _unheard():
        found = milp(
            damages / max(unit, 1e-30),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(costs[None] / max(most_cost, 1e-30), -np.inf, 1.0),
            ],
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-6},
        )
    if found.x is None:
        return None
    choices = {option.layer: option for option, chosen in zip(options, found.x, strict=True) if chosen > 0.5}
    # it has been seen to call optimal what keeps to no constraint (scipy issue 24141)
    is_valid = len(choices) == len(layers) and total_cost(choices) <= most_cost * (1 + TOLERANCE)
    return choices if is_valid else None


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """What C code writes to the standard output is dropped: HiGHS does so at times, whatever it is told."""
    try:
        flush = ctypes.CDLL(None).fflush
        kept = os.dup(1)
    except (OSError, TypeError):  # no C library that is found so, or no standard output
        yield
        return
    flush(None)
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


def total_damage(choices: Choices) -> float:
    """The damages of what was chosen, added up."""
    return sum(option.damage for option in choices.values())


def total_cost(choices: Choices) -> float:
    """The costs of what was chosen, added up."""
    return sum(option.cost for option in choices.values())


def predicted_frontier(options: Sequence[Option], points: int = 36) -> list[dict[str, Option]]:
    """Choices from little damage to little cost, bounds of the cost spread evenly on a logarithmic scale.

    They begin where of each layer that is chosen which does least damage, layers that are left as they are apart. None
    comes twice.
    """
    layers = list(dict.fromkeys(option.layer for option in options))
    each = [[option for option in options if option.layer == layer] for layer in layers]
    changed = [[o for o in group if o.damage > 0] or group for group in each]
    most = sum(min(group, key=lambda o: (o.damage, o.cost)).cost for group in changed)
    least = sum(min(option.cost for option in group) for group in each)
    bounds = np.geomspace(max(most, least, 1e-30), max(least, 1e-30), points) * (1 + ROUNDING)
    found = [least_harmful(options, float(bound)) for bound in bounds]
    kept = found[:1]
    for choices in found[1:]:
        if total_cost(choices) < total_cost(kept[-1]):
            kept.append(choices)
    return kept
