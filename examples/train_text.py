"""Fine-tunes MiniLM-L6 on film reviewers' sentences and keeps the weights in the cache folder.

    python examples/train_text.py

`text.py` does the same by itself when the weights are not there. About eight minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from assets import cache_folder, publish
from minilm import MiniLM, tokenizer, untrained
from movie_snippets import Accuracy, ByLength, Snippets, snippets
from safetensors.torch import save_file
from torch import nn


def weights() -> Path:
    """Where the result is kept. A change of the splits or of the training asks for another number in the name."""
    return cache_folder() / "weights" / "minilm-movie-snippets-1.safetensors"


@torch.inference_mode()
def accuracy(net: MiniLM, data: Snippets) -> float:
    """The share of `data` that `net` labels right."""
    net.eval()
    return sum(Accuracy(data)(net)) / len(data)


def fit(net: MiniLM, data: Snippets, held_out: Snippets, epochs: int, size: int, rate: float) -> None:
    """Trains `net` in place and leaves it in eval mode; the rate climbs over the first tenth, then falls to zero."""
    steps = epochs * -(-len(data) // size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1, anneal_strategy="linear", cycle_momentum=False
    )
    start, losses = time.monotonic(), []
    for epoch in range(1, epochs + 1):
        net.train()
        for inputs, labels in ByLength(data, size):
            loss = nn.functional.cross_entropy(net(*inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) % 25 == 0:
                spent = time.monotonic() - start
                _say(f"step {len(losses)}/{steps}: loss {sum(losses[-25:]) / 25:.3f}, {spent:.0f} s")
        _say(f"epoch {epoch}/{epochs}: accuracy {accuracy(net, held_out):.4f} on {len(held_out)} held-out snippets")


def train(epochs: int = 3, size: int = 32, rate: float = 1e-4, seed: int = 0) -> Path:
    """The file of the trained weights, fp32, which appears under its name only when it is whole."""
    net = untrained()
    data, held_out = (snippets(part, tokenizer()) for part in ("train", "search"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fit(net, data, held_out, epochs, size, rate)
    final = weights()
    final.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent) as work:
        made = Path(work) / final.name
        save_file(net.state_dict(), made)
        publish(made, final)
    return final


def _say(line: str) -> None:
    """To the error stream: a command's standard output may be read by a program."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="snippets per step")
    parser.add_argument("--rate", type=float, default=1e-4, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    _say(f"wrote {train(arguments.epochs, arguments.batch, arguments.rate, arguments.seed)}")
