"""Soft distillation: trains the compressed network to say what the original says, with all its hesitations.

    L = T² · Σ_k p_k · (log p_k − log q_k),   p = softmax(teacher / T),  q = softmax(student / T)

averaged over examples (and positions). The factor T² keeps gradients of one size while the temperature T changes.
Where outputs are no logits, L = Σ (student − teacher)² / Σ (teacher − mean)². No labels are needed; where there are
some, they can have a share α of the loss: (1 − α) · L + α · cross-entropy. How the network is trained (`training`) is
the same for all that passes teach.

Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from featherweight.losses import (
    Comparison,
    checked_labels,
    kinds_of,
    label_loss,
    logits_among,
    refuse_without_logits,
)
from featherweight.passes._distillation import Distillation, Lesson
from featherweight.settings import Choice, Range
from featherweight.teacher import teacher_of
from featherweight.workload import Batch, Workload, call, outputs


@dataclass(frozen=True, kw_only=True)
class DistillSoft(Distillation):
    """Trains the compressed network towards the outputs of the original.

    Data is `workload.train`, or else the calibration batches. Its targets are used where `alpha` asks for them.

    Args:
        temperature: softens both distributions, so that unlikely classes count too.
        loss: "kl" for logits of classes in the last dimension, "mse" for other outputs (regressions, embeddings,
            independent yes-or-no logits); "auto" takes "kl" for floating outputs (n, classes) and
            (n, positions, classes) with more than one class, unless a norm or a squashing function returned them, or
            they are probabilities or unit vectors.
        alpha: the share of the true labels in the loss. They are the targets that train yields, whole numbers, and
            are compared with the first output that is logits.
    """

    temperature: Annotated[float, Range(0.5, 20.0)] = 2.0
    loss: Annotated[str, Choice("auto", "kl", "mse")] = "auto"
    alpha: Annotated[float, Range(0.0, 1.0)] = 0.0

    def lesson(self, model: nn.Module, workload: Workload) -> Lesson:
        comparison = Comparison(self.name(), kinds_of(workload, self.loss), self.temperature)
        teacher = teacher_of(workload.model)
        if self.alpha:
            refuse_without_logits(workload, comparison.kinds, f"{self.name()} with alpha={self.alpha:g}")

        def loss(batch: Batch, target: Any) -> Tensor:
            answer = outputs(call(model, batch))
            soft = comparison.loss(answer, teacher(batch))
            if not self.alpha:
                return soft
            logits = logits_among(answer, comparison.kinds)[0]
            true = label_loss(logits, checked_labels(target, logits, self.name()))
            return (1 - self.alpha) * soft + self.alpha * true

        return Lesson(loss, f"{comparison} and labels" if self.alpha else str(comparison))
