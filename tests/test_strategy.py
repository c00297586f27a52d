"""The strategy, played against made-up worlds."""

from __future__ import annotations

import dataclasses

import pytest

from featherweight import candidates, shaping, storing, strategy
from featherweight.candidates import Facts, Shape
from featherweight.passes import build
from featherweight.passes.merge_positions import MergePositions
from featherweight.recipe import Recipe
from featherweight.strategy import next_recipes
from featherweight.trials import Budget, Trial, best_of, in_words
from tests.made_up import measurement

TARGET = "onnxruntime"
FACTS = Facts(targets=(TARGET,), folds=True, linear=True, epochs=2.0, multiples={TARGET: 8})


class World:
    """Says of every recipe what it would cost, as a function of the recipe alone."""

    def __init__(
        self, breaks_at: float = 0.5, static_drop: float = 0.002, trained_drop: float = 0.001, **of_target: float
    ):
        self.breaks_at, self.static_drop, self.trained_drop, self.of_target = (
            breaks_at,
            static_drop,
            trained_drop,
            of_target,
        )

    def __call__(self, recipe: Recipe) -> Trial:
        names = [step.name() for step in recipe.steps]
        gone = [step.settings().get("share", 0.0) for step in recipe.steps if step.name() != "merge_positions"]
        share = max(gone, default=0.0)
        trained = names[-1:] == ["distill_soft"]
        drop = (self.trained_drop if trained else self.static_drop) if "quantize_static" in names else 0.0
        drop += 0.1 if share > self.breaks_at else 0.001 * share
        quantized = any(name.startswith("quantize") for name in names)
        latency = (2.0 if "quantize_static" in names else 5.0) * (1 - share) * self.of_target.get(recipe.target, 1.0)
        found = measurement(
            recipe,
            drop=drop,
            drop_upper=drop,
            latency_ms=latency,
            bytes=int((10 if quantized else 40) * (1 - share) * 1e6),
        )
        return Trial(recipe, found)


def played(facts: Facts, budget: Budget, world) -> list[Trial]:
    trials: list[Trial] = []
    while recipes := next_recipes(facts, budget, trials):
        digests = [recipe.digest for recipe in recipes]
        assert len(set(digests)) == len(digests) and not {trial.recipe.digest for trial in trials} & set(digests)
        trials += map(world, recipes)
        assert len(trials) < 50
    return trials


def test_a_trial_is_expected_to_take_as_long_as_its_stages_did_and_distillation_by_its_epochs():
    def recipe(steps: str) -> Recipe:
        return Recipe.from_yaml(f"{{steps: {steps}, target: {TARGET}}}")

    once = Trial(recipe("[quantize_static, distill_soft]"), None, "", {"quantize_static": 2.0, "distill_soft": 100.0})
    twice = recipe("[prune_channels, distill_soft: {epochs: 3}, quantize_static, distill_hard]")
    assert strategy.seconds_of(twice, []) == 0
    assert strategy.seconds_of(twice, [once]) == 402.0
    seconds = {"prune_channels": 5.0, "distill_soft": 400.0, "distill_hard": 80.0, "export": 7.0, "measure": 1.0}
    then = Trial(twice, None, "", seconds)
    assert strategy.seconds_of(twice, [once, then]) == 5 + 4 * 120 + 2 + 7 + 1
    assert strategy.seconds_of(once.recipe, [once, then]) == 120 + 2 + 7 + 1


def words(trials: list[Trial]) -> list[str]:
    return [f"{in_words(trial.recipe)} on {trial.recipe.target}" for trial in trials]


def shares(trials: list[Trial]) -> list[float]:
    """Of those that are distilled by soft labels, as all are where no other way is better."""
    found = [trial for trial in trials if "distill_soft" in in_words(trial.recipe)]
    return [t.recipe.steps[0].settings()["share"] for t in found if "prune_channels" in in_words(t.recipe)]


def lengths(trials: list[Trial]) -> list[float]:
    """How long each shape is distilled, over what is usual for it."""
    found = []
    for trial in (trial for trial in trials if "distill_soft" in in_words(trial.recipe)):
        if trial.recipe.steps and trial.recipe.steps[0].name() in ("prune_channels", "drop_layers"):
            settings = {step.name(): step.settings() for step in trial.recipe.steps}
            share = settings.get("prune_channels", {}).get("share", 0.0)
            lost = settings.get("drop_layers", {}).get("share", 0.0)
            usual = FACTS.epochs * 4 / (1 + 3 * (1 - share) * (1 - lost))
            (epochs,) = [value["epochs"] for name, value in settings.items() if name.startswith("distill_")]
            found.append(round(epochs / usual, 1))
    return found


