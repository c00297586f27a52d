"""Film reviewers' sentences, labelled negative (0) or positive (1), as the text example reads them.

Twenty people rated each of 10,605 snippets from rottentomatoes.com between -4 and 4 (Hutto, Gilbert 2014, ICWSM,
"VADER", MIT licence). The source archive of the package `vadersentiment` carries them. Nothing here knows of networks.

Every line is the blurb of one review (in this file ids count lines; only the Amazon file has several lines to a
review), so a split by line is a split by review. Two blurbs stand there twice and are kept once.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from assets import pip_package
from tokenizers import Tokenizer
from torch import Tensor

LENGTH = 64  # tokens; 0.05 % of the snippets are longer and lose their end (with 48 it would be 3.6 %)
POOL = 16  # batches among which snippets are sorted by length
UNCLEAR = 1.0  # mean ratings nearer to zero than this have no sign that readers agree on; 14 % of the snippets
CUT, JOINED = 0.25, 0.25  # shares of the snippets that are varied
PARTS = {"test": slice(2048), "search": slice(2048, 2048 + 1920), "train": slice(2048 + 1920, None)}

Inputs = tuple[Tensor, Tensor]  # ids and mask, both (n, LENGTH) int64
Labelled = tuple[Inputs, Tensor]  # (inputs, (n,) labels), as a Workload wants its pairs


@dataclass(frozen=True, eq=False)
class Snippets:
    """Labelled snippets; a slice, or the rows that a tensor of indices names, are `Snippets` too."""

    ids: Tensor  # (n, LENGTH) token numbers, int64; 0 beyond the end
    mask: Tensor  # (n, LENGTH) int64; 1 on tokens, 0 beyond the end
    labels: Tensor  # (n,) int64; 0 negative, 1 positive

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice | Tensor) -> Snippets:
        return Snippets(self.ids[part], self.mask[part], self.labels[part])

    def batches(self, size: int) -> Iterator[Labelled]:
        """In order; the last may be short."""
        for ids, mask, labels in zip(self.ids.split(size), self.mask.split(size), self.labels.split(size), strict=True):
            yield (ids, mask), labels

    def inputs(self, size: int) -> Iterator[Inputs]:
        """The batches without their labels."""
        return (batch for batch, _ in self.batches(size))


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Scores a predicting function: for each snippet 1.0 if the highest logit is its label, else 0.0."""

    snippets: Snippets
    size: int = 32  # of a batch

    def __call__(self, predict: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
        hits: list[float] = []
        for inputs, labels in self.snippets.batches(self.size):
            hits += (predict(*inputs).argmax(1) == labels).float().tolist()
        return hits


@dataclass(frozen=True, eq=False)
class ByLength:
    """Batches to train on, in a new order at each iteration: snippets of like length together, cut to the longest.

    The logits are those of full padding (the mask hides it) at less than half the arithmetic. The order comes from
    torch's global generator: `torch.manual_seed` makes a training repeatable, and the object itself never changes.
    """

    snippets: Snippets
    size: int = 32  # of a batch

    def __len__(self) -> int:
        return len(self._batches(torch.arange(len(self.snippets))))

    def __iter__(self) -> Iterator[Labelled]:
        batches = self._batches(torch.randperm(len(self.snippets)))
        for index in torch.randperm(len(batches)).tolist():
            batch = self.snippets[batches[index]]
            longest = int(batch.mask.sum(1).max())
            yield (batch.ids[:, :longest], batch.mask[:, :longest]), batch.labels

    def _batches(self, order: Tensor) -> list[Tensor]:
        lengths = self.snippets.mask.sum(1)
        pools = order.split(POOL * self.size)
        return [chosen for pool in pools for chosen in pool[lengths[pool].argsort()].split(self.size)]


@dataclass(frozen=True, eq=False)
class Varied:
    """Batches to distil on: half of the snippets as they are, the others cut or joined, anew at each iteration.

    What the original says of the very sentences that it was trained on, it has learnt by heart, and a smaller network
    learns nothing from that but their labels. It has not seen a part of a sentence, nor the beginning of one followed
    by the end of another, which is of the same label here. All chance comes from one number of torch's global
    generator, so `torch.manual_seed` makes a training repeatable, and the object itself never changes.
    """

    snippets: Snippets
    size: int = 32  # of a batch

    def __len__(self) -> int:
        return -(-len(self.snippets) // self.size)

    def __iter__(self) -> Iterator[Labelled]:
        return iter(ByLength(self.once(torch.Generator().manual_seed(int(torch.randint(2**31, ())))), self.size))

    def once(self, rng: torch.Generator) -> Snippets:
        """As many snippets with the same labels, some of them cut or joined."""
        lengths, labels = self.snippets.mask.sum(1).tolist(), self.snippets.labels
        # between the tokens that say where a snippet begins and ends
        words = [row[1 : length - 1] for row, length in zip(self.snippets.ids.tolist(), lengths, strict=True)]
        other = _alike(labels, rng)
        kind, first, second = torch.rand(3, len(words), generator=rng).tolist()
        ids, mask = torch.zeros_like(self.snippets.ids), torch.zeros_like(self.snippets.mask)
        for index, whole in enumerate(words):
            said = whole
            if kind[index] < CUT:
                said = _part(whole, first[index], second[index])
            elif kind[index] < CUT + JOINED:
                said = _joined(whole, words[other[index]], first[index])
            said = said[: ids.shape[1] - 2]
            start, end = self.snippets.ids[index, 0], self.snippets.ids[index, lengths[index] - 1]
            ids[index, : len(said) + 2] = torch.tensor([start, *said, end])
            mask[index, : len(said) + 2] = 1
        return Snippets(ids, mask, labels)


def _alike(labels: Tensor, rng: torch.Generator) -> list[int]:
    """For each snippet another of its label, or itself."""
    found = torch.empty_like(labels)
    for label in labels.unique():
        same = (labels == label).nonzero().flatten()
        found[same] = same[torch.randperm(len(same), generator=rng)]
    return found.tolist()


def _part(words: list[int], share: float, place: float) -> list[int]:
    """Four to nine tenths of a snippet, from any place."""
    kept = max(1, round(len(words) * (0.4 + 0.5 * share)))
    begin = int((len(words) - kept + 1) * place)
    return words[begin : begin + kept]


def _joined(words: list[int], others: list[int], share: float) -> list[int]:
    """The beginning of one snippet, and from where it stops, the end of another."""
    return words[: max(1, int(len(words) * share))] + others[int(len(others) * share) :]


def snippets(part: Literal["train", "search", "test"], tokenizer: Path) -> Snippets:
    """5,203 snippets to train on, 1,920 for the search, 2,048 for the report; `tokenizer` is a `tokenizer.json`."""
    chosen = _clear()[PARTS[part]]
    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.enable_truncation(LENGTH)
    encoder.enable_padding(length=LENGTH)
    encoded = encoder.encode_batch([text for text, _ in chosen])
    return Snippets(
        ids=torch.tensor([one.ids for one in encoded]),
        mask=torch.tensor([one.attention_mask for one in encoded]),
        labels=torch.tensor([int(rating > 0) for _, rating in chosen]),
    )


def _clear() -> list[tuple[str, float]]:
    """Text and mean rating of all snippets with a clear sign, once each, in the order of their digests.

    That order is as good as random but hangs on no generator: the file itself has the positive ones first.
    """
    unique = {_digest(text): (text, rating) for text, rating in _rated() if abs(rating) >= UNCLEAR}
    return [unique[digest] for digest in sorted(unique)]


def _digest(text: str) -> str:
    """Of the words alone, so that neither case nor punctuation makes two snippets of one."""
    return hashlib.sha256(" ".join(re.findall(r"\w+", text.lower())).encode()).hexdigest()


def _rated() -> list[tuple[str, float]]:
    """Text and mean rating, -4 to 4, of all 10,605 snippets."""
    package = pip_package("vadersentiment", "3.3.2", sdist=True)
    with tarfile.open(package / "additional_resources" / "hutto_ICWSM_2014.tar.gz") as archive:
        member = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert member is not None
        rows = [line.split("\t") for line in member.read().decode().split("\n") if line]
    return [(text.strip(), float(rating)) for _, rating, text in rows]
