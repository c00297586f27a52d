"""Shapes: the smallest that the budget bears, along the most promising route.

First, where sequences are read, fewer positions: shorter sequences, or blocks computed for groups of positions, or
both. With the fewest that the budget bears, then, fewer weights: fewer channels, or where alike blocks repeat, as in
transformers, fewer blocks, or both. Of several routes that is followed which loses least among shapes that would cost
the same. Shapes of the route are tried two at a time, closing in on the smallest that the budget bears. Each is
distilled for a short time, unless all its weights are there, and turned to numbers that were found before; of those
that just failed, the most promising are distilled again from the start, for longer (successive halving with two rungs;
Jamieson, Talwalkar 2016, arXiv:1502.07943). What shapes and routes there are, `candidates` says.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from featherweight.candidates import (
    LONG,
    SHORT,
    TEACHINGS,
    Facts,
    Numbers,
    Plan,
    Round,
    Route,
    Shape,
    points_to_try,
    routes,
    routes_of_positions,
)
from featherweight.trials import Budget, Trial

COMPARED = (
    0.7  # of what the whole network costs: where routes are compared, and those that fit there again at its square
)
ROUNDS = 2  # of two shapes each: of channels alone the share is found to LARGEST_SHARE / 3**2
FINALISTS = 4  # at most, the shapes that are distilled for long, two at a time
NOTABLE = 0.95  # times the predicted cost of the best: a second pair has to get below it while positions go
FAILURES = 2  # of finalists in a row after which nothing that fits is expected


def shapes(facts: Facts, budget: Budget, target: str, numbers: Numbers) -> Plan:
    """The fewest positions that the budget bears, then with those the fewest weights.

    Each time along the most promising route, and then the finalists.
    """
    course = _Course(facts, budget, target, numbers)
    base = Shape(0.0)
    if ways := routes_of_positions(facts):
        base = (yield from course.followed(ways, base, NOTABLE)) or base
    yield from course.followed(routes(facts, base), base)


@dataclass
class _Course:
    """Shapes tried so far, briefly and, as finalists, for long, and the distillation by which they are taught."""

    facts: Facts
    budget: Budget
    target: str
    numbers: Numbers
    tried: dict[Shape, Trial] = field(default_factory=dict)
    finals: dict[Shape, Trial] = field(default_factory=dict)
    teaching: str = TEACHINGS[0]

    def taught(self, shapes: Sequence[Shape], length: float) -> Generator[Round, list[Trial], dict[Shape, Trial]]:
        """What comes of `shapes`, distilled for `length`; those with all their weights are not when that is short."""
        batch = [self.facts.candidate(self.target, self.numbers, shape, length, self.teaching) for shape in shapes]
        return dict(zip(shapes, (yield batch), strict=True))

    def followed(
        self, ways: Sequence[Route], base: Shape, notable: float = math.inf
    ) -> Generator[Round, list[Trial], Shape | None]:
        """The smallest shape along the most promising of `ways`, each taught for a short time; then the finalists.

        From the second pair on those whose predicted cost is less than `notable` times that of the best so far.
        Returns the best; None where none fits.
        """
        facts, budget = self.facts, self.budget
        first = yield from self.taught(_to_begin_with(facts, ways, COMPARED * facts.pace(base)), SHORT)
        self.tried |= first
        if all(trial.measurement is None for trial in first.values()):
            return None  # what cannot be made smaller by any of them cannot at all
        fitting = [way for way in ways if any(shape in first and first[shape].may_fit(budget) for shape in way)]
        compared = first
        if len(fitting) > 1:  # which of them leads further, shapes from which more is gone tell better
            compared = yield from self.taught(_to_begin_with(facts, fitting, COMPARED**2 * facts.pace(base)), SHORT)
            self.tried |= compared
        route = min(
            fitting or ways, key=lambda way: min((_drop(compared[s]) for s in way if s in compared), default=math.inf)
        )
        yield from self._raced([shape for shape in route if shape in self.tried])
        for _ in range(ROUNDS - 1):
            known = [(point, self.tried[s].drop_fits(budget)) for point, s in enumerate(route, 1) if s in self.tried]
            shapes = [route[point - 1] for point in points_to_try(len(route), known)]
            self.tried |= yield from self.taught(shapes, SHORT)
        count, finalists = 0, self._finalists(route)
        while count < FINALISTS and (finalists.best or count < FAILURES):
            shapes = finalists.next()[: FINALISTS - count]
            if count and (best := finalists.best):
                shapes = [shape for shape in shapes if facts.pace(shape) < notable * facts.pace(best)]
            if not shapes:
                break
            self.finals |= yield from self.taught(shapes, LONG)
            count, finalists = count + len(shapes), self._finalists(route)
        return finalists.best

    def _finalists(self, route: Route) -> _Finalists:
        return _Finalists(route, self.tried, self.finals, self.budget)

    def _raced(self, shapes: Sequence[Shape]) -> Plan:
        """The first shape that failed is taught in the other ways, too, once weights are gone; the best way is kept."""
        raced = _first_to_fail(shapes, self.tried, self.budget)
        if raced.thinner:  # else it was not distilled yet
            _, *others = raced.teachings
            trials = yield [self.facts.candidate(self.target, self.numbers, raced, SHORT, kind) for kind in others]
            by_teaching = dict(zip(raced.teachings, (self.tried[raced], *trials), strict=True))
            self.teaching = min(by_teaching, key=lambda kind: _drop(by_teaching[kind]))
            self.tried[raced] = by_teaching[self.teaching]


def _to_begin_with(facts: Facts, ways: Sequence[Route], pace: float) -> list[Shape]:
    """Two shapes of the only route; of several, one of each that would cost `pace` of the whole network, about."""
    if len(ways) == 1:
        return [ways[0][point - 1] for point in points_to_try(len(ways[0]), [])]
    return list(dict.fromkeys(min(way, key=lambda shape: abs(facts.pace(shape) - pace)) for way in ways))


def _first_to_fail(shapes: Sequence[Shape], tried: Mapping[Shape, Trial], budget: Budget) -> Shape:
    """The largest network that loses too much; the smallest where none does."""
    return next((shape for shape in shapes if not tried[shape].drop_fits(budget)), shapes[-1])


def _drop(trial: Trial) -> float:
    return trial.measurement.drop if trial.measurement else math.inf


@dataclass
class _Finalists:
    """What is known when shapes are chosen that are distilled for long, of those that would cost less than the best.

    What comes later on the route costs less, whatever was measured: neighbours differ by less than noise.
    """

    route: Route
    tried: Mapping[Shape, Trial]
    finals: Mapping[Shape, Trial]
    budget: Budget

    def __post_init__(self) -> None:
        self.known = {**self.tried, **self.finals}
        self.points = {shape: point for point, shape in enumerate(self.route, 1)}
        fitting = [shape for shape, trial in self.known.items() if trial.drop_fits(self.budget)]
        furthest = max((self.points.get(shape, 0) for shape in fitting), default=0)
        self.best = min((s for s in fitting if self.points.get(s, furthest) == furthest), key=self._cost, default=None)

    def next(self) -> list[Shape]:
        """Two at most.

        First those that may keep to the budget. Where a finalist of the route did not that is smaller than the best, or
        all that are smaller lose far too much: by thirds to the next of them. Else those that lack least; where that is
        one alone, and what lies before it.
        """
        failed = [shape for shape, trial in self.finals.items() if not trial.drop_fits(self.budget)]
        if self._beyond(self.best, failed):
            return self._by_thirds(self.best, failed)
        nearest = self._nearest()
        hopeless = [shape for shape in nearest if self.tried[shape].lost_too_much(self.budget)]
        if any(self.tried[shape].may_fit(self.budget) for shape in nearest):
            return self._unsure(nearest, hopeless)
        if self.best in self.finals and len(hopeless) == len(nearest):
            return self._by_thirds(self.best, hopeless)
        return [*nearest, *self._by_thirds(self.best, nearest)[::-1]][:2]

    def _unsure(self, nearest: Sequence[Shape], hopeless: Sequence[Shape]) -> list[Shape]:
        """The cheapest whose mean drop keeps to the budget, so that only certainty lacks, and one beyond it."""
        unsure = [shape for shape in nearest if self.tried[shape].may_fit(self.budget)]
        unsure.sort(key=lambda shape: (-self.points.get(shape, 0), self._cost(shape)))
        first, *others = dict.fromkeys([*unsure, *(shape for shape in nearest if shape not in hopeless)])
        further = (self._beyond(first, others) or self._by_thirds(first, hopeless)) if self.best else []
        return [first, *(further or others or self._by_thirds(self.best, [first])[::-1])[:1]]

    def _nearest(self) -> list[Shape]:
        """Those that would cost less than the best, not yet distilled for long, by what they lack."""
        lacking = {
            shape: self.budget.excess(trial.measurement)["max_drop"]
            for shape, trial in self.tried.items()
            if shape not in self.finals and trial.measurement and self._is_cheaper(shape)
        }
        return sorted(lacking, key=lambda shape: lacking[shape])

    def _is_cheaper(self, shape: Shape) -> bool:
        if self.best in self.points and shape in self.points:
            return self.points[shape] > self.points[self.best]
        return self.best is None or self.tried[shape].cost(self.budget) < self._cost(self.best)

    def _cost(self, shape: Shape) -> float:
        return self.known[shape].cost(self.budget)

    def _beyond(self, start: Shape | None, shapes: Iterable[Shape]) -> list[Shape]:
        return [shape for shape in shapes if start in self.points and self.points.get(shape, 0) > self.points[start]]

    def _by_thirds(self, start: Shape | None, failed: Iterable[Shape]) -> list[Shape]:
        """Between one and the next of those that failed; what was tried there is left out."""
        ends = [self.points[shape] for shape in self._beyond(start, failed)]
        if start is None or not ends:
            return []
        between = points_to_try(len(self.route), [(self.points[start], True), (min(ends), False)])
        return [self.route[point - 1] for point in between if self.route[point - 1] not in self.known]
