"""Artifacts for the target torch on XLA, sharded over eight devices: the nearest thing to TPUs that runs anywhere.

    python benchmarks/xla.py build [image text] [--folder out/xla]
    python -m venv .venv-xla
    .venv-xla/bin/pip install -c constraints.txt torch
    .venv-xla/bin/pip install -c constraints.txt -e . jax==0.9.2 torchax==0.0.13
    .venv-xla/bin/python benchmarks/xla.py run [--folder out/xla] [--json out/xla.json]

The devices are virtual ones of the processor, so nothing is timed: what is compared are outputs, with those of torch on
the processor. Each network runs with the rows of a batch shared out among the devices, and with its weights shared out
along their outputs, where XLA finds by itself what has to be exchanged. On one device, it tells what comes of sharding
and what of XLA's own kernels; that torch's own kernels differ, too, is told beside it. torchax 0.0.13 names overloads
of operators that torch 2.13 does not have; nothing here calls them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featherweight import encodings
from featherweight.artifact import Artifact, build, open_artifact
from featherweight.candidates import build_step
from featherweight.recipe import Recipe
from featherweight.targets.torch import positional
from featherweight.workload import load, tensors

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DEVICES = 8
ROWS = 64
RECIPES = {"fp32": (), "int8": ("quantize_static",)}
TOLERANCES = {"fp32": 1e-5, "int8": 0.05}  # a sum in another order rounds to the next byte, and that goes on from there
OWN = ("dequantize", "dynamic_quantize", "expand", "fake_quantize", "look_up", "unscale")  # operators of ours


def build_all(workloads: Sequence[str], folder: Path) -> None:
    """Artifacts and rows of real inputs, made where the workloads' own requirements are installed."""
    for name in workloads:
        workload = load(str(EXAMPLES / f"{name}.py"))
        rows = [array[:ROWS].numpy() for array in tensors(workload.calibration[0])]
        for recipe, steps in RECIPES.items():
            place = folder / f"{name}-{recipe}"
            if not place.is_dir():
                build(Recipe(tuple(build_step(step) for step in steps), "torch"), workload, place)
            np.savez(folder / f"{name}-{recipe}.npz", *rows)


@contextlib.contextmanager
def missing_overloads() -> Iterator[None]:
    """Inside the block overloads that torch does not have may be named."""
    packet = torch._ops.OpOverloadPacket
    found = packet.__getattr__

    def tolerant(self: Any, name: str) -> Any:
        try:
            return found(self, name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return f"{self}.{name}"

    packet.__getattr__ = tolerant
    try:
        yield
    finally:
        packet.__getattr__ = found


def to_jax(artifact: Artifact, given: Sequence[torch.Tensor]) -> tuple[Any, Any]:
    """The network's weights, and a function of them and of its inputs."""
    with missing_overloads():
        from torchax.export import exported_program_to_jax

    network = positional(artifact.folder / "model.pt2", "cpu")
    own = {getattr(torch.ops.featherweight, name).default: getattr(encodings, name)._init_fn for name in OWN}
    for part in network.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.target = own.get(node.target, node.target)
            part.recompile()
    return exported_program_to_jax(torch.export.export(network, tuple(given)))  # type: ignore[no-any-return]


def run_all(folder: Path) -> list[dict[str, Any]]:
    import jax

    devices = jax.devices()
    assert len(devices) == DEVICES, devices
    table: list[dict[str, Any]] = []
    for source in sorted(folder.glob("*.npz")):
        artifact = open_artifact(source.with_suffix(""))
        with np.load(source) as file:
            given = [torch.from_numpy(file[name]) for name in file.files]
        wanted, otherwise = on_torch(artifact, given)
        weights, network = to_jax(artifact, given)
        noise, tolerance = off(otherwise, wanted), TOLERANCES[source.stem.rpartition("-")[2]]
        print(f"{source.stem:12} torch without oneDNN: off by {noise:.2e} of the largest")
        for way, lie, rows in sharded(weights, given, devices):
            found = [np.asarray(value) for value in jax.jit(network)(lie, rows)]
            alone = found if way == "whole" else alone
            used = len({shard.device for value in (*lie, *rows) for shard in value.addressable_shards})
            cut = sum(not value.sharding.is_fully_replicated for value in (*lie, *rows))
            row = {"network": source.stem, "shared": way, "devices": used, "arrays_cut": cut, "torch_noise": noise}
            row |= {"off_torch": off(found, wanted), "off_whole": off(found, alone)}
            table.append(row)
            print(
                f"{source.stem:12} {way:8} {used} devices, {cut:3} arrays cut: off by {row['off_torch']:.2e} from "
                f"torch, {row['off_whole']:.2e} from one device"
            )
            if max(row["off_torch"], row["off_whole"]) > tolerance:
                raise SystemExit(f"That is more than {tolerance}.")
    return table


def on_torch(artifact: Artifact, given: Sequence[torch.Tensor]) -> list[list[np.ndarray]]:
    """Outputs by the usual kernels, and by others, which sum in another order."""
    network, found = positional(artifact.folder / "model.pt2", "cpu"), []
    for usual in (True, False):
        with torch.no_grad(), torch.backends.mkldnn.flags(enabled=usual):
            found.append([value.numpy() for value in network(*given)])
    return found


def off(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """The largest difference, as a share of the largest output."""
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, wanted, strict=True))


def sharded(weights: Sequence[Any], given: Sequence[torch.Tensor], devices: Sequence[Any]) -> Iterator[Any]:
    """Ways to lay weights and rows on devices."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(devices), ("devices",))
    cut, everywhere = NamedSharding(mesh, PartitionSpec("devices")), NamedSharding(mesh, PartitionSpec())
    by_output = [cut if value.ndim and value.shape[0] % DEVICES == 0 else everywhere for value in weights]
    for way, places, rows in (
        ("whole", [devices[0]] * len(weights), devices[0]),
        ("rows", [everywhere] * len(weights), cut),
        ("weights", by_output, everywhere),
    ):
        lie = [jax.device_put(value, place) for value, place in zip(weights, places, strict=True)]
        yield way, lie, tuple(jax.device_put(value.numpy(), rows) for value in given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "run"), nargs="?", default="build")
    parser.add_argument("workloads", nargs="*", default=["image", "text"])
    parser.add_argument("--folder", type=Path, default=Path("out/xla"))
    parser.add_argument("--json", type=Path, default=Path("out/xla.json"))
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    if chosen.what == "build":
        build_all(chosen.workloads, chosen.folder)
        print(f"built in {chosen.folder}; now run this with torchax", file=sys.stderr)
        return
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    warnings.simplefilter("ignore")  # torchax's use of torch, and torch's of oneDNN
    chosen.json.write_text(json.dumps(run_all(chosen.folder), indent=1))


if __name__ == "__main__":
    main()
