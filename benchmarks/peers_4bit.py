"""Our 4-bit passes beside auto-round, hqq, llm-compressor and gptqmodel on a decoder of text: one network, one judge.

    python benchmarks/peers_4bit.py [CONTENDER ...] [--environments FOLDER] [--block 32] [--windows 40] [--rounds 1]

Every contender gets the same fp32 network (examples/gemma.py, linear layers only: the table of tokens stays as it is),
the same 32 windows of 512 tokens to calibrate on, the same bits and the same size of blocks, and otherwise its own
defaults. It works in a process of its own, which writes the weights that it would compute with; all are judged by the
same process on the same other windows. Peers live in environments of their own below --environments, made on first use
(their requirements exclude one another); those that are not there and cannot be made are said and left out.

Perplexity has its interval by windows drawn with replacement, and so has its ratio to the first contender's. Seconds,
of clock and of processor, are those of quantization alone, the least of the rounds, contenders in turn; memory is
the peak of the process until then, beside what it held with the network just loaded. The network's weights come at 5
to 8 bits, so read perplexities as what 4 bits cost beyond that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Quantize = Callable[[nn.Module, Tensor, int, Path], dict[str, Tensor]]
REQUIREMENTS = {  # of each peer's environment; torch comes first, as whichever build pip finds
    "auto-round": ("auto-round==0.16.1", "transformers==5.24.0"),
    "hqq": ("hqq==0.2.8.post1", "transformers==5.24.0"),
    "llm-compressor": ("llmcompressor==0.14.0.1",),
    "gptqmodel": ("gptqmodel==7.6.0",),
}
CALIBRATION = 32  # windows
DRAWS = 2000  # of windows, for intervals


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Those of the blocks, by name; the last one shares the table of tokens."""
    return {name: layer for name, layer in model.named_modules() if name.endswith("_proj")}


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.weight": layer.weight.detach().float() for name, layer in linear_layers(model).items()}


# ------------------------------------------------------------------------------------------------ contenders


