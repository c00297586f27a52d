"""A workload: ResNet-18 with the committed weights, on Fashion-MNIST at 28 pixels.

    featherweight compress examples/image.py --max-drop 0.01 --out out/

Everything it needs is in the repository. The search sees the first half of the test images, the report the second.
"""

from __future__ import annotations

from fashion_mnist import Accuracy, Shuffled, images, normalised
from resnet import trained

from featherweight import Workload


def workload() -> Workload:
    train, test = images("train", normalised), images("test", normalised)
    return Workload(
        model=trained(),
        example=next(test.inputs(1)),
        calibration=list(train[: 16 * 32].inputs(32)),
        score=Accuracy(test[:5_000]),
        test_score=Accuracy(test[5_000:]),
        train=Shuffled(train, 32),
        probe=list(test[5_000:5_300].batches(100)),
    )
