"""Which weights are kept: importance turned into masks. What makes a weight important is a pass's affair.

    free      the least important share goes, of a whole tensor or of each row
    2:4, 4:8  of every 4 (8) consecutive weights of a row the 2 (4) most important are kept
    blocks    blocks of 32 × 32 weights go whole, those first whose importance has the smallest norm

Rows are the output channels: a weight is a matrix (out, in · kernel), as `weight.flatten(1)` gives it, where a
convolution's kernel positions of one input channel lie side by side. Importance is never negative, and 0 for weights
that are zero already, so that those go first.

Source: Mishra et al. 2021, arXiv:2104.08378, section 3, for 2:4; Zhou et al. 2021, arXiv:2102.04010, for N:M; Narang,
Undersander, Diamos 2017, arXiv:1711.02782, for blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from featherweight.errors import SettingError
from featherweight.settings import Choice

Pattern = Annotated[str, Choice("free", "2:4", "4:8", "blocks")]
KEPT_OF = {"2:4": (2, 4), "4:8": (4, 8)}
BLOCK = 32
NOTHING_GOES = "its share, rounded down, is nothing"

# ------------------------------------------------------------------------------------------------ masks


def largest(importance: Float[Tensor, "*shape"], share: float) -> Bool[Tensor, "*shape"]:
    """True for all but the `share` of least importance, rounded down to whole weights.

    >>> largest(torch.tensor([[0.1, 3.0], [2.0, 0.2]]), share=0.5)
    tensor([[False,  True],
            [ True, False]])
    """
    return largest_of_rows(importance.reshape(1, -1), share).view(importance.shape)


def largest_of_rows(importance: Float[Tensor, "rows columns"], share: float) -> Bool[Tensor, "rows columns"]:
    """`largest` with a competition in each row: every row loses as many.

    >>> largest_of_rows(torch.tensor([[1.0, 2.0, 3.0], [9.0, 8.0, 7.0]]), share=0.4)
    tensor([[False,  True,  True],
            [ True,  True, False]])
    """
    count = int(share * importance.shape[1])
    doomed = importance.topk(count, dim=1, largest=False, sorted=False).indices
    return torch.ones_like(importance, dtype=torch.bool).scatter_(1, doomed, False)


def largest_of_all(importances: Sequence[Tensor], share: float) -> list[Tensor]:
    """`largest` with all tensors in one competition; one mask for each.

    >>> [kept.tolist() for kept in largest_of_all([torch.tensor([1.0, 2.0]), torch.tensor([9.0, 8.0])], share=0.5)]
    [[False, False], [True, True]]
    """
    if not importances:
        return []
    kept = largest(torch.cat([values.flatten() for values in importances]), share)
    parts = kept.split([values.numel() for values in importances])
    return [part.view(values.shape) for part, values in zip(parts, importances, strict=True)]


def largest_of_each(importance: Float[Tensor, "rows columns"], kept: int, of: int) -> Bool[Tensor, "rows columns"]:
    """True for the `kept` most important of every `of` consecutive weights of a row; `of` must divide the row.

    >>> largest_of_each(torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0]]), kept=2, of=4).int()
    tensor([[1, 1, 0, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    runs = importance.reshape(importance.shape[0], -1, of)
    chosen = runs.topk(kept, dim=2, sorted=False).indices
    return torch.zeros_like(runs, dtype=torch.bool).scatter_(2, chosen, True).view(importance.shape)


def largest_blocks(
    importance: Float[Tensor, "rows columns"], share: float, size: int = BLOCK
) -> Bool[Tensor, "rows columns"]:
    """False for the `share` of blocks of `size` × `size` with the smallest norms, rounded down to whole blocks.

    What is left over at the right and at the bottom, too narrow for a block, stays.

    >>> largest_blocks(torch.tensor([[1.0, 1.0, 5.0], [1.0, 1.0, 5.0], [0.0, 9.0, 5.0]]), share=0.9, size=1).int()
    tensor([[0, 0, 0],
            [0, 0, 0],
            [0, 1, 0]], dtype=torch.int32)
    >>> largest_blocks(torch.tensor([[1.0, 1.0, 4.0, 0.0, 7.0], [1.0, 1.0, 0.0, 0.0, 7.0]]), share=0.5, size=2).int()
    tensor([[0, 0, 1, 1, 1],
            [0, 0, 1, 1, 1]], dtype=torch.int32)
    """
    down, across = (length // size for length in importance.shape)
    blocks = importance[: down * size, : across * size].reshape(down, size, across, size)
    whole = largest(torch.linalg.vector_norm(blocks, dim=(1, 3)), share)
    kept = torch.ones_like(importance, dtype=torch.bool)
    kept[: down * size, : across * size] = whole.repeat_interleave(size, 0).repeat_interleave(size, 1)
    return kept


def choose(
    importance: Float[Tensor, "out in *kernel"], pattern: str, share: float, by_row: bool = False
) -> Bool[Tensor, "out in *kernel"]:
    """Which weights are kept.

    Args:
        importance: of each weight, in the weight's own shape.
        pattern: in which zeros lie; `misfit` tells beforehand whether a weight can have them so.
        share: that goes; N:M patterns give it themselves.
        by_row: whether each row gives its share where the pattern is free; else the whole tensor does.

    >>> choose(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "free", share=0.5, by_row=True)
    tensor([[False,  True],
            [False,  True]])
    """
    matrix = importance.flatten(1)
    if pattern in KEPT_OF:
        kept = largest_of_each(matrix, *KEPT_OF[pattern])
    elif pattern == "blocks":
        kept = largest_blocks(matrix, share)
    else:
        kept = largest_of_rows(matrix, share) if by_row else largest(matrix, share)
    return kept.view(importance.shape)


# ------------------------------------------------------------------------------------------------ what fits


def misfit(shape: Sequence[int], pattern: str) -> str:
    """Why a weight of that shape cannot have zeros in that pattern; empty where it can.

    >>> misfit((16, 3, 3, 3), "2:4")
    'its rows hold 27 weights, which is no multiple of 4'
    >>> misfit((64, 16), "blocks")
    'it is a matrix of 64 by 16, smaller than a block of 32 by 32'
    >>> misfit((64, 16), "2:4")
    ''
    """
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    if pattern in KEPT_OF and columns % KEPT_OF[pattern][1]:
        return f"its rows hold {columns} weights, which is no multiple of {KEPT_OF[pattern][1]}"
    if pattern == "blocks" and min(rows, columns) < BLOCK:
        return f"it is a matrix of {rows} by {columns}, smaller than a block of {BLOCK} by {BLOCK}"
    return ""


def check_share(step: str, pattern: str, share: float) -> None:
    """Raises a SettingError where `pattern` gives a share of its own and `share` is another.

    >>> check_share("prune_wanda", "2:4", 0.7)
    Traceback (most recent call last):
    featherweight.errors.SettingError: prune_wanda: share=0.7 does not go with pattern='2:4', which zeroes 0.5 of the
        weights. Leave share out, or set pattern to 'free' or 'blocks'.
    """
    if pattern in KEPT_OF:
        kept, of = KEPT_OF[pattern]
        if share != 1 - kept / of:
            raise SettingError(
                f"{step}: share={share:g} does not go with pattern={pattern!r}, which zeroes {1 - kept / of:g} of the "
                "weights. Leave share out, or set pattern to 'free' or 'blocks'."
            )
