"""How a tensor is stored: encodings of weights, quantizers of activations, and the operators that decode them.

An `Encoding` is a parametrization: the layer stays an ordinary `nn.Linear` or `nn.Conv2d`, and its `weight` is
computed from what is really stored. The dense original is gone. Each encoding decodes through an operator of the
library `featherweight`, which survives `torch.export`, so that a target sees what is stored and not what was
computed from it. Which scale or code is best is a pass's affair; which layer carries it, `surgery`'s.

`Affine`:  ŵ = s · q,  q whole, −2^(b−1) ≤ q < 2^(b−1), one s per tensor, per slice of an axis or per block
(Jacob et al. 2018, arXiv:1712.05877, equation 1, with zero point 0).
`InputQuantizer`:  x̂ = s · (clamp(round(x / s) + z, 0, 255) − z)  (the same equation, z free).
`DynamicQuantizer`:  the same with s and z from the smallest and largest value of each input.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float, Int8, Shaped, UInt8
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------ operators


def pack4(codes: Int8[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """Signed 4-bit codes, two to a byte, the first in the low half; an odd one out is padded with zero.

    >>> pack4(torch.tensor([1, -1, 7], dtype=torch.int8))
    tensor([241,   7], dtype=torch.uint8)
    """
    flat = codes.flatten()
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    halves = flat.view(torch.uint8) & 0xF
    return halves[0::2] | (halves[1::2] << 4)


def unpack4(packed: UInt8[Tensor, " bytes"], count: int) -> Int8[Tensor, " count"]:
    """The first `count` codes that `pack4` packed.

    >>> unpack4(torch.tensor([241, 7], dtype=torch.uint8), 3)
    tensor([ 1, -1,  7], dtype=torch.int8)
    """
    halves = torch.stack([packed & 0xF, packed >> 4], dim=1).flatten()[:count].view(torch.int8)
    return torch.where(halves > 7, halves - 16, halves)


def spread(scale: Float[Tensor, "*scales"], shape: tuple[int, ...], axis: int, block: int) -> Float[Tensor, "*_"]:
    """`scale` in a form that multiplies the codes as `grouped` views them."""
    if axis < 0:
        return scale
    if block:
        return scale.unsqueeze(-1)
    return scale.view([-1 if i == axis else 1 for i in range(len(shape))])


def grouped(x: Shaped[Tensor, "*shape"], block: int) -> Shaped[Tensor, "*_"]:
    """`x` as (rows, blocks, block) where there are blocks, along all that is not axis 0; else as it is."""
    return x.reshape(x.shape[0], -1, block) if block else x


@torch.library.custom_op("featherweight::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, shape: list[int], axis: int, block: int, bits: int) -> Tensor:
    """Codes times their scales, as a dense tensor of `shape`.

    Args:
        codes: int8 of `shape` for 8 bits; the bytes of `pack4` for 4.
        scale: () for axis −1; (shape[axis],) without blocks; (shape[0], rest / block) with them.
        axis: the dimension that has one scale a slice; −1 for one scale in all; 0 with blocks.
        block: how many consecutive codes of a row share a scale; 0 for none.
        bits: 8 or 4.
    """
    if bits == 4:
        count = 1
        for size in shape:
            count *= size
        codes = unpack4(codes, count).view(shape)
    dense = grouped(codes, block).to(scale.dtype) * spread(scale, tuple(shape), axis, block)
    return dense.reshape(shape)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, shape: list[int], axis: int, block: int, bits: int) -> Tensor:
    return scale.new_empty(shape)


@torch.library.custom_op("featherweight::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`x` rounded to the grid of an unsigned byte with one scale and zero point; gradients pass where not clipped."""
    zero = zero_point.to(x.dtype)
    return (x / scale).round_().add_(zero).clamp_(0, 255).sub_(zero).mul_(scale)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _pass_inside(ctx, grad):  # type: ignore[no-untyped-def]
    """The gradient where `x` is not clipped: a code of -0.5 to 255.5 before rounding. One pass over memory, not six."""
    x, scale, zero_point = ctx.saved_tensors
    step, zero = float(scale), int(zero_point)
    return torch.ops.aten.hardtanh_backward(grad, x, (-0.5 - zero) * step, (255.5 - zero) * step), None, None


