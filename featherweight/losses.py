"""What the answers of a student are compared by, for passes that teach a network to answer as another does.

What a pass compares besides answers is its own affair, how the network is trained `training`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from featherweight.errors import LayerError, WorkloadError
from featherweight.hooks import (
    returned_by,
)
from featherweight.workload import Workload

SQUASHING = (nn.Tanh, nn.Sigmoid, nn.Softmax, nn.ReLU, nn.GELU, nn.SiLU)
IGNORED = -100  # torch's word for a position without a label

# ------------------------------------------------------------------------------------------------ mathematics


def soft_loss(
    student: Float[Tensor, "*positions classes"], teacher: Float[Tensor, "*positions classes"], temperature: float
) -> Float[Tensor, ""]:
    """T² · KL(teacher ‖ student) of the softened distributions over the last dimension, averaged over the others.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.

    >>> soft_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), temperature=4.0).item()
    0.0
    """
    p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()


def label_loss(logits: Float[Tensor, "*positions classes"], labels: Integer[Tensor, "*positions"]) -> Float[Tensor, ""]:
    """The cross-entropy −log q_label, averaged over the positions whose label is not −100.

    >>> round(label_loss(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([1, -100])).item(), 4)
    0.6931
    """
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


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


# ------------------------------------------------------------------------------------------------ networks


def kinds_of(workload: Workload, kind: str = "auto") -> tuple[str, ...]:
    """By output of the model: "kl" where it is logits, "mse" where it is not, "" where it is whole numbers.

    Args:
        workload: its model is asked about the first calibration batch.
        kind: of all floating outputs, or "auto" for what each looks like.
    """

    def kind_of_one(output: Tensor, source: nn.Module | None) -> str:
        if not output.is_floating_point():
            return ""
        return kind if kind != "auto" else "kl" if looks_like_logits(output, source) else "mse"

    return tuple(kind_of_one(*found) for found in returned_by(workload.model, workload.calibration[0]))


@dataclass(frozen=True)
class Comparison:
    """How the answers of student and teacher are compared, output by output.

    Args:
        step: the name of the pass, for messages.
        kinds: of the outputs, as `kinds_of` gives them.
        temperature: of `soft_loss`.
    """

    step: str
    kinds: tuple[str, ...]
    temperature: float

    def __str__(self) -> str:
        """`kl and mse`: the kinds that there are."""
        return " and ".join(dict.fromkeys(kind for kind in self.kinds if kind))

    def loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Float[Tensor, ""]:
        """The mean over the floating outputs: `soft_loss` for logits, `relative_error` for others.

        Raises:
            LayerError: shapes differ.
            WorkloadError: there are no floating outputs, or the teacher's are NaN or infinite.
        """
        terms = [self._term(s, t, kind) for s, t, kind in zip(student, teacher, self.kinds, strict=True) if kind]
        if not terms:
            raise WorkloadError(
                f"{self.step} has nothing to compare: the model's {len(teacher)} outputs are whole numbers. "
                "Return logits or other floats from its forward, beside or instead of them."
            )
        value = torch.stack(terms).mean()
        if not value.isfinite():
            refuse_broken(teacher, self.step)
        return value

    def _term(self, student: Tensor, teacher: Tensor, kind: str) -> Tensor:
        check_shapes(student, teacher, self.step)
        return soft_loss(student, teacher, self.temperature) if kind == "kl" else relative_error(student, teacher)


def check_shapes(student: Tensor, teacher: Tensor, step: str) -> None:
    """Raises a LayerError where the two outputs differ in shape."""
    if student.shape != teacher.shape:
        raise LayerError(
            f"{step} compares outputs, but the compressed model returns {tuple(student.shape)} where the "
            f"original returns {tuple(teacher.shape)}: an earlier step changed the shape. Exclude the last layer "
            "from that step with where."
        )


def refuse_broken(teacher: Sequence[Tensor], step: str) -> None:
    """Raises a WorkloadError where one of the teacher's outputs is NaN or infinite."""
    if not all(bool(t.isfinite().all()) for t in teacher):
        raise WorkloadError(
            f"{step}: for one of the training batches the original model itself returned NaN or infinity, "
            "so there is nothing to learn. Look for such values in them."
        )


def logits_among(answer: Sequence[Tensor], kinds: Sequence[str]) -> list[Tensor]:
    """The outputs that are logits."""
    return [output for output, kind in zip(answer, kinds, strict=True) if kind == "kl"]


def refuse_without_logits(workload: Workload, kinds: Sequence[str], step: str) -> None:
    """Raises a WorkloadError where none of the model's outputs is logits, which `step` needs."""
    if "kl" in kinds:
        return
    with torch.no_grad():
        found = [output for output, _ in returned_by(workload.model, workload.calibration[0])]
    told = ", ".join(f"{tuple(t.shape)} of {str(t.dtype).removeprefix('torch.')}" for t in found)
    raise WorkloadError(
        f"{step} needs logits of classes in the last dimension, but the model returns {told}, which are none: "
        "they have another shape, or are probabilities, unit vectors, or what a norm or a squashing function returned. "
        "Return logits from its forward, or take distill_soft, which compares other outputs too."
    )


def checked_labels(target: Any, logits: Tensor, step: str) -> Tensor:
    """`target` as the labels of `logits`.

    Raises:
        WorkloadError: it is no tensor of whole numbers, of another shape, or names classes that there are not.
    """
    shape, classes = tuple(logits.shape[:-1]), logits.shape[-1]
    if target is None:
        problem = "yields batches without targets"
    elif not isinstance(target, Tensor):
        problem = f"yields targets of type {type(target).__name__}"
    elif target.is_floating_point() or target.dtype == torch.bool:
        problem = f"yields targets of {str(target.dtype).removeprefix('torch.')}"
    elif tuple(target.shape) != shape:
        problem = f"yields targets of shape {tuple(target.shape)} for logits {tuple(logits.shape)}"
    elif bool(((target != IGNORED) & ((target < 0) | (target >= classes))).any()):
        problem = f"yields targets from {int(target.min())} to {int(target.max())} for {classes} classes"
    else:
        return target
    raise WorkloadError(
        f"{step}: alpha asks for the true labels, but train {problem}. Yield pairs (batch, target) whose target is a "
        f"tensor {shape} of whole numbers from 0 to {classes - 1} ({IGNORED} where there is no label), or set alpha: 0."
    )
