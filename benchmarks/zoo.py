"""Many architectures, tiny and with random weights: what can be done with each of them?

    python benchmarks/zoo.py [bert vit ...] [--processes 2] [--json out/zoo.json] [--markdown docs/zoo.md]

Networks come from configurations of transformers, from pytorchcv, and from a few lines of torch. Each is compressed
in several ways, and every result is an artifact. A cell of the table is *done* where the artifact computes what the
compressed torch module does, within the target's tolerance (twice that in int8, for runtimes round between layers
too, which adds up where weights are random); *refused* where an error of Featherweight's own says why not; *broken* in
all other cases. Scores mean nothing on random weights, so none are taken. The network as it is goes to every installed
target, what was made of it to one of them, in turn. Each architecture has a process of its own.

Rows end up in the JSON file one by one, and those that are there already are not run again.

pytorchcv asks for torchvision, which these networks do not need: pip install --no-deps pytorchcv
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from featherweight import Workload, targets
from featherweight.artifact import build
from featherweight.errors import FeatherweightError
from featherweight.recipe import Recipe
from featherweight.workload import Batch, call

EXAMPLES, BATCHES, CLASSES = 16, 2, 5
PRUNED = {"prune_channels": {"share": 0.3, "multiple": 1}}
RECIPES: dict[str, list[Any]] = {
    "export": [],
    "int8": ["quantize_static"],
    "4-bit": [{"quantize_weights": {"bits": 4, "block": 32}}],
    "channels": [PRUNED],
    "factorize": ["factorize_svd"],
    "distil": [PRUNED, {"distill_soft": {"steps": 3}}],
}
COLUMNS = (*RECIPES, "reload")
FAULTS = ("our fault", "left a network that fails")  # in messages that are no refusals
RELOAD = """
import sys
from featherweight.artifact import verify
for folder in sys.argv[1:]:
    for problem in verify(folder):
        sys.exit(f"{folder}: {problem}")
"""
SECONDS = 900  # that an architecture may take

# ------------------------------------------------------------------------------------------------ networks


def image(n: int, size: int = 32) -> Batch:
    return (torch.randn(n, 3, size, size),)


def text(n: int) -> Batch:
    mask = torch.arange(12) < torch.randint(6, 13, (n, 1))
    return {"input_ids": torch.randint(3, 60, (n, 12)), "attention_mask": mask.long()}


def wave(n: int) -> Batch:
    return (torch.randn(n, 1600),)


def spectrogram(n: int) -> Batch:
    return (torch.randn(n, 32, 16),)


def speech_and_text(n: int) -> Batch:
    return {"input_features": torch.randn(n, 16, 32), "decoder_input_ids": torch.randint(3, 60, (n, 6))}


def hugging(name: str, **settings: Any) -> nn.Module:
    """The class `name` of transformers, made from its configuration with these settings."""
    kind = getattr(importlib.import_module("transformers"), name)
    return kind(kind.config_class(num_labels=CLASSES, initializer_range=0.1, **settings))


def mobile(**settings: Any) -> nn.Module:
    """MobileNetV2 as training begins: what its 17 blocks add is small (Goyal et al. 2017, arXiv:1706.02677, sec. 5.1).

    With all as large as what they are added to, a change of 1e-5 of the input moves the rounded network's outputs by a
    tenth and more, and nothing that runs it can be judged.
    """
    model = hugging("MobileNetV2ForImageClassification", **settings)
    for layer in model.mobilenet_v2.layer:
        if layer.use_residual:
            nn.init.constant_(layer.reduce_1x1.normalization.weight, 0.3)
    return model


def computer_vision(name: str, **settings: Any) -> nn.Module:
    """`module.Class` of pytorchcv, made with these settings. Pictures may have any size: the last pooling takes all."""
    module, _, kind = name.partition(".")
    found = getattr(importlib.import_module(f"pytorchcv.models.{module}"), kind)
    model = found(in_size=(32, 32), num_classes=CLASSES, **settings)
    for pool in [name for name, _ in model.named_modules() if name.endswith(".final_pool")]:
        model.set_submodule(pool, nn.AdaptiveAvgPool2d(1))
    return model


class Voice(nn.Module):
    """(n, 1600) samples to (n, 5): convolutions, an LSTM over time, a linear layer; the shape of a voice detector."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Conv1d(1, 32, 64, stride=32, bias=False)
        self.encoder = nn.Sequential(
            *(nn.Conv1d(32, 24, 3, padding=1), nn.ReLU(), nn.Conv1d(24, 16, 3, stride=2, padding=1), nn.ReLU())
        )
        self.lstm = nn.LSTM(16, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, samples: Tensor) -> Tensor:
        x = self.encoder(self.spectrum(samples.unsqueeze(1)).abs())
        return self.head(self.lstm(x.transpose(1, 2))[0][:, -1])


