"""What a search tries next: a pure function of facts of the workload, the budget and the trials so far.

Three rungs, cheapest first. The network as it is on every target, and whole in int8 on those that are not far slower
than another: the best target is kept. Where bytes count, weights in 4 to 8 bits, as shared values or in factors, layer
by layer: the smallest that the budget bears, by thirds along what the damage table predicts, and by thirds beyond it,
distilled; what just failed that, and what lies between, is distilled for longer. Where int8 loses too much, int8 with
the widest ranges, int8 trained by distillation, int8 but for the layers that it harms most, twice as many each time,
int8 with ranges found while running, and weights alone in 8 bits. Then the best of these with all that stays in floats
computed in bfloat16, where that can be had.

Then shapes, unless there are smaller ways to store, along routes from the whole network to the smallest. First, where
sequences are read, fewer positions: shorter sequences, or blocks computed for groups of positions, or both. With the
fewest that the budget bears, then, fewer weights: fewer channels, or where alike blocks repeat, as in transformers,
fewer blocks, or both. Of several routes that is followed which loses least among shapes that would cost the same.
Shapes of the route are tried two at a time, closing in on the smallest that the budget bears. Each is distilled for a
short time, unless all its weights are there, and turned to numbers as the second rung found best; of those that just
failed, the most promising are distilled again from the start, for longer (successive halving with two rungs; Jamieson,
Talwalkar 2016, arXiv:1502.07943).

What is proposed together is tried together, whatever comes of each, so that several workers can make it side by side.
The loop that tries, and measures what it tried, is `search`'s affair; where the facts come from, that of `facts`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from featherweight import passes
from featherweight.passes import Pass
from featherweight.recipe import Recipe
from featherweight.trials import Budget, Trial

LARGEST_SHARE = 0.8  # of channels that may be removed: the end of the route on which channels alone go
DEEPEST = 2 / 3  # of blocks that may be removed: the end of the route on which blocks alone go
SHORTEST = 3 / 4  # of each sequence that may be cut off: the end of the route on which sequences alone get shorter
DOUBLINGS = 2  # of the groups of positions that a block is computed for, at most
LARGEST_GROUP = 2**DOUBLINGS
POINTS = 108  # of a route; so many that thirds of thirds, and halves of those, are among them
COMPARED = (
    0.7  # of what the whole network costs: where routes are compared, and those that fit there again at its square
)
ROUNDS = 2  # of two shapes each: of channels alone the share is found to LARGEST_SHARE / 3**2
STORED_ROUNDS = 3  # of two trials each, at most, over ways to store weights, as they are
TAUGHT_ROUNDS = 2  # at most, over those beyond, distilled
LONGER_TRIALS = 3  # at most, of those that failed there or lie between, distilled for longer
FINALISTS = 3  # at most, the shapes that are distilled for long, two of them at first
TOO_MUCH = 3.0  # times the drop that is allowed, in the mean: more than a long distillation makes up for
FAILURES = 2  # of finalists in a row after which nothing that fits is expected
SHORT, LONG = 0.5, 2.0  # how long shapes and finalists are distilled, over `Facts.epochs`
LONGEST = 4.0  # the same for ways to store: as many steps as shapes get, which are smaller, in twice the time
TEACHINGS = ("distill_soft", "distill_hard", "distill_features")  # of which one is chosen by what it recovers
WORTHWHILE = 0.95  # times the cost: what bfloat16 has to save on top of the best numbers, for it loses a little
HOPELESS = 2.0  # times the cost of the best target, uncompressed: int8 is not tried there
NORMED_LR, PLAIN_LR = 0.005, 0.001  # of networks with batch norms, also once those are folded (LOG.md), and without


@dataclass(frozen=True)
class Facts:
    """What the strategy knows of a workload.

    Args:
        targets: that may be used.
        folds: whether there are batch norms to fold.
        linear: whether there are linear layers.
        epochs: how long a candidate is distilled.
        blocks: how many alike blocks there are that may be removed whole; 0 for none.
        truncates: whether sequences are read that may be cut.
        merges: how many blocks, and readers of other sequences, may be computed for groups of positions; 0 for none.
        multiples: by target, the number of which channel counts should be multiples.
        stored: steps that store weights in fewer bits layer by layer, from the least harmful to the smallest, as the
            damage table predicts; where bytes are what is made small.
        precision: in which candidates compute while they are distilled.
        bfloat16: targets that may be told to compute in it what stays in floats, as this machine can.
        paces: what shapes would cost over what the whole network costs, as the cost table predicts.
        fragile: layers that int8 suffers from most, the worst first; where int8 as a whole loses too much.
    """

    targets: tuple[str, ...]
    folds: bool
    linear: bool
    epochs: float
    blocks: int = 0
    truncates: bool = False
    merges: int = 0
    multiples: Mapping[str, int] = field(default_factory=dict)
    stored: tuple[tuple[Pass, ...], ...] = ()
    precision: str = "float32"
    bfloat16: tuple[str, ...] = ()
    paces: Mapping[Shape, float] = field(default_factory=dict)
    fragile: tuple[str, ...] = ()

    def steps(self, *names: str | Pass, shape: Sequence[Pass] = ()) -> tuple[Pass, ...]:
        """`shape`, then the fold where there is something to fold, then the passes named."""
        fold = ("fold_batchnorm",) if self.folds else ()
        return (*shape, *(step if isinstance(step, Pass) else _step(step) for step in (*fold, *names)))

    def distil(self, length: float = 1.0, shape: Shape | None = None, teaching: str = TEACHINGS[0]) -> Pass:
        """The distillation of a shape or, without one, of numbers.

        A smaller network takes more steps in the same time: of four parts of the arithmetic of a step one is the
        teacher's, and three are the candidate's.
        """
        epochs = float(f"{length * self.epochs * 4 / (1 + 3 * (1.0 if shape is None else self.kept(shape))):.2g}")
        lr = NORMED_LR if self.folds else PLAIN_LR
        return _step(teaching, epochs=epochs, lr=lr, precision=self.precision)

    def lost(self, shape: Shape) -> float:
        """The share of the blocks that a shape lacks."""
        return shape.dropped / self.blocks if shape.dropped else 0.0

    def kept(self, shape: Shape) -> float:
        """The share of the arithmetic that is left, about."""
        return (1 - shape.share) * (1 - self.lost(shape)) * (1 - shape.cut) * self.shared(shape)

    def shared(self, shape: Shape) -> float:
        """The share of the arithmetic that is left where some blocks are computed for groups of positions."""
        if not shape.merged:
            return 1.0
        fours = max(0, shape.merged - self.merges)  # as if there were no fours before all are pairs
        pairs = min(shape.merged, self.merges) - fours
        return 1 - (pairs / 2 + fours * 3 / 4) / max(self.blocks, self.merges)

    def pace(self, shape: Shape) -> float:
        """What a shape would cost over what the whole network costs; in proportion to what is left if nobody knows."""
        known = sorted((other.share, pace) for other, pace in self.paces.items() if other.dropped == shape.dropped)
        if not known:
            return self.kept(shape)
        shares, paces = zip(*known, strict=True)
        whole = float(np.interp(shape.share, np.array(shares), np.array(paces)))
        return whole * (1 - shape.cut) * self.shared(shape)

    def candidate(
        self, target: str, numbers: Numbers, shape: Shape, length: float, teaching: str = TEACHINGS[0]
    ) -> Recipe:
        """Positions, blocks and channels removed, what is left trained, and turned to numbers."""
        steps = [_step("truncate_inputs", share=shape.cut)] if shape.cut else []
        if shape.dropped:
            steps.append(_step("drop_layers", share=round(self.lost(shape), 4)))
        if shape.share:
            steps.append(_step("prune_channels", share=shape.share, multiple=self.multiples.get(target, 8)))
        if shape.merged:
            share = shape.merged / (self.merges * DOUBLINGS)
            steps.append(_step("merge_positions", share=round(share, 4), size=LARGEST_GROUP))
        if place := _taught_before_rounding(numbers):  # once is enough
            numbers = (*numbers[:place], self.distil(length, shape, teaching), *numbers[place + 1 :])
        elif shape.thinner or length > SHORT:
            steps.append(self.distil(length, shape, teaching))
        return Recipe(self.steps(*numbers, shape=steps), target)


@dataclass(frozen=True)
class Shape:
    """What is left of a network: the share of channels, the number of blocks and the share of positions that go.

    `merged` counts doublings: a block is computed for pairs of positions after one, and for fours after two.
    """

    share: float
    dropped: int = 0
    cut: float = 0.0
    merged: int = 0

    @property
    def thinner(self) -> bool:
        """Whether weights are gone, so that the others have to make up for them."""
        return self.share > 0 or self.dropped > 0


Numbers = tuple[Pass, ...]  # the last steps of a recipe, which turn weights into numbers of few bits


Round = list[Recipe]  # tried together, whatever comes of each
Plan = Generator[Round, list[Trial], None]


def next_recipes(facts: Facts, budget: Budget, trials: Sequence[Trial]) -> Round:
    """What to try after `trials`, in whatever order they are given, all of it; empty when there is nothing left."""
    batch, _ = _replayed(plan(facts, budget), trials)
    return batch


def settled(facts: Facts, budget: Budget, trials: Sequence[Trial]) -> tuple[str, Numbers] | None:
    """The target and the numbers that shapes are tried with; None as long as `trials` leave that open."""
    batch, found = _replayed(_settling(facts, budget), trials)
    return None if batch else found


def _replayed(course: Generator[Round, list[Trial], Any], trials: Sequence[Trial]) -> tuple[Round, Any]:
    """What a course has to try after `trials`; once there is nothing left, what came of it."""
    known = {trial.recipe.digest: trial for trial in trials}
    try:
        batch = next(course)
        while all(recipe.digest in known for recipe in batch):
            batch = course.send([known[recipe.digest] for recipe in batch])
    except StopIteration as end:
        return [], end.value
    return [recipe for recipe in batch if recipe.digest not in known], None


def plan(facts: Facts, budget: Budget) -> Plan:
    """The whole search, as it would go: yields recipes, a round at a time, and is sent what became of them."""
    if budget.objective == "bytes":
        facts = replace(facts, truncates=False, merges=0)  # which save none
    found = yield from _settling(facts, budget)
    # what leaves no room for a smaller way to store has none for smaller shapes either
    if found is not None and not _is_bounded(facts, found[1]):
        yield from _shapes(facts, budget, *found)


def _is_bounded(facts: Facts, numbers: Numbers) -> bool:
    """Whether there are smaller ways to store than the one chosen, which the budget did not bear."""
    return tuple(step for step in numbers if not _teaches(step)) in facts.stored[:-1]


def _settling(facts: Facts, budget: Budget) -> Generator[Round, list[Trial], tuple[str, Numbers] | None]:
    """The part of the search before shapes: the target and the numbers; None where the network fits no target."""
    plain = dict(zip(facts.targets, (yield [Recipe(facts.steps(), target) for target in facts.targets]), strict=True))
    costs = {target: _cost(trial, trial, budget) for target, trial in plain.items()}
    working = [target for target, cost in costs.items() if cost <= HOPELESS * min(costs.values()) < math.inf]
    if not working:
        return None
    batch = [Recipe(facts.steps("quantize_static"), target) for target in working]
    static = dict(zip(working, (yield batch), strict=True))
    target = min(working, key=lambda name: _cost(static[name], plain[name], budget))
    return target, (yield from _numbers(facts, budget, target, plain[target]))


def expected(facts: Facts, done: int) -> int:
    """How many trials there will be, about."""
    shapes = sum(
        ways + 2 * (ROUNDS - 1) if ways > 1 else 2 * ROUNDS
        for ways in (len(routes_of_positions(facts)), len(routes(facts)))
        if ways
    )
    return max(done + 1, 2 * len(facts.targets) + shapes + len(TEACHINGS) - 1 + FINALISTS)


Route = Sequence[Shape]  # from little less than the whole network to little, each smaller than the one before


def routes(facts: Facts, base: Shape | None = None) -> list[Route]:
    """Channels alone; where there are alike blocks, blocks and channels, and blocks alone, too.

    Positions go, or are merged, as in `base`.
    """
    base = base or Shape(0.0)
    shares = [round(LARGEST_SHARE * point / POINTS, 4) for point in range(1, POINTS)]
    found: list[Route] = [[replace(base, share=share) for share in shares]]
    if facts.blocks > 1:
        deepest = round(DEEPEST * facts.blocks)
        half = _up_to(deepest / 2)  # where channels go, too
        both = zip(shares, half, strict=True)
        found.append([replace(base, share=round(share / 2, 4), dropped=count) for share, count in both])
        found.append([replace(base, dropped=count) for count in range(1, deepest + 1)])
    return found


def routes_of_positions(facts: Facts) -> list[Route]:
    """Shorter sequences, blocks computed for groups of positions, and both, as far as they may be."""
    cuts = [round(SHORTEST * point / POINTS, 4) for point in range(1, POINTS)]
    found: list[Route] = []
    if facts.truncates:
        found.append([Shape(0.0, cut=cut) for cut in cuts])
    if facts.merges:
        found.append([Shape(0.0, merged=level) for level in range(1, DOUBLINGS * facts.merges + 1)])
    if len(found) > 1:
        both = zip(cuts, _up_to(facts.merges), strict=True)
        found.append([Shape(0.0, cut=round(cut / 2, 4), merged=level) for cut, level in both])
    return found


def _up_to(most: float) -> list[int]:
    """For each point of a route a number, growing evenly to `most`."""
    return [round(most * point / POINTS) for point in range(1, POINTS)]


def points_to_try(length: int, tried: Sequence[tuple[int, bool]]) -> list[int]:
    """The next two points, from 1 to `length`, by thirds between the last that fitted and the next that did not.

    >>> points_to_try(107, []), points_to_try(107, [(36, True), (72, False)]), points_to_try(4, [(1, True), (3, False)])
    ([36, 72], [48, 60], [2])
    """
    high = min([point for point, fitted in tried if not fitted], default=length + 1)
    low = max([point for point, fitted in tried if fitted and point < high], default=0)
    thirds = {round(low + (high - low) * third / 3) for third in (1, 2)}
    return sorted(thirds - {low, high})


def _numbers(facts: Facts, budget: Budget, target: str, plain: Trial) -> Generator[Round, list[Trial], Numbers]:
    """The cheapest numbers whose loss the budget bears; none where it bears no loss."""
    tried: list[tuple[Trial, Numbers]] = [(plain, ()), *(yield from _few_bits(facts, budget, target))]
    rungs = [] if any(trial.drop_fits(budget) for trial, _ in tried[1:]) else rungs_of(facts)
    for numbers in rungs:
        (trial,) = yield [Recipe(facts.steps(*numbers), target)]
        tried.append((trial, numbers))
        if trial.drop_fits(budget) and _cost(trial, trial, budget) < _cost(plain, plain, budget):
            break

    best, found = min(tried, key=lambda item: (not item[0].drop_fits(budget), _cost(item[0], item[0], budget)))
    if target in facts.bfloat16 and budget.objective != "bytes":
        numbers = (*found, _step("compute_bfloat16"))
        (trial,) = yield [Recipe(facts.steps(*numbers), target)]
        if _may_fit(trial, budget) and _cost(trial, trial, budget) < WORTHWHILE * _cost(best, best, budget):
            return numbers
    return found


def struggling(facts: Facts, budget: Budget, trials: Sequence[Trial]) -> str | None:
    """The target on which int8 as a whole loses too much, trained too; None where none does, or nobody knows yet."""
    for target in facts.targets:
        wanted = {Recipe(facts.steps(*numbers), target).digest for numbers in _whole_in_int8(facts)}
        found = [trial for trial in trials if trial.recipe.digest in wanted]
        measured = [trial for trial in found if trial.measurement is not None]
        if len(found) == len(wanted) and measured and not any(trial.drop_fits(budget) for trial in measured):
            return target
    return None


def _few_bits(facts: Facts, budget: Budget, target: str) -> Generator[Round, list[Trial], list[tuple[Trial, Numbers]]]:
    """Ways to store each layer, the smallest that the budget bears: as they are, then distilled, which goes further."""
    course = _Storing(facts, budget, target)
    as_they_are = yield from course.closing_in(facts.stored, STORED_ROUNDS)
    beyond = facts.stored[course.last(as_they_are) :]
    briefly, long = ([_distilled(way, facts.distil(length)) for way in beyond] for length in (1.0, LONGEST))
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
            hopeless = [p for p in self.failed(briefly) if _mean_over_allowed(briefly[p], self.budget) > TOO_MUCH]
            bound = min([*self.failed(known), *hopeless], default=len(ways) + 1)
            failed = [point for point in self.failed(briefly) if fits < point < bound and point not in known]
            uncertain = [point for point in failed if _may_fit(briefly[point], self.budget)]
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


def _taught_before_rounding(numbers: Numbers) -> int:
    """The place of the distillation that rounding follows; 0 where there is none."""
    return next((place for place, step in enumerate(numbers[:-1]) if _teaches(step)), 0)


def _teaches(step: Pass) -> bool:
    return step.name() in TEACHINGS


def _distilled(steps: Numbers, distil: Pass) -> Numbers:
    """With a distillation where it repairs most: of factors before they are rounded, else of what was rounded."""
    factors = sum(step.name() == "factorize_svd" for step in steps)  # which come first
    return (*steps[:factors], distil, *steps[factors:]) if factors else (*steps, distil)


def rungs_of(facts: Facts) -> Iterator[Numbers]:
    """Ways to turn the network to numbers, most promising first."""
    yield from _whole_in_int8(facts)
    for count in (2**power for power in range(len(facts.fragile).bit_length())):
        layers = ", ".join(f"!{name}" for name in facts.fragile[:count])
        yield (_step("quantize_static", range="minmax", where=layers),)
    if facts.linear:
        yield (_step("quantize_dynamic"),)
    yield (_step("quantize_weights"),)


def _whole_in_int8(facts: Facts) -> list[Numbers]:
    static = _step("quantize_static")
    widest = _step("quantize_static", range="minmax")  # where few large values matter, as in networks of speech
    return [(static,), (widest,), (static, facts.distil())]


def _shapes(facts: Facts, budget: Budget, target: str, numbers: Numbers) -> Plan:
    """The fewest positions that the budget bears, then with those the fewest weights.

    Each time along the most promising route, and then the finalists.
    """
    course = _Course(facts, budget, target, numbers)
    base = Shape(0.0)
    if ways := routes_of_positions(facts):
        yield from course.followed(ways, base)
        base = course.best() or base
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

    def best(self) -> Shape | None:
        """The shape that fits and costs least."""
        trials = [*self.tried.items(), *self.finals.items()]
        fitting = [(_cost(t, t, self.budget), n) for n, (_, t) in enumerate(trials) if t.drop_fits(self.budget)]
        return trials[min(fitting)[1]][0] if fitting else None

    def followed(self, ways: Sequence[Route], base: Shape) -> Plan:
        """The smallest shape along the most promising of `ways`, each taught for a short time; then the finalists."""
        facts, budget = self.facts, self.budget
        first = yield from self.taught(_to_begin_with(facts, ways, COMPARED * facts.pace(base)), SHORT)
        self.tried |= first
        if all(trial.measurement is None for trial in first.values()):
            return  # what cannot be made smaller by any of them cannot at all
        fitting = [way for way in ways if any(shape in first and _may_fit(first[shape], budget) for shape in way)]
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
        left = FINALISTS
        while left and (self.best() or FINALISTS - left < FAILURES):
            count = 2 if left == FINALISTS else 1
            if not (shapes := _finalists(route, self.tried, self.finals, budget, count)):
                break
            self.finals |= yield from self.taught(shapes, LONG)
            left -= len(shapes)

    def _raced(self, shapes: Sequence[Shape]) -> Plan:
        """The first shape that failed is taught in the other ways, too, once weights are gone; the best way is kept."""
        raced = _first_to_fail(shapes, self.tried, self.budget)
        if raced.thinner:  # else it was not distilled yet
            others = yield [
                self.facts.candidate(self.target, self.numbers, raced, SHORT, kind) for kind in TEACHINGS[1:]
            ]
            self.teaching, self.tried[raced] = _best_teaching(self.tried[raced], others)


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


def _best_teaching(first: Trial, others: Sequence[Trial]) -> tuple[str, Trial]:
    """The distillation that left the smallest drop on one and the same shape, and its trial; the first where even."""
    found = [
        (trial.measurement.drop, name, trial)
        for name, trial in zip(TEACHINGS, (first, *others), strict=True)
        if trial.measurement
    ]
    if not found:
        return TEACHINGS[0], first
    _, name, trial = min(found, key=lambda item: item[0])
    return name, trial


def shape_of(facts: Facts, recipe: Recipe) -> Shape | None:
    """The shape that a recipe's first steps leave; None where they leave all as it was."""
    settings = {step.name(): step.settings() for step in recipe.steps}
    lost = settings.get("drop_layers", {}).get("share", 0.0)
    cut = settings.get("truncate_inputs", {}).get("share", 0.0)
    merged = settings.get("merge_positions", {}).get("share", 0.0) * facts.merges * DOUBLINGS
    share = settings.get("prune_channels", {}).get("share", 0.0)
    shape = Shape(share, round(lost * facts.blocks), cut, round(merged))
    return shape if shape != Shape(0.0) else None


