"""Measuring: what an artifact costs and what it is worth, beside the original, in plain numbers with their doubts.

Bytes are bytes of files, milliseconds come from fresh processes that run in turn (`timing`), scores from the
artifact's own outputs through the workload's own `score`. The scores may be found beforehand, elsewhere, while other
work goes on (`judge`); what is timed is timed alone. Nothing is compressed here and nothing is decided.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from featherweight import targets
from featherweight.artifact import IN_BFLOAT16, Artifact, build, count_parameters, versions_of
from featherweight.errors import ArtifactError, ExportError, WorkloadError
from featherweight.machine import INT8_FEATURES, machine, physical_cores
from featherweight.recipe import Recipe
from featherweight.timing import BUSY, Interval, Subject, Timings, interleave, latency, ratio
from featherweight.workload import Predict, Workload, call, like, outputs, predictor, scores, tensors

ORIGINAL, CONTROL, ARTIFACT, RUNTIME = "original", "control", "artifact", "runtime"
RESAMPLES = 4000
FEW_EXAMPLES = 300
NOISY = 0.10  # width of the control's interval
STRANGE = 2.0  # times as long, or as short, as the original took at first: other work disturbed one of the two
ROUNDING = 1e-4  # relative error below which outputs differ by the order of additions alone
FIDELITY_BATCHES = 8
FIDELITY_VALUES = 32_000_000  # of outputs that are kept in memory
ROUNDS, ROUND_SECONDS = 15, 0.15
QUICK_ROUNDS, QUICK_ROUND_SECONDS = 7, 0.1


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was found of one artifact (or of the original: target `eager`), beside the original.

    Scores and drops of single examples are averaged; `drop` is the original's score less the artifact's, so that
    positive is worse. `_low` and `_high` bound 95 %, `drop_low` and `drop_upper` 95 % each on one side. `latency_ratio`
    is the original's latency over the artifact's, `versus_runtime_ratio` that of the best fp32 artifact,
    `control_ratio` the original's over its own in a second process. Samples are kept as one list per round.
    `waiting_share` says, by name, how long each process had to wait for a processor (see `timing.Timings`).
    """

    digest: str
    recipe: str
    target: str
    seed: int
    threads: int
    batch: int
    examples: int
    score: float
    score_low: float | None
    score_high: float | None
    original_score: float
    drop: float
    drop_low: float | None
    drop_upper: float
    test_score: float | None
    test_score_low: float | None
    test_score_high: float | None
    test_drop: float | None
    test_drop_low: float | None
    test_drop_upper: float | None
    bytes: int
    packed_bytes: int | None
    original_bytes: int
    parameters: int
    original_parameters: int
    latency_ms: float
    latency_ms_samples: list[list[float]]
    original_latency_ms: float
    original_latency_ms_samples: list[list[float]]
    latency_ratio: float
    latency_ratio_low: float
    latency_ratio_high: float
    versus_runtime_ratio: float | None
    versus_runtime_ratio_low: float | None
    versus_runtime_ratio_high: float | None
    control_ratio: float
    control_ratio_low: float
    control_ratio_high: float
    peak_rss_bytes: int | None
    original_peak_rss_bytes: int | None
    waiting_share: dict[str, float | None]
    fidelity: dict[str, float | None]
    coverage: list[dict[str, str]]
    kernels: dict[str, float]
    machine: dict[str, Any]
    versions: dict[str, str]
    doubts: list[str]

    @property
    def faster(self) -> bool:
        """Whether "faster than the original" may be said: its interval lies above 1, and above that of the control."""
        return self.latency_ratio_low > max(1.0, self.control_ratio_high)

    def to_json(self) -> str:
        """As one JSON object."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """What `to_json` wrote.

        Raises:
            ArtifactError: the text is no measurement.
        """
        return cls(**_fields(cls, text))


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The original, measured once, for all artifacts to be compared with.

    Args:
        measurement: of the original itself, timed against itself.
        scores: one per example, or a single one.
        test_scores: the same of `test_score`, or None where the workload has none.
        outputs: on the first calibration batches; not kept in JSON.
    """

    measurement: Measurement
    scores: list[float]
    test_scores: list[float] | None
    outputs: list[tuple[Tensor, ...]] = dataclasses.field(repr=False)

    @property
    def threads(self) -> int:
        """Those that the original was timed with."""
        return self.measurement.threads

    @property
    def batch(self) -> int:
        """The batch size that the original was timed with."""
        return self.measurement.batch

    def to_json(self) -> str:
        """All but the outputs, as one JSON object."""
        kept = {"scores": self.scores, "test_scores": self.test_scores}
        return json.dumps({"measurement": dataclasses.asdict(self.measurement), **kept}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, workload: Workload) -> Baseline:
        """What `to_json` wrote, with the outputs of the workload's network computed anew.

        Raises:
            ArtifactError: the text is no baseline.
        """
        values = _fields(cls, text, without=("outputs",))
        measurement = Measurement.from_json(json.dumps(values.pop("measurement")))
        return cls(**values, measurement=measurement, outputs=outputs_on_calibration(workload))


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What an artifact's outputs are worth: all of a measurement that takes no timing, and no comparison either.

    Args:
        scores: one per example, or a single one.
        test_scores: the same of `test_score`; None where it was not asked for or there is none.
        fidelity: how well the outputs agree with the original's on calibration data.
        doubts: about the outputs.
    """

    scores: list[float]
    test_scores: list[float] | None
    fidelity: dict[str, float | None]
    doubts: list[str]


def baseline(workload: Workload, *, threads: int = 1, batch: int = 1, quick: bool = False, seed: int = 0) -> Baseline:
    """The original's scores, outputs, size, and its latency against itself in a second process.

    Args:
        workload: with a `source`, else its network is timed in this process, which is put among the doubts.
        threads: of the network when it is timed.
        batch: of the inputs when it is timed.
        quick: fewer and shorter rounds.
        seed: of the bootstrap.
    """
    predict = predictor(workload.model)
    before = scores(workload.score, predict).tolist()
    test = None if workload.test_score is None else scores(workload.test_score, predict, "test_score").tolist()
    timings = interleave(
        [_original(workload, batch, ORIGINAL), _original(workload, batch, CONTROL)],
        timing_inputs(workload, batch),
        threads=threads,
        **_effort(quick),
    )
    rounds = timings.rounds
    control = ratio(rounds[ORIGINAL], rounds[CONTROL], seed)
    size, parameters, milliseconds = (
        file_bytes(workload.model),
        count_parameters(workload.model),
        latency(rounds[ORIGINAL]),
    )
    measurement = Measurement(
        digest="original",
        recipe="",
        target="eager",
        seed=seed,
        threads=threads,
        batch=batch,
        examples=len(before),
        original_score=float(np.mean(before)),
        **_quality("", before, before, seed, same=True),
        **_quality("test_", test, test, seed, same=True),
        bytes=size,
        packed_bytes=None,
        original_bytes=size,
        parameters=parameters,
        original_parameters=parameters,
        latency_ms=milliseconds,
        latency_ms_samples=rounds[ORIGINAL],
        original_latency_ms=milliseconds,
        original_latency_ms_samples=rounds[ORIGINAL],
        **_interval("latency_ratio", control),
        **_interval("versus_runtime_ratio", None),
        **_interval("control_ratio", control),
        peak_rss_bytes=timings.peak_rss_bytes[ORIGINAL],
        original_peak_rss_bytes=timings.peak_rss_bytes[ORIGINAL],
        waiting_share=timings.waiting_share,
        fidelity={"agreement": 1.0, "relative_error": 0.0},
        coverage=[],
        kernels={},
        machine=machine(),
        versions=versions_of("eager"),
        doubts=[
            *_workload_doubts(workload, before, test),
            *_control_doubts(control),
            *_waiting_doubts(timings.waiting_share),
        ],
    )
    return Baseline(measurement=measurement, scores=before, test_scores=test, outputs=outputs_on_calibration(workload))


def judge(
    artifact: Artifact,
    workload: Workload,
    originals: Sequence[tuple[Tensor, ...]],
    *,
    threads: int | None = None,
    test: bool = False,
) -> Judgement:
    """What the artifact's outputs are worth.

    Args:
        artifact: what ships.
        workload: that it was made of.
        originals: the original's outputs, as `outputs_on_calibration` gives them.
        threads: that compute; None for all cores.
        test: whether it is scored on `test_score` too, where the workload has one.

    Raises:
        WorkloadError: the score fails on the artifact's outputs.
        ArtifactError: the artifact cannot be loaded or run.
    """
    predict = artifact.predict(physical_cores() if threads is None else threads)
    after, after_test = scores(workload.score, predict).tolist(), None
    if test and workload.test_score is not None:
        after_test = scores(workload.test_score, predict, "test_score").tolist()
    fidelity, doubts = _fidelity(originals, predict, workload)
    return Judgement(scores=after, test_scores=after_test, fidelity=fidelity, doubts=doubts)


def measure(
    artifact: Artifact,
    workload: Workload,
    baseline: Baseline,
    *,
    threads: int = 1,
    batch: int = 1,
    runtime: Artifact | None = None,
    test: bool = False,
    quick: bool = False,
    seed: int = 0,
    judgement: Judgement | None = None,
) -> Measurement:
    """What the artifact costs and is worth, beside the original.

    Args:
        artifact: what ships.
        workload: that it was made of.
        baseline: of the same workload.
        threads: of every network when it is timed; scores use all cores.
        batch: of the inputs when they are timed.
        runtime: the best artifact that is not compressed, timed as well.
        test: whether it is scored on `test_score` too, where the workload has one.
        quick: fewer and shorter rounds; the control is taken from the baseline.
        seed: of the bootstrap.
        judgement: what `judge` found of it with the same `test`, where it has been judged; only timing is left then.

    Raises:
        WorkloadError: the score fails on the artifact's outputs.
        ArtifactError: the artifact cannot be loaded or run.
        ProcessError: a process that measures was killed, hung or ran out of memory.
    """
    original = baseline.measurement
    inputs = timing_inputs(workload, batch)
    # judged apart, so that no second copy of the network takes memory from those that are timed
    judged = judgement or judge(artifact, workload, baseline.outputs, test=test)
    _check_alike(judged.scores, baseline.scores, "score")
    before_test, after_test = baseline.test_scores if test else None, judged.test_scores
    if before_test is not None and after_test is not None:
        _check_alike(after_test, before_test, "test_score")
    off = judged.fidelity["relative_error"]
    same = off is not None and off < ROUNDING
    kernels = shares(artifact, inputs, threads)

    subjects = [_original(workload, batch, ORIGINAL), Subject(ARTIFACT, folder=artifact.folder)]
    if runtime is not None:
        subjects.append(Subject(RUNTIME, folder=runtime.folder))
    if not quick:
        subjects.append(_original(workload, batch, CONTROL))
    first_ms = original.latency_ms if (threads, batch) == (baseline.threads, baseline.batch) else None
    timings = _undisturbed(subjects, inputs, threads, quick, first_ms)
    rounds = timings.rounds
    control = Interval(original.control_ratio, original.control_ratio_low, original.control_ratio_high)
    if not quick:
        control = ratio(rounds[ORIGINAL], rounds[CONTROL], seed)
    here = machine()
    return Measurement(
        digest=artifact.digest,
        recipe=artifact.recipe,
        target=artifact.target,
        seed=artifact.manifest["seed"],
        threads=threads,
        batch=batch,
        examples=len(judged.scores),
        original_score=original.score,
        **_quality("", judged.scores, baseline.scores, seed, same),
        **_quality("test_", after_test, before_test, seed, same),
        bytes=artifact.bytes,
        packed_bytes=None,
        original_bytes=original.bytes,
        parameters=artifact.manifest["parameters"],
        original_parameters=original.parameters,
        latency_ms=latency(rounds[ARTIFACT]),
        latency_ms_samples=rounds[ARTIFACT],
        original_latency_ms=latency(rounds[ORIGINAL]),
        original_latency_ms_samples=rounds[ORIGINAL],
        **_interval("latency_ratio", ratio(rounds[ORIGINAL], rounds[ARTIFACT], seed)),
        **_interval("versus_runtime_ratio", ratio(rounds[RUNTIME], rounds[ARTIFACT], seed) if runtime else None),
        **_interval("control_ratio", control),
        peak_rss_bytes=timings.peak_rss_bytes[ARTIFACT],
        original_peak_rss_bytes=timings.peak_rss_bytes[ORIGINAL],
        waiting_share=timings.waiting_share,
        fidelity=judged.fidelity,
        coverage=artifact.manifest["coverage"],
        kernels=kernels,
        machine=here,
        versions=versions_of(artifact.target),
        doubts=[
            *_workload_doubts(workload, judged.scores, baseline.test_scores),
            *_control_doubts(control),
            *_waiting_doubts(timings.waiting_share),
            *_strange_doubts(latency(rounds[ORIGINAL]), first_ms),
            *_int8_doubts(artifact, kernels, here),
            *judged.doubts,
        ],
    )


def best_runtime(workload: Workload, folder: Path, *, threads: int = 1, batch: int = 1) -> Artifact | None:
    """The network as it is on each installed target, below `folder`: the fastest, or None where none can hold it."""
    plain = {}
    for name in targets.installed():
        with contextlib.suppress(ExportError):
            plain[name] = build(Recipe((), name), workload, folder / name)
    return soonest(list(plain.values()), workload, threads=threads, batch=batch) if plain else None


def soonest(artifacts: Sequence[Artifact], workload: Workload, *, threads: int = 1, batch: int = 1) -> Artifact:
    """The one that is done first, of artifacts that are run in turn, in processes of their own."""
    by_name = {str(number): artifact for number, artifact in enumerate(artifacts)}
    subjects = [Subject(name, folder=artifact.folder) for name, artifact in by_name.items()]
    rounds = interleave(subjects, timing_inputs(workload, batch), threads=threads, **_effort(quick=True)).rounds
    return by_name[min(by_name, key=lambda name: latency(rounds[name]))]


# ------------------------------------------------------------------------------------------------ statistics


def bootstrap_means(values: Sequence[float], seed: int = 0) -> np.ndarray:
    """The means of `RESAMPLES` samples drawn from `values` with replacement, each as many as there are."""
    data, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    at_once = max(1, 4_000_000 // len(data))  # indices in memory
    chunks = [min(at_once, RESAMPLES - begin) for begin in range(0, RESAMPLES, at_once)]
    return np.concatenate([data[rng.integers(len(data), size=(rows, len(data)))].mean(axis=1) for rows in chunks])


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """The 95 % interval of the mean (percentile bootstrap; Efron 1979), or None where there is but one value."""
    if len(values) < 2:
        return None
    low, high = np.percentile(bootstrap_means(values, seed), [2.5, 97.5])
    return float(low), float(high)


def drop_bounds(before: Sequence[float], after: Sequence[float], seed: int = 0) -> tuple[float | None, float]:
    """The 95 % lower and upper bound, each by itself, of the mean of `before − after`, example by example.

    A single pair has no bounds: the difference itself stands for the upper one. The bounds are the bootstrap's, but
    what befalls few examples may be in no sample: the upper one is no lower than the exact bound of Clopper and Pearson
    (1934, doi:10.1093/biomet/26.4.404) for losses, less the gains that were seen. It is above zero even where no
    example differs.

    >>> drop_bounds([0.9], [0.5])
    (None, 0.4)
    >>> drop_bounds([1.0] * 300, [1.0] * 300)
    (0.0, 0.0099...)
    """
    drops = np.subtract(before, after)
    if len(drops) < 2:
        return None, float(drops[0])
    low, high = np.percentile(bootstrap_means(drops.tolist(), seed), [5, 95])
    return float(low), max(float(high), _bound_with_rare_losses(drops, before))


def _bound_with_rare_losses(drops: np.ndarray, before: Sequence[float]) -> float:
    """The 95 % upper bound of the mean of `drops`, counted in units of the largest."""
    from scipy.special import betaincinv

    largest = float(np.abs(drops).max()) or float(np.ptp(before)) or abs(float(before[0])) or 1.0
    count, losses, gains = len(drops), drops[drops > 0].sum() / largest, -drops[drops < 0].sum() / largest
    most = 1.0 if losses >= count else float(betaincinv(losses + 1, count - losses, 0.95))
    return largest * (most - float(gains) / count)


def _quality(
    prefix: str, after: list[float] | None, before: list[float] | None, seed: int, same: bool = False
) -> dict[str, Any]:
    """The fields of a measurement on one split; None where it was not scored.

    Where the outputs are the `same` and no score differs, there is nothing that other examples could show.
    """
    names = ("score", "score_low", "score_high", "drop", "drop_low", "drop_upper")
    if after is None or before is None:
        return {prefix + name: None for name in names}
    low, high = mean_interval(after, seed) or (None, None)
    drop = float(np.mean(np.subtract(before, after)))
    bounds = (0.0, 0.0) if same and after == before and len(after) > 1 else drop_bounds(before, after, seed)
    values = (float(np.mean(after)), low, high, drop, *bounds)
    return {prefix + name: value for name, value in zip(names, values, strict=True)}


def _interval(name: str, interval: Interval | None) -> dict[str, Any]:
    values = (None, None, None) if interval is None else (interval.median, interval.low, interval.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


# ------------------------------------------------------------------------------------------------ the parts


def timing_inputs(workload: Workload, batch: int) -> list[np.ndarray]:
    """The example's first `batch` rows, repeated where it has fewer."""
    if batch < 1:
        raise WorkloadError(f"A batch of {batch} cannot be timed. Give a batch size of 1 or more.")
    found = []
    for value in tensors(workload.example):
        array = value.detach().cpu().numpy()
        found.append(np.ascontiguousarray(array[np.arange(batch) % len(array)]))
    return found


