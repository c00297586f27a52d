from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from featherweight import timing
from featherweight.errors import ArtifactError, ProcessError, WorkloadError
from featherweight.timing import Interval, Subject, interleave, keeping_originals, latency, ratio, started, turn

WORKLOAD = """
    import os, sys, time
    import torch
    from featherweight import Workload

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 2)

        def forward(self, x, scale):
            FORWARD
            return self.linear(x) * scale

    def workload():
        BODY
        example = {"x": torch.ones(2, 4), "scale": torch.ones(2, 1)}
        return Workload(model=Net().eval(), example=example, calibration=[example], score=lambda predict: 1.0)
"""
INPUTS = [np.full((1, 4), 3, np.float32), np.ones((1, 1), np.float32)]
QUICK = {"rounds": 5, "round_seconds": 0.01}


def workload_file(folder: Path, body: str = "pass", forward: str = "pass") -> str:
    path = folder / "work.py"
    path.write_text(textwrap.dedent(WORKLOAD).replace("BODY", body).replace("FORWARD", forward))
    return str(path)


def children() -> set[int]:
    """The processes that this one has started and that still are."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(child) for task in tasks for child in (task / "children").read_text().split()}


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


# ------------------------------------------------------------------------------------------------ mathematics


def test_ratio_compares_round_with_round() -> None:
    # The machine gets four times slower from round to round, which leaves the ratio of 2 untouched.
    a = [[4.0 * 4**i] * 3 for i in range(9)]
    b = [[2.0 * 4**i] * 3 for i in range(9)]
    assert ratio(a, b) == Interval(2.0, 2.0, 2.0)


def test_ratio_is_not_moved_by_single_samples_or_a_single_bad_round() -> None:
    a = [[2.0, 2.0, 90.0] for _ in range(9)]
    b = [[1.0, 1.0, 1.0] for _ in range(9)]
    b[4] = [30.0, 30.0, 30.0]
    found = ratio(a, b)
    assert found.median == 2.0 and found.high == 2.0


def test_ratio_is_the_same_for_the_same_seed_and_inverts() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(0.7, 0.1, (15, 5)).tolist(), rng.lognormal(0, 0.1, (15, 5)).tolist()
    assert ratio(a, b, seed=4) == ratio(a, b, seed=4)
    there, back = ratio(a, b), ratio(b, a)
    assert there.low < there.median < there.high
    assert back.low == pytest.approx(1 / there.high, rel=0.02) and back.high == pytest.approx(1 / there.low, rel=0.02)


def simulate(trials: int, truth: float, rounds: int) -> list[Interval]:
    rng = np.random.default_rng(1)
    found = []
    for _ in range(trials):
        machine = rng.lognormal(0, 0.5, (rounds, 1))  # moods of the machine, shared within a round
        a = truth * machine * rng.lognormal(0, 0.08, (rounds, 5))
        b = machine * rng.lognormal(0, 0.08, (rounds, 5))
        found.append(ratio(a.tolist(), b.tolist()))
    return found


@pytest.mark.parametrize("rounds", [7, 15])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(rounds: int) -> None:
    found = simulate(200, 1.5, rounds)
    assert np.mean([interval.low <= 1.5 <= interval.high for interval in found]) >= 0.92
    assert np.mean([interval.low > 1 for interval in found]) > 0.99, "a true gain of 1.5 must be seen"


def test_the_same_against_itself_is_hardly_ever_called_faster() -> None:
    assert np.mean([interval.low > 1 for interval in simulate(200, 1.0, 15)]) <= 0.05


@pytest.mark.parametrize("rounds", [1, 4])
def test_a_few_rounds_prove_nothing(rounds: int) -> None:
    assert ratio([[3.0]] * rounds, [[1.0]] * rounds) == Interval(3.0, 0.0, float("inf"))


@pytest.mark.parametrize(("a", "b"), [([], []), ([[1.0]], [[1.0], [2.0]])])
def test_rounds_must_pair_up(a: list[list[float]], b: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="round with round"):
        ratio(a, b)


def test_latency_weighs_rounds_equally() -> None:
    assert latency([[1.0] * 100, [2.0], [3.0]]) == 2.0


def test_everybody_begins_and_follows_everybody_equally_often() -> None:
    for count in (2, 3, 4):
        orders = [turn(count, number) for number in range(2 * count)]
        for order in orders:
            assert sorted(order) == list(range(count))
        for place in range(count):
            assert sorted(order[place] for order in orders) == sorted([*range(count)] * 2)
        after = [(a, b) for order in orders for a, b in itertools.pairwise(order)]
        if count > 2:
            assert all((b, a) in after for a, b in after)


# ------------------------------------------------------------------------------------------------ in this process


def test_subjects_take_turns_and_the_first_run_of_a_turn_is_not_counted() -> None:
    log: list[str] = []
    subjects = [Subject(name, run=lambda name=name: log.append(name) or time.sleep(0.002)) for name in "abc"]
    found = interleave(subjects, [], rounds=6, round_seconds=0.004)
    assert [len(found.rounds[name]) for name in "abc"] == [6, 6, 6]
    blocks = [log[i] for i in range(len(log)) if i == 0 or log[i] != log[i - 1]]
    counted = {name: sum(len(samples) for samples in found.rounds[name]) for name in "abc"}
    assert all(log.count(name) >= counted[name] + 6 for name in "abc"), "each turn has one run more than it counts"
    assert sorted(blocks[-3:]) == ["a", "b", "c"]
    assert all(sample >= 2.0 for samples in found.rounds["a"] for sample in samples), "milliseconds"
    assert found.peak_rss_bytes == found.start_rss_bytes == {"a": None, "b": None, "c": None}


def test_slow_subjects_run_once_a_round_and_fast_ones_often() -> None:
    subjects = [Subject("slow", run=lambda: time.sleep(0.03)), Subject("fast", run=lambda: None)]
    found = interleave(subjects, [], **QUICK)
    assert {len(samples) for samples in found.rounds["slow"]} == {1}
    (runs,) = {len(samples) for samples in found.rounds["fast"]}
    assert 20 < runs <= timing.MOST_RUNS


def test_time_limit_ends_after_five_rounds_at_the_earliest() -> None:
    found = interleave([Subject("a", run=lambda: None)], [], rounds=50, round_seconds=0.001, limit_seconds=0)
    assert len(found.rounds["a"]) == 5


def test_threads_of_this_process_are_set_and_given_back() -> None:
    before, seen = torch.get_num_threads(), set()
    interleave([Subject("a", run=lambda: seen.add(torch.get_num_threads()))], [], threads=before + 1, **QUICK)
    assert seen == {before + 1} and torch.get_num_threads() == before


def test_waiting_for_a_processor_is_noticed() -> None:
    if timing._scheduled() is None or not hasattr(os, "sched_setaffinity"):
        pytest.skip("the system does not say how long processes wait")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as rival:  # on the same processor
            found = interleave([Subject("a", run=lambda: sum(range(100_000)))], [], rounds=5, round_seconds=0.1)
            rival.kill()
    finally:
        os.sched_setaffinity(0, before)
    share = found.waiting_share["a"]
    assert share is not None and 0.2 < share < 1
    asleep = interleave([Subject("b", run=lambda: time.sleep(0.01))], [], **QUICK).waiting_share["b"]
    assert asleep is not None and 0 <= asleep <= 1, "who sleeps does not wait"


def test_garbage_is_not_collected_while_the_clock_runs() -> None:
    import gc

    seen = set()
    timing._timed(lambda: seen.add(gc.isenabled()), 3)
    assert False in seen and gc.isenabled()


@pytest.mark.parametrize("places", [{}, {"run": print, "workload": "x"}, {"folder": Path("x"), "workload": "x"}])
def test_a_subject_is_one_thing(places: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Subject("a", **places)  # type: ignore[arg-type]


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="names of their own"):
        interleave([Subject("a", run=print), Subject("a", run=print)], [])


# ------------------------------------------------------------------------------------------------ fresh processes

# Python reads sitecustomize.py when it starts: so workers, too, have a target that needs neither torch nor a runtime.
STANDIN = """
import os, subprocess, sys, time
import featherweight.targets as targets