class Blocks(nn.Module):
    """A network of transformers without its last layer, which nobody rounds."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.net(input_ids, use_cache=False).last_hidden_state


def ours(name: str, **settings: object) -> Quantize:
    def quantize(model: nn.Module, windows: Tensor, block: int, _: Path) -> dict[str, Tensor]:
        from featherweight.passes import build
        from featherweight.workload import Workload

        net = Blocks(model)
        batches = [(window,) for window in windows.split(1)]
        workload = Workload(net, (windows[:1, :16],), batches, score=lambda predict: 0.0)
        build(name, {"bits": 4, "block": block, "where": "*_proj", **settings}, name).apply(net, workload)
        return {}

    return quantize


def hqq(model: nn.Module, windows: Tensor, block: int, _: Path) -> dict[str, Tensor]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    found = {}
    settings = BaseQuantizeConfig(nbits=4, group_size=block, axis=1)
    for name, layer in linear_layers(model).items():
        found[name] = HQQLinear(layer, settings, compute_dtype=torch.float32, device="cpu")
        model.set_submodule(name, found[name])
    return LazyWeights(found, lambda layer: layer.dequantize())


def auto_round(iters: int) -> Quantize:
    def quantize(model: nn.Module, windows: Tensor, block: int, network: Path) -> dict[str, Tensor]:
        from auto_round import AutoRound
        from torch.utils.data import DataLoader
        from transformers import AutoTokenizer

        data = DataLoader([{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows])
        AutoRound(
            model,
            tokenizer=AutoTokenizer.from_pretrained(network),
            scheme="W4A16",
            group_size=block,
            sym=True,
            iters=iters,
            nsamples=len(windows),
            seqlen=windows.shape[1],
            batch_size=8,
            dataset=data,
            device_map="cpu",
        ).quantize()
        return {}

    return quantize


def llm_compressor(model: nn.Module, windows: Tensor, block: int, _: Path) -> dict[str, Tensor]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=block)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
    )
    return {}


def gptqmodel(model: nn.Module, windows: Tensor, block: int, network: Path) -> dict[str, Tensor]:
    from gptqmodel import GPTQModel, QuantizeConfig

    del model  # it loads its own
    # weights in memory, and zero points as they are: the older format keeps them less one, which its decoder leaves so
    settings = QuantizeConfig(bits=4, group_size=block, offload_to_disk=False, format="gptq_v2")
    loaded = GPTQModel.load(str(network), settings, device="cpu")
    loaded.quantize([{"input_ids": w.tolist(), "attention_mask": [1] * len(w)} for w in windows], batch_size=1)
    return LazyWeights(linear_layers(loaded.model), lambda layer: layer.dequantize_weight().T)


class LazyWeights(dict):
    """Layers whose weights are computed when they are asked for, after time and memory were taken."""

    def __init__(self, layers: dict[str, nn.Module], weight: Callable[[nn.Module], Tensor]) -> None:
        super().__init__((f"{name}.weight", layer) for name, layer in layers.items())
        self.weight = weight

    def items(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.weight(layer)) for name, layer in super().items())


def nothing(model: nn.Module, windows: Tensor, block: int, _: Path) -> dict[str, Tensor]:
    return {}


CONTENDERS: dict[str, tuple[str, Quantize]] = {  # by name: the environment, "" for this one, and what runs there
    "quantize_gptq": ("", ours("quantize_gptq")),
    "quantize_awq": ("", ours("quantize_awq")),
    "quantize_hqq": ("", ours("quantize_hqq")),
    "quantize_weights": ("", ours("quantize_weights")),
    "quantize_weights, offsets": ("", ours("quantize_weights", offset=True)),
    "original": ("", nothing),
    "hqq": ("hqq", hqq),
    "llm-compressor": ("llm-compressor", llm_compressor),
    "gptqmodel": ("gptqmodel", gptqmodel),
    "auto-round": ("auto-round", auto_round(50)),
}


def contend(name: str, scratch: Path, block: int) -> None:
    """What the process of a contender does: leaves its weights and its cost in the folder `scratch`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    network = scratch / "network"
    model = AutoModelForCausalLM.from_pretrained(network, dtype=torch.float32, local_files_only=True).eval()
    windows = load_file(scratch / "windows.safetensors")["calibration"]
    loaded = peak_bytes()
    clock, processor = time.perf_counter(), time.process_time()
    found = CONTENDERS[name][1](model, windows, block, network)
    cost = {
        "seconds": time.perf_counter() - clock,
        "processor_seconds": time.process_time() - processor,
        "peak_rss_bytes": peak_bytes(),
        "loaded_rss_bytes": loaded,
    }
    weights = dict(found.items()) or dense_weights(model)
    save_file(
        {key: value.detach().float().contiguous() for key, value in weights.items()}, scratch / f"{name}.safetensors"
    )
    (scratch / f"{name}.json").write_text(json.dumps(cost))


def peak_bytes() -> int:
    """Of this process; what `resource` says would be no less than that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


# ------------------------------------------------------------------------------------------------ the comparison


def interpreter(environment: str, environments: Path) -> str:
    """The Python of a peer's environment, which is made where it is not there."""
    if not environment:
        return sys.executable
    folder = environments / environment
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"torch=={torch.__version__.partition('+')[0]}"], check=True)
        subprocess.run([*pip, *REQUIREMENTS[environment]], check=True)
    return str(python)


def log_likelihoods(model: nn.Module, windows: Tensor) -> Tensor:
    """Of each window, the mean over its tokens but the first, (windows,)."""
    found = []
    with torch.inference_mode():
        for window in windows.split(1):
            logits = model(window, use_cache=False).logits[0, :-1]
            found.append(-nn.functional.cross_entropy(logits, window[0, 1:]))
    return torch.stack(found)


