"""What a search tries next: a pure function of facts of the workload, the budget and the trials so far.

Three rungs, cheapest first. The network as it is on every target, and whole in int8 on those that are not far slower
than another: the best target is kept. Where bytes count, the smallest way to store weights (`storing`). Where int8
loses too much, int8 with the widest ranges, int8 trained by distillation, int8 but for the layers that it harms most,
twice as many each time, int8 with ranges found while running, and weights alone in 8 bits. Then the best of these with
all that stays in floats computed in bfloat16, where that can be had. Then shapes (`shaping`), unless there are smaller
ways to store.

What is proposed together is tried together, whatever comes of each, so that several workers can make it side by side.
The loop that tries, and measures what it tried, is `search`'s affair; where the facts come from, that of `facts`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from featherweight.candidates import (
    TEACHINGS,
    Facts,
    Numbers,
    Plan,
    Round,
    build_step,
    routes,
    routes_of_positions,
    teaches,
)
from featherweight.recipe import Recipe
from featherweight.shaping import FINALISTS, ROUNDS, shapes
from featherweight.storing import few_bits
from featherweight.trials import Budget, Trial

WORTHWHILE = 0.95  # times the cost: what bfloat16 has to save on top of the best numbers, for it loses a little
HOPELESS = 2.0  # times the cost of the best target, uncompressed: int8 is not tried there


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
        yield from shapes(facts, budget, *found)


def _is_bounded(facts: Facts, numbers: Numbers) -> bool:
    """Whether there are smaller ways to store than the one chosen, which the budget did not bear."""
    return tuple(step for step in numbers if not teaches(step)) in facts.stored[:-1]


def _settling(facts: Facts, budget: Budget) -> Generator[Round, list[Trial], tuple[str, Numbers] | None]:
    """The part of the search before shapes: the target and the numbers; None where the network fits no target."""
    names = facts.targets
    as_it_is = [Recipe(facts.steps(), target) for target in names]
    in_int8 = {target: Recipe(facts.steps("quantize_static"), target) for target in names}
    early = list(in_int8.values()) if len(names) == 1 else []  # there is nothing to choose, so both are tried together
    plain = dict(zip(names, (yield [*as_it_is, *early]), strict=False))
    costs = {target: trial.cost(budget) for target, trial in plain.items()}
    working = [target for target, cost in costs.items() if cost <= HOPELESS * min(costs.values()) < math.inf]
    if not working:
        return None
    static = dict(zip(working, (yield [in_int8[target] for target in working]), strict=True))
    target = min(working, key=lambda name: (static[name] if static[name].measurement else plain[name]).cost(budget))
    return target, (yield from _numbers(facts, budget, target, plain[target]))


def _numbers(facts: Facts, budget: Budget, target: str, plain: Trial) -> Generator[Round, list[Trial], Numbers]:
    """The cheapest numbers whose loss the budget bears; none where it bears no loss."""
    tried: list[tuple[Trial, Numbers]] = [(plain, ()), *(yield from few_bits(facts, budget, target))]
    rungs = [] if any(trial.drop_fits(budget) for trial, _ in tried[1:]) else rungs_of(facts)
    for numbers in rungs:
        (trial,) = yield [Recipe(facts.steps(*numbers), target)]
        tried.append((trial, numbers))
        if trial.drop_fits(budget) and trial.cost(budget) < plain.cost(budget):
            break

    best, found = min(tried, key=lambda item: (not item[0].drop_fits(budget), item[0].cost(budget)))
    if target in facts.bfloat16 and budget.objective != "bytes":
        numbers = (*found, build_step("compute_bfloat16"))
        (trial,) = yield [Recipe(facts.steps(*numbers), target)]
        if trial.may_fit(budget) and trial.cost(budget) < WORTHWHILE * best.cost(budget):
            return numbers
    return found


def rungs_of(facts: Facts) -> Iterator[Numbers]:
    """Ways to turn the network to numbers, most promising first."""
    yield from _whole_in_int8(facts)
    for count in (2**power for power in range(len(facts.fragile).bit_length())):
        layers = ", ".join(f"!{name}" for name in facts.fragile[:count])
        yield (build_step("quantize_static", range="minmax", where=layers),)
    if facts.linear:
        yield (build_step("quantize_dynamic"),)
    yield (build_step("quantize_weights"),)


def _whole_in_int8(facts: Facts) -> list[Numbers]:
    static = build_step("quantize_static")
    widest = build_step("quantize_static", range="minmax")  # where few large values matter, as in networks of speech
    return [(static,), (widest,), (static, facts.distil())]


def struggling(facts: Facts, budget: Budget, trials: Sequence[Trial]) -> str | None:
    """The target on which int8 as a whole loses too much, trained too; None where none does, or nobody knows yet."""
    for target in facts.targets:
        wanted = {Recipe(facts.steps(*numbers), target).digest for numbers in _whole_in_int8(facts)}
        found = [trial for trial in trials if trial.recipe.digest in wanted]
        measured = [trial for trial in found if trial.measurement is not None]
        if len(found) == len(wanted) and measured and not any(trial.drop_fits(budget) for trial in measured):
            return target
    return None


def expected(facts: Facts, done: int) -> int:
    """How many trials there will be, about."""
    shapes = sum(
        ways + 2 * (ROUNDS - 1) if ways > 1 else 2 * ROUNDS
        for ways in (len(routes_of_positions(facts)), len(routes(facts)))
        if ways
    )
    finalists = 2 * FINALISTS if routes_of_positions(facts) else FINALISTS
    return max(done + 1, 2 * len(facts.targets) + shapes + len(TEACHINGS) - 1 + finalists)


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