class Reader(nn.Module):
    """(n, 12) words to (n, 5): embeddings, a GRU in both directions, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 32)
        self.gru = nn.GRU(32, 24, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.gru(self.words(input_ids))[0] * attention_mask.unsqueeze(-1)
        return self.head(states.sum(1) / attention_mask.sum(1, keepdim=True))


@dataclass(frozen=True)
class Network:
    """An architecture: what it reads, and how it is made."""

    reads: Callable[[int], Batch]
    make: Callable[[], nn.Module]


HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ENCODER = {**HIDDEN, "vocab_size": 60, "max_position_embeddings": 20}
DECODER = {**ENCODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
PATCHES = {**HIDDEN, "image_size": 32, "patch_size": 8}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
CONVOLVED = {**HIDDEN, "conv_dim": [16, 16, 16], "conv_kernel": [10, 4, 2], "conv_stride": [5, 4, 2]}
SPEECH = {
    **CONVOLVED,
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "apply_spec_augment": False,
}

NETWORKS: dict[str, Network] = {
    # text
    "bert": Network(text, partial(hugging, "BertForSequenceClassification", **ENCODER)),
    "distilbert": Network(
        text,
        partial(
            hugging, "DistilBertForSequenceClassification", vocab_size=60, dim=32, n_layers=2, n_heads=4, hidden_dim=64
        ),
    ),
    "roberta": Network(text, partial(hugging, "RobertaForSequenceClassification", **ENCODER)),
    "albert": Network(text, partial(hugging, "AlbertForSequenceClassification", **ENCODER, embedding_size=16)),
    "electra": Network(text, partial(hugging, "ElectraForSequenceClassification", **ENCODER, embedding_size=16)),
    "deberta": Network(
        text,
        partial(
            hugging,
            "DebertaV2ForSequenceClassification",
            **ENCODER,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            type_vocab_size=0,
            pooler_hidden_size=32,
        ),
    ),
    "mpnet": Network(text, partial(hugging, "MPNetForSequenceClassification", **ENCODER)),
    "clip_text": Network(text, partial(hugging, "CLIPTextModel", **DECODER)),
    "t5_encoder": Network(
        text, partial(hugging, "T5EncoderModel", vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ),
    "gpt2": Network(
        text,
        partial(
            hugging, "GPT2LMHeadModel", vocab_size=60, n_positions=20, n_embd=32, n_layer=2, n_head=4, use_cache=False
        ),
    ),
    "opt": Network(text, partial(hugging, "OPTForCausalLM", **DECODER, ffn_dim=64, word_embed_proj_dim=32)),
    "llama": Network(text, partial(hugging, "LlamaForCausalLM", **DECODER, num_key_value_heads=4)),
    "qwen2": Network(text, partial(hugging, "Qwen2ForCausalLM", **DECODER, num_key_value_heads=2)),
    "gemma": Network(text, partial(hugging, "GemmaForCausalLM", **DECODER, num_key_value_heads=1, head_dim=8)),
    "gru": Network(text, Reader),
    # image
    "vit": Network(image, partial(hugging, "ViTForImageClassification", **PATCHES)),
    "deit": Network(image, partial(hugging, "DeiTForImageClassification", **PATCHES)),
    "beit": Network(image, partial(hugging, "BeitForImageClassification", **PATCHES, use_relative_position_bias=True)),
    "clip_vision": Network(image, partial(hugging, "CLIPVisionModel", **PATCHES)),
    "swin": Network(
        image,
        partial(
            hugging,
            "SwinForImageClassification",
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
    ),
    "segformer": Network(
        image,
        partial(
            hugging,
            "SegformerForSemanticSegmentation",
            **STAGES,
            num_attention_heads=[1, 2, 2, 4],
            mlp_ratios=[2, 2, 2, 2],
            decoder_hidden_size=16,
        ),
    ),
    "convnext": Network(
        image,
        partial(hugging, "ConvNextForImageClassification", **STAGES, patch_size=2, layer_scale_init_value=0.5),
    ),
    "hf_resnet": Network(
        image,
        partial(hugging, "ResNetForImageClassification", **STAGES, embedding_size=8, layer_type="basic"),
    ),
    "hf_mobilenetv2": Network(partial(image, size=64), partial(mobile, depth_multiplier=0.25, image_size=64)),
    "mobilevit": Network(
        image,
        partial(
            hugging,
            "MobileViTForImageClassification",
            image_size=64,
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
            num_attention_heads=4,
        ),
    ),
    "resnet": Network(
        image,
        partial(
            computer_vision,
            "resnet.ResNet",
            channels=[[16, 16], [32, 32]],
            init_block_channels=16,
            bottleneck=True,
            conv1_stride=False,
        ),
    ),
    "seresnet": Network(
        image,
        partial(
            computer_vision,
            "seresnet.SEResNet",
            channels=[[32, 32], [64, 64]],
            init_block_channels=16,
            bottleneck=False,
            conv1_stride=False,
        ),
    ),
    "resnext": Network(
        image,
        partial(
            computer_vision,
            "resnext.ResNeXt",
            channels=[[32, 32], [64, 64]],
            init_block_channels=16,
            cardinality=4,
            bottleneck_width=16,
        ),
    ),
    "mobilenetv3": Network(
        image,
        partial(
            computer_vision,
            "mobilenetv3.MobileNetV3",
            channels=[[16], [24, 24]],
            exp_channels=[[16], [48, 64]],
            init_block_channels=16,
            final_block_channels=64,
            classifier_mid_channels=64,
            kernels3=[[1], [1, 0]],
            use_relu=[[1], [1, 0]],
            use_se=[[1], [0, 1]],
            first_stride=True,
            final_use_se=False,
        ),
    ),
    "densenet": Network(
        image,
        partial(computer_vision, "densenet.DenseNet", channels=[[24, 32], [24, 32]], init_block_channels=16),
    ),
    "shufflenetv2": Network(
        image,
        partial(
            computer_vision,
            "shufflenetv2.ShuffleNetV2",
            channels=[[32, 32], [64, 64]],
            init_block_channels=16,
            final_block_channels=64,
        ),
    ),
    "squeezenet": Network(
        image,
        partial(
            computer_vision,
            "squeezenet.SqueezeNet",
            channels=[[32, 32], [48]],
            residuals=[[0, 1], [0]],
            init_block_kernel_size=3,
            init_block_channels=16,
        ),
    ),
    "efficientnet": Network(
        image,
        partial(
            computer_vision,
            "efficientnet.EfficientNet",
            channels=[[16], [24, 24]],
            init_block_channels=16,
            final_block_channels=64,
            kernel_sizes=[[3], [3, 5]],
            strides_per_stage=[1, 2],
            expansion_factors=[[1], [4, 4]],
        ),
    ),
    "ghostnet": Network(
        image,
        partial(
            computer_vision,
            "ghostnet.GhostNet",
            channels=[[16], [24, 24]],
            init_block_channels=16,
            final_block_channels=64,
            classifier_mid_channels=64,
            kernels3=[[1], [1, 0]],
            exp_factors=[[1], [3, 3]],
            use_se=[[0], [0, 1]],
            first_stride=True,
        ),
    ),
    "preresnet": Network(
        image,
        partial(
            computer_vision,
            "preresnet.PreResNet",
            channels=[[16, 16], [32, 32]],
            init_block_channels=16,
            bottleneck=False,
            conv1_stride=True,
        ),
    ),
    "shufflenet": Network(
        image,
        partial(
            computer_vision, "shufflenet.ShuffleNet", channels=[[32, 32], [64, 64]], init_block_channels=16, groups=2
        ),
    ),
    "mobilenet": Network(
        image,
        partial(computer_vision, "mobilenet.MobileNet", channels=[[16], [32, 32], [64]], first_stage_stride=False),
    ),
    # audio
    "wav2vec2": Network(wave, partial(hugging, "Wav2Vec2ForSequenceClassification", **SPEECH)),
    "hubert": Network(wave, partial(hugging, "HubertForSequenceClassification", **SPEECH)),
    "wavlm": Network(wave, partial(hugging, "WavLMForSequenceClassification", **SPEECH)),
    "ast": Network(
        spectrogram,
        partial(hugging, "ASTForAudioClassification", **HIDDEN, max_length=32, num_mel_bins=16, patch_size=8),
    ),
    "whisper": Network(
        speech_and_text,
        partial(
            hugging,
            "WhisperModel",
            vocab_size=60,
            num_mel_bins=16,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=16,
            max_target_positions=20,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            use_cache=False,
        ),
    ),
    "lstm": Network(wave, Voice),
}


def workload_of(name: str) -> Workload:
    """The network with noise for data. Its batch norms have seen some, so that no signal dies out on the way."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.make()
    with torch.no_grad():
        norms = [module.train() for module in model.eval().modules() if isinstance(module, nn.BatchNorm2d)]
        for _ in range(20 if norms else 0):
            call(model, network.reads(32))
    return Workload(
        model.eval(), network.reads(2), [network.reads(EXAMPLES) for _ in range(BATCHES)], lambda predict: 0.0
    )