class Standin(targets.Target):
    def export(self, model, workload, folder):
        raise NotImplementedError

    profile = export

    def load(self, folder, threads):
        code = compile((folder / "code").read_text(), "code", "exec")
        values = {"folder": folder}
        exec(code, globals(), values)
        return values["run"]

targets.names = lambda: ("standin",)
targets.find = lambda name: Standin()
"""


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Subject]:
    """An artifact whose network is a few lines of Python: `run` as a function of arrays."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(STANDIN)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def make(code: str) -> Subject:
        folder = tmp_path / "best"
        folder.mkdir()
        contents = {"code": textwrap.dedent(code), "recipe.yaml": "", "vectors.safetensors": ""}
        files = {}
        for name, content in contents.items():
            (folder / name).write_text(content)
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content.encode()).hexdigest()}
        manifest = {
            "format": 1,
            "featherweight": "0",
            "recipe_digest": "0" * 16,
            "target": "standin",
            "files": files,
            "inputs": [{"name": "x", "dtype": "float32", "shape": [None, 4]}],
            "outputs": [{"dtype": "float32", "shape": [None, 4]}],
            "parameters": 0,
            "int8_layers": 0,
            "export_error": 0.0,
            "coverage": [],
            "versions": {},
            "seed": 0,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return Subject("artifact", folder=folder)

    return make


def test_an_artifact_runs_on_the_inputs_in_a_process_of_its_own(standin: Callable[[str], Subject]) -> None:
    subject = standin(f"""
        def run(inputs):
            print("noise")
            assert os.getpid() != {os.getpid()} and os.getsid(0) == os.getpid()
            assert sys.stdin.read() == "" and os.system("echo more noise") == 0
            assert inputs[0].tolist() == [[3, 3, 3, 3]] and inputs[1].tolist() == [[1]]
            assert "torch" not in sys.modules
            assert {{os.environ[name] for name in {timing.THREAD_VARIABLES}}} == {{"3"}}
            block = bytearray(100 << 20)
        """)
    found = interleave([subject, Subject("here", run=lambda: None)], INPUTS, threads=3, **QUICK)
    assert {name: len(rounds) for name, rounds in found.rounds.items()} == {"artifact": 5, "here": 5}
    start, peak = found.start_rss_bytes["artifact"], found.peak_rss_bytes["artifact"]
    assert start is not None and peak is not None and 5 << 20 < start < peak - (100 << 20)
    assert found.peak_rss_bytes["here"] is None


def test_relative_folders_are_this_process_s(
    standin: Callable[[str], Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin("run = lambda inputs: inputs")
    monkeypatch.chdir(tmp_path)
    assert len(interleave([Subject("a", folder=Path("best"))], INPUTS, **QUICK).rounds["a"]) == 5


def test_a_damaged_artifact_is_not_run(standin: Callable[[str], Subject]) -> None:
    subject = standin("run = lambda inputs: inputs")
    assert subject.folder is not None
    (subject.folder / "extra").write_text("")
    with pytest.raises(ArtifactError, match="'extra' is not in the manifest"):
        interleave([subject], INPUTS, **QUICK)


def test_a_worker_that_dies_is_explained_with_its_last_words(standin: Callable[[str], Subject]) -> None:
    subject = standin(r"""
        def run(inputs):
            print("out of\nsteam")
            sys.stdout.flush()
            os._exit(9)
        """)
    with pytest.raises(ArtifactError) as caught:
        interleave([subject], INPUTS, **QUICK)
    message = str(caught.value)
    assert "The process that times 'artifact' ended with exit code 9 before it answered" in message
    assert message.endswith("Its last words:\nout of\nsteam") and "choose another target" in message


def test_a_worker_that_is_killed_says_by_which_signal(standin: Callable[[str], Subject]) -> None:
    with pytest.raises(ProcessError, match=r"was ended by signal 9 before it answered\..*make room and try again"):
        interleave([standin("os.kill(os.getpid(), 9)")], INPUTS, **QUICK)


def test_a_worker_that_hangs_is_given_up(standin: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TIMEOUT_S", 0.1)
    monkeypatch.setattr(timing, "PATIENCE_S", 0.1)
    with pytest.raises(ProcessError, match="gave no answer within 0 s"):
        interleave([standin("time.sleep(600)")], INPUTS, **QUICK)


def test_a_worker_that_runs_out_of_memory_is_no_fault_of_the_artifact(standin: Callable[[str], Subject]) -> None:
    with pytest.raises(ProcessError, match="process that times 'artifact' ran out of memory"):
        interleave([standin("def run(inputs): raise MemoryError")], INPUTS, **QUICK)


def test_processes_end_with_the_block_and_those_that_they_started_too(
    standin: Callable[[str], Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "PATIENCE_S", 0.2)
    subject = standin(f"""
        child = subprocess.Popen(["sleep", "600"])
        open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
        run = lambda inputs: inputs
        """)
    with pytest.raises(KeyboardInterrupt), started([subject], INPUTS, 1):
        raise KeyboardInterrupt
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2 and not any(ends(pid) is False for pid in pids)


def test_a_worker_ends_when_its_parent_is_killed(standin: Callable[[str], Subject]) -> None:
    subject = standin("run = lambda inputs: inputs")
    code = f"""
import sys
from pathlib import Path
from featherweight.timing import Subject, started
with started([Subject("a", folder=Path({str(subject.folder)!r}))], [], 1) as (worker,):
    print(worker._process.pid, flush=True)
    sys.stdin.read()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert ends(pid)


def ends(pid: int) -> bool:
    """Whether a process ends within 20 s; one that only waits to be collected has ended."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_inputs_are_handed_over_as_they_are(tmp_path: Path) -> None:
    arrays = [
        np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        np.array([[True], [False]]),
        np.arange(8, dtype=np.float16).reshape(2, 4)[:, ::2],
    ]
    timing._write_inputs(tmp_path / "inputs", arrays)
    read = load_file(tmp_path / "inputs")
    for index, array in enumerate(arrays):
        assert read[f"input{index}"].dtype == array.dtype and np.array_equal(read[f"input{index}"], array)


# ------------------------------------------------------------------------------------------------ the original


def test_the_original_runs_as_the_workload_s_file_makes_it_and_is_kept_while_asked_for(tmp_path: Path) -> None:
    note = tmp_path / "loads"
    spec = workload_file(
        tmp_path,
        body=f'torch.set_num_threads(5); print("noise"); open({str(note)!r}, "a").write("x")',
        forward="assert len(x) == 2 or (x.sum() in (12, 24) and torch.is_inference_mode_enabled() "
        "and torch.get_num_threads() == 2)",
    )
    original, others = Subject("original", workload=spec), children()
    with keeping_originals():
        first = interleave([original], INPUTS, threads=2, **QUICK)
        again = interleave([original], INPUTS, threads=2, **QUICK)
        assert note.read_text() == "x" and len(again.rounds["original"]) == len(first.rounds["original"]) == 5
        interleave([original], [INPUTS[0] * 2, INPUTS[1]], threads=2, **QUICK)
        assert note.read_text() == "xx", "other inputs need another process"
        assert len(children() - others) == 2
        with pytest.raises(RuntimeError), started([original], INPUTS, 2):
            raise RuntimeError
        assert len(children() - others) == 1, "what was in use when something failed is not kept"
    start, peak = first.start_rss_bytes["original"], first.peak_rss_bytes["original"]
    assert start is not None and peak is not None and start < peak


def test_errors_of_the_workload_come_back_as_what_they_are(tmp_path: Path) -> None:
    spec = workload_file(tmp_path, forward='if len(x) == 1: raise KeyError("batch 1")')
    with pytest.raises(WorkloadError, match=r"raised KeyError: 'batch 1'\. .* run its file alone"):
        interleave([Subject("original", workload=spec)], INPUTS, **QUICK)
    with pytest.raises(WorkloadError, match=r"There is no file nowhere\.py"):
        interleave([Subject("original", workload="nowhere.py")], INPUTS, **QUICK)
