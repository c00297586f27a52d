from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import nn

from featherweight import making, passes, search, tables
from featherweight.artifact import open_artifact
from featherweight.candidates import Facts
from featherweight.cost_table import stored_predictions
from featherweight.errors import (
    ArtifactError,
    BudgetError,
    ExportError,
    LayerError,
    ProcessError,
    TargetError,
    WorkloadError,
)
from featherweight.measure import Measurement
from featherweight.pools import Pool
from featherweight.progress import Progress
from featherweight.recipe import Recipe
from featherweight.trials import Budget, Settings, Trial, claimed, in_words, read_trials
from featherweight.workload import Workload, load
from tests.made_up import measurement
from tests.test_facts import workload_of

TARGET = "onnxruntime"
FACTS = Facts(targets=(TARGET,), folds=True, linear=True, epochs=2.0, multiples={TARGET: 8})
TINY = Path(__file__).parent / "gratings.py"
TRIALS = 8  # of the search of it that is run to its end
SMALL = Budget(0.05, objective="bytes")


# ------------------------------------------------------------------------------------------------ the loop


QUICK = [
    ("featherweight.shaping", "ROUNDS", 1),
    ("featherweight.candidates", "TEACHINGS", ("distill_soft",)),
    ("featherweight.storing", "STORED_ROUNDS", 1),
    ("featherweight.storing", "TAUGHT_ROUNDS", 1),
    ("featherweight.storing", "LONGER_TRIALS", 0),
    ("featherweight.shaping", "FINALISTS", 0),
    ("featherweight.knobs", "BATCHES", (1, 4)),
    ("featherweight.knobs", "ROUNDS", 3),
    ("featherweight.knobs", "ROUND_SECONDS", 0.01),
    ("featherweight.cost_table", "SHARES", (1.0, 0.5)),
    ("featherweight.facts", "FEWEST_STEPS", 4),
    ("featherweight.facts", "MOST_STEPS", 4),
    ("featherweight.measure", "ROUNDS", 3),
    ("featherweight.measure", "ROUND_SECONDS", 0.01),
    ("featherweight.measure", "QUICK_ROUNDS", 3),
    ("featherweight.measure", "QUICK_ROUND_SECONDS", 0.01),
]


