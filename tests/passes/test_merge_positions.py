"""Blocks computed for groups of positions: as before where neighbours are alike, and refused where they may not be."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.damage import damage
from featherweight.errors import LayerError
from featherweight.passes.merge_positions import Groups, MergePositions, Merging, least_missed, mergeable
from featherweight.passes.quantize_static import QuantizeStatic
from featherweight.recipe import Recipe, compress_model
from featherweight.surgery import blocks, kind_of
from featherweight.targets import find, installed
from featherweight.testing import check_export, networks
from featherweight.workload import Workload

WIDTH, LENGTH = 16, 12


class Block(nn.Module):
    """(n, t, WIDTH) to the like: attention and a perceptron, each added; by a mask that attention takes as it is."""

    def __init__(self, causal: bool = False, strength: float = 1.0) -> None:
        super().__init__()
        self.causal, self.strength = causal, strength
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, str]:
        q, k, v = self.mix(x).unsqueeze(1).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal).squeeze(1)
        x = x + self.strength * self.out(y)
        return x + self.strength * self.down(F.gelu(self.up(x))), "and more"


class Stack(nn.Module):
    """(n, t, WIDTH) to the like by blocks that are called by name; a mask of `kind` hides the last four positions."""

    def __init__(self, *members: nn.Module, kind: str = "none") -> None:
        super().__init__()
        self.blocks, self.kind = nn.ModuleList(members), kind

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.arange(x.shape[1]) < x.shape[1] - 4
        masks = {"none": None, "bool": seen[None, None, None], "added": seen.log()[None, None, None]}
        masks["square"] = seen[None, None, None].expand(1, 1, len(seen), -1)
        for block in self.blocks:
            x, _ = block(x=x, mask=masks[self.kind])
        return x


def made(model: nn.Module, x: Tensor | None = None) -> Workload:
    x = torch.randn(16, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)) if x is None else x
    return Workload(model.eval(), (x[:2],), [(x,)], score=lambda predict: 0.0)


def outputs(model: nn.Module, workload: Workload) -> Tensor:
    with torch.no_grad():
        return model(*workload.calibration[0])


@pytest.mark.parametrize("kind", ["none", "bool", "added", "square"])
@pytest.mark.parametrize("size", [2, 4])
def test_where_neighbours_are_alike_nothing_changes(kind: str, size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, LENGTH // size, WIDTH).repeat_interleave(size, 1)
    workload = made(Stack(Block(), Block(), kind=kind), x)
    model, coverage = compress_model(Recipe((MergePositions(share=1.0, size=size),), "torch"), workload)
    assert coverage.done == [(f"blocks.{n}", f"is computed for groups of {size} positions") for n in (0, 1)]
    torch.testing.assert_close(outputs(model, workload), outputs(workload.model, workload), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, Merging) for module in workload.model.modules())


def test_what_attention_adds_counts_as_often_as_the_positions_of_a_group() -> None:
    """Two positions that are merged, and one that stays by itself: its weight is half of theirs."""
    added = Groups(2).merged_beside(torch.zeros(1, 3), 3)
    assert added.exp().tolist() == [[pytest.approx(2.0), pytest.approx(1.0)]]
    masked = Groups(2).merged_beside(torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]]), 4)
    assert masked.tolist() == [[0.0, -torch.inf]]
    assert Groups(2).merged_beside(torch.tensor([[0, 1, 0, 0]]), 4).tolist() == [[1, 0]]
    vectors = torch.randn(2, 4, 6)
    assert torch.equal(Groups(2).merged_beside(vectors, 4), vectors.unflatten(1, (2, 2)).mean(2))
    for other in (None, "text", torch.zeros(4, 3)):
        assert Groups(2).merged_beside(other, 4) is other


def test_the_blocks_that_matter_least_are_chosen_and_the_way_that_harms_less() -> None:
    torch.manual_seed(0)
    workload = made(Stack(Block(), Block(strength=0.01), Block()))
    _, coverage = compress_model(Recipe((MergePositions(share=1 / 3),), "torch"), workload)
    assert [name for name, _ in coverage.done] == ["blocks.1"]
    assert [why for _, why in coverage.left] == ["matters too much for the share that was asked for"] * 2
    x = torch.randn(16, LENGTH // 2, WIDTH).repeat_interleave(2, 1)
    shifted = made(workload.model, torch.cat([torch.randn(16, 1, WIDTH), x], 1)[:, :LENGTH])
    assert least_missed(shifted.model, {"blocks.0": Merging}, 1.0, 2, shifted) == {"blocks.0": Groups(2, alone=1)}


def test_what_matters_little_gets_larger_groups_before_what_matters_more_gets_any() -> None:
    torch.manual_seed(0)
    workload = made(Stack(Block(), Block(strength=0.001), Block(strength=0.01)))
    found = {}
    for doublings in (1, 2, 3, 4, 6):
        _, coverage = compress_model(Recipe((MergePositions(share=doublings / 6, size=4),), "torch"), workload)
        found[doublings] = {name[-1]: what.partition("groups of ")[2][0] for name, what in coverage.done}
    assert found == {
        1: {"1": "2"},
        2: {"1": "4"},
        3: {"1": "4", "2": "2"},
        4: {"1": "4", "2": "4"},
        6: {"0": "4", "1": "4", "2": "4"},
    }


def test_classes_and_names_stay_and_copies_go_their_own_way() -> None:
    workload = made(Stack(Block(), Block()))
    model, _ = compress_model(Recipe((MergePositions(share=0.5),), "torch"), workload)
    assert [kind_of(block) for block in model.blocks] == [Block, Block] and len(list(blocks(model))) == 2
    assert list(model.state_dict()) == list(workload.model.state_dict())
    copied = copy.deepcopy(model)
    again, coverage = compress_model(Recipe((MergePositions(share=0.5), MergePositions(share=1.0)), "torch"), workload)
    assert [isinstance(block, Merging) for block in again.blocks] == [True, True]
    assert sorted(why for _, why in coverage.left)[0] == "is computed for groups already"
    assert torch.equal(outputs(copied, workload), outputs(model, workload))
    assert damage([outputs(again, workload)], [outputs(model, workload)]) > 0


class Second(nn.Module):
    """What takes the batch in the second dimension: (n, t, WIDTH) turned."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        for block in self.blocks:
            x, _ = block(x)
        return x.transpose(0, 1)