def test_ladder_then_thirds_towards_the_largest_share_that_holds_then_finalists():
    trials = played(FACTS, Budget(0.01), World(breaks_at=0.5))
    assert words(trials)[:2] == [f"fold_batchnorm on {TARGET}", f"fold_batchnorm + quantize_static on {TARGET}"]
    assert words(trials)[2] == f"prune_channels 0.2667 + distill_soft + fold_batchnorm + quantize_static on {TARGET}"
    assert shares(trials) == [0.2667, 0.5333, 0.3556, 0.4444, 0.5333, 0.5037, 0.4667, 0.4815]
    assert lengths(trials) == [candidates.SHORT] * 4 + [candidates.LONG] * 4
    best = best_of(trials, Budget(0.01))
    assert best and best.recipe.steps[0].settings()["share"] == 0.4815


@pytest.mark.parametrize("breaks_at", [0.05, 0.2, 0.4, 0.5, 0.7])
def test_two_workers_have_something_to_do_in_every_round(breaks_at):
    trials: list[Trial] = []
    sizes = []
    while recipes := next_recipes(FACTS, Budget(0.01), trials):
        sizes.append(len(recipes))
        trials += map(World(breaks_at), recipes)
    assert set(sizes) == {2} and len(sizes) > 4


class Taught(World):
    """Where a long distillation makes up for a share of `further` more."""

    def __init__(self, breaks_at: float, further: float) -> None:
        super().__init__(breaks_at)
        self.further, self.short = further, breaks_at

    def __call__(self, recipe: Recipe) -> Trial:
        pruned = [step for step in recipe.steps if step.name() == "prune_channels"]
        share = pruned[0].settings()["share"] if pruned else 0.0
        taught = [step.settings()["epochs"] for step in recipe.steps if step.name().startswith("distill_")]
        long = bool(taught) and taught[0] * (1 + 3 * (1 - share)) / 4 > FACTS.epochs
        self.breaks_at = self.short + (self.further if long else 0.0)
        trial = super().__call__(recipe)
        drop = min(trial.measurement.drop, 0.02 + 0.02 * max(0.0, share - self.breaks_at))
        return Trial(recipe, dataclasses.replace(trial.measurement, drop=drop, drop_upper=drop))


def test_of_shapes_that_just_failed_the_nearest_two_are_taught_for_long_and_then_two_more():
    trials = played(FACTS, Budget(0.01), Taught(breaks_at=0.2, further=0.4))
    assert shares(trials)[:4] == [0.2667, 0.5333, 0.0889, 0.1778]
    assert shares(trials)[4:] == [0.2667, 0.5333] and lengths(trials)[4:] == [candidates.LONG] * 2
    best = best_of(trials, Budget(0.01))
    assert best and best.recipe.steps[0].settings()["share"] == 0.5333
    world = Taught(breaks_at=0.05, further=0.3)
    trials = played(FACTS, Budget(0.01), world)
    assert shares(trials)[:4] == [0.2667, 0.5333, 0.0889, 0.1778]
    assert shares(trials)[4:] == [0.0889, 0.1778, 0.2667, 0.5333]
    best = best_of(trials, Budget(0.01))
    assert best and best.recipe.steps[0].settings()["share"] == 0.2667


@pytest.mark.parametrize("noise", [1.0, 1.5])
def test_the_cheapest_whose_mean_keeps_to_the_budget_is_taught_for_long_first_however_slow_it_seemed(noise):
    def world(recipe: Recipe) -> Trial:
        share = recipe.steps[0].settings().get("share", 0.0)
        drop = 0.004 if share < 0.3 else 0.05
        taught = [step.settings()["epochs"] for step in recipe.steps if step.name().startswith("distill_")]
        is_long = bool(taught) and taught[0] * (1 + 3 * (1 - share)) / 4 > FACTS.epochs
        upper = drop + (0.007 + 0.01 * share if share and not is_long else 0.0)
        latency = 5 * (1 - share) * (noise if 0.2 < share < 0.3 and not is_long else 1.0)
        return Trial(recipe, measurement(recipe, drop=drop, drop_upper=upper, latency_ms=latency))

    trials = played(FACTS, Budget(0.01), world)
    taught = [share for share, length in zip(shares(trials), lengths(trials), strict=True) if length == candidates.LONG]
    assert taught == [0.2667, 0.1778, 0.3556, 0.4444]  # what is beyond loses far too much: by thirds to it


def test_without_norms_the_first_recipe_is_a_plain_export():
    trials = played(dataclasses.replace(FACTS, folds=False), Budget(0.01), World())
    assert trials[0].recipe == Recipe((), TARGET)
    assert "fold_batchnorm" not in " ".join(words(trials))


