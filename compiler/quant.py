"""Quantization arithmetic, in one place: codes and scales, packing, and the simulated activation rounding.

Shape suffixes: N rows (output features), K reduction (input features), G groups, T tokens, E experts.

Weights are symmetric per group along the **last** dimension of the stored tensor (MobileMoE Eq. 6):
    s = 2 * max|w| / (2^bits - 1),   q = clamp(round(w / s), -2^(bits-1), 2^(bits-1) - 1),   w ~ s * q.
Codes may instead number the levels of a table (`levels.py`): s = max|w| / max|level|, and the nearest level to w / s.
A linear [N, K] is thus grouped along its input; experts stored [E, K, N] are grouped along their output.

Activations are symmetric INT8, one scale per token or one for each block of 32 inputs of a token, rounded half to even:
    a = max|x|,   s = a / 127,   q = clamp(rint(x * (127 / a)), -127, 127)   (q = 0 when a = 0).
The C++ kernels compute exactly this in fp32, so a reference built on `fake_quantize_rows` sees the same integers.
Linears that XNNPACK serves round with a zero point for each row: `asymmetric_rows`, here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from moec.compiler.errors import CompileError
from moec.compiler.levels import Grid

# Work on pieces of about this many elements: whole expert stacks need several times their size in temporaries.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes and scales of one weight. Groups of `group_size` lie along the last dimension of the logical shape.

    codes: bits == 4: uint8 [..., L/2], element 2i in the low nibble, two's complement, or the number of a level; other
    bits from 2 to 8: int8 [..., L], each code in -2^(bits-1) .. 2^(bits-1) - 1.
    scales: float16 or float32 [..., L/group_size]; of either sign.
    zero_points: w = scale * (code - zero), of any real type, [..., L/group_size]; None: w = scale * code.
    levels: the table of `levels.py` whose values the codes number (`w = scale * level`); "" for codes that are numbers.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    group_size: int
    zero_points: torch.Tensor | None = None
    levels: str = ""

    @property
    def grid(self) -> Grid:
        """What the codes stand for."""
        return Grid(self.bits, self.levels)

    @property
    def shape(self) -> tuple[int, ...]:
        last = self.codes.shape[-1] * (2 if self.bits == 4 else 1)
        return (*self.codes.shape[:-1], last)

    def unpacked(self) -> torch.Tensor:
        """int8 values of the codes, of the logical shape: what the scales multiply."""
        return unpacked_codes(self.codes, self.grid)

    def part(self, index: int | slice) -> QuantizedTensor:
        """Along the first dimension, which must not be that of the groups: one expert, or some rows."""
        zeros = None if self.zero_points is None else self.zero_points[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], zero_points=zeros)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """scale * (code - zero), computed in float32, in a new tensor of the logical shape."""
        out = torch.empty(self.shape, dtype=dtype)
        rows_NL, codes, scales = _rows(out), _rows(self.codes), _rows(self.scales)
        zeros = None if self.zero_points is None else _rows(self.zero_points)
        for piece in _pieces(rows_NL):
            q = unpacked_codes(codes[piece], self.grid)
            grouped = q.to(torch.float32).unflatten(-1, (-1, self.group_size))
            if zeros is not None:
                grouped -= zeros[piece].to(torch.float32).unsqueeze(-1)
            grouped *= scales[piece].to(torch.float32).unsqueeze(-1)
            rows_NL[piece] = grouped.flatten(-2)
        return out


def _rows(t: torch.Tensor) -> torch.Tensor:
    """All leading dimensions as one: [N, L]."""
    return t.reshape(-1, t.shape[-1])


def _pieces(rows_NL: torch.Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, rows_NL.shape[-1]))
    return (slice(i, i + step) for i in range(0, rows_NL.shape[0], step))


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """int8 codes in [-8, 7], [..., L] -> uint8 [..., L/2]; element 2i goes to the low nibble."""
    u = q.to(torch.uint8) & 0xF
    return u[..., 0::2] | (u[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_int4`: int8 [..., L]."""
    signed = packed.view(torch.int8)
    # shifts of int8 wrap to the left and keep the sign to the right: that sign-extends each nibble
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2)


