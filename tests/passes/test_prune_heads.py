"""Heads without which the outputs change least go first, measured and not guessed; what cannot go is named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.damage import damage
from featherweight.errors import LayerError, RecipeError
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_channels import PruneChannels
from featherweight.passes.prune_heads import PruneHeads
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.recipe import Recipe, compress_model
from featherweight.workload import Workload

WIDTH, EACH = 32, 8
X = torch.randn(64, 6, WIDTH, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Four heads of eight features; what a head gives is added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(x.shape[0], 6, -1, EACH).transpose(1, 2) for f in (self.query, self.key, self.value))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def scale(self, head: int, made: float, read: float) -> None:
        """What makes the head's values, and what reads them, times a factor."""
        part = slice(head * EACH, (head + 1) * EACH)
        with torch.no_grad():
            self.value.weight[part] *= made
            self.value.bias[part] *= made
            self.out.weight[:, part] *= read


def made(model: nn.Module) -> Workload:
    return Workload(model.eval(), (X[:2],), [(part,) for part in X.split(32)], score=lambda predict: 0.0)


def after(step: object, workload: Workload) -> tuple[nn.Module, float]:
    model, _ = compress_model(Recipe((step,), "torch"), workload)
    with torch.no_grad():
        return model, damage([model(X)], [workload.model(X)])


def two() -> nn.Sequential:
    return nn.Sequential(Attention(), Attention())


def test_the_heads_that_are_missed_least_go_wherever_they_are() -> None:
    model = two()
    for head in (1, 2):
        model[0].scale(head, 1.0, 0.01)
    model[1].scale(3, 1.0, 0.01)
    step = PruneHeads(share=3 / 8)
    pruned, coverage = compress_model(Recipe((step,), "torch"), made(model))
    names = ("query", "key", "value")
    assert set(coverage.done) == {(f"0.{n}", "4 -> 2 heads") for n in names} | {
        (f"1.{n}", "4 -> 3 heads") for n in names
    }
    kept = model[0].value.weight.view(4, EACH, WIDTH)[[0, 3]].reshape(-1, WIDTH)
    assert torch.equal(pruned[0].value.weight, kept)
    assert after(step, made(model))[1] < 1e-3


def test_beats_magnitude_where_a_head_that_looks_hard_has_nothing_to_say() -> None:
    model = nn.Sequential(Attention())
    model[0].scale(2, 1e-4, 1.0)
    with torch.no_grad():
        for layer in (model[0].query, model[0].key):
            layer.weight[2 * EACH : 3 * EACH] *= 3
    by_damage = after(PruneHeads(share=0.25), made(model))
    by_size = after(PruneChannels(share=0.3, importance="magnitude", allocation="uniform", where="0.*"), made(model))
    assert by_damage[0][0].value.out_features == by_size[0][0].value.out_features == 3 * EACH
    assert by_damage[1] < 0.01 * by_size[1]


def test_loses_where_heads_make_up_for_one_another() -> None:
    model = nn.Sequential(Attention())
    attention = model[0]
    with torch.no_grad():
        for layer in (attention.query, attention.key, attention.value):
            layer.weight[:EACH] = layer.weight[EACH : 2 * EACH]
            layer.bias[:EACH] = layer.bias[EACH : 2 * EACH]
        attention.out.weight[:, :EACH] = -attention.out.weight[:, EACH : 2 * EACH]
    attention.scale(0, 5.0, 1.0)
    attention.scale(1, 5.0, 1.0)
    pruned, lost = after(PruneHeads(share=0.5), made(model))
    assert lost > 1e-3  # without both of the first two, nothing would be
    assert pruned[0].value.out_features == 2 * EACH


def test_each_attention_keeps_a_head() -> None:
    model = two()
    for head in range(4):
        model[0].scale(head, 1.0, 1e-3)
    pruned, _ = after(PruneHeads(share=0.5), made(model))
    assert [part.value.out_features // EACH for part in pruned] == [1, 3]


def test_where_chooses_attentions() -> None:
    _, coverage = compress_model(Recipe((PruneHeads(where="1.*"),), "torch"), made(two()))
    assert {layer.partition(".")[0] for layer, _ in [*coverage.done, *coverage.left]} == {"1"}


def test_an_attention_of_which_a_part_is_left_out_is_named() -> None:
    _, coverage = compress_model(Recipe((PruneHeads(where="!0.key"),), "torch"), made(two()))
    assert ("0.query", "hangs together with '0.key', which where='!0.key' leaves out") in coverage.left


def test_networks_without_attention_are_refused() -> None:
    workload = Workload(
        nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 4),), [(torch.randn(2, 4),)], lambda p: 0.0
    )
    with pytest.raises(
        LayerError, match="no attention of Sequential that prune_heads can remove heads of: there is none"
    ):
        compress_model(Recipe((PruneHeads(),), "torch"), workload)


def test_heads_go_before_weights_are_stored_in_few_bits() -> None:
    with pytest.raises(RecipeError, match="come before those that change how weights are stored"):
        compress_model(Recipe((QuantizeWeights(), PruneHeads()), "torch"), made(two()))
    compress_model(Recipe((PruneHeads(), DistillSoft(steps=2, loss="mse"), QuantizeWeights()), "torch"), made(two()))
