"""The command line: reads arguments, calls the library, prints.

Results go to standard output, what happens meanwhile to standard error. Exit codes: 0 done, 1 a check failed, 2 bad
input, 3 the budget cannot be met. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from featherweight.errors import ArtifactError, FeatherweightError, RecipeError, SettingError

if TYPE_CHECKING:
    from featherweight.artifact import Artifact
    from featherweight.progress import Progress
    from featherweight.targets import Target

DONE, FAILED, BAD_INPUT, INFEASIBLE, INTERRUPTED = 0, 1, 2, 3, 130
SILENCED = {  # what dependencies would send home, or say without being asked
    "DO_NOT_TRACK": "1",
    "KINETO_LOG_LEVEL": "99",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OPENVINO_TELEMETRY_OPT_OUT": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
NOISY = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "transformers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    _silence()
    chosen = parser().parse_args(arguments)
    try:
        return int(chosen.command(chosen))
    except FeatherweightError as error:
        return _complain(str(error))
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - whoever read us has gone
        return DONE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}. Mend that, and run the command again.")
    except MemoryError:
        return _complain("The memory ran out. Use smaller calibration batches, or a machine with more of it.")
    except KeyboardInterrupt:
        print("featherweight: interrupted", file=sys.stderr)
        return INTERRUPTED


def _complain(message: str) -> int:
    print(f"featherweight: error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _silence() -> None:
    for name, value in SILENCED.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=rf"({'|'.join(NOISY)})(\.|$)")
        warnings.filterwarnings("ignore", category=FutureWarning)  # libraries to each other
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.formatwarning = _warning  # without the line of source that it came from


def _warning(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"featherweight: warning: {' '.join(str(message).split())}\n"


# ------------------------------------------------------------------------------------------------ arguments


class _Parser(argparse.ArgumentParser):
    """Complains in one paragraph, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_complain(f"{message}. See {self.prog} --help"))


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = _Parser(prog="featherweight", description="Makes trained networks smaller and faster, as files that ship.")
    commands = top.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    workload = "file.py, file.py:name or pkg.mod:name, where a function workload() returns a Workload"

    add = commands.add_parser("compress", help="search for the smallest or fastest network that a budget allows")
    add.set_defaults(command=compress)
    add.add_argument("workload", metavar="WORKLOAD", help=workload)
    add.add_argument("--max-drop", required=True, metavar="D", help="of the score: 0.01, or 2%% of the original's")
    add.add_argument(
        "--objective", default="latency", metavar="latency|bytes|throughput", help="what it is for (latency)"
    )
    add.add_argument("--max-bytes", type=_whole, metavar="N", help="bound on the size of the artifact's files")
    add.add_argument(
        "--max-ram", type=_whole, metavar="N", help="bound on the bytes that a process holds which runs it"
    )
    add.add_argument("--max-latency-ms", type=_positive, metavar="X", help="bound on the latency")
    add.add_argument("--target", default="auto", metavar="auto|NAME[,NAME]", help="where it is to run (auto)")
    add.add_argument(
        "--pool",
        default="serial",
        metavar="serial|processes:N|ray[:ADDRESS]",
        help="where networks are built and judged, side by side if it has several processes (serial)",
    )
    add.add_argument("--time-limit", type=duration, default="15m", metavar="T", help="90s, 15m or 2h (15m)")
    _timing(add, "1; for throughput as many as suit the network", None)
    add.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new or empty folder")
    add.add_argument("--resume", action="store_true", help="go on with the search that DIR holds")

    add = commands.add_parser("apply", help="run one recipe, without a search; killed, the same command goes on")
    add.set_defaults(command=apply)
    add.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    add.add_argument("workload", metavar="WORKLOAD", help=workload)
    add.add_argument("--seed", type=_seed, default=0, metavar="N", help="of all chance (0)")
    add.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new or empty folder")

    add = commands.add_parser("measure", help="measure an artifact in a fresh process, against the original")
    add.set_defaults(command=measure)
    add.add_argument("folder", type=Path, metavar="DIR", help="an artifact, or what compress wrote")
    add.add_argument("workload", metavar="WORKLOAD", help=workload)
    _timing(add)
    add.add_argument("--json", action="store_true", help="everything that was found, samples included, as JSON")

    add = commands.add_parser("bench-machine", help="measure what layers cost on this machine, ahead of a search")
    add.set_defaults(command=bench_machine)
    add.add_argument("workloads", nargs="+", metavar="WORKLOAD", help=f"whose layers are measured: {workload}")
    add.add_argument("--target", default="auto", metavar="auto|NAME[,NAME]", help="where they are to run (auto)")
    add.add_argument("--threads", type=_whole, metavar="N", help="of a layer that is timed (the processor's cores)")
    add.add_argument("--batch", type=_whole, default=1, metavar="N", help="of the inputs that are timed (1)")
    add.add_argument("--anew", action="store_true", help="measure again what was measured, on a busy machine say")

    add = commands.add_parser("predict", help="what an artifact makes of many inputs; killed, the same command goes on")
    add.set_defaults(command=predict)
    add.add_argument("folder", type=Path, metavar="DIR", help="an artifact, or what compress wrote")
    add.add_argument(
        "source", type=Path, metavar="INPUT", help=".npz, .npy, .parquet, or a folder of Parquet or images"
    )
    add.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="new: .npz, .parquet, or .npy for one output"
    )
    add.add_argument("--prepare", metavar="FILE.py:NAME", help="a function that makes a row of an image")
    add.add_argument("--engine", default="local", metavar="local|ray[:ADDRESS]", help="replicas here or on Ray (local)")
    add.add_argument(
        "--replicas", type=_whole_or_auto, default="auto", metavar="N|auto", help="processes side by side (auto)"
    )
    add.add_argument("--threads", type=_whole, metavar="N", help="of each replica (the cores, shared out)")
    add.add_argument("--batch", type=_whole, metavar="N", help="examples at once (what is measured as best)")
    add.add_argument("--objective", default="throughput", metavar="throughput|latency", help="what auto looks for")
    add.add_argument("--device", default="cpu", metavar="cpu|cuda|tpu", help="what it runs on (cpu)")
    add.add_argument(
        "--split",
        metavar="data|layers|tensors|networks",
        help="what the processes share that torchrun started, instead of replicas",
    )
    add.add_argument(
        "--with", action="append", default=[], type=Path, dest="others", metavar="DIR", help="another network beside it"
    )
    add.add_argument("--combine", default="mean", metavar="mean|vote", help="what several networks return (mean)")
    add.add_argument("--weights", type=_weights, metavar="W,W,…", help="of the networks, in their order (alike)")

    add = commands.add_parser("verify", help="check an artifact's digests and its test vectors; exit 0 or 1")
    add.set_defaults(command=verify)
    add.add_argument("folder", type=Path, metavar="DIR", help="an artifact, or what compress wrote")

    add = commands.add_parser("report", help="write report.html and report.md of a search again")
    add.set_defaults(command=report)
    add.add_argument("folder", type=Path, metavar="DIR", help="what compress wrote")

    add = commands.add_parser("inspect", help="layers, shapes, bytes and encodings")
    add.set_defaults(command=inspect)
    add.add_argument("what", metavar="WORKLOAD|DIR", help=f"{workload}; or an artifact, or what compress wrote")

    add = commands.add_parser("list", help="what there is, each with its settings")
    add.set_defaults(command=list_)
    add.add_argument("what", choices=("passes", "targets"))
    return top


