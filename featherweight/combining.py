"""What several networks return for the same inputs, made one: the mean, a weighted mean, or the majority's vote.

    mean    y = 1/N Σ y_i, or Σ w_i y_i / Σ w_i with weights; of logits or of probabilities, whatever networks return
    vote    the class that most networks choose, or that the heaviest do; a tie goes to the class with the higher mean

Sums are taken in the order of the networks, in double precision, whichever of them is done first: the same outputs give
the same bits. Averaging and voting over networks is Hansen, Salamon 1990 (IEEE TPAMI 12(10), section III). Outputs of
parts of the input are not combined but put side by side, which is `arrays`' affair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featherweight.errors import SettingError

WAYS = ("mean", "vote")


def combined(way: str, outputs: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """One array of what several networks return for the same rows.

    Args:
        way: `mean` or `vote`.
        outputs: one array for each network, all of one shape; for a vote (rows, classes), scores that are higher for
            what is likelier.
        weights: one for each network.

    Returns:
        For `mean` the same shape and dtype; for `vote` the number of the class of each row, as int64.

    >>> a, b, c = np.array([[0.9, 0.1]]), np.array([[0.4, 0.6]]), np.array([[0.3, 0.7]])
    >>> combined("vote", [a, b, c], [1, 1, 1]), combined("vote", [a, b, c], [3, 1, 1])
    (array([1]), array([0]))
    >>> combined("mean", [a, b], [1, 3]).round(3)
    array([[0.525, 0.475]])
    """
    if way == "mean":
        return _mean(outputs, weights).astype(outputs[0].dtype)
    votes = np.zeros(outputs[0].shape)
    for scores, weight in zip(outputs, weights, strict=True):
        votes[np.arange(len(scores)), scores.argmax(axis=1)] += weight
    most = votes == votes.max(axis=1, keepdims=True)
    return np.where(most, _mean(outputs, weights), -np.inf).argmax(axis=1)


def _mean(outputs: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    total = np.zeros(outputs[0].shape)
    for values, weight in zip(outputs, weights, strict=True):
        total += weight * values.astype(np.float64)
    return total / sum(weights)


def check_way(way: str, weights: Sequence[float], networks: int) -> None:
    """Refuses what cannot be combined.

    Raises:
        SettingError: there is no such way, or the weights do not fit.
    """
    if way not in WAYS:
        raise SettingError(f"There is no way {way!r} to combine outputs. There are: {', '.join(WAYS)}.")
    if len(weights) != networks:
        raise SettingError(f"There are {len(weights)} weights for {networks} networks. Give one for each.")
    if not all(0 < weight < float("inf") for weight in weights):
        raise SettingError(
            f"The weights {list(weights)} are not all above zero. Leave a network out that is to count 0."
        )
