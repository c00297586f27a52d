"""Distillation of reasons: the compressed network also reads its answers from where the original reads them.

    L = L_soft + λ · mean over examples of  1 − cos(a_s, a_t),     a = ∂z_k / ∂x   or   x ⊙ ∂z_k / ∂x

with z_k the logit of the teacher's most likely class k, in the student for a_s and in the teacher for a_t, and x the
input. A network can keep its accuracy through compression and yet decide by other pixels or words, which matters where
people look at saliency maps. Where inputs are whole numbers, as those of words are, x is what the first layer makes of
them, and a has one value for each position: the norm of ∂z_k / ∂x over features, or the sum of x ⊙ ∂z_k / ∂x there.
L_soft is the loss of `distill_soft`.

The gradient of a gradient is needed, so a step takes three to four times as long as one of `distill_soft`. Attention is
computed without its fused kernel meanwhile, which has none. Rounded weights and activations pass gradients straight
through in both. Left out: outputs that are no logits; operators without a second gradient are refused.

Source: Park, Yang, Hwang, Yang 2020, arXiv:2010.15054, section 3, whose squared distance of normalised maps is twice
1 − cos and which takes maps of inner layers; gradients of inputs: Srinivas and Fleuret 2018, arXiv:1803.00443; times
the input: Shrikumar et al. 2016, arXiv:1605.01713.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from featherweight.errors import LayerError
from featherweight.hooks import (
    channel_dim,
    returned_inside,
    watch_outputs,
)
from featherweight.losses import Comparison, kinds_of, logits_among, refuse_without_logits
from featherweight.passes._distillation import Distillation, Lesson
from featherweight.settings import Choice, Range
from featherweight.workload import Batch, Workload, call, like, outputs, tensors

SMALLEST = 1e-12  # squared norm below which an attribution is nothing

# ------------------------------------------------------------------------------------------------ mathematics


def top_logits(
    logits: Float[Tensor, "*positions classes"], teacher: Float[Tensor, "*positions classes"]
) -> Float[Tensor, ""]:
    """The sum, over all examples and positions, of the logits of the teacher's most likely classes.

    >>> top_logits(torch.tensor([[5.0, 7.0]]), teacher=torch.tensor([[1.0, 0.0]])).item()
    5.0
    """
    return logits.gather(-1, teacher.argmax(-1, keepdim=True)).sum()


def attribution(
    values: Float[Tensor, n * rest], gradient: Float[Tensor, n * rest], kind: str, dim: int | None
) -> Float[Tensor, "n parts"]:
    """How much each part of `values` counts: its gradient, or that times the value.

    Args:
        values: the input, or what a layer made of it.
        gradient: of the logits with respect to it.
        kind: "gradient" or "gradient_x_input".
        dim: of features, over which norms ("gradient") or sums are taken; None for each value by itself.

    >>> x, gradient = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]])
    >>> attribution(x, gradient, "gradient", dim=2), attribution(x, gradient, "gradient_x_input", dim=2)
    (tensor([[5.]]), tensor([[11.]]))
    """
    if kind == "gradient_x_input":
        products = values * gradient
        return (products if dim is None else products.sum(dim)).flatten(1)
    # The square root of zero has no gradient that is a number.
    return (gradient if dim is None else (gradient.square().sum(dim) + SMALLEST).sqrt()).flatten(1)


def drift(student: Float[Tensor, "n parts"], teacher: Float[Tensor, "n parts"]) -> Float[Tensor, ""]:
    """1 − cos of the two attributions, averaged over examples.

    >>> round(drift(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[5.0, 0.0], [3.0, 0.0]])).item(), 4)
    0.5
    """
    return 1 - F.cosine_similarity(student, teacher, dim=1, eps=SMALLEST).mean()


# ------------------------------------------------------------------------------------------------ the pass


@dataclass(frozen=True)
class _Reader:
    """Finds what a network's answers hang on.

    Args:
        kinds: of the outputs, as `losses.kinds_of` gives them.
        kind: of the attribution.
        layer: whose outputs stand for inputs that are whole numbers; "" where inputs are floats.
        dim: of the features in these outputs; None where inputs are floats.
    """

    kinds: tuple[str, ...]
    kind: str
    layer: str
    dim: int | None

    def read(
        self, model: nn.Module, batch: Batch, wanted: Sequence[Tensor] | None, again: bool
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The outputs of `model`, and its attributions to the classes that `wanted`, or else it itself, finds likely.

        Args:
            model: teacher or student.
            batch: which it reads.
            wanted: the teacher's outputs.
            again: whether the attributions are to be differentiated once more.
        """
        leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in tensors(batch)]
        with torch.enable_grad(), watch_outputs(model, [self.layer] if self.layer else []) as inside:
            # The network reads copies: a leaf cannot be changed in place.
            answer = outputs(call(model, like(batch, [x.clone() if x.requires_grad else x for x in leaves])))
            values = [inside[self.layer]] if self.layer else [x for x in leaves if x.requires_grad]
            found, likely = (logits_among(a, self.kinds) for a in (answer, wanted or answer))
            total = torch.stack([top_logits(s, t) for s, t in zip(found, likely, strict=True)]).sum()
            gradients = gradients_of(total, values, again)
        parts = [attribution(x, g, self.kind, self.dim) for x, g in zip(values, gradients, strict=True)]
        return answer, torch.cat(parts, dim=1)


