from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from featherweight import artifact as artifacts
from featherweight import measure as measuring
from featherweight import targets
from featherweight.artifact import Artifact
from featherweight.errors import ArtifactError, WorkloadError
from featherweight.machine import machine
from featherweight.measure import (
    Baseline,
    Measurement,
    baseline,
    bootstrap_means,
    drop_bounds,
    file_bytes,
    mean_interval,
    measure,
    timing_inputs,
)
from featherweight.recipe import Recipe
from featherweight.targets import Kernel
from featherweight.timing import Interval, Subject, Timings
from featherweight.workload import Predict, Workload, load, predictor

X = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
RIGHT = X[:, :4].argmax(-1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(4, 8))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def correct(predict: Predict) -> Sequence[float]:
    return (predict(X).argmax(-1) == RIGHT).double().tolist()


def workload(**changes: Any) -> Workload:
    plain = Workload(Net().eval(), (X[:4],), [(X[:64],), (X[64:128],)], score=correct, test_score=correct)
    return dataclasses.replace(plain, **changes)


def fake_artifact(folder: Path, **manifest: Any) -> Artifact:
    """As far as `measure` looks at one; what it predicts is decided by `predicting`."""
    folder.mkdir(exist_ok=True)
    for name in ("manifest.json", "recipe.yaml"):
        (folder / name).write_text("steps: []\ntarget: openvino\n")
    plain = {"files": {"recipe.yaml": {}}, "recipe_digest": "ab" * 8, "target": "openvino", "parameters": 30}
    plain |= {"int8_layers": 0, "export_error": 0.0, "seed": 5, "coverage": [{"layer": "linear", "done": "int8"}]}
    return Artifact(folder, {**plain, **manifest})


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Timings, predictions, profile and machine as a test says, without processes or runtimes."""
    says: dict[str, Any] = {
        "latency": {"original": 8.0, "control": 8.0, "artifact": 2.0, "runtime": 4.0},
        "predict": predictor(Net()),
        "kernels": [Kernel("a", "MatMul", "int8", 3.0), Kernel("b", "Add", "fp32", 1.0)],
        "machine": {**machine(), "architecture": "x86_64", "features": ["avx512_vnni"]},
        "waiting": 0.01,
        "calls": [],
    }

    def interleave(subjects: Sequence[Subject], inputs: Any, **effort: Any) -> Timings:
        says["calls"].append((subjects, inputs, effort))
        rng = np.random.default_rng(0)
        rounds = {
            s.name: [[says["latency"][s.name] * noise] * 3 for noise in rng.uniform(0.99, 1.01, effort["rounds"])]
            for s in subjects
        }
        sizes = {s.name: None if s.run else 1000 for s in subjects}
        return Timings(rounds, sizes, sizes, {s.name: says["waiting"] for s in subjects})

    class Fake:
        tolerance = 0.03

        def profile(self, folder: Path, inputs: Any, threads: int) -> list[Kernel]:
            return says["kernels"]

    monkeypatch.setattr(measuring, "interleave", interleave)
    monkeypatch.setattr(Artifact, "predict", lambda self, threads=1: says["predict"])
    monkeypatch.setattr(measuring, "versions_of", lambda target: {"python": "3"})
    monkeypatch.setattr(measuring, "machine", lambda: says["machine"])
    monkeypatch.setattr(targets, "find", lambda name: Fake())
    says["artifact"] = fake_artifact(tmp_path / "best")
    return says


# ------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_score_intervals_cover_the_truth_about_as_often_as_they_say(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    found = [mean_interval((rng.random(300) < share).tolist()) for _ in range(150)]
    assert 0.90 <= np.mean([low <= share <= high for low, high in found]) <= 0.99


def test_the_upper_bound_of_a_drop_is_passed_by_the_truth_in_about_one_case_of_twenty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    truth, below = 0.04 * (2 * 0.9 - 1), []
    for _ in range(150):
        before = rng.random(400) < 0.9
        flips = rng.random(400)
        after = np.where(flips < 0.04, ~before, before)
        below.append(truth <= drop_bounds(before.astype(float).tolist(), after.astype(float).tolist())[1])
    assert 0.90 <= np.mean(below) <= 0.99


@pytest.mark.parametrize(("count", "share"), [(300, 0.003), (1000, 0.001), (1000, 0.002)])
def test_rare_losses_are_not_taken_for_none(count: int, share: float) -> None:
    """The bootstrap alone covers 64 to 89 % here: most samples hold no loss at all."""
    rng = np.random.default_rng(0)
    before = np.ones(count)
    below = [share <= drop_bounds(before.tolist(), (rng.random(count) >= share).astype(float).tolist())[1]
             for _ in range(200)]  # fmt: skip
    assert np.mean(below) >= 0.90


def test_pairing_sees_what_averages_hide() -> None:
    # Scores vary a lot between examples and hardly at all between networks.
    before = np.random.default_rng(0).normal(10, 5, 500)
    low, high = drop_bounds(before.tolist(), (before - 0.1).tolist())
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
    spread = mean_interval(before.tolist())
    assert spread is not None and spread[1] - spread[0] > 0.5


def test_bootstrap_is_deterministic_and_works_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=500).tolist()
    assert np.array_equal(bootstrap_means(values, 3), bootstrap_means(values, 3))
    assert not np.array_equal(bootstrap_means(values, 3), bootstrap_means(values, 4))
    many = np.zeros(3_000_000).tolist()
    monkeypatch.setattr(measuring, "RESAMPLES", 3)
    assert bootstrap_means(many).tolist() == [0.0, 0.0, 0.0]


def test_single_numbers_have_no_interval() -> None:
    assert mean_interval([0.7]) is None and drop_bounds([0.9], [0.7]) == (None, pytest.approx(0.2))


# ------------------------------------------------------------------------------------------------ parts


def test_timing_inputs_are_the_first_rows_or_the_example_again_and_again() -> None:
    task = workload(example={"x": X[:3]})
    assert np.array_equal(timing_inputs(task, 1)[0], X[:1].numpy())
    assert np.array_equal(timing_inputs(task, 7)[0], torch.cat([X[:3], X[:3], X[:1]]).numpy())
    with pytest.raises(WorkloadError, match="A batch of 0 cannot be timed"):
        timing_inputs(task, 0)


def test_original_bytes_are_those_of_a_real_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    model[1].weight = model[0].weight  # shared, so stored once
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert file_bytes(model) == (tmp_path / "weights.pt").stat().st_size
    assert 360_000 < file_bytes(model) < 380_000


# ------------------------------------------------------------------------------------------------ measuring


def test_the_original_is_measured_against_itself(stage: dict[str, Any]) -> None:
    found = baseline(workload(source="work.py:workload"), threads=2, batch=3)
    original = found.measurement
    ((subjects, inputs, effort),) = stage["calls"]
    assert [(s.name, s.workload) for s in subjects] == [(n, "work.py:workload") for n in ("original", "control")]
    assert inputs[0].shape == (3, 8) and effort["threads"] == 2
    assert found.scores == [1.0] * 400 == found.test_scores and (found.threads, found.batch) == (2, 3)
    assert (original.target, original.digest, original.recipe) == ("eager", "original", "")
    assert original.score == original.original_score == 1.0 and original.drop == original.drop_upper == 0.0
    assert original.bytes == original.original_bytes == file_bytes(Net())
    assert original.parameters == 32 and not original.faster
    assert original.latency_ratio == original.control_ratio and original.control_ratio_low < 1.01
    assert original.latency_ms == pytest.approx(8.0, rel=0.01) and original.peak_rss_bytes == 1000
    assert original.versus_runtime_ratio is None and original.doubts == []


def test_an_artifact_is_measured_beside_the_original(stage: dict[str, Any]) -> None:
    task = workload(source="work.py:workload")
    before = baseline(task, threads=2, batch=3)
    made = stage["artifact"]
    runtime = fake_artifact(made.folder.parent / "runtime")
    found = measure(made, task, before, threads=2, batch=3, runtime=runtime, test=True)
    subjects, _, effort = stage["calls"][-1]
    assert [s.name for s in subjects] == ["original", "artifact", "runtime", "control"]
    assert [s.folder for s in subjects] == [None, made.folder, runtime.folder, None]
    assert found.latency_ratio == pytest.approx(4.0, rel=0.02) and found.faster
    assert found.latency_ratio_low < found.latency_ratio < found.latency_ratio_high
    assert found.versus_runtime_ratio == pytest.approx(2.0, rel=0.02)
    assert len(found.latency_ms_samples) == len(found.original_latency_ms_samples) == effort["rounds"] >= 15
    assert found.kernels == {"fp32": 0.25, "int8": 0.75}
    assert found.fidelity == {"agreement": 1.0, "relative_error": 0.0}
    assert found.bytes == sum(path.stat().st_size for path in made.folder.iterdir())
    assert (found.digest, found.target, found.seed, found.parameters) == ("ab" * 8, "openvino", 5, 30)
    assert found.recipe == "steps: []\ntarget: openvino\n" and found.coverage == made.manifest["coverage"]
    assert (found.score, found.drop, found.test_score, found.test_drop_upper) == (1.0, 0.0, 1.0, 0.0)
    assert found.packed_bytes is None and found.doubts == []


def test_quick_takes_the_control_from_the_baseline_and_leaves_the_test_split_alone(stage: dict[str, Any]) -> None:
    calls: list[str] = []
    task = workload(source="w.py", test_score=lambda predict: calls.append("test") or correct(predict))
    before = baseline(task)
    calls.clear()
    found = measure(stage["artifact"], task, before, quick=True)
    assert [s.name for s in stage["calls"][-1][0]] == ["original", "artifact"]
    assert stage["calls"][-1][2]["rounds"] < stage["calls"][0][2]["rounds"]
    assert (found.control_ratio_low, found.control_ratio_high) == (
        before.measurement.control_ratio_low,
        before.measurement.control_ratio_high,
    )
    assert calls == [] and found.test_score is None and found.test_drop_upper is None and found.test_score_low is None


@pytest.mark.parametrize(
    ("originals", "kept", "doubted"),
    [
        ([15.9], 15.9, False),  # within the noise: once is enough
        ([158.0, 8.5], 8.5, False),
        ([158.0, 40.0], 40.0, True),
        ([3.0, 1.0], 3.0, True),  # what was disturbed was the first measurement, or it is another machine
    ],
)
def test_what_is_timed_beside_other_work_is_timed_once_more(
    originals: list[float], kept: float, doubted: bool, stage: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original took 8 ms at first; the artifact's time goes with the original's, whichever is kept."""
    task, real = workload(source="work.py:workload"), measuring.interleave
    before = baseline(task)

    def interleave(subjects: Sequence[Subject], inputs: Any, **effort: Any) -> Timings:
        stage["latency"] |= {"original": originals[0], "artifact": originals.pop(0) / 4}
        return real(subjects, inputs, **effort)

    monkeypatch.setattr(measuring, "interleave", interleave)
    found = measure(stage["artifact"], task, before, quick=True)
    assert not originals and found.original_latency_ms == pytest.approx(kept, rel=0.01)
    assert found.latency_ms == pytest.approx(kept / 4, rel=0.02)
    assert any("ms at first" in doubt for doubt in found.doubts) is doubted


