"""LeNet-300-100 and LeNet-5 on MNIST, pruned and clustered as in Deep Compression: do its ratios come out here?

    python benchmarks/deep_compression.py [LeNet-300-100 LeNet-5] [--seeds 3] [--json out/deep_compression.json]

The paper (Han, Mao, Dally 2016, arXiv:1510.00149, tables 2 and 3) reports 40 and 39 times less to store, with Huffman
coding, 32 and 33 times without, on 60,000 images and with no loss of accuracy. Here there are 8,000 images to train on
and 2,000 to test. Sizes are counted as the paper counts them before Huffman coding: each weight that is not zero takes
the bits of its number in the codebook and some of the distance to the one before it (a farther one needs a filler of as
many bits), plus codebooks and biases in single precision. Of the distance each layer takes the bits that suit it, where
the paper has 5 or 8. The files that ship are larger: zeros are stored there. A network is trained and compressed anew
from each seed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from mnist import part

from featherweight import Workload
from featherweight.measure import drop_bounds
from featherweight.recipe import Recipe, compress_model
from featherweight.surgery import encodings
from featherweight.workload import Predict

INDEX_BITS = range(2, 9)
EPOCHS = 40
# Cut in turns, each repaired by the original's answers; first by what is read, for weights on pixels that are always
# blank were never trained and are not small. The paper keeps 8 % of both networks.
RECIPES = {
    "LeNet-300-100": """
steps:
  - prune_wanda: {share: 0.6, where: "fc1, fc2"}
  - distill_soft: {epochs: 15, lr: 0.01}
  - prune_magnitude: {share: 0.8, where: fc1}
  - prune_magnitude: {share: 0.7, where: fc2}
  - distill_soft: {epochs: 15, lr: 0.01}
  - prune_magnitude: {share: 0.88, where: fc1}
  - prune_magnitude: {share: 0.8, where: fc2}
  - prune_magnitude: {share: 0.4, where: fc3}
  - distill_soft: {epochs: 15, lr: 0.01}
  - prune_magnitude: {share: 0.928, where: fc1}
  - prune_magnitude: {share: 0.87, where: fc2}
  - prune_magnitude: {share: 0.5, where: fc3}
  - distill_soft: {epochs: 80, lr: 0.01}
  - cluster_kmeans: {bits: 3}
  - distill_soft: {epochs: 30, lr: 0.003}
target: onnxruntime
""",
    "LeNet-5": """
steps:
  - prune_wanda: {share: 0.6, where: "conv2, fc1, fc2"}
  - distill_soft: {epochs: 8, lr: 0.01}
  - prune_magnitude: {share: 0.3, where: conv1}
  - prune_magnitude: {share: 0.75, where: "conv2, fc2"}
  - prune_magnitude: {share: 0.85, where: fc1}
  - distill_soft: {epochs: 8, lr: 0.01}
  - prune_magnitude: {share: 0.85, where: "conv2, fc2"}
  - prune_magnitude: {share: 0.922, where: fc1}
  - distill_soft: {epochs: 110, lr: 0.01}
  - cluster_kmeans: {bits: 5, where: "conv*"}
  - cluster_kmeans: {bits: 3, where: "fc*"}
  - distill_soft: {epochs: 40, lr: 0.003}
target: onnxruntime
""",
}
PUBLISHED = {"LeNet-300-100": 40, "LeNet-5": 39}


class LeNet300(nn.Module):
    """784-300-100-10, as LeCun et al. 1998 (doi:10.1109/5.726791)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))


class LeNet5(nn.Module):
    """Two convolutions and two linear layers, with Caffe's widths, which the paper compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv2(F.max_pool2d(self.conv1(x), 2)), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


NETWORKS = {"LeNet-300-100": LeNet300, "LeNet-5": LeNet5}


class Changed:
    """The training pictures in batches of 64, each changed a little, in a new order at each iteration."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.pictures, self.labels = part("train")
        self.change = change

    def __len__(self) -> int:
        return len(self.labels) // 64

    def __iter__(self):  # type: ignore[no-untyped-def]
        for chosen in torch.randperm(len(self.labels))[: 64 * len(self)].split(64):
            yield (self.change(self.pictures[chosen]),), self.labels[chosen]


