"""Facts of workloads, and what tells them apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from featherweight import facts as known
from featherweight import targets
from featherweight.errors import WorkloadError
from featherweight.testing import networks
from featherweight.workload import Workload, load

TARGET = "onnxruntime"
TINY = Path(__file__).parent / "gratings.py"


def test_facts_of_aworkload_of():
    facts = known.facts_of(load(str(TINY)), (TARGET,))
    assert facts.folds and facts.linear and facts.multiples[TARGET] == targets.find(TARGET).width_multiple
    assert facts.epochs * 16 == pytest.approx(known.MOST_STEPS, rel=0.05)  # a tiny network has time for all


def workload_of(model: nn.Module, **changes) -> Workload:
    batch = (torch.randn(4, 8),)
    return Workload(
        **{"model": model.eval(), "example": batch, "calibration": [batch], "score": lambda p: 1.0, **changes}
    )


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.inner(x)


def test_blocks_are_counted_where_no_batch_norm_is():
    blocks = nn.Sequential(_Block(), _Block(), nn.Linear(8, 2))
    assert known.facts_of(workload_of(blocks), (TARGET,)).blocks == 2
    normed = nn.Sequential(_Block(), nn.BatchNorm1d(8), _Block())
    assert known.facts_of(workload_of(normed), (TARGET,)).blocks == 0


def test_sequences_that_may_be_cut_and_blocks_that_may_be_merged_are_found():
    found = known.facts_of(networks()["transformer"], (TARGET,))
    assert (found.truncates, found.merges, found.blocks) == (True, 2, 2)
    found = known.facts_of(networks()["stacked"], (TARGET,))
    assert (found.truncates, found.merges, found.blocks) == (False, 0, 3)


@pytest.mark.parametrize(
    ("units", "norm", "precision"),
    [
        (["amx_bf16", "avx512_bf16"], True, "bfloat16"),
        (["avx512_bf16"], False, "bfloat16"),
        (["avx512_bf16"], True, "float32"),
        (["avx512f"], False, "float32"),
        (None, False, "float32"),
    ],
)
def test_distillation_is_in_the_precision_that_is_faster_on_this_processor(monkeypatch, units, norm, precision):
    monkeypatch.setattr(known, "machine", lambda: {"features": units})
    model = nn.Sequential(nn.Linear(8, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Linear(8, 2))
    assert known.facts_of(workload_of(model), (TARGET,)).precision == precision


def test_training_data_that_raise_are_bad_input():
    class Broken:
        def __iter__(self):
            raise OSError("the disk is gone")

    with pytest.raises(WorkloadError, match=r"train raised OSError: the disk is gone.*mend it"):
        known.facts_of(workload_of(nn.Linear(8, 2), train=Broken()), (TARGET,))


def test_norms_that_cannot_be_folded_are_not():
    assert not known.facts_of(workload_of(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))), (TARGET,)).folds


@pytest.mark.parametrize("train", [[], ["text"], [3], [((torch.zeros(4, 8),), torch.zeros(4))]])
def test_length_of_training_is_known_whatever_train_holds(train):
    assert known.facts_of(workload_of(nn.Linear(8, 2), train=train), (TARGET,)).epochs > 0


@pytest.mark.parametrize(
    ("target", "labels"),
    [
        (torch.tensor([0, 1, 1, -100]), True),
        (torch.tensor([0, 1, 1, 2]), False),  # there are two classes
        (torch.zeros(4), False),
        (torch.zeros(3, dtype=torch.long), False),
        (None, False),
        ("none", False),
    ],
)
def test_labels_are_known_where_train_tells_them_of_the_logits(target, labels):
    train = [((torch.zeros(4, 8),), target)]
    assert known.facts_of(workload_of(nn.Linear(8, 2), train=train), (TARGET,)).labels is labels


def test_there_are_no_labels_of_what_is_no_logits_nor_without_training_data():
    regression = nn.Sequential(nn.Linear(8, 2), nn.LayerNorm(2))
    train = [((torch.zeros(4, 8),), torch.zeros(4, dtype=torch.long))]
    assert not known.facts_of(workload_of(regression, train=train), (TARGET,)).labels
    assert not known.facts_of(workload_of(nn.Linear(8, 2)), (TARGET,)).labels
    assert not known.facts_of(
        workload_of(nn.Linear(8, 2), train=[((torch.zeros(4, 9),), train[0][1])]), (TARGET,)
    ).labels


def test_fingerprint_tells_workloads_apart():
    one, two = nn.Linear(8, 2), nn.Linear(8, 2)
    same = known.fingerprint(workload_of(one))
    assert same == known.fingerprint(workload_of(one))
    assert same != known.fingerprint(workload_of(two))
    assert len({same, known.fingerprint(load(str(TINY)))}) == 2


@pytest.mark.parametrize("units", [["avx512_bf16"], ["amx_bf16"], ["avx2"], None])
def test_floats_may_be_computed_in_bfloat16_where_target_and_processor_can(monkeypatch, units):
    pytest.importorskip("openvino")
    monkeypatch.setattr(known, "machine", lambda: {"features": units})
    able = units is not None and "bf16" in units[0]
    found = known.facts_of(workload_of(nn.Linear(8, 2)), ("torch", "openvino"))
    assert found.bfloat16 == (("openvino",) if able else ())