def test_other_threads_than_at_first_are_not_taken_for_other_work(stage: dict[str, Any]) -> None:
    task = workload(source="work.py:workload")
    before, stage["latency"]["original"] = baseline(task), 1.0
    found = measure(stage["artifact"], task, before, threads=2, quick=True)
    assert len(stage["calls"]) == 2 and not any("at first" in doubt for doubt in found.doubts)


def test_drops_are_paired_and_positive_when_it_got_worse(stage: dict[str, Any]) -> None:
    task = workload(source="w.py")
    before = baseline(task)
    wrong = torch.arange(400) < 20

    def predict(x: torch.Tensor) -> torch.Tensor:
        right = Net()(x)
        return torch.where(wrong[:, None], -right, right) if len(x) == 400 else right

    stage["predict"] = predict
    found = measure(stage["artifact"], task, before, quick=True)
    assert found.score == pytest.approx(0.95) and found.drop == pytest.approx(0.05)
    assert found.drop_low is not None and 0.02 < found.drop_low < 0.05 < found.drop_upper < 0.08
    assert found.score_low is not None and found.score_high is not None
    assert found.score_low < found.score < found.score_high and found.examples == 400


@pytest.mark.parametrize(
    ("artifact_ms", "control", "faster"),
    [(8.0, (0.98, 1.02), False), (7.9, (0.8, 1.3), False), (7.0, (0.99, 1.01), True), (9.0, (0.99, 1.01), False)],
)
def test_faster_is_said_only_beyond_doubt(
    artifact_ms: float, control: tuple[float, float], faster: bool, stage: dict[str, Any]
) -> None:
    task = workload(source="w.py")
    before = baseline(task)
    noisy = dataclasses.replace(before.measurement, control_ratio_low=control[0], control_ratio_high=control[1])
    stage["latency"]["artifact"] = artifact_ms
    found = measure(stage["artifact"], task, dataclasses.replace(before, measurement=noisy), quick=True)
    assert found.faster is faster


