"""A workload: Gemma 3 with 270 million parameters, which foretells the next token of American prose.

    featherweight apply recipe.yaml examples/language.py --out out/

The score is the mean log-likelihood per token of windows of 512 tokens of the Brown corpus; the exponential of what it
lacks to zero is the perplexity. The search sees the beginnings of 40 documents, the report those of 40 others. What the
network is, and under which terms it comes, stands in `gemma.py`. Reading its file takes the package `gguf`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from brown import windows
from gemma import tokenizer, trained
from torch import Tensor, nn

from featherweight import Workload


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Scores a predicting function: for each window the mean log-likelihood of its tokens but the first."""

    windows: Tensor  # (n, length)

    def __call__(self, predict: Callable[[Tensor], Tensor]) -> list[float]:
        found = []
        for window in self.windows.split(1):  # the logits of one window take half a gigabyte
            found.append(-float(nn.functional.cross_entropy(predict(window)[0, :-1], window[0, 1:])))
        return found


def workload() -> Workload:
    words = tokenizer()
    train = windows("train", 32, words)
    return Workload(
        model=trained(),
        example=(train[:1],),
        calibration=[(window,) for window in train.split(1)],
        score=Likelihood(windows("search", 40, words)),
        test_score=Likelihood(windows("test", 40, words)),
    )
