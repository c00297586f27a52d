"""The English prompts of the Asterisk telephone exchange: one voice, about 500 short phrases, with their texts.

Recorded by Allison Smith for Digium, Inc., licence CC-BY-SA 3.0; fetched from the Debian packages
`asterisk-core-sounds-en-wav` (the recordings) and `asterisk-core-sounds-en` (the texts), and never kept in this
repository. Nothing here knows of networks, but for the log-mel features, which are the ones that Whisper reads.

Short prompts are for scoring, half of them for the search and half for the report; long ones are to train on, once in
pieces as long as may be and once in phrases, as short as what is scored, and so are letters of the alphabet and a fifth
of the prompts of one to three words. What is said twice in the same words is in one part, so nothing of the test is
heard before.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from assets import debian_package
from scipy.signal import resample_poly
from torch import Tensor

RATE = 16_000  # samples a second
HOP = 160  # samples a frame, so 100 frames a second
PAUSE, QUIET = 0.15, 0.03  # seconds at least, and of the loudest hundredth of a second at most, between two phrases
_WINDOW = 400  # samples of a Fourier transform
_MELS = 80

# "[beep]", "followed by #": what is heard there is not what stands there.
_NOT_AS_READ = re.compile(r"[][()<>#*@]")
_MISSPELT = {"fourtieth": "fortieth", "represenatives": "representatives", "un-indentified": "unidentified",
             "witheld": "withheld", "exclaimation": "exclamation", "umute": "unmute"}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A recording as (samples,) floats in -1..1 at `RATE`, and the text that was read."""

    name: str
    samples: Tensor
    text: str

    @property
    def seconds(self) -> float:
        return len(self.samples) / RATE


def prompts() -> list[Prompt]:
    """All prompts whose text is what is heard, by name."""
    texts = _texts(debian_package("asterisk-core-sounds-en"))
    root = next(debian_package("asterisk-core-sounds-en-wav").rglob("en_US_f_Allison"))
    paths = {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.wav")}
    return [Prompt(name, _samples(paths[name]), texts[name]) for name in sorted(paths.keys() & texts.keys())]


def part(text: str) -> Literal["test", "search", "train"]:
    """Where a short prompt belongs, by a digest of its words: neither case nor punctuation makes two texts of one."""
    said = re.findall(r"\w+", text.lower())
    number = int(hashlib.sha256(" ".join(said).encode()).hexdigest(), 16)
    if len(said) >= 4:
        return ("test", "search")[number % 2]
    if len(text) == 1:
        return "train"  # "c" and "see" sound alike
    return ("test", "test", "search", "search", "train")[number % 5]


def pieces(prompts: Sequence[Prompt], seconds: float) -> list[Tensor]:
    """What there is to train on, in clips of up to `seconds`: (samples,) each, the last of a prompt at least a second.

    Cuts fall where they fall; a word cut in two is what a recogniser hears at the edge of its window.
    """
    length = int(seconds * RATE)
    found = []
    for prompt in prompts:
        if len(prompt.samples) > length:
            found += [piece for piece in prompt.samples.split(length) if len(piece) >= RATE]
        elif part(prompt.text) == "train":
            found.append(prompt.samples)
    return found


def phrases(prompts: Sequence[Prompt], seconds: float) -> list[Tensor]:
    """Prompts longer than `seconds`, cut in the middle of their pauses: (samples,) each, of half a second at least."""
    found = []
    for prompt in prompts:
        if prompt.seconds > seconds:
            found += [part for part in prompt.samples.tensor_split(_pauses(prompt.samples)) if len(part) >= RATE / 2]
    return [part for part in found if len(part) <= seconds * RATE]


def _pauses(samples: Tensor) -> list[int]:
    """The middle of each pause, in samples."""
    frames = samples.unfold(0, HOP, HOP).square().mean(1).sqrt()
    loud = (frames > QUIET * frames.max()).nonzero().flatten().tolist()
    return [(last + first) // 2 * HOP for last, first in pairwise(loud) if first - last > PAUSE * RATE / HOP]


def varied(samples: Tensor, length: int, rng: torch.Generator) -> Tensor:
    """(samples,) up to a tenth slower or faster, in noise 20 to 50 dB below it, after a pause; at most `length`."""
    speed, noise, pause = torch.rand(3, generator=rng).tolist()
    size = min(int(len(samples) * (0.9 + 0.2 * speed)), length)
    said = F.interpolate(samples[None, None], size=size, mode="linear")[0, 0]
    loudness = said.square().mean().sqrt() * 10 ** -(1 + 1.5 * noise)
    said = said + loudness * torch.randn(size, generator=rng)
    return F.pad(said, (int(pause * min(length - size, 0.3 * RATE)), 0))


def _texts(folder: Path) -> dict[str, str]:
    """Lines of `name: text` in a gzipped file; other lines are comments."""
    raw = gzip.decompress(next(folder.rglob("core-sounds-en.txt.gz")).read_bytes()).decode()
    found = dict(re.findall(r"^([\w./-]+):\s*(.*\S)\s*$", raw, re.MULTILINE))
    return {name: _spelt(text) for name, text in found.items() if not _NOT_AS_READ.search(text)}


def _spelt(text: str) -> str:
    return " ".join(_MISSPELT.get(word.lower(), word) for word in text.split())


def _samples(path: Path) -> Tensor:
    """A mono wav of 16-bit samples, 8 kHz, at `RATE`."""
    with wave.open(str(path)) as file:
        raw = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 2**15
        return torch.from_numpy(resample_poly(raw, RATE // file.getframerate(), 1))


def log_mel(samples: Tensor, frames: int) -> Tensor:
    """(samples,) to (_MELS, frames): padded with silence or cut, in decades, -1..1 over the loudest 80 dB or so.

    As Whisper was trained on: windows centred on multiples of `HOP`, and everything lower than eight decades below
    the loudest value of the clip raised to there, before (x + 4) / 4.
    """
    padded = torch.zeros(frames * HOP)
    padded[: len(samples)] = samples[: frames * HOP]
    spectrum = torch.stft(padded, _WINDOW, HOP, window=torch.hann_window(_WINDOW), return_complex=True)
    decades = (mel_filters() @ spectrum[:, :-1].abs().square()).clamp(min=1e-10).log10()
    return (decades.maximum(decades.max() - 8) + 4) / 4


def mel_filters() -> Tensor:
    """(_MELS, _WINDOW // 2 + 1) triangles of equal area, evenly spaced on Slaney's scale from 0 to RATE / 2.

    The scale is linear, 200 / 3 Hz a step, up to 1 kHz, and logarithmic, 27 steps for a factor of 6.4, from there.
    """
    top = 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4)
    steps = np.linspace(0, top, _MELS + 2)
    corners = np.where(steps < 15, steps * 200 / 3, 1000 * 6.4 ** ((steps - 15) / 27))[:, None]
    low, middle, high = corners[:-2], corners[1:-1], corners[2:]
    hertz = np.linspace(0, RATE / 2, _WINDOW // 2 + 1)
    triangles = np.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle))
    return torch.from_numpy(triangles.clip(0) * 2 / (high - low)).float()
