"""Several processes compute the rows of an input: they return what one returns."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from featherweight import distributed, parallel
from featherweight import job as jobs
from featherweight.artifact import Artifact, build, open_artifact
from featherweight.combining import combined
from featherweight.errors import ProcessError, SettingError
from featherweight.layer_split import balanced
from featherweight.recipe import Recipe
from featherweight.testing import networks

ROOT = Path(__file__).parents[1]
RECIPES = {  # of the networks that are cut into parts
    "plain": "steps: []",
    "int8": "steps: [quantize_static]",
    "int4": "steps: [quantize_weights: {bits: 4}]",
    "low rank": "steps: [factorize_svd: {share: 0.5}]",
}
CASES = [
    ("residual", "plain"),
    ("residual", "int8"),
    ("depthwise", "int8"),
    ("transformer", "plain"),
    ("transformer", "int8"),
    ("transformer", "int4"),
    ("transformer", "low rank"),
    ("stacked", "plain"),
]
ROWS = 37


def made(network: str, recipe: str, folder: Path, target: str = "torch") -> Artifact:
    return build(Recipe.from_yaml(f"{RECIPES[recipe]}\ntarget: {target}"), networks()[network], folder)


def rows_of(artifact: Artifact, count: int = ROWS) -> dict[str, np.ndarray]:
    """Made-up inputs."""
    rng = np.random.default_rng(0)

    def column(spec: parallel.Rows) -> np.ndarray:
        shape, dtype = (count, *spec.shape), np.dtype(spec.dtype)
        return rng.integers(0, 2, shape, dtype) if dtype.kind == "i" else rng.standard_normal(shape).astype(dtype)

    return {spec.name: column(spec) for spec in parallel.inputs_of(artifact)}


def alone(artifact: Artifact, rows: dict[str, np.ndarray]) -> list[np.ndarray]:
    return parallel.predict(artifact, rows, replicas=1, threads=1, batch=4)


def torchrun(count: int, *command: object, within: tuple[str, ...] = (), about: tuple[str, ...] = ()) -> list[str]:
    """The command that starts a job."""
    places = about or ("--standalone", "--nproc-per-node", str(count))
    return [*within, sys.executable, "-m", "torch.distributed.run", *places, *map(str, command)]


def predicted(count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = torchrun(count, "-m", "featherweight", "predict", *arguments)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


# ------------------------------------------------------------------------------------------------ networks in parts


def parts(folder: Path) -> None:
    """What each process of a job does: all networks, cut in both ways; process 0 notes how far off outputs are."""
    found = {}
    with jobs.joined("cpu") as job:
        for path in sorted(folder.glob("*-*")):
            artifact = open_artifact(path)
            inputs = list(rows_of(artifact, 3).values())
            whole = artifact.load()(inputs)
            for split in ("layers", "tensors"):
                way = distributed.WAYS[split](job, artifact, 2, 1)
                outputs = [way.step(len(rows[0]), rows if job.rank == 0 else None) for rows in steps(inputs, way.rows)]
                if job.rank == 0:
                    values = [np.concatenate(column) for column in zip(*outputs, strict=True)]
                    off = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(values, whole, strict=True))
                    cut = getattr(way, "plan", None)
                    found[f"{path.name} {split}"] = [
                        off,
                        sorted(cut.ways.values()) if cut else len(way.stage.submod.graph.nodes),
                    ]
    if os.environ["RANK"] == "0":
        (folder / "found.json").write_text(json.dumps(found))


def steps(inputs: list[np.ndarray], most: int) -> list[list[np.ndarray]]:
    return [[array[at : at + most] for array in inputs] for at in range(0, len(inputs[0]), most)]


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("parts")
    for network, recipe in CASES:
        made(network, recipe, folder / f"{network}-{recipe}")
    script = f"from pathlib import Path; from tests.test_distributed import parts; parts(Path({str(folder)!r}))"
    (folder / "job.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); {script}")
    command = torchrun(request.param, folder / "job.py")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text()) | {"count": request.param}


@pytest.mark.parametrize("split", ["layers", "tensors"])
@pytest.mark.parametrize(("network", "recipe"), CASES)
def test_a_network_in_parts_returns_what_the_whole_returns(network, recipe, split, found):
    off, _ = found[f"{network}-{recipe} {split}"]
    rounded = recipe == "int8" and split == "tensors"  # sums in another order may round to the next byte
    assert off < (0.02 if rounded else 1e-4)


def test_layers_that_follow_each_other_need_one_exchange(found):
    """What comes in slices is read in slices: feed-forward layers and heads of attention stay apart."""
    if found["count"] == 2:
        for recipe in ("plain", "int8"):
            _, ways = found[f"transformer-{recipe} tensors"]
            assert ways.count("inputs") == 4, ways  # behind attention and in the feed-forward layer of two blocks
        _, ways = found["depthwise-int8 tensors"]
        assert "groups" in ways and "inputs" in ways


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_has_a_faster_slowest_stage(seed):
    import itertools

    rng = np.random.default_rng(seed)
    count, stages = int(rng.integers(3, 9)), int(rng.integers(2, 4))
    seconds, crossing = rng.random(count), rng.random(count) * rng.integers(0, 2)

    def slowest(cuts: tuple[int, ...]) -> float:
        ends = [0, *cuts, count]
        return max(seconds[a:b].sum() + (crossing[a] if a else 0.0) for a, b in itertools.pairwise(ends))

    best = min(slowest(cuts) for cuts in itertools.combinations(range(1, count), stages - 1))
    chosen = tuple(balanced(list(seconds), [0.0, *crossing[1:]], stages))
    assert len(chosen) == stages - 1 and slowest(chosen) == pytest.approx(best)


# ------------------------------------------------------------------------------------------------ whole jobs


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> tuple[Artifact, Path, np.ndarray]:
    """An artifact, inputs, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("network")
    artifact = made("transformer", "int8", folder / "artifact")
    rows = rows_of(artifact)
    np.savez(folder / "in.npz", **rows)
    return artifact, folder / "in.npz", alone(artifact, rows)[0]


