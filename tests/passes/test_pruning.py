"""What all prunings of single weights keep to, whatever they think important."""

import pytest
import torch
from torch import nn

from featherweight.encodings import Affine, Masked
from featherweight.errors import LayerError, RecipeError, SettingError
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.passes.prune_random import PruneRandom
from featherweight.passes.prune_sparsegpt import PruneSparsegpt
from featherweight.passes.prune_wanda import PruneWanda
from featherweight.passes.quantize_weights import QuantizeWeights
from featherweight.recipe import Recipe, compress_model
from featherweight.surgery import encoding_of
from featherweight.workload import Workload
from tests import loud

ALL = (PruneRandom, PruneMagnitude, PruneWanda, PruneSparsegpt)
BLIND = (PruneRandom, PruneMagnitude)  # that look at no data


@pytest.fixture(params=ALL, ids=lambda kind: kind.name())
def kind(request):
    return request.param


def compressed(workload, *steps):
    return compress_model(Recipe(steps, "torch"), workload)


def linear(rows: int, columns: int) -> Workload:
    x = torch.randn(64, columns)
    return Workload(nn.Sequential(nn.Linear(columns, rows)).eval(), (x[:2],), [(x,)], lambda predict: 0.0)


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight == 0 for name, layer in model.named_modules() if isinstance(layer, loud.KINDS)}


@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_exactly_n_of_every_m_in_a_row_are_kept(kind, pattern, kept, of):
    workload = loud.workload(0)
    model, coverage = compressed(workload, kind(pattern=pattern))
    treated = [name for name, _ in coverage.done]
    assert treated == (["grouped"] if of == 4 else []) + ["mixed", "up", "head"]
    for name in treated:
        runs = model.get_submodule(name).weight.flatten(1).unflatten(1, (-1, of))
        assert ((runs != 0).sum(2) == kept).all()
    assert dict(coverage.done)["up"] == f"50% zeros ({pattern})"
    assert dict(coverage.left)["depthwise"] == f"its rows hold 9 weights, which is no multiple of {of}"


def test_blocks_go_whole(kind):
    model, coverage = compressed(linear(70, 100), kind(pattern="blocks", share=0.6))
    nonzero = model[0].weight != 0
    inside = nonzero[:64, :96].reshape(2, 32, 3, 32).sum((1, 3)).flatten().tolist()
    assert sorted(inside) == [0] * 3 + [32 * 32] * 3  # 0.6 of six, rounded down
    assert nonzero[64:].all() and nonzero[:, 96:].all()
    assert coverage.done == [("0", "44% zeros (blocks)")]


def test_what_is_too_small_for_a_block_or_a_share_is_left(kind):
    with pytest.raises(LayerError, match=r"0: it is a matrix of 70 by 31, smaller than a block of 32 by 32"):
        compressed(linear(70, 31), kind(pattern="blocks"))
    with pytest.raises(LayerError, match="0: its share, rounded down, is nothing"):
        compressed(linear(32, 32), kind(pattern="blocks"))
    with pytest.raises(LayerError, match="0: its share, rounded down, is nothing"):
        compressed(linear(4, 4), kind(share=0.05))


def test_a_share_beside_a_pattern_that_gives_it_is_refused(kind):
    with pytest.raises(SettingError, match=rf"{kind.name()}: share=0\.6 does not go with pattern='2:4'"):
        kind(share=0.6, pattern="2:4")


@pytest.mark.parametrize("pattern", ["free", "2:4"])
def test_the_same_zeros_after_distillation_and_exact_ones_after_quantization(kind, pattern):
    workload = loud.workload(0)
    prune, teach = kind(pattern=pattern, where="!depthwise"), DistillSoft(steps=5, lr=0.05)
    pruned, _ = compressed(workload, prune)
    taught, _ = compressed(workload, prune, teach)
    rounded, _ = compressed(workload, prune, QuantizeWeights(bits=4, block=32))
    both, _ = compressed(workload, prune, QuantizeWeights(bits=8), teach)
    for name, zero in zeros(pruned).items():
        if name == "depthwise":
            continue
        weights = [model.get_submodule(name).weight for model in (pruned, taught, rounded, both)]
        assert isinstance(encoding_of(taught.get_submodule(name)), Masked)
        assert isinstance(encoding_of(rounded.get_submodule(name)), Affine)
        assert torch.equal(weights[1] == 0, zero)
        assert not torch.equal(weights[1], weights[0])
        assert all((weight[zero] == 0).all() for weight in weights[2:])


def test_zeros_that_there_are_stay_and_count(kind):
    workload = loud.workload(0)
    first = PruneMagnitude(share=0.3)
    once, twice = (zeros(compressed(workload, *steps)[0]) for steps in ((first,), (first, kind(share=0.6))))
    for name, before in once.items():
        assert twice[name][before].all()
        # Wanda takes no fewer from a row that has lost more than the others.
        assert 0.5 < twice[name].float().mean() < 0.65


def test_rounded_weights_are_refused(kind):
    said = rf"Step 2 \({kind.name()}\).*'grouped', which an earlier step .* int8.*Put {kind.name()} before that step"
    with pytest.raises(RecipeError, match=said):
        compressed(loud.workload(0), QuantizeWeights(), kind())


def test_a_weight_that_layers_share_stays_shared(kind):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    model[2].weight = model[0].weight
    x = torch.randn(32, 8)
    after, coverage = compressed(Workload(model, (x[:2],), [(x,)], lambda predict: 0.0), kind())
    assert after[0].weight is after[2].weight or encoding_of(after[0]) is encoding_of(after[2])
    assert [name for name, _ in coverage.done] == ["0", "2"]


def test_layers_that_are_never_called_are_left_by_those_that_need_data(kind):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    x = torch.randn(32, 8)
    _, coverage = compressed(Workload(Idle().eval(), (x[:2],), [(x,)], lambda predict: 0.0), kind())
    left = [] if kind in BLIND else [
        ("idle", "is not called on the calibration data, so that nothing is known of its inputs")
    ]  # fmt: skip
    assert coverage.left == left


@pytest.mark.parametrize("kind", [PruneWanda, PruneSparsegpt])
def test_it_does_not_matter_how_the_data_is_cut_into_batches(kind):
    workload = loud.workload(0)
    whole = Workload(
        workload.model, workload.example, [(torch.cat([x for (x,) in workload.calibration]),)], workload.score
    )
    one, other = (compressed(data, kind())[0] for data in (workload, whole))
    for name, zero in zeros(one).items():
        assert (zero == zeros(other)[name]).float().mean() > 0.999
        torch.testing.assert_close(
            one.get_submodule(name).weight[~zero], other.get_submodule(name).weight[~zero], rtol=1e-2, atol=1e-3
        )
