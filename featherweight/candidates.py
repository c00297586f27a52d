"""What a search chooses from: what is known of a workload, and recipes of its shapes and numbers.

A shape is what is left of a network, numbers are the last steps of a recipe. Shapes lie on routes, from the whole
network to the smallest. Which of them are tried is the strategy's affair; where the facts come from, that of `facts`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from featherweight import passes
from featherweight.passes import Pass
from featherweight.recipe import Recipe
from featherweight.trials import Trial

LARGEST_SHARE = 0.8  # of channels that may be removed: the end of the route on which channels alone go
DEEPEST = 2 / 3  # of blocks that may be removed: the end of the route on which blocks alone go
SHORTEST = 3 / 4  # of each sequence that may be cut off: the end of the route on which sequences alone get shorter
DOUBLINGS = 2  # of the groups of positions that a block is computed for, at most
LARGEST_GROUP = 2**DOUBLINGS
POINTS = 108  # of a route; so many that thirds of thirds, and halves of those, are among them
SHORT, LONG = 0.5, 2.0  # how long shapes and finalists are distilled, over `Facts.epochs`
TEACHINGS = ("distill_soft", "distill_hard", "distill_features")  # of which one is chosen by what it recovers
LABELLED = 0.5  # the share of the true labels in what soft distillation teaches numbers, where there are some
NORMED_LR, PLAIN_LR = 0.005, 0.001  # of networks with batch norms, also once those are folded (LOG.md), and without

Numbers = tuple[Pass, ...]  # the last steps of a recipe, which turn weights into numbers of few bits
Round = list[Recipe]  # tried together, whatever comes of each
Plan = Generator[Round, list[Trial], None]


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
        thinned: those of `stored` of which factors do most of the harm.
        labels: whether the data to train on tells the true labels, too.
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
    thinned: tuple[tuple[Pass, ...], ...] = ()
    labels: bool = False
    precision: str = "float32"
    bfloat16: tuple[str, ...] = ()
    paces: Mapping[Shape, float] = field(default_factory=dict)
    fragile: tuple[str, ...] = ()

    def steps(self, *names: str | Pass, shape: Sequence[Pass] = ()) -> tuple[Pass, ...]:
        """`shape`, then the fold where there is something to fold, then the passes named."""
        fold = ("fold_batchnorm",) if self.folds else ()
        return (*shape, *(step if isinstance(step, Pass) else build_step(step) for step in (*fold, *names)))

    def distil(self, length: float = 1.0, shape: Shape | None = None, teaching: str = TEACHINGS[0]) -> Pass:
        """The distillation of a shape or, without one, of numbers.

        A smaller network takes more steps in the same time: of four parts of the arithmetic of a step one is the
        teacher's, and three are the candidate's. True labels teach numbers alone, where there are some: what learns
        from them departs further from the original, which widens the paired bound, and shapes recovered no more with
        them on the data that the search goes by (LOG.md).
        """
        epochs = float(f"{length * self.epochs * 4 / (1 + 3 * (1.0 if shape is None else self.kept(shape))):.2g}")
        lr = NORMED_LR if self.folds else PLAIN_LR
        labels = {"alpha": LABELLED} if self.labels and shape is None and teaching == "distill_soft" else {}
        return build_step(teaching, epochs=epochs, lr=lr, precision=self.precision, **labels)

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

    def taught(self, stored: Numbers, length: float) -> Numbers:
        """A way to store, distilled: factors that do most of the harm before they are rounded, else once all is."""
        place = _factors(stored) if stored in self.thinned else len(stored)
        return _with(stored, self.distil(length), place)

    def candidate(
        self, target: str, numbers: Numbers, shape: Shape, length: float, teaching: str = TEACHINGS[0]
    ) -> Recipe:
        """Positions, blocks and channels removed, what is left trained, and turned to numbers."""
        steps = [build_step("truncate_inputs", share=shape.cut)] if shape.cut else []
        if shape.dropped:
            steps.append(build_step("drop_layers", share=round(self.lost(shape), 4)))
        if shape.share:
            steps.append(build_step("prune_channels", share=shape.share, multiple=self.multiples.get(target, 8)))
        if shape.merged:
            share = shape.merged / (self.merges * DOUBLINGS)
            steps.append(build_step("merge_positions", share=round(share, 4), size=LARGEST_GROUP))
        stored = tuple(step for step in numbers if not teaches(step))
        if _factors(stored) and stored != numbers:  # once, with what is left of them, is enough
            numbers = _with(stored, self.distil(length, shape, teaching), _factors(stored))
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

    @property
    def teachings(self) -> tuple[str, ...]:
        """Ways to teach what is left; of shorter sequences layers have no features that could be compared."""
        return tuple(kind for kind in TEACHINGS if not (self.cut and kind == "distill_features"))


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


def shape_of(facts: Facts, recipe: Recipe) -> Shape | None:
    """The shape that a recipe's first steps leave; None where they leave all as it was."""
    settings = {step.name(): step.settings() for step in recipe.steps}
    lost = settings.get("drop_layers", {}).get("share", 0.0)
    cut = settings.get("truncate_inputs", {}).get("share", 0.0)
    merged = settings.get("merge_positions", {}).get("share", 0.0) * facts.merges * DOUBLINGS
    share = settings.get("prune_channels", {}).get("share", 0.0)
    shape = Shape(share, round(lost * facts.blocks), cut, round(merged))
    return shape if shape != Shape(0.0) else None


def _factors(numbers: Numbers) -> int:
    """How many steps factorize: they come first."""
    return sum(step.name() == "factorize_svd" for step in numbers)


def _with(numbers: Numbers, step: Pass, place: int) -> Numbers:
    return (*numbers[:place], step, *numbers[place:])


def teaches(step: Pass) -> bool:
    """Whether a step is one of the distillations that a search chooses from."""
    return step.name() in TEACHINGS


def build_step(name: str, **settings: Any) -> Pass:
    """A pass with settings that the search gives it."""
    return passes.build(name, settings, "the search")
