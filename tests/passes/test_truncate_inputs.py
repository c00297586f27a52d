"""The end that matters less is cut off, in the network and in its files; not where each position has an output."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from featherweight.damage import damage
from featherweight.errors import LayerError
from featherweight.passes.truncate_inputs import Cut, TruncateInputs, sequence_lengths, truncatable
from featherweight.recipe import Recipe, compress_model
from featherweight.targets import find, installed
from featherweight.testing import check_export, networks
from featherweight.workload import Workload

LENGTH = 12


class Counts(nn.Module):
    """Ids and mask, (n, t) both, to (n, 4): the mean of the embeddings of what the mask has."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        kept = mask.unsqueeze(-1).float()
        return self.head((self.words(ids) * kept).sum(1) / kept.sum(1))


class Each(Counts):
    """(n, t, 4): something for each position."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.words(ids))


def padded(model: nn.Module, left: bool = False) -> Workload:
    """Sequences of 3 to 8 ids, padded at their end, or at their beginning."""
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (64, LENGTH), generator=drawn)
    mask = (torch.arange(LENGTH) < torch.randint(3, 9, (64, 1), generator=drawn)).long()
    mask = mask.flip(1) if left else mask
    batches = list(zip((ids * mask).split(32), mask.split(32), strict=True))
    return Workload(model.eval(), tuple(value[:2] for value in batches[0]), batches, score=lambda predict: 0.0)


def outputs(model: nn.Module, workload: Workload) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(*batch) for batch in workload.calibration])


@pytest.mark.parametrize("left", [False, True])
def test_padding_goes_and_nothing_else_changes(left: bool) -> None:
    torch.manual_seed(0)
    workload = padded(Counts(), left)
    model, coverage = compress_model(Recipe((TruncateInputs(share=1 / 3),), "torch"), workload)
    end = "last" if left else "first"
    assert coverage.done == [("", f"reads the {end} 8 of 12 positions of ids, mask")]
    torch.testing.assert_close(outputs(model, workload), outputs(workload.model, workload))
    assert not workload.model._forward_pre_hooks


def test_the_end_that_is_kept_is_that_which_changes_outputs_less() -> None:
    torch.manual_seed(0)
    workload = padded(Counts(), left=True)
    for _, mask in workload.calibration:
        mask[:, 0] = 1  # so that there is a mean of either end
    wanted = [outputs(workload.model, workload)]
    model, _ = compress_model(Recipe((TruncateInputs(share=0.6),), "torch"), workload)
    other = copy.deepcopy(workload.model)
    other.register_forward_pre_hook(Cut(LENGTH, 5, head=True), with_kwargs=True)
    assert damage([outputs(model, workload)], wanted) < 0.5 * damage([outputs(other, workload)], wanted)


def test_what_was_cut_is_cut_again_from_what_is_left() -> None:
    workload = padded(Counts())
    step = TruncateInputs(share=0.5)
    model, coverage = compress_model(Recipe((step, step), "torch"), workload)
    assert coverage.done[-1] == ("", "reads the first 3 of 6 positions of ids, mask")
    assert sequence_lengths(model, workload.start, workload.calibration[0]) == {"ids": 3, "mask": 3}


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("target", installed())
def test_files_take_whole_sequences_and_cut_them_themselves(target: str, tmp_path) -> None:
    workload = networks()["transformer"]
    model, _ = compress_model(Recipe((TruncateInputs(share=0.4),), target), workload)
    check_export(find(target), model, workload, tmp_path)


def test_networks_that_cannot_be_cut_are_refused_with_the_reason() -> None:
    for model, share, why in (
        (Each(), 0.5, r"returns shapes \[\(64, 6, 4\)\] instead of \[\(64, 12, 4\)\]"),
        (Counts(), 0.01, "share=0.01 of 12 is none"),
    ):
        with pytest.raises(LayerError, match=why):
            compress_model(Recipe((TruncateInputs(share=share),), "torch"), padded(model))
    with pytest.raises(LayerError, match="There are: input"):
        compress_model(Recipe((TruncateInputs(),), "torch"), networks()["mlp"])
    with pytest.raises(LayerError, match="chooses no input"):
        compress_model(Recipe((TruncateInputs(where="words"),), "torch"), padded(Counts()))
    assert truncatable(Counts().eval(), padded(Counts()))
    assert not truncatable(Each().eval(), padded(Each()))
    assert not truncatable(networks()["mlp"].model, networks()["mlp"])