class Picky(Block):
    """Takes LENGTH positions and no other number."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, str]:
        return super().forward(x + torch.ones(LENGTH, 1), mask)


class Remembering(Block):
    """Raises where it is called with something else than the network gives it, as a block with a cache may."""

    last: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, str]:
        if self.last is not None and torch.equal(x[:, 1:], -self.last[:, 1:]):
            raise ValueError("what is this")
        self.last = x
        return super().forward(x, mask)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Stack(Block(causal=True), Block(causal=True)), "does not hear the others"),
        (Second(), "in the second dimension"),
        (Stack(Picky(), Picky()), "raises RuntimeError"),
        (Stack(Remembering(), Remembering()), "raises ValueError: what is this"),
    ],
)
def test_what_may_not_be_merged_is_refused_with_the_reason(model: nn.Module, why: str) -> None:
    with pytest.raises(LayerError, match=why):
        compress_model(Recipe((MergePositions(),), "torch"), made(model))
    assert not mergeable(model, made(model))


def test_networks_without_sequences_are_refused() -> None:
    for name, why in (("mlp", "no nn.ModuleList"), ("stacked", "reads no sequence of vectors")):
        with pytest.raises(LayerError, match=why):
            compress_model(Recipe((MergePositions(),), "torch"), networks()[name])
    with pytest.raises(LayerError, match="too few to make groups of"):
        compress_model(Recipe((MergePositions(size=LENGTH),), "torch"), made(Stack(Block(), Block())))
    assert mergeable(networks()["transformer"].model, networks()["transformer"]) == ["blocks.0", "blocks.1"]


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("target", installed())
def test_files_compute_the_same(target: str, tmp_path) -> None:
    workload = networks()["transformer"]
    model, _ = compress_model(Recipe((MergePositions(share=1.0),), target), workload)
    check_export(find(target), model, workload, tmp_path)


def test_blocks_that_follow_each_other_are_merged_once_and_compute_what_they_would_alone() -> None:
    torch.manual_seed(0)
    workload = made(Stack(*(Block() for _ in range(4)), kind="added"))
    model, _ = compress_model(Recipe((MergePositions(share=1.0),), "torch"), workload)
    merged: list[int] = []
    whole = Groups.merged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Groups, "merged", lambda g, x, d, how="mean": merged.append(x.dim()) or whole(g, x, d, how))
        together = outputs(model, workload)
        assert merged.count(3) == 1
        for block in model.blocks:  # what another module hands on has no trail
            block.register_forward_hook(lambda _, __, result: (result[0].clone(), *result[1:]))
        torch.testing.assert_close(outputs(model, workload), together)
        assert merged.count(3) == 5


class Reader(nn.Module):
    """(n, t, WIDTH), (n, s, WIDTH) and a mask (1, s) that is added: attention to the second sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.ask, self.tell = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        k, v = self.tell(memory).unsqueeze(1).chunk(2, -1)
        return x + F.scaled_dot_product_attention(self.ask(x).unsqueeze(1), k, v, attn_mask=mask).squeeze(1)