def shares(artifact: Artifact, inputs: Sequence[np.ndarray], threads: int) -> dict[str, float]:
    """The share of its time that the runtime spends in each precision, by its own profile; empty where it has none."""
    totals: dict[str, float] = {}
    for kernel in targets.find(artifact.target).profile(artifact.folder, inputs, threads):
        totals[kernel.precision] = totals.get(kernel.precision, 0.0) + kernel.latency_ms
    whole = sum(totals.values())
    return {precision: total / whole for precision, total in sorted(totals.items()) if total > 0}


def file_bytes(model: nn.Module) -> int:
    """The size of the file in which torch saves the network's weights."""
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        path = Path(folder) / "weights.pt"
        torch.save(model.state_dict(), path)
        return path.stat().st_size


def _effort(quick: bool) -> dict[str, Any]:
    if quick:
        return {"rounds": QUICK_ROUNDS, "round_seconds": QUICK_ROUND_SECONDS}
    return {"rounds": ROUNDS, "round_seconds": ROUND_SECONDS}


def _undisturbed(
    subjects: Sequence[Subject], inputs: Sequence[np.ndarray], threads: int, quick: bool, first_ms: float | None
) -> Timings:
    """Timed once more where the original is far from the `first_ms` that it took at first; kept is the nearer timing.

    Other work slows networks down by different factors, up to 18 where threads wait for one another, so what is timed
    beside it compares with nothing: neither with other artifacts nor, by its ratio, with the original.
    """
    timings = interleave(subjects, inputs, threads=threads, **_effort(quick))
    if first_ms is None or not _strange(original_ms := latency(timings.rounds[ORIGINAL]), first_ms):
        return timings
    again = interleave(subjects, inputs, threads=threads, **_effort(quick))
    off = abs(math.log(original_ms / first_ms))
    return again if abs(math.log(latency(again.rounds[ORIGINAL]) / first_ms)) < off else timings


