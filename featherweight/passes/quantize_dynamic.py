"""8-bit weights, and activations rounded to 8 bits by their own range at every run.

    x̂ = s · (clamp(round(x / s) + z, 0, 255) − z),  s = (max(x, 0) − min(x, 0)) / 255

No calibration: the range is found while running, which costs time that `quantize_static` saves. For linear layers,
whose inputs vary most between examples.

Source: Jacob et al. 2018, arXiv:1712.05877, equation 1; ranges as in ONNX's DynamicQuantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from featherweight.encodings import Affine, DynamicQuantizer, affine_scale
from featherweight.hooks import (
    watch_inputs,
)
from featherweight.passes import Pass
from featherweight.surgery import (
    dense_of,
    done,
    encode,
    groups_by_weight,
    leave_others,
    quantize_input,
    refuse_quantized,
    select,
)
from featherweight.workload import Workload


@dataclass(frozen=True, kw_only=True)
class QuantizeDynamic(Pass):
    """Stores linear layers (and embeddings) in 8 bits; linear layers round their input by its own range.

    Linear layers that the network reads weights of but does not call, as attention does, have no input to round.
    """

    def apply(self, model: nn.Module, workload: Workload) -> nn.Module:
        layers = select(model, self.where, (nn.Linear, nn.Embedding))
        refuse_quantized(layers, self.name())
        called: set[str] = set()
        linear = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        watch_inputs(model, linear, workload.calibration[:1], lambda name, _: called.add(name))
        for group in groups_by_weight(model, layers):
            weight = dense_of(next(iter(group.values())))
            encoding = Affine(weight, affine_scale(weight, 8, 0), bits=8, axis=0)
            for name, layer in group.items():
                encode(layer, encoding)
                if name in called:
                    quantize_input(layer, DynamicQuantizer())
                inputs = ", inputs uint8 by their own range" if name in called else ""
                done(name, f"{encoding.describe()}{inputs}")
        leave_others(model, self.where, layers, self.name())
        return model