def _timing(add: argparse.ArgumentParser, usual: str = "1", batch: int | None = 1) -> None:
    add.add_argument("--threads", type=_whole, metavar="N", help="of a network that is timed (the processor's cores)")
    add.add_argument("--batch", type=_whole, default=batch, metavar="N", help=f"of the inputs that are timed ({usual})")
    add.add_argument("--seed", type=_seed, default=0, metavar="N", help="of all chance (0)")


def duration(text: str) -> float:
    """Seconds in `90s`, `15m` or `2h`.

    >>> duration("15m"), duration("1.5h"), duration("90")
    (900.0, 5400.0, 90.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no duration above zero: write 90s, 15m or 2h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above zero")
    return int(text)


def _whole_or_auto(text: str) -> int | str:
    return text if text == "auto" else _whole(text)


def _weights(text: str) -> list[float]:
    return [_positive(part) for part in text.split(",")]


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 10**18")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above zero")
    return value


# ------------------------------------------------------------------------------------------------ commands


def compress(chosen: argparse.Namespace) -> int:
    """`featherweight compress`: everything that can be checked is checked before the workload is loaded."""
    from featherweight import pools, report, search, trials, workload

    budget = trials.Budget(
        _drop(chosen.max_drop), chosen.max_bytes, chosen.max_latency_ms, chosen.objective, chosen.max_ram
    )
    names = [name.strip() for name in chosen.target.split(",")]
    search.check_targets(names)
    pools.check_pool(chosen.pool)
    trials.check_folder(chosen.out, chosen.resume)
    progress = _progress()
    result = search.compress(
        workload.load(chosen.workload),
        budget,
        chosen.out,
        targets=names,
        threads=chosen.threads,
        batch=chosen.batch,
        time_limit=chosen.time_limit,
        seed=chosen.seed,
        resume=chosen.resume,
        pool=chosen.pool,
        progress=progress,
    )
    progress.close()
    _tell_result(result)
    if result.best is not None:
        print(f"artifact  {chosen.out / trials.BEST}\nrecipe    {chosen.out / trials.RECIPE}")
    if result.baseline is not None:
        print(f"report    {report.write(chosen.out)[1]}")
    return DONE if result.verdict == "accepted" else INFEASIBLE


def _drop(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _tell_result(result: Any) -> None:
    from featherweight import report

    if result.baseline is None or result.best is None:
        print(f"{result.verdict}: nothing was measured before the search ended ({result.binding})")
        return
    _print_table(report.before_and_after(result.baseline, result.best))
    spent = sorted(result.seconds.items(), key=lambda item: -item[1])[:6]
    print("\nseconds   " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in spent))
    binding = f"no trial keeps to the budget, {result.binding} binds; the nearest is " if result.binding else ""
    print(f"{result.verdict}: {binding}{report.in_short(result.best)}")
    for doubt in result.best.doubts:
        print(f"doubt: {doubt}")
    if result.late:
        print("cut short: the time limit left no room for all trials; allow more with --time-limit and --resume")
    if result.interrupted:
        print("interrupted: the best so far was measured briefly, and not on the test data; go on with --resume")


def apply(chosen: argparse.Namespace) -> int:
    """`featherweight apply`."""
    from featherweight import targets, workload
    from featherweight.artifact import build
    from featherweight.checkpoints import kept_in
    from featherweight.facts import fingerprint
    from featherweight.recipe import Recipe
    from featherweight.trials import check_writable

    recipe = Recipe.from_yaml(_text(chosen.recipe), str(chosen.recipe))
    targets.find(recipe.target)
    if check_writable(chosen.out):
        raise ArtifactError(f"{chosen.out} is not empty, and what is there is not overwritten. Choose another folder.")
    say, loaded = _progress(), workload.load(chosen.workload)
    kept = f"{chosen.out.name}.{recipe.digest[:8]}-{fingerprint(loaded)[:8]}-{chosen.seed}.checkpoints"
    with kept_in(chosen.out.absolute().with_name(kept)):
        artifact = build(recipe, loaded, chosen.out, chosen.seed, progress=say.stage)
    say.close()
    layers = {row["layer"] for row in artifact.manifest["coverage"] if "done" in row}
    print(f"{chosen.out}: {artifact.bytes:,} bytes, {len(layers)} layers changed, for {artifact.target}")
    return DONE


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"There is no file {path}. Give the path of a recipe in YAML.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}. Give the path of a recipe in YAML.") from error


def measure(chosen: argparse.Namespace) -> int:
    """`featherweight measure`."""
    from featherweight import report, workload
    from featherweight.artifact import open_artifact
    from featherweight.machine import physical_cores
    from featherweight.measure import baseline, best_runtime
    from featherweight.measure import measure as measure_
    from featherweight.timing import keeping_originals

    artifact = open_artifact(_artifact_folder(chosen.folder))
    loaded = workload.load(chosen.workload)
    settings = {"threads": chosen.threads or physical_cores(), "batch": chosen.batch, "seed": chosen.seed}
    say = _progress()
    with tempfile.TemporaryDirectory(prefix="featherweight-") as scratch, keeping_originals():
        say.stage("the original")
        original = baseline(loaded, **settings)
        say.stage("the original in its best runtime")
        runtime = best_runtime(loaded, Path(scratch), threads=settings["threads"], batch=settings["batch"])
        say.stage("the artifact")
        found = measure_(artifact, loaded, original, runtime=runtime, test=True, **settings)
    say.close()
    if chosen.json:
        print(found.to_json())
        return DONE
    _print_table(report.before_and_after(original.measurement, found))
    print(f"\n{report.in_short(found)}")
    for doubt in found.doubts:
        print(f"doubt: {doubt}")
    return DONE


def bench_machine(chosen: argparse.Namespace) -> int:
    """`featherweight bench-machine`: what is measured is kept at once, so Ctrl-C loses a few dozen entries at most."""
    from featherweight import cost_table, workload
    from featherweight.machine import physical_cores
    from featherweight.search import check_targets

    names, threads = check_targets([name.strip() for name in chosen.target.split(",")]), chosen.threads
    say = _progress("bench-machine", "entries")
    try:
        for spec in chosen.workloads:
            loaded = workload.load(spec)
            for name in names:
                begin = time.monotonic()
                settings = {"threads": threads or physical_cores(), "batch": chosen.batch, "anew": chosen.anew}
                table = cost_table.cost_table(loaded, name, progress=say, **settings)
                _tell_costs(spec, table, time.monotonic() - begin)
    except KeyboardInterrupt:
        print(f"what was measured is kept in {cost_table.cache_folder()}", file=sys.stderr)
        raise
    finally:
        say.close()
    return DONE


def _tell_costs(spec: str, table: Any, seconds: float) -> None:
    from featherweight.cost_table import in_short

    runs = f"{table.threads} {'thread' if table.threads == 1 else 'threads'}, batch {table.batch}"
    entries = f"{len(table.own)} shapes, {len(table.entries)} entries ({table.fresh} measured now)"
    print(f"{spec} on {table.target}, {runs}: {entries}, {seconds:.0f} s; milliseconds by share of channels:")
    _print_rows(in_short(table))
    for reason, count in Counter(table.left.values()).items():
        print(f"left out, {count} entries: {reason}")
    print()


def predict(chosen: argparse.Namespace) -> int:
    """`featherweight predict`."""
    from featherweight.artifact import open_artifact

    artifacts = [open_artifact(_artifact_folder(folder)) for folder in (chosen.folder, *chosen.others)]
    progress = _progress("predict", "rows")
    settings = {name: getattr(chosen, name) for name in ("threads", "batch", "device")}
    settings |= {"prepare": _prepare(chosen), "say": progress.line, "told": progress.count}
    start = time.monotonic()
    wrote = True
    if chosen.split:
        wrote = _predict_split(chosen, artifacts, settings)
    elif chosen.engine != "local":
        _predict_ray(chosen, artifacts, settings)
    else:
        _predict_here(chosen, artifacts, settings)
    progress.close()
    if wrote:
        print(f"{chosen.out}: {chosen.out.stat().st_size:,} bytes, {time.monotonic() - start:.1f} s")
    return DONE


def _prepare(chosen: argparse.Namespace) -> Callable[..., Any] | None:
    from featherweight.workload import function

    return function(chosen.prepare, "prepare") if chosen.prepare else None


def _predict_here(chosen: argparse.Namespace, artifacts: Sequence[Artifact], settings: dict[str, Any]) -> None:
    from featherweight import parallel

    settings |= {"replicas": chosen.replicas, "objective": chosen.objective}
    if len(artifacts) == 1:
        parallel.predict_file(artifacts[0], chosen.source, chosen.out, **settings)
    else:
        weights = chosen.weights or [1.0] * len(artifacts)
        parallel.predict_together(artifacts, chosen.source, chosen.out, chosen.combine, weights, **settings)


def _predict_ray(chosen: argparse.Namespace, artifacts: Sequence[Artifact], settings: dict[str, Any]) -> None:
    from featherweight.cluster import predict_ray

    engine, _, address = chosen.engine.partition(":")
    if engine != "ray":
        raise SettingError(f"There is no engine {chosen.engine!r}. There are: local, ray and ray:ADDRESS.")
    if len(artifacts) > 1:
        raise SettingError("Several networks are combined by the engine local, or by --split networks, not by Ray.")
    settings["replicas"] = None if chosen.replicas == "auto" else chosen.replicas
    predict_ray(artifacts[0], chosen.source, chosen.out, address=address, **settings)


def _predict_split(chosen: argparse.Namespace, artifacts: Sequence[Artifact], settings: dict[str, Any]) -> bool:
    """In each process of a job. Whether this is the one that writes and speaks."""
    from featherweight.distributed import predict_split

    settings |= {"combine": chosen.combine, "weights": chosen.weights or ()}
    return predict_split(artifacts, chosen.source, chosen.out, chosen.split, **settings)


def verify(chosen: argparse.Namespace) -> int:
    """`featherweight verify`."""
    from featherweight.artifact import verify as problems_of

    folder = _artifact_folder(chosen.folder)
    problems = problems_of(folder)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{folder} is as it was written, and computes what it computed then")
    return FAILED if problems else DONE


def report(chosen: argparse.Namespace) -> int:
    """`featherweight report`."""
    from featherweight import report as reports

    for path in reports.write(chosen.folder):
        print(path)
    return DONE


def inspect(chosen: argparse.Namespace) -> int:
    """`featherweight inspect`."""
    path = Path(chosen.what)
    if path.is_dir():
        _inspect_artifact(_artifact_folder(path))
    else:
        _inspect_workload(chosen.what)
    return DONE


def _inspect_artifact(folder: Path) -> None:
    from featherweight.artifact import MANIFEST, open_artifact

    artifact = open_artifact(folder)
    manifest = artifact.manifest
    _print_rows([[name, f"{(folder / name).stat().st_size:,} bytes"] for name in (MANIFEST, *manifest["files"])])
    print(f"{artifact.bytes:,} bytes in all, {manifest['parameters']:,} stored weights, for {artifact.target}\n")
    for what in ("inputs", "outputs"):
        shapes = [f"{spec.get('name', '')} {spec['dtype']} {['batch', *spec['shape'][1:]]}" for spec in manifest[what]]
        print(f"{what}: " + "; ".join(shape.strip().replace("'", "") for shape in shapes))
    print(f"\n{artifact.recipe}")
    _print_rows(
        [
            [row["layer"] or "the network", row.get("done") or f"left: {row.get('skipped')}"]
            for row in manifest["coverage"]
        ]
    )


def _inspect_workload(spec: str) -> None:
    from featherweight import workload
    from featherweight.surgery import encoding_of

    loaded = workload.load(spec)
    rows = [["layer", "kind", "weight", "stored as", "bytes"]]
    for name, layer in loaded.model.named_modules():
        own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        if not own:
            continue
        weight = getattr(layer, "weight", None)
        shape = "×".join(map(str, weight.shape)) if weight is not None else ""
        encoding = encoding_of(layer) if weight is not None else None
        stored = encoding.describe() if encoding else str(own[0].dtype).removeprefix("torch.")
        size = sum(value.numel() * value.element_size() for value in own)
        rows.append([name or "(the model)", type(layer).__name__, shape, stored, f"{size:,}"])
    _print_rows(rows)
    state = loaded.model.state_dict().values()
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    print(f"\n{count:,} parameters, {sum(v.numel() * v.element_size() for v in state):,} bytes")
    names = workload.input_names(loaded.model, loaded.example)
    for name, value in zip(names, workload.tensors(loaded.example), strict=True):
        print(f"input {name}: {str(value.dtype).removeprefix('torch.')} {['batch', *value.shape[1:]]}".replace("'", ""))


def list_(chosen: argparse.Namespace) -> int:
    """`featherweight list`."""
    if chosen.what == "targets":
        _list_targets()
    else:
        _list_passes()
    return DONE


def _list_passes() -> None:
    from featherweight import passes
    from featherweight.settings import settings_of

    for name in passes.names():
        kind = passes.find(name)
        print(f"{name}: {_first_line(kind)}")
        for setting in settings_of(kind).values():
            limits = f" ({setting.limits})" if setting.limits else ""
            print(f"    {setting.name}: {setting.type.__name__} = {setting.default!r}{limits}")


def _list_targets() -> None:
    from featherweight import targets
    from featherweight.errors import TargetError

    for name in targets.names():
        try:
            target: Target = targets.find(name)
        except TargetError as error:
            print(f"{name}: not installed. {error}")
        else:
            print(f"{name}: installed. {_first_line(type(target))}")


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


# ------------------------------------------------------------------------------------------------ helpers


def _artifact_folder(folder: Path) -> Path:
    """`folder`, or `best` in it where it is what compress wrote."""
    if not folder.is_dir():
        raise ArtifactError(f"There is no folder {folder}. Give one that `featherweight apply` or `compress` wrote.")
    best = folder / "best"
    return best if best.is_dir() and not (folder / "manifest.json").exists() else folder


def _print_table(table: Any) -> None:
    print(table.title)
    _print_rows([table.columns, *table.rows])


def _print_rows(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))] if rows else []
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _progress(what: str = "compress", unit: str = "trials") -> Progress:
    """A bar on a terminal that counts `unit`, else quiet lines."""
    from featherweight.progress import Progress

    class Shown(Progress):
        """The page is written anew after every trial."""

        def saved(self, folder: Path) -> None:
            from featherweight import report

            report.write(folder)

    class Lines(Shown):
        """One line on standard error for everything that is done."""

        begin = time.monotonic()

        def line(self, text: str) -> None:
            print(f"{time.monotonic() - self.begin:6.0f} s  {' '.join(text.split())}", file=sys.stderr, flush=True)

    class Bar(Shown):
        """What is done of what is expected, with an estimate of the time left; lines go above it."""

        def __init__(self) -> None:
            from tqdm import tqdm

            count = f"{{n_fmt}} of about {{total_fmt}} {unit}"
            shape = f"{{desc}} {{bar}} {count} [{{elapsed}}, {{remaining}} left] {{postfix}}"
            self._bar = tqdm(total=1, desc=what, bar_format=shape, dynamic_ncols=True)
            self._started = False

        def line(self, text: str) -> None:
            self._bar.write(" ".join(text.split()), file=sys.stderr)

        def stage(self, text: str) -> None:
            self._bar.set_postfix_str(text)

        def count(self, done: int, total: int) -> None:
            if not self._started:  # trials of an earlier run took this one no time
                self._bar.initial, self._started = done, True
            self._bar.n, self._bar.total = done, total
            self._bar.refresh()

        def close(self) -> None:
            self._bar.leave = False
            self._bar.close()

    return Bar() if sys.stderr.isatty() else Lines()
