"""What the layers of a network cost on a target on this machine: measured once, kept in the user's cache.

A layer's shape is its form (kind, sizes, stride, …) and its widths (channels that it reads and returns). Each shape is
measured at the network's own widths and at shares of them, in floats, in 8 and in 4 bits, as far as the target holds
that; between widths the time is interpolated. Many layers are exported as one network, with as many weights as the real
one would have at such widths, so that they come from as far away, and the runtime's own profile in a fresh process says
what each took. So what calling a runtime costs, and the reordering at a network's ends, are in no entry.

A network's latency is predicted as a multiple of the sum over its layers, and what lies between them as time in
proportion to the values that they read and return; both are fitted to networks that were measured. Embeddings, norms,
attention's own products and weights that a network uses without calling their layer have no entries: they are part of
the latter. What is tried on the grounds of a prediction is the strategy's affair.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight import passes, targets
from featherweight.artifact import build, versions_of, write_text_atomic
from featherweight.encodings import PACKED_BITS, Affine
from featherweight.errors import ArtifactError, BudgetError, ExportError, LayerError, RecipeError
from featherweight.hooks import watch_inputs
from featherweight.measure import machine, timing_inputs
from featherweight.progress import Progress
from featherweight.recipe import Recipe
from featherweight.surgery import CONVOLUTIONS, RecurrentWeight, encoding_of, input_quantizer
from featherweight.timing import BUSY, profiled
from featherweight.workload import Workload, like

FORMAT = 2  # of the files, and of what is measured: another number, another file
PRECISIONS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {  # the steps that bring a layer there
    "fp32": (),
    "int8": (("quantize_static", {"range": "minmax"}),),
    "int4": (("quantize_weights", {"bits": 4, "search": False}),),
}
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the channels, at which a shape is measured
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
KINDS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, *RECURRENT)
TOGETHER, TOGETHER_BYTES = 48, 32 << 20  # at most, layers in one network that is measured, and bytes of weights
RUNS, CALLS = 6, 5  # of such a network, and how often it is loaded anew
FEWEST_CHANNELS = 16  # of a layer that is measured at other widths too
HELD = 0.05  # how heavily the factor of a correction being 1 weighs, beside an error of as much
SHORTEST = 1e-4  # milliseconds: profiles count in microseconds
KERNEL = re.compile(r"entry(\d+)[./_](?!reader|layer[._]input_quantizer)")  # of an entry's own, by its name
LARGEST_FILE = 32 << 20
LATENCY_LIMIT = 1e7  # milliseconds; what is above is no latency


# ------------------------------------------------------------------------------------------------ shapes


@dataclass(frozen=True, order=True)
class Form:
    """All that a layer's time depends on but its widths.

    Args:
        kind: of the layer, such as `Conv2d`.
        rows: of its input, for each example of the batch: 1 but where a network folds other dimensions into it.
        sizes: of its input, without batch and channels.
        settings: other arguments of its class, by name.
    """

    kind: str
    rows: int
    sizes: tuple[int, ...]
    settings: tuple[tuple[str, Any], ...]

    @property
    def recurrent(self) -> bool:
        """Whether the layer keeps a state from one row to the next."""
        return self.kind in [kind.__name__ for kind in RECURRENT]

    @property
    def depthwise(self) -> bool:
        """Whether each channel is read by itself, so that one width follows from the other."""
        return dict(self.settings).get("groups") == "each"

    def __str__(self) -> str:
        told = [f"{name} {_joined(value)}" for name, value in self.settings]
        rows = f"{self.rows} × " if self.rows > 1 else ""
        return " ".join([self.kind, f"on {rows}{_joined(self.sizes) or 'rows'}", *told])


@dataclass(frozen=True, order=True)
class Shape:
    """A form, and how many channels (features) a layer reads and returns."""

    form: Form
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.inputs}→{self.outputs} {self.form}"

    @property
    def values(self) -> int:
        """How many values it reads for one example, and returns to the same places."""
        return self.form.rows * math.prod(self.form.sizes) * (self.inputs + self.outputs)


def _joined(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, tuple) else str(value)


def shapes_of(model: nn.Module, workload: Workload, batch: int = 1) -> dict[str, list[Shape]]:
    """The shapes of the layers that have entries, one for each call of theirs on the example.

    Args:
        model: the workload's, or one that reads what that reads.
        workload: whose example is run.
        batch: of the example's rows.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, KINDS)}
    found: dict[str, list[Shape]] = {}

    def observe(name: str, x: Tensor) -> None:
        if x.is_floating_point() and (shape := _shape(layers[name], x, batch)) is not None:
            found.setdefault(name, []).append(shape)

    rows = [torch.from_numpy(array) for array in timing_inputs(workload, batch)]
    watch_inputs(model, layers, [like(workload.example, rows)], observe)
    return found