def _finalists(
    route: Route, tried: Mapping[Shape, Trial], finals: Mapping[Shape, Trial], budget: Budget, count: int
) -> list[Shape]:
    """Shapes to distil for long, of those that would cost less than the best.

    What comes later on the route costs less, whatever was measured: neighbours differ by less than noise. First the
    cheapest whose mean drop keeps to the budget, so that only certainty lacks. Where a finalist of the route did not
    fit that is smaller than the best, or all that are smaller lose far too much: halfway to the next of them. Else
    `count` that lack least.
    """
    known = {**tried, **finals}
    fitting = {shape: trial for shape, trial in known.items() if trial.drop_fits(budget)}
    best = min(fitting, key=lambda shape: _cost(fitting[shape], fitting[shape], budget), default=None)
    points = {shape: point for point, shape in enumerate(route)}

    def halfway(shapes: Iterable[Shape]) -> list[Shape]:
        """Between the best and the next that did not fit; nothing where that was tried."""
        beyond = [points[s] for s in shapes if best in points and points.get(s, -1) > points[best]]
        middle = [route[(points[best] + min(beyond)) // 2]] if best and beyond else []
        return [shape for shape in middle if shape not in known]

    if best in points and any(points.get(s, -1) > points[best] for s in finals if s not in fitting):
        return halfway(s for s in finals if s not in fitting)
    least = _cost(fitting[best], fitting[best], budget) if best else math.inf

    def is_cheaper(shape: Shape, trial: Trial) -> bool:
        if best in points and shape in points:
            return points[shape] > points[best]
        return _cost(trial, trial, budget) < least

    lacking = {
        shape: budget.excess(trial.measurement)["max_drop"]
        for shape, trial in tried.items()
        if shape not in finals and trial.measurement and is_cheaper(shape, trial)
    }
    if uncertain := [shape for shape in lacking if _may_fit(tried[shape], budget)]:
        cost = {shape: (-points.get(shape, -1), _cost(tried[shape], tried[shape], budget)) for shape in uncertain}
        return [min(uncertain, key=lambda shape: cost[shape])]
    if best in finals and all(_mean_over_allowed(tried[shape], budget) > TOO_MUCH for shape in lacking):
        return halfway(lacking)
    return sorted(lacking, key=lambda shape: lacking[shape])[:count]


def _may_fit(trial: Trial, budget: Budget) -> bool:
    """Whether the drop fits, or lacks nothing but certainty, which what is tried on top may have."""
    return trial.drop_fits(budget) or _mean_over_allowed(trial, budget) <= 1


def _mean_over_allowed(trial: Trial, budget: Budget) -> float:
    """The mean drop over that which the budget allows."""
    found = trial.measurement
    if found is None:
        return math.inf
    return found.drop / max(budget.allowed(found.original_score), 1e-9)


def _cost(first: Trial, second: Trial, budget: Budget) -> float:
    """Of the first that was measured; infinite where none was."""
    found = first.measurement or second.measurement
    return budget.cost(found) if found else math.inf


def _step(name: str, **settings: Any) -> Pass:
    return passes.build(name, settings, "the search")


def seconds_of(recipe: Recipe, trials: Sequence[Trial]) -> float:
    """How long a trial will take, from how long each of its stages took at most before; unknown ones count nothing.

    Distillations go by their epochs, and one that was not tried yet by the others.
    """

    def once(trial: Trial, stage: str) -> float:
        taken = sum(seconds for name, seconds in trial.seconds.items() if _stage(name) == stage)
        amount = _amounts(trial.recipe)[stage]
        return taken / amount if amount else 0.0

    return sum(
        amount * max((once(trial, stage) for trial in trials), default=0.0)
        for stage, amount in _amounts(recipe).items()
    )


def _amounts(recipe: Recipe) -> Counter[str]:
    """How much of each stage there is in a trial: how often a pass comes, of distillations the epochs."""
    found: Counter[Any] = Counter(dict.fromkeys(("export", "judge", "measure"), 1))
    for step in recipe.steps:
        found[_stage(step.name())] += step.settings().get("epochs", 1)
    return found


def _stage(name: str) -> str:
    return "distil" if name.startswith("distill_") else name
