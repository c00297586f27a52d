"""Ways to store weights, where bytes count: the smallest that the budget bears.

By thirds along what the damage table predicts, and by thirds beyond it, distilled; what just failed that, and what lies
between, is distilled for longer. The rest of a search is `strategy`'s affair.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

from featherweight.candidates import Facts, Numbers, Plan, Round, points_to_try
from featherweight.recipe import Recipe
from featherweight.trials import Budget, Trial

STORED_ROUNDS = 3  # of two trials each, at most, over ways to store weights, as they are
TAUGHT_ROUNDS = 2  # at most, over those beyond, distilled
LONGER_TRIALS = 3  # at most, of those that failed there or lie between, distilled for longer
LONGEST = 4.0  # how long, over `Facts.epochs`: as many steps as shapes get, which are smaller, in twice the time


def few_bits(facts: Facts, budget: Budget, target: str) -> Generator[Round, list[Trial], list[tuple[Trial, Numbers]]]:
    """Ways to store each layer, the smallest that the budget bears: as they are, then distilled, which goes further."""
    course = _Storing(facts, budget, target)
    as_they_are = yield from course.closing_in(facts.stored, STORED_ROUNDS)
    beyond = facts.stored[course.last(as_they_are) :]
    briefly, long = ([facts.taught(way, length) for way in beyond] for length in (1.0, LONGEST))
    yield from course.for_longer(long, (yield from course.closing_in(briefly, TAUGHT_ROUNDS)))
    return course.all


@dataclass
class _Storing:
    """Ways to store the layers of a network, from the least harmful to the smallest, as far as they were tried."""

    facts: Facts
    budget: Budget
    target: str
    all: list[tuple[Trial, Numbers]] = field(default_factory=list)

    def tried(self, ways: Sequence[Numbers]) -> Generator[Round, list[Trial], list[Trial]]:
        """What comes of `ways`."""
        found = (yield [Recipe(self.facts.steps(*way), self.target) for way in ways]) if ways else []
        self.all.extend(zip(found, ways, strict=True))
        return found

    def closing_in(self, ways: Sequence[Numbers], rounds: int) -> Generator[Round, list[Trial], dict[int, Trial]]:
        """Trials of `ways` by their place, from 1: by thirds to the last that fits."""
        known: dict[int, Trial] = {}
        for _ in range(rounds):
            points = points_to_try(len(ways), [(point, trial.drop_fits(self.budget)) for point, trial in known.items()])
            found = yield from self.tried([ways[point - 1] for point in points])
            known |= dict(zip(points, found, strict=True))
        return known

    def for_longer(self, ways: Sequence[Numbers], briefly: Mapping[int, Trial]) -> Plan:
        """The two smallest that lack only certainty, then what is halfway from what fits to what does not."""
        known: dict[int, Trial] = {}
        while len(known) < LONGER_TRIALS:
            fits = max(self.last(briefly), self.last(known))
            # what lost far too much will not fit then either
            hopeless = [p for p in self.failed(briefly) if briefly[p].lost_too_much(self.budget)]
            bound = min([*self.failed(known), *hopeless], default=len(ways) + 1)
            failed = [point for point in self.failed(briefly) if fits < point < bound and point not in known]
            uncertain = [point for point in failed if briefly[point].may_fit(self.budget)]
            beyond = (failed or [bound])[0]
            halfway = (fits + beyond) // 2
            if uncertain:
                points = uncertain[-1 if known else -2 :]
            elif failed and (not known or halfway == fits):
                points = failed[:1]
            elif fits < halfway and beyond <= len(ways):
                points = [halfway]
            else:
                return
            found = yield from self.tried([ways[point - 1] for point in points])
            known |= dict(zip(points, found, strict=True))

    def last(self, known: Mapping[int, Trial]) -> int:
        """The place of the last that fits; 0 where none does."""
        return max((point for point, trial in known.items() if trial.drop_fits(self.budget)), default=0)

    def failed(self, known: Mapping[int, Trial]) -> list[int]:
        """The places of those beyond it."""
        return sorted(point for point in known if point > self.last(known))