def test_the_faster_target_is_kept_and_the_others_dropped():
    facts = dataclasses.replace(FACTS, targets=("onnxruntime", "openvino", "torch"))
    trials = played(facts, Budget(0.01), World(openvino=0.6, torch=0.9))
    assert [trial.recipe.target for trial in trials[:6]] == ["onnxruntime", "openvino", "torch"] * 2
    assert {trial.recipe.target for trial in trials[6:]} == {"openvino"}


def test_a_target_that_is_far_slower_is_not_tried_in_int8():
    facts = dataclasses.replace(FACTS, targets=("onnxruntime", "openvino", "torch"))
    found = [trial.recipe.target for trial in played(facts, Budget(0.01), World(openvino=0.6, torch=3.0))]
    assert found[:5] == ["onnxruntime", "openvino", "torch", "onnxruntime", "openvino"] and "torch" not in found[5:]


def test_a_target_that_fails_is_left_alone():
    world = World()
    facts = dataclasses.replace(FACTS, targets=("onnxruntime", "openvino"))
    trials = played(facts, Budget(0.01), lambda r: Trial(r, None, "no") if r.target == "openvino" else world(r))
    assert [trial.recipe.target for trial in trials].count("openvino") == 1
    assert len(shares(trials)) == 2 * shaping.ROUNDS + shaping.FINALISTS


def test_when_nothing_can_be_exported_there_is_nothing_to_search():
    assert len(played(FACTS, Budget(0.01), lambda recipe: Trial(recipe, None, "no"))) == 2


def test_int8_that_loses_too_much_is_trained():
    trials = played(FACTS, Budget(0.01), World(static_drop=0.05))
    assert trials[2].recipe.steps[-1].settings()["range"] == "minmax"
    assert words(trials)[3] == f"fold_batchnorm + quantize_static + distill_soft on {TARGET}"
    assert words(trials)[4].endswith(f"quantize_static + distill_soft on {TARGET}") and shares(trials)[0] == 0.2667


def test_where_training_does_not_help_milder_numbers_are_tried():
    world = World(static_drop=0.05, trained_drop=0.05)
    found = words(played(FACTS, Budget(0.01), world))
    assert found[4] == f"fold_batchnorm + quantize_dynamic on {TARGET}"
    without_linear = words(played(dataclasses.replace(FACTS, linear=False), Budget(0.01), world))
    assert without_linear[4] == f"fold_batchnorm + quantize_weights on {TARGET}"


def test_the_layers_that_int8_harms_most_stay_in_floats_twice_as_many_each_time():
    def world(recipe: Recipe) -> Trial:
        where = {step.where for step in recipe.steps if step.name() == "quantize_static"}
        good = "*" not in where and len(max(where, default="").split(", ")) >= 3
        return World(static_drop=0.002 if good else 0.05, trained_drop=0.05)(recipe)

    fragile = tuple(f"layer{number}" for number in range(9))
    facts = dataclasses.replace(FACTS, fragile=fragile)
    trials = played(facts, Budget(0.01), world)
    found = [step.where for t in trials for step in t.recipe.steps if step.name() == "quantize_static"]
    assert found[:3] == ["*"] * 3
    assert found[3:6] == [", ".join(f"!{name}" for name in fragile[:count]) for count in (1, 2, 4)]
    assert set(found[6:]) == {found[5]} and "distill_soft" in words(trials)[-1]  # which shapes are turned to
    first = [t for t in trials if t.recipe.steps[-1].where == "*"]
    assert strategy.struggling(FACTS, Budget(0.01), first[:3]) is None
    assert strategy.struggling(FACTS, Budget(0.01), first[:4]) == TARGET
    assert strategy.struggling(FACTS, Budget(0.06), first[:4]) is None


STORED = tuple((build("quantize_weights", {"bits": 8 - n, "where": f"layer{n}"}, "here"),) for n in range(6))


@pytest.mark.parametrize(
    ("objective", "saves", "drop", "kept"),
    [
        ("latency", 0.9, 0.0, True),
        ("latency", 0.97, 0.0, False),  # that may be noise
        ("latency", 1.1, 0.0, False),
        ("latency", 0.9, 0.008, True),
        ("latency", 0.9, 0.012, False),
        ("bytes", 0.9, 0.0, False),
    ],
)
def test_the_best_numbers_are_tried_with_floats_in_bfloat16_and_what_is_faster_goes_on(objective, saves, drop, kept):
    def world(recipe: Recipe) -> Trial:
        trial = World()(recipe)
        if "compute_bfloat16" not in in_words(recipe):
            return trial
        ratio, most = trial.measurement.latency_ratio / saves, drop + 0.004
        return Trial(recipe, dataclasses.replace(trial.measurement, latency_ratio=ratio, drop=drop, drop_upper=most))

    facts = dataclasses.replace(FACTS, bfloat16=(TARGET,))
    trials = played(facts, Budget(0.01, objective=objective), world)
    with_it = [index for index, trial in enumerate(trials) if "compute_bfloat16" in in_words(trial.recipe)]
    assert with_it == (list(range(2, len(trials))) if kept else [2] if objective == "latency" else [])
    if with_it:
        assert words(trials)[2] == f"fold_batchnorm + quantize_static + compute_bfloat16 on {TARGET}"