# ------------------------------------------------------------------------------------------------ one architecture


@dataclass(frozen=True)
class Cell:
    """What became of one way to compress one architecture: `verdict` is done, refused or broken."""

    network: str
    column: str
    verdict: str
    reason: str = ""
    target: str = ""
    export_error: float | None = None


def cells(name: str, folder: Path) -> Iterator[Cell]:
    """The cells of one row, in the order of `COLUMNS`."""
    workload, installed = workload_of(name), targets.installed()
    place = list(NETWORKS).index(name)
    built: list[Path] = []
    for turn, (column, steps) in enumerate(RECIPES.items(), start=place):
        chosen = installed if column == "export" else (installed[turn % len(installed)],)
        for target in chosen:
            recipe = Recipe.from_yaml(yaml.safe_dump({"steps": steps, "target": target}))
            cell = cell_of(name, column, recipe, workload, folder / f"{column}-{target}")
            if cell.verdict == "done":
                built.append(folder / f"{column}-{target}")
            yield cell
    yield reloaded(name, built)


def cell_of(name: str, column: str, recipe: Recipe, workload: Workload, folder: Path) -> Cell:
    cell = partial(Cell, name, column, target=recipe.target)
    try:
        error = build(recipe, workload, folder).manifest["export_error"]
    except FeatherweightError as refusal:
        reason = str(refusal)
        return cell("broken" if any(fault in reason for fault in FAULTS) else "refused", reason)
    except Exception as exception:
        traceback.print_exc(limit=-4)
        return cell("broken", f"{type(exception).__name__}: {exception}")
    if error > targets.find(recipe.target).tolerance * (2 if column == "int8" else 1):
        return cell("broken", f"outputs differ by {error:.3g}", export_error=error)
    return cell("done", export_error=error)


