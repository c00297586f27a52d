"""ResNet-18 for 28-pixel grey images: the network of `image.py`, and nothing about its data or training.

Source: He, Zhang, Ren, Sun 2016, arXiv:1512.03385, table 1 (18 layers). The stem is the one usual for small
images, a 3x3 convolution in place of the 7x7 one, followed by pooling to 14 pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights" / "resnet18_fashion_mnist.safetensors"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """(n, 1, 28, 28) normalised pixels to (n, 10) logits; 11.2 M parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)
        )
        widths = (64, 64, 128, 256, 512)
        self.blocks = nn.Sequential(
            *[
                BasicBlock(
                    widths[stage] if first else widths[stage + 1], widths[stage + 1], 2 if first and stage else 1
                )
                for stage in range(4)
                for first in (True, False)
            ]
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


def trained() -> ResNet18:
    """The network with the committed weights (fp16 on disk, fp32 in memory), in eval mode."""
    net = ResNet18()
    net.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in load_file(WEIGHTS).items()}
    )
    return net.eval()