def unpacked_codes(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """int8 values [..., L] of codes as a `QuantizedTensor` holds them."""
    if grid.levels:
        return grid.values(torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2))
    return unpack_int4(codes) if grid.bits == 4 else codes


def widened(tensor: QuantizedTensor, grid: Grid, group_size: int) -> QuantizedTensor:
    """The same values on a grid that has them all, in groups that divide those of `tensor`."""
    codes, scales, zeros = tensor.codes, tensor.scales, tensor.zero_points
    if grid != tensor.grid:
        codes = packed_codes(tensor.unpacked(), grid)
    times = tensor.group_size // group_size
    if times > 1:
        scales = scales.repeat_interleave(times, -1)
        zeros = None if zeros is None else zeros.repeat_interleave(times, -1)
    return QuantizedTensor(codes, scales, grid.bits, group_size, zeros, grid.levels)


def quantize_weight(
    w: torch.Tensor, *, bits: int, group_size: int, scale_dtype: torch.dtype = torch.float16, levels: str = ""
) -> QuantizedTensor:
    """Eq. 6, per group along the last dimension. The codes are rounded against the scale as it is stored.

    levels: a table of `levels.py`, for codes of four bits; the largest magnitude then becomes its largest, and
    one of the other sign the nearest that there is.

    A group whose scale is too small for `scale_dtype` gets scale 0 and codes 0 (float16: INT4 below 2e-7 in
    magnitude, levels of iq4_nl below 4e-6).
    Raises CompileError for values that are not finite, whose scale `scale_dtype` cannot hold, or where more than half
    of the groups that are not zero would become so.
    """
    if w.shape[-1] % group_size:
        raise ValueError(f"last dimension {w.shape[-1]} is not a multiple of the group size {group_size}")
    grid = Grid(bits, levels)
    width = w.shape[-1]
    codes = torch.empty(
        (*w.shape[:-1], width // 2 if bits == 4 else width), dtype=torch.uint8 if bits == 4 else torch.int8
    )
    scales = torch.empty((*w.shape[:-1], width // group_size), dtype=scale_dtype)
    rows_NL, rows_codes, rows_scales = _rows(w), _rows(codes), _rows(scales)
    present = lost = 0
    for piece in _pieces(rows_NL):
        grouped = rows_NL[piece].to(torch.float32).unflatten(-1, (-1, group_size))
        magnitude = grouped.abs().amax(-1)
        scale = (2.0 * magnitude / grid.span).to(scale_dtype)
        _check_scales(magnitude, scale)
        present += int((magnitude > 0).sum())
        lost += int(((magnitude > 0) & (scale == 0)).sum())
        divisor = scale.to(torch.float32).unsqueeze(-1)
        q = grid.nearest_(torch.where(divisor > 0, grouped / divisor, 0.0)).to(torch.int8).flatten(-2)
        rows_scales[piece] = scale
        rows_codes[piece] = packed_codes(q, grid)
    _check_lost(lost, present)
    return QuantizedTensor(codes, scales, bits, group_size, levels=levels)


def stored_scales(w: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Scales [..., G] of a weight [..., L] as they are stored. CompileError for those that `dtype` cannot hold."""
    stored = scales.to(dtype)
    if not torch.isfinite(stored).all():
        _check_scales(w.abs().amax(), stored)
    return stored


def packed_codes(q: torch.Tensor, grid: Grid) -> torch.Tensor:
    """int8 values of the grid [..., L] as the codes that a `QuantizedTensor` holds."""
    return pack_int4(grid.index(q)) if grid.bits == 4 else q


def rounded_to(
    w: torch.Tensor, scales: torch.Tensor, *, grid: Grid, scale_dtype: torch.dtype = torch.float16
) -> QuantizedTensor:
    """The nearest codes to `w` [..., L] under given scales [..., G] of either sign; a scale of 0 gives those of 0.

    The codes are rounded against the scales as they are stored. CompileError as `stored_scales`, and where more than
    half of the scales that are not zero become so.
    """
    stored = stored_scales(w, scales, scale_dtype)
    _check_lost(int(((scales != 0) & (stored == 0)).sum()), int((scales != 0).sum()))
    group_size = w.shape[-1] // scales.shape[-1]
    codes = torch.empty(w.shape, dtype=torch.int8)
    rows_NL, rows_codes, rows_scales = _rows(w), _rows(codes), _rows(stored)
    for piece in _pieces(rows_NL):
        divisor = rows_scales[piece].to(torch.float32).unsqueeze(-1)
        grouped = rows_NL[piece].to(torch.float32).unflatten(-1, (-1, group_size))
        q = grid.nearest_(torch.where(divisor == 0, 0.0, grouped / divisor))
        rows_codes[piece] = q.to(torch.int8).flatten(-2)
    return QuantizedTensor(packed_codes(codes, grid), stored, grid.bits, group_size, levels=grid.levels)


def _check_lost(lost: int, present: int) -> None:
    if 2 * lost > present:
        raise CompileError(
            f"cannot quantize a weight most of which is too small: {lost} of {present} groups would become zero",
            remedy="check the checkpoint's scale, or keep this role in fp32",
        )


def _check_scales(magnitude: torch.Tensor, scale: torch.Tensor) -> None:
    if not scale.numel() or torch.isfinite(scale).all():
        return
    worst = float(magnitude.max())  # NaN wins in max
    kind = str(scale.dtype).removeprefix("torch.")
    what = (
        f"magnitude {worst:.3g}, whose scale does not fit {kind}" if 0 < worst < float("inf") else "values not finite"
    )
    raise CompileError(f"cannot quantize a weight with {what}", remedy="check the checkpoint for a diverged tensor")


ACTIVATION_BLOCK = 32  # the only block that kernels have (kernels/core/format.h: kActivationBlock)


def quotient(number: float, x: torch.Tensor) -> torch.Tensor:
    """number / x as kernels compute it, with one rounding: `number / x` of a tensor is number * (1 / x) in torch."""
    return torch.full_like(x, number) / x


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 along the last dimension: (q as float32 integers [..., K], scale [..., 1])."""
    x = x.to(torch.float32)
    amax = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(amax > 0, quotient(127.0, amax), 0.0)
    return (x * inverse).round().clamp(-127, 127), amax / 127.0


def fake_quantize_rows(x: torch.Tensor, block: int = 0) -> torch.Tensor:
    """`x` [..., K] after INT8 rounding, as a kernel computes with it: one scale for each `block` values along K (the
    last block may be shorter), or with 0 one for the whole row."""
    width = x.shape[-1]
    if not block:
        q, scale = quantize_rows(x)
        return q * scale
    missing = -width % block
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
    q, scale = quantize_rows(padded.unflatten(-1, (-1, block)))
    seen = (q * scale).flatten(-2)
    return seen[..., :width] if missing else seen


def asymmetric_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """INT8 with a zero point along the last dimension, as XNNPACK's qd8 operators quantize their input.

    Returns (q as float32 integers [..., K], scale [..., 1], zero point [..., 1]); x ~ scale * (q - zero). The range
    always contains 0, which is exact. The zero point is derived from the end of the range that has the larger error.
    """
    x = x.to(torch.float32)
    low, high = x.amin(-1, keepdim=True).clamp(max=0.0), x.amax(-1, keepdim=True).clamp(min=0.0)
    inverse = torch.where(low == high, 1.0, quotient(255.0, high - low))
    low, high = low * inverse, high * inverse
    zero = torch.where((-128.0 + low) + (127.0 + high) > 0, -128.0 - low, 127.0 - high).clamp(-128, 127).round()
    return ((x * inverse).round() + zero).clamp(-128, 127), 1.0 / inverse, zero


def fake_quantize_rows_asymmetric(x: torch.Tensor) -> torch.Tensor:
    """`x` after the rounding of an XNNPACK qd8 operator."""
    q, scale, zero = asymmetric_rows(x)
    return (q - zero) * scale
