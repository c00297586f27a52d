"""Our 8-bit static quantization beside that of NNCF, ONNX Runtime and torchao: same networks, same data, one run.

    python benchmarks/peers_ptq.py [image image_mobile text speech] [--threads 2] [--rounds 15] [--best out]

With --best, what `featherweight compress` left in out/WORKLOAD/best runs along.

Every contender gets the same fp32 network (batch norms folded, as each of them would), the same calibration batches
and the same runtime settings (fp32 for floats, latency hint, fixed shapes). Latencies are of batch 1, taken in turn
in this process; the ratio is to eager fp32, with its 95 % interval. Scores are on the search split, with the bounds
of the paired drop, and on the test split. Seconds run from the torch module to the quantized files: NNCF and ONNX
Runtime read an fp32 export of the network, whose seconds stand in brackets and are part of theirs. torchao quantizes
linear layers only, so convolutions stay fp32 there.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from featherweight import targets
from featherweight.artifact import build, open_artifact
from featherweight.measure import drop_bounds
from featherweight.passes import build as make
from featherweight.recipe import Recipe, compress_model
from featherweight.targets import Runner
from featherweight.timing import SETTLE_SECONDS, latency, ratio, turn
from featherweight.workload import Workload, input_names, load, outputs, predictor, scores, tensors

EXAMPLES = Path(__file__).parents[1] / "examples"
WORKLOADS = ("image", "image_mobile", "text", "speech")
TRANSFORMERS = ("text", "speech")
WARM_SECONDS, ROUND_SECONDS = 0.03, 0.15  # of each runner in each round; small networks take a while to be in cache


@dataclass(frozen=True)
class Contender:
    """A quantized network: how to run it, how large its files are, and what it took to make them."""

    name: str
    run: Runner
    bytes: int
    seconds: float
    export_seconds: float = 0.0  # of them, those that went into the fp32 file that it reads


@dataclass(frozen=True)
class Row:
    """One line of the table; `ratio` is eager fp32 over this one, the median over rounds and its interval."""

    workload: str
    contender: str
    score: float
    drop: float
    drop_low: float | None
    drop_upper: float
    test_score: float
    bytes: int
    latency_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    seconds: float
    export_seconds: float


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def eager(model: torch.nn.Module) -> Runner:
    """A torch module behind the interface of a runtime."""
    predict = predictor(model)
    return lambda arrays: [o.numpy() for o in outputs(predict(*[torch.from_numpy(a) for a in arrays]))]


def recipe(target: str, steps: tuple[str, ...]) -> Recipe:
    return Recipe(steps=tuple(make(name, {}, name) for name in steps), target=target)


def ours(workload: Workload, target: str, threads: int, folder: Path, steps: tuple[str, ...]) -> Contender:
    start = time.perf_counter()
    artifact = build(recipe(target, steps), workload, folder)
    seconds = time.perf_counter() - start
    return Contender(f"featherweight {target}", artifact.load(threads), artifact.bytes, seconds)


def export(workload: Workload, target: str, folder: Path, fold: tuple[str, ...]) -> float:
    """Writes the fp32 network as a peer reads it, batch norms folded; the seconds that the export alone took."""
    folded, _ = compress_model(recipe(target, fold), workload)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    targets.find(target).export(folded, workload, folder)
    return time.perf_counter() - start


def nncf(workload: Workload, threads: int, folder: Path, fold: tuple[str, ...], transformer: bool) -> Contender:
    import nncf as library
    import openvino

    fp32 = folder / "fp32"
    exported = export(workload, "openvino", fp32, fold)
    folder = folder / "int8"
    network = openvino.Core().read_model(fp32 / "model.xml")
    names = [port.get_any_name() for port in network.inputs]
    data = [
        {name: value[i : i + 1].numpy() for name, value in zip(names, tensors(batch), strict=True)}
        for batch in workload.calibration
        for i in range(len(tensors(batch)[0]))
    ]
    start = time.perf_counter()
    quantized = library.quantize(
        network,
        library.Dataset(data),
        subset_size=len(data),
        model_type=library.ModelType.TRANSFORMER if transformer else None,
        preset=library.QuantizationPreset.MIXED,
    )
    folder.mkdir()
    openvino.save_model(quantized, folder / "model.xml", compress_to_fp16=False)
    seconds = exported + time.perf_counter() - start
    return Contender(
        "NNCF openvino", targets.find("openvino").load(folder, threads), size_of(folder), seconds, exported
    )


def onnxruntime(workload: Workload, threads: int, folder: Path, fold: tuple[str, ...]) -> Contender:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = input_names(workload.model, workload.example)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(workload.calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return batch and dict(zip(names, [t.numpy() for t in tensors(batch)], strict=True))

    fp32 = folder / "fp32"
    exported = export(workload, "onnxruntime", fp32, fold)
    folder = folder / "int8"
    folder.mkdir()
    start = time.perf_counter()
    quant_pre_process(str(fp32 / "model.onnx"), str(folder / "prepared.onnx"))
    quantize_static(
        str(folder / "prepared.onnx"),
        str(folder / "model.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    (folder / "prepared.onnx").unlink()
    seconds = exported + time.perf_counter() - start
    run = targets.find("onnxruntime").load(folder, threads)
    return Contender("ONNX Runtime quantize_static", run, size_of(folder), seconds, exported)


def torchao(workload: Workload, folder: Path) -> Contender:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    start = time.perf_counter()
    model = copy.deepcopy(workload.model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    folder.mkdir()
    torch.save(model.state_dict(), folder / "model.pt")
    seconds = time.perf_counter() - start
    compiled = torch.compile(model, dynamic=False)
    return Contender("torchao int8 (linear layers), compiled", eager(compiled), size_of(folder), seconds)


def contenders(name: str, workload: Workload, threads: int, folder: Path) -> list[Contender]:
    """All that could be made; what failed is said on stderr and left out."""
    has_norms = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in workload.model.modules())
    fold = ("fold_batchnorm",) if has_norms else ()
    found: list[Contender] = []

    def attempt(what: str, make_it: Callable[[], Contender]) -> None:
        try:
            found.append(make_it())
        except Exception as error:  # a peer that cannot do a network is a result, not a crash of the comparison
            print(f"{name}: {what} failed: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)

    for target in ("openvino", "onnxruntime"):
        attempt(f"fp32 {target}", lambda t=target: ours(workload, t, threads, folder / f"fp32_{t}", fold))
    found = [replace(contender, name=contender.name.replace("featherweight", "fp32")) for contender in found]
    steps = (*fold, "quantize_static")
    for target in ("openvino", "onnxruntime", "torch"):
        attempt(f"ours {target}", lambda t=target: ours(workload, t, threads, folder / f"ours_{t}", steps))
    attempt("NNCF", lambda: nncf(workload, threads, folder / "nncf", fold, name in TRANSFORMERS))
    attempt("ONNX Runtime", lambda: onnxruntime(workload, threads, folder / "ort", fold))
    attempt("torchao", lambda: torchao(workload, folder / "torchao"))
    return found


def timed(runners: list[Runner], inputs: list[np.ndarray], rounds: int) -> list[list[list[float]]]:
    """Latencies in ms of each runner in each round, the runners taken in turn, in another order each time."""
    found: list[list[list[float]]] = [[] for _ in runners]
    for number in range(rounds):
        for place in turn(len(runners), number):
            run = runners[place]
            time.sleep(SETTLE_SECONDS)
            _samples(run, inputs, WARM_SECONDS)
            found[place].append(_samples(run, inputs, ROUND_SECONDS))
    return found


def _samples(run: Runner, inputs: list[np.ndarray], seconds: float) -> list[float]:
    """Latencies in ms, three at least, for so many seconds."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run(inputs)
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def searched(folder: Path, threads: int) -> list[Contender]:
    """What a search found, where it did."""
    if not folder.is_dir():
        return []
    artifact = open_artifact(folder)
    return [Contender(f"featherweight compress, {artifact.target}", artifact.load(threads), artifact.bytes, 0.0)]