def _shape(layer: Any, x: Tensor, batch: int) -> Shape | None:
    """None for inputs without a batch, which torch takes too."""
    kind = next(kind.__name__ for kind in KINDS if isinstance(layer, kind))
    if kind == "Linear":
        rows = max(1, x.shape[0] // batch) if x.dim() > 1 else 1
        return Shape(Form(kind, rows, tuple(x.shape[1:-1]), ()), layer.in_features, layer.out_features)
    if isinstance(layer, RECURRENT):
        return None if x.dim() < 3 else _recurrent(kind, layer, x, batch)
    return None if x.dim() < len(layer.kernel_size) + 2 else _convolution(kind, layer, x, batch)


def _recurrent(kind: str, layer: Any, x: Tensor, batch: int) -> Shape:
    length, size = (x.shape[1], x.shape[0]) if layer.batch_first else (x.shape[0], x.shape[1])
    settings = (("num_layers", layer.num_layers), ("bidirectional", layer.bidirectional))
    form = Form(kind, max(1, size // batch), (length,), settings)
    return Shape(form, layer.input_size, layer.hidden_size)


def _convolution(kind: str, layer: Any, x: Tensor, batch: int) -> Shape:
    names = ["kernel_size", "stride", "padding", *(["output_padding"] if isinstance(layer, TRANSPOSED) else [])]
    each = 1 < layer.groups == layer.in_channels
    settings = {name: getattr(layer, name) for name in (*names, "dilation")}
    settings["groups"] = "each" if each else layer.groups
    form = Form(kind, max(1, x.shape[0] // batch), tuple(x.shape[2:]), tuple(settings.items()))
    return Shape(form, layer.in_channels, layer.out_channels)


def widths(channels: int, multiple: int, divisor: int = 1) -> list[int]:
    """The widths at which a layer of so many channels is measured: SHARES of them, the largest first.

    They are multiples of `divisor`, and of `multiple`, which is halved while that leaves fewer than four. So few
    channels that no pass would remove any, as the inputs and classes of a network are, stay as they are.

    >>> widths(512, 64), widths(64, 64), widths(10, 16)
    ([512, 384, 256, 128], [64, 48, 32, 16], [10])
    """
    if channels < FEWEST_CHANNELS:
        return [channels]
    while multiple > 1 and channels < len(SHARES) * math.lcm(multiple, divisor):
        multiple //= 2
    step = math.lcm(multiple, divisor)
    wanted = {channels, *(max(1, round(share * channels / step)) * step for share in SHARES)}
    return sorted((width for width in wanted if width <= channels), reverse=True)


def candidates(shape: Shape, multiple: int) -> list[Shape]:
    """`shape`, and the narrower ones that are measured with it: none of recurrent layers, which no pass narrows."""
    form = shape.form
    if form.recurrent:
        return [shape]
    if form.depthwise:
        per_channel = shape.outputs // shape.inputs
        return [Shape(form, width, width * per_channel) for width in widths(shape.inputs, multiple)]
    groups = dict(form.settings).get("groups", 1)
    sides = [widths(count, multiple, groups) for count in (shape.inputs, shape.outputs)]
    return [Shape(form, inputs, outputs) for inputs in sides[0] for outputs in sides[1]]


# ------------------------------------------------------------------------------------------------ mathematics


def interpolated(points: Mapping[tuple[int, int], float], inputs: int, outputs: int) -> float:
    """The time at two widths, from those `points`, by widths, that form the closest rectangle round them.

    It is linear in each width, outside of all rectangles too, but no smaller there than in proportion to the width.
    Where all points have one width in common, time is in proportion to it.

    >>> interpolated({(8, 8): 1.0, (8, 16): 2.0, (16, 8): 3.0, (16, 16): 5.0}, 12, 12)
    2.75
    >>> interpolated({(3, 16): 3.0, (3, 32): 5.0}, 3, 24), interpolated({(8, 8): 1.0}, 4, 8)
    (4.0, 0.5)
    """
    ins, outs = (sorted({point[side] for point in points}) for side in (0, 1))
    rectangles = [
        (low, high, left, right)
        for low, high in _pairs(ins)
        for left, right in _pairs(outs)
        if all(corner in points for corner in ((low, left), (low, right), (high, left), (high, right)))
    ]

    def distance(rectangle: tuple[int, int, int, int]) -> tuple[float, int, float]:
        low, high, left, right = rectangle
        outside = _outside(inputs, low, high) + _outside(outputs, left, right)
        flat = (low == high != inputs) + (left == right != outputs)  # says nothing of how time grows with the width
        return outside, flat, math.log(high / low) + math.log(right / left)

    low, high, left, right = min(rectangles, key=distance)
    first, last = (_along(points[i, left], points[i, right], left, right, outputs) for i in (low, high))
    return _along(first, last, low, high, inputs)


def _pairs(values: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each with each that is not smaller."""
    return ((a, b) for index, a in enumerate(values) for b in values[index:])


def _outside(width: int, low: int, high: int) -> float:
    return abs(math.log(width / min(max(width, low), high)))


def _along(first: float, last: float, low: int, high: int, width: int) -> float:
    """On the line through `first` at `low` and `last` at `high`; no less than in proportion below."""
    if low == high:
        return first * width / low
    value = first + (last - first) * (width - low) / (high - low)
    return value if low <= width <= high else max(value, min(first, last) * min(1.0, width / low))


@dataclass(frozen=True)
class Estimate:
    """What the table says of a whole network.

    Args:
        layers_ms: the times of its layers, added up.
        values: read and returned by its layers, in one run.
        precision: of most of that time; networks of one precision are corrected alike.
    """

    layers_ms: float
    values: float
    precision: str


@dataclass(frozen=True)
class Correction:
    """What makes a latency of an estimate.

    Args:
        factor: of the layers' time.
        ms_per_value: for what lies between the layers.
    """

    factor: float = 1.0
    ms_per_value: float = 0.0

    def latency_ms(self, estimate: Estimate) -> float:
        """Of the whole network."""
        return self.factor * estimate.layers_ms + self.ms_per_value * estimate.values


Measured = Sequence[tuple[Estimate, float]]  # networks, and their latency in milliseconds


def fitted(measured: Measured) -> Correction:
    """The correction with the least squares of relative errors, neither part of it below zero.

    A single network cannot tell the two parts from one another, so the factor is held close to 1: what is missing in
    the sum then lies between the layers, and only a sum that is too large is made smaller.

    >>> fitted([(Estimate(2.0, 1000.0, "fp32"), 3.0)])
    Correction(factor=1.0, ms_per_value=0.001)
    >>> fitted([])
    Correction(factor=1.0, ms_per_value=0.0)
    """
    from scipy.optimize import nnls

    if not measured:
        return Correction()
    unit = max(estimate.values for estimate, _ in measured) or 1.0
    rows = [[e.layers_ms / latency, e.values / unit / latency] for e, latency in measured]
    found, _ = nnls(np.array([*rows, [HELD, 0.0]]), np.array([*[1.0] * len(rows), HELD]))
    return Correction(*(float(f"{value:.9g}") for value in (found[0], found[1] / unit)))


def corrections(measured: Measured) -> dict[str, Correction]:
    """One for each precision of which there are measured networks."""
    return {
        name: fitted([(e, latency) for e, latency in measured if e.precision == name])
        for name in dict.fromkeys(estimate.precision for estimate, _ in measured)
    }


def corrected_ms(estimate: Estimate, known: Mapping[str, Correction]) -> float:
    """The latency by the correction for the estimate's precision; else by that for fp32, which may be off by far."""
    return known.get(estimate.precision, known.get("fp32", Correction())).latency_ms(estimate)


def relative_error(predicted: float, measured: float) -> float:
    """How far off a prediction is, as a share of what was measured; positive where it is too large.

    >>> relative_error(1.5, 2.0)
    -0.25
    """
    return predicted / measured - 1


# ------------------------------------------------------------------------------------------------ the table


Key = tuple[str, Shape]  # precision and shape


@dataclass(frozen=True)
class CostTable:
    """Milliseconds of layers on one target.

    Args:
        target: its name.
        threads: of the runs that were profiled.
        batch: of their inputs.
        own: shapes of the network's own layers.
        entries: by precision and shape.
        left: why there are none, by precision and shape.
        fresh: how many were measured for this call; the others lay in the cache.
    """

    target: str
    threads: int
    batch: int
    own: Sequence[Shape]
    entries: Mapping[Key, float]
    left: Mapping[Key, str] = field(default_factory=dict)
    fresh: int = 0

    def latency_ms(self, shape: Shape, precision: str) -> float:
        """Of one layer; of one in floats where the target does not hold it in that precision.

        Where not even that could be measured it is 0: the layer then counts among what lies between the layers.

        Raises:
            LayerError: nothing of this form was tried.
        """
        points = self._points(shape.form, precision) or self._points(shape.form, "fp32")
        if not points and any(other.form == shape.form for _, other in self.left):
            return 0.0
        if not points:
            raise LayerError(
                f"The cost table of {self.target} says nothing of {shape}: no layer of this form was tried. "
                "Measure it with cost_table(workload, target, model=…), where model is the network that has it."
            )
        return interpolated(points, *_place(shape))

    def _points(self, form: Form, precision: str) -> dict[tuple[int, int], float]:
        return {_place(s): ms for (name, s), ms in self.entries.items() if name == precision and s.form == form}

    def estimate(self, model: nn.Module, workload: Workload, precision: str | None = None) -> Estimate:
        """What the layers of a network take, whatever it was trained to.

        Args:
            model: such as `compress_model` makes of the steps that change shapes; it need not be trained.
            workload: whose example it is run on, once.
            precision: one for all layers, as later steps would store them; None for what each layer has.

        Raises:
            LayerError: a layer is of a form that was not measured.
        """
        spent: dict[str, float] = defaultdict(float)
        found = self.by_layer(model, workload, precision).values()
        for each in found:
            spent[each.precision] += each.layers_ms
        values = sum(each.values for each in found)
        return Estimate(sum(spent.values()), values, max(spent, key=lambda name: spent[name], default="fp32"))

    def by_layer(self, model: nn.Module, workload: Workload, precision: str | None = None) -> dict[str, Estimate]:
        """The same for each layer that has entries, by name."""
        found = {}
        for name, shapes in shapes_of(model, workload, self.batch).items():
            own = precision or precision_of(model.get_submodule(name))
            values = float(sum(shape.values for shape in shapes) * self.batch)
            found[name] = Estimate(sum(self.latency_ms(shape, own) for shape in shapes), values, own)
        return found


def _place(shape: Shape) -> tuple[int, int]:
    """The widths between which is interpolated: one alone where the other follows from it."""
    return (shape.inputs, 1) if shape.form.depthwise else (shape.inputs, shape.outputs)


def precision_of(layer: nn.Module) -> str:
    """In which of PRECISIONS a layer is stored and computed; "fp32" for all other ways."""
    own: list[nn.Module] = [child for child in layer.children() if isinstance(child, RecurrentWeight)] or [layer]
    found = [encoding_of(module) for module in own]
    affine = [encoding for encoding in found if isinstance(encoding, Affine)]
    if len(affine) < len(own):
        return "fp32"
    if input_quantizer(layer) is not None:
        return "int8"
    return "int4" if all(encoding.bits <= PACKED_BITS for encoding in affine) else "fp32"


def cost_table(
    workload: Workload,
    target: str,
    *,
    threads: int,
    batch: int = 1,
    model: nn.Module | None = None,
    precisions: Sequence[str] | None = None,
    anew: bool = False,
    progress: Progress | None = None,
) -> CostTable:
    """The times of all layers of a network on a target, at its own and at narrower widths: from the cache, or measured.

    What is measured is in the cache at once, a few dozen entries at a time: what is killed goes on where it stopped.

    Args:
        workload: its network's layers, on its example.
        target: the name of one that is installed.
        threads: of the runs.
        batch: of the example's rows that a run reads.
        model: another network for the same inputs, such as one that a recipe factorized.
        precisions: those of PRECISIONS that are asked for; None for all.
        anew: whether what lies in the cache is measured again, because the machine was busy then, say.
        progress: told what goes on.

    Raises:
        TargetError: the target is unknown or not installed.
        LayerError: the network has no layers that are measured.
        ArtifactError: the cache cannot be written.
        ProcessError: a process that measures was killed, hung or ran out of memory.
    """
    for name, value in (("threads", threads), ("batch", batch)):
        if value < 1:
            raise BudgetError(f"{name}={value} makes no sense: give a number above zero.")
    multiple, say = targets.find(target).width_multiple, progress or Progress()
    found = [shape for shapes in shapes_of(model or workload.start, workload, batch).values() for shape in shapes]
    own = list(dict.fromkeys(found))
    if not own:
        raise LayerError(
            "The network calls no convolution, linear or recurrent layer on the example, so there is nothing to "
            f"measure on {target}. A cost table is of no use for it."
        )
    beside = _bytes_beside(found, multiple)
    shapes = sorted(beside, key=lambda shape: -beside[shape])
    wanted = [(precision, shape) for precision in precisions or PRECISIONS for shape in shapes]
    cache = _Cache(cache_folder() / f"{target}-{_digest(key := _key(target, threads, batch))}.json", key, say)
    missing = [entry for entry in wanted if anew or _text(entry) not in cache]
    for done, chunk in _chunks(missing, beside):
        say.count(len(wanted) - len(missing) + done, len(wanted))
        say.stage(f"{target}: layers in {chunk[0][0]}")
        cache.add(*_measured(chunk, target, threads, batch, say))
    say.count(len(wanted), len(wanted))
    entries, left = cache.of(wanted)
    return CostTable(target, threads, batch, own, entries, left, len(missing))


def in_short(table: CostTable) -> list[list[str]]:
    """A heading, and a row for each layer and precision: milliseconds where a share of all its channels is left."""
    rows = [["layer", "precision", *(f"{share:g}" for share in SHARES)]]
    for shape in table.own:
        for precision in PRECISIONS:
            if (precision, shape) in table.entries:
                times = [table.latency_ms(_narrowed(shape, share), precision) for share in SHARES]
                rows.append([str(shape), precision, *(f"{ms:.3f}" for ms in times)])
    return rows


def _narrowed(shape: Shape, share: float) -> Shape:
    kept = [max(1, round(share * w)) if w >= FEWEST_CHANNELS else w for w in (shape.inputs, shape.outputs)]
    return Shape(shape.form, *(kept if not shape.form.recurrent else (shape.inputs, shape.outputs)))


# ------------------------------------------------------------------------------------------------ measuring


class _Entry(nn.Module):
    """A layer with what follows it in most networks, and a cheap reader, so that its output is what others read."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, kind, settings = shape, getattr(nn, shape.form.kind), dict(shape.form.settings)
        if shape.form.depthwise:
            settings["groups"] = shape.inputs
        more = {"batch_first": True} if shape.form.recurrent else {}
        self.layer = kind(shape.inputs, shape.outputs, **settings, **more)
        self.convolves = kind in (*CONVOLUTIONS, *TRANSPOSED)
        reader: Any = CONVOLUTIONS[len(shape.form.sizes) - 1] if self.convolves else nn.Linear
        returned = shape.outputs * (2 if settings.get("bidirectional") else 1)
        self.reader = reader(returned, 1, 1) if self.convolves else reader(returned, 1)

    @property
    def reads(self) -> tuple[int, ...]:
        """The sizes of what it reads of one example."""
        form, channels = self.shape.form, self.shape.inputs
        return (form.rows, channels, *form.sizes) if self.convolves else (form.rows, *form.sizes, channels)

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x)
        if self.convolves:
            found = torch.relu(found)
        return self.reader(found[0] if isinstance(found, tuple) else found)


class _Bench(nn.Module):
    """Many layers side by side, which read the first of the values that there are for each example."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        super().__init__()
        self.names = [f"entry{index}" for index in range(len(shapes))]
        for name, shape in zip(self.names, shapes, strict=True):
            self.add_module(name, _Entry(shape))

    def _entries(self) -> list[Any]:
        return [self.get_submodule(name) for name in self.names]

    def example(self, rows: int) -> Tensor:
        """Rows of values such as layers read: those for convolutions, first, are as rectifiers return them."""
        return torch.cat([torch.rand(rows, self._values(True)), torch.randn(rows, self._values(False))], dim=1)

    def _values(self, convolves: bool) -> int:
        """How many values of a row are for layers that convolve, or for those that do not."""
        return max((math.prod(entry.reads) for entry in self._entries() if entry.convolves == convolves), default=0)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        entries, parts = self._entries(), {True: x, False: x[:, self._values(True) :]}
        views: dict[tuple[bool, tuple[int, ...]], Tensor] = {}
        for convolves, sizes in dict.fromkeys((entry.convolves, entry.reads) for entry in entries):
            views[convolves, sizes] = parts[convolves][:, : math.prod(sizes)].reshape(-1, *sizes[1:])
        return tuple(entry(views[entry.convolves, entry.reads]).reshape(x.shape[0], -1) for entry in entries)


Found = tuple[dict[Key, float], dict[Key, str]]  # times, and why there are none


def _measured(entries: Sequence[Key], target: str, threads: int, batch: int, say: Progress) -> Found:
    """The times of layers of one precision, and why others have none: where all fail together, each half by itself."""
    try:
        return _profiled(entries, target, threads, batch, say)
    except (ExportError, ArtifactError, LayerError, RecipeError) as error:
        if isinstance(error.__cause__, OSError):  # the disk is full, say
            raise
        if len(entries) == 1:
            return {}, {entries[0]: " ".join(str(error).split())[:300]}
    half = len(entries) // 2
    parts = [_measured(part, target, threads, batch, say) for part in (entries[:half], entries[half:])]
    return {**parts[0][0], **parts[1][0]}, {**parts[0][1], **parts[1][1]}


def _profiled(entries: Sequence[Key], target: str, threads: int, batch: int, say: Progress) -> Found:
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(prefix="featherweight-") as scratch:
        torch.manual_seed(0)
        model = _Bench([shape for _, shape in entries]).eval()
        rows = (model.example(max(batch, 2)),)
        steps = tuple(passes.build(name, settings, "the cost table") for name, settings in PRECISIONS[entries[0][0]])
        recipe = Recipe(steps, target)
        artifact = build(recipe, Workload(model, rows, [rows], lambda predict: 0.0), Path(scratch) / "layers")
        inputs = [rows[0][:batch].numpy()]
        kernels, waited = profiled(artifact.folder, inputs, threads=threads, runs=RUNS, calls=CALLS)
    if waited > BUSY:
        say.line(
            f"other programs kept the processors busy: {len(entries)} layers on {target} waited {waited:.0%} of their "
            "time, which may be too long in the table; measure again on a quiet machine with --anew (anew=True)"
        )
    spent: dict[int, float] = defaultdict(float)
    for kernel in kernels:
        if part := KERNEL.match(kernel.name):
            spent[int(part[1])] += kernel.latency_ms
    found, left = {}, {}
    for index, entry in enumerate(entries):
        if why := _untreated(f"entry{index}.layer", artifact.manifest["coverage"]) if steps else "":
            left[entry] = why
        elif index in spent:
            found[entry] = max(spent[index], SHORTEST)
        else:
            left[entry] = f"the profile of {target} names no operator of it"
    return found, left


def _untreated(layer: str, coverage: Iterable[Mapping[str, str]]) -> str:
    """Why the steps left a layer as it was; empty where they did not."""
    rows = [row for row in coverage if row["layer"] == layer or row["layer"].startswith(f"{layer}.")]
    if any("done" in row for row in rows):
        return ""
    return next((row["skipped"] for row in rows), "is not treated by the step")


def _bytes_beside(layers: Sequence[Shape], multiple: int) -> dict[Shape, int]:
    """The shapes that are measured, and how many bytes a network of such layers would have if all were as narrow."""
    whole = sum(map(_bytes, layers))
    found: dict[Shape, int] = {}
    for shape in layers:
        for narrow in candidates(shape, multiple):
            found.setdefault(narrow, min(TOGETHER_BYTES, whole * _bytes(narrow) // _bytes(shape)))
    return found


def _chunks(entries: Sequence[Key], beside: Mapping[Shape, int]) -> Iterator[tuple[int, list[Key]]]:
    """Entries of one precision that are measured together, and how many come before them."""
    chunk: list[Key] = []
    for index, entry in enumerate(entries):
        if chunk and not _fits(chunk, entry, beside[entry[1]]):
            yield index - len(chunk), chunk
            chunk = []
        chunk = [*chunk, entry]
    if chunk:
        yield len(entries) - len(chunk), chunk


def _fits(chunk: Sequence[Key], entry: Key, most: int) -> bool:
    """Whether an entry is of the precision of those in a chunk, and has room there."""
    size = sum(_bytes(shape) for _, shape in (*chunk, entry))
    return chunk[0][0] == entry[0] and len(chunk) < TOGETHER and size <= most


def _bytes(shape: Shape) -> int:
    """Of a layer's weights in floats, about."""
    kernel = dict(shape.form.settings).get("kernel_size", ())
    return 4 * shape.inputs * (1 if shape.form.depthwise else shape.outputs) * math.prod(kernel)


# ------------------------------------------------------------------------------------------------ the cache


def cache_folder() -> Path:
    """Where tables are kept: `costs` in FEATHERWEIGHT_CACHE, or in `featherweight` in the user's folder for caches."""
    if named := os.environ.get("FEATHERWEIGHT_CACHE"):
        return Path(named).expanduser() / "costs"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "featherweight" / "costs"


def _key(target: str, threads: int, batch: int) -> dict[str, Any]:
    """All that times depend on beside the layer."""
    here, versions = machine(), versions_of(target)
    return {
        "format": FORMAT,
        "cpu": here["cpu"],
        "architecture": here["architecture"],
        "features": here["features"],
        "target": target,
        "versions": {name: versions.get(name, "unknown") for name in targets.find(target).requires},
        "threads": threads,
        "batch": batch,
    }


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _text(entry: Key) -> str:
    return f"{entry[0]} {entry[1]}"


class _Cache:
    """The entries in one file, which several processes may add to, and which a process that is killed leaves whole."""

    def __init__(self, path: Path, key: Mapping[str, Any], progress: Progress) -> None:
        self._path, self._key, self._progress = path, dict(key), progress
        self._entries = self._read()

    def __contains__(self, text: str) -> bool:
        return text in self._entries

    def of(self, wanted: Iterable[Key]) -> tuple[dict[Key, float], dict[Key, str]]:
        """The times of those entries that have one, and the reasons of those that have none."""
        found = {entry: self._entries[_text(entry)] for entry in wanted}
        times = {entry: value for entry, value in found.items() if isinstance(value, float)}
        return times, {entry: value for entry, value in found.items() if isinstance(value, str)}

    def add(self, found: Mapping[Key, float], left: Mapping[Key, str]) -> None:
        """Takes entries in, and writes them beside what others have written meanwhile."""
        fresh = {_text(entry): value for part in (found, left) for entry, value in part.items()}
        self._entries = {**self._read(), **self._entries, **fresh}
        content = json.dumps({"key": self._key, "entries": self._entries}, indent=1, ensure_ascii=False)
        try:
            write_text_atomic(self._path, content + "\n")
        except ArtifactError as error:
            raise ArtifactError(f"{error} FEATHERWEIGHT_CACHE in the environment names another one.") from error

    def _read(self) -> dict[str, float | str]:
        """What lies on disk; a file that cannot be read is set aside, for all that is in it can be measured again."""
        try:
            if self._path.stat().st_size > LARGEST_FILE:
                raise ValueError(f"it has more than {LARGEST_FILE:,} bytes")
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            if not isinstance(stored, dict) or stored.get("key") != self._key:
                raise ValueError("it is of another machine or version than its name says")
            return {str(text): _value(value) for text, value in stored["entries"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            aside = self._path.with_suffix(".broken")
            with contextlib.suppress(OSError):
                self._path.replace(aside)
            self._progress.line(f"{self._path} cannot be read ({str(error)[:200]}): set aside as {aside.name}")
            return {}


def _value(stored: Any) -> float | str:
    """A time, or the reason why there is none.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(stored, str):
        return stored
    if isinstance(stored, (int, float)) and not isinstance(stored, bool) and 0 < stored < LATENCY_LIMIT:
        return float(stored)
    raise ValueError(f"{str(stored)[:50]!r} is no time")


# ------------------------------------------------------------------------------------------------ in a search's folder


@dataclass(frozen=True)
class Predicted:
    """What was predicted of a recipe, and what was measured.

    Args:
        digest: of the recipe.
        predicted_ms: before it was measured.
        measured_ms: of its artifact.
    """

    digest: str
    predicted_ms: float
    measured_ms: float


def write_predictions(path: Path, found: Iterable[Predicted]) -> None:
    """Puts them where `stored_predictions` finds them, all at once."""
    write_text_atomic(path, json.dumps([asdict(one) for one in found], indent=1, allow_nan=False) + "\n")


def stored_predictions(path: Path) -> list[Predicted]:
    """What lies at `path`; nothing where there is nothing.

    Raises:
        ArtifactError: the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        rows = [Predicted(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
        if not all(isinstance(row.digest, str) and row.predicted_ms > 0 < row.measured_ms for row in rows):
            raise ValueError("a time is not above zero, or a digest no text")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} holds no predictions of this version ({str(error)[:200]}). Delete it.") from error
    return rows
