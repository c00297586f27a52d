"""A workload: MiniLM-L6 that tells whether a film reviewer's sentence is negative or positive.

    featherweight compress examples/text.py --max-drop 0.01 --out out/

Weights and data come from package registries, and the first use fine-tunes the network; both are kept (see
`assets.cache_folder`). The search sees 1,920 sentences, the report 2,048 others.
"""

from __future__ import annotations

import sys

from minilm import tokenizer, trained
from movie_snippets import Accuracy, Varied, snippets
from train_text import train, weights

from featherweight import Workload


def workload() -> Workload:
    if not weights().exists():
        print("fine-tuning MiniLM-L6, once: about eight minutes on one core", file=sys.stderr, flush=True)
        train()
    train_part, search, test = (snippets(part, tokenizer()) for part in ("train", "search", "test"))
    return Workload(
        model=trained(weights()),
        example=next(test.inputs(1)),
        calibration=list(train_part[: 8 * 32].inputs(32)),
        score=Accuracy(search),
        test_score=Accuracy(test),
        train=Varied(train_part),
        probe=list(test[:200].batches(100)),
    )
