"""Which option each layer gets: the cheapest choice whose damages add up to no more than a bound.

A multiple-choice knapsack, solved exactly as a mixed-integer programme by HiGHS. That damages of single layers add up
is an assumption, which the search corrects by what it measures; where options come from is `damage_table`'s affair.

Source: Dong et al. 2020, HAWQ-V2, arXiv:1911.03852, who choose bits so; as an integer programme Yao et al. 2021,
HAWQ-V3, arXiv:2011.10680.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

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


Choices = Mapping[str, Option]  # by layer


def cheapest(options: Sequence[Option], most_damage: float) -> dict[str, Option]:
    """One option for each layer: of those that together do no more than `most_damage`, the cheapest.

    Raises:
        BudgetError: even the least harmful options do more.

    >>> a = [Option("a", "8", 0.1, 8.0), Option("a", "4", 1.0, 4.0)]
    >>> b = [Option("b", "8", 0.1, 80.0), Option("b", "4", 1.1, 40.0)]
    >>> {layer: option.choice for layer, option in cheapest([*a, *b], 1.2).items()}
    {'a': '8', 'b': '4'}
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    layers = list(dict.fromkeys(option.layer for option in options))
    least = sum(min(o.damage for o in options if o.layer == layer) for layer in layers)
    if least > most_damage:
        raise BudgetError(
            f"No choice of options does as little damage as {most_damage:.4g}: the least harmful add up to "
            f"{least:.4g}. Allow more, or leave layers out."
        )
    rows = [layers.index(option.layer) for option in options]
    one_each = csr_array((np.ones(len(options)), (rows, range(len(options)))), shape=(len(layers), len(options)))
    costs = np.array([option.cost for option in options])
    damages = np.array([option.damage for option in options])
    unit = max(most_damage, 1e-30)  # of about one, so that the solver's tolerances mean something
    found = milp(
        costs / max(costs.max(), 1e-30),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(damages[None] / unit, -np.inf, 1.0)],
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    if found.x is None:  # within the solver's tolerance the least harmful are all that there is
        return {layer: min((o for o in options if o.layer == layer), key=lambda o: o.damage) for layer in layers}
    return {option.layer: option for option, chosen in zip(options, found.x, strict=True) if chosen > 0.5}


def total_damage(choices: Choices) -> float:
    """The damages of what was chosen, added up."""
    return sum(option.damage for option in choices.values())


def total_cost(choices: Choices) -> float:
    """The costs of what was chosen, added up."""
    return sum(option.cost for option in choices.values())


def predicted_frontier(options: Sequence[Option], points: int = 36) -> list[dict[str, Option]]:
    """Choices from the least to the most damage, bounds spread evenly on a logarithmic scale; none comes twice."""
    layers = list(dict.fromkeys(option.layer for option in options))
    least, most = (
        sum(
            pick((o for o in options if o.layer == layer), key=lambda o: (o.damage, -o.cost)).damage for layer in layers
        )
        for pick in (min, max)
    )
    bounds = np.geomspace(max(least, most * 1e-6, 1e-30), max(most, 1e-30), points) * (1 + 1e-9)
    found = [cheapest(options, float(bound)) for bound in bounds if bound >= least]
    kept = [found[0]] if found else []
    for before, after in pairwise(found):
        if total_cost(after) < total_cost(before):
            kept.append(after)
    return kept