def test_fidelity_counts_equal_choices_and_measures_distance(stage: dict[str, Any]) -> None:
    task = workload(source="w.py")
    before = baseline(task)
    flipped = torch.arange(64) < 16

    def predict(x: torch.Tensor) -> torch.Tensor:
        right = Net()(x)
        return torch.where(flipped[:, None], -right, right) if len(x) == 64 else right

    stage["predict"] = predict
    found = measure(stage["artifact"], task, before, quick=True)
    assert found.fidelity["agreement"] == pytest.approx(0.75, abs=0.01)
    rows = torch.cat([Net()(X[:64])[:16], Net()(X[64:128])[:16]])
    assert found.fidelity["relative_error"] == pytest.approx(float(2 * rows.norm() / Net()(X[:128]).norm()), rel=1e-4)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 2, 2, 1)])
def test_agreement_needs_rows_of_several_values(shape: tuple[int, ...]) -> None:
    task = workload()
    found, _ = measuring._fidelity([(X[:64, :4].reshape(shape),)], lambda x: x[:, :4].reshape(shape), task)
    assert found == {"agreement": None, "relative_error": 0.0}


def test_outputs_that_are_no_numbers_are_a_doubt_and_stay_json(stage: dict[str, Any]) -> None:
    task = workload(source="w.py")
    before = baseline(task)
    stage["predict"] = lambda x: Net()(x) if len(x) == 400 else Net()(x) * torch.nan
    found = measure(stage["artifact"], task, before, quick=True)
    assert found.fidelity["relative_error"] is None and "512 outputs on calibration data are NaN" in found.doubts[-1]
    assert Measurement.from_json(found.to_json()) == found


