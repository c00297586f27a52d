"""What the examples make of their data, where that is more than reading it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
pytest.importorskip("tokenizers")

import asterisk_prompts
import transcribe
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


class Letters:
    """A tokenizer of one token a word."""

    def decode_batch(self, texts: list[list[int]]) -> list[str]:
        return [" ".join(chr(ord("a") + token) for token in text) for text in texts]


def test_words_are_counted_in_all_readings_of_an_utterance():
    """Of two utterances of three and one words, in two readings: one error in the first, then three and one."""
    heard = transcribe.rows([[0, 1, 3], [4], [5, 6, 7, 8], []], length=7)
    hears = torch.nn.functional.one_hot(heard.roll(-1, 1)).float()
    score = transcribe.WordAccuracy(torch.arange(4), heard, ["a b c", "e"], Letters())
    assert score.errors(lambda features, ids: hears[features]) == [[1, 0], [4, 1]]
    found = score(lambda features, ids: hears[features])  # no more errors than words are counted
    assert found == [1 - 2 * (1 + 3) / 2 / 4, 1 - 2 * (0 + 1) / 2 / 4]
    assert sum(found) / 2 == 1 - (1 + 3 + 1) / (2 * 4)


def test_prompts_are_cut_in_their_pauses_and_nothing_short_or_long_is_kept():
    rate = asterisk_prompts.RATE
    voice, pause, breath = torch.ones(rate), torch.zeros(rate // 4), torch.zeros(rate // 10)
    said = torch.cat([voice, breath, voice, pause, voice[: rate // 4], pause, voice, voice, voice, voice, pause, voice])
    long = asterisk_prompts.Prompt("long", said, "")
    short = asterisk_prompts.Prompt("short", voice, "")
    found = [len(part) / rate for part in asterisk_prompts.phrases([short, long], 3)]
    assert found == pytest.approx([2.1 + 0.125, 0.25 + 0.25, 1 + 0.125], abs=0.02)
