from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from featherweight import parallel
from featherweight.artifact import Artifact, build
from featherweight.errors import ArtifactError, DataError, ProcessError, SettingError, TargetError
from featherweight.parallel import predict, predict_file, predict_together
from featherweight.recipe import Recipe
from featherweight.replica import Replica
from featherweight.workload import load

TINY = Path(__file__).parent / "gratings.py"
TARGETS = ("onnxruntime", "openvino", "torch")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> dict[str, Artifact]:
    folder, workload = tmp_path_factory.mktemp("artifacts"), load(str(TINY))
    return {name: build(Recipe((), name), workload, folder / name) for name in TARGETS}


@pytest.fixture(scope="module")
def images(artifacts) -> np.ndarray:
    (spec,) = parallel.inputs_of(artifacts["onnxruntime"])
    return np.random.default_rng(0).standard_normal((37, *spec.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def alone(artifacts, images) -> np.ndarray:
    """What one process makes of all rows, one batch of four after the other."""
    run = artifacts["onnxruntime"].load(threads=1)
    padded = np.concatenate([images, np.repeat(images[-1:], 3, axis=0)])
    return np.concatenate([run([padded[at : at + 4]])[0] for at in range(0, 40, 4)])[:37]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_replicas_compute_what_one_process_computes(replicas, artifacts, images, alone):
    """Each row once, in its place, bit for bit; the last shard is shorter than the others."""
    with pytest.warns(UserWarning, match="gain nothing") if replicas > parallel.physical_cores() else _quietly():
        (found,) = predict(artifacts["onnxruntime"], [images], replicas=replicas, threads=1, batch=4)
    assert np.array_equal(found, alone)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_replicas(target, artifacts, images, alone):
    (found,) = predict(artifacts[target], [images], replicas=1, threads=1, batch=4)
    np.testing.assert_allclose(found, alone, atol=1e-4)


def test_shards_cover_every_row_once():
    spans = [(0, 10), (13, 14), (20, 23)]
    rows = [row for begin, end in parallel.shards(spans, 4) for row in range(begin, end)]
    assert rows == [*range(10), 13, 20, 21, 22]


def test_fewer_rows_than_replicas_are_computed_all_the_same(artifacts, images, alone):
    (found,) = predict(artifacts["onnxruntime"], [images[:1]], replicas=2, threads=1, batch=4)
    np.testing.assert_allclose(found, alone[:1], atol=1e-5)


def test_auto_measures_and_says_what_it_chose(artifacts, images, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "MEASURED_S", 0.02)
    np.savez(tmp_path / "in.npz", anything=images)
    said: list[str] = []
    setting = predict_file(artifacts["onnxruntime"], tmp_path / "in.npz", tmp_path / "out.npz", say=said.append)
    assert said == [str(setting)] and setting.batch <= 37
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose(found["output0"], alone, atol=1e-5)


def test_latency_wants_single_rows(artifacts, images, monkeypatch):
    monkeypatch.setattr(parallel, "MEASURED_S", 0.02)
    setting = parallel.settled(
        artifacts["onnxruntime"], lambda: parallel._Arrays([images]), "auto", None, None, "cpu", "latency"
    )
    assert (setting.replicas, setting.batch) == (1, 1)


# ------------------------------------------------------------------------------------------------ what goes wrong


def killing(monkeypatch, when, number=signal.SIGKILL) -> list[int]:
    """Kills the process that is asked for a shard, where `when` says so of how often that has happened."""
    killed: list[int] = []
    compute, asked = Replica.compute, [0]

    def deadly(replica: Replica, slot: int, rows: int) -> None:
        asked[0] += 1
        if when(asked[0]):
            os.kill(replica.pid, number)
            killed.append(replica.pid)
        compute(replica, slot, rows)

    monkeypatch.setattr(Replica, "compute", deadly)
    return killed


def test_a_replica_that_dies_is_replaced_and_nothing_is_lost(artifacts, images, alone, monkeypatch):
    killed = killing(monkeypatch, lambda count: count == 3)
    with pytest.warns(UserWarning, match=r"A replica was lost \(ended by signal 9\).* rows \d+ to \d+ again"):
        (found,) = predict(artifacts["onnxruntime"], [images], replicas=1, threads=1, batch=4)
    assert len(killed) == 1 and np.array_equal(found, alone)


@pytest.mark.filterwarnings("ignore:A replica was lost")
def test_a_shard_at_which_two_replicas_die_is_named(artifacts, images, monkeypatch):
    killing(monkeypatch, lambda count: True)
    with pytest.raises(ProcessError, match=r"computes rows 0 to 3 was lost .* second one to die there"):
        predict(artifacts["onnxruntime"], [images], replicas=1, threads=1, batch=4)


def test_an_error_of_the_runtime_names_the_rows(artifacts, images, monkeypatch):
    monkeypatch.setattr(
        parallel, "outputs_of", lambda artifact: [parallel.Rows("output0", (99,), "<f4")]
    )  # as if the manifest said so
    with pytest.raises(ArtifactError, match=r"Rows 0 to \d+ cannot be computed: The network returned float32 of shape"):
        predict(artifacts["onnxruntime"], [images], replicas=1, threads=1, batch=4)


def test_a_run_that_was_killed_goes_on(artifacts, images, alone, tmp_path):
    """Rows that an earlier run wrote are not computed again."""
    np.savez(tmp_path / "in.npz", x=images)
    settings = {"replicas": 1, "threads": 1, "batch": 4}
    out, shown = tmp_path / "out.npz", []

    def interrupt(done: int, rows: int) -> None:
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_file(artifacts["onnxruntime"], tmp_path / "in.npz", out, **settings, told=interrupt)
    assert not out.exists()
    told = lambda done, rows: shown.append(done)  # noqa: E731
    predict_file(artifacts["onnxruntime"], tmp_path / "in.npz", out, **settings, told=told)
    assert shown[0] >= 12 and shown[-1] == 37
    with np.load(out) as found:
        assert np.array_equal(found["output0"], alone)


def test_ctrl_c_leaves_no_process(artifacts, tmp_path):
    rows = np.zeros((200_000, *parallel.inputs_of(artifacts["onnxruntime"])[0].shape), np.float32)
    np.save(tmp_path / "in.npy", rows)
    command = [sys.executable, "-m", "featherweight", "predict", artifacts["onnxruntime"].folder, tmp_path / "in.npy"]
    command += ["--out", tmp_path / "out.npy", "--replicas", "1", "--batch", "1"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # nohup, say, lets nobody hear Ctrl-C
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heard)
    while not _children(process.pid):
        assert process.poll() is None
        time.sleep(0.05)
    children = _children(process.pid)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and said.endswith("featherweight: interrupted\n"), said
    assert "Traceback" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def _children(pid: int) -> list[int]:
    try:
        return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.mark.parametrize(
    ("inputs", "settings", "kind", "message"),
    [
        (lambda x: [x[:0]], {}, DataError, "There are no examples in the inputs"),
        (lambda x: [x, x], {}, DataError, "reads 1 arrays, but 2 were given"),
        (lambda x: [x.astype(np.float64)], {}, DataError, "is float64, but the network reads float32"),
        (lambda x: [x[:, :, :-1]], {}, DataError, r"has shape \(.*\), but the network reads \(.*\) as"),
        (lambda x: [x], {"replicas": 0}, SettingError, "neither auto nor a whole number"),
        (lambda x: [x], {"batch": 0}, SettingError, "batch=0 is no whole number"),
        (lambda x: [x], {"objective": "fun"}, SettingError, "no objective 'fun'"),
        (lambda x: [x], {"device": "cuda"}, TargetError, "onnxruntime cannot run on cuda"),
        (lambda x: [x], {"device": "abacus"}, TargetError, "onnxruntime cannot run on abacus"),
    ],
)
def test_bad_input_is_refused_before_a_process_begins(inputs, settings, kind, message, artifacts, images, monkeypatch):
    monkeypatch.setattr(Replica, "restart", lambda self: pytest.fail("a process was begun"))
    with pytest.raises(kind, match=message):
        predict(artifacts["onnxruntime"], inputs(images), **settings)


@pytest.mark.parametrize("target", ["openvino", "torch"])
def test_devices_that_are_not_there_are_refused(target, artifacts, images):
    for device in ("cuda", "tpu"):
        with pytest.raises(TargetError, match=f"{target} cannot run on {device}"):
            predict(artifacts[target], [images], device=device)


def test_a_damaged_input_writes_nothing(artifacts, images, tmp_path):
    np.savez(tmp_path / "in.npz", x=images)
    content = bytearray((tmp_path / "in.npz").read_bytes())
    content[content.rindex(images[-1].tobytes())] ^= 1
    (tmp_path / "in.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"'x' in .* is damaged: Bad CRC-32"):
        predict_file(artifacts["onnxruntime"], tmp_path / "in.npz", tmp_path / "out.npz", replicas=1, batch=4)
    assert not (tmp_path / "out.npz").exists()


# ------------------------------------------------------------------------------------------------ several networks


@pytest.mark.parametrize("order", [("onnxruntime", "openvino"), ("openvino", "onnxruntime")])
def test_networks_are_combined_in_their_order(order, artifacts, images, tmp_path):
    np.savez(tmp_path / "in.npz", x=images)
    both = [artifacts[name] for name in order]
    settings = {"replicas": 1, "threads": 1, "batch": 4}
    predict_together(both, tmp_path / "in.npz", tmp_path / "out.npz", "mean", [3.0, 1.0], **settings)
    a, b = (predict(artifact, [images], **settings)[0].astype(np.float64) for artifact in both)
    with np.load(tmp_path / "out.npz") as found:
        assert np.array_equal(found["output0"], ((3 * a + b) / 4).astype(np.float32))
    assert {path.name for path in tmp_path.iterdir()} == {"in.npz", "out.npz"}


def test_networks_vote(artifacts, images, alone, tmp_path):
    np.savez(tmp_path / "in.npz", x=images)
    all_ = [artifacts[name] for name in TARGETS]
    predict_together(all_, tmp_path / "in.npz", tmp_path / "out.npy", "vote", [1.0] * 3, replicas=1, batch=4)
    assert np.array_equal(np.load(tmp_path / "out.npy"), alone.argmax(axis=1))


def _quietly():
    import contextlib

    return contextlib.nullcontext()
