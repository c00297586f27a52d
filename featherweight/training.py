"""The training loop that passes share: which tensors are trained, at what rates, on which batches.

What earlier passes left trainable is trained: dense weights, the surviving weights of pruned layers, and quantized
weights straight through their rounding, which makes this quantization-aware training. Batch norms take their
statistics anew, for those of a network that lost channels are wrong, as the mean over the last batches; dropout stays
off. A step moves each tensor by about `lr` times the root mean square of its weights (AdamW with a rate for each
tensor), so that one `lr` suits convolutional networks and transformers. It warms up over the first tenth and ends on
a cosine. What is to be learnt, that is the loss, is a pass's affair; among how many processes and on which device it is
learnt, that of `processes`; and how a training that was killed goes on, that of `checkpoints`.

With `precision="bfloat16"` the student, and it alone, computes in 16 bits where torch's autocast deems that harmless;
weights, their updates, losses and teachers stay in 32.

Source: optimiser: Loshchilov and Hutter 2019, arXiv:1711.05101; rates relative to the weights: Shazeer and Stern 2018,
arXiv:1804.04235, section 8.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from featherweight import memory
from featherweight.batch_norms import Norms
from featherweight.checkpoints import Checkpoint
from featherweight.errors import LayerError, WorkloadError
from featherweight.processes import XLA, Processes, Share, lying_on, processes
from featherweight.surgery import computing_in, done, layer_of, matches, thawed
from featherweight.workload import Batch, Workload, call, count_batches, like, tensors

WARM_UP = 0.1  # share of the steps
SMALLEST = 1e-3  # root mean square below which a tensor's rate does not fall, so that zeros can move


def train(
    model: nn.Module,
    workload: Workload,
    loss: Callable[[Batch, Any], Tensor],
    *,
    step: str,
    where: str,
    epochs: float,
    steps: int,
    lr: float,
    precision: str = "float32",
    besides: Sequence[nn.Parameter] = (),
) -> tuple[list[float], list[str]]:
    """Trains `model` in place; the loss of every step, and the names of the layers that were trained.

    Data is `workload.train`: batches, or (batch, target) pairs; without it, the calibration batches. A list or tuple of
    two is a pair where its first item is a batch: a tuple, list or dict.

    Args:
        loss: of one batch and its target (None where there is none), as a function of the model's parameters.
        step: the name of the pass, for messages.
        where: which layers.
        epochs: how often the data is seen.
        steps: of the optimiser, at most, in all epochs together; 0 for no bound.
        lr: how far a step moves a tensor, relative to the size of its values.
        precision: "float32" or "bfloat16", of what the model computes.
        besides: parameters of the loss itself, which are trained along with the model.

    Raises:
        LayerError: `where` chooses nothing that can be trained.
        TargetError: there are several processes, but nothing is installed with which they could train together.
        WorkloadError: the data cannot be used, or the loss became NaN or infinite.
    """
    together = processes()
    data = workload.calibration if workload.train is None else workload.train
    count = max(1, math.ceil(epochs * count_batches(data)))
    count = min(count, steps) if steps else count
    with thawed(model):
        parameters = trainable(model, where)
        layers = list(dict.fromkeys(layer_of(name) for name in parameters))
        learnt = [*parameters.values(), *besides]
        with (
            lying_on(together.device, [model, workload.model], besides),
            _training(model, list(parameters.values())),
            computing_in(precision, model, together.device),
            Norms(model, set(layers), count, together) as norms,
            memory.keeping(),
        ):
            together.agree([*learnt, *norms.statistics()])
            lazy = together.device.type == XLA  # it fuses by itself, and compiles numbers into its programs
            optimizer = torch.optim.AdamW(relative_rates(learnt, lr), weight_decay=0.0, fused=not lazy, capturable=lazy)
            about = (step, where, count, lr, precision, together)
            checkpoint = Checkpoint(model, about, [*learnt, *norms.statistics()], optimizer)
            shares = (together.share(*pair) for pair in islice(_batches(data, workload.example, step), count))
            course = _Course(step, lr, count, loss, optimizer, norms, together, checkpoint)
            losses = course.run(_laid_out(shares, model))
    return losses, layers


def report(layers: Iterable[str], losses: Sequence[float], what: str) -> None:
    """Says of every layer how many steps it was trained, on what, and the mean loss of the first and last tenth."""
    span = max(1, len(losses) // 10)
    first, last = sum(losses[:span]) / span, sum(losses[-span:]) / span
    for layer in layers:
        done(layer, f"distilled {len(losses)} steps ({what}), loss {first:.3g} → {last:.3g}")


@dataclass(frozen=True)
class _Course:
    """A training from its first step, or from its last checkpoint, to its last step."""

    step: str
    lr: float
    steps: int
    loss: Callable[[Batch, Any], Tensor]
    optimizer: torch.optim.Optimizer
    norms: Norms
    together: Processes
    checkpoint: Checkpoint

    def run(self, shares: Iterator[Share]) -> list[float]:
        """The loss of every step."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        losses = self._resumed(shares)
        bar = tqdm(shares, "distil", self.steps, False, initial=len(losses), unit="step", disable=_unwatched())
        for share in bar:
            for group, full in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = self.together.variable(full * rate(len(losses), self.steps))
            self.norms.expect(len(losses), share)
            losses.append(self._gradients(share))
            if not math.isfinite(losses[-1]):
                raise WorkloadError(
                    f"{self.step}: the loss became NaN or infinite in step {len(losses)} with lr={self.lr:g}. Lower "
                    f"lr, to {self.lr / 10:g} say; if that does not help, an earlier step broke the model: try "
                    "without it."
                )
            self.optimizer.step()
            self.together.close_step()
            if self.together.any(self.checkpoint.due(finished=len(losses) == self.steps)):
                self.checkpoint.keep(losses)
            bar.set_postfix(loss=f"{losses[-1]:.3g}", refresh=False)
        return losses

    def _resumed(self, shares: Iterator[Share]) -> list[float]:
        """The losses of the steps that a checkpoint knows of, whose batches are passed over.

        There are none where the processes that train together know of different steps.
        """
        state = self.checkpoint.load()
        if not self.together.alike(0 if state is None else len(state.losses)) or state is None:
            return []
        for number, share in enumerate(islice(shares, len(state.losses))):
            self.norms.expect(number, share)
        self.checkpoint.restore(state)
        return list(state.losses)

    def _gradients(self, share: Share) -> float:
        """The loss; its gradients are with the parameters."""
        self.optimizer.zero_grad()
        value = self.loss(share.batch, share.target) * (share.part * self.together.count)
        value.backward()
        if self.together.count > 1:
            learnt = [p for group in self.optimizer.param_groups for p in group["params"]]
            for p in learnt:  # what made no difference here may have made one elsewhere
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.together.average([value, *(p.grad for p in learnt)])
        return value.item()