@pytest.mark.parametrize("last", range(-1, 6))
def test_for_bytes_the_smallest_ways_to_store_that_the_budget_bears_are_found_by_thirds(last):
    """Of six ways, from the least harmful to the smallest, those up to `last` fit the budget.

    Distilled two more do, and for long a third.
    """

    def epochs(recipe: Recipe) -> float:
        is_taught = len(recipe.steps) == 3 and recipe.steps[-1].name() == "distill_soft"
        return recipe.steps[-1].settings()["epochs"] if is_taught else 0.0

    def world(recipe: Recipe) -> Trial:
        ways = [step for step in recipe.steps if step in {way for (way,) in STORED}]
        index = STORED.index((ways[0],)) if ways else -1
        pruned = any(step.name() == "prune_channels" for step in recipe.steps)
        drop = 0.02 if pruned or index > last + {0.0: 0, 2.0: 2, 8.0: 3}[epochs(recipe)] else 0.0
        return Trial(recipe, measurement(recipe, drop=drop, drop_upper=drop, bytes=40_000_000 - 1_000_000 * index))

    facts = dataclasses.replace(FACTS, stored=STORED)
    trials = played(facts, Budget(0.01, objective="bytes"), world)
    tried = [STORED.index(trial.recipe.steps[-1:]) for trial in trials if trial.recipe.steps[-1:] in STORED]
    alone = tried[: next((n for n, trial in enumerate(trials[2:]) if len(trial.recipe.steps) > 2), len(tried))]
    assert alone[:2] == [1, 4] and len(alone) <= 4 and len(set(alone)) == len(alone)
    taught = [(epochs(t.recipe), STORED.index((t.recipe.steps[1],))) for t in trials if epochs(t.recipe)]
    briefly, long = ([index for length, index in taught if length == wanted] for wanted in (2.0, 8.0))
    assert len(briefly) <= 4 and all(index > last for index in briefly) and bool(briefly) == (last < 5)
    assert len(long) <= storing.LONGER_TRIALS and all(last + 2 < index for index in long)
    best = best_of(trials, Budget(0.01, objective="bytes"))
    found = [step for step in best.recipe.steps if step.name() == "quantize_weights"]
    assert found == [STORED[min(last + 3, 5)][0]]


WAYS = tuple((build("quantize_weights", {"bits": 4, "where": f"layer{index}"}, "here"),) for index in range(1, 31))
Tried = tuple[int, float]  # which of WAYS, from 1, and how long it is distilled over what is usual


UNCERTAIN = 0.005  # how far the bound of a drop is above its mean


def ways_tried(drop_of) -> list[Tried]:
    """What is tried of WAYS, each of which saves as much as the one before, where `drop_of` tells the drop of each."""
    facts = dataclasses.replace(FACTS, stored=WAYS)

    def tried(recipe: Recipe) -> Tried | None:
        places = [WAYS.index((step,)) + 1 for step in recipe.steps if (step,) in WAYS]
        epochs = sum(step.settings()["epochs"] for step in recipe.steps if step.name().startswith("distill_"))
        return (places[0], epochs / facts.epochs) if places and "prune_channels" not in in_words(recipe) else None

    def world(recipe: Recipe) -> Trial:
        way = tried(recipe)
        drop = drop_of(*way) if way else 0.05 if len(recipe.steps) > 1 else 0.0
        size = 40_000_000 - (1_000_000 * way[0] if way else 0)
        return Trial(recipe, measurement(recipe, drop=drop, drop_upper=drop + UNCERTAIN, bytes=size))

    found = [tried(trial.recipe) for trial in played(facts, Budget(0.01, objective="bytes"), world)]
    return [way for way in found if way]


@pytest.mark.parametrize(
    ("slope", "at_24", "long"),
    [
        (0.0005, 0.009, [17, 24, 20]),  # both lack only certainty
        (0.001, 0.013, [17, 20, 22]),
        (0.001, 0.05, [17, 20, 22]),
        (0.006, 0.05, [17, 20, 22]),
    ],
)
def test_ways_to_store_are_taught_for_long_where_briefly_they_just_fail_and_between(slope, at_24, long):
    """Untaught the tenth fits, taught briefly the 16th, and for long the 20th."""

    def drop_of(place: int, length: float) -> float:
        last = {0.0: 10, 1.0: 16}.get(length, 20)
        if place == 24 and length == 1:
            return at_24
        return UNCERTAIN + slope * (place - last) if place > last else 0.0

    untaught, briefly = [10, 21, 14, 17, 11, 13], [17, 24, 12, 15]
    assert ways_tried(drop_of) == [
        *((place, 0.0) for place in untaught),
        *((place, 1.0) for place in briefly),
        *((place, storing.LONGEST) for place in long),
    ]