def moved(pictures: Tensor) -> Tensor:
    """All by the same, up to two pixels."""
    down, right = torch.randint(-2, 3, (2,)).tolist()
    return torch.roll(pictures, (down, right), (2, 3))


def warped(pictures: Tensor) -> Tensor:
    """Turned by up to 0.2, scaled by up to e^0.12, sheared by up to 0.15, moved by up to 2.5 pixels."""
    angle, size, shear, right, down = (torch.rand(5, len(pictures)) * 2 - 1) * torch.tensor(
        [[0.2], [0.12], [0.15], [2.5 / 14], [2.5 / 14]]
    )
    cos, sin = size.exp() * angle.cos(), size.exp() * angle.sin()
    rows = torch.stack([cos, shear - sin, right, sin, cos, down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False)


CHANGES = {
    "LeNet-300-100": moved,
    "LeNet-5": warped,
}  # of the pictures that the original and its compression learn from


def trained(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model, data = NETWORKS[name](), Changed(CHANGES[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(data))
    for _ in range(EPOCHS):
        for (pictures,), labels in data:
            optimizer.zero_grad()
            F.cross_entropy(model(pictures), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def correct(predict: Predict) -> list[float]:
    """1 or 0 for each test picture."""
    pictures, labels = part("test")
    with torch.no_grad():
        logits = predict(pictures)
    assert isinstance(logits, Tensor)
    return (logits.argmax(1) == labels).float().tolist()


def stored_bits(weight: Tensor, code_bits: int, index_bits: int) -> int:
    """What a pruned and clustered tensor takes: a code and a distance for each weight that is not zero.

    >>> weight = torch.zeros(100)
    >>> weight[3], weight[60] = 1.0, 2.0
    >>> stored_bits(weight, code_bits=4, index_bits=5)  # the second is 57 behind the first: one filler
    91
    """
    places = weight.flatten().nonzero().flatten()
    gaps = torch.diff(places, prepend=torch.tensor([-1]))
    fillers = int(((gaps - 1) // 2**index_bits).sum())
    return (len(places) + fillers) * (code_bits + index_bits) + 32 * different(weight)


def least_bits(weight: Tensor) -> int:
    """With the bits of distance that suit it."""
    code_bits = math.ceil(math.log2(different(weight) + 1))  # a filler has a code too
    return min(stored_bits(weight, code_bits, bits) for bits in INDEX_BITS)


def different(weight: Tensor) -> int:
    """How many values there are beside zero."""
    return len(weight[weight != 0].unique())


@dataclass(frozen=True)
class Row:
    """One network: accuracies, kept weights as a share, and how many times less there is to store."""

    network: str
    seed: int
    before: float
    after: float
    drop_low: float
    drop_upper: float
    kept: float
    ratio: float
    published_with_huffman: float


def compress(name: str, seed: int) -> Row:
    model, data = trained(name, seed), Changed(CHANGES[name])
    batches = [(data.pictures[i : i + 64],) for i in range(0, 512, 64)]
    workload = Workload(model, (data.pictures[:1],), batches, correct, train=data)
    small, _ = compress_model(Recipe.from_yaml(RECIPES[name]), workload, seed)
    weights = {layer: encoding.decode() for layer, encoding in encodings(small).items()}
    total = sum(32 * p.numel() for p in model.parameters())
    biases = sum(32 * p.numel() for key, p in model.named_parameters() if key.endswith("bias"))
    ratio = total / (biases + sum(map(least_bits, weights.values())))
    kept = sum(int((w != 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())
    before, after = correct(model), correct(small)
    means = (sum(found) / len(found) for found in (before, after))
    return Row(name, seed, *means, *drop_bounds(before, after), kept, ratio, PUBLISHED[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="both by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("out/deep_compression.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.networks:
        for seed in range(arguments.seeds):
            rows.append(compress(name, seed))
            arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
            print(line(rows[-1]), flush=True)


def line(row: Row) -> str:
    return (
        f"{row.network:15} seed {row.seed}: accuracy {row.before:.4f} to {row.after:.4f} (drop {row.drop_low:+.4f} to "
        f"{row.drop_upper:+.4f}), {row.kept:.1%} of the weights kept, {row.ratio:.1f} times less to store (published: "
        f"{row.published_with_huffman:.0f} with Huffman coding)"
    )


if __name__ == "__main__":
    main()
