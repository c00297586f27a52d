"""Costs of layers: what is measured of tiny networks in real processes, and the arithmetic with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from featherweight import cost_table, passes, targets
from featherweight.cost_table import (
    PRECISIONS,
    Correction,
    CostTable,
    Estimate,
    Form,
    Predicted,
    Shape,
    candidates,
    corrected_ms,
    corrections,
    fitted,
    interpolated,
    relative_error,
    shapes_of,
    stored_predictions,
    widths,
    write_predictions,
)
from featherweight.cost_table import cost_table as table_of
from featherweight.errors import ArtifactError, BudgetError, LayerError, TargetError
from featherweight.progress import Progress
from featherweight.recipe import Recipe, compress_model
from featherweight.targets import Kernel
from featherweight.testing import networks
from featherweight.workload import Workload

ROOT = Path(__file__).parent.parent


class Twice(nn.Module):
    """Convolutions of few channels, two of them of one shape; and one that int8 does not treat."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.each = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.wider, self.head = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.wider(self.each(self.second(self.first(x)))).mean((2, 3)))


def workload_of(model: nn.Module, *sizes: int) -> Workload:
    x = torch.randn(2, *sizes)
    return Workload(model.eval(), (x,), [(x,)], lambda predict: 0.0)


@pytest.fixture(scope="module")
def twice() -> Workload:
    torch.manual_seed(0)
    return workload_of(Twice(), 4, 6, 6)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "costs"


