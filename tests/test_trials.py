from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.errors import ArtifactError, BudgetError
from featherweight.measure import Measurement
from featherweight.recipe import Recipe
from featherweight.trials import Budget, Trial, best_of, check_folder, claimed, frontier, nearest, read_trials
from tests.made_up import measurement

TARGET = "onnxruntime"


# ------------------------------------------------------------------------------------------------ the budget


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_drop": -0.01}, "zero or more"),
        ({"max_drop": math.nan}, "zero or more"),
        ({"max_drop": "-2%"}, "zero or more"),
        ({"max_drop": "nan%"}, "zero or more"),
        ({"max_drop": "much"}, "is no number"),
        ({"max_drop": "0.01"}, "is no number"),
        ({"max_drop": 0.01, "max_bytes": 0}, "max_bytes=0 cannot be met"),
        ({"max_drop": 0.01, "max_ram": -1}, "max_ram=-1 cannot be met"),
        ({"max_drop": 0.01, "max_latency_ms": math.inf}, "max_latency_ms=inf cannot be met"),
        ({"max_drop": 0.01, "objective": "beauty"}, "There are: latency, bytes"),
    ],
)
def test_budget_that_makes_no_sense(settings, message):
    with pytest.raises(BudgetError, match=message):
        Budget(**settings)


def test_relative_drop_is_of_the_original_score():
    assert Budget("5%").allowed(0.8) == pytest.approx(0.04)
    assert Budget("5%").allowed(-2.0) == pytest.approx(0.1)  # a negated loss, say
    assert Budget(0.05).allowed(0.8) == 0.05


def test_accepted_on_the_upper_bound_of_the_drop_not_on_the_drop():
    budget = Budget(0.01)
    assert "the drop may be 0.011, above 0.01" in budget.objection(measurement(drop=0.009, drop_upper=0.011))
    assert not budget.objection(measurement(drop=0.009, drop_upper=0.01))


def test_every_bound_that_is_exceeded_is_named():
    budget = Budget(0.01, max_bytes=1000, max_latency_ms=1.0)
    objection = budget.objection(measurement(drop=0.2, bytes=2000, latency_ms=3.0))
    assert "drop may be" in objection and "2,000 bytes, above 1,000" in objection and "3 ms, above 1" in objection


@pytest.mark.parametrize(
    ("held", "objection"), [(2000, "2,000 bytes of memory, above 1,000"), (None, "above 1,000"), (900, "")]
)
def test_memory_is_bounded_where_it_was_measured(held, objection):
    assert objection in Budget(0.01, max_ram=1000).objection(measurement(peak_rss_bytes=held))
    assert bool(objection) == bool(Budget(0.01, max_ram=1000).objection(measurement(peak_rss_bytes=held)))


# ------------------------------------------------------------------------------------------------ choosing


def _trials(*found: Measurement) -> list[Trial]:
    return [Trial(Recipe((), TARGET), m) for m in found]


def test_best_is_the_cheapest_that_is_accepted():
    fast, small, bad = (
        measurement(latency_ms=1.0, bytes=300),
        measurement(latency_ms=2.0, bytes=200),
        measurement(latency_ms=0.5, bytes=100, drop=0.1),
    )
    trials = [*_trials(fast, small, bad), Trial(Recipe((), TARGET), None, "failed")]
    chosen = [best_of(trials, Budget(0.01, objective=objective)) for objective in ("latency", "bytes")]
    assert [trial.measurement for trial in chosen if trial] == [fast, small]
    assert best_of(_trials(bad), Budget(0.01)) is None


def test_nearest_goes_by_the_bound_that_is_exceeded_most():
    budget = Budget(0.01, max_bytes=1000)
    light, true = measurement(bytes=1000, drop=0.05, drop_upper=0.06), measurement(bytes=1500)
    chosen = nearest(_trials(light, true), budget)
    assert chosen and chosen.measurement == true  # half too heavy is nearer than six times too lossy
    assert nearest([], budget) is None


def test_frontier_holds_what_nothing_beats_in_both():
    a, b, c = (
        measurement(latency_ms=1, drop=0.03),
        measurement(latency_ms=2, drop=0.01),
        measurement(latency_ms=3, drop=0.02),
    )
    assert frontier([c, b, a], Budget(0.1)) == [a, b]


# ------------------------------------------------------------------------------------------------ on disk


def test_folders_that_are_not_free_are_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"not empty.*--resume"):
        check_folder(tmp_path, resume=False)
    with pytest.raises(ArtifactError, match="no search to go on with"):
        check_folder(tmp_path, resume=True)
    with pytest.raises(ArtifactError, match="is a file"):
        check_folder(tmp_path / "note.txt", resume=False)
    with pytest.raises(ArtifactError, match="cannot be written"):
        check_folder(tmp_path / "note.txt" / "below", resume=False)
    check_folder(tmp_path / "new" / "er", resume=True)


HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from featherweight.trials import claimed
with claimed(Path(sys.argv[1]), resume=False):
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False, stdout=2)
    runs, tell = os.pipe()
    if (forked := os.fork()) == 0:
        os.close(1)
        os.write(tell, b".")  # from here on it holds no lock
        time.sleep(60)
    os.read(runs, 1)
    print(started.pid, forked, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="locks of folders")
def test_two_processes_do_not_search_in_one_folder(tmp_path):
    """The second is refused until the first is dead, though killed, and though what the first started lives on."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    children = [int(word) for word in holder.stdout.readline().split()]
    try:
        for resume in (False, True):
            with pytest.raises(ArtifactError, match=r"in use: another process.*Wait.*--resume.*another folder"):
                check_folder(tmp_path, resume)
        holder.kill()
        holder.wait()
        check_folder(tmp_path, resume=False)  # not refused, and nothing lies in it
    finally:
        holder.kill()
        holder.communicate()
        for child in children:
            os.kill(child, 9)


def test_where_folders_cannot_be_locked_the_search_goes_on(tmp_path: Path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    with claimed(tmp_path, resume=False), claimed(tmp_path, resume=False):
        pass


def test_trials_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "0.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"0\.json cannot be read.*Delete it"):
        read_trials(tmp_path)
    (tmp_path / "trials" / "0.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"0\.json is no trial of this version.*Delete it"):
        read_trials(tmp_path)
