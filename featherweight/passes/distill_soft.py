"""Soft distillation: trains the compressed network to say what the original says, with all its hesitations.

    L = T² · Σ_k p_k · (log p_k − log q_k),   p = softmax(teacher / T),  q = softmax(student / T)

averaged over examples (and positions). The factor T² keeps gradients of one size while the temperature T changes.
Where outputs are no logits, L = Σ (student − teacher)² / Σ (teacher − mean)². No labels are needed. How the network
is trained (`training`) is the same for all that passes teach.

Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.errors import LayerError, WorkloadError
from featherweight.passes import Pass
from featherweight.settings import Choice, Range
from featherweight.surgery import done, returned_by
from featherweight.teacher import teacher_of
from featherweight.training import train
from featherweight.workload import Batch, Workload, call, outputs

SQUASHING = (nn.Tanh, nn.Sigmoid, nn.Softmax, nn.ReLU, nn.GELU, nn.SiLU)


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


@dataclass(frozen=True, kw_only=True)
class DistillSoft(Pass):
    """Trains the compressed network towards the outputs of the original.

    Data is `workload.train`, without its targets, or else the calibration batches.

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
        kinds, teacher = self._kinds(workload), teacher_of(workload.model)

        def loss(batch: Batch) -> Tensor:
            wanted = teacher(batch)
            value = self._loss(outputs(call(model, batch)), wanted, kinds)
            if not value.isfinite() and not all(bool(t.isfinite().all()) for t in wanted):
                raise WorkloadError(
                    "distill_soft: for one of the training batches the original model itself returned NaN or infinity, "
                    "so there is nothing to learn. Look for such values in them."
                )
            return value

        losses, layers = train(
            model,
            workload,
            loss,
            step=self.name(),
            where=self.where,
            epochs=self.epochs,
            steps=self.steps,
            lr=self.lr,
        )
        span = max(1, len(losses) // 10)
        first, last = sum(losses[:span]) / span, sum(losses[-span:]) / span
        named = " and ".join(dict.fromkeys(kind for kind in kinds if kind))
        for layer in layers:
            done(layer, f"distilled {len(losses)} steps ({named}), loss {first:.3g} → {last:.3g}")
        return model

    def _kinds(self, workload: Workload) -> list[str]:
        """By output: the name of its loss, empty for whole numbers."""
        found = returned_by(workload.model, workload.calibration[0])
        return [self._kind(output, source) if output.is_floating_point() else "" for output, source in found]

    def _kind(self, output: Tensor, source: nn.Module | None) -> str:
        if self.loss != "auto":
            return self.loss
        return "kl" if looks_like_logits(output, source) else "mse"

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