@pytest.fixture(scope="module")
def _quick():
    """Two candidates, shortly trained, and short timings: a whole search in seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in QUICK:
            patch.setattr(f"{module}.{name}", value)
        yield


quick = pytest.mark.usefixtures("_quick")


def _search(folder: Path, budget: Budget | None = None, workload: Workload | None = None, **settings) -> search.Result:
    return search.compress(
        workload or load(str(TINY)), budget or Budget(0.05), folder, **{"targets": (TARGET,), "threads": 1, **settings}
    )


class Heard(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.shown: list[dict] = []  # result.json, each time that it was written anew

    def line(self, text: str) -> None:
        self.lines.append(text)

    def saved(self, folder: Path) -> None:
        self.shown.append(json.loads((folder / "result.json").read_text()))


@pytest.fixture(scope="module")
def finished(_quick, tmp_path_factory) -> tuple[search.Result, Heard]:
    heard = Heard()
    workload = load(str(TINY))
    before = {name: value.clone() for name, value in workload.model.state_dict().items()}
    result = _search(tmp_path_factory.mktemp("finished") / "out", SMALL, workload, progress=heard)
    assert all(torch.equal(value, before[name]) for name, value in workload.model.state_dict().items())
    return result, heard


def test_from_a_workload_to_files_that_ship(finished):
    result, heard = finished
    out = result.folder
    assert result.verdict == "accepted" and not result.interrupted and result.binding == ""
    best = result.best
    assert best and result.baseline and best.drop_upper <= 0.05
    assert best.bytes < result.baseline.bytes / 2 and best.test_drop is not None and best.versus_runtime_ratio
    # what ships is what was measured
    artifact = open_artifact(out / "best")
    assert artifact.bytes == best.bytes and artifact.digest == best.digest
    assert (out / "recipe.yaml").read_text() == best.recipe
    # the result on disk says the same
    stored = json.loads((out / "result.json").read_text())
    assert {"verdict", "budget", "baseline", "best", "frontier", "rejected"} <= stored.keys()
    assert Measurement.from_json(json.dumps(stored["best"])) == best
    # one JSON file per trial is left, and no artifact but the best
    trials = list((out / "trials").iterdir())
    assert len(trials) == TRIALS and all(path.suffix == ".json" for path in trials)
    # where the time goes is said
    assert re.fullmatch(r"compressing is expected to take [\d.]+ GB of memory", heard.lines.pop(1))
    assert [line.partition(":")[0] for line in heard.lines][:2] == ["the original", f"fold_batchnorm on {TARGET}"]
    assert re.search(
        r"accepted \[seconds: fold_batchnorm [\d.]+, export [\d.]+, judge [\d.]+, measure [\d.]+\]", heard.lines[1]
    )
    assert {"baseline", "judge", "measure", "export", "distill_soft", "final measurement"} <= result.seconds.keys()


def test_the_best_is_timed_with_other_knobs(finished):
    result, heard = finished
    assert [(knob.threads, knob.batch) for knob in result.knobs] == [
        (1, 1)
    ]  # one thread was asked for: no other is less
    assert any(line.startswith("it runs best on 1 threads with batches of 1: ") for line in heard.lines)
    stored = json.loads((result.folder / "result.json").read_text())["knobs"]
    assert stored == [{"threads": 1, "batch": 1, "latency_ms": result.knobs[0].latency_ms}]


@quick
def test_for_throughput_the_network_as_it_is_says_how_many_inputs_are_run_at_once(tmp_path):
    result = _search(tmp_path, Budget(0.05, objective="throughput"))
    assert result.best and result.best.batch in (1, 4) and result.baseline.batch == result.best.batch
    assert {knob.batch for knob in result.knobs} == {1, 4}
    assert result.budget.cost(result.best) == 1 / result.best.latency_ratio
    assert "has the largest throughput" in result.explain()


@quick
def test_for_latency_shapes_are_predicted_before_they_are_measured(tmp_path, monkeypatch):
    result = _search(tmp_path / "out", Budget(0.05))
    shapes = json.loads((tmp_path / "out" / "shapes.json").read_text())["shapes"]
    assert shapes[0][:2] == [0.0, 0] and all(cost > 0 for _, _, cost in shapes)
    found = {one.digest: one for one in stored_predictions(tmp_path / "out" / "costs.json")}
    shaped = [t for _, t in read_trials(tmp_path / "out") if "prune_channels" in in_words(t.recipe)]
    assert len(shaped) >= 2 and set(found) == {trial.recipe.digest for trial in shaped}
    for trial in shaped:
        assert found[trial.recipe.digest].measured_ms == trial.measurement.latency_ms
    assert result.seconds["costs"] > 0
    monkeypatch.setattr(tables, "cost_table", lambda *_, **__: pytest.fail("was measured again"))
    known = [trial.recipe.digest for _, trial in read_trials(tmp_path / "out")]
    _search(tmp_path / "out", Budget(0.05), resume=True)  # which of two is faster is timed again, and may differ
    assert [trial.recipe.digest for _, trial in read_trials(tmp_path / "out")] == known


@quick
def test_where_int8_loses_too_much_the_layers_that_it_harms_most_stay_in_floats(tmp_path, monkeypatch):
    result = _search(tmp_path / "out", Budget(0.0))
    layers = json.loads((tmp_path / "out" / "fragile.json").read_text())["layers"]
    where = [step.where for _, t in read_trials(tmp_path / "out") for step in t.recipe.steps if step.where != "*"]
    assert layers and f"!{layers[0]}" in where
    assert result.verdict == "accepted" and result.seconds["fragile"] > 0  # the network as it is keeps to any budget
    monkeypatch.setattr(tables, "worst_first", lambda *_: pytest.fail("was computed again"))
    assert _search(tmp_path / "out", Budget(0.0), resume=True).best.digest == result.best.digest


@quick
def test_where_nothing_can_be_predicted_shapes_are_tried_all_the_same(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ArtifactError("the cache is read-only")

    monkeypatch.setattr(tables, "cost_table", fails)
    heard = Heard()
    _search(tmp_path / "out", Budget(0.05), progress=heard)
    assert heard.lines.count("no predictions: the cache is read-only") == 1
    assert any("prune_channels" in line for line in heard.lines)
    assert not (tmp_path / "out" / "costs.json").exists()


def test_while_it_goes_on_the_files_say_what_is_known(finished):
    result, heard = finished
    assert [shown["verdict"] for shown in heard.shown] == ["unfinished"] * TRIALS
    assert heard.shown[-1]["best"]["digest"] == result.best.digest
    costs = [shown["best"]["bytes"] for shown in heard.shown]
    assert costs == sorted(costs, reverse=True)


def test_it_explains_itself(finished):
    result, said = finished[0], finished[0].explain()
    best = in_words(Recipe.from_yaml(finished[0].best.recipe))
    assert f"Accepted: {best} on {TARGET}" in said and "the smallest bytes that keeps to the budget" in said
    taken = {result.best.digest, *(row["digest"] for row in result.rejected)}
    kept = [found for found in result.frontier if found.digest not in taken]
    assert said.count("kept to the budget, but is no better") == len(kept)
    assert all(
        re.search(rf"^  {row['layer']}: .*(int|codebook|rank|folded|distilled|left)", said, re.M)
        for row in finished[0].best.coverage
    )


@quick
def test_going_on_repeats_nothing_and_an_infeasible_budget_gets_the_nearest_point(finished):
    out = finished[0].folder
    before = {path: path.stat().st_mtime_ns for path in (out / "trials").iterdir()}
    heard = Heard()
    budget = Budget(0.05, max_bytes=100, objective="bytes")
    result = _search(out, budget, resume=True, progress=heard)  # no matter of time
    assert [line for line in heard.lines if "out of reach: max_bytes=100: " in line]
    assert {path: path.stat().st_mtime_ns for path in (out / "trials").iterdir()} == before
    assert result.verdict == "infeasible" and result.binding == "max_bytes"
    found = [*result.frontier, *result.rejected]
    assert result.best and result.best.bytes == min(m["bytes"] if isinstance(m, dict) else m.bytes for m in found)
    assert len(result.rejected) == TRIALS and all("above 100" in rejected["reason"] for rejected in result.rejected)
    assert open_artifact(out / "best").digest == result.best.digest
    said = result.explain()
    assert "Infeasible: no recipe keeps to max_bytes. The nearest is" in said and said.count("above 100") == TRIALS


def test_going_on_with_another_network_is_refused(finished):
    other = load(str(TINY))
    with torch.no_grad():
        other.model.head.bias.add_(1.0)
    with pytest.raises(BudgetError, match="the search of another workload"):
        _search(finished[0].folder, workload=other, resume=True)


@pytest.fixture
def imagined(monkeypatch) -> None:
    """Artifacts are made, but their measurements up: no loss, and bytes for milliseconds."""

    def measured(artifact, *_, test: bool, **__) -> Measurement:
        recipe = Recipe.from_yaml(artifact.recipe)
        score = {"test_score": 0.9, "test_drop": 0.0} if test else {}
        return measurement(recipe, bytes=artifact.bytes, latency_ms=artifact.bytes / 1e4, **score)

    monkeypatch.setattr(search, "measure", measured)
    monkeypatch.setattr(search, "soonest", lambda there, *_, **__: min(there, key=lambda artifact: artifact.bytes))


@pytest.fixture
def begun(finished, tmp_path) -> Path:
    """A folder in which the original is measured, and nothing else."""
    shutil.copy(finished[0].folder / "baseline.json", tmp_path)
    return tmp_path


@quick
def test_a_time_limit_ends_with_what_there_is(begun):
    heard = Heard()
    result = _search(begun, time_limit=0.001, resume=True, progress=heard)
    assert result.verdict == "infeasible" and result.best is None and result.binding == "time_limit"
    assert "time limit" in heard.lines[-1]


@quick
@pytest.mark.usefixtures("imagined")
def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(begun, monkeypatch):
    """Whether a pass refuses, or breaks."""
    real = making.build

    def build(recipe, *args, **settings):
        if "distill_soft" in in_words(recipe):
            raise SystemError("a bug")
        if "quantize_static" in in_words(recipe):
            raise LayerError("cannot be done")
        return real(recipe, *args, **settings)

    monkeypatch.setattr(making, "build", build)
    result = _search(begun, Budget(0.02), resume=True)
    reasons = [rejected["reason"] for rejected in result.rejected if "quantize_static" in rejected["recipe"]]
    assert reasons == ["cannot be done", "cannot be done", "SystemError: a bug"]
    assert result.verdict == "accepted" and result.best
    assert {"quantize_dynamic", "prune_channels"} <= {word for path in (begun / "trials").glob("*.json")
        for word in re.findall(r"\w+", json.loads(path.read_text())["recipe"])}  # fmt: skip


@quick
@pytest.mark.usefixtures("imagined")
def test_a_trial_whose_process_was_killed_is_tried_again_when_resumed(begun, monkeypatch):
    """The search goes on without it; nothing of it is stored."""
    real, killed = search.measure, []

    def measured(artifact, *args, **settings):
        if "quantize_static" in artifact.recipe and not killed:
            killed.append(artifact.digest)
            raise ProcessError("was ended by signal 9")
        return real(artifact, *args, **settings)

    monkeypatch.setattr(search, "measure", measured)
    heard = Heard()
    result = _search(begun, resume=True, progress=heard)
    assert [rejected["reason"] for rejected in result.rejected] == ["was ended by signal 9"]
    assert "quantize_static on onnxruntime: failed, to be tried again with --resume: was ended" in "".join(heard.lines)
    stored = [trial.recipe.digest for _, trial in read_trials(begun)]
    assert len(stored) >= 2 and killed[0] not in stored
    assert not _search(begun, resume=True).rejected
    assert killed[0] in {trial.recipe.digest for _, trial in read_trials(begun) if trial.measurement}


@quick
@pytest.mark.usefixtures("imagined")
def test_what_was_made_with_other_versions_is_made_anew(begun, monkeypatch):
    """Trials, and the best one's artifact, which an older torch made; one trial tells of no versions at all."""
    real, names = making.build, []
    best = _search(begun, resume=True).best
    stored = sorted((begun / "trials").glob("*.json"))
    for path, change in (
        (stored[0], lambda found: found.pop("versions")),
        (stored[1], lambda found: found["versions"].update(torch="1.0", onnxruntime="1.1")),
        (begun / "best" / "manifest.json", lambda found: found["versions"].update(torch="1.0")),
    ):
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))
    before = {path: path.read_text() for path in stored}
    monkeypatch.setattr(making, "build", lambda recipe, *a, **k: names.append(recipe.digest) or real(recipe, *a, **k))
    heard = Heard()
    again = _search(begun, resume=True, progress=heard)
    assert {path for path, text in before.items() if path.read_text() != text} == set(stored[:2])
    said = [line for line in heard.lines if "made with other versions are not reused" in line]
    assert len(said) == 1 and re.search(r"torch unknown, now 2\.", said[0]) and "onnxruntime 1.1, now" in said[0]
    assert best and again.best and best.digest == again.best.digest and best.digest in names
    assert open_artifact(begun / "best").manifest["versions"]["torch"] != "1.0"


