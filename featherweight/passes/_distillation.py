"""What all distillations share: how long they train, how fast, and in what order things are done."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from featherweight.passes import Pass
from featherweight.settings import Choice, Range
from featherweight.training import report, train
from featherweight.workload import Batch, Workload


@dataclass(frozen=True)
class Lesson:
    """What there is to learn.

    Args:
        loss: of one batch and its target, as `training.train` takes it.
        what: it is, in words.
        besides: parameters of the loss itself, which are trained along and then thrown away.
    """

    loss: Callable[[Batch, Any], Tensor]
    what: str
    besides: Sequence[nn.Parameter] = ()


@dataclass(frozen=True, kw_only=True)
class Distillation(Pass):
    """Trains the compressed network, with the original as its teacher.

    Data is `workload.train`, without its targets unless a pass says that it uses them, or else the calibration batches.

    Args:
        epochs: how often the data is seen.
        steps: of the optimiser, at most, in all epochs together; 0 for no bound.
        lr: how far a step moves a tensor, relative to the size of its values.
        precision: of what the student computes; "bfloat16" is faster where a processor has units for it, such as AMX.
    """

    epochs: Annotated[float, Range(0.01, 1000.0)] = 1.0
    steps: Annotated[int, Range(0, 10_000_000)] = 0
    lr: Annotated[float, Range(1e-6, 1.0)] = 0.01
    precision: Annotated[str, Choice("float32", "bfloat16")] = "float32"

    @abstractmethod
    def lesson(self, model: nn.Module, workload: Workload) -> Lesson:
        """What `model`, which is the student, is to learn from `workload.model`."""

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        lesson = self.lesson(model, workload)
        losses, layers = train(
            model,
            workload,
            lesson.loss,
            step=self.name(),
            where=self.where,
            epochs=self.epochs,
            steps=self.steps,
            lr=self.lr,
            precision=self.precision,
            besides=lesson.besides,
        )
        report(layers, losses, lesson.what)
        return model
