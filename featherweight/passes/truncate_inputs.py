"""Reads only one end of sequences: y = f(x₁ … x_k), k = (1 − share) · length, rounded.

Sequences of one length are mostly padding, and what is furthest from the end where they begin is in few of them; but
a network computes every position, so positions that go save time in proportion, in every layer. Inputs keep their
shape: the network cuts them itself, so files are fed as before. Whether the first or the last k positions are kept is
decided by the damage that each does to the outputs on calibration data. Networks that return something for each
position are refused, for they would return less.

Source: Sun, Qiu, Xu, Huang 2019, arXiv:1905.05583, section 5.3, for keeping the head or the tail of long texts; the
share plays the part of the resolution multiplier of Howard et al. 2017, arXiv:1704.04861, section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from jaxtyping import Shaped
from torch import Tensor, nn

from featherweight.damage import damage, examples_to_compare, first_examples, floating_outputs
from featherweight.errors import LayerError
from featherweight.passes import Pass
from featherweight.settings import Range
from featherweight.surgery import done, matches
from featherweight.workload import Batch, Workload, input_names, tensors

# ------------------------------------------------------------------------------------------- functions on tensors


def truncated(x: Shaped[Tensor, "n length *rest"], kept: int, head: bool) -> Shaped[Tensor, "n kept *rest"]:
    """The first or the last `kept` positions.

    >>> import torch
    >>> truncated(torch.arange(8).view(2, 4), 3, head=True).tolist()
    [[0, 1, 2], [4, 5, 6]]
    >>> truncated(torch.arange(8).view(2, 4), 3, head=False).tolist()
    [[1, 2, 3], [5, 6, 7]]
    """
    return x[:, :kept] if head else x[:, -kept:]


# ------------------------------------------------------------------------------------------------ the pass


@dataclass(frozen=True)
class Cut:
    """What a network does with its inputs before its forward: those of `length` positions are cut to `kept`.

    A hook on the network itself, not a module round it, so that layers keep their names.
    """

    length: int
    kept: int
    head: bool

    def __call__(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        return tuple(map(self.of, args)), {name: self.of(value) for name, value in named.items()}

    def of(self, value: Any) -> Any:
        """`value`, cut where it is a sequence."""
        is_sequence = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == self.length
        return truncated(value, self.kept, self.head) if is_sequence else value


@dataclass(frozen=True, kw_only=True)
class TruncateInputs(Pass):
    """Cuts all inputs that are as long as the token ids; `where` has to choose one input that holds such ids.

    Args:
        share: of the positions that are no longer read.
    """

    share: Annotated[float, Range(0.0, 0.9)] = 0.25

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        batch = examples_to_compare(model, workload, self.name())
        lengths = sequence_lengths(model, workload.start, batch)
        names = [name for name in lengths if matches(name, self.where)]
        if not names:
            raise LayerError(
                f"where={self.where!r} chooses no input of {type(model).__name__} that is a sequence: whole numbers of "
                f"shape (n, length). There are: {', '.join(input_names(workload.start, batch))}. Leave this step out."
            )
        length = lengths[names[0]]
        kept = max(1, round((1 - self.share) * length))
        wanted = floating_outputs(model, batch, self.name())
        tried = {
            cut: _damage_of(cut, model, batch, wanted) for cut in (Cut(length, kept, True), Cut(length, kept, False))
        }
        possible = {cut: lost for cut, lost in tried.items() if isinstance(lost, float)}
        if kept == length or not possible:
            why = (
                f"share={self.share} of {length} is none"
                if kept == length
                else f"cut, the network {next(iter(tried.values()))}"
            )
            raise LayerError(
                f"Nothing can be cut from {names[0]}: {why}. Leave this step out, or choose another share."
            )
        cut = min(possible, key=lambda way: possible[way])
        model.register_forward_pre_hook(cut, with_kwargs=True)
        inputs = ", ".join(name for name, size in lengths.items() if size == length)
        done("", f"reads the {'first' if cut.head else 'last'} {kept} of {length} positions of {inputs}")
        return model


def truncatable(model: nn.Module, workload: Workload) -> bool:
    """Whether the network reads sequences and returns the like where half of each is gone."""
    batch = first_examples(workload.calibration, 2)  # it either runs or it does not
    lengths = list(sequence_lengths(model, workload.start, batch).values())
    if not lengths:
        return False
    half = Cut(lengths[0], max(1, lengths[0] // 2), head=True)
    return isinstance(_damage_of(half, model, batch, floating_outputs(model, batch, "truncate_inputs")), float)


def sequence_lengths(model: nn.Module, start: nn.Module, batch: Batch) -> dict[str, int]:
    """By input of whole numbers, (n, length): how many of its positions the network reads."""
    found = {}
    for name, value in zip(input_names(start, batch), tensors(batch), strict=True):
        if value.dim() == 2 and not value.is_floating_point() and value.shape[1] > 1:
            found[name] = value
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, Cut):
            found = {name: hook.of(value) for name, value in found.items()}
    return {name: int(value.shape[1]) for name, value in found.items()}


def _damage_of(cut: Cut, model: nn.Module, batch: Batch, wanted: list[Tensor]) -> float | str:
    """The damage of a cut, or what the network then does instead of returning the like."""
    handle = model.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        found = floating_outputs(model, batch, "truncate_inputs")
    except Exception as error:  # whatever the user's forward raises: with other lengths it does not run
        return f"raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        handle.remove()
    before, after = ([tuple(value.shape) for value in values] for values in (wanted, found))
    if before != after:
        return f"returns shapes {after} instead of {before}"
    lost = damage(found, wanted)
    return lost if lost == lost else "returns what is no number (NaN)"