def test_an_original_that_was_measured_with_other_versions_is_measured_anew(begun, monkeypatch):
    monkeypatch.setattr(search, "versions_of", lambda target: {"torch": "9"})

    def measured(*_, **__):
        raise WorkloadError("measured anew")

    monkeypatch.setattr(search, "baseline", measured)
    with pytest.raises(WorkloadError, match="measured anew"):
        _search(begun, resume=True)


@quick
@pytest.mark.usefixtures("imagined")
def test_an_interrupt_ends_with_the_best_so_far(begun, monkeypatch):
    """A signal comes while the third trial is built."""
    real, count = making.build, iter(range(99))

    def build(*args, **settings):
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **settings)

    monkeypatch.setattr(making, "build", build)
    result = _search(begun, resume=True)
    assert result.interrupted and result.verdict == "accepted"
    assert json.loads((begun / "result.json").read_text())["interrupted"]
    assert result.best and result.best.test_score is None
    assert open_artifact(begun / "best").digest == result.best.digest
    assert len(list((begun / "trials").glob("*.json"))) == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class AtOnce(Pool):
    """Does at once what it is given, as if it were another process; is interrupted at the trial with that number."""

    def __init__(self, fatal: int) -> None:
        super().__init__(workers=2)
        self.numbers, self.fatal = itertools.count(1), fatal

    def submit(self, fn, /, *args, **kwargs):
        if fn is making.made_elsewhere and next(self.numbers) == self.fatal:
            raise KeyboardInterrupt
        done: Future = Future()
        done.set_result(fn(*args, **kwargs))
        return done


