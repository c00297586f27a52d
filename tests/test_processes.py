"""Training in several processes: they take the steps that one would take alone."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from featherweight import checkpoints, processes, search
from featherweight.artifact import build, open_artifact
from featherweight.errors import TargetError
from featherweight.losses import soft_loss
from featherweight.pools import connected
from featherweight.processes import ALONE, Processes, lying_on
from featherweight.recipe import Recipe
from featherweight.testing import networks
from featherweight.training import train
from featherweight.trials import Budget

CPU = torch.device("cpu")


def told(seed: int, network: str = "mlp") -> dict:
    """Of a training: losses, the sizes of what was seen, and some of the weights and buffers it ended with."""
    workload, seen = networks()[network], []
    torch.manual_seed(seed)
    student = copy.deepcopy(workload.model)
    with torch.no_grad():
        for p in student.parameters():
            p += 2.0 * p.square().mean().sqrt() * torch.randn_like(p)

    def loss(batch, target):
        seen.append([len(batch[0]), len(target)])
        return soft_loss(student(*batch), workload.model(*batch).detach(), 2.0)

    losses, _ = train(student, workload, loss, step="p", where="*", epochs=5, steps=0, lr=0.02)
    weights = torch.cat([p.detach().flatten()[:3] for p in student.parameters()]).tolist()
    buffers = torch.cat([b.float().flatten()[:3] for b in [*student.buffers(), torch.ones(0)]]).tolist()
    return {"losses": losses, "seen": seen, "weights": weights, "buffers": buffers}


def main(folder: Path) -> None:
    """What one of several processes does."""
    torch.set_num_threads(1)
    number = processes.processes().number
    found = told(seed=number)
    recipe = Recipe.from_yaml("steps: [quantize_weights: {bits: 4}, distill_soft]\ntarget: onnxruntime")
    found["bytes"] = build(recipe, networks()["mlp"], folder / "artifact").bytes
    (folder / f"{number}.json").write_text(json.dumps(found))


def normalising(folder: Path) -> None:
    """What one of several processes does that train a network with batch norms."""
    torch.set_num_threads(1)
    number = processes.processes().number
    (folder / f"{number}.json").write_text(json.dumps(told(number, "residual")))


def dying(folder: Path) -> None:
    """What one of several processes does that are killed in their training, as soon as step 11 is on disk."""
    keep = checkpoints.Checkpoint.keep

    def keep_and_die(self: checkpoints.Checkpoint, losses: list[float]) -> None:
        keep(self, losses)
        if len(losses) == 11:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.Checkpoint.keep = keep_and_die  # type: ignore[method-assign]
    resuming(folder)


def resuming(folder: Path) -> None:
    """What one of several processes does whose training goes on."""
    torch.set_num_threads(1)
    checkpoints.EVERY = 0.0 if processes.processes().number else 1e9  # one clock is enough
    with checkpoints.kept_in(folder / "checkpoints"):
        found = told(seed=0)
        processes.processes().wait()
    (folder / f"{processes.processes().number}.json").write_text(json.dumps(found))


def run(folder: Path, count: int, what: str = "main", code: int = 0) -> list[dict]:
    """What each of `count` processes found that do `what`, once all have ended with the exit code `code`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    script = f"from pathlib import Path; from tests.test_processes import {what}; {what}(Path({str(folder)!r}))"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parents[1],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=200)[1] for process in started]
    assert [process.returncode for process in started] == [code] * count, said
    return [] if code else [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def test_two_processes_take_the_steps_of_one(tmp_path):
    pytest.importorskip("accelerate")
    alone = told(seed=0)
    first, second = run(tmp_path, 2)
    assert alone["seen"] == [[16, 16]] * 20 and first["seen"] == second["seen"] == [[8, 8]] * 20
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    assert alone["losses"][-1] < 0.5 * alone["losses"][0]
    # though they began with different weights
    assert first["weights"] == second["weights"] == pytest.approx(alone["weights"], abs=1e-4)
    assert first["bytes"] == second["bytes"] == open_artifact(tmp_path / "artifact").bytes


def test_batch_norms_of_uneven_shares_normalise_by_the_whole_batch(tmp_path):
    pytest.importorskip("accelerate")
    alone = told(0, "residual")
    found = run(tmp_path, 3, "normalising")
    assert [process["seen"][0] for process in found] == [[6, 6], [5, 5], [5, 5]]
    _takes_the_steps_of(alone, found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of settings of its own, which nobody has touched
def test_ray_train_takes_the_steps_of_one(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("ray.train.torch", exc_type=ImportError)
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    with connected(""):
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        run_config = RunConfig(storage_path=str(tmp_path / "runs"))
        scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})
        TorchTrainer(normalising, train_loop_config=tmp_path, scaling_config=scaling, run_config=run_config).fit()
    _takes_the_steps_of(told(0, "residual"), [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)])


