"""Distillation of inner layers: the compressed network also computes on its way what the original computes there.

    L = L_soft + λ · mean over layers l of  ‖φ(s_l) − φ(t_l)‖² / ‖φ(t_l) − mean φ(t_l)‖²

with s_l and t_l what layer l returns in the student and in the teacher, and φ one of

    values      φ(s) = W s,  φ(t) = t;   W: identity, or where widths differ learnt along, over the channels
    attention   φ(a) = Q / ‖Q‖,  Q = Σ_c a_c²  at each position, of each example
    relations   φ(a) = G / ‖G‖ by rows,  G = A Aᵀ,  A: one row of all values for each example

so that layers of a network that lost channels can be compared too. W begins as the least-squares fit on the first
calibration batch and is thrown away afterwards. Each term is relative to what guessing its mean would give, which the
sources have not, so that one λ suits all layers. L_soft is the loss of `distill_soft`. A deep network whose middle is
broken gets a gradient there directly, instead of through all that follows. Attention and relations leave open what the
values are: they are for students that are quite unlike the teacher, and mend a broken network less well.

In a list that lost some of its blocks, each that is left learns to return what the original's last block before the
next one that is left returned, so that it does the work of those between; the last learns what the original's last one
returned.

Left out: layers inside such blocks; layers into which a batch norm was folded, which return something else than before;
and the order in which the sources train (layers first, outputs later): here all is trained at once.

Source: values: Romero et al. 2015, arXiv:1412.6550, equation 3; attention: Zagoruyko and Komodakis 2017,
arXiv:1612.03928, equation 2; relations: Tung and Mori 2019, arXiv:1907.09682, equations 1 to 4.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from featherweight.batch_norms import as_in_training
from featherweight.errors import LayerError
from featherweight.hooks import channel_dim, returned_inside, returning_outputs, watch_outputs
from featherweight.losses import Comparison, kinds_of, relative_error
from featherweight.passes._distillation import Distillation, Lesson
from featherweight.settings import Choice, Range
from featherweight.surgery import counterparts, landmarks, left, matches, unlike
from featherweight.workload import Batch, Workload, call, outputs

RIDGE = 1e-4  # of the mean square of a student's channel, so that the fit has one solution

# ------------------------------------------------------------------------------------------------ mathematics


def projected(values: Float[Tensor, "*shape"], weight: Float[Tensor, "wide narrow"], dim: int) -> Float[Tensor, "*_"]:
    """`values` with its `narrow` channels in dimension `dim` turned into `wide` ones, at each position alike.

    >>> projected(torch.ones(1, 2, 5), torch.ones(3, 2), dim=1).shape
    torch.Size([1, 3, 5])
    """
    return (values.movedim(dim, -1) @ weight.T).movedim(-1, dim)


def least_squares(
    student: Float[Tensor, "*narrower"], teacher: Float[Tensor, "*wider"], dim: int
) -> Float[Tensor, "wide narrow"]:
    """The weight with which `projected` student values come closest to the teacher's.

    >>> teacher = torch.randn(50, 3)
    >>> torch.allclose(least_squares(teacher[:, :2], teacher, dim=1)[:2], torch.eye(2), atol=1e-3)
    True
    """
    s, t = (x.movedim(dim, -1).flatten(0, -2).double() for x in (student, teacher))
    gram = s.T @ s
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-30)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), s.T @ t).T.to(student.dtype)


def attention(values: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "n positions"]:
    """The squares of `values` summed over the channels in dimension `dim`, each example's divided by its norm.

    >>> attention(torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]), dim=1)
    tensor([[0.9138, 0.4061]])
    """
    return F.normalize(values.square().sum(dim).flatten(1), dim=1)


def relations(values: Float[Tensor, n * rest]) -> Float[Tensor, "n n"]:
    """How alike the examples of a batch are: products of all that was returned for them, each row over its norm.

    >>> relations(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor([[1., 0.],
            [0., 1.]])
    """
    rows = values.flatten(1)
    return F.normalize(rows @ rows.T, dim=1)


# ------------------------------------------------------------------------------------------------ the pass


@dataclass(frozen=True)
class _Pair:
    """One layer in both networks.

    Args:
        teacher: its name in the original.
        dim: of its channels.
        weight: of the projection; None where widths agree or do not matter.
    """

    teacher: str
    dim: int
    weight: nn.Parameter | None = None

    def error(self, kind: str, student: Tensor, teacher: Tensor) -> Tensor:
        student = student.to(teacher.dtype)  # it may compute in bfloat16
        if kind == "attention":
            return relative_error(attention(student, self.dim), attention(teacher, self.dim))
        if kind == "relations":
            return relative_error(relations(student), relations(teacher))
        same = student if self.weight is None else projected(student, self.weight, self.dim)
        return relative_error(same, teacher)


@dataclass(frozen=True, kw_only=True)
class DistillFeatures(Distillation):
    """Trains the compressed network towards the outputs of the original and of its inner layers.

    Args:
        temperature: softens the distributions of outputs that are logits.
        layers: whose outputs are compared, by their names in the compressed network: names with `*`, as in where;
            "auto" takes the blocks of lists of alike blocks, or else the smallest parts that are made of layers, or
            else all layers with weights.
        kind: what is compared of them: "values", "attention" (where in a picture or sentence they are large) or
            "relations" (which examples of a batch they take for alike).
        weight: of the inner layers in the loss, where the outputs have 1.
    """

    temperature: Annotated[float, Range(0.5, 20.0)] = 2.0
    layers: str = "auto"
    kind: Annotated[str, Choice("values", "attention", "relations")] = "values"
    weight: Annotated[float, Range(0.0, 1000.0)] = 10.0

    def lesson(self, model: nn.Module, workload: Workload) -> Lesson:
        teacher, pairs = workload.model, self._pairs(model, workload)
        theirs = [pair.teacher for pair in pairs.values()]
        comparison = Comparison(self.name(), kinds_of(workload), self.temperature)

        def loss(batch: Batch, _: Any) -> Tensor:
            with torch.no_grad():
                wanted, wanted_inside = watched(teacher, theirs, batch)
            found, inside = watched(model, pairs, batch)
            terms = [pair.error(self.kind, inside[name], wanted_inside[pair.teacher]) for name, pair in pairs.items()]
            return comparison.loss(found, wanted) + self.weight * torch.stack(terms).mean()

        projections = [pair.weight for pair in pairs.values() if pair.weight is not None]
        return Lesson(loss, f"{comparison}, {self.kind} of {listed(list(pairs), 3)}", projections)

    def _pairs(self, model: nn.Module, workload: Workload) -> dict[str, _Pair]:
        """The layers that are compared, by name; of those that cannot be it is said why."""
        wanted = returned_inside(workload.model, workload.example)
        found = returned_inside(model, workload.example)
        shifted = counterparts(model, workload.model)
        chosen = self._chosen(workload, wanted, {name: shifted.get(name, name) for name in found})
        reasons = unlike(model, workload.model, workload.example)
        pairs: dict[str, _Pair] = {}
        for name, theirs in chosen.items():
            dim = channel_dim(workload.model.get_submodule(theirs), wanted[theirs])
            if why := reasons.get(theirs) or mismatch(found[name], wanted[theirs], dim, self.kind):
                reasons[name] = why
                left(name, f"not compared: {why}")
            else:
                pairs[name] = _Pair(theirs, dim)
        if not pairs:
            told = "; ".join(f"{name}: {reasons[name]}" for name in list(chosen)[:3])
            raise LayerError(
                f"{self.name()} with layers={self.layers!r} and kind={self.kind!r} finds no layer that it can compare. "
                f"{told}. Choose others with layers, another kind, or distill_soft, which compares outputs alone."
            )
        return self._fitted(pairs, model, workload) if self.kind == "values" else pairs

    def _chosen(self, workload: Workload, wanted: Mapping[str, Tensor], theirs: Mapping[str, str]) -> dict[str, str]:
        """What `layers` chooses among layers that return floats in both networks, with their names in the original."""
        both = {own: name for own, name in theirs.items() if name in wanted and wanted[name].dim() > 1}
        if self.layers == "auto":
            marks = set(landmarks(workload.model)) - returning_outputs(workload.model, workload.example)
            chosen = {own: name for own, name in both.items() if name in marks}
        else:
            chosen = {own: name for own, name in both.items() if matches(own, self.layers)}
        if not chosen:
            raise LayerError(
                f"layers={self.layers!r} matches none of the {len(both)} inner layers of "
                f"{type(workload.model).__name__} that return floats here and in the compressed network. "
                + (f"They are: {listed(list(both), 20)}." if both else "There are none: take distill_soft instead.")
            )
        return chosen

    def _fitted(self, pairs: Mapping[str, _Pair], model: nn.Module, workload: Workload) -> dict[str, _Pair]:
        """`pairs` with projections where widths differ, as least squares find them on the first calibration batch."""
        batch = workload.calibration[0]
        with torch.no_grad():
            _, wanted = watched(workload.model, [pair.teacher for pair in pairs.values()], batch)
            _, found = watched(as_in_training(model, batch, self.where), pairs, batch)
        fitted = {}
        for name, pair in pairs.items():
            s, t, dim = found[name], wanted[pair.teacher], pair.dim
            same = s.shape[dim] == t.shape[dim]
            fitted[name] = pair if same else replace(pair, weight=nn.Parameter(least_squares(s, t, dim)))
        return fitted


def listed(names: Sequence[str], most: int) -> str:
    """The first names.

    >>> listed(["a", "b", "c", "d"], most=3)
    'a, b, c and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def watched(model: nn.Module, names: Collection[str], batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What the network returns for `batch`, and what the named layers do."""
    with watch_outputs(model, names) as inside:
        return outputs(call(model, batch)), inside


def mismatch(student: Tensor, teacher: Tensor, dim: int, kind: str) -> str:
    """Why the two outputs of a layer cannot be compared; "" where they can.

    >>> mismatch(torch.ones(2, 3, 8), torch.ones(2, 4, 8), dim=1, kind="values")
    ''
    >>> mismatch(torch.ones(2, 3, 8), torch.ones(2, 4, 8), dim=2, kind="values")
    'it returns (2, 3, 8), in the original (2, 4, 8): more than widths differ'
    >>> mismatch(torch.ones(2, 3), torch.ones(2, 3), dim=1, kind="attention")
    'it returns (2, 3), which has no positions to attend to'
    """
    differing = [i for i, (a, b) in enumerate(zip(student.shape, teacher.shape, strict=False)) if a != b]
    other = f"it returns {tuple(student.shape)}, in the original {tuple(teacher.shape)}: more than widths differ"
    if student.dim() != teacher.dim() or 0 in differing:
        return other
    if kind == "values" and set(differing) - {dim}:
        return other  # other positions, say, which no projection of widths makes the same
    if kind == "attention":
        if student.dim() < 3:
            return f"it returns {tuple(student.shape)}, which has no positions to attend to"
        return other if set(differing) - {dim} else ""
    return ""