@pytest.fixture(scope="module")
def kept(twice, tmp_path_factory) -> dict[str, tuple[CostTable, Path]]:
    """The table of each target, with the folder of its file."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost_table, "RUNS", 2)
        patch.setattr(cost_table, "CALLS", 1)
        for target in targets.installed():
            folder, few = tmp_path_factory.mktemp(target), ("fp32", "int8")
            if target != "onnxruntime":
                patch.setattr(cost_table, "PRECISIONS", {name: PRECISIONS[name] for name in few})
            patch.setenv("FEATHERWEIGHT_CACHE", str(folder))
            found[target] = table_of(twice, target, threads=1), folder / "costs"
    return found


@pytest.fixture
def filled(kept, cache) -> Path:
    """The cache, where the table of ONNX Runtime lies in it; returned is its file."""
    shutil.copytree(kept["onnxruntime"][1], cache)
    (path,) = cache.iterdir()
    return path


@pytest.fixture
def floats(monkeypatch) -> None:
    """Nothing but floats is measured, and that briefly."""
    monkeypatch.setattr(cost_table, "PRECISIONS", {"fp32": ()})
    monkeypatch.setattr(cost_table, "RUNS", 2)
    monkeypatch.setattr(cost_table, "CALLS", 1)


@pytest.fixture
def unmeasured(monkeypatch) -> None:
    """Times are made up: a millisecond for a thousand products."""

    def times(entries, *_):
        return {(precision, s): s.inputs * s.outputs / 1000 for precision, s in entries}, {}

    monkeypatch.setattr(cost_table, "_profiled", times)


class Told(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


# ------------------------------------------------------------------------------------------------ shapes


def test_layers_of_one_shape_are_one_shape(twice):
    found = shapes_of(twice.model, twice)
    assert set(found) == {"first", "second", "each", "wider", "head"}
    assert found["first"] == found["second"] and found["first"] != found["each"]
    assert found["each"][0].form.depthwise and not found["first"][0].form.depthwise
    assert str(found["head"][0]) == "4→2 Linear on rows"
    assert str(found["first"][0]).startswith("4→4 Conv2d on 6×6 kernel_size 3×3 stride 1×1 padding 1×1")


def test_a_layer_that_is_called_twice_costs_twice():
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(self.mix(x))

    workload = workload_of(Again(), 4)
    (shapes,) = shapes_of(workload.model, workload).values()
    assert len(shapes) == 2
    table = CostTable("torch", 1, 1, shapes, {("fp32", shapes[0]): 1.5})
    assert table.estimate(workload.model, workload) == Estimate(3.0, 16.0, "fp32")


def test_the_batch_is_in_no_shape():
    workload = workload_of(nn.Linear(4, 4), 5, 4)
    assert shapes_of(workload.model, workload, 1) == shapes_of(workload.model, workload, 6)


def test_widths_are_shares_in_multiples():
    assert widths(512, 64) == [512, 384, 256, 128] and widths(96, 16) == [96, 64, 48, 32]
    assert widths(10, 64) == [10]
    assert widths(24, 8, divisor=6) == [24, 18, 12, 6]


def test_each_layer_is_measured_at_both_of_its_widths_as_they_can_become():
    plain = Form("Conv2d", 1, (4, 4), (("groups", 1),))
    assert len(candidates(Shape(plain, 64, 64), 16)) == 16
    assert {shape.inputs for shape in candidates(Shape(plain, 3, 64), 16)} == {3}
    each = Form("Conv2d", 1, (4, 4), (("groups", "each"),))
    assert all(shape.inputs == shape.outputs for shape in candidates(Shape(each, 64, 64), 16))
    lstm = Shape(Form("LSTM", 1, (4,), ()), 64, 64)
    assert candidates(lstm, 16) == [lstm]


# ------------------------------------------------------------------------------------------------ mathematics


def test_layers_are_measured_among_as_many_weights_as_a_network_of_their_width_has():
    form = Form("Linear", 1, (), ())
    layers = [Shape(form, 1024, 1024)] * 2 + [Shape(form, 1024, 512)]  # 10 MiB
    beside = cost_table._bytes_beside(layers, multiple=8)
    assert beside[Shape(form, 1024, 1024)] == 10 << 20 and beside[Shape(form, 256, 256)] == (10 << 20) / 16
    entries = [("fp32", shape) for shape in sorted(beside, key=lambda shape: -beside[shape])]
    chunks = [chunk for _, chunk in cost_table._chunks(entries, beside)]
    assert [entry for chunk in chunks for entry in chunk] == entries and len(chunks) < len(entries) / 2
    for chunk in chunks:
        held = sum(4 * shape.inputs * shape.outputs for _, shape in chunk)
        assert held <= min(beside[shape] for _, shape in chunk)
    assert max(cost_table._bytes_beside(layers * 9, multiple=8).values()) == cost_table.TOGETHER_BYTES


def test_what_is_linear_in_both_widths_is_interpolated_exactly():
    def time(inputs: int, outputs: int) -> float:
        return 0.5 + 0.1 * inputs + 0.2 * outputs + 0.01 * inputs * outputs

    points = {(i, o): time(i, o) for i in (16, 32, 64) for o in (8, 64, 128)}
    for inputs, outputs in ((16, 8), (40, 100), (64, 10), (20, 128), (128, 200), (14, 8)):
        assert interpolated(points, inputs, outputs) == pytest.approx(time(inputs, outputs))


def test_points_of_several_layers_need_not_form_one_grid():
    points = {(8, 8): 1.0, (8, 16): 2.0, (16, 8): 3.0, (16, 16): 5.0, (16, 64): 9.0, (8, 64): 4.0, (64, 8): 7.0}
    assert interpolated(points, 12, 40) == pytest.approx((3.0 + 7.0) / 2)
    assert interpolated(points, 64, 8) == 7.0


def test_below_all_widths_time_falls_no_faster_than_the_width():
    points = {(16, 16): 1.0, (32, 16): 8.0, (16, 32): 1.0, (32, 32): 8.0}
    assert interpolated(points, 8, 16) == pytest.approx(0.5)
    assert interpolated({(16, 16): 2.0}, 4, 16) == pytest.approx(0.5)


def test_one_network_tells_what_lies_between_its_layers():
    estimate = Estimate(2.0, 1e6, "fp32")
    one = fitted([(estimate, 3.0)])
    assert one.factor == pytest.approx(1.0) and one.latency_ms(estimate) == pytest.approx(3.0)
    half = Estimate(0.5, 5e5, "fp32")
    assert one.latency_ms(half) == pytest.approx(0.5 + 0.5)


def test_a_sum_that_is_too_large_is_made_smaller():
    estimate = Estimate(2.0, 1e6, "fp32")
    one = fitted([(estimate, 1.0)])
    assert one.ms_per_value == 0.0 and one.latency_ms(estimate) == pytest.approx(1.0, rel=0.01)


def test_several_networks_tell_both_parts():
    truth = Correction(1.3, 2e-6)
    known = [Estimate(2.0, 1e6, "int8"), Estimate(0.5, 7e5, "int8"), Estimate(0.2, 2e5, "int8")]
    found = fitted([(estimate, truth.latency_ms(estimate)) for estimate in known])
    assert found.factor == pytest.approx(1.3, rel=0.02)
    assert found.ms_per_value == pytest.approx(2e-6, rel=0.05)


def test_each_precision_has_its_own_correction_and_fp32_stands_in():
    fp32, int8, int4 = (Estimate(1.0, 1e6, precision) for precision in ("fp32", "int8", "int4"))
    known = corrections([(fp32, 2.0), (int8, 5.0)])
    assert [corrected_ms(e, known) for e in (fp32, int8, int4)] == pytest.approx([2.0, 5.0, 2.0])
    assert corrected_ms(fp32, {}) == 1.0
    assert relative_error(3.0, 2.0) == 0.5


# ------------------------------------------------------------------------------------------------ measuring


@pytest.mark.parametrize("target", targets.installed())
def test_every_layer_has_a_time_in_each_precision_or_a_reason(twice, kept, target):
    table, _ = kept[target]
    shapes = {name: shapes[0] for name, shapes in shapes_of(twice.model, twice).items()}
    assert len(table.own) == 4 and table.fresh == 4 * (3 if target == "onnxruntime" else 2)
    assert all(ms > 0 for ms in table.entries.values())
    assert all(("fp32", shape) in table.entries for shape in shapes.values())
    assert all(("int8", shapes[name]) in table.entries for name in ("first", "each", "head"))
    assert "quantize_static does not treat" in table.left["int8", shapes["wider"]]
    # where the target does not hold a layer in a precision, it stays in floats, and costs as much
    assert table.latency_ms(shapes["wider"], "int8") == table.entries["fp32", shapes["wider"]]
    heading, *rows = cost_table.in_short(table)
    assert len(rows) == len(table.entries) and all(len(row) == len(heading) for row in rows)


@pytest.mark.parametrize("target", targets.installed())
def test_a_profile_names_each_layer_however_short_it_runs(twice, target, tmp_path):
    targets.find(target).export(twice.model, twice, tmp_path)
    kernels = targets.find(target).profile(tmp_path, [twice.example[0].numpy()], 1, runs=50)
    for name in ("first", "second", "each", "wider"):  # the last is named after the output
        found = [kernel.kind for kernel in kernels if re.match(rf"{name}[./_]", kernel.name)]
        assert any("conv" in kind.lower() for kind in found), name


def test_what_was_measured_is_not_measured_again(twice, kept, filled, monkeypatch):
    first = kept["onnxruntime"][0]
    monkeypatch.setattr(cost_table, "build", None)
    again = table_of(twice, "onnxruntime", threads=1)
    assert again.fresh == 0 and again.entries == first.entries and again.left == first.left
    with pytest.raises(TypeError):  # other threads are another table
        table_of(twice, "onnxruntime", threads=2)


def test_networks_share_entries(filled, floats):
    before = json.loads(filled.read_text())["entries"]
    other = workload_of(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 6), nn.Flatten()), 4, 6, 6)
    assert table_of(other, "onnxruntime", threads=1).fresh == 1
    after = json.loads(filled.read_text())["entries"]
    (fresh,) = set(after) - set(before)
    assert fresh.startswith("fp32 4→2 Conv2d on 6×6 kernel_size 6×6") and before.items() <= after.items()


SCRIPT = """
from tests.test_cost_table import Twice, workload_of
from featherweight import cost_table
cost_table.TOGETHER, cost_table.RUNS, cost_table.CALLS = 1, 2, 1
whole = cost_table._Cache.add
def add(*a):
    whole(*a)
    print("written", flush=True)
