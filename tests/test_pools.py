"""Pools, and searches in them: processes and Ray workers are real, and are killed."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from featherweight import machine, making, measure, pools, search, tables
from featherweight.artifact import MANIFEST, open_artifact, versions_of, write_artifact
from featherweight.damage_table import WAYS, stored_table
from featherweight.errors import (
    ArtifactError,
    BudgetError,
    FeatherweightError,
    LayerError,
    ProcessError,
    TargetError,
    WorkloadError,
)
from featherweight.facts import facts_of, fingerprint
from featherweight.pools import check_pool, open_pool
from featherweight.progress import Progress
from featherweight.recipe import Recipe
from featherweight.trials import Budget, Settings, read_trials
from featherweight.workload import load
from tests.errands import about_me, die, full, hang
from tests.made_up import measurement
from tests.test_facts import workload_of

TARGET = "onnxruntime"
MORTAL = Path(__file__).parent / "mortal.py"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def flag(tmp_path_factory) -> Path:
    """Where it exists, the first process that trains dies."""
    path = tmp_path_factory.mktemp("flag") / "flag"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MORTAL", str(path))
        yield path


@pytest.fixture
def two_cores(monkeypatch) -> list[list[int]]:
    """Whatever machine it is: the first core and the last, which may be the same."""
    allowed = sorted(os.sched_getaffinity(0))
    found = [allowed[:1], allowed[-1:]]
    monkeypatch.setattr(machine, "cores", lambda: found)
    monkeypatch.setattr(machine, "physical_cores", lambda: 2)
    return found


@pytest.fixture(scope="module")
def cluster(flag):
    """Ray with two workers, to which this process is connected, as it may be by its user."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = signal.getsignal(signal.SIGTERM)
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(address="local", num_cpus=2, object_store_memory=128 << 20, **quiet)
    signal.signal(signal.SIGTERM, before)
    yield
    ray.shutdown()


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("foo", BudgetError, "no pool 'foo'.*serial, processes:N, ray and ray:ADDRESS"),
        ("serial:2", BudgetError, "no pool 'serial:2'"),
        ("processes", BudgetError, "does not say how many processes.*processes:2"),
        ("processes:0", BudgetError, "does not say how many processes"),
        ("processes:x", BudgetError, "does not say how many processes"),
        ("processes:1000", BudgetError, r"asks for 1000 processes, but this one may use \d+ processor core.*at most"),
        ("ray:", BudgetError, "names no cluster.*ray:HOST:PORT.*ray:auto"),
        ("ray:host", BudgetError, "names no cluster"),
        ("ray:host:99999", BudgetError, "names no cluster"),
    ],
)
def test_names_that_mean_no_pool_are_refused(name, kind, message):
    with pytest.raises(kind, match=message):
        check_pool(name)


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(pools.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"needs Ray.*pip install 'featherweight\[ray\]'.*processes:N"):
        check_pool("ray")


def test_an_address_where_nobody_listens_is_told_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ProcessError, match=f"No Ray cluster answers at 127.0.0.1:{port}.*ray start --head"):
        open_pool(f"ray:127.0.0.1:{port}")