@pytest.mark.parametrize(("fits", "shapes"), [(0, True), (20, False), (30, True)])
def test_shapes_are_tried_where_there_are_no_smaller_ways_to_store(fits, shapes):
    def world(recipe: Recipe) -> Trial:
        places = [WAYS.index((step,)) + 1 for step in recipe.steps if (step,) in WAYS]
        drop = 0.02 if (places and places[0] > fits) or "prune_channels" in in_words(recipe) else 0.0
        size = 40_000_000 - sum(1_000_000 * place for place in places)
        return Trial(recipe, measurement(recipe, drop=drop, drop_upper=drop, bytes=size))

    trials = played(dataclasses.replace(FACTS, stored=WAYS), Budget(0.01, objective="bytes"), world)
    assert any("prune_channels" in in_words(trial.recipe) for trial in trials) == shapes


@pytest.mark.parametrize("thin_first", [False, True])
def test_shapes_with_factors_are_distilled_once_before_they_are_rounded(thin_first):
    thin, rounded = build("factorize_svd", {"where": "a"}, "here"), build("quantize_weights", {"bits": 4}, "here")

    def world(recipe: Recipe) -> Trial:
        taught = any(step.name() == "distill_soft" for step in recipe.steps)
        drop = 0.02 if (rounded in recipe.steps and not taught) or "prune_channels" in in_words(recipe) else 0.0
        return Trial(
            recipe, measurement(recipe, drop=drop, drop_upper=drop, bytes=10 if rounded in recipe.steps else 40)
        )

    stored = ((thin, rounded),)
    facts = dataclasses.replace(FACTS, stored=stored, thinned=stored if thin_first else ())
    trials = played(facts, Budget(0.01, objective="bytes"), world)
    shaped = [t.recipe.steps for t in trials if "prune_channels" in in_words(t.recipe)]
    assert shaped and {len(steps) for steps in shaped} == {5}
    assert all(steps[3].name().startswith("distill_") and steps[4] == rounded for steps in shaped)
    lengths = [steps[3].settings()["epochs"] for steps in shaped]
    assert max(lengths) > 3 * min(lengths)  # as long as shapes are, not as numbers are


@pytest.mark.parametrize(
    ("thin", "found"),
    [
        (False, ["factorize_svd", "quantize_weights", "distill_soft"]),
        (True, ["factorize_svd", "distill_soft", "quantize_weights"]),
    ],
)
def test_ways_to_store_are_distilled_once_all_is_rounded_but_for_factors_that_do_most_of_the_harm(thin, found):
    stored = (build("factorize_svd", {"where": "a"}, "here"), build("quantize_weights", {"bits": 4}, "here"))

    def world(recipe: Recipe) -> Trial:
        taught = any(step.name() == "distill_soft" for step in recipe.steps)
        drop = 0.02 if stored[1] in recipe.steps and not taught else 0.0
        return Trial(recipe, measurement(recipe, drop=drop, drop_upper=drop))

    for way, names in ((stored, found), (stored[1:], ["quantize_weights", "distill_soft"])):
        facts = dataclasses.replace(FACTS, stored=(way,), thinned=(stored,) if thin else ())
        trials = played(facts, Budget(0.01, objective="bytes"), world)
        assert ["fold_batchnorm", *names] in [[step.name() for step in t.recipe.steps] for t in trials]


def test_true_labels_have_a_share_in_soft_distillation_of_numbers_where_there_are_some():
    def shares_of_labels(facts: Facts) -> dict[str, set[float]]:
        """By what is distilled: numbers, last of all, or shapes, which are turned to numbers then."""
        found: dict[str, set[float]] = {"numbers": set(), "shapes": set()}
        for trial in played(facts, Budget(0.01), World(static_drop=0.05)):
            for step in trial.recipe.steps:
                if step.name() == "distill_soft":
                    last = step is trial.recipe.steps[-1]
                    found["numbers" if last else "shapes"].add(step.settings()["alpha"])
        return found

    assert shares_of_labels(FACTS) == {"numbers": {0.0}, "shapes": {0.0}}
    assert shares_of_labels(dataclasses.replace(FACTS, labels=True)) == {"numbers": {0.5}, "shapes": {0.0}}


