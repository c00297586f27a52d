"""Hard distillation: trains the compressed network on the original's answers, as if they were true labels.

    L = −log q_k,   k = argmax teacher,  q = softmax(student)

averaged over examples (and positions, and outputs that are logits). Only which class comes first is learnt, so the
size of the teacher's logits and what it says of other classes do not matter. That is its use: where those hesitations
are worth nothing, or where the network is judged by its first choice alone and there is more data than labels.
Elsewhere `distill_soft` learns more from the same data.

Left out: outputs that are no logits, which have no most likely class.

Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2, with the temperature going to zero; Buciluǎ, Caruana,
Niculescu-Mizil 2006, doi:10.1145/1150402.1150464, for a network as the labeller of data that has no labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.losses import check_shapes, kinds_of, label_loss, logits_among, refuse_broken, refuse_without_logits
from featherweight.passes._distillation import Distillation, Lesson
from featherweight.teacher import teacher_of
from featherweight.workload import Batch, Workload, call, outputs


def hard_loss(
    student: Float[Tensor, "*positions classes"], teacher: Float[Tensor, "*positions classes"]
) -> Float[Tensor, ""]:
    """The cross-entropy of the student with the teacher's most likely class, averaged over all but the classes.

    >>> student = torch.tensor([[0.0, 0.0]])
    >>> hard_loss(student, torch.tensor([[1.0, 2.0]])) == hard_loss(student, torch.tensor([[-9.0, 99.0]]))
    tensor(True)
    """
    return label_loss(student, teacher.argmax(-1))


@dataclass(frozen=True, kw_only=True)
class DistillHard(Distillation):
    """Trains the compressed network to choose the class that the original chooses."""

    def lesson(self, model: nn.Module, workload: Workload) -> Lesson:
        kinds, teacher = kinds_of(workload), teacher_of(workload.model)
        refuse_without_logits(workload, kinds, self.name())

        def loss(batch: Batch, _: Any) -> Tensor:
            wanted = logits_among(teacher(batch), kinds)
            refuse_broken(wanted, self.name())
            found = logits_among(outputs(call(model, batch)), kinds)
            return torch.stack([self._term(s, t) for s, t in zip(found, wanted, strict=True)]).mean()

        return Lesson(loss, "hard")

    def _term(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_shapes(student, teacher, self.name())
        return hard_loss(student, teacher)