def perplexity(scores: Tensor, reference: Tensor | None = None) -> tuple[float, float, float]:
    """Perplexity, or its ratio to that of `reference`, with its 95 % interval over windows."""
    off = -(scores if reference is None else scores - reference).double()
    draws = torch.randint(len(off), (DRAWS, len(off)), generator=torch.Generator().manual_seed(0))
    low, high = off[draws].mean(1).exp().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return off.mean().exp().item(), low, high


def prepare(scratch: Path, windows: int) -> None:
    """Writes the network and the windows where every contender finds them."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import brown
    import gemma

    if not (scratch / "network" / "config.json").exists():
        gemma.causal().save_pretrained(scratch / "network")
    tokenizer = gemma.tokenizer()
    tokenizer.save_pretrained(scratch / "network")
    parts = {"calibration": ("train", CALIBRATION), "test": ("test", windows)}
    save_file({key: brown.windows(*part, tokenizer) for key, part in parts.items()}, scratch / "windows.safetensors")


def run(name: str, arguments: argparse.Namespace) -> dict[str, float] | None:
    """The cost of a contender; None where it failed, which is said."""
    scratch, script = arguments.scratch.resolve(), str(Path(__file__).resolve())
    try:
        python = interpreter(CONTENDERS[name][0], arguments.environments.resolve())
        command = [python, script, name, "--contend", "--scratch", str(scratch), "--block", str(arguments.block)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(arguments.threads)}
        environment["GPTQMODEL_CPU_WORKERS"] = "2"  # it refuses fewer, which it takes by default on two cores
        with (scratch / f"{name}.log").open("w") as log:
            # where they may leave what they like
            subprocess.run(command, check=True, cwd=scratch, env=environment, stdout=log, stderr=subprocess.STDOUT)
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"{name} failed: {error}; see {scratch / f'{name}.log'}", file=sys.stderr, flush=True)
        return None
    return json.loads((scratch / f"{name}.json").read_text())


def line(row: dict) -> str:
    quality = "".join(f"{mid:9.4f} ({low:.4f} to {high:.4f})" for mid, low, high in (row["perplexity"], row["ratio"]))
    return (
        f"{row['contender']:18}{quality}"
        f"{row['seconds']:9.1f} s{row['processor_seconds']:9.1f} s{row['peak_rss_bytes'] / 1e6:8.0f} MB "
        f"({row['loaded_rss_bytes'] / 1e6:.0f} loaded)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", default=list(CONTENDERS), help=", ".join(CONTENDERS))
    parser.add_argument("--environments", type=Path, default=Path("out/environments"))
    parser.add_argument("--scratch", type=Path, default=Path("out/peers_4bit"), help="for the network and all weights")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--windows", type=int, default=40, help="of 512 tokens, to judge by")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("out/peers_4bit.json"))
    parser.add_argument("--contend", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.contend:
        contend(arguments.contenders[0], arguments.scratch, arguments.block)
        return
    from transformers import AutoModelForCausalLM

    arguments.scratch.mkdir(parents=True, exist_ok=True)
    prepare(arguments.scratch, arguments.windows)
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.contenders}
    for _ in range(arguments.rounds):
        for name in arguments.contenders:
            if (cost := run(name, arguments)) is not None:
                costs[name].append(cost)
    model = AutoModelForCausalLM.from_pretrained(arguments.scratch / "network", dtype=torch.float32).eval()
    windows = load_file(arguments.scratch / "windows.safetensors")["test"]
    rows: list[dict] = []
    reference = None
    for name in (name for name in arguments.contenders if costs[name]):
        model.load_state_dict(load_file(arguments.scratch / f"{name}.safetensors"), strict=False)
        scores = log_likelihoods(model, windows)
        reference = scores if reference is None else reference
        cheapest = min(costs[name], key=lambda cost: cost["seconds"])
        quality = {"perplexity": perplexity(scores), "ratio": perplexity(scores, reference), "scores": scores.tolist()}
        settings = {"bits": 4, "block": arguments.block, "threads": arguments.threads}
        rows.append({"contender": name, **settings, **cheapest, **quality, "all_costs": costs[name]})
        print(line(rows[-1]), flush=True)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