def test_two_shares_a_round_between_what_fitted_and_what_did_not():
    assert shares(played(FACTS, Budget(0.01), World(breaks_at=0.0)))[:4] == [0.2667, 0.5333, 0.0889, 0.1778]
    assert shares(played(FACTS, Budget(0.01), World(breaks_at=1.0))) == [0.2667, 0.5333, 0.6222, 0.7111]


BLOCKS = dataclasses.replace(FACTS, folds=False, blocks=6)


def shapes(trials: list[Trial]) -> list[Shape]:
    """Of those that are distilled by soft labels and have one, in the order in which they were tried."""
    found = [candidates.shape_of(BLOCKS, t.recipe) for t in trials if "distill_soft" in in_words(t.recipe)]
    return [shape for shape in found if shape is not None]


def by_shape(bears) -> World:
    """A world in which the budget bears the shapes that `bears` says, and others the less the more channels go."""

    def world(recipe: Recipe) -> Trial:
        shape = candidates.shape_of(BLOCKS, recipe)
        trial = World(breaks_at=1.0)(recipe)
        if shape is None or bears(shape):
            return trial
        worse = 0.02 + 0.01 * shape.share
        return Trial(recipe, dataclasses.replace(trial.measurement, drop=worse, drop_upper=worse))

    return world


def test_of_three_routes_to_the_same_cost_the_one_that_loses_least_is_followed():
    """The budget bears three blocks less, but hardly a channel; what costs the same is what does as much arithmetic."""
    trials = played(BLOCKS, Budget(0.01), by_shape(lambda shape: shape.share < 0.1 and shape.dropped <= 3))
    found = shapes(trials)
    assert found[:3] == [Shape(0.2963), Shape(0.1593, 1), Shape(0.0, 2)]
    assert found[3:5] == [Shape(0.0, 3), Shape(0.0, 4)]
    best = best_of(trials, Budget(0.01))
    assert best and candidates.shape_of(BLOCKS, best.recipe) == Shape(0.0, 3)
    taught = [step for trial in trials[2:] for step in trial.recipe.steps if step.name().startswith("distill_")]
    assert all(step.settings()["lr"] == candidates.PLAIN_LR for step in taught)
    channels = shapes(played(BLOCKS, Budget(0.01), by_shape(lambda shape: not shape.dropped and shape.share < 0.6)))
    assert channels[3:5] == [Shape(0.4667), Shape(0.6296)]


def test_sequences_get_shorter_where_that_loses_least_and_networks_with_all_their_weights_are_taught_last():
    """The budget bears a cut of 0.4 untaught and of 0.6 taught."""

    def bears(recipe: Recipe, shape: Shape) -> bool:
        return not shape.thinner and shape.cut <= (0.6 if "distill" in in_words(recipe) else 0.4)

    def world(recipe: Recipe) -> Trial:
        return by_shape(lambda shape: bears(recipe, shape))(recipe)

    facts = dataclasses.replace(BLOCKS, truncates=True)
    trials = played(facts, Budget(0.01), world)
    tried = [
        (shape, "distill" in in_words(t.recipe)) for t in trials if (shape := candidates.shape_of(BLOCKS, t.recipe))
    ]
    cuts = [(0.25, False), (0.5, False), (0.3333, False), (0.4167, False), (0.5, True), (0.4167, True)]
    assert tried[: len(cuts)] == [(Shape(0.0, cut=cut), taught) for cut, taught in cuts]
    others = [shape for shape, _ in tried[len(cuts) :]]
    assert others and all(shape.thinner and shape.cut == 0.5 for shape in others[:3])
    best = best_of(trials, Budget(0.01))
    assert best and candidates.shape_of(BLOCKS, best.recipe) == Shape(0.0, cut=0.5)
    stored = played(facts, Budget(0.01, objective="bytes"), world)
    assert not [t for t in stored if "truncate_inputs" in in_words(t.recipe)]


@pytest.mark.parametrize(
    ("notable", "noise", "further"),
    [
        (1.0, 1.0, [0.4444, 0.4722]),
        (shaping.NOTABLE, 1.0, [0.4722]),
        (0.9, 1.0, []),
        (shaping.NOTABLE, 0.5, [0.4722]),  # 0.3333 seemed to be soonest, beside which 0.4444 would be notable
    ],
)
def test_of_positions_a_second_pair_is_taught_for_long_where_it_would_save_something(
    notable, noise, further, monkeypatch
):
    """The budget bears a cut of 0.4 untaught, of 0.45 taught, and of 0.5 never."""
    monkeypatch.setattr(shaping, "NOTABLE", notable)

    def world(recipe: Recipe) -> Trial:
        bears = 0.45 if "distill" in in_words(recipe) else 0.4
        trial = by_shape(lambda shape: not shape.thinner and shape.cut <= bears)(recipe)
        shape = candidates.shape_of(BLOCKS, recipe)
        seems = trial.measurement.latency_ratio / (noise if shape == Shape(0.0, cut=0.3333) else 1.0)
        return Trial(recipe, dataclasses.replace(trial.measurement, latency_ratio=seems))

    trials = played(dataclasses.replace(BLOCKS, truncates=True), Budget(0.01), world)
    found = [shape for shape in shapes(trials) if not shape.thinner]
    assert found == [Shape(0.0, cut=cut) for cut in (0.5, 0.4167, *further)]
    assert {shape.cut for shape in shapes(trials) if shape.thinner} == {0.4444 if 0.4444 in further else 0.4167}