fake_quantize.register_autograd(_pass_inside, setup_context=_keep_inputs)


@torch.library.custom_op("featherweight::dynamic_quantize", mutates_args=())
def dynamic_quantize(x: Tensor) -> Tensor:
    """`x` rounded to an unsigned byte grid that spans its own smallest to largest value and zero."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).tiny)
    zero = torch.round(-low / scale).clamp(0, 255)
    return (x / scale).round_().add_(zero).clamp_(0, 255).sub_(zero).mul_(scale)


@dynamic_quantize.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


dynamic_quantize.register_autograd(lambda ctx, grad: grad)

# ------------------------------------------------------------------------------------------------ encodings


class Encoding(nn.Module):
    """A stored form of one tensor. `decode` computes the dense tensor from it.

    For training, `thaw` gives it a latent dense tensor whose projection onto the stored form is what the layer
    uses, with gradients passed straight through (Bengio et al. 2013, arXiv:1308.3432); `freeze` stores that
    projection and drops the latent tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("latent", None)

    @abstractmethod
    def decode(self) -> Tensor:
        """The dense tensor."""

    @abstractmethod
    def store(self, dense: Tensor) -> None:
        """Keep the projection of `dense` onto this form, scales and tables unchanged."""

    @abstractmethod
    def project(self, dense: Tensor) -> Tensor:
        """What `decode` would return after `store(dense)`, without storing."""

    @property
    @abstractmethod
    def bits_per_weight(self) -> float:
        """Stored bits over the number of weights, scales included."""

    @abstractmethod
    def describe(self) -> str:
        """A few words for tables: `int8 per channel`."""

    def forward(self) -> Tensor:
        if self.latent is None:
            return self.decode()
        return _Projected.apply(self.latent, self)

    def right_inverse(self, dense: Tensor) -> tuple[()]:
        """Nothing of the dense tensor is kept: what is stored lives in this module's buffers."""
        return ()

    def thaw(self) -> None:
        self.latent = nn.Parameter(self.decode())

    def freeze(self) -> None:
        if self.latent is not None:
            self.store(self.latent.detach())
            self.register_parameter("latent", None)


class _Projected(torch.autograd.Function):
    """The projection of a latent tensor, with the gradient of the tensor itself."""

    @staticmethod
    def forward(ctx, latent: Tensor, encoding: Encoding) -> Tensor:  # type: ignore[no-untyped-def]
        return encoding.project(latent)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad, None


class Affine(Encoding):
    """Whole codes of 8 or 4 bits times a scale per tensor, per slice of `axis` or per block of a row.

    Where `mask` is given, weights outside it stay zero through training. It is not stored: codes say zero already.
    """

    codes: Tensor
    scale: Tensor
    mask: Tensor | None

    def __init__(self, dense: Tensor, scale: Tensor, *, bits: int, axis: int = 0, block: int = 0) -> None:
        """Codes are the nearest to `dense` on the grid of `scale`; see `dequantize` for the shapes."""
        super().__init__()
        self.bits, self.axis, self.block = bits, axis, block
        self.shape = tuple(dense.shape)
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("codes", torch.empty(0, dtype=torch.int8))
        self.mask = None  # no buffer: an exported program would hold it
        self.store(dense.detach())

    def _round(self, dense: Tensor) -> Tensor:
        top = 2 ** (self.bits - 1) - 1
        low = -top if self.bits == 8 else -top - 1
        scales = spread(self.scale, self.shape, self.axis, self.block)
        kept = dense if self.mask is None else dense * self.mask
        return (grouped(kept, self.block) / scales).round_().clamp_(low, top)

    def store(self, dense: Tensor) -> None:
        codes = self._round(dense).to(torch.int8).reshape(self.shape)
        self.codes = pack4(codes) if self.bits == 4 else codes

    def project(self, dense: Tensor) -> Tensor:
        scales = spread(self.scale, self.shape, self.axis, self.block)
        return self._round(dense).mul_(scales).reshape(self.shape)

    def decode(self) -> Tensor:
        return torch.ops.featherweight.dequantize(
            self.codes, self.scale, list(self.shape), self.axis, self.block, self.bits
        )

    @property
    def bits_per_weight(self) -> float:
        stored = self.codes.numel() * self.codes.element_size() + self.scale.numel() * self.scale.element_size()
        return 8 * stored / max(1, torch.Size(self.shape).numel())

    def describe(self) -> str:
        grain = f"blocks of {self.block}" if self.block else "per tensor" if self.axis < 0 else "per channel"
        return f"int{self.bits} {grain}"