def _strange(milliseconds: float, first_ms: float) -> bool:
    """Whether the original took so much longer, or shorter, than at first that one of the two was disturbed."""
    return not 1 / STRANGE <= milliseconds / first_ms <= STRANGE


def _original(workload: Workload, batch: int, name: str) -> Subject:
    if workload.source is not None:
        return Subject(name, workload=workload.source)
    inputs = like(workload.example, [torch.from_numpy(array) for array in timing_inputs(workload, batch)])

    def run() -> object:
        with torch.inference_mode():
            return call(workload.model, inputs)

    return Subject(name, run=run)


def _check_alike(after: list[float], before: list[float], what: str) -> None:
    if len(after) != len(before):
        raise WorkloadError(
            f"{what}(predict) returned {len(after)} values for the artifact and {len(before)} for the original, so "
            "they cannot be compared example by example. Make it score the same examples every time, in the same order."
        )


def outputs_on_calibration(workload: Workload) -> list[tuple[Tensor, ...]]:
    """The original's outputs on the first calibration batches: few enough to be kept in memory."""
    found: list[tuple[Tensor, ...]] = []
    kept = 0
    for batch in workload.calibration[:FIDELITY_BATCHES]:
        with torch.no_grad():
            values = outputs(call(workload.model, batch))
        kept += sum(value.numel() for value in values)
        if found and kept > FIDELITY_VALUES:
            break
        found.append(values)
    return found