@quick
@pytest.mark.usefixtures("imagined")
def test_what_is_made_side_by_side_is_timed_when_all_of_it_is_made(begun, monkeypatch):
    """In the order of the recipes; and what was made before an interrupt is there for the next run."""
    steps = ("fold_batchnorm",), ("fold_batchnorm", "quantize_weights"), ("fold_batchnorm", "quantize_static")
    recipes = [Recipe(tuple(passes.build(name, {}, "test") for name in names), TARGET) for names in steps]
    told: list[str] = []

    def next_recipes(facts, budget, trials):
        known = {trial.recipe.digest for trial in trials}
        return [recipe for recipe in (recipes[1:] if known else recipes[:1]) if recipe.digest not in known]

    def noting(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: told.append(name) or real(*given, **named))

    noting(making, "build")
    noting(search, "measure")
    monkeypatch.setattr(search, "next_recipes", next_recipes)
    monkeypatch.setattr(search, "open_pool", lambda name: AtOnce(fatal=3))
    assert _search(begun, SMALL, pool="processes:1", resume=True).interrupted
    assert told == ["build", "measure", "build"]
    told.clear()
    monkeypatch.setattr(search, "open_pool", lambda name: AtOnce(fatal=0))
    result = _search(begun, SMALL, pool="processes:1", resume=True)
    assert told == ["build", "measure", "measure", "measure"]  # the last for the final measurement
    assert [trial.recipe.digest for _, trial in read_trials(begun)] == [recipe.digest for recipe in recipes]
    assert result.verdict == "accepted" and all(path.suffix == ".json" for path in (begun / "trials").iterdir())


