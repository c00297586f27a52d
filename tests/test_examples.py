"""What the examples make of their data, where that is more than reading it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
pytest.importorskip("tokenizers")

from movie_snippets import LENGTH, Snippets, Varied

START, END, COUNT = 101, 102, 300


@pytest.fixture
def sentences() -> Snippets:
    """Of 3 to 40 words; those of one label are even, those of the other odd."""
    rng = torch.Generator().manual_seed(0)
    ids, labels = torch.zeros(COUNT, LENGTH, dtype=torch.int64), torch.arange(COUNT) % 2
    lengths = torch.randint(3, 41, (COUNT,), generator=rng)
    for row, label, length in zip(ids, labels.tolist(), lengths.tolist(), strict=True):
        words = 2 * torch.randint(500, 1000, (length,), generator=rng) + label
        row[: length + 2] = torch.tensor([START, *words.tolist(), END])
    return Snippets(ids, (ids > 0).long(), labels)


def test_sentences_are_cut_or_joined_with_others_of_their_label(sentences):
    varied = Varied(sentences).once(torch.Generator().manual_seed(1))
    same = (varied.ids == sentences.ids).all(1)
    assert 0.4 < same.float().mean() < 0.6
    assert torch.equal(varied.labels, sentences.labels)
    for ids, mask, label in zip(varied.ids.tolist(), varied.mask.sum(1).tolist(), varied.labels.tolist(), strict=True):
        words = ids[1 : mask - 1]
        assert ids[0] == START and ids[mask - 1] == END and not any(ids[mask:])
        assert words and all(word % 2 == label for word in words)


def test_training_data_differ_each_time_and_hang_on_the_seed_alone(sentences):
    data = Varied(sentences)

    def two() -> list[list[int]]:
        torch.manual_seed(0)
        return [[int(ids.sum()) for (ids, _), _ in data] for _ in range(2)]

    first, second = two()
    assert len(first) == len(data) and first != second
    assert two() == [first, second]
    assert sum(len(labels) for _, labels in data) == COUNT