@torch.inference_mode()
def _fidelity(
    originals: Sequence[tuple[Tensor, ...]], predict: Predict, workload: Workload
) -> tuple[dict[str, float | None], list[str]]:
    """How well the artifact's outputs agree with the original's on calibration data, and doubts about it.

    `relative_error` is the norm of all differences over the norm of the original's outputs; `agreement` the share of
    rows of the first output whose largest value is in the same place, None where it has no rows of several values.
    """
    error = norm = 0.0
    equal = chosen = broken = 0
    for batch, wanted in zip(workload.calibration, originals, strict=False):
        for index, (a, b) in enumerate(zip(outputs(call(predict, batch)), wanted, strict=True)):
            if index == 0 and b.is_floating_point() and b.dim() in (2, 3) and b.shape[-1] > 1:
                equal += int((a.argmax(-1) == b.argmax(-1)).sum())
                chosen += b[..., 0].numel()
            finite = b.isfinite()
            difference = a[finite].double() - b[finite].double()
            broken += int((~difference.isfinite()).sum())
            error += float(difference.square().sum())
            norm += float(b[finite].double().square().sum())
    relative = None if broken else float(np.sqrt(error / norm)) if norm else float(np.sqrt(error))
    agreement = equal / chosen if chosen else None
    doubts = (
        [f"{broken} outputs on calibration data are NaN or infinite, which the original's are not."] if broken else []
    )
    return {"agreement": agreement, "relative_error": relative}, doubts


