"""From a speech recogniser's logits to its words, and how many of them are wrong. Nothing here knows of audio.

A recogniser is a function from features (n, ...) and token ids (n, length) to logits (n, length, vocabulary): at each
position those of the next token, from the features and from the ids up to there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from tokenizers import Tokenizer
from torch import Tensor

END, START, NO_TIMESTAMPS = 50_256, 50_257, 50_362  # of Whisper's English models; all special tokens are >= END
PROMPT = (START, NO_TIMESTAMPS)
IGNORED = -100  # as a target; torch's cross-entropy leaves it out

Recogniser = Callable[[Tensor, Tensor], Tensor]


def rows(tokens: Sequence[Sequence[int]], length: int) -> Tensor:
    """Texts as (n, length) ids: the prompt, the text, then END to the end; what does not fit is cut.

    >>> rows([[11, 12], []], length=5).tolist()
    [[50257, 50362, 11, 12, 50256], [50257, 50362, 50256, 50256, 50256]]
    """
    return torch.tensor([[*PROMPT, *text, *[END] * length][:length] for text in tokens])


def texts(ids: Tensor) -> list[list[int]]:
    """The tokens between the prompt and the first END of each of the (n, length) ids.

    >>> texts(rows([[11, 12], []], length=5))
    [[11, 12], []]
    """
    bodies = ids[:, len(PROMPT) :].tolist()
    return [body[: body.index(END)] if END in body else body for body in bodies]


def targets(ids: Tensor) -> Tensor:
    """The token that each position of the (n, length) ids should name, IGNORED in the prompt and behind the first END.

    >>> targets(rows([[11, 12], []], length=5)).tolist()
    [[-100, 11, 12, 50256, -100], [-100, 50256, -100, -100, -100]]
    """
    following = ids.roll(-1, dims=1)
    following[:, : len(PROMPT) - 1] = IGNORED
    following[:, -1] = IGNORED
    behind = (following == END).cumsum(1) > 1
    return following.masked_fill(behind, IGNORED)


def greedy(predict: Recogniser, features: Tensor, drafts: Tensor, size: int = 8) -> Tensor:
    """The (n, length) ids that greedy decoding, a token at a time, arrives at, in few calls of `predict`.

    A call sees a whole draft at once and says at every position what ought to follow there. All that agrees is kept,
    and the first that does not is corrected: up to there each token was named from the very tokens before it, as in
    decoding step by step. What was said further on is the next draft. Any draft leads to the same ids; a good one
    needs one call, and none more than a call for each token. (Santilli and others 2023, arXiv:2305.10427, Jacobi
    decoding. Where a runtime chooses its scales from all positions together, logits hang a little on the draft.)

    Special tokens are never chosen. A text that has not ended within `length` is cut there.

    Args:
        drafts: (n, length), as `rows` makes them; `rows([[]] * n, length)` where nothing is known.
        size: of a batch. Runtimes compile for a shape, so there are two: this one and, for the last few texts, one.
    """
    ids, known = drafts.clone(), torch.full((len(drafts),), len(PROMPT))
    waiting = list(range(len(ids)))
    while waiting:
        some = torch.tensor(waiting[:size] if len(waiting) >= size else waiting[:1])
        ids[some], known[some] = _corrected(predict(features[some], ids[some]), ids[some], known[some])
        ended = _within(ids[some] == END, known[some]).any(1) | (known[some] == ids.shape[1])
        waiting = some[~ended].tolist() + waiting[len(some) :]
    return rows(texts(ids), ids.shape[1])


def _corrected(logits: Tensor, ids: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """The (n, length) ids as (n, length, vocabulary) logits have them, and how many are final, (n,); `known` were."""
    said = torch.cat([ids[:, :1], logits[:, :-1, : END + 1].argmax(2)], dim=1)
    new = torch.where(torch.arange(ids.shape[1]) < known[:, None], ids, said)
    differs = new != ids
    return new, torch.where(differs.any(1), differs.int().argmax(1) + 1, ids.shape[1])


def _within(found: Tensor, known: Tensor) -> Tensor:
    """`found`, (n, length), where it is behind the prompt and among the first `known`, (n,), of a row."""
    position = torch.arange(found.shape[1])
    return found & (position >= len(PROMPT)) & (position < known[:, None])


@dataclass(frozen=True, eq=False)
class WordAccuracy:
    """Scores a recogniser by the words that it gets wrong in greedy decoding.

    Each of n utterances is there in r readings; in a reading it has e errors (words to replace, insert or delete), of
    which no more are counted than it has words. Its value is 1 - n * the mean of e over its readings / words of all n
    utterances. The mean of the values is thus exactly 1 - WER, where the word error rate is the errors in all readings
    over the words in all. The bound keeps one endless repetition from outweighing everything else.
    """

    features: Tensor  # (r * n, ...), one reading of all after the other
    drafts: Tensor  # (r * n, length) ids, what the original recogniser hears: all that is right needs one call
    said: Sequence[str]  # n texts
    tokenizer: Tokenizer

    @cached_property
    def references(self) -> list[list[str]]:
        return [words(text) for text in self.said]

    def __call__(self, predict: Recogniser) -> list[float]:
        readings = self.errors(predict)
        share = len(self.said) / len(readings) / sum(map(len, self.references))
        by_utterance = zip(self.references, zip(*readings, strict=True), strict=True)
        return [1 - share * sum(min(e, len(said)) for e in errors) for said, errors in by_utterance]

    def errors(self, predict: Recogniser) -> list[list[int]]:
        """How many words are wrong in each utterance, reading by reading, without a bound."""
        heard = self.tokenizer.decode_batch(texts(greedy(predict, self.features, self.drafts)))
        return [
            [word_errors(said, words(text)) for said, text in zip(self.references, reading, strict=True)]
            for reading in (heard[at : at + len(self.said)] for at in range(0, len(heard), len(self.said)))
        ]


_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
             "twelve": "twelfth"}  # fmt: skip


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; apostrophes and the dots of abbreviations vanish, numbers are spelt out.

    >>> words("It's 21 o'clock, P.M. -- press 9 & 0!")
    ['its', 'twenty', 'one', 'oclock', 'pm', 'press', 'nine', 'and', 'zero']
    >>> words("The 12th, the 30th of 1234.")
    ['the', 'twelfth', 'the', 'thirtieth', 'of', 'one', 'two', 'three', 'four']
    """
    joined = re.sub(r"(?<=\w)['’.](?=\w)", "", text.lower().replace("&", " and ").replace("%", " percent "))
    spelt = re.sub(r"(\d+)(st|nd|rd|th)?", lambda found: f" {_spelt(*found.groups())} ", joined)
    return re.findall("[a-z]+", spelt)


def _spelt(digits: str, ordinal: str | None) -> str:
    """A number below a hundred by its name, a longer one digit by digit."""
    number = int(digits)
    if number < 20:
        name = _ONES[number]
    elif number < 100:
        name = _TENS[number // 10 - 2] + (f" {_ONES[number % 10]}" if number % 10 else "")
    else:
        name = " ".join(_ONES[int(digit)] for digit in digits)
    if not ordinal:
        return name
    before, _, last = name.rpartition(" ")
    regular = f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th"
    return f"{before} {_ORDINALS.get(last, regular)}"


def word_errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """The fewest words to replace, insert or delete in `heard` to make `said` of it (Levenshtein's distance).

    >>> word_errors(["press", "the", "pound", "key"], ["press", "a", "pound"])
    2
    """
    row = list(range(len(heard) + 1))  # row[j]: the errors between what was seen of `said` and the first j of `heard`
    for i, wanted in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, word in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != word))
    return row[-1]
