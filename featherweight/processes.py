"""Where training runs: on which device, and among how many processes.

Several processes are started with `torchrun` or `accelerate launch`, each of which does the same from the same seed:

    torchrun --nproc-per-node 2 -m featherweight apply recipe.yaml workload.py --out out

Every batch is then cut into shares, one for each process, and gradients are averaged by their sizes, so that all take
the step that one process would take with the whole batch, batch norms included (`batch_norms`). What a loss computes
over a batch, other than a mean over its examples, it computes over the share.

Accelerate finds devices and processes, and passes tensors between them; only one process on a CPU does without it
(`pip install 'featherweight[train]'`). Of it, its state of the processes and two functions are enough, and the loop
stays a loop. Lightning Fabric does as much, but is made to be given network and optimiser, and wraps the forward of the
one; losses here read two networks, inner layers and gradients of gradients.

Distillation was run on a GPU and took the same steps (`benchmarks/accelerator_training.py`, LOG.md); several GPUs were
not at hand. TPUs come with torch_xla, whose last release is for torch 2.9: what it needs was run with that pair and XLA
on a CPU, not on a TPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import TargetError
from featherweight.workload import Batch, like, tensors


@dataclass(frozen=True)
class Processes:
    """This process among all that train together.

    Args:
        number: of this one, from 0.
        count: of all.
        device: on which this one computes.
    """

    number: int
    count: int
    device: torch.device

    def share(self, batch: Batch, target: Any) -> Share:
        """What this process learns from a batch: all of it where there are fewer examples than processes.

        Shares differ by one example at most.

        >>> Processes(1, 2, torch.device("cpu")).share((torch.arange(5),), torch.arange(5))
        Share(batch=(tensor([3, 4]),), target=tensor([3, 4]), examples=5, part=0.4)
        """
        size = tensors(batch)[0].shape[0]
        cut = self.count <= size

        def own(value: Tensor) -> Tensor:
            whole = not cut or value.dim() == 0 or value.shape[0] != size
            return (value if whole else value.tensor_split(self.count)[self.number]).to(self.device)

        values = like(batch, [own(value) for value in tensors(batch)])
        part = tensors(values)[0].shape[0] / size if cut else 1 / self.count
        return Share(values, own(target) if isinstance(target, Tensor) else target, size, part)

    def sum(self, value: Tensor) -> Tensor:
        """Of what the processes hold; gradients pass through."""
        return value if self.count == 1 else _Sum.apply(value)

    def average(self, values: Sequence[Tensor]) -> None:
        """Each of `values` becomes its mean over all processes."""
        if self.count == 1 or not values:
            return
        from accelerate.utils import reduce

        mean = reduce(torch.cat([value.detach().flatten() for value in values]), "mean")
        for value, part in zip(values, mean.split([value.numel() for value in values]), strict=True):
            value.data.copy_(part.view_as(value))

    def agree(self, values: Sequence[Tensor]) -> None:
        """Each of `values` becomes that of the first process."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        for value in values:
            value.data.copy_(broadcast(value.detach().clone()))

    def any(self, here: bool) -> bool:
        """Whether it holds in one of the processes."""
        if self.count == 1:
            return here
        found = torch.tensor([float(here)], device=self.device)
        self.average([found])
        return bool(found.item() > 0)

    def alike(self, count: int) -> bool:
        """Whether `count` is the same in all processes."""
        if self.count == 1:
            return True
        first = torch.tensor([count], device=self.device)
        self.agree([first])
        return not self.any(int(first.item()) != count)

    def variable(self, value: float) -> float | Tensor:
        """`value` in the form in which it may change from step to step: XLA compiles numbers into its programs."""
        return torch.tensor(value, device=self.device) if self.device.type == XLA else value

    def close_step(self) -> None:
        """A step is complete: XLA, which only notes what is to be computed, computes it now."""
        if self.device.type == XLA:
            import torch_xla

            torch_xla.sync()

    def wait(self) -> None:
        """Until all processes have come this far."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


@dataclass(frozen=True)
class Share:
    """What one process learns from a batch.

    Args:
        batch: its examples.
        target: theirs, None where there is none.
        examples: of the whole batch, in all processes.
        part: how much this share counts; those of all processes add up to 1.
    """

    batch: Batch
    target: Any
    examples: int
    part: float


class _Sum(torch.autograd.Function):
    """A sum over processes: each of its terms has the gradient that the sum has, in all of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        from accelerate.utils import reduce

        return reduce(value.detach(), "sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Sum.apply(gradient.contiguous())


XLA = "xla"  # the type of its devices
ALONE = Processes(0, 1, torch.device("cpu"))


def processes() -> Processes:
    """Those that were started together with this one.

    Raises:
        TargetError: there are several, but Accelerate is not installed.
    """
    launched, installed = int(os.environ.get("WORLD_SIZE", "1")), importlib.util.find_spec("accelerate") is not None
    if launched > 1 and not installed:
        raise TargetError(
            f"This is one of {launched} processes (WORLD_SIZE), which cannot train together without accelerate. "
            "Install it with: pip install 'featherweight[train]'."
        )
    accelerator = torch.accelerator.is_available() or importlib.util.find_spec("torch_xla") is not None
    if not installed or (launched == 1 and not accelerator):
        return ALONE
    from accelerate import PartialState

    state = PartialState(cpu=not accelerator)
    device = state.device if accelerator else ALONE.device
    return Processes(state.process_index, state.num_processes, device)


@contextlib.contextmanager
def lying_on(device: torch.device, networks: Iterable[nn.Module], besides: Iterable[Tensor]) -> Iterator[None]:
    """Inside the block all tensors of `networks`, and those `besides`, lie on `device`; then where they lay before."""
    found = [t for network in networks for t in (*network.parameters(), *network.buffers())] + list(besides)
    away = [t for t in {id(t): t for t in found}.values() if t.device != device]
    homes = [(t, _sent(t, device)) for t in away]
    try:
        yield
    finally:
        for tensor, home in homes:
            home.copy_(tensor.detach())
            _put(tensor, home)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves `tensor` in place, and returns what it held."""
    home = tensor.detach()
    _put(tensor, home.to(device, copy=True))
    return home


def _put(tensor: Tensor, value: Tensor) -> None:
    """`tensor` holds what `value` holds, where that lies.

    Tensors of XLA are of another kind within, so that the whole object is exchanged, which weak references forbid:
    recurrent layers have such to their weights.
    """
    if XLA not in (tensor.device.type, value.device.type):
        tensor.data = value
        return
    other = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    try:
        torch.utils.swap_tensors(tensor, other)
    except RuntimeError as error:
        raise TargetError(
            f"A tensor of shape {tuple(tensor.shape)} cannot be moved to or from XLA: {error} Recurrent layers cannot "
            "be trained there: train on another device, where torch_xla is not installed."
        ) from error
