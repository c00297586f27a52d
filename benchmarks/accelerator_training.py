"""Distillation on an accelerator beside the same on the CPU: does it take the same steps?

    python benchmarks/accelerator_training.py [--steps 20] [--json out/accelerator_training.json]

On a machine with a GPU that is all. XLA devices want an environment of their own, gigabytes large, for torch_xla, which
speaks to TPUs, ends at torch 2.9, and the torch of that version comes with CUDA:

    python -m venv xla
    xla/bin/pip install torch==2.9.0 torch_xla==2.9.0 accelerate scipy PyYAML safetensors jaxtyping tqdm greenlet
    PYTHONPATH=. PJRT_DEVICE=CPU xla/bin/python benchmarks/accelerator_training.py

With PJRT_DEVICE=TPU that is a test on a TPU, with CPU one of all but the TPU: lazy tensors, networks that move to
another device and back, and XLA's compiler. The network is a small convolutional one with batch norms; a student that
lost channels learns from it what noise is to be answered with.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from featherweight import Workload, processes, training
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_channels import PruneChannels
from featherweight.recipe import seeded


class Network(nn.Module):
    """(n, 3, 16, 16) to (n, 10): three convolutions with batch norms, a residual, an average, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.back = nn.Conv2d(64, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.back(self.inner(x))).mean((2, 3)))


def taught(steps: int, on: processes.Processes) -> tuple[dict[str, Tensor], list[float], float]:
    """The student's tensors, the loss of each step, and seconds."""
    torch.manual_seed(0)
    model = Network().eval()
    batches = [(torch.randn(32, 3, 16, 16),) for _ in range(4)]
    workload = Workload(model, (batches[0][0][:1],), batches, lambda predict: 0.0)
    student = PruneChannels(share=0.3).apply(Network().eval(), workload)
    found: list[list[float]] = []

    def watched(*arguments: object, **keywords: object) -> tuple[list[float], list[str]]:
        losses, layers = train(*arguments, **keywords)  # type: ignore[arg-type]
        found.append(losses)
        return losses, layers

    train, start = training.train, time.perf_counter()
    with (
        mock.patch("featherweight.training.processes", return_value=on),
        mock.patch("featherweight.passes._distillation.train", watched),
        seeded(0),
    ):
        student = DistillSoft(steps=steps, epochs=float(steps)).apply(student, workload)
    assert all(tensor.device.type == "cpu" for tensor in student.state_dict().values()), "something did not come back"
    return student.state_dict(), found[0], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, default=Path("out/accelerator_training.json"))
    arguments = parser.parse_args()
    there = processes.processes()
    if there.device.type == "cpu":
        raise SystemExit("There is no accelerator here: see the introduction of this file.")
    here = taught(arguments.steps, processes.ALONE)
    away = taught(arguments.steps, there)
    apart = {
        name: float((away[0][name] - value).norm() / value.norm().clamp(min=1e-9))
        for name, value in here[0].items()
        if value.is_floating_point()
    }
    row = {
        "device": str(there.device),
        "torch": torch.__version__,
        "losses_cpu": here[1],
        "losses_accelerator": away[1],
        "largest_difference_of_a_tensor": max(apart.values()),
        "seconds_cpu": here[2],
        "seconds_accelerator": away[2],
    }
    if there.device.type == processes.XLA:
        from torch_xla.debug import metrics

        row["compilations"] = metrics.metric_data("CompileTime")[0]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(row, indent=1))
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
