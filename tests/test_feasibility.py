"""What is said early: bounds that nothing can meet, each with its reason; and the memory that training takes."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn

from featherweight.feasibility import out_of_reach, predicted_ram, saved_bytes
from featherweight.measure import Baseline
from featherweight.recipe import Recipe
from featherweight.trials import Budget
from tests.made_up import measurement
from tests.test_facts import workload_of

PLAIN = dataclasses.replace(
    measurement(Recipe((), "onnxruntime")), latency_ms=10.0, bytes=40_000_000, peak_rss_bytes=140_000_000
)


def original(examples: int = 1000, parameters: int = 10_000_000) -> Baseline:
    found = dataclasses.replace(PLAIN, original_parameters=parameters, score=0.9)
    return Baseline(measurement=found, scores=[1.0, 0.0] * (examples // 2), test_scores=None, outputs=[])


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (Budget(0.0), r"max_drop=0.0: with 1000 examples a drop below 0.002\d+ cannot be shown"),
        (Budget(0.01, max_bytes=1000), "max_bytes=1000: 10,000,000 weights take 200,000 bytes even in 4 bits"),
        (Budget(0.01, max_latency_ms=0.001), "max_latency_ms=0.001: the network as it is takes 10 ms here"),
        (
            Budget(0.01, max_ram=1_000_000),
            "max_ram=1000000: a process that runs the network .* holds 100,000,000",
        ),
    ],
)
def test_a_bound_that_nothing_can_meet_is_named_with_its_reason(budget, said):
    (found,) = out_of_reach(budget, original(), [PLAIN])
    assert re.match(said, found)
    assert found.endswith(".") and ("Allow more" in found or "allow more" in found)


def test_of_scores_that_are_more_than_right_or_wrong_no_least_drop_is_known():
    graded = dataclasses.replace(original(), scores=[1.0, 0.5, 0.0, 0.75] * 250)
    assert list(out_of_reach(Budget(0.0), graded, [PLAIN])) == []


def test_what_may_be_met_is_not_spoken_of():
    budget = Budget(0.01, max_bytes=2_000_000, max_latency_ms=1.0, max_ram=90_000_000)
    assert list(out_of_reach(budget, original(), [PLAIN])) == []
    assert list(out_of_reach(Budget(0.0), dataclasses.replace(original(), scores=[0.9]), [PLAIN])) == []


def test_what_the_way_back_needs_is_counted_and_the_network_left_alone():
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = saved_bytes(model, (torch.randn(4, 64),), rows=16)
    assert found == 16 * 4 * (64 + 256)  # what each linear layer read; the ReLU keeps the same tensor
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_memory_is_predicted_to_grow_with_weights_and_with_the_batch_that_is_trained_on():
    def of(width: int, rows: int) -> int:
        model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 2))
        return predicted_ram(workload_of(model, train=[(torch.zeros(rows, 8),)]))

    assert of(100_000, 4) - of(8, 4) > 5 * 4 * 100_000 * 10
    assert of(8, 4_000) - of(8, 4) > 3_996 * 4 * 8
