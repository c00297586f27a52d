"""Passes that act on weights alone act on those of recurrent layers too, and targets run what they leave."""

import pytest
import torch
from torch import nn

from featherweight import targets
from featherweight.passes import find
from featherweight.recipe import Recipe, compress_model
from featherweight.testing import check_export
from featherweight.workload import Workload

PASSES = (
    *("quantize_weights", "quantize_fixed", "quantize_hqq", "cluster_kmeans", "compand_weights", "scale_weights"),
    *("prune_magnitude", "prune_random"),
)
WEIGHTS = {"lstm.ih_l0", "lstm.hh_l0", "gru.ih_l0", "gru.hh_l0", "gru.ih_l0_reverse", "gru.hh_l0_reverse"}


class Voice(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.gru = nn.GRU(32, 16, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.gru(self.lstm(x)[0])[0].mean(1))


@pytest.fixture(scope="module")
def workload():
    torch.manual_seed(0)
    return Workload(Voice().eval(), (torch.randn(2, 6, 16),), [(torch.randn(8, 6, 16),)], lambda predict: 0.0)


@pytest.mark.parametrize("name", PASSES)
def test_weights_of_recurrent_layers_are_treated(name, workload):
    model, coverage = compress_model(Recipe((find(name)(where="lstm.*, gru.*"),), "torch"), workload)
    assert {layer for layer, _ in coverage.done} == WEIGHTS and not coverage.left
    (x,) = workload.example
    assert not torch.equal(model(x), workload.model(x))


@pytest.mark.parametrize("target", targets.installed())
@pytest.mark.filterwarnings("ignore")  # of exporters; their own tests name them
def test_targets_run_encoded_recurrent_layers(target, workload, tmp_path):
    model, _ = compress_model(Recipe((find("quantize_weights")(bits=4, block=32),), "torch"), workload)
    check_export(targets.find(target), model, workload, tmp_path)


def test_what_treats_called_layers_only_says_that_it_left_them(workload):
    _, coverage = compress_model(Recipe((find("quantize_static")(),), "torch"), workload)
    assert ("lstm.ih_l0", "is of kind RecurrentWeight, which quantize_static does not treat (weight)") in coverage.left