def _takes_the_steps_of(alone, processes):
    assert alone["losses"][-1] < 0.5 * alone["losses"][0]
    for found in processes:
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-3)
        assert found["weights"] == pytest.approx(alone["weights"], abs=1e-4)
        assert found["buffers"] == pytest.approx(alone["buffers"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("lost", [False, True])
def test_two_processes_that_were_killed_go_on_together(lost, tmp_path):
    pytest.importorskip("accelerate")
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole", 2, "resuming")
    run(tmp_path, 2, "dying", code=-signal.SIGKILL)
    kept = list((tmp_path / "checkpoints").iterdir())
    assert len(kept) == 2
    if lost:  # then both begin anew
        kept[0].unlink()
    resumed = run(tmp_path, 2, "resuming")
    assert [found["losses"] for found in resumed] == [found["losses"] for found in whole]
    assert [found["weights"] for found in resumed] == [found["weights"] for found in whole]
    assert [len(found["seen"]) for found in resumed] == [20 if lost else 9] * 2
    assert not (tmp_path / "checkpoints").exists()


def test_a_batch_of_fewer_examples_than_processes_is_learnt_from_by_all():
    x, named = torch.arange(3), {"x": torch.arange(3), "mask": torch.ones(3, 2)}
    few = Processes(2, 4, CPU).share((x,), None)
    assert torch.equal(few.batch[0], x) and (few.examples, few.part) == (3, 0.25)
    shares = [Processes(number, 2, CPU).share(named, ["labels of another form"]) for number in range(2)]
    assert [share.batch["x"].tolist() for share in shares] == [[0, 1], [2]]
    assert [tuple(share.batch["mask"].shape) for share in shares] == [(2, 2), (1, 2)]
    assert all(share.target == ["labels of another form"] for share in shares)
    assert [share.part for share in shares] == [2 / 3, 1 / 3]


def test_alone_nothing_is_needed_but_together_accelerate_is(monkeypatch):
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.processes() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TargetError, match=r"one of 2 processes .* pip install 'featherweight\[train\]'"):
        processes.processes()


def test_a_search_is_not_for_several_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(search, "processes", lambda: Processes(1, 2, CPU))
    with pytest.raises(TargetError, match=r"one of 2 processes .* a search runs in one: it times networks"):
        search.compress(networks()["mlp"], Budget(0.01), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exchanged", [False, True])
def test_tensors_lie_elsewhere_for_a_while_and_bring_back_what_became_of_them(exchanged, monkeypatch):
    if exchanged:  # as for tensors of XLA
        monkeypatch.setattr(processes, "XLA", "cpu")
    student, teacher, besides = nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    tensors = [*student.parameters(), *student.buffers(), *teacher.parameters(), besides]
    homes = [t.data_ptr() for t in tensors]
    with lying_on(torch.device("cpu", 0), [student, teacher], [besides]):  # to torch another device than "cpu"
        assert not set(homes) & {t.data_ptr() for t in tensors}
        with torch.no_grad():
            student.running_mean += 1
            besides += 1
    assert [t.data_ptr() for t in tensors] == homes
    assert student.running_mean.tolist() == [1, 1] and besides.tolist() == [2, 2] and besides.requires_grad


def test_recurrent_layers_do_not_go_to_xla(monkeypatch):
    monkeypatch.setattr(processes, "XLA", "cpu")
    away = lying_on(torch.device("cpu", 0), [nn.LSTM(2, 2)], [])
    with pytest.raises(TargetError, match=r"cannot be moved to or from XLA.*train on another device"), away:
        pass