def test_a_batch_takes_as_long_as_what_is_made_side_by_side_and_timed_one_by_one(tmp_path):
    looking = search._Search(workload_of(nn.Linear(8, 2)), SMALL, tmp_path, Settings(0, 1, 1, ""), Progress())
    seconds = {"fold_batchnorm": 1.0, "export": 2.0, "judge": 4.0, "measure": 8.0}
    recipe = Recipe((passes.build("fold_batchnorm", {}, "test"),), TARGET)
    looking.trials = [Trial(recipe, None, "", seconds)]
    assert [looking._seconds_of([recipe] * n, workers=2) for n in (1, 2, 3)] == [7 + 8, 7 + 16, 14 + 24]
    assert looking._seconds_of_final() == 0  # there is nothing yet that could be measured once more
    broken = Trial(recipe, measurement(score=0.1, drop=0.8, drop_upper=0.9), "", {**seconds, "judge": 400.0})
    looking.trials = [Trial(recipe, measurement(), "", seconds), broken]
    assert looking._seconds_of_final() == 2 * (4 + 8)  # of what fits, not of what talks on and on


@quick
def test_an_interrupt_before_the_original_is_measured_leaves_the_folder_free(tmp_path, monkeypatch):
    def baseline(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search, "baseline", baseline)
        result = _search(tmp_path)
    assert result.interrupted and result.baseline is None and result.binding == "interrupted"
    assert not list(tmp_path.iterdir())


@quick
@pytest.mark.usefixtures("imagined")
def test_an_interrupt_at_once_leaves_an_earlier_result_as_it_was(begun, monkeypatch):
    """And folders in trials/ that are not ours stay in any case."""
    _search(begun, resume=True)
    (begun / "trials" / "notes").mkdir()
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}

    def facts_of(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "facts_of", facts_of)
    result = _search(begun, Budget(0.5), resume=True)
    assert result.interrupted
    assert result.best is None or open_artifact(begun / "best").digest == result.best.digest
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed <= {"result.json"} and (begun / "trials" / "notes").is_dir()
    written = json.loads((begun / "result.json").read_text())
    assert written["best"]["digest"] == open_artifact(begun / "best").digest


@quick
@pytest.mark.usefixtures("imagined")
def test_a_final_measurement_that_fails_leaves_the_brief_one_with_a_doubt(begun, monkeypatch):
    real = search.measure

    def measured(*args, test: bool, **settings):
        if test:
            raise WorkloadError("test_score(predict) raised ValueError")
        return real(*args, test=test, **settings)

    monkeypatch.setattr(search, "measure", measured)
    result = _search(begun, resume=True)
    assert result.best and result.best.test_score is None and result.verdict == "accepted"
    assert any("could not be measured fully" in doubt for doubt in result.best.doubts)
    assert json.loads((begun / "result.json").read_text())["best"]["digest"] == result.best.digest


