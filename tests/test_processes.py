"""Training in several processes: they take the steps that one would take alone."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from featherweight import processes
from featherweight.artifact import open_artifact
from featherweight.errors import TargetError
from featherweight.processes import ALONE, Processes, lying_on

CPU = torch.device("cpu")

TRAINED = """
import copy, json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from featherweight.artifact import build
from featherweight.losses import soft_loss
from featherweight.processes import processes
from featherweight.recipe import Recipe
from featherweight.testing import networks
from featherweight.training import train

workload, folder = networks()["mlp"], Path(sys.argv[1])
torch.manual_seed(processes().number)
student = copy.deepcopy(workload.model)
with torch.no_grad():
    for p in student.parameters():
        p += 2.0 * p.square().mean().sqrt() * torch.randn_like(p)
seen = []
def loss(batch, target):
    seen.append([len(batch[0]), len(target)])
    return soft_loss(student(*batch), workload.model(*batch).detach(), 2.0)
losses, _ = train(student, workload, loss, step="p", where="*", epochs=5, steps=0, lr=0.02)
weights = torch.cat([p.detach().flatten()[:3] for p in student.parameters()]).tolist()
told = {"losses": losses, "seen": seen, "weights": weights}
recipe = Recipe.from_yaml("steps: [quantize_weights: {bits: 4}, distill_soft]\\ntarget: torch")
told["bytes"] = build(recipe, workload, folder / "artifact").bytes
(folder / f"{processes().number}.json").write_text(json.dumps(told))
"""


def run(folder: Path, count: int) -> list[dict]:
    """What each of `count` processes told, once all have ended."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINED, folder],
            cwd=Path(__file__).parents[1],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=200)[1] for process in started]
    assert [process.returncode for process in started] == [0] * count, said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def test_two_processes_take_the_steps_of_one(tmp_path):
    pytest.importorskip("accelerate")
    (alone,) = run(tmp_path / "one", 1)
    first, second = run(tmp_path / "two", 2)
    assert alone["seen"] == [[16, 16]] * 20 and first["seen"] == second["seen"] == [[8, 8]] * 20
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    assert alone["losses"][-1] < 0.5 * alone["losses"][0]
    # though they began with different weights
    assert first["weights"] == second["weights"] == pytest.approx(alone["weights"], abs=1e-4)
    assert first["bytes"] == second["bytes"] == open_artifact(tmp_path / "two" / "artifact").bytes


def test_a_batch_of_fewer_examples_than_processes_is_learnt_from_by_all():
    x, mask = torch.arange(3), {"x": torch.arange(3), "mask": torch.ones(3, 2)}
    assert torch.equal(Processes(2, 4, CPU).share((x,), None)[0][0], x)
    shares = [Processes(number, 2, CPU).share(mask, ["labels of another form"]) for number in range(2)]
    assert [share["x"].tolist() for share, _ in shares] == [[0, 1], [2]]
    assert [tuple(share["mask"].shape) for share, _ in shares] == [(2, 2), (1, 2)]
    assert all(target == ["labels of another form"] for _, target in shares)


def test_alone_nothing_is_needed_but_together_accelerate_is(monkeypatch):
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.processes() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TargetError, match=r"one of 2 processes .* pip install 'featherweight\[train\]'"):
        processes.processes()


def test_tensors_lie_elsewhere_for_a_while_and_bring_back_what_became_of_them():
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
