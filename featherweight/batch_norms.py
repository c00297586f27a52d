"""Batch norms while a network is trained: which statistics they normalise by, and which they keep.

Where several processes train together, each with its share of every batch, statistics are those of the whole batch, so
that the course is the one of a single process (Peng et al. 2018, arXiv:1711.07240, section 3.3). torch's own such norm
runs on GPUs alone. The steps of training are `training`'s affair.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, Self

import torch
from torch import Tensor, nn

from featherweight.processes import Processes, Share
from featherweight.surgery import BATCH_NORMS, matches
from featherweight.workload import Batch, tensors

WHOLE_BATCH = 16  # examples below which batch statistics are too rough to normalise by
AVERAGED = 10  # batches at least, and an eighth of all, whose statistics the batch norms keep


class Norms:
    """The batch norms with running statistics among `layers`, and those without parameters of their own.

    They keep the mean of the statistics of the last batches, when weights hardly move any more: a moving average
    would rest on ten batches or so. Source: Wu and Johnson 2021, arXiv:2105.07576, section 3.
    """

    def __init__(self, model: nn.Module, layers: set[str], steps: int, together: Processes) -> None:
        self._momenta = {
            module: module.momentum
            for name, module in model.named_modules()
            if isinstance(module, BATCH_NORMS)
            and module.track_running_stats
            and (name in layers or module.weight is None)
        }
        self._first_kept = steps - max(AVERAGED, steps // 8)
        self._averaging = False
        self._together = together

    def expect(self, number: int, share: Share) -> None:
        """The batch of a step comes; the statistics of the last ones are kept."""
        whole = share.examples >= WHOLE_BATCH
        begins = whole and number >= self._first_kept and not self._averaging
        for norm in self._momenta:
            norm.train(whole)
            if begins:
                norm.reset_running_stats()
                norm.momentum = None  # torch's word for the mean of all batches since
            if self._together.count > 1:
                vars(norm)["forward"] = functools.partial(_normalised, norm, together=self._together, share=share)
        self._averaging = self._averaging or begins

    def statistics(self) -> list[Tensor]:
        """All that they keep."""
        return [buffer for norm in self._momenta for buffer in norm.buffers()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves momentum and forward as they were."""
        for norm, momentum in self._momenta.items():
            norm.momentum = momentum
            vars(norm).pop("forward", None)


def as_in_training(model: nn.Module, batch: Batch, where: str) -> nn.Module:
    """A copy of `model` that computes what it will in training, where batch norms normalise by the batch itself.

    Those of a network that lost channels have statistics that are wrong, and what it returns then tells nothing.
    """
    copied = copy.deepcopy(model)
    for name, module in copied.named_modules():
        if isinstance(module, BATCH_NORMS) and (module.weight is None or matches(name, where)):
            module.train(tensors(batch)[0].shape[0] >= WHOLE_BATCH)
    return copied


def _normalised(norm: Any, x: Tensor, together: Processes, share: Share) -> Tensor:
    """What `norm` makes of a share of a batch, (examples, channels, ...), by the statistics of the whole batch."""
    if not norm.training:
        return type(norm).forward(norm, x)
    along, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    values = x.float()
    mean = together.sum(share.part * values.mean(along))
    centred = values - mean.view(shape)
    variance = together.sum(share.part * centred.square().mean(along))
    with torch.no_grad():
        count = round(values.numel() / (values.shape[1] * share.part))
        norm.num_batches_tracked += 1
        momentum = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        norm.running_mean += momentum * (mean - norm.running_mean)
        norm.running_var += momentum * (variance * count / (count - 1) - norm.running_var)
    found = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.weight is not None:
        found = found * norm.weight.view(shape) + norm.bias.view(shape)
    return found.to(x.dtype)
