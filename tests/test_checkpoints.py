"""Checkpoints: a training that was killed ends with the network that it would have ended with."""

import contextlib
import copy
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from featherweight import checkpoints, cli, facts, making, passes, progress, search
from featherweight.artifact import open_artifact
from featherweight.checkpoints import kept_in
from featherweight.errors import ArtifactError
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.recipe import Recipe, compress_model, seeded
from featherweight.testing import networks, state
from featherweight.workload import Workload


class Shuffled:
    """Batches in an order, and with noise, of the global generators; `stops` after so many."""

    def __init__(self, batches, stops: float = float("inf")):
        self.batches, self.left, self.seen = batches, stops, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for index in torch.randperm(len(self)):
            if self.seen == self.left:
                raise KeyboardInterrupt
            self.seen += 1
            (x,) = self.batches[index]
            yield (x * random.uniform(0.9, 1.1) + np.random.normal() / 100,)  # noqa: NPY002


def workload_of(name: str, stops: float = float("inf")) -> Workload:
    whole = networks()[name]
    return replace(whole, train=Shuffled(list(whole.calibration), stops))


def trained(workload: Workload, **settings) -> list:
    """From the same damaged network each time."""
    with seeded(7):
        model = copy.deepcopy(workload.model)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.3 * p.square().mean().sqrt() * torch.randn_like(p)
        model = QuantizeWeights(where="head, 4").apply(model, workload)
        return state(DistillSoft(epochs=6, **settings).apply(model, workload))


@pytest.fixture
def _always(monkeypatch):
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)


@pytest.mark.parametrize("stops", [9, 19])  # before batch norms keep their statistics, and while they do
@pytest.mark.parametrize("name", ["residual", "mlp"])
@pytest.mark.usefixtures("_always")
def test_what_goes_on_from_a_checkpoint_ends_as_if_it_had_not_stopped(name, stops, tmp_path):
    undisturbed = trained(workload_of(name))
    with pytest.raises(KeyboardInterrupt), kept_in(tmp_path / "c"):
        trained(workload_of(name, stops))
    assert [path.suffix for path in (tmp_path / "c").iterdir()] == [".safetensors"]
    assert networks()[name].model.training is False
    learnt = []
    step = torch.optim.AdamW.step
    with pytest.MonkeyPatch.context() as patch, kept_in(tmp_path / "c"):
        patch.setattr(torch.optim.AdamW, "step", lambda self: learnt.append(1) or step(self))
        assert trained(workload_of(name)) == undisturbed
    assert len(learnt) == 24 - stops
    assert not (tmp_path / "c").exists()


@pytest.mark.usefixtures("_always")
def test_a_training_that_ended_is_not_repeated_for_the_sake_of_a_later_one(tmp_path):
    recipe = Recipe((DistillSoft(epochs=2), passes.find("quantize_weights")(), DistillSoft(epochs=3)), "torch")
    whole = state(compress_model(recipe, workload_of("mlp"))[0])
    with pytest.raises(KeyboardInterrupt), kept_in(tmp_path / "c"):
        compress_model(recipe, workload_of("mlp", stops=13))
    assert len(list((tmp_path / "c").iterdir())) == 2
    with kept_in(tmp_path / "c"):
        assert state(compress_model(recipe, workload_of("mlp"))[0]) == whole


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("harm", [b"", b"\x08\0\0\0\0\0\0\0{}      ", "cut"])
def test_a_damaged_checkpoint_or_one_of_another_training_is_none(harm, tmp_path):
    with pytest.raises(KeyboardInterrupt), kept_in(tmp_path / "c"):
        trained(workload_of("mlp", stops=9))
    (path,) = (tmp_path / "c").iterdir()
    path.write_bytes(path.read_bytes()[:-40] if harm == "cut" else harm)
    undisturbed, slower = trained(workload_of("mlp")), trained(workload_of("mlp"), lr=0.001)
    for settings, wanted in (({}, undisturbed), ({"lr": 0.001}, slower)):
        folder = tmp_path / f"c{len(settings)}"
        folder.mkdir()
        (folder / path.name).write_bytes(path.read_bytes())
        with kept_in(folder):
            assert trained(workload_of("mlp"), **settings) == wanted


def test_short_trainings_write_none_and_nobody_writes_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained(workload_of("mlp"))
    with pytest.raises(KeyboardInterrupt), kept_in(tmp_path / "c"):
        trained(workload_of("mlp", stops=9))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_always")
def test_a_checkpoint_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ArtifactError, match=r"checkpoint .* cannot be written: .*Make room"),
        kept_in(tmp_path / "file"),
    ):
        trained(workload_of("mlp"))


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from featherweight import checkpoints, search, trials
from featherweight.workload import load
from tests.test_checkpoints import searched

checkpoints.EVERY = 0.0
keep = checkpoints.Checkpoint.keep
def keep_and_die(self, losses):
    keep(self, losses)
    if len(losses) == 11:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoints.Checkpoint.keep = keep_and_die
searched(Path(sys.argv[1]))
"""


def searched(folder: Path) -> list:
    """The state of the network that a search, in its folder, makes an artifact of: here none is made."""
    from tests.gratings import workload

    loaded, made = workload(), []
    recipe = Recipe.from_yaml("steps: [distill_soft]\ntarget: torch")
    settings = search.Settings(0, 1, 1, facts.fingerprint(loaded))
    trial = search._Search(loaded, search.Budget(0.1), folder, settings, progress.Progress())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "build", lambda recipe, *_, **__: made.append(compress_model(recipe, loaded)[0]))
        trial._built(recipe)
    return state(made[0])


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_search_that_was_killed_goes_on_within_the_training(tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "a"], cwd=root, capture_output=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (kept,) = (tmp_path / "a" / "trials").glob("*.checkpoints")
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(1) or step(self))
    assert searched(tmp_path / "a") == searched(tmp_path / "b")
    assert len(steps) == 5 + 16 and not kept.exists()


TAUGHT = "steps: [prune_magnitude: {share: 0.5}, distill_soft: {epochs: 4}]\ntarget: torch\n"


@pytest.mark.usefixtures("_always")
def test_the_same_command_goes_on_after_it_was_killed(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(TAUGHT)
    workload, steps = Path(__file__).with_name("gratings.py"), []
    command = ["apply", str(tmp_path / "recipe.yaml"), str(workload), "--out"]
    step, keep = torch.optim.AdamW.step, checkpoints.Checkpoint.keep
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(1) or step(self))

    def keep_and_stop(self, losses):
        keep(self, losses)
        if len(losses) == 11:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt, SystemExit):
        patch.setattr(checkpoints.Checkpoint, "keep", keep_and_stop)
        cli.main([*command, str(tmp_path / "out")])
    assert not list((tmp_path / "out").iterdir())
    assert len(list(tmp_path.glob("out.*.checkpoints"))) == 1
    assert cli.main([*command, str(tmp_path / "out")]) == 0
    resumed = len(steps)
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    assert resumed == len(steps) - resumed and resumed > 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml", "whole"]
    first, second = (open_artifact(tmp_path / name).manifest["coverage"] for name in ("out", "whole"))
    assert first == second