class InputQuantizer(nn.Module):
    """Rounds a layer's input to unsigned bytes with one fixed scale and zero point."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, low: float, high: float) -> None:
        """The grid spans `low` to `high`, widened to hold zero exactly (padding must stay zero)."""
        super().__init__()
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255, torch.finfo(torch.float32).tiny * 256)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(round(-low / scale), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.featherweight.fake_quantize(x, self.scale, self.zero_point)


class DynamicQuantizer(nn.Module):
    """Rounds a layer's input to unsigned bytes that span each input's own range."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.featherweight.dynamic_quantize(x)


def affine_scale(
    dense: Float[Tensor, "*shape"], bits: int, axis: int, block: int = 0, search: bool = False
) -> Float[Tensor, "*scales"]:
    """The scale of `Affine` for `dense`: from its largest magnitudes, or the one with the least squared error.

    The search tries the scale that covers everything and 40 smaller ones, down to 40 % of it, so that a few large
    weights may be clipped for the sake of the many (Banner et al. 2019, arXiv:1810.05723, in spirit).

    Args:
        dense: the weights.
        bits: 8 or 4.
        axis: -1 for one scale in all, else the dimension with one scale a slice; 0 with blocks.
        block: consecutive weights of a row that share a scale; must divide the row. 0 for none.
        search: whether to search.
    """
    rows = _rows(dense, axis, block)
    top = 2 ** (bits - 1) - 1
    low = -top if bits == 8 else -top - 1
    full = rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * 256) / top
    best = full
    if search:
        error = _rounding_error(rows, full, low, top)
        for step in range(1, 41):
            scale = full * (1 - 0.015 * step)
            trial = _rounding_error(rows, scale, low, top)
            best = torch.where(trial < error, scale, best)
            error = torch.minimum(error, trial)
    scales = best.squeeze(-1)
    return scales.reshape(()) if axis < 0 else scales


def _rows(dense: Tensor, axis: int, block: int) -> Tensor:
    """`dense` with all that shares a scale along the last dimension."""
    if axis < 0:
        return dense.reshape(-1)
    return grouped(dense, block) if block else dense.movedim(axis, 0).flatten(1)


def _rounding_error(rows: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return ((torch.clamp(torch.round(rows / scale), low, high) * scale - rows) ** 2).sum(-1, keepdim=True)


class Masked(Encoding):
    """Dense values of which some are zero and stay so through training: `latent · mask` is what is trained.

    It makes no file smaller by itself: zeros are stored as zeros. The mask is where values are not zero.
    """

    values: Tensor

    def __init__(self, dense: Tensor, mask: Tensor) -> None:
        """Keeps `dense` where `mask`, bool and of the same shape, is true."""
        super().__init__()
        self.register_buffer("values", dense.detach() * mask)

    @property
    def mask(self) -> Tensor:
        """Which values are kept."""
        return self.values != 0

    def store(self, dense: Tensor) -> None:
        self.values = self.project(dense)

    def project(self, dense: Tensor) -> Tensor:
        return dense * self.mask

    def decode(self) -> Tensor:
        return self.values

    def forward(self) -> Tensor:
        return self.values if self.latent is None else self.project(self.latent)

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.values.element_size()

    def describe(self) -> str:
        return f"{1 - self.mask.float().mean():.0%} zeros"
