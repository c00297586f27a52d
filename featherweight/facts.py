"""What the strategy of a search has to know of a workload, and what tells one workload from another.

Nothing here depends on time or chance.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from featherweight import passes, targets
from featherweight.candidates import LABELLED, LARGEST_GROUP, Facts
from featherweight.errors import FeatherweightError, LayerError, WorkloadError
from featherweight.measure import machine
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.drop_layers import removable
from featherweight.passes.merge_positions import mergeable
from featherweight.passes.truncate_inputs import truncatable
from featherweight.recipe import Recipe, compress_model
from featherweight.training import parted
from featherweight.workload import Batch, Workload, call, count_batches, raw, tensors

TRAINING_FLOP = 9e12  # of one candidate's distillation: under a minute on two cores
FEWEST_STEPS, MOST_STEPS = 250, 500  # of one candidate's distillation
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def facts_of(workload: Workload, names: Sequence[str]) -> Facts:
    """What the strategy has to know; nothing in it depends on time or chance."""
    kinds = {type(module) for module in workload.start.modules()}
    return Facts(
        targets=tuple(names),
        folds=bool(kinds & set(NORMS)) and _something_folds(workload, names[0]),
        linear=nn.Linear in kinds,
        epochs=_epochs(workload),
        # with batch norms it is a convolutional network, where width is what the time goes into
        blocks=0 if kinds & set(NORMS) else len(removable(workload.start, workload)),
        truncates=truncatable(workload.start, workload),
        merges=len(mergeable(workload.start, workload, LARGEST_GROUP)),
        multiples={name: targets.find(name).width_multiple for name in names},
        labels=_has_labels(workload),
        precision=_precision(kinds),
        bfloat16=tuple(name for name in names if _computes_in_bfloat16(name)),
    )


def _computes_in_bfloat16(target: str) -> bool:
    """Whether a target can be told to, and this machine's processor does so by itself."""
    units = set(machine()["features"] or [])
    return "bfloat16" in targets.find(target).float_precisions and bool(units & {"amx_bf16", "avx512_bf16"})


def _precision(kinds: set[type[nn.Module]]) -> str:
    """In which distillation is faster here: convolutions lose by bfloat16 where there are no tiles for it (AMX)."""
    units = set(machine()["features"] or [])
    convolutional = bool(kinds & set(NORMS))
    faster = "amx_bf16" in units or ("avx512_bf16" in units and not convolutional)
    return "bfloat16" if faster else "float32"


def _something_folds(workload: Workload, target: str) -> bool:
    try:
        compress_model(Recipe((passes.build("fold_batchnorm", {}, "the search"),), target), workload)
    except LayerError:
        return False
    except FeatherweightError:
        return True  # something else is wrong with it, and the first trial will say what
    return True


def _epochs(workload: Workload) -> float:
    """So many that the training of one candidate takes TRAINING_FLOP, within bounds."""
    data = workload.calibration if workload.train is None else workload.train
    try:
        first = next(iter(data), None)
        length = count_batches(data)
    except Exception as error:
        raise WorkloadError(
            f"train raised {type(error).__name__}: {' '.join(str(error).split())[:300]} when it was iterated. Iterate "
            "over it yourself and mend it, or leave it out: the calibration batches are then trained on."
        ) from error
    if first is None or not length:
        return 1.0  # distill_soft explains what is wrong with that
    batch = workload.calibration[0]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(workload.start, batch)
    forward = counter.get_total_flops() / tensors(batch)[0].shape[0] * batch_size(first)
    steps = TRAINING_FLOP / max(4 * forward, 1.0)  # forward, backward twice that, and the teacher's forward
    return float(f"{min(max(steps, FEWEST_STEPS), MOST_STEPS) / length:.2g}")


def _has_labels(workload: Workload) -> bool:
    """Whether the data to train on tells the true labels of what the network returns as logits."""
    if workload.train is None or (first := next(iter(workload.train), None)) is None:
        return False
    batch, target = parted(first)
    if target is None:
        return False
    try:
        with torch.no_grad():
            DistillSoft(alpha=LABELLED).lesson(workload.start, workload).loss(batch, target)
    except Exception:  # the first distillation without labels will say what else is wrong
        return False
    return True


def batch_size(item: Any) -> int:
    """Of a batch, or of a pair of a batch and its targets; 1 where it is neither, which distill_soft explains."""
    while isinstance(item, (tuple, list, Mapping)) and item:
        item = next(iter(item.values() if isinstance(item, Mapping) else item))
    return int(item.shape[0]) if isinstance(item, Tensor) and item.dim() else 1


def fingerprint(workload: Workload) -> str:
    """16 hexadecimal digits that stand for the workload's file, the networks' parameters and what it reads."""
    digest = hashlib.sha256()
    if workload.source is not None and (path := _source_file(workload.source)) is not None:
        digest.update(path.read_bytes())
    students = {} if workload.student is None else workload.student.state_dict()
    for name, value in [*workload.model.state_dict().items(), *students.items()]:
        if not isinstance(value, Tensor):  # what a module keeps with get_extra_state
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(raw(value).data)
    digest.update(_described(workload.example).encode())
    return digest.hexdigest()[:16]


def _described(batch: Batch) -> str:
    names = list(batch) if isinstance(batch, Mapping) else None
    return str((names, [(value.dtype, tuple(value.shape[1:])) for value in tensors(batch)]))


def _source_file(source: str) -> Path | None:
    place = source.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    spec = importlib.util.find_spec(place)
    return Path(spec.origin) if spec and spec.origin else None