@quick
@pytest.mark.usefixtures("imagined")
@pytest.mark.parametrize(("objective", "asked"), [("latency", True), ("bytes", False)])
def test_of_those_that_seemed_soonest_the_final_one_is_timed_in_turn(begun, objective, asked, monkeypatch):
    seen = []

    def soonest(artifacts, *_, **__):
        seen.append([artifact.bytes for artifact in artifacts])
        return max(artifacts, key=lambda artifact: artifact.bytes)

    monkeypatch.setattr(search, "soonest", soonest)
    result = _search(begun, Budget(0.05, objective=objective), resume=True)
    assert bool(seen) == asked and result.best
    if asked:
        (sizes,) = seen
        assert len(sizes) == search.RETIMED and sizes == sorted(sizes)
        assert result.best.bytes == sizes[-1] > sizes[0]
        assert open_artifact(begun / "best").bytes == sizes[-1]


def test_a_network_that_no_target_takes_is_bad_input(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(ExportError, match=r"even uncompressed.*branches on the data"):
        _search(tmp_path, workload=workload_of(Branches(), score=lambda predict: [1.0] * 4))


def test_a_folder_in_which_another_search_runs_is_refused(tmp_path):
    workload = workload_of(nn.Linear(8, 2), score=lambda predict: pytest.fail("was scored"))
    with claimed(tmp_path, resume=False), pytest.raises(ArtifactError, match="another process searches there"):
        _search(tmp_path, workload=workload)
    assert not list(tmp_path.iterdir())


def test_what_ends_before_the_original_is_measured_leaves_the_folder_empty(tmp_path, monkeypatch):
    def killed(*_, **__):
        raise ProcessError("was ended by signal 9")

    monkeypatch.setattr(search, "baseline", killed)
    for _ in range(2):
        with pytest.raises(ProcessError):
            _search(tmp_path)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"targets": ("abacus",)}, TargetError, "no target 'abacus'"),
        ({"threads": 0}, BudgetError, "threads=0"),
        ({"batch": -1}, BudgetError, "batch=-1"),
        ({"time_limit": math.nan}, BudgetError, "time_limit=nan"),
        ({"pool": "swimming"}, BudgetError, "no pool 'swimming'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_spent(tmp_path, settings, kind, message):
    workload = workload_of(nn.Linear(8, 2), score=lambda predict: pytest.fail("was scored"))
    with pytest.raises(kind, match=message):
        _search(tmp_path, workload=workload, **settings)


# ------------------------------------------------------------------------------------------------ kill -9

CHILD = """
import sys
from pathlib import Path
from importlib import import_module
import torch
torch.set_num_threads(1)
for module, name, value in {quick!r}:
    setattr(import_module(module), name, value)
from featherweight import search, workload
from featherweight.trials import Budget
budget = {budget!r}
settings = {{"targets": ({target!r},), "threads": 1, "resume": True}}
result = search.compress(workload.load({tiny!r}), budget, Path(sys.argv[1]), **settings)
print(result.best.digest, result.best.score)
"""


def _child(folder: Path) -> subprocess.Popen:
    code = CHILD.format(quick=QUICK, tiny=str(TINY), target=TARGET, budget=SMALL)
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)


def test_killed_and_resumed_is_as_good_as_never_killed(finished, begun):
    """kill -9 after the second trial; the trials done are kept as they are, and the result is that of a whole run."""
    child = _child(begun)
    done: list[Path] = []
    deadline = time.monotonic() + 120
    while len(done) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        done = list((begun / "trials").glob("*.json"))
        assert child.poll() is None
    child.kill()
    child.communicate()
    before = {path: (path.stat().st_mtime_ns, path.read_text()) for path in (begun / "trials").glob("*.json")}
    assert len(before) >= 2
    if (begun / "result.json").exists():
        assert json.loads((begun / "result.json").read_text())["verdict"] == "unfinished"

    whole = finished[0]
    assert _child(begun).communicate(timeout=120)[0].split() == [whole.best.digest, str(whole.best.score)]
    assert {path: (path.stat().st_mtime_ns, path.read_text()) for path in before} == before
    names = [sorted(path.name for path in (folder / "trials").iterdir()) for folder in (begun, whole.folder)]
    assert names[0] == names[1]