# ------------------------------------------------------------------------------------------------ doubts


def _workload_doubts(workload: Workload, scored: Sequence[float], test: Sequence[float] | None) -> list[str]:
    doubts = []
    if workload.test_score is None:
        doubts.append("The workload has no test_score, so the result is reported on the data that it was chosen on.")
    for name, values in (("score", scored), ("test_score", test or [0.0] * FEW_EXAMPLES)):
        if len(values) == 1:
            doubts.append(f"{name} gives one number, not one per example, so its drop has no interval.")
        elif len(values) < FEW_EXAMPLES:
            unseen = 3 / len(values)  # the rule of three: what may happen to this share may well not happen at all
            doubts.append(
                f"{name} has {len(values)} examples: what befalls fewer than {unseen:.1%} of all inputs may go unseen."
            )
    if workload.source is None:
        doubts.append(
            "The original was timed in the measuring process, and its memory not measured: the workload has no file."
        )
    return doubts


def _control_doubts(control: Interval) -> list[str]:
    doubts = []
    if control.high - control.low > NOISY:
        doubts.append(
            "The machine is noisy: the original against itself gives a ratio of "
            f"{control.low:.2f} to {control.high:.2f}."
        )
    elif not control.low <= 1 <= control.high:
        doubts.append(
            f"Two processes with the original differ ({control.low:.3f} to {control.high:.3f}), so smaller ratios than "
            "that mean nothing."
        )
    return doubts


