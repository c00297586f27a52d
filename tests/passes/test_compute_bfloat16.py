"""Floats computed in bfloat16: the file says so, its runtime does so, and what cannot is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.artifact import _vector_problems, build, verify
from featherweight.errors import ExportError, LayerError
from featherweight.measure import machine
from featherweight.passes.compute_bfloat16 import ComputeBfloat16
from featherweight.passes.quantize_static import QuantizeStatic
from featherweight.recipe import Recipe, compress_model
from featherweight.surgery import floats_of
from featherweight.testing import networks
from featherweight.workload import Workload, call

ABLE = {"avx512_bf16", "amx_bf16"} & set(machine()["features"] or [])


def test_in_torch_nothing_changes_but_what_the_target_is_told() -> None:
    workload = networks()["transformer"]
    model, coverage = compress_model(Recipe((ComputeBfloat16(),), "openvino"), workload)
    assert floats_of(model) == "bfloat16" and floats_of(workload.model) == "float32"
    assert {what for _, what in coverage.done} == {"is computed in bfloat16 where it is computed in floats"}
    with torch.no_grad():
        assert torch.equal(call(model, workload.example), call(workload.model, workload.example))


def test_a_part_of_a_network_is_refused() -> None:
    with pytest.raises(LayerError, match=r"is for the whole network.*Leave `where` out"):
        compress_model(Recipe((ComputeBfloat16(where="blocks.0.*"),), "openvino"), networks()["transformer"])


def test_a_target_that_cannot_refuses_and_names_one_that_can(tmp_path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(ExportError, match=r"torch cannot be told to compute in bfloat16.*installed are .*openvino"):
        build(Recipe((ComputeBfloat16(),), "torch"), networks()["mlp"], tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("steps", [(), (QuantizeStatic(),)])
def test_the_file_says_so_and_the_runtime_does_so_where_the_processor_can(steps, tmp_path) -> None:
    pytest.importorskip("openvino")
    workload = networks()["transformer"]
    exact = build(Recipe(steps, "openvino"), workload, tmp_path / "exact")
    told = build(Recipe((*steps, ComputeBfloat16()), "openvino"), workload, tmp_path / "told")
    assert (exact.manifest["floats"], told.manifest["floats"]) == ("float32", "bfloat16")
    assert told.bytes < 1.1 * exact.bytes and verify(tmp_path / "told") == []
    a, b = (call(artifact.predict(), workload.calibration[0]) for artifact in (exact, told))
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    off = float((a - b).norm() / a.norm())
    assert off < 0.03 and (off > 1e-5 or not ABLE)


class Masked(nn.Module):
    """(n, 12, 16) to the like: attention, by logits to which a mask of `shape` is added."""

    def __init__(self, heads: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.heads = heads
        self.mix, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("mask", 2 * torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self.mix(x).chunk(3, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("steps", [(), (QuantizeStatic(),)])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 12), (1, 1, 1, 12), (12, 12)])
def test_attention_by_a_mask_of_one_row_for_all_is_computed_as_any_other(shape, heads, steps, tmp_path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    x = torch.randn(8, 12, 16)
    workload = Workload(Masked(heads, shape).eval(), (x[:1],), [(x,)], score=lambda predict: 0.0)
    recipe = Recipe((*steps, ComputeBfloat16()), "openvino")
    wanted = call(compress_model(recipe, workload)[0], (x,))
    found = call(build(recipe, workload, tmp_path / "a").predict(), (x,))
    assert float((found - wanted).norm() / wanted.norm()) < 0.03


def test_what_was_told_may_differ_more_from_processor_to_processor(tmp_path) -> None:
    pytest.importorskip("openvino")
    for steps, problems in (((), 1), ((ComputeBfloat16(),), 0)):
        made = build(Recipe(steps, "openvino"), networks()["mlp"], tmp_path / str(problems))
        run = made.load()
        assert len(_vector_problems(made, lambda inputs, run=run: [1.03 * run(inputs)[0]])) == problems
        assert len(_vector_problems(made, lambda inputs, run=run: [1.10 * run(inputs)[0]])) == 1


class Far(nn.Module):
    """(n, 8) to (n, 8), by numbers in the thousands that differ by ones."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.relu(self.there(x) + 3000)) - self.back(torch.full_like(x, 3000.0))


@pytest.mark.skipif(not ABLE, reason="this processor has no arithmetic for bfloat16")
def test_a_network_that_does_not_bear_it_is_refused(tmp_path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    x = torch.randn(8, 8)
    workload = Workload(Far().eval(), (x[:2],), [(x,)], score=lambda predict: 0.0)
    with pytest.raises(ExportError, match="may not bear bfloat16: leave that step out"):
        build(Recipe((ComputeBfloat16(),), "openvino"), workload, tmp_path / "a")
    assert build(Recipe((), "openvino"), workload, tmp_path / "b").manifest["export_error"] < 1e-3
