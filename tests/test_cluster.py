from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from featherweight import cluster, parallel
from featherweight.artifact import Artifact, build
from featherweight.cluster import predict_ray
from featherweight.errors import DataError, ProcessError, SettingError
from featherweight.pools import connected
from featherweight.recipe import Recipe
from featherweight.workload import load

TINY = Path(__file__).parent / "gratings.py"
ROWS, BATCH = 203, 4


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with connected(""):
        yield


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    return build(Recipe((), "onnxruntime"), load(str(TINY)), tmp_path_factory.mktemp("artifacts") / "onnxruntime")


@pytest.fixture(scope="module")
def images(artifact) -> np.ndarray:
    (spec,) = parallel.inputs_of(artifact)
    return np.random.default_rng(0).standard_normal((ROWS, *spec.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def local(artifact, images) -> np.ndarray:
    """What replicas on this machine make of all rows."""
    return parallel.predict(artifact, [images], replicas=2, threads=1, batch=BATCH)[0]


@pytest.fixture
def source(images, tmp_path) -> Path:
    np.savez(tmp_path / "in.npz", images=images)
    return tmp_path / "in.npz"


@pytest.fixture
def many(monkeypatch) -> None:
    """As many stretches as there are batches, so that something can happen between them."""
    monkeypatch.setattr(cluster, "STRETCHES", 10_000)


def outputs(path: Path) -> np.ndarray:
    with np.load(path) as found:
        return found["output0"]


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_outputs_are_those_of_this_machine_bit_for_bit(replicas, artifact, source, local, tmp_path):
    predict_ray(artifact, source, tmp_path / "out.npz", replicas=replicas, batch=BATCH)
    assert np.array_equal(outputs(tmp_path / "out.npz"), local)


def test_parquet_is_read_and_written(artifact, images, local, tmp_path):
    table = pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(images)})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=50)
    predict_ray(artifact, tmp_path / "in.parquet", tmp_path / "out.parquet", replicas=2, batch=BATCH)
    found = pq.read_table(tmp_path / "out.parquet")["output0"].combine_chunks()
    assert np.array_equal(found.to_numpy_ndarray(), local)


PREPARE = """
import numpy as np
def prepare(image):
    return np.asarray(image, np.float32)[None] / 255
"""


def test_images_are_read(artifact, images, tmp_path):
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(1).integers(0, 255, (21, *images.shape[2:]), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "in" / f"{number:03}.png")
    (tmp_path / "make.py").write_text(PREPARE)
    command = ["predict", artifact.folder, tmp_path / "in", "--out", tmp_path / "out.npz", "--batch", BATCH]
    command += ["--engine", "ray", "--prepare", tmp_path / "make.py", "--replicas", 1]
    subprocess.run([sys.executable, "-m", "featherweight", *map(str, command)], check=True)
    rows = pixels[:, None].astype(np.float32) / 255
    (wanted,) = parallel.predict(artifact, [rows], replicas=1, threads=1, batch=BATCH)
    assert np.array_equal(outputs(tmp_path / "out.npz"), wanted)


def replica_pids() -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if "_Replica" in " ".join(process.info["cmdline"] or []):
                found.append(process.pid)
    return found


@pytest.mark.usefixtures("many")
def test_a_replica_that_is_killed_loses_nothing(artifact, source, local, tmp_path):
    killed: list[int] = []

    def told(done: int, rows: int) -> None:
        if done and not killed:
            killed.append(replica_pids()[0])
            os.kill(killed[0], signal.SIGKILL)

    predict_ray(artifact, source, tmp_path / "out.npz", replicas=2, batch=BATCH, told=told)
    assert killed
    assert np.array_equal(outputs(tmp_path / "out.npz"), local)


@pytest.mark.usefixtures("many")
def test_a_run_that_was_interrupted_goes_on(artifact, source, local, tmp_path):
    class Stop(Exception):
        pass

    def stop(done: int, rows: int) -> None:
        if done > ROWS // 2:
            raise Stop

    with pytest.raises(Stop):
        predict_ray(artifact, source, tmp_path / "out.npz", replicas=1, batch=BATCH, told=stop)
    said: list[str] = []
    predict_ray(artifact, source, tmp_path / "out.npz", replicas=1, batch=BATCH, say=said.append)
    assert "rows are there already" in said[0]
    assert np.array_equal(outputs(tmp_path / "out.npz"), local)


def test_a_damaged_input_is_named(artifact, source, tmp_path):
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    source.write_bytes(content)
    with pytest.raises(DataError, match=r"^'images' in .*in.npz is damaged"):
        predict_ray(artifact, source, tmp_path / "out.npz", replicas=1, batch=BATCH)
    assert not (tmp_path / "out.npz").exists()