def reloaded(name: str, folders: Sequence[Path]) -> Cell:
    """Whether a fresh process loads all artifacts, and each gives what it gave when it was written."""
    if not folders:
        return Cell(name, "reload", "refused", "there is no artifact to load")
    found = subprocess.run([sys.executable, "-c", RELOAD, *map(str, folders)], capture_output=True, text=True)
    return Cell(name, "reload", "broken" if found.returncode else "done", found.stderr.strip()[-1000:])


# ------------------------------------------------------------------------------------------------ all of them


def row(name: str) -> list[Cell]:
    """The row of one architecture, from a process of its own; what a process that died left out is broken."""
    command = [sys.executable, str(Path(__file__).resolve()), name, "--one"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        ended = "ended early"
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = subprocess.run(command, stdout=out, stderr=err, timeout=SECONDS).returncode
            ended = f"the process ended with {code}"
        out.seek(0)
        err.seek(0)
        found = [Cell(**json.loads(line)) for line in out if line.startswith("{")]
        notes = err.read()
    missing = [column for column in COLUMNS if all(cell.column != column for cell in found)]
    lost = [Cell(name, column, "broken", f"{ended}: {notes.strip().splitlines()[-1:]}") for column in missing]
    for cell in (*found, *lost):
        print(f"{name:15} {cell.column:10} {cell.target:12} {cell.verdict:8} {cell.reason[:1000]}", flush=True)
    if any(cell.verdict == "broken" for cell in found):
        print(notes[-6000:], flush=True)
    return [*found, *lost]


def verdict(found: Sequence[Cell]) -> str:
    """The worst of the verdicts on several targets."""
    return next(v for v in ("broken", "refused", "done") if any(cell.verdict == v for cell in found))


def markdown(rows: dict[str, list[Cell]]) -> str:
    table = {
        name: {column: verdict([cell for cell in row if cell.column == column]) for column in COLUMNS}
        for name, row in rows.items()
    }
    counts = Counter(verdict for row in table.values() for verdict in row.values())
    total = sum(counts.values())
    lines = [
        "# The zoo",
        "",
        *(__doc__ or "").split("\n\n")[2].splitlines(),
        "",
        f"Made by `python benchmarks/zoo.py --markdown docs/zoo.md`: {counts['done']} of {total} cells are done "
        f"({counts['done'] / total:.1%}), {counts['refused']} refused, {counts['broken']} broken.",
        "",
        f"| | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
        *(f"| {name} | {' | '.join(row.values())} |" for name, row in table.items()),
    ]
    reasons = {
        f"- {cell.network}, {cell.column}{f' to {cell.target}' if cell.target else ''}: {' '.join(cell.reason.split())}"
        for row in rows.values()
        for cell in row
        if cell.verdict != "done"
    }
    return "\n".join([*lines, *(["", "## Why not", "", *sorted(reasons)] if reasons else [])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="all by default")
    parser.add_argument("--one", action="store_true", help="print the cells of one network, as JSON, and no more")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("out/zoo.json"))
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            for cell in cells(arguments.networks[0], Path(folder)):
                print(json.dumps(asdict(cell)), flush=True)
        return
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    wanted = [name for name in arguments.networks if name not in known]
    with ThreadPoolExecutor(arguments.processes) as pool:
        for name, found in zip(wanted, pool.map(row, wanted), strict=True):
            known[name] = [asdict(cell) for cell in found]
            arguments.json.write_text(json.dumps(known, indent=1))
    rows = {name: [Cell(**cell) for cell in known[name]] for name in arguments.networks}
    page = markdown(rows)
    print(page)
    if arguments.markdown:
        arguments.markdown.write_text(page)


if __name__ == "__main__":
    main()