def test_outputs_kept_in_memory_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    task = workload(calibration=[(X[:64],)] * 20)
    assert len(measuring.outputs_on_calibration(task)) == measuring.FIDELITY_BATCHES
    monkeypatch.setattr(measuring, "FIDELITY_VALUES", 64 * 4 * 2)
    assert len(measuring.outputs_on_calibration(task)) == 2


def test_scores_of_another_length_cannot_be_compared(stage: dict[str, Any]) -> None:
    task = workload(source="w.py")
    before = baseline(task)
    other = dataclasses.replace(task, score=lambda predict: [1.0, 1.0])
    with pytest.raises(WorkloadError, match="returned 2 values for the artifact and 400 for the original"):
        measure(stage["artifact"], other, before, quick=True)


# ------------------------------------------------------------------------------------------------ doubts


def busy(stage: dict[str, Any]) -> dict[str, Any]:
    stage["waiting"] = 0.4
    return {}


DOUBTS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "no test": (lambda s: {"test_score": None}, "has no test_score, so the result is reported on the data"),
    "one number": (lambda s: {"score": lambda predict: 0.5}, "score gives one number, not one per example"),
    "few": (lambda s: {"score": lambda predict: [1.0] * 60}, "score has 60 examples: what befalls fewer than 5.0%"),
    "few test": (lambda s: {"test_score": lambda predict: [1.0] * 60}, "test_score has 60 examples"),
    "in memory": (lambda s: {"source": None}, "timed in the measuring process, and its memory not measured"),
    "control": (
        lambda s: s["latency"].update(control=7.0) or {},
        "Two processes with the original differ (1.1",
    ),
    "no int8": (
        lambda s: (
            s.update(kernels=[Kernel("a", "MatMul", "fp32", 1.0)]) or s["artifact"].manifest.update(int8_layers=3) or {}
        ),
        "3 layers were asked for in int8, but the profile of openvino shows no int8 kernel.",
    ),
    "busy": (
        busy,
        "kept the processors busy: the timed ones spent part of their time waiting (original 40%, artifact 40%",
    ),
    "off": (
        lambda s: s["artifact"].manifest.update(export_error=0.06) or {},
        "openvino is off by 6.0% from the compressed network in torch, more than the 3% that rounding explains",
    ),
    "off in bfloat16": (
        lambda s: s["artifact"].manifest.update(export_error=0.11, floats="bfloat16") or {},
        "more than the 8% that rounding explains",
    ),
    "no profile": (lambda s: s.update(kernels=[]) or {}, "openvino gives no profile"),
    "no VNNI": (
        lambda s: s["machine"].update(features=["avx2"]) or s["artifact"].manifest.update(int8_layers=3) or {},
        "The processor has no instructions for int8 products",
    ),
    "ARM": (
        lambda s: s["machine"].update(architecture="aarch64") or s["artifact"].manifest.update(int8_layers=3) or {},
        "int8 was not tried by us on aarch64",
    ),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_each_doubt_is_said_when_there_is_reason_and_alone(doubt: str, stage: dict[str, Any]) -> None:
    prepare, message = DOUBTS[doubt]
    task = workload(**{"source": "w.py", **prepare(stage)})
    found = measure(stage["artifact"], task, baseline(task))
    (said,) = found.doubts
    assert message in said and said.endswith(".")
    if doubt == "one number":
        assert found.drop_upper == found.drop == 0.0 and found.drop_low is None and found.score_low is None
    if doubt == "in memory":
        assert found.original_peak_rss_bytes is None


