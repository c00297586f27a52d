"""What it does to the outputs of a network when one layer alone is stored in fewer bytes: measured once, kept on disk.

For each layer and each way to store it, the squared error of the outputs on some of the calibration data, as `damage`
has it, where others of it tell how best to store it so, and the bytes that the layer then takes: whole numbers of 8 or
4 bits, rounded to the nearest or by GPTQ, 16 shared values, or factors of half or a quarter of the weights, those in 4
bits. Layers that share a weight are treated together, and named by the first. What is made of the table is
`allocation`'s affair and the strategy's. Widths are not in it: what channels do shows after training only.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from featherweight import passes
from featherweight.allocation import Option, total_damage
from featherweight.artifact import write_text_atomic
from featherweight.damage import damage, examples_apart, first_examples, floating_outputs
from featherweight.errors import ArtifactError, LayerError
from featherweight.passes import Pass
from featherweight.passes._storing import KINDS
from featherweight.replay import Kept, record, replaying
from featherweight.surgery import dense_of, encoding_of, groups_by_weight, is_computed, recording
from featherweight.trials import read_json
from featherweight.workload import Batch, Workload


def _step(name: str, **settings: Any) -> Pass:
    return passes.build(name, settings, "the search")


Way = tuple[Pass, ...]  # one after the other

FOUR = _step("quantize_weights", bits=4, block=32)
WAYS: dict[str, Way] = {  # other numbers of bits take no fewer bytes than the next of these
    "8 bits": (_step("quantize_weights", bits=8),),
    "4 bits in blocks of 32": (FOUR,),
    "4 bits in blocks of 32, errors fed on": (_step("quantize_gptq", bits=4, block=32),),
    "4 bits, errors fed on": (_step("quantize_gptq", bits=4),),
    "16 shared values": (_step("cluster_kmeans", bits=4),),
    "half of the weights, 4 bits": (_step("factorize_svd", share=0.5), FOUR),
    "a quarter of the weights, 4 bits": (_step("factorize_svd", share=0.25), FOUR),
}
FEW, SMALL = 2, 0.005  # ways for layers of less than this share of all bytes, from which nothing is to be had
FLOAT = "32 bits"
Entry = tuple[str, str]  # of the table: a layer, or several that share a weight, and one of WAYS


def damage_table(
    model: nn.Module, path: Path, key: Mapping[str, Any], measured: Callable[[Sequence[Entry]], Iterable[Option]]
) -> list[Option]:
    """An option for each layer with weights and each of WAYS, of small layers FEW, and one that leaves it as it is.

    Entries are written to `path` as they come, and read from it where they lie there for the same `key`.

    Args:
        model: in evaluation mode, dense; not changed.
        path: of a JSON file.
        key: all that the table depends on, as JSON has it.
        measured: what comes of those that do not lie there, one after the other: `damages`, here or elsewhere.

    Raises:
        ArtifactError: the file cannot be read or written.
        LayerError: the network returns nothing that can be compared.
    """
    known = {(option.layer, option.choice): option for option in stored_table(path, key)}
    layers = _layers(model)
    small = SMALL * sum(layers.values())
    entries = [(name, way) for name, size in layers.items() for way in list(WAYS)[: FEW if size < small else None]]
    missing = [entry for entry in entries if entry not in known]
    found = measured(missing) if missing else ()
    for option in tqdm(found, "damage", len(missing), disable=not sys.stderr.isatty()):
        known[option.layer, option.choice] = option
        _write(path, key, [known[entry] for entry in entries if entry in known])
    floats = [Option(name, FLOAT, 0.0, float(size)) for name, size in layers.items()]
    return [*floats, *(known[entry] for entry in entries if known[entry].cost > 0)]


def damages(model: nn.Module, workload: Workload, entries: Sequence[Entry]) -> Iterator[Option]:
    """What each of `entries` does to the outputs of the model, one after the other.

    Args:
        model: in evaluation mode, dense; not changed.
        workload: whose calibration data are run.
        entries: of its table.

    Raises:
        LayerError: the network returns nothing that can be compared.
    """
    batch, others = examples_apart(model, workload, "the search")
    # of another size, or the same: what is replayed are the outputs for the batch
    quick = dataclasses.replace(workload, calibration=[others], example=first_examples([others], 2))
    names = [name for group in _layers(model) for name in group.split(", ")]
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        kept_of_others, _ = _recorded(model, names, others, Path(folder) / "others")
        kept, wanted = _recorded(model, names, batch, Path(folder) / "compared")
        for name, way in entries:
            changed, size = _stored_otherwise(model, quick, name, WAYS[way], kept_of_others)
            with replaying(changed, kept, name.split(", ")):
                done = damage(floating_outputs(changed, batch, "the search"), wanted)
            yield Option(name, way, done, float(size))


def _recorded(
    model: nn.Module, names: Sequence[str], batch: Batch, folder: Path
) -> tuple[dict[str, Kept], list[Tensor]]:
    """What layers returned for `batch`, in files of a new folder, and what the network did."""
    folder.mkdir()
    outputs: list[Tensor] = []
    kept = record(model, names, lambda: outputs.extend(floating_outputs(model, batch, "the search")), folder)
    return kept, outputs


def steps_of(choices: Mapping[str, Option]) -> tuple[Pass, ...]:
    """The steps that store each layer as it was chosen; none for those that stay as they are.

    >>> a, b = Option("a", "8 bits", 0.1, 8.0), Option("b", "32 bits", 0.0, 8.0)
    >>> [(step.name(), step.where, step.bits) for step in steps_of({"a": a, "b": b})]
    [('quantize_weights', 'a', 8)]
    """
    where: dict[Pass, list[str]] = defaultdict(list)
    for names, option in choices.items():
        for step, patterns in _placed(WAYS.get(option.choice, ()), names):
            where[step].append(patterns)
    # what is factorized comes before all that stores, so that factors and whole layers are stored in one step
    ordered = sorted(where, key=lambda step: not _factorizes(step))
    return tuple(dataclasses.replace(step, where=", ".join(where[step])) for step in ordered)


def suffers_most_from_factors(choices: Mapping[str, Option]) -> bool:
    """Whether layers that become factors do more than half of the harm.

    >>> a, b = Option("a", "8 bits", 0.1, 8.0), Option("b", "half of the weights, 4 bits", 0.2, 8.0)
    >>> suffers_most_from_factors({"a": a, "b": b}), suffers_most_from_factors({"a": a})
    (True, False)
    """
    of_factors = [o.damage for o in choices.values() if any(map(_factorizes, WAYS.get(o.choice, ())))]
    return 2 * sum(of_factors) > total_damage(choices)


def _placed(way: Way, names: str) -> Iterator[tuple[Pass, str]]:
    """The steps of `way`, each with the names of what it is to treat: of a factorized layer its two parts, in a row."""
    for step in way:
        yield step, names
        if _factorizes(step):
            # the name itself, too: it says what the step was for where an earlier one removed the layer
            names = ", ".join(f"{layer}, {layer}.0, {layer}.1" for layer in names.split(", "))


def _factorizes(step: Pass) -> bool:
    return step.name() == "factorize_svd"


def _layers(model: nn.Module) -> dict[str, int]:
    """The bytes of each weight that can be stored otherwise, by the names of the layers that share it."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, KINDS) and not is_computed(m)}
    groups = groups_by_weight(model, layers)
    return {", ".join(group): dense_of(next(iter(group.values()))).nbytes for group in groups}