def test_an_address_where_somebody_else_listens_is_told_within_seconds(monkeypatch):
    monkeypatch.setattr(pools, "PATIENCE_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ProcessError, match=f"No Ray cluster answers at 127.0.0.1:{port}: something listens"):
            open_pool(f"ray:127.0.0.1:{port}")


# ------------------------------------------------------------------------------------------------ executors


def _gone(number: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(number)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return True
        time.sleep(0.05)
    return False


def _holds_for_every_pool_of_processes(pool: pools.Pool, folder: Path) -> list[tuple[int, int, tuple[int, ...]]]:
    assert pool.workers == 2 and pool.threads == 1 and not pool.here
    told = [future.result() for future in [pool.submit(about_me, number) for number in range(4)]]
    assert [number for number, _, _ in told] == [0, 1, 2, 3]
    assert len({process for _, process, _ in told}) == 2 and os.getpid() not in {process for _, process, _ in told}
    with pytest.raises(OSError, match="No space left") as refused:
        pool.submit(full).result()
    assert type(refused.value) is OSError and refused.value.filename == "/there"
    beside = pool.submit(about_me, 5)
    assert pool.submit(die, folder / "once").result() == "alive" and beside.result()[0] == 5
    with pytest.raises(ProcessError, match=r"lost 3 times over.*--pool"):
        pool.submit(die, None).result()
    assert pool.submit(about_me, 6).result()[0] == 6
    return told


def test_serial_does_at_once_what_it_is_given():
    with open_pool("serial") as pool:
        assert pool.here and pool.workers == 1
        assert pool.submit(os.getpid).result() == os.getpid()
        with pytest.raises(OSError, match="No space"):
            pool.submit(full).result()


def test_processes_have_cores_of_their_own_and_a_lost_one_loses_nothing(two_cores, tmp_path):
    with open_pool("processes:2") as pool:
        told = _holds_for_every_pool_of_processes(pool, tmp_path)
        assert {cores for _, _, cores in told} == {tuple(cores) for cores in two_cores}
    assert not multiprocessing.active_children()


def test_threads_are_as_many_as_cores_or_as_the_user_says(two_cores, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with open_pool("processes:1") as pool:
        assert pool.threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with open_pool("processes:1") as pool:
        assert pool.threads == torch.get_num_threads() == 1


def test_after_an_interrupt_no_process_is_left(two_cores, tmp_path):
    with contextlib.suppress(KeyboardInterrupt), open_pool("processes:2") as pool:
        futures = [pool.submit(hang, tmp_path / f"pid{index}") for index in range(3)]
        while not all((tmp_path / f"pid{index}").exists() for index in range(2)):
            time.sleep(0.02)
        begin = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - begin < 10 and all(future.done() for future in futures)
    assert not multiprocessing.active_children()


ORPHANED = """
import sys, time
from pathlib import Path
from featherweight.pools import open_pool
if __name__ == "__main__":
    with open_pool("processes:1") as pool:
        pool.submit(exec, "import os, time; open(%r, 'w').write(str(os.getpid())); time.sleep(100)" % sys.argv[1])
        time.sleep(100)
"""


def test_workers_end_when_the_search_is_killed(tmp_path):
    (script := tmp_path / "script.py").write_text(ORPHANED)
    told = tmp_path / "pid"
    child = subprocess.Popen([sys.executable, script, told], env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not (told.exists() and told.read_text()):
        time.sleep(0.05)
        assert child.poll() is None
    child.kill()
    child.wait()
    assert _gone(int(told.read_text()))


def test_a_script_without_a_guard_is_told_to_have_one(tmp_path):
    (script := tmp_path / "script.py").write_text("from featherweight.pools import open_pool\nopen_pool('processes:1')")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=100).stderr
    assert 'below `if __name__ == "__main__":`' in said.splitlines()[-1]


def test_a_ray_of_its_own_is_gone_afterwards(two_cores, monkeypatch, capfd, tmp_path):
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(pools, "PATIENCE_S", 0.5)
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(KeyboardInterrupt), open_pool("ray") as pool:
        assert not pool.far and signal.getsignal(signal.SIGTERM) == before
        _holds_for_every_pool_of_processes(pool, tmp_path)
        pool.submit(hang, tmp_path / "pid")
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
            time.sleep(0.02)
        raise KeyboardInterrupt
    assert not ray.is_initialized() and _gone(int((tmp_path / "pid").read_text()))
    assert capfd.readouterr().out == ""


def test_a_ray_that_was_there_stays(cluster):
    import ray

    with open_pool("ray") as pool:
        assert pool.far and pool.workers == 2
        assert pool.submit(about_me, 1).result()[0] == 1
    assert ray.is_initialized()


def test_a_worker_that_lacks_the_code_says_what_to_install(cluster, monkeypatch):
    """A function of a module that is not on its path."""
    nowhere = types.ModuleType("nowhere")
    exec("def errand():\n    return 1", vars(nowhere))
    monkeypatch.setitem(sys.modules, "nowhere", nowhere)
    with open_pool("ray") as pool, pytest.raises(TargetError, match=r"No module named 'nowhere'.*on every machine"):
        pool.submit(nowhere.errand).result()


# ------------------------------------------------------------------------------------------------ searches


def _recipe(*steps: str) -> Recipe:
    return Recipe.from_yaml("\n".join(["steps:", *(f"  - {step}" for step in steps), f"target: {TARGET}"]))


FOLD, INT8 = "fold_batchnorm", "quantize_static"
BATCHES = [
    [_recipe(FOLD)],
    [
        _recipe(FOLD, INT8),
        _recipe("prune_channels: {share: 0.3}", "distill_soft: {epochs: 1}", FOLD, INT8),
        _recipe(FOLD, "quantize_weights: {where: none.such}"),
    ],
]


def _next_recipes(facts, budget, trials) -> list[Recipe]:
    known = {trial.recipe.digest for trial in trials}
    fresh = [[recipe for recipe in batch if recipe.digest not in known] for batch in BATCHES]
    return next((batch for batch in fresh if batch), [])


def _baseline(workload, **_) -> measure.Baseline:
    outputs = measure.outputs_on_calibration(workload)
    return measure.Baseline(measurement=measurement(), scores=[0.9], test_scores=None, outputs=outputs)


def _measured(artifact, workload, baseline, *, judgement=None, **_) -> measure.Measurement:
    found = judgement or measure.judge(artifact, workload, baseline.outputs)
    told = {
        "score": float(np.mean(found.scores)),
        "fidelity": found.fidelity,
        "coverage": artifact.manifest["coverage"],
    }
    return measurement(Recipe.from_yaml(artifact.recipe), bytes=artifact.bytes, **told)


@pytest.fixture(scope="module")
def _untimed(flag):
    """Given recipes, and nothing that is timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "next_recipes", _next_recipes)
        patch.setattr(search, "baseline", _baseline)
        patch.setattr(search, "measure", _measured)
        yield


def _search(folder: Path, pool: str, **settings) -> search.Result:
    budget = Budget(0.05, objective="bytes")
    given = {"targets": (TARGET,), "threads": 1, "pool": pool, **settings}
    return search.compress(load(str(MORTAL)), budget, folder, **given)


@pytest.fixture(scope="module")
def serial(_untimed, tmp_path_factory) -> search.Result:
    return _search(tmp_path_factory.mktemp("serial") / "out", "serial")


def _outcome(result: search.Result) -> dict:
    """All but times."""
    told = {}
    for _, trial in read_trials(result.folder):
        found = trial.measurement
        scores = found and (found.score, found.drop_upper, found.fidelity, found.bytes, found.coverage)
        told[trial.recipe.digest] = (scores, trial.error, [stage for stage in trial.seconds if stage != "measure"])
    best = {path.name: path.read_bytes() for path in (result.folder / "best").iterdir()}
    return {
        "order": list(told),
        "trials": told,
        "damages": (result.folder / "damages.json").read_text(),
        "files": best,
        "best": result.best and result.best.digest,
        "verdict": result.verdict,
        "left": sorted(path.name for path in (result.folder / "trials").iterdir()),
    }


def _same_after_a_kill(folder: Path, serial: search.Result, flag: Path, pool: str) -> search.Result:
    flag.touch()
    result = _search(folder, pool)
    assert not flag.exists()  # somebody died
    assert _outcome(result) == _outcome(serial)
    return result


def test_serial_tries_all(serial):
    told = _outcome(serial)
    assert told["order"] == [recipe.digest for batch in BATCHES for recipe in batch]
    assert [bool(error) for _, error, _ in told["trials"].values()] == [False, False, False, True]
    assert serial.verdict == "accepted" and search.POOL not in serial.seconds
    assert len(stored_table(serial.folder / "damages.json")) > len(WAYS)


def test_processes_try_the_same_though_one_is_killed(tmp_path, serial, flag, two_cores):
    result = _same_after_a_kill(tmp_path, serial, flag, "processes:2")
    assert result.seconds[search.POOL] > 0 and result.seconds["measure"] > 0
    assert "judge" not in result.seconds and "distill_soft" not in result.seconds  # side by side they add up to nothing


def test_ray_tries_the_same_though_a_worker_is_killed(cluster, tmp_path, serial, flag):
    """Its workers see no file of the search: artifacts travel."""
    _same_after_a_kill(tmp_path, serial, flag, "ray")


def test_what_lost_workers_were_to_measure_is_measured_here(flag, serial, tmp_path):
    """All were to measure alike; those who know better, such as that the workload is another one, are heard."""
    given = []

    class Lost(pools.Pool):
        error: Exception = ProcessError("lost")

        def submit(self, fn, /, order, entries):
            given.append(collections.Counter(way for _, way in entries))
            done = concurrent.futures.Future()
            done.set_exception(self.error)
            return done

    workload, settings = load(str(MORTAL)), Settings(0, 1, 1, _fingerprint())
    made = tables.Tables(workload, Budget(0.05, objective="bytes"), tmp_path, settings, Progress(), lambda _: None)
    facts = facts_of(workload, (TARGET,))
    assert made.with_few_bits(facts, Lost(workers=len(WAYS))).stored  # as many, so that dealing in order were uneven
    for way in WAYS:
        counts = [part[way] for part in given]
        assert sum(counts) and max(counts) - min(counts) <= 1
    assert (tmp_path / "damages.json").read_text() == (serial.folder / "damages.json").read_text()
    (tmp_path / "damages.json").unlink()
    Lost.error = WorkloadError("another one")
    with pytest.raises(WorkloadError, match="another one"):
        made.with_few_bits(facts, Lost(workers=2))


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_workload_without_a_file_stays_in_its_process(tmp_path):
    workload = workload_of(torch.nn.Linear(8, 2), score=lambda predict: pytest.fail("was scored"))
    with pytest.raises(WorkloadError, match=r"has no file.*pool='processes:1'.*pool serial"):
        search.compress(workload, Budget(0.05), tmp_path / "out", targets=(TARGET,), pool="processes:1")
    assert not (tmp_path / "out").exists()


@functools.cache
def _fingerprint() -> str:
    return fingerprint(load(str(MORTAL)))


def _order(tmp_path: Path, **changes) -> making.Order:
    given = {"source": str(MORTAL), "fingerprint": _fingerprint(), "versions": versions_of(TARGET)}
    return making.Order(BATCHES[0][0].to_yaml(), tmp_path / "trials" / ("0" * 16), **{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"fingerprint": "0" * 16}, WorkloadError, r"another workload in a process of the pool.*parameters"),
        ({"versions": {**versions_of(TARGET), "torch": "1.0"}}, TargetError, r"other versions.*torch 1.0, now 2"),
        ({"source": "nowhere.py"}, WorkloadError, "no file nowhere.py"),
    ],
)
def test_a_process_refuses_to_make_another_trial(flag, tmp_path, changes, kind, message):
    with pytest.raises(kind, match=message):
        making.made_elsewhere(_order(tmp_path, **changes))
    assert not (tmp_path / "trials").exists()


def test_what_is_made_far_away_travels_and_is_judged_there(flag, tmp_path, monkeypatch):
    monkeypatch.setattr(making.tempfile, "tempdir", str(tmp_path / "far"))
    left = tmp_path / "far" / "featherweight-search" / f".{'0' * 16}.1-abc.partial"  # by a process that was killed
    left.mkdir(parents=True)
    made = making.made_elsewhere(_order(tmp_path, far="search"))
    assert made.artifact is None and made.judgement and {"fold_batchnorm", "export", "judge"} == made.seconds.keys()
    assert not any((tmp_path / "far").iterdir()) and not (tmp_path / "trials").exists()
    artifact = write_artifact(made.files, tmp_path / "here")
    assert artifact.digest == BATCHES[0][0].digest and open_artifact(tmp_path / "here") == artifact
    monkeypatch.setattr(making, "build", lambda *_, **__: pytest.fail("was built again"))
    again = making.made_elsewhere(_order(tmp_path, far="search", files=made.files))
    assert again.judgement == made.judgement and again.files == made.files


def test_files_that_came_to_harm_on_the_way_are_refused(flag, tmp_path):
    files = making.made_elsewhere(_order(tmp_path, far="search")).files
    name = next(name for name in files if name != MANIFEST)
    for harmed in ({**files, name: files[name][:-1]}, {**files, "../strange": b""}):
        with pytest.raises(ArtifactError, match=r"not as it was written|'../strange' is not allowed"):
            write_artifact(harmed, tmp_path / "here")
    assert not (tmp_path / "here").exists() and not (tmp_path / "strange").exists()


def test_failures_are_told_alike_wherever_they_happen(flag, tmp_path, monkeypatch):
    """What befalls the recipe becomes words; what would befall the next one too is raised, so that it can be sent."""

    class Odd(OSError):
        def __init__(self, one, two):
            super().__init__(one)

    def fails(problem: Exception) -> making.Made:
        def build(*_, **__):
            raise problem

        monkeypatch.setattr(making, "build", build)
        return making.made_elsewhere(_order(tmp_path))

    for problem, error, by_chance in (
        (LayerError("cannot be done"), "cannot be done", False),
        (SystemError("a bug"), "SystemError: a bug", False),
        (ProcessError("was killed"), "was killed", True),
    ):
        made = fails(problem)
        assert (made.error, made.by_chance, made.artifact) == (error, by_chance, None)
    with pytest.raises(OSError, match="Odd: disk") as refused:
        fails(Odd("disk", "full"))
    assert type(refused.value) is OSError
    full = FeatherweightError("cannot be written")
    full.__cause__ = OSError(28, "No space")
    with pytest.raises(FeatherweightError, match="cannot be written"):
        fails(full)
