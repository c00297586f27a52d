"""Distillation among several processes beside the same in one: do the losses take the same course?

    python benchmarks/shared_training.py [examples/image.py] [--steps 50] [--processes 2 3] [--json FILE]

A student that lost a third of its channels learns from its original, in one process, in as many under torchrun, and in
two workers of Ray Train; batches are the workload's own, all with the same seeds and one thread each. Printed are the
largest difference of a loss, relative to that of one process in the same step, and how far the student's tensors end
up from each other. Processes share the processor here, so nothing is timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from featherweight import load, training
from featherweight.passes.distill_soft import DistillSoft
from featherweight.passes.prune_channels import PruneChannels
from featherweight.pools import connected
from featherweight.processes import processes
from featherweight.recipe import seeded

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SHARE = 0.3  # of the channels, which the student lost


def taught(spec: str, steps: int, folder: Path) -> None:
    """What each process does; the first one writes the losses and the student's tensors."""
    torch.set_num_threads(1)
    workload, found = load(spec), []

    def watched(*arguments: Any, **keywords: Any) -> Any:
        found.append(train(*arguments, **keywords))
        return found[0]

    train = training.train
    with mock.patch("featherweight.passes._distillation.train", watched), seeded(0):
        student = PruneChannels(share=SHARE).apply(workload.start, workload)
        student = DistillSoft(steps=steps).apply(student, workload)
    if processes().number == 0:
        torch.save({"losses": found[0][0], "tensors": student.state_dict()}, folder / "found.pt")


def ways(spec: str, steps: int, counts: list[int], folder: Path) -> dict[str, dict[str, Any]]:
    """What was found each way, that of one process first."""
    found = {}
    for count in (1, *counts):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += [__file__, spec, "--steps", str(steps), "--into", str(folder)]
        subprocess.run(command, check=True)
        found[f"torchrun, {count} process{'es' * (count > 1)}"] = torch.load(folder / "found.pt")
    _with_ray(functools.partial(taught, spec, steps, folder), folder)
    found["Ray Train, 2 workers"] = torch.load(folder / "found.pt")
    return found


def _with_ray(work: functools.partial[None], folder: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    with connected(""):
        scaling, config = ScalingConfig(num_workers=2), RunConfig(storage_path=str(folder / "ray"))
        TorchTrainer(lambda: work(), scaling_config=scaling, run_config=config).fit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", nargs="?", default=str(EXAMPLES / "image.py"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--json", type=Path, default=Path("out/shared_training.json"))
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # what torchrun starts
    chosen = parser.parse_args()
    if chosen.into:
        taught(chosen.workload, chosen.steps, chosen.into)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = ways(str(Path(chosen.workload).resolve()), chosen.steps, chosen.processes, Path(folder))
    alone, table = next(iter(found.values())), []
    for way, other in found.items():
        off = max(abs(b / a - 1) for a, b in zip(alone["losses"], other["losses"], strict=True))
        apart = max(
            float((other["tensors"][name] - tensor).norm() / tensor.norm().clamp(min=1e-9))
            for name, tensor in alone["tensors"].items()
            if tensor.is_floating_point()
        )
        table.append({"way": way, "losses": other["losses"], "largest_difference": off, "tensors_apart": apart})
        first, last = other["losses"][0], other["losses"][-1]
        print(f"{way:24} loss {first:.4f} to {last:.4f}, at most {off:.1e} off, tensors at most {apart:.1e} apart")
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
