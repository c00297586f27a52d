"""What a search tries next: a pure function of facts of the workload, the budget and the trials so far.

Three rungs, cheapest first. The network as it is on every target, and whole in int8 on those that are not far slower
than another: the best target is kept. Where bytes count, weights in 4 to 8 bits layer by layer, the smallest that the
budget bears by a bisection along what the damage table predicts, or the smallest of all, distilled. Where int8 loses
too much, int8 trained by distillation, int8 with ranges found while running, and weights alone in 8 bits. Then a
bisection over one knob, the share of channels that is removed, each candidate distilled and turned to numbers as the
second rung found best. Networks that repeat alike blocks, as transformers do, then lose whole blocks too, as many as
the budget bears.

The loop that tries, and measures what it tried, is `search`'s affair; where the facts come from, that of `facts`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from featherweight import passes
from featherweight.passes import Pass
from featherweight.recipe import Recipe
from featherweight.trials import Budget, Trial

LARGEST_SHARE = 0.8  # of channels that may be removed: the bisection's upper end
CANDIDATES = 4  # of the bisection: shares are found to LARGEST_SHARE / 2**4
BLOCK_CANDIDATES = 2  # at most, for whole blocks, where there are such: channels then get one less
HOPELESS = 2.0  # times the cost of the best target, uncompressed: int8 is not tried there
NORMED_LR, PLAIN_LR = 0.005, 0.003  # with batch norms, which make rescaled weights harmless, and without


@dataclass(frozen=True)
class Facts:
    """What the strategy knows of a workload.

    Args:
        targets: that may be used.
        folds: whether there are batch norms to fold.
        linear: whether there are linear layers.
        epochs: how long a candidate is distilled.
        blocks: how many alike blocks there are that may be removed whole; 0 for none.
        multiples: by target, the number of which channel counts should be multiples.
        stored: steps that store weights in fewer bits layer by layer, from the least harmful to the smallest, as the
            damage table predicts; where bytes are what is made small.
    """

    targets: tuple[str, ...]
    folds: bool
    linear: bool
    epochs: float
    blocks: int = 0
    multiples: Mapping[str, int] = field(default_factory=dict)
    stored: tuple[tuple[Pass, ...], ...] = ()

    def steps(self, *names: str | Pass, shape: Sequence[Pass] = ()) -> tuple[Pass, ...]:
        """`shape`, then the fold where there is something to fold, then the passes named."""
        fold = ("fold_batchnorm",) if self.folds else ()
        return (*shape, *(step if isinstance(step, Pass) else _step(step) for step in (*fold, *names)))

    def distil(self, share: float = 0.0) -> Pass:
        """The distillation of a candidate that lost `share`: a smaller network takes more steps in the same time.

        Of four parts of the arithmetic of a step one is the teacher's, and three are the candidate's.
        """
        epochs = float(f"{self.epochs * 4 / (1 + 3 * (1 - share)):.2g}")
        return _step("distill_soft", epochs=epochs, lr=NORMED_LR if self.folds else PLAIN_LR)

    def candidate(self, target: str, numbers: Numbers, share: float, dropped: int = 0) -> Recipe:
        """Blocks and channels removed, what is left trained, and turned to numbers."""
        lost = dropped / self.blocks if dropped else 0.0
        shape = [_step("drop_layers", share=round(lost, 4))] if dropped else []
        if share:
            shape.append(_step("prune_channels", share=share, multiple=self.multiples.get(target, 8)))
        shape.append(self.distil(1 - (1 - lost) * (1 - share)))
        return Recipe(self.steps(*numbers, shape=shape), target)


Numbers = tuple[Pass, ...]  # the last steps of a recipe, which turn weights into numbers of few bits


Plan = Generator[Recipe, Trial, None]


def next_recipe(facts: Facts, budget: Budget, trials: Sequence[Trial]) -> Recipe | None:
    """What to try after `trials`, in whatever order they are given; None when there is nothing left."""
    known = {trial.recipe.digest: trial for trial in trials}
    course = plan(facts, budget)
    try:
        recipe = next(course)
        while recipe.digest in known:
            recipe = course.send(known[recipe.digest])
    except StopIteration:
        return None
    return recipe


def plan(facts: Facts, budget: Budget) -> Plan:
    """The whole search, as it would go: yields recipes, and is sent what became of them."""
    plain, static = {}, {}
    for target in facts.targets:
        plain[target] = yield Recipe(facts.steps(), target)
    costs = {target: _cost(trial, trial, budget) for target, trial in plain.items()}
    working = [target for target, cost in costs.items() if cost <= HOPELESS * min(costs.values()) < math.inf]
    for target in working:
        static[target] = yield Recipe(facts.steps("quantize_static"), target)
    if not working:
        return
    target = min(working, key=lambda name: _cost(static[name], plain[name], budget))
    numbers = yield from _numbers(facts, budget, target, plain[target])
    yield from _shapes(facts, budget, target, numbers)


def expected(facts: Facts, done: int) -> int:
    """How many trials there will be, about."""
    candidates = CANDIDATES + (BLOCK_CANDIDATES - 1 if facts.blocks > 1 else 0)
    return max(done + 1, 2 * len(facts.targets) + candidates)


def share_to_try(tried: Sequence[tuple[float, bool]], most: int = CANDIDATES) -> float | None:
    """The next share of a bisection: more after what fitted, less after what did not; None after `most`.

    >>> share_to_try([]), share_to_try([(0.4, True)]), share_to_try([(0.4, True), (0.6, False)])
    (0.4, 0.6, 0.5)
    """
    if len(tried) >= most:
        return None
    low = max([share for share, fitted in tried if fitted], default=0.0)
    high = min([share for share, fitted in tried if not fitted], default=LARGEST_SHARE)
    return round((low + high) / 2, 4)


def _numbers(facts: Facts, budget: Budget, target: str, plain: Trial) -> Generator[Recipe, Trial, Numbers]:
    """The cheapest numbers whose loss the budget bears; none where it bears no loss."""
    tried: list[tuple[Trial, Numbers]] = [(plain, ()), *(yield from _few_bits(facts, budget, target))]
    rungs = [] if any(trial.drop_fits(budget) for trial, _ in tried[1:]) else _rungs(facts)
    for numbers in rungs:
        trial = yield Recipe(facts.steps(*numbers), target)
        tried.append((trial, numbers))
        if trial.drop_fits(budget) and _cost(trial, trial, budget) < _cost(plain, plain, budget):
            break
    return min(tried, key=lambda item: (not item[0].drop_fits(budget), _cost(item[0], item[0], budget)))[1]


def _few_bits(facts: Facts, budget: Budget, target: str) -> Generator[Recipe, Trial, list[tuple[Trial, Numbers]]]:
    """Bits layer by layer: the smallest first, then a bisection along what the damage table predicts."""
    tried: list[tuple[Trial, Numbers]] = []
    fits, breaks, index = -1, len(facts.stored), len(facts.stored) - 1
    while fits < index < breaks and len(tried) < CANDIDATES:
        trial = yield Recipe(facts.steps(*facts.stored[index]), target)
        tried.append((trial, facts.stored[index]))
        fits, breaks = (index, breaks) if trial.drop_fits(budget) else (fits, index)
        index = (fits + breaks) // 2
    if breaks < len(facts.stored):  # the smallest lost too much as it is
        numbers = (*facts.stored[-1], facts.distil())
        trial = yield Recipe(facts.steps(*numbers), target)
        tried.append((trial, numbers))
    return tried


def _rungs(facts: Facts) -> Iterator[Numbers]:
    """Ways to turn the whole network to numbers, most promising first."""
    yield (_step("quantize_static"),)
    yield (_step("quantize_static"), facts.distil())
    if facts.linear:
        yield (_step("quantize_dynamic"),)
    yield (_step("quantize_weights"),)


def _shapes(facts: Facts, budget: Budget, target: str, numbers: Numbers) -> Plan:
    """First fewer channels, then fewer whole blocks of what is left, where there are such."""
    share = yield from _fewer_channels(facts, budget, target, numbers)
    yield from _fewer_blocks(facts, budget, target, numbers, share)


def _fewer_channels(facts: Facts, budget: Budget, target: str, numbers: Numbers) -> Generator[Recipe, Trial, float]:
    """The largest share that the budget bears, by bisection."""
    tried: list[tuple[float, bool]] = []
    failed = 0
    while (share := share_to_try(tried, CANDIDATES - (facts.blocks > 1))) is not None:
        trial = yield facts.candidate(target, numbers, share)
        tried.append((share, trial.drop_fits(budget)))
        failed += trial.measurement is None
        if failed == len(tried) == 2:  # what cannot be pruned at two shares cannot at any
            break
    return max([share for share, fitted in tried if fitted], default=0.0)


def _fewer_blocks(facts: Facts, budget: Budget, target: str, numbers: Numbers, share: float) -> Plan:
    """A few blocks more each time, as long as the budget bears it; channels by `share`."""
    few = max(1, facts.blocks // 8)
    for count in range(few, min(facts.blocks, (BLOCK_CANDIDATES + 1) * few), few):
        trial = yield facts.candidate(target, numbers, share, dropped=count)
        if not trial.drop_fits(budget):
            return


def _cost(first: Trial, second: Trial, budget: Budget) -> float:
    """Of the first that was measured; infinite where none was."""
    found = first.measurement or second.measurement
    return budget.cost(found) if found else math.inf


def _step(name: str, **settings: Any) -> Pass:
    return passes.build(name, settings, "the search")


def seconds_of(recipe: Recipe, trials: Sequence[Trial]) -> float:
    """How long a trial will take, from how long each of its stages took at most before; unknown ones count nothing."""

    def once(trial: Trial, stage: str) -> float:
        return trial.seconds.get(stage, 0.0) / max(1, _stages(trial.recipe)[stage])

    return sum(
        times * max((once(trial, stage) for trial in trials), default=0.0) for stage, times in _stages(recipe).items()
    )


def _stages(recipe: Recipe) -> Counter[str]:
    """The stages of a trial, and how often each comes: a recipe may hold a pass twice."""
    return Counter([*(step.name() for step in recipe.steps), "export", "measure"])