def _unwatched() -> bool:
    return not sys.stderr.isatty()


def rate(step: int, steps: int) -> float:
    """The share of the full rate at `step` of `steps`: up over the first tenth, then down a cosine to zero.

    >>> [round(rate(step, 10), 2) for step in (0, 1, 5, 9)]
    [1.0, 0.98, 0.5, 0.02]
    """
    warm = max(1.0, WARM_UP * steps)
    if step + 1 < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - warm) / (steps + 1 - warm)))


def relative_rates(parameters: Iterable[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """One group for each tensor: its rate is `lr` times the root mean square of its values."""
    sizes = [(p, max(float(p.detach().square().mean().sqrt()), SMALLEST)) for p in parameters]
    return [{"params": [p], "lr": lr * size} for p, size in sizes]


def trainable(model: nn.Module, where: str) -> dict[str, nn.Parameter]:
    """The parameters that require gradients in the layers that `where` chooses.

    Raises:
        LayerError: there are none.
    """
    all_ = dict(model.named_parameters())
    found = {name: p for name, p in all_.items() if p.requires_grad and matches(layer_of(name), where)}
    if not found:
        layers = list(dict.fromkeys(layer_of(name) for name, p in all_.items() if p.requires_grad))
        raise LayerError(
            f"where={where!r} matches none of the {len(layers)} layers of {type(model).__name__} that can be trained. "
            + (f"They are: {', '.join(layers[:20])}." if layers else "Set requires_grad on the model's parameters.")
        )
    return found


@contextlib.contextmanager
def _training(model: nn.Module, chosen: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the block gradients reach the chosen parameters alone; afterwards all is as it was found."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    wanted = {id(p) for p in chosen}
    model.eval()
    for p, _ in flags:
        p.requires_grad_(id(p) in wanted)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
            p.grad = None
        for module, mode in modes:
            module.training = mode


def _laid_out(shares: Iterator[Share], model: nn.Module) -> Iterator[Share]:
    """Pictures with their channels last where the network has depthwise convolutions, which then run twice as fast.

    The layout of the first input is handed on from layer to layer. Networks whose code asks for the usual one (`view`
    does) keep it.
    """
    depthwise = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in model.modules())
    for number, share in enumerate(shares):
        batch = share.batch
        turned = like(batch, [_channels_last(value) for value in tensors(batch)]) if depthwise else batch
        if number == 0 and depthwise and not _runs(model, turned):
            depthwise, turned = False, batch
        yield replace(share, batch=turned)


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def _runs(model: nn.Module, batch: Batch) -> bool:
    with torch.no_grad():
        try:
            call(model, batch)
        except RuntimeError:
            return False
    return True


def _batches(data: Iterable[Any], example: Batch, step: str) -> Iterator[tuple[Batch, Any]]:
    """The batches of `data`, each with its target or None, over and over."""
    while True:
        count = 0
        for count, item in enumerate(data, 1):  # noqa: B007
            batch, target = parted(item)
            yield _checked(batch, example, step), target
        if not count:
            raise WorkloadError(
                f"{step} found no batches in train: it is empty, or can be iterated only once, as a generator "
                "is. Give a list, or an object whose __iter__ begins anew."
            )


def parted(item: Any) -> tuple[Any, Any]:
    """What `train` yields as a batch and its target, None where it has none."""
    pair = isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], (tuple, list, Mapping))
    return (item[0], item[1]) if pair else (item, None)


def _checked(batch: Any, example: Batch, step: str) -> Batch:
    if isinstance(batch, list):
        batch = tuple(batch)
    same = isinstance(batch, Mapping) == isinstance(example, Mapping) and isinstance(batch, (tuple, Mapping))
    if not same or len(batch) != len(example):
        raise WorkloadError(
            f"{step}: train yields a {type(batch).__name__}, which is no batch like example, a "
            f"{type(example).__name__} of {len(example)} tensors. Yield such batches, or pairs (batch, target): "
            "for one input and a label that is ((x,), y)."
        )
    return batch