@pytest.mark.parametrize("unsure", [0.0, 0.012])
def test_routes_that_may_fit_are_compared_again_where_half_is_gone(unsure):
    """All lose nothing at first, or not for certain; where more is gone, positions that are cut lose least."""
    facts = dataclasses.replace(BLOCKS, truncates=True, merges=6)

    def world(recipe: Recipe) -> Trial:
        shape = candidates.shape_of(facts, recipe) or Shape(0.0)
        trial = World(static_drop=0.0, breaks_at=1.0)(recipe)
        left = facts.kept(shape)
        worse = 0.0 if left > 0.6 else (0.02 * shape.share + 0.002 * shape.merged + 0.008 * shape.cut) * (1 - left)
        upper = worse + unsure * (0.6 < left < 1)
        return Trial(recipe, dataclasses.replace(trial.measurement, drop=worse, drop_upper=upper))

    found = [candidates.shape_of(facts, t.recipe) for t in played(facts, Budget(0.01), world)]
    tried = [shape for shape in found if shape]
    first, second = tried[:3], tried[3:6]
    assert all(facts.kept(shape) > 0.6 for shape in first) and all(0.4 < facts.kept(shape) < 0.6 for shape in second)
    followed = [shape for shape in tried[6:] if not shape.thinner]
    assert followed and all((unsure or shape.cut > second[0].cut) and not shape.merged for shape in followed)


def test_blocks_are_computed_for_pairs_of_positions_and_then_for_fours():
    """Of eight blocks four can be: the budget bears two for fours and the others for pairs."""
    facts = dataclasses.replace(BLOCKS, blocks=8, merges=4)

    def world(recipe: Recipe) -> Trial:
        shape = candidates.shape_of(facts, recipe) or Shape(0.0)
        drop = 0.0 if shape.merged <= 6 and not shape.thinner else 0.02
        return Trial(recipe, measurement(recipe, drop=drop, drop_upper=drop, latency_ms=facts.kept(shape)))

    trials = played(facts, Budget(0.01), world)
    best = best_of(trials, Budget(0.01))
    assert best and best.recipe.steps[0] == MergePositions(share=0.75, size=4)
    for level in range(9):
        shape = Shape(0.0, merged=level)
        recipe = facts.candidate(TARGET, (), shape, candidates.SHORT)
        assert candidates.shape_of(facts, recipe) == (shape if level else None)
    assert facts.kept(Shape(0.0, merged=4)) == 0.75 and facts.kept(Shape(0.0, merged=8)) == 0.625


def test_a_second_finalist_is_taught_where_the_first_did_not_fit_and_nothing_else_does():
    facts = dataclasses.replace(BLOCKS, blocks=8, merges=4)
    taught, thinned = [], set()

    def world(recipe: Recipe) -> Trial:
        shape = candidates.shape_of(facts, recipe) or Shape(0.0)
        long = any(step.name() == "distill_soft" for step in recipe.steps)
        if long and shape.merged and not shape.thinner:
            taught.append(shape.merged)
        if shape.thinner:
            thinned.add(shape.merged)
        drop = 0.05 if shape.merged > 4 or shape.thinner else 0.006
        lacks = shape.merged > 0 and not (long and shape.merged < 3)
        found = measurement(recipe, drop=drop, drop_upper=drop + 0.01 * lacks, latency_ms=facts.kept(shape))
        return Trial(recipe, found)

    best = best_of(played(facts, Budget(0.01), world), Budget(0.01))
    assert best and candidates.shape_of(facts, best.recipe) == Shape(0.0, merged=2)
    assert taught == [3, 2] and thinned == {2}  # weights go from there


def test_what_costs_the_same_is_what_was_predicted_to():
    paces = {Shape(share, dropped): (1 - share / 4) * (1 - dropped / 6) for share in (0.0, 0.8) for dropped in range(5)}
    facts = dataclasses.replace(BLOCKS, paces=paces)
    assert facts.pace(Shape(0.4, 1)) == pytest.approx(0.9 * 5 / 6)
    assert BLOCKS.pace(Shape(0.4, 3)) == pytest.approx(0.3)
    found = shapes(played(facts, Budget(0.01), by_shape(lambda shape: True)))
    assert found[0] == Shape(0.7926) and found[2] == Shape(0.0, 2)  # two blocks are worth more than all channels