cost_table._Cache.add = add
cost_table.cost_table(workload_of(Twice(), 4, 6, 6), "torch", threads=1)
"""


def test_what_a_killed_run_measured_is_there(twice, cache, floats):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, cwd=ROOT, env=dict(os.environ))
    assert process.stdout is not None
    with process.stdout:
        for _ in range(2):
            assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [path.suffix for path in cache.iterdir() if not path.name.startswith(".")] == [".json"]
    assert table_of(twice, "torch", threads=1).fresh <= 2


def test_recurrent_layers_are_measured_as_they_are(floats):
    class Heard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(32, 32, batch_first=True, bidirectional=True), nn.Linear(64, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    workload = workload_of(Heard(), 5, 32)
    table = table_of(workload, "torch", threads=1)
    lstm = shapes_of(workload.model, workload)["lstm"][0]
    assert str(lstm) == "32→32 LSTM on 5 num_layers 1 bidirectional True"
    assert table.entries["fp32", lstm] > 0 and sum(shape.form.recurrent for _, shape in table.entries) == 1


def test_what_a_profile_does_not_name_lies_between_the_layers(twice, unmeasured, monkeypatch):
    monkeypatch.setattr(cost_table, "_profiled", lambda entries, *_: ({}, dict.fromkeys(entries, "is not named")))
    table = table_of(twice, "onnxruntime", threads=1)
    estimate = table.estimate(twice.model, twice)
    assert estimate.layers_ms == 0 and fitted([(estimate, 2.0)]).latency_ms(estimate) == pytest.approx(2.0)


def test_what_was_measured_on_a_busy_machine_is_told_and_can_be_measured_anew(cache, floats, monkeypatch):
    head, told = workload_of(nn.Linear(4, 2), 4), Told()
    shares = iter((0.4, 0.0))
    kernels = [Kernel("entry0.layer/node_linear", "Gemm", "fp32", 2.0), Kernel("entry0.reader/x", "Gemm", "fp32", 9.0)]
    monkeypatch.setattr(cost_table, "profiled", lambda *_, **__: (kernels, next(shares)))
    for anew, fresh in ((False, 1), (False, 0), (True, 1)):
        table = table_of(head, "torch", threads=1, anew=anew, progress=told)
        assert table.fresh == fresh and list(table.entries.values()) == [2.0]
    assert len(told.lines) == 1 and "1 layers on torch waited 40%" in told.lines[0] and "--anew" in told.lines[0]


BROKEN = {"cut off": "{", "no object": "[]", "no entries": '{"key": 1}', "no time": None}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_read_is_set_aside(filled, content, unmeasured):
    stored = json.loads(filled.read_text())
    filled.write_text(content or json.dumps({**stored, "entries": dict.fromkeys(stored["entries"], float("nan"))}))
    told = Told()
    table = table_of(workload_of(nn.Linear(4, 2), 4), "onnxruntime", threads=1, progress=told)
    assert table.fresh == 3 and len(json.loads(filled.read_text())["entries"]) == 3
    assert len(told.lines) == 1 and "set aside" in told.lines[0] and filled.name in told.lines[0]
    assert {path.name for path in filled.parent.iterdir()} == {filled.name, f"{filled.stem}.broken"}


def test_what_cannot_be_measured_with_others_is_measured_without_it(twice, unmeasured, monkeypatch):
    real = cost_table._profiled

    def refusing(entries, *rest):
        if any(shape.form.depthwise for _, shape in entries):
            raise LayerError("no such layers here. Leave them out.")
        return real(entries, *rest)

    monkeypatch.setattr(cost_table, "_profiled", refusing)
    table = table_of(twice, "onnxruntime", threads=1)
    assert sum("no such layers here" in why for why in table.left.values()) == 3
    assert len(table.entries) == 9


def test_a_network_of_other_widths_and_precision_has_an_estimate(unmeasured):
    workload = networks()["residual"]
    table = table_of(workload, "onnxruntime", threads=1)
    step = passes.build("prune_channels", {"share": 0.4}, "test")
    pruned, _ = compress_model(Recipe((step,), "onnxruntime"), workload)
    plain, narrow = table.estimate(workload.model, workload), table.estimate(pruned, workload)
    assert narrow.values < plain.values and narrow.precision == plain.precision == "fp32"
    assert 0 < narrow.layers_ms < plain.layers_ms
    static, _ = compress_model(Recipe((passes.build("quantize_static", {}, "test"),), "onnxruntime"), workload)
    assert table.estimate(static, workload) == table.estimate(workload.model, workload, "int8")
    few, _ = compress_model(Recipe((passes.build("quantize_weights", {"bits": 4}, "test"),), "onnxruntime"), workload)
    assert table.estimate(few, workload).precision == "int4"


# ------------------------------------------------------------------------------------------------ refusals


def test_refusals_say_what_to_do(twice, unmeasured, tmp_path, monkeypatch):
    with pytest.raises(LayerError, match=r"calls no convolution, linear or recurrent layer.*nothing to measure"):
        table_of(workload_of(nn.ReLU(), 4), "onnxruntime", threads=1)
    with pytest.raises(TargetError, match="There is no target 'abacus'"):
        table_of(twice, "abacus", threads=1)
    with pytest.raises(BudgetError, match="threads=0 makes no sense"):
        table_of(twice, "onnxruntime", threads=0)
    empty = CostTable("onnxruntime", 1, 1, [], {})
    with pytest.raises(LayerError, match=r"says nothing of 4→4 Conv2d on 6×6 .*Measure it with cost_table"):
        empty.estimate(twice.model, twice)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ArtifactError, match=r"cannot be written.*FEATHERWEIGHT_CACHE"):
        table_of(workload_of(nn.Linear(4, 2), 4), "torch", threads=1)


def test_the_cache_lies_where_the_user_has_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("FEATHERWEIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cost_table.cache_folder() == tmp_path / "featherweight" / "costs"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cost_table.cache_folder() == Path.home() / ".cache" / "featherweight" / "costs"


def test_predictions_survive_the_disk(tmp_path):
    path = tmp_path / "costs.json"
    assert stored_predictions(path) == []
    found = [Predicted("0" * 16, 1.5, 2.0)]
    write_predictions(path, found)
    assert stored_predictions(path) == found
    for text in ("[1]", "{", '[{"digest": "a", "predicted_ms": -1, "measured_ms": 1}]'):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=r"costs\.json holds no predictions of this version.*Delete it"):
            stored_predictions(path)