class Readers(nn.Module):
    """(n, t, WIDTH) and (n, s, WIDTH) to the former's like, by two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Reader() for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory, mask)
        return x


class Translator(nn.Module):
    """(n, t, WIDTH) and (n, s, WIDTH) to the former's like: blocks for the second, which readers attend to."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.ModuleList(Block() for _ in range(2)), Readers()

    def forward(self, x: Tensor, heard: Tensor) -> Tensor:
        for block in self.encoder:
            heard, _ = block(heard)
        return self.decoder(x, heard, torch.zeros(1, heard.shape[1]))


def translating(x: Tensor, heard: Tensor) -> Workload:
    return Workload(Translator().eval(), (x[:2], heard[:2]), [(x, heard)], score=lambda predict: 0.0)


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_what_another_part_hands_over_is_read_in_groups(tmp_path) -> None:
    torch.manual_seed(0)
    x, heard = torch.randn(6, 5, WIDTH), torch.randn(6, LENGTH // 2, WIDTH).repeat_interleave(2, 1)
    workload = translating(x, heard)
    assert mergeable(workload.model, workload) == ["encoder.0", "encoder.1", "decoder"]
    recipe = Recipe((MergePositions(share=1.0, where="decoder"),), "torch")
    model, coverage = compress_model(recipe, workload)
    assert coverage.done == [("decoder", "reads groups of 2 positions")] and kind_of(model.decoder) is Readers
    lengths: list[int] = []
    model.decoder.layers[1].tell.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    torch.testing.assert_close(outputs(model, workload), outputs(workload.model, workload), rtol=1e-4, atol=1e-5)
    assert lengths == [LENGTH // 2]
    everything, _ = compress_model(Recipe((MergePositions(share=1.0),), "torch"), workload)
    for target in installed():
        folder = tmp_path / target
        folder.mkdir()
        check_export(find(target), everything, workload, folder)


def test_a_sequence_as_long_as_the_own_one_may_be_anything_and_is_left() -> None:
    x = torch.randn(6, LENGTH, WIDTH)
    assert mergeable((workload := translating(x, x + 1)).model, workload) == ["encoder.0", "encoder.1"]


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("groups", [Groups(2, alone=1), Groups(5), Groups(4)])
@pytest.mark.parametrize("target", [name for name in installed() if name != "torch"])
def test_groups_of_all_kinds_are_read_in_int8(target: str, groups: Groups, tmp_path) -> None:
    torch.manual_seed(0)
    workload = translating(torch.randn(6, 5, WIDTH), torch.randn(6, LENGTH, WIDTH))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "featherweight.passes.merge_positions.least_missed", lambda _, ways, *__: dict.fromkeys(ways, groups)
        )
        recipe = Recipe((MergePositions(share=1.0), QuantizeStatic(range="minmax")), target)
        model, _ = compress_model(recipe, workload)
    check_export(find(target), model, workload, tmp_path)


@pytest.mark.parametrize("groups", [Groups(2, alone=1), Groups(5, alone=1), Groups(5), Groups(3), Groups(4)])
def test_positions_that_are_in_no_group_stay_by_themselves(groups: Groups) -> None:
    x = torch.randn(2, LENGTH, 3)
    end = groups.end(LENGTH)
    inside = x[:, groups.alone : end].unflatten(1, (-1, groups.size)).mean(2)
    merged = groups.merged(x, 1)
    torch.testing.assert_close(merged, torch.cat([x[:, : groups.alone], inside, x[:, end:]], 1))
    apart = torch.cat([x[:, : groups.alone], inside.repeat_interleave(groups.size, 1), x[:, end:]], 1)
    torch.testing.assert_close(groups.spread(merged, LENGTH), apart)


class Written(Stack):
    """Writes to what each block returned."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x)
            x += torch.linspace(0, 1, WIDTH)
        return x


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("target", installed())
def test_what_is_written_to_between_blocks_is_merged_anew(target: str, tmp_path) -> None:
    torch.manual_seed(0)
    workload = made(Written(Block(), Block(), Block()))
    model, _ = compress_model(Recipe((MergePositions(share=1.0),), target), workload)
    (x,) = workload.calibration[0]
    wanted, pairs = x, model.blocks[0].position_groups
    with torch.no_grad():
        for block in workload.model.blocks:
            merged = pairs.merged(wanted, 1)
            wanted = wanted + pairs.spread(block(merged)[0] - merged, LENGTH) + torch.linspace(0, 1, WIDTH)
    torch.testing.assert_close(outputs(model, workload), wanted)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), wanted)
    check_export(find(target), model, workload, tmp_path)
