"""Linear layers in compressed rows: they compute what the dense ones do, whichever way is chosen."""

from pathlib import Path

import pytest
import torch
from torch import nn

from featherweight import targets
from featherweight.passes.prune_magnitude import PruneMagnitude
from featherweight.sparse import SparseLinear
from featherweight.workload import Workload


def layer(share: float) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(512, 256)
    with torch.no_grad():
        made.weight.mul_(torch.rand_like(made.weight) >= share)
    return made


@pytest.mark.parametrize("shape", [(512,), (3, 512), (2, 5, 512), (0, 512)])
@pytest.mark.parametrize("bias", [True, False])
def test_compressed_rows_compute_what_the_dense_layer_does(shape: tuple[int, ...], bias: bool) -> None:
    dense, x = layer(0.95), torch.randn(shape)
    chosen = SparseLinear(dense.weight, dense.bias if bias else None)
    wanted = nn.functional.linear(x, dense.weight, dense.bias if bias else None)
    torch.testing.assert_close(chosen._sparse(x), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chosen(x), wanted, atol=1e-5, rtol=1e-5)


def test_the_faster_way_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for slow in ("_dense", "_sparse"):
        dense = layer(0.95)
        chosen = SparseLinear(dense.weight, dense.bias)
        ticks = iter([0.0, 9.0, 0.0, 1.0] * 5 if slow == "_dense" else [0.0, 1.0, 0.0, 9.0] * 5)
        with monkeypatch.context() as patched:
            patched.setattr("featherweight.sparse.time.perf_counter", lambda ticks=ticks: next(ticks))
            chosen(torch.randn(4, 512))
        assert (chosen.dense is None, chosen.rows is None) == (slow == "_dense", slow == "_sparse")


@pytest.mark.parametrize(("share", "used"), [(0.95, True), (0.5, False)])
def test_a_file_uses_them_for_layers_with_nearly_no_weights_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, used: bool
) -> None:
    made: list[nn.Module] = []
    monkeypatch.setattr("featherweight.sparse.SparseLinear", lambda *args: made.append(SparseLinear(*args)) or made[-1])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    x = torch.randn(8, 512)
    workload = Workload(model, (x[:1],), [(x,)], lambda predict: 0.0)
    pruned = PruneMagnitude(where="0", share=share).apply(model, workload)
    target = targets.find("torch")
    target.export(pruned, workload, tmp_path)
    (found,) = target.load(tmp_path, threads=1)([x.numpy()])
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), pruned(x), atol=1e-5, rtol=1e-5)
    assert len(made) == used