@dataclass(frozen=True, kw_only=True)
class DistillAttribution(Distillation):
    """Trains the compressed network towards the outputs of the original, and towards its reasons for them.

    Args:
        temperature: softens the distributions of the outputs.
        kind: of attribution: "gradient" (which inputs would change the answer) or "gradient_x_input" (which made it).
        weight: of the attributions in the loss, where the outputs have 1.
    """

    temperature: Annotated[float, Range(0.5, 20.0)] = 2.0
    kind: Annotated[str, Choice("gradient", "gradient_x_input")] = "gradient"
    weight: Annotated[float, Range(0.0, 1000.0)] = 10.0

    def lesson(self, model: nn.Module, workload: Workload) -> Lesson:
        comparison = Comparison(self.name(), kinds_of(workload), self.temperature)
        refuse_without_logits(workload, comparison.kinds, self.name())
        reader = self._reader(model, workload, comparison.kinds)

        def loss(batch: Batch, _: Any) -> Tensor:
            wanted, reasons = reader.read(workload.model, batch, None, again=False)
            wanted = tuple(output.detach() for output in wanted)
            found, own_reasons = reader.read(model, batch, wanted, again=True)
            return comparison.loss(found, wanted) + self.weight * drift(own_reasons, reasons.detach())

        return Lesson(loss, f"{comparison}, {self.kind} of {reader.layer or 'the inputs'}")

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        with differentiable_twice(self.name()):
            return super().apply(model, workload)

    def _reader(self, model: nn.Module, workload: Workload, kinds: tuple[str, ...]) -> _Reader:
        batch = workload.calibration[0]
        if any(x.is_floating_point() for x in tensors(batch)):
            return _Reader(kinds, self.kind, "", None)
        size, compressed = tensors(batch)[0].shape[0], returned_inside(model, batch)
        for name, value in returned_inside(workload.model, batch).items():
            if value.dim() > 1 and value.shape[0] == size and name in compressed:
                return _Reader(kinds, self.kind, name, channel_dim(workload.model.get_submodule(name), value))
        raise LayerError(
            f"{self.name()}: the inputs are whole numbers, which have no gradients, and no layer of "
            f"{type(workload.model).__name__} that is left in the compressed network turns them into floats, one row "
            "for each example. Read them through an nn.Embedding, or take distill_soft instead."
        )


def gradients_of(total: Tensor, values: Sequence[Tensor], again: bool) -> list[Tensor]:
    """The gradients of `total` with respect to `values`, themselves differentiable where `again`.

    Raises:
        LayerError: none of the values makes a difference to it.
    """
    found = torch.autograd.grad(total, values, create_graph=again, allow_unused=True) if total.requires_grad else [None]
    if all(gradient is None for gradient in found):
        raise LayerError(
            "distill_attribution asks what the answers hang on, but they do not depend on the model's inputs in a "
            "way that has a gradient: its forward cuts them off, with detach, no_grad or rounding. Take that out of "
            "it, or take distill_soft instead."
        )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(values, found, strict=True)]


@contextmanager
def differentiable_twice(step: str) -> Iterator[None]:
    """Inside the block attention is computed in a way that has a second gradient; what else has none is named.

    Raises:
        LayerError: an operator has no second gradient.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        if not any(words in first for words in ("derivative for", "differentiate twice", "double backward")):
            raise
        raise LayerError(
            f"{step} needs gradients of gradients, and an operator of the network has none: {first} "
            "Take distill_soft or distill_features, which do without."
        ) from error