def test_routes_become_smaller_from_shape_to_shape_and_end_where_little_is_left():
    for blocks, truncates, merges, counts in (
        (0, False, 0, (1, 0)),
        (1, False, 0, (1, 0)),
        (2, False, 0, (3, 0)),
        (24, True, 0, (3, 1)),
        (6, True, 6, (3, 3)),
        (8, False, 4, (3, 1)),
    ):
        facts = dataclasses.replace(BLOCKS, blocks=blocks, truncates=truncates, merges=merges)
        found = candidates.routes(facts), candidates.routes_of_positions(facts)
        assert tuple(map(len, found)) == counts
        for route in (*found[0], *found[1], *candidates.routes(facts, Shape(0.0, cut=0.5))):
            kept = [facts.kept(shape) for shape in route]
            assert kept == sorted(kept, reverse=True) and len(set(route)) == len(route)
            assert kept[0] < 1 and kept[-1] > 0.09
        assert {shape.cut for route in candidates.routes(facts, Shape(0.0, cut=0.5)) for shape in route} == {0.5}


def test_the_target_and_the_numbers_are_settled_before_shapes_are_tried():
    trials = played(FACTS, Budget(0.01), World())
    until = next(n for n, trial in enumerate(trials) if candidates.shape_of(FACTS, trial.recipe))
    assert strategy.settled(FACTS, Budget(0.01), trials[: until - 1]) is None
    target, numbers = strategy.settled(FACTS, Budget(0.01), trials[:until])
    assert target == TARGET and [step.name() for step in numbers] == ["quantize_static"]
    assert strategy.settled(FACTS, Budget(0.01), [Trial(trials[0].recipe, None, "no")]) is None


def test_the_distillation_that_recovers_most_is_chosen_on_the_first_share_that_fails():
    def world(recipe: Recipe) -> Trial:
        hard = any(step.name() == "distill_hard" for step in recipe.steps)
        return World(breaks_at=0.7 if hard else 0.4)(recipe)

    trials = played(FACTS, Budget(0.01), world)
    kinds = [
        (step.name(), trial.recipe.steps[0].settings()["share"])
        for trial in trials
        for step in trial.recipe.steps
        if step.name().startswith("distill_")
    ]
    soft, hard, features = candidates.TEACHINGS
    assert kinds[:4] == [(soft, 0.2667), (soft, 0.5333), (hard, 0.5333), (features, 0.5333)]
    assert kinds[4:6] == [(hard, 0.6222), (hard, 0.7111)] and {kind for kind, _ in kinds[6:]} == {hard}
    everywhere = played(FACTS, Budget(0.01), World(breaks_at=1.0))
    raced = [t.recipe.steps[0].settings()["share"] for t in everywhere if hard in in_words(t.recipe)]
    assert raced == [0.5333]  # where none fails, the smallest network


@pytest.mark.parametrize("cut", [0.4, -1.0])
def test_features_are_not_compared_where_sequences_were_cut(cut):
    """There are none in the original that they could be compared with."""
    world = by_shape(lambda shape: shape.cut <= cut and shape.share < 0.3)
    trials = played(dataclasses.replace(BLOCKS, truncates=True), Budget(0.01), world)
    thinner = [t.recipe for t in trials if (shape := candidates.shape_of(BLOCKS, t.recipe)) and shape.thinner]
    kinds = {step.name() for recipe in thinner for step in recipe.steps if candidates.teaches(step)}
    soft, hard, features = candidates.TEACHINGS
    assert kinds == ({soft, hard} if cut > 0 else {soft, hard, features})


def test_a_network_that_cannot_be_pruned_costs_two_trials():
    world = World()
    trials = played(FACTS, Budget(0.01), lambda r: Trial(r, None, "no") if len(r.steps) > 2 else world(r))
    assert shares(trials) == [0.2667, 0.5333]


def test_bytes_and_latency_bounds_do_not_turn_the_bisection_round():
    """What is too heavy needs more pruning, not less."""
    trials = played(FACTS, Budget(0.01, max_bytes=1), World(breaks_at=1.0))
    assert shares(trials)[-1] > 0.7


def test_the_strategy_does_not_depend_on_the_order_of_trials():
    trials = played(FACTS, Budget(0.01), World())
    for count in range(len(trials)):
        assert next_recipes(FACTS, Budget(0.01), trials[:count][::-1])[0] == trials[count].recipe