def compare(name: str, threads: int, rounds: int, best: Path | None) -> list[Row]:
    workload = load(str(EXAMPLES / f"{name}.py"))
    torch.set_num_threads(threads)
    inputs = [tensor[:1].numpy() for tensor in tensors(workload.example)]
    with tempfile.TemporaryDirectory() as scratch:
        field = contenders(name, workload, threads, Path(scratch))
        original = Contender("eager fp32", eager(workload.model), 0, 0.0)
        field = [original, *field, *(searched(best / name / "best", threads) if best else [])]
        times = timed([c.run for c in field], inputs, rounds)
        before = scores(workload.score, predictor(workload.model)).tolist()
        rows = []
        for c, taken in zip(field, times, strict=True):
            predict = predictor(workload.model) if c is original else as_predict(c.run)
            after = scores(workload.score, predict).tolist()
            test = scores(workload.test_score, predict).mean().item() if workload.test_score else float("nan")
            mean, drop = statistics.fmean(after), statistics.fmean(before) - statistics.fmean(after)
            speed = ratio(times[0], taken)
            quality = (mean, drop, *drop_bounds(before, after), test)
            pace = (latency(taken), speed.median, speed.low, speed.high, c.seconds, c.export_seconds)
            rows.append(Row(name, c.name, *quality, c.bytes, *pace))
            print(line(rows[-1]), flush=True)
    return rows


def as_predict(run: Runner) -> Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]:
    def predict(*args: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        found = tuple(torch.from_numpy(array) for array in run([a.numpy() for a in args]))
        return found[0] if len(found) == 1 else found

    return predict


def line(row: Row) -> str:
    low = "" if row.drop_low is None else f"{row.drop_low:+.4f} to "
    return (
        f"{row.workload:13}{row.contender:40}{row.score:.4f} (drop {low}{row.drop_upper:+.4f}), "
        f"test {row.test_score:.4f}{row.bytes / 1e6:9.2f} MB{row.latency_ms:10.3f} ms{row.ratio:8.2f}x "
        f"({row.ratio_low:.2f} to {row.ratio_high:.2f}){row.seconds:8.1f} s ({row.export_seconds:.1f} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=WORKLOADS, help="of examples/; all four by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=Path("out/peers_ptq.json"))
    parser.add_argument("--best", type=Path, help="a folder with one of compress's for each workload")
    arguments = parser.parse_args()
    settings = (arguments.threads, arguments.rounds, arguments.best)
    rows = [row for name in arguments.workloads for row in compare(name, *settings)]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