def test_a_noisy_machine_is_a_doubt() -> None:
    (said,) = measuring._control_doubts(Interval(1.0, 0.9, 1.2))
    assert "noisy: the original against itself gives a ratio of 0.90 to 1.20" in said
    assert measuring._control_doubts(Interval(1.0, 0.97, 1.03)) == []


# ------------------------------------------------------------------------------------------------ JSON


@pytest.fixture
def measurement(stage: dict[str, Any]) -> Measurement:
    task = workload(source="w.py")
    return measure(stage["artifact"], task, baseline(task), test=True)


def test_measurements_survive_json(measurement: Measurement) -> None:
    assert Measurement.from_json(measurement.to_json()) == measurement
    assert set(json.loads(measurement.to_json())) == {field.name for field in dataclasses.fields(Measurement)}


def test_baselines_survive_json_but_for_their_outputs(stage: dict[str, Any]) -> None:
    task = workload(source="w.py")
    before = baseline(task)
    again = Baseline.from_json(before.to_json(), task)
    assert (again.measurement, again.scores, again.test_scores) == (
        before.measurement,
        before.scores,
        before.test_scores,
    )
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again.outputs, before.outputs, strict=True))
    with pytest.raises(ArtifactError, match="This baseline is not JSON"):
        Baseline.from_json("{", task)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: [m], r"no measurement of this version: fields differ \(list\)"),
        (lambda m: {k: v for k, v in m.items() if k != "bytes"}, r"fields differ \(bytes\)"),
        (lambda m: {**m, "speed": 1}, r"fields differ \(speed\)"),
        (lambda m: {**m, "bytes": "many"}, "has a str for bytes"),
        (lambda m: {**m, "score": True}, "has a bool for score"),
        (lambda m: {**m, "drop_upper": None}, "has a NoneType for drop_upper"),
    ],
)
def test_what_is_no_measurement_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, measurement: Measurement
) -> None:
    with pytest.raises(ArtifactError, match=message):
        Measurement.from_json(json.dumps(change(json.loads(measurement.to_json()))))


def test_whole_numbers_pass_for_floats_in_json(measurement: Measurement) -> None:
    values = {**json.loads(measurement.to_json()), "score": 1, "packed_bytes": 7, "test_drop": None}
    assert Measurement.from_json(json.dumps(values)).score == 1


# ------------------------------------------------------------------------------------------------ the real thing


@pytest.mark.parametrize("target", targets.installed())
@pytest.mark.filterwarnings("ignore")  # of exporters; their own tests name them
def test_real_targets_in_fresh_processes(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work.py").write_text(
        textwrap.dedent("""
            import torch
            from featherweight import Workload

            def workload():
                torch.manual_seed(0)
                net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)).eval()
                x = torch.randn(64, 16)
                y = net(x).argmax(-1)
                score = lambda predict: (predict(x).argmax(-1) == y).double()
                return Workload(model=net, example=(x[:2],), calibration=[(x,)], score=score)
            """)
    )
    monkeypatch.setattr(measuring, "QUICK_ROUND_SECONDS", 0.01)
    task = load(str(tmp_path / "work.py"))
    recipe = Recipe.from_yaml(f"steps: [quantize_static]\ntarget: {target}")
    made = artifacts.build(recipe, task, tmp_path / "best")
    before = baseline(dataclasses.replace(task, source=None), quick=True)
    found = measure(made, dataclasses.replace(task, source=None), before, batch=2, quick=True)
    assert Measurement.from_json(found.to_json()) == found
    assert found.score >= 0.9 and found.drop <= 0.1
    agreement, error = found.fidelity["agreement"], found.fidelity["relative_error"]
    assert agreement is not None and agreement >= 0.9 and error is not None and 0 < error < 0.1
    assert found.bytes == made.bytes > 0 and found.latency_ms > 0 and found.peak_rss_bytes
    assert sum(found.kernels.values()) == pytest.approx(1.0)
    assert {"python", "torch"} <= found.versions.keys()
