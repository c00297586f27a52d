"""How a tensor is stored: encodings of weights, quantizers of activations, and the operators that decode them.

An `Encoding` is a parametrization: the layer stays an ordinary `nn.Linear` or `nn.Conv2d`, and its `weight` is
computed from what is really stored. The dense original is gone. Each encoding decodes through an operator of the
library `featherweight`, which survives `torch.export`, so that a target sees what is stored and not what was
computed from it. Which scale or code is best is a pass's affair; which layer carries it, `surgery`'s.

`Affine`:  ŵ = s · q (+ m where there are offsets),  q whole of 2 to 8 bits, −2^(b−1) ≤ q < 2^(b−1), one s (and m) per
tensor, per slice of an axis or per block (Jacob et al. 2018, arXiv:1712.05877, equation 1; m = −s · z).
`Codebook`:  ŵ = t[q], one table t for all weights or one for each index of axis 0
(Han, Mao, Dally 2016, arXiv:1510.00149, section 3.1).
`Companded`:  ŵ = s · sign(q) · g(|q| / (2^(b−1) − 1)), g the inverse of the curve whose values are stored, one s per
slice of axis 0 (Yamamoto 2021, arXiv:2103.07156, section 3, with a curve that is not learned).
`Scaled`:  ŵ = s · v, v a narrow float or an int8 (s is 1 / c, where the weight times c was stored).
`InputQuantizer`:  x̂ = s · (clamp(round(x / s) + z, 0, 255) − z)  (the same equation, z free).
`DynamicQuantizer`:  the same with s and z from the smallest and largest value of each input.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int8, Int64, Shaped, UInt8
from torch import Tensor, nn

PACKED_BITS = 4  # codes of so many bits or fewer are stored two to a byte, others one
SMALLEST_BLOCK = 16  # weights; below it the scales weigh more than the codes save
LEAST_APART = 1e-3  # codes of a row from their mean, squared and summed: those that are alike give no slope
ALTERNATIONS = 8
PART = 1 << 16  # numbers, of which a few copies fit into a processor's cache

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
        codes: int8 of `shape` for 5 to 8 bits; the bytes of `pack4` for 2 to 4.
        scale: () for axis −1; (shape[axis],) without blocks; (shape[0], rest / block) with them.
        axis: the dimension that has one scale a slice; −1 for one scale in all; 0 with blocks.
        block: how many consecutive codes of a row share a scale; 0 for none.
        bits: 2 to 8.
    """
    if bits <= PACKED_BITS:
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
    """Whole codes of 2 to 8 bits times a scale per tensor, per slice of `axis` or per block of a row.

    Up to 4 bits two codes are stored to a byte, from 5 on one: a file of 3 bits is as large as one of 4, and one of 5
    as large as one of 8, unless something compresses the codes further.

    Where `mask` is given, weights outside it stay zero through training. It is not stored: codes say zero already.
    Where `columns` is given, (in,), what is decoded is multiplied by it along dimension 1, at the price of a
    multiplication wherever the runtime decodes the weight. Where `offset` is given, of the shape of `scale`, it is what
    code 0 stands for, and no weight is zero but by chance: it does not go with a mask.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    columns: Tensor | None
    mask: Tensor | None

    def __init__(
        self,
        dense: Tensor,
        scale: Tensor,
        *,
        bits: int,
        axis: int = 0,
        block: int = 0,
        offset: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        """Codes are the nearest to `dense` on the grid of `scale`; see `dequantize` for the shapes."""
        super().__init__()
        self.bits, self.axis, self.block = bits, axis, block
        self.shape = tuple(dense.shape)
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("offset", None if offset is None else offset.detach().clone())
        wide = None if columns is None else columns.detach().view(1, -1, *[1] * (dense.dim() - 2)).clone()
        self.register_buffer("columns", wide)
        self.register_buffer("codes", torch.empty(0, dtype=torch.int8))
        self.mask = None  # no buffer: an exported program would hold it
        self.store(dense.detach())

    def _round(self, dense: Tensor) -> Tensor:
        kept = dense if self.mask is None else dense * self.mask
        kept = grouped(kept if self.columns is None else kept / self.columns, self.block)
        kept = kept if self.offset is None else kept - self._spread(self.offset)
        return (kept / self._spread(self.scale)).round_().clamp_(*grid(self.bits))

    def _spread(self, scale: Tensor) -> Tensor:
        return spread(scale, self.shape, self.axis, self.block)

    def store(self, dense: Tensor) -> None:
        codes = self._round(dense).to(torch.int8).reshape(self.shape).contiguous()
        self.codes = pack4(codes) if self.bits <= PACKED_BITS else codes

    def project(self, dense: Tensor) -> Tensor:
        return self._finished(self._round(dense).mul_(self._spread(self.scale)).reshape(self.shape))

    def decode(self) -> Tensor:
        dense = torch.ops.featherweight.dequantize(
            self.codes, self.scale, list(self.shape), self.axis, self.block, self.bits
        )
        return self._finished(dense)

    def _finished(self, dense: Tensor) -> Tensor:
        """Codes times their scales with all that comes after."""
        if self.offset is not None:
            dense = (grouped(dense, self.block) + self._spread(self.offset)).reshape(self.shape)
        return dense if self.columns is None else dense * self.columns

    @property
    def bits_per_weight(self) -> float:
        stored = [tensor for tensor in (self.codes, self.scale, self.offset, self.columns) if tensor is not None]
        return 8 * sum(tensor.nbytes for tensor in stored) / max(1, torch.Size(self.shape).numel())

    def describe(self) -> str:
        grain = f"blocks of {self.block}" if self.block else "per tensor" if self.axis < 0 else "per channel"
        beside = f"{'' if self.offset is None else ' with offsets'}{'' if self.columns is None else ', columns scaled'}"
        return f"int{self.bits} {grain}{beside}"


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


def grid(bits: int) -> tuple[int, int]:
    """The smallest and the largest code of `Affine`. Those of 8 bits lie alike round zero, as int8 kernels want them.

    >>> grid(8), grid(4), grid(2)
    ((-127, 127), (-8, 7), (-2, 1))
    """
    top = 2 ** (bits - 1) - 1
    return (-top if bits == 8 else -top - 1), top


def fitting_block(row: int, block: int) -> int:
    """The size of blocks for rows of `row` weights: the largest no larger than `block`, else up to twice as large.

    They divide the row, hold 16 weights at least, and an even number of them: two codes lie in a byte, and OpenVINO
    (2026.4) computes something else where a block ends in the middle of one. 0 (no blocks) where there is none.

    >>> fitting_block(384, 128), fitting_block(96, 64), fitting_block(184, 32), fitting_block(27, 32)
    (128, 48, 46, 0)
    """
    sizes = [size for size in range(SMALLEST_BLOCK, min(row, 2 * block) + 1, 2) if row % size == 0]
    return max((size for size in sizes if size <= block), default=min(sizes, default=0))


def affine_scale(
    dense: Float[Tensor, "*shape"], bits: int, axis: int, block: int = 0, search: bool = False
) -> Float[Tensor, "*scales"]:
    """The scale of `Affine` for `dense`: from its largest magnitudes, or the one with the least squared error.

    The search tries the scale that covers everything and 40 smaller ones, down to 40 % of it (10 % for 2 and 3 bits),
    so that a few large weights may be clipped for the sake of the many (Banner et al. 2019, arXiv:1810.05723, in
    spirit).

    Args:
        dense: the weights.
        bits: 2 to 8.
        axis: -1 for one scale in all, else the dimension with one scale a slice; 0 with blocks.
        block: consecutive weights of a row that share a scale; must divide the row. 0 for none.
        search: whether to search.
    """
    rows = _rows(dense, axis, block)
    form = partial(closest_scale, bits=bits) if search else partial(covering_scale, bits=bits)
    scales = in_parts(rows, form).squeeze(-1)
    return scales.reshape(()) if axis < 0 else scales


def in_parts(
    rows: Float[Tensor, "*rows n"], found: Callable[[Float[Tensor, "_ n"]], Float[Tensor, "_ k"]]
) -> Float[Tensor, "*rows k"]:
    """What is `found` of each row, of some rows at a time, so that what it takes stays in a processor's cache."""
    parts = rows.reshape(-1, rows.shape[-1]).split(max(1, PART // max(1, rows.shape[-1])))
    return torch.cat([found(part) for part in parts]).reshape(*rows.shape[:-1], -1)


def covering_scale(rows: Float[Tensor, "rows n"], bits: int) -> Float[Tensor, "rows 1"]:
    """The smallest scale of each row with which nothing is clipped.

    >>> covering_scale(torch.tensor([[3.5, -7.0]]), bits=4)
    tensor([[1.]])
    """
    return rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * 256) / grid(bits)[1]


def closest_scale(rows: Float[Tensor, "rows n"], bits: int) -> Float[Tensor, "rows 1"]:
    """That with the least squared error, of the covering one and 40 smaller ones.

    >>> closest_scale(torch.tensor([[3.5] * 99 + [-7.0]]), bits=2)
    tensor([[3.5350]])
    """
    best = full = covering_scale(rows, bits)
    error = _rounding_error(rows, full, bits)
    smaller = 0.015 if bits >= 4 else 0.0225
    for step in range(1, 41):
        scale = full * (1 - smaller * step)
        trial = _rounding_error(rows, scale, bits)
        best = torch.where(trial < error, scale, best)
        error = torch.minimum(error, trial)
    return best


def _rows(dense: Tensor, axis: int, block: int) -> Tensor:
    """`dense` with all that shares a scale along the last dimension."""
    if axis < 0:
        return dense.reshape(-1)
    return grouped(dense, block) if block else dense.movedim(axis, 0).flatten(1)


def line(
    x: Float[Tensor, "rows n"], y: Float[Tensor, "rows n"]
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """Slope and intercept of the line through the points of each row with the least squared error; slope 0 for one x.

    >>> line(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 3.0, 5.0]]))
    (tensor([[2.]]), tensor([[1.]]))
    """
    count, across, up = x.shape[1], x.mean(1, True), y.mean(1, True)
    apart = (x.square().sum(1, True) - count * across.square()).clamp(min=LEAST_APART)
    slope = ((x * y).sum(1, True) - count * across * up) / apart
    return slope, up - slope * across


def spanning_grid(rows: Float[Tensor, "rows n"], bits: int) -> Float[Tensor, "rows 2"]:
    """Scale and offset of the grid of each row from its smallest to its largest number.

    >>> spanning_grid(torch.tensor([[1.0, 16.0]]), bits=4)
    tensor([[1., 9.]])
    """
    (low, top), (smallest, largest) = grid(bits), rows.aminmax(dim=-1, keepdim=True)
    scale = ((largest - smallest) / (top - low)).clamp(min=torch.finfo(torch.float32).tiny * 256)
    return torch.cat([scale, smallest - low * scale], -1)


def on_grid(rows: Float[Tensor, "rows n"], found: Float[Tensor, "rows 2"], bits: int) -> Float[Tensor, "rows n"]:
    """Each number at the nearest place of its row's grid, a scale and an offset.

    >>> on_grid(torch.tensor([[1.4, 15.6]]), torch.tensor([[1.0, 9.0]]), bits=4)
    tensor([[ 1., 16.]])
    """
    scale, offset = found[:, :1], found[:, 1:]
    return ((rows - offset) / scale).round_().clamp_(*grid(bits)).mul_(scale).add_(offset)


def closest_grid(rows: Float[Tensor, "rows n"], bits: int) -> Float[Tensor, "rows 2"]:
    """Scale and offset of each row with next to the least squared error.

    They follow from the codes and the codes from them by turns, from the grid that spans all; where that ends further
    off than the closest symmetric grid, it is that.
    """
    symmetric = closest_scale(rows, bits)
    best = torch.cat([symmetric, torch.zeros_like(symmetric)], -1)
    least = _rounding_error(rows, symmetric, bits)
    found = spanning_grid(rows, bits)
    for _ in range(ALTERNATIONS):
        met = on_grid(rows, found, bits)
        error = (met - rows).square_().sum(-1, keepdim=True)
        best, least = torch.where(error < least, found, best), torch.minimum(error, least)
        scale, offset = found[:, :1], found[:, 1:]
        slope, intercept = line(met.sub_(offset).div_(scale), rows)
        found = torch.cat([torch.where(slope > 0, slope, scale), intercept], -1)
    return best


def _rounding_error(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (rows / scale).round_().clamp_(*grid(bits)).mul_(scale).sub_(rows).square_().sum(-1, keepdim=True)


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


# ------------------------------------------------------------------------------------------------ codebooks


def unpack_unsigned4(packed: UInt8[Tensor, " bytes"], count: int) -> UInt8[Tensor, " count"]:
    """The first `count` codes, 0 to 15, of bytes that hold two each, the first in the low half.

    >>> unpack_unsigned4(torch.tensor([241, 7], dtype=torch.uint8), 3)
    tensor([ 1, 15,  7], dtype=torch.uint8)
    """
    return torch.stack([packed & 0xF, packed >> 4], dim=1).flatten()[:count]


def nearest(x: Float[Tensor, "rows n"], table: Float[Tensor, "rows entries"]) -> Int64[Tensor, "rows n"]:
    """Which entry of its row's table, in ascending order, is nearest to each value; the lower one of two as near.

    >>> nearest(torch.tensor([[-9.0, 0.4, 0.6, 9.0]]), torch.tensor([[-1.0, 0.0, 1.0]]))
    tensor([[0, 1, 2, 2]])
    """
    middle = (table[:, 1:] + table[:, :-1]) / 2
    return torch.searchsorted(middle.contiguous(), x.contiguous())


@torch.library.custom_op("featherweight::look_up", mutates_args=())
def look_up(codes: Tensor, table: Tensor, scale: Tensor | None, shape: list[int], entries: int, bits: int) -> Tensor:
    """What stands in a table under each code, in single precision, as a dense tensor of `shape`.

    Args:
        codes: uint8 of `shape` for 8 bits; the bytes of `pack4` for 4.
        table: (tables * entries,), one table after the other. All weights in order, as many read the first table as
            read the next.
        scale: (tables, 1), by which the values of each table are multiplied, or None.
        shape: of what is returned.
        entries: of each table.
        bits: that a code takes: 8 or 4.
    """
    if bits == 4:
        codes = unpack_unsigned4(codes, torch.Size(shape).numel())
    values = table.float().view(-1, entries)
    values = values if scale is None else values * scale
    places = codes.reshape(len(values), -1).to(torch.int64)
    return values.gather(1, places).view(shape)


@look_up.register_fake
def _(codes: Tensor, table: Tensor, scale: Tensor | None, shape: list[int], entries: int, bits: int) -> Tensor:
    return table.new_empty(shape, dtype=torch.float32)


class Codebook(Encoding):
    """Codes that name entries of a table, one table for all weights or one for each so many in a row.

    A code takes half a byte where a table has 16 entries or fewer, else a byte. Where `mask` is given, weights outside
    it stay zero through training: the tables must hold a zero.
    """

    codes: Tensor
    table: Tensor
    scale: Tensor | None
    mask: Tensor | None

    def __init__(self, dense: Tensor, table: Tensor, scale: Tensor | None = None) -> None:
        """Codes name the entries nearest to `dense`.

        Args:
            dense: the tensor.
            table: (tables, values) or (values,), at most 256 values each. The first table is that of the first
                dense.numel() / tables weights.
            scale: (tables, 1), by which the values of each table are multiplied.
        """
        super().__init__()
        self.shape, self.dtype = tuple(dense.shape), dense.dtype
        self.entries = table.shape[-1]
        self.bits = 4 if self.entries <= 16 else 8
        ascending = table.detach().float().sort(-1).values.to(table.dtype)
        self.register_buffer("table", ascending.flatten())
        self.register_buffer("scale", None if scale is None else scale.detach().clone())
        self.register_buffer("codes", torch.empty(0, dtype=torch.uint8))
        self.mask = None  # no buffer: an exported program would hold it
        self.store(dense.detach())

    def _tables(self) -> Tensor:
        values = self.table.float().view(-1, self.entries)
        return values if self.scale is None else values * self.scale

    def _codes(self, dense: Tensor, tables: Tensor) -> Tensor:
        kept = dense if self.mask is None else dense * self.mask
        return nearest(kept.float().reshape(len(tables), -1), tables)

    def store(self, dense: Tensor) -> None:
        codes = self._codes(dense, self._tables()).to(torch.uint8).reshape(self.shape)
        self.codes = pack4(codes.view(torch.int8)) if self.bits == 4 else codes

    def project(self, dense: Tensor) -> Tensor:
        tables = self._tables()
        return tables.gather(1, self._codes(dense, tables)).reshape(self.shape).to(self.dtype)

    def decode(self) -> Tensor:
        dense = torch.ops.featherweight.look_up(
            self.codes, self.table, self.scale, list(self.shape), self.entries, self.bits
        )
        return dense if self.dtype == torch.float32 else dense.to(self.dtype)

    @property
    def bits_per_weight(self) -> float:
        stored = (self.codes, self.table, *([] if self.scale is None else [self.scale]))
        return _bits_per_weight(self.shape, *stored)

    def describe(self) -> str:
        return f"codebook of {self.entries} {self._grain()}"

    def _grain(self) -> str:
        row = torch.Size(self.shape[1:]).numel()
        tables = len(self.table) // self.entries
        together = row * self.shape[0] // tables
        if tables == 1:
            return "per tensor"
        if together % row:
            return f"per block of {together}"
        return "per channel" if together == row else f"per {together // row} channels"


def _bits_per_weight(shape: tuple[int, ...], *stored: Tensor) -> float:
    return 8 * sum(t.numel() * t.element_size() for t in stored) / max(1, torch.Size(shape).numel())


# ------------------------------------------------------------------------------------------------ companding


def expanded(u: Float[Tensor, "*shape"], curve: str, strength: float) -> Float[Tensor, "*shape"]:
    """The share, 0 to 1, of the largest magnitude that stands at `u`, 0 to 1, of a uniform grid: a curve's inverse.

    Args:
        u: where on the grid.
        curve: "mu", ((1 + μ)^u − 1) / μ; "power", u^p; "log", 2^(−r · (1 − u)), and 0 at 0.
        strength: μ, the exponent p or the number r of octaves. The larger, the finer the grid near zero.

    >>> [expanded(torch.tensor([0.0, 0.5, 1.0]), *how).tolist() for how in (("mu", 8.0), ("power", 2.0), ("log", 4.0))]
    [[0.0, 0.25, 1.0], [0.0, 0.25, 1.0], [0.0, 0.25, 1.0]]
    """
    if curve == "mu":
        return torch.expm1(u * math.log1p(strength)) / strength
    if curve == "power":
        return u**strength
    return torch.exp2(strength * (u - 1)) * (u > 0)


def magnitudes(curve: str, strength: float, bits: int) -> Float[Tensor, " levels"]:
    """What the codes 0 to 2^(bits−1) − 1 stand for, before the scale: ascending from 0 to 1.

    >>> magnitudes("power", 2.0, 4)[[0, 1, 7]]
    tensor([0.0000, 0.0204, 1.0000])
    """
    top = 2 ** (bits - 1) - 1
    return expanded(torch.arange(top + 1, dtype=torch.float32) / top, curve, strength)


@torch.library.custom_op("featherweight::expand", mutates_args=())
def expand(codes: Tensor, scale: Tensor, shape: list[int], curve: str, strength: float, bits: int) -> Tensor:
    """Codes to their place on a curve, times their scales, as a dense tensor of `shape`.

    Args:
        codes: int8 of `shape` for 8 bits; the bytes of `pack4` for 4.
        scale: of a shape that multiplies `shape`.
        shape: of what is returned.
        curve: see `expanded`.
        strength: see `expanded`.
        bits: 8 or 4.
    """
    if bits == 4:
        codes = unpack4(codes, torch.Size(shape).numel()).view(shape)
    levels = magnitudes(curve, strength, bits).to(scale)
    return levels[codes.abs().to(torch.int32)] * codes.sign() * scale


@expand.register_fake
def _(codes: Tensor, scale: Tensor, shape: list[int], curve: str, strength: float, bits: int) -> Tensor:
    return scale.new_empty(shape)


class Companded(Encoding):
    """Whole codes of 8 or 4 bits on a uniform grid of a curve of the weight, and a scale per slice of axis 0.

    Where `mask` is given, weights outside it stay zero through training.
    """

    codes: Tensor
    scale: Tensor
    mask: Tensor | None

    def __init__(self, dense: Tensor, scale: Tensor, *, curve: str, strength: float, bits: int) -> None:
        """Codes stand for the magnitudes nearest to `dense`; `scale` is (dense.shape[0],). See `expanded`."""
        super().__init__()
        self.curve, self.strength, self.bits = curve, float(strength), bits
        self.shape = tuple(dense.shape)
        self.register_buffer("scale", scale.detach().reshape(-1, *[1] * (dense.dim() - 1)).clone())
        self.register_buffer("codes", torch.empty(0, dtype=torch.int8))
        self.mask = None  # no buffer: an exported program would hold it
        self.store(dense.detach())

    def _levels(self) -> Tensor:
        return magnitudes(self.curve, self.strength, self.bits).to(self.scale)

    def _places(self, dense: Tensor, levels: Tensor) -> Tensor:
        kept = dense if self.mask is None else dense * self.mask
        return nearest((kept / self.scale).abs().reshape(1, -1), levels.view(1, -1)).view(self.shape)

    def store(self, dense: Tensor) -> None:
        codes = (self._places(dense, self._levels()) * dense.sign()).to(torch.int8).contiguous()
        self.codes = pack4(codes) if self.bits == 4 else codes

    def project(self, dense: Tensor) -> Tensor:
        levels = self._levels()
        return levels[self._places(dense, levels)] * dense.sign() * self.scale

    def decode(self) -> Tensor:
        return torch.ops.featherweight.expand(
            self.codes, self.scale, list(self.shape), self.curve, self.strength, self.bits
        )

    @property
    def bits_per_weight(self) -> float:
        return _bits_per_weight(self.shape, self.codes, self.scale)

    def describe(self) -> str:
        return f"int{self.bits} companded by {self.curve} {self.strength:g}"


# ------------------------------------------------------------------------------------------------ narrow formats

NARROW = {  # by the names that passes and messages use
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
    "int8": torch.int8,
}


def largest_of(narrow: str) -> float:
    """The largest magnitude that a format is used for: its largest finite number, and 127 for int8.

    >>> [largest_of(narrow) for narrow in ("float16", "float8", "int8")]
    [65504.0, 448.0, 127.0]
    """
    dtype = NARROW[narrow]
    return float(torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max)


@torch.library.custom_op("featherweight::unscale", mutates_args=())
def unscale(values: Tensor, scale: Tensor) -> Tensor:
    """Values of a narrow format times their scales, in the precision of the scales, whose shape multiplies theirs."""
    return values.to(scale.dtype) * scale


@unscale.register_fake
def _(values: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty(values.shape)


class Scaled(Encoding):
    """Values of a narrow format, and the scale that brings them back: one in all or one per slice of axis 0.

    Where `mask` is given, weights outside it stay zero through training.
    """

    values: Tensor
    scale: Tensor
    mask: Tensor | None

    def __init__(self, dense: Tensor, scale: Tensor, *, narrow: str) -> None:
        """Stores `dense` over `scale`, which is () or (dense.shape[0],), in the format `narrow`, see `NARROW`."""
        super().__init__()
        self.narrow, self.per_channel = narrow, scale.dim() > 0
        shape = (-1, *[1] * (dense.dim() - 1)) if self.per_channel else (1,) * dense.dim()
        self.register_buffer("scale", scale.detach().reshape(shape).clone())
        self.register_buffer("values", torch.empty(0, dtype=NARROW[narrow]))
        self.mask = None  # no buffer: an exported program would hold it
        self.store(dense.detach())

    def _narrowed(self, dense: Tensor) -> Tensor:
        kept = dense if self.mask is None else dense * self.mask
        most, dtype = largest_of(self.narrow), NARROW[self.narrow]
        small = (kept / self.scale).clamp(-most, most)  # beyond it a cast may give infinity
        return (small if dtype.is_floating_point else small.round()).to(dtype)

    def store(self, dense: Tensor) -> None:
        self.values = self._narrowed(dense).contiguous()

    def project(self, dense: Tensor) -> Tensor:
        return self._narrowed(dense).to(self.scale.dtype) * self.scale

    def decode(self) -> Tensor:
        return torch.ops.featherweight.unscale(self.values, self.scale)

    @property
    def bits_per_weight(self) -> float:
        return _bits_per_weight(tuple(self.values.shape), self.values, self.scale)

    def describe(self) -> str:
        return f"{self.narrow} scaled per {'channel' if self.per_channel else 'tensor'}"


ON_A_GRID = (Affine, Codebook, Companded, Scaled)  # those that take over the mask of a Masked tensor