def test_an_input_without_examples_is_refused(artifact, images, tmp_path):
    np.savez(tmp_path / "in.npz", images=images[:0])
    with pytest.raises(DataError, match="There are no examples"):
        predict_ray(artifact, tmp_path / "in.npz", tmp_path / "out.npz")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicas": 1000}, r"room for \d+ replicas of 1 threads on cpu, not for 1000"),
        ({"device": "tpu"}, "run on cpu or cuda, not on tpu"),
        ({"batch": 0}, "batch=0 is no whole number above zero"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message, artifact, source, tmp_path):
    with pytest.raises(SettingError, match=message):
        predict_ray(artifact, source, tmp_path / "out.npz", **settings)


def test_an_address_where_nobody_listens_is_refused_at_once(artifact, source, tmp_path):
    command = ["predict", artifact.folder, source, "--out", tmp_path / "out.npz", "--engine", "ray:127.0.0.1:9"]
    begin = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-m", "featherweight", *map(str, command)], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 2 and "No Ray cluster answers at 127.0.0.1:9" in found.stderr
    assert time.monotonic() - begin < 30  # a fresh Python that loads torch included, on a busy machine


OWN = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a token of these tests, and of nothing else"}
LOSING = """
import os, signal, sys
from pathlib import Path
from featherweight import cluster, open_artifact
cluster.STRETCHES = 10_000
artifact, source, out, address, batch, machine = sys.argv[1:]
killed = []
def told(done, rows):
    if done > rows // 4 and not killed:
        killed.append(os.killpg(int(machine), signal.SIGKILL))
cluster.predict_ray(
    open_artifact(Path(artifact)), Path(source), Path(out), address=address, replicas=2, batch=int(batch), told=told
)
assert killed
"""


@contextlib.contextmanager
def machine(env: dict[str, str], *how: str) -> Iterator[int]:
    """One of a cluster that is started by hand: the number of its processes' group."""
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *how]
    with subprocess.Popen(start, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as started:
        try:
            assert started.stdout is not None
            assert any("Ray runtime started" in line for line in started.stdout)
            yield started.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)


@contextlib.contextmanager
def head(env: dict[str, str]) -> Iterator[str]:
    """A cluster of one machine so far, with room for one replica: its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    how = ["--head", "--port", str(port), "--num-cpus", "1", "--include-dashboard", "false"]
    how += ["--node-ip-address", "127.0.0.1"]
    short = tempfile.TemporaryDirectory(prefix="fw", dir="/tmp", ignore_cleanup_errors=True)  # sockets want short names
    with short as folder, machine(env, *how, "--temp-dir", folder):
        yield f"127.0.0.1:{port}"


def test_a_cluster_that_is_there_is_joined_by_its_address_and_token(artifact, source, local, tmp_path):
    with head(OWN | TOKEN) as address:
        command = ["predict", artifact.folder, source, "--out", tmp_path / "out.npz", "--engine", f"ray:{address}"]
        command = [sys.executable, "-m", "featherweight", *map(str, command), "--batch", str(BATCH)]
        refused = subprocess.run(command, env=OWN, capture_output=True, text=True)
        assert refused.returncode == 2 and "wants a token. Set RAY_AUTH_MODE=token" in refused.stderr
        found = subprocess.run(command, env=OWN | TOKEN, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
    assert np.array_equal(outputs(tmp_path / "out.npz"), local)


def test_a_machine_that_is_lost_loses_nothing(artifact, source, local, tmp_path):
    other = ["--node-ip-address", "127.0.0.2", "--num-cpus", "1"]
    with head(OWN) as address, machine(OWN, "--address", address, *other) as group:
        about = [artifact.folder, source, tmp_path / "out.npz", address, BATCH, group]
        command = [sys.executable, "-c", LOSING, *map(str, about)]
        found = subprocess.run(command, env=OWN, capture_output=True, text=True, timeout=200)
        assert found.returncode == 0, found.stderr
    assert np.array_equal(outputs(tmp_path / "out.npz"), local)


def test_there_are_two_engines(artifact, source, tmp_path):
    command = ["predict", artifact.folder, source, "--out", tmp_path / "out.npz", "--engine", "spark"]
    found = subprocess.run([sys.executable, "-m", "featherweight", *map(str, command)], capture_output=True, text=True)
    assert found.returncode == 2 and "There is no engine 'spark'" in found.stderr


def test_a_replica_that_dies_at_each_try_ends_the_run(artifact, source, tmp_path, monkeypatch):
    class Deadly(cluster._Replica):
        def __call__(self, stretch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            os.kill(os.getpid(), signal.SIGKILL)
            return stretch

    monkeypatch.setattr(cluster, "_Replica", Deadly)
    monkeypatch.setattr(cluster, "RESTARTS", 1)
    with pytest.raises(ProcessError, match="Ray could not go on"):
        predict_ray(artifact, source, tmp_path / "out.npz", replicas=1, batch=BATCH)