def _waiting_doubts(shares: dict[str, float | None]) -> list[str]:
    known = {name: share for name, share in shares.items() if share is not None}
    if max(known.values(), default=0.0) <= BUSY:
        return []
    told = ", ".join(f"{name} {share:.0%}" for name, share in known.items())
    return [
        f"Other programs kept the processors busy: the timed ones spent part of their time waiting ({told}). Long runs "
        "suffer more from that than short ones, so latency ratios are too large: time again on a quiet machine."
    ]


def _strange_doubts(milliseconds: float, first_ms: float | None) -> list[str]:
    if first_ms is None or not _strange(milliseconds, first_ms):
        return []
    return [
        f"The original took {milliseconds:.3g} ms here, timed twice, and {first_ms:.3g} ms at first: other work "
        "disturbed one of the two, so latency ratios may be far off. Time again on a quiet machine."
    ]


def _int8_doubts(artifact: Artifact, kernels: dict[str, float], here: dict[str, Any]) -> list[str]:
    asked, off = artifact.manifest["int8_layers"], artifact.manifest["export_error"]
    doubts = []
    in_bfloat16 = IN_BFLOAT16 if artifact.manifest.get("floats") == "bfloat16" else 0.0
    if off > (tolerance := targets.find(artifact.target).tolerance + in_bfloat16):
        doubts.append(
            f"{artifact.target} is off by {off:.1%} from the compressed network in torch, more than the "
            f"{tolerance:.0%} that rounding explains."
        )
    if not kernels:
        doubts.append(f"{artifact.target} gives no profile, so the precision in which it computes is unknown.")
    elif asked and not kernels.get("int8"):
        doubts.append(
            f"{asked} layers were asked for in int8, but the profile of {artifact.target} shows no int8 kernel."
        )
    if asked and here["architecture"] not in ("x86_64", "AMD64"):
        doubts.append(f"int8 was not tried by us on {here['architecture']} processors.")
    elif asked and here["features"] is not None and not set(here["features"]) & set(INT8_FEATURES):
        doubts.append("The processor has no instructions for int8 products (VNNI, AMX): others run int8 faster.")
    return doubts


# ------------------------------------------------------------------------------------------------ JSON


def _fields(owner: type, text: str, without: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass from JSON, of the types that it declares."""
    wanted = {name: hint for name, hint in get_type_hints(owner).items() if name not in without}
    again = "Measure again, with the version that is to read it."
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"This {owner.__name__.lower()} is not JSON: {str(error)[:200]}. {again}") from error
    if not isinstance(found, dict) or found.keys() != wanted.keys():
        differ = sorted(found.keys() ^ wanted.keys()) if isinstance(found, dict) else [type(found).__name__]
        raise ArtifactError(
            f"This is no {owner.__name__.lower()} of this version: fields differ ({', '.join(differ[:5])}). {again}"
        )
    for name, hint in wanted.items():
        kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        plain = tuple(dict if kind is Measurement else get_origin(kind) or kind for kind in kinds)
        value = found[name]
        if isinstance(value, bool) or not isinstance(value, (*plain, int) if float in plain else plain):
            raise ArtifactError(f"This {owner.__name__.lower()} has a {type(value).__name__} for {name}. {again}")
    return found