@pytest.mark.parametrize(("split", "count"), [("data", 3), ("layers", 2), ("tensors", 2)])
def test_a_job_writes_what_one_process_would(split, count, network, tmp_path):
    artifact, source, expected = network
    done = predicted(count, artifact.folder, source, "--out", tmp_path / "out.npy", "--split", split, "--batch", 4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("out.npy") == 1
    values = np.load(tmp_path / "out.npy")
    if split == "data":
        assert np.array_equal(values, expected)
    np.testing.assert_allclose(values, expected, atol=0.02 * np.abs(expected).max())


def test_fewer_rows_than_processes_are_computed_once(network, tmp_path):
    artifact, source, expected = network
    with np.load(source) as rows:
        np.savez(tmp_path / "in.npz", **{name: rows[name][:1] for name in rows.files})
    done = predicted(3, artifact.folder, tmp_path / "in.npz", "--out", tmp_path / "out.npy", "--split", "data")
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected[:1], atol=1e-4)


def test_networks_of_a_job_are_combined_in_their_order(network, tmp_path):
    artifact, source, expected = network
    other = made("transformer", "plain", tmp_path / "other", "onnxruntime")
    with np.load(source) as file:
        rows = {name: file[name] for name in file.files}
    arguments = ["--with", other.folder, "--split", "networks", "--weights", "3,1", "--batch", 4]
    done = predicted(2, artifact.folder, source, "--out", tmp_path / "out.npy", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.array_equal(
        np.load(tmp_path / "out.npy"), combined("mean", [expected, alone(other, rows)[0]], [3.0, 1.0])
    )


def test_two_hosts_with_addresses_of_their_own(network, tmp_path):
    """Two network namespaces, joined by a cable: a job of two processes, one on each."""
    artifact, source, expected = network
    with two_hosts() as hosts:
        for split in ("layers", "tensors"):
            out = tmp_path / f"{split}.npy"
            command = ["-m", "featherweight", "predict", artifact.folder, source, "--out", out, "--split", split]
            started = []
            for rank, (name, _) in enumerate(hosts):
                about = ("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank))
                about += ("--master-addr", hosts[0][1], "--master-port", "29511")
                line = torchrun(1, *command, "--batch", 4, within=("ip", "netns", "exec", name), about=about)
                env = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0"}
                started.append(subprocess.Popen(line, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
            said = [process.communicate(timeout=200)[1] for process in started]
            assert [process.returncode for process in started] == [0, 0], said
            np.testing.assert_allclose(np.load(out), expected, atol=0.02 * np.abs(expected).max())


@contextlib.contextmanager
def two_hosts():
    """Names and addresses of two network namespaces."""
    if shutil.which("ip") is None:
        pytest.skip("no program `ip`")
    tag = f"fw{os.getpid() % 100000}"
    hosts = [(f"{tag}{side}", f"10.213.7.{number}") for number, side in ((1, "a"), (2, "b"))]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    try:
        try:
            for name, _ in hosts:
                ip("netns", "add", name)
            (a, _), (b, _) = hosts
            ip("link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
            for name, address in hosts:
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                for device in ("eth0", "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield hosts
    finally:
        for name, _ in hosts:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("split", ["data", "layers"])
def test_a_process_that_dies_ends_the_job_within_seconds(split, network, tmp_path):
    artifact, source, _ = network
    with np.load(source) as rows:
        np.savez(tmp_path / "in.npz", **{name: np.tile(rows[name], (4000, 1)) for name in rows.files})
    arguments = [artifact.folder, tmp_path / "in.npz", "--out", tmp_path / "out.npy", "--split", split, "--batch", 1]
    command = torchrun(2, "-m", "featherweight", "predict", *arguments)
    job = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob("out.npy.*.partial")) or len(workers(job.pid)) < 2:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(8.0 if split == "layers" else 3.0)
        assert job.poll() is None, "it was over too soon"
        os.kill(workers(job.pid)[1], signal.SIGKILL)
        killed = time.monotonic()
        job.communicate(timeout=60)
        assert job.returncode != 0 and time.monotonic() - killed < 20
        assert not (tmp_path / "out.npy").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def workers(pid: int) -> list[int]:
    """The processes of a job, in the order in which they were started."""
    try:
        return sorted(int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except OSError:
        return []


def test_bad_input_ends_the_job_with_one_message(network, tmp_path):
    artifact, source, _ = network
    with np.load(source) as rows:
        np.savez(tmp_path / "in.npz", **{name: rows[name][:0] for name in rows.files})
    done = predicted(2, artifact.folder, tmp_path / "in.npz", "--out", tmp_path / "out.npy", "--split", "data")
    assert done.returncode != 0 and done.stderr.count("featherweight: error:") == 1
    assert "There are no examples in" in done.stderr
    assert not (tmp_path / "out.npy").exists()


def test_a_split_without_a_job_is_refused(network, tmp_path, monkeypatch):
    artifact, source, _ = network
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingError, match=r"this is a single one\. Start it with: torchrun"):
        distributed.predict_split([artifact], source, tmp_path / "out.npy", "data")
    with pytest.raises(SettingError, match="no split 'rows'"):
        distributed.predict_split([artifact], source, tmp_path / "out.npy", "rows")
    with pytest.raises(SettingError, match="2 networks cannot be split by data"):
        distributed.predict_split([artifact, artifact], source, tmp_path / "out.npy", "data")
    with pytest.raises(SettingError, match="batch=0 is no whole number"):
        distributed.predict_split([artifact], source, tmp_path / "out.npy", "data", batch=0)


def test_files_of_other_runtimes_cannot_be_cut(tmp_path):
    artifact = made("mlp", "plain", tmp_path / "artifact", "onnxruntime")
    with pytest.raises(SettingError, match="is for onnxruntime, whose files cannot be cut by layers"):
        distributed.predict_split([artifact], tmp_path / "in.npy", tmp_path / "out.npy", "layers")


def test_others_that_cannot_be_reached_are_named(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jobs, "PATIENCE", timedelta(seconds=2))
    said = pytest.raises(ProcessError, match=f"Process 1 of 2 does not reach the others at 127.0.0.1:{port}")
    with said, jobs.joined("cpu"):
        pass
