"""Ensembles: several networks that answer as one.

    y = 1/N · Σ_i f_i(x)                          of outputs that are values or probabilities
    y = log( 1/N · Σ_i softmax(f_i(x)) )          of outputs that are logits of classes in the last dimension

Of a classifier the probabilities are averaged, not the logits: the mean of logits is a geometric mean, in which one
network that is wrongly sure of itself outvotes others that are right. What comes out are logits again, with
softmax(y) the mean of the probabilities, so that whatever reads the logits of one network reads those of several.

An ensemble is a network like any other: `score` may be given it, and a `Workload` may have it as its `model`, which
then teaches a `student` by distillation. Members that are artifacts have no inner layers and no gradients.

Source: Lakshminarayanan, Pritzel, Blundell 2017, arXiv:1612.01474, section 2.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.artifact import Artifact
from featherweight.errors import WorkloadError
from featherweight.workload import outputs


def mean_logits(logits: Float[Tensor, "members *positions classes"]) -> Float[Tensor, "*positions classes"]:
    """The logits whose probabilities are the mean of those of all members.

    >>> sure, unsure = [0.0, 9.0], [3.0, 0.0]
    >>> mean_logits(torch.tensor([[sure], [unsure], [unsure]])).argmax(-1)  # of the mean of logits it would be 1
    tensor([0])
    """
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


class Ensemble(nn.Module):
    """Several networks that answer as one: the mean over their outputs.

    Args:
        members: artifacts, or networks in eval mode, that read and return the same.
        logits: whether the floating outputs are logits of classes in the last dimension, whose probabilities are
            averaged; else the outputs themselves are.
        threads: of each artifact.

    Raises:
        WorkloadError: there are no members; when called: they return different things, or nothing to average.
    """

    def __init__(self, members: Sequence[Artifact | nn.Module], *, logits: bool, threads: int = 1) -> None:
        super().__init__()
        if not members:
            raise WorkloadError("An Ensemble has no members. Give it artifacts (open_artifact) or networks.")
        self.logits = logits
        self.networks = nn.ModuleList(member for member in members if isinstance(member, nn.Module))
        self._predict = [m.predict(threads) if isinstance(m, Artifact) else m for m in members]
        self.eval()

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        device = next(value.device for value in (*args, *named.values()))  # artifacts answer on the CPU
        answers = [[y.to(device) for y in outputs(predict(*args, **named))] for predict in self._predict]
        forms = [[(value.dtype, tuple(value.shape)) for value in answer] for answer in answers]
        for number, form in enumerate(forms):
            if form != forms[0]:
                raise WorkloadError(
                    f"Member {number} of the ensemble returns {_told(form)}, but member 0 {_told(forms[0])}: they "
                    "cannot be averaged. Take members that were made for one task."
                )
        if not all(value.is_floating_point() for value in answers[0]):
            raise WorkloadError(
                f"The members of the ensemble return {_told(forms[0])}, of which whole numbers have no mean. Let them "
                "return logits or other floats."
            )
        found = [self._mean(torch.stack(values)) for values in zip(*answers, strict=True)]
        return found[0] if len(found) == 1 else tuple(found)

    def _mean(self, values: Tensor) -> Tensor:
        return mean_logits(values) if self.logits else values.mean(0)


def _told(form: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> str:
    return ", ".join(f"{shape} of {str(dtype).removeprefix('torch.')}" for dtype, shape in form)
