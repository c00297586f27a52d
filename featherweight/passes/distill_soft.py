"""Soft distillation: trains the compressed network to say what the original says, with all its hesitations.

    L = T² · Σ_k p_k · (log p_k − log q_k),   p = softmax(teacher / T),  q = softmax(student / T)

averaged over examples (and positions). The factor T² keeps gradients of one size while the temperature T changes.
Where outputs are no logits, L = Σ (student − teacher)² / Σ (teacher − mean)². No labels are needed. What earlier
passes left trainable is trained: dense weights, the surviving weights of pruned layers, and quantized weights straight
through their rounding, which makes this quantization-aware training. Batch norms take their statistics anew, for
those of a network that lost channels are wrong, as the mean over the last batches; dropout stays off.

A step moves each tensor by about `lr` times the root mean square of its weights (AdamW with a rate for each tensor),
so that one `lr` suits convolutional networks and transformers. It warms up over the first tenth and ends on a cosine.

Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2; optimiser: Loshchilov and Hutter 2019,
arXiv:1711.05101, rates relative to the weights: Shazeer and Stern 2018, arXiv:1804.04235, section 8.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from featherweight.errors import LayerError, WorkloadError
from featherweight.passes import Pass
from featherweight.settings import Choice, Range
from featherweight.surgery import done, layer_of, matches, returned_by, thawed
from featherweight.workload import Batch, Workload, call, count_batches, outputs, raw, tensors

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
SQUASHING = (nn.Tanh, nn.Sigmoid, nn.Softmax, nn.ReLU, nn.GELU, nn.SiLU)
WARM_UP = 0.1  # share of the steps
SMALLEST = 1e-3  # root mean square below which a tensor's rate does not fall, so that zeros can move
WHOLE_BATCH = 16  # examples below which batch statistics are too rough to normalise by
AVERAGED = 10  # batches at least, and an eighth of all, whose statistics the batch norms keep
MEMORY = 2**28  # bytes of the teacher's answers that are kept


def soft_loss(
    student: Float[Tensor, "*positions classes"], teacher: Float[Tensor, "*positions classes"], temperature: float
) -> Float[Tensor, ""]:
    """T² · KL(teacher ‖ student) of the softened distributions over the last dimension, averaged over the others.

    >>> soft_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), temperature=4.0).item()
    0.0
    """
    p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()


def relative_error(student: Float[Tensor, "*shape"], teacher: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Squared error over what guessing the teacher's mean would give; 1 for a student that knows nothing.

    >>> relative_error(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 3.0])).item()
    1.0
    """
    spread = (teacher - teacher.mean()).square().mean()
    return (student - teacher).square().mean() / spread.clamp(min=torch.finfo(teacher.dtype).tiny * 256)


def looks_like_logits(output: Tensor, source: nn.Module | None = None) -> bool:
    """Whether `output` is like logits (n, classes) or (n, positions, classes), by its shape, values and source.

    What a normalisation or a squashing function returned is none, and neither are probabilities and unit vectors.

    >>> looks_like_logits(torch.tensor([[0.6, 0.8], [1.0, 0.0]])), looks_like_logits(torch.tensor([[2.0, -1.0]]))
    (False, True)
    """
    if output.dim() not in (2, 3) or output.shape[-1] == 1:
        return False
    if isinstance(source, SQUASHING) or "norm" in type(source).__name__.lower():
        return False
    rows = output.detach().float()
    return not any((size - 1).abs().max() < 1e-3 for size in (rows.norm(dim=-1), rows.abs().sum(-1)))


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