def _stored_otherwise(
    model: nn.Module, workload: Workload, names: str, way: Way, kept: Mapping[str, Kept]
) -> tuple[nn.Module, int]:
    """A copy in which the layers `names` are stored in this `way`, and the bytes that takes; 0 where they are left.

    All other layers are copied without their tensors, which both networks then share. Those by which it is decided how
    to store, the calibration data of `workload`, they do not compute again: what is `kept` is what they return.
    """
    touched = names.split(", ")
    shared = [t for name, module in model.named_modules() if name not in touched for t in _own(module)]
    changed = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    with recording(), replaying(changed, kept, touched, throughout=True):
        try:
            for step, where in _placed(way, names):
                changed = dataclasses.replace(step, where=where).apply(changed, workload).eval()
        except LayerError:
            return changed, 0
    parts = list(changed.get_submodule(touched[0]).modules())
    treated = any(encoding_of(part) is not None for part in parts)
    return changed, sum(map(_stored_bytes, parts)) if treated else 0


def _stored_bytes(layer: Any) -> int:
    if (encoding := encoding_of(layer)) is not None:
        return sum(b.nbytes for b in encoding.buffers())
    return layer.weight.nbytes if isinstance(layer, KINDS) and not is_computed(layer) else 0


def _own(module: nn.Module) -> Iterator[Any]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def stored_table(path: Path, key: Mapping[str, Any] | None = None) -> list[Option]:
    """What lies at `path`, for `key` if one is given; nothing where there is no table.

    Raises:
        ArtifactError: the file cannot be read.
    """
    if not path.exists():
        return []
    stored = read_json(path)
    if key is not None and stored.get("key") != dict(key):
        return []
    try:
        return [Option(**entry) for entry in stored["options"]]
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path} holds no table of this version ({error}). Delete it, and resume.") from error


def _write(path: Path, key: Mapping[str, Any], options: Sequence[Option]) -> None:
    stored = {"key": dict(key), "options": [dataclasses.asdict(option) for option in options]}
    write_text_atomic(path, json.dumps(stored, indent=1, allow_nan=False) + "\n")