@dataclass(frozen=True, kw_only=True)
class DistillSoft(Pass):
    """Trains the compressed network towards the outputs of the original.

    Data is `workload.train`: batches, or (batch, target) pairs whose targets are ignored; without it, the calibration
    batches. A list or tuple of two is a pair where its first item is a batch: a tuple, list or dict.

    Args:
        epochs: how often the data is seen.
        steps: of the optimiser, at most, in all epochs together; 0 for no bound.
        lr: how far a step moves a tensor, relative to the size of its values.
        temperature: softens both distributions, so that unlikely classes count too.
        loss: "kl" for logits of classes in the last dimension, "mse" for other outputs (regressions, embeddings,
            independent yes-or-no logits); "auto" takes "kl" for floating outputs (n, classes) and
            (n, positions, classes) with more than one class, unless a norm or a squashing function returned them, or
            they are probabilities or unit vectors.
    """

    epochs: Annotated[float, Range(0.01, 1000.0)] = 1.0
    steps: Annotated[int, Range(0, 10_000_000)] = 0
    lr: Annotated[float, Range(1e-6, 1.0)] = 0.01
    temperature: Annotated[float, Range(0.5, 20.0)] = 2.0
    loss: Annotated[str, Choice("auto", "kl", "mse")] = "auto"

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        data = workload.calibration if workload.train is None else workload.train
        steps = max(1, math.ceil(self.epochs * count_batches(data)))
        steps = min(steps, self.steps) if self.steps else steps
        kinds = self._kinds(workload)
        with thawed(model):
            parameters = trainable(model, self.where)
            with _training(model, list(parameters.values())):
                batches = islice(_batches(data, workload.example), steps)
                losses = self._train(model, workload, batches, parameters, steps, kinds)
        span = max(1, len(losses) // 10)
        first, last = sum(losses[:span]) / span, sum(losses[-span:]) / span
        named = " and ".join(dict.fromkeys(kind for kind in kinds if kind))
        said = f"distilled {len(losses)} steps ({named}), loss {first:.3g} → {last:.3g}"
        for layer in dict.fromkeys(layer_of(name) for name in parameters):
            done(layer, said)
        return model

    def _kinds(self, workload: Workload) -> list[str]:
        """By output: the name of its loss, empty for whole numbers."""
        found = returned_by(workload.model, workload.calibration[0])
        return [self._kind(output, source) if output.is_floating_point() else "" for output, source in found]

    def _kind(self, output: Tensor, source: nn.Module | None) -> str:
        if self.loss != "auto":
            return self.loss
        return "kl" if looks_like_logits(output, source) else "mse"

    def _train(
        self,
        student: nn.Module,
        workload: Workload,
        batches: Iterable[Batch],
        parameters: Mapping[str, nn.Parameter],
        steps: int,
        kinds: Sequence[str],
    ) -> list[float]:
        """The loss of every step."""
        optimizer = torch.optim.AdamW(relative_rates(parameters.values(), self.lr), weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
        teacher = teacher_of(workload.model)
        losses: list[float] = []
        bar = tqdm(batches, "distil", total=steps, unit="step", leave=False, disable=not sys.stderr.isatty())
        with _Norms(student, {layer_of(name) for name in parameters}) as norms:
            for batch in bar:
                norms.expect(tensors(batch)[0].shape[0], last=len(losses) >= steps - max(AVERAGED, steps // 8))
                wanted = teacher(batch)
                loss = self._loss(outputs(call(student, batch)), wanted, kinds)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise WorkloadError(self._diverged(len(losses), wanted))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{losses[-1]:.3g}", refresh=False)
        return losses

    def _loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor], kinds: Sequence[str]) -> Tensor:
        """The mean over the floating outputs."""
        terms = [self._term(s, t, kind) for s, t, kind in zip(student, teacher, kinds, strict=True) if kind]
        if not terms:
            raise WorkloadError(
                f"distill_soft has nothing to compare: the model's {len(teacher)} outputs are whole numbers. "
                "Return logits or other floats from its forward, beside or instead of them."
            )
        return torch.stack(terms).mean()

    def _term(self, student: Tensor, teacher: Tensor, kind: str) -> Tensor:
        if student.shape != teacher.shape:
            raise LayerError(
                f"distill_soft compares outputs, but the compressed model returns {tuple(student.shape)} where the "
                f"original returns {tuple(teacher.shape)}: an earlier step changed the shape. Exclude the last layer "
                "from that step with where."
            )
        if kind == "kl":
            return soft_loss(student, teacher, self.temperature)
        return relative_error(student, teacher)

    def _diverged(self, step: int, teacher: Sequence[Tensor]) -> str:
        if not all(bool(t.isfinite().all()) for t in teacher):
            return (
                f"distill_soft: in step {step} the original model itself returned NaN or infinity, so there is "
                "nothing to learn. Look for such values in the training batches."
            )
        return (
            f"distill_soft: the loss became NaN or infinite in step {step} with lr={self.lr:g}. Lower lr, to "
            f"{self.lr / 10:g} say; if that does not help, an earlier step broke the model: try without it."
        )


class Teacher:
    """What the original answers to a batch.

    A search trains one candidate after the other on the same batches, and a third of a step is the teacher's: answers
    are kept, up to MEMORY bytes, as long as the model lives and stays as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._state = _state(model)
        self._answers: dict[bytes, Sequence[Tensor]] = {}
        self._room = MEMORY

    def __call__(self, batch: Batch) -> Sequence[Tensor]:
        question = _digest(batch)
        if question not in self._answers:
            model = self._model()
            assert model is not None  # whoever asks holds it
            with torch.no_grad():
                answer = outputs(call(model, batch))
            size = sum(t.numel() * t.element_size() for t in answer)
            if size > self._room:
                return answer
            self._room -= size
            self._answers[question] = answer
        return self._answers[question]

    def knows(self, model: nn.Module) -> bool:
        """Whether `model` is as it was when the first answer was given."""
        return self._state == _state(model)


_teachers: weakref.WeakKeyDictionary[nn.Module, Teacher] = weakref.WeakKeyDictionary()


def teacher_of(model: nn.Module) -> Teacher:
    """The teacher that `model` is: the one of earlier calls, unless the model has changed since."""
    known = _teachers.get(model)
    if known is None or not known.knows(model):
        known = _teachers[model] = Teacher(model)
    return known


def _state(model: nn.Module) -> list[tuple[int, int]]:
    """Something that changes with the model's tensors."""
    return [(t.data_ptr(), t._version) for t in (*model.parameters(), *model.buffers())]


def _digest(batch: Batch) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in zip(batch if isinstance(batch, Mapping) else range(len(batch)), tensors(batch), strict=True):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(raw(value).data)
    return digest.digest()


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


class _Norms:
    """The batch norms with running statistics among `layers`, and those without parameters of their own.

    They keep the mean of the statistics of the last batches, when weights hardly move any more: a moving average
    would rest on ten batches or so. Source: Wu and Johnson 2021, arXiv:2105.07576, section 3.
    """

    def __init__(self, model: nn.Module, layers: set[str]) -> None:
        self._momenta = {
            module: module.momentum
            for name, module in model.named_modules()
            if isinstance(module, NORMS) and module.track_running_stats and (name in layers or module.weight is None)
        }
        self._averaging = False

    def expect(self, examples: int, last: bool) -> None:
        """A batch of so many examples comes; `last` where it is among those whose statistics are kept."""
        whole = examples >= WHOLE_BATCH
        begins = whole and last and not self._averaging
        for norm in self._momenta:
            norm.train(whole)
            if begins:
                norm.reset_running_stats()
                norm.momentum = None  # torch's word for the mean of all batches since
        self._averaging = self._averaging or begins

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the momentum as it was."""
        for norm, momentum in self._momenta.items():
            norm.momentum = momentum


def _batches(data: Iterable[Any], example: Batch) -> Iterator[Batch]:
    """The batches of `data`, without their targets, over and over."""
    while True:
        count = 0
        for count, item in enumerate(data, 1):  # noqa: B007
            yield _checked(_without_target(item), example)
        if not count:
            raise WorkloadError(
                "distill_soft found no batches in train: it is empty, or can be iterated only once, as a generator "
                "is. Give a list, or an object whose __iter__ begins anew."
            )


def _without_target(item: Any) -> Any:
    pair = isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], (tuple, list, Mapping))
    return item[0] if pair else item


def _checked(batch: Any, example: Batch) -> Batch:
    if isinstance(batch, list):
        batch = tuple(batch)
    same = isinstance(batch, Mapping) == isinstance(example, Mapping) and isinstance(batch, (tuple, Mapping))
    if not same or len(batch) != len(example):
        raise WorkloadError(
            f"distill_soft: train yields a {type(batch).__name__}, which is no batch like example, a "
            f"{type(example).__name__} of {len(example)} tensors. Yield such batches, or pairs (batch, target): "
            "for one input and a label that is ((x,), y)."
        )
    return batch
