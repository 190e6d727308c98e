"""`Quantizer`: the interface of quantization methods, the registry that finds them, and the codes of one weight.

A method is a file in `compiler/quantizers/` that holds `QUANTIZER`, or an entry point of the group `moec.quantizers`
whose value is such an object. Nothing lists them. Its name is what a spec says: `quantization: {method: rtn}`.

Shape suffixes: N rows (outputs), K reduction (inputs), T tokens; R, L rows and columns of the stored codes, whose
groups lie along L.
"""

from __future__ import annotations

import copy
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from functools import cache
from importlib.metadata import entry_points
from typing import ClassVar, Self

import torch
from torch import Tensor

from moec.compiler.errors import CompileError, UserError
from moec.compiler.quant import QuantizedTensor, widened
from moec.compiler.spec.methods import GROUP, PACKAGE, method_names, own_methods
from moec.compiler.spec.quantization import WeightScheme
from moec.compiler.weights import CodeFormat, LazyWeight, Orientation, StoredCodes, filled


class Inputs:
    """What calibration has seen of the inputs of one weight (or one expert): tokens, and the energy of each input.

    tokens: rows seen; forced: how many of them the router did not send here. energy_K: sum of squares, float64.
    """

    def __init__(self, width: int) -> None:
        self.tokens = self.forced = 0
        self.energy_K = torch.zeros(width, dtype=torch.float64)

    def add(self, x_TK: Tensor, *, forced: bool = False) -> None:
        """Rows of inputs, float32."""
        self.tokens += x_TK.shape[0]
        self.forced += x_TK.shape[0] if forced else 0
        self.energy_K += x_TK.square().sum(0, dtype=torch.float64)

    def divided(self, factors_K: Tensor) -> Self:
        """The statistics of the same inputs divided by factors."""
        other = copy.copy(self)
        other.energy_K = self.energy_K / factors_K.double().square()
        return other


_BANDS = 4  # of rows of the moments, of which only what is right of the diagonal is computed: 5/8 of the products


class Moments(Inputs):
    """With the second moments of the inputs: moments_KK = sum x x^T, float32."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self._upper_KK = torch.zeros(width, width)
        self._derived: dict[Hashable, Tensor] = {}

    @property
    def moments_KK(self) -> Tensor:
        """Whole and symmetric."""
        return self.derived("moments", lambda: self._upper_KK.triu() + self._upper_KK.triu(1).t())

    def derived(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """The result of `compute` on these moments, cached under `key` until more inputs are added. Do not change
        it."""
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]

    def add(self, x_TK: Tensor, *, forced: bool = False) -> None:
        super().add(x_TK, forced=forced)
        self._derived.clear()
        width = len(self._upper_KK)
        step = -(-width // _BANDS)
        for a in range(0, width, step):
            b = min(a + step, width)
            self._upper_KK[a:b, a:].addmm_(x_TK[:, a:b].t(), x_TK[:, a:])

    def divided(self, factors_K: Tensor) -> Self:
        other = super().divided(factors_K)
        other._upper_KK = self._upper_KK / (factors_K[:, None] * factors_K)
        other._derived = {}
        return other


class Quantizer(ABC):
    """A method: from floats to codes of a given scheme.

    observes: the class that collects a weight's inputs. With one, the model is run on calibration text and every weight
    (every expert) gets an object of the class; None needs no text.
    balances: whether channels are scaled first, where that is exact (see `analysis/calibration/balance.py`).
    refines: the method whose codes this one begins with; their scales are then fitted to the predictions of the float
    model (`analysis/calibration/distill.py`).
    by_row: whether the codes of an output depend only on its own weights and the inputs. Matrices with the same inputs
    are then quantized as one, which is faster.
    """

    observes: ClassVar[type[Inputs] | None] = None
    balances: ClassVar[bool] = False
    by_row: ClassVar[bool] = False
    refines: ClassVar[str | None] = None

    @abstractmethod
    def quantize(self, w_RL: Tensor, scheme: WeightScheme, inputs: Inputs | None) -> QuantizedTensor:
        """Codes of one matrix, float32 [R, L], in groups along L.

        L is the reduction when `scheme.axis` is `in`, else the outputs (then R is the reduction). `inputs` describes
        the reduction; it is None when the method observes nothing.
        """


@cache
def find_quantizer(name: str) -> Quantizer:
    """The method called `name`. UserError if there is none, or if that of another distribution cannot be used."""
    if name in own_methods():
        found: Quantizer = importlib.import_module(f"{PACKAGE}.{name}").QUANTIZER
        return found
    point = next((p for p in entry_points(group=GROUP) if p.name == name), None)
    if point is None:
        known = ", ".join(method_names())
        raise UserError(f"there is no quantization method {name!r}", remedy=f"known here: {known}")
    owner = point.dist.name if point.dist is not None else "an unknown distribution"
    place, remedy = f"entry point {GROUP}: {name}", f"repair or uninstall {owner}"
    try:
        loaded = point.load()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{point.value} of {owner} failed: {lines[0][:200]}", place=place, remedy=remedy) from error
    if not isinstance(loaded, Quantizer):
        what = f"{point.value} of {owner} is {type(loaded).__name__}, not a Quantizer"
        raise UserError(what, place=place, remedy=remedy)
    return loaded


GROUP_SIZES = (32, 64, 128, 256)  # those that a spec takes


def format_of(scheme: WeightScheme) -> CodeFormat:
    """The format of codes under a scheme."""
    return CodeFormat(scheme.bits, scheme.group_size, levels=scheme.levels)


def last_axis(orientation: Orientation) -> str:
    """What lies along the last dimension of a weight: its reduction (`in`) or its outputs (`out`)."""
    return "in" if orientation == "out_in" else "out"


def check_stored(stored: StoredCodes, scheme: WeightScheme, orientation: Orientation, name: str | None) -> None:
    """CompileError unless `stored` is what `scheme` wants, or may be widened to it.

    Quantizing a quantized weight again loses what its training was for, and is never done silently.
    """
    along = last_axis(orientation) if not stored.transposed else "out" if orientation == "out_in" else "in"
    wanted = format_of(scheme)
    if along == scheme.axis and (stored.format == wanted or (stored.widens and wanted.holds(stored.format))):
        return
    raise CompileError(
        f"the checkpoint holds {stored.format} along {along}, the spec asks for {wanted} along {scheme.axis}",
        place=name,
        remedy="make the spec's quantization the checkpoint's, as `moec checkpoint spec` writes it, or compile from a "
        "checkpoint of floats",
    )


def check_width(shape: tuple[int, ...], scheme: WeightScheme, orientation: Orientation, name: str | None) -> None:
    """CompileError unless the features along the scheme's axis are whole groups."""
    width, other = shape[-1], shape[-2]
    if last_axis(orientation) != scheme.axis:
        width, other = other, width
    if width % scheme.group_size:
        raise CompileError(
            f"{width} features along {scheme.axis} are not a multiple of the group size {scheme.group_size}",
            place=name,
            remedy=_width_remedy(width, other, scheme, is_stack=len(shape) == 3),
        )


def _width_remedy(width: int, other: int, scheme: WeightScheme, *, is_stack: bool) -> str:
    """What fits such a width: smaller groups, for stacked experts the other axis, else no quantization of the role."""
    fits = [size for size in GROUP_SIZES if width % size == 0]
    if fits:
        return f"set group_size {max(fits)} for this role"
    if is_stack and other % scheme.group_size == 0:
        axis = "out" if scheme.axis == "in" else "in"
        return f"set `expert_group_axis: {axis}`, whose {other} features are; or this role to fp32"
    return f"no group size divides it ({min(GROUP_SIZES)} is the least): set this role to fp32"


def codes_of(
    weight: LazyWeight,
    scheme: WeightScheme,
    *,
    orientation: Orientation = "out_in",
    name: str | None = None,
    method: str = "rtn",
) -> QuantizedTensor:
    """The codes and scales of `weight` under `scheme`: those that it has, or new ones by `method` where it has none.

    Groups lie along the last dimension of the result, so the result is transposed in its last two dimensions where
    `scheme.axis` is the other one ([E, N, K] of experts [E, K, N] that are grouped along in).

    CompileError for codes of another scheme, for a width that is not a multiple of the group size, and for a method
    that needs calibration.
    """
    if weight.stored is not None:
        check_stored(weight.stored, scheme, orientation, name)
        return widened(weight.stored.load(), scheme.grid, scheme.group_size)
    check_width(weight.shape, scheme, orientation, name)
    quantizer = find_quantizer(method)
    if quantizer.observes is not None:
        raise CompileError(f"the method {method} needs inputs of this weight, and nothing calibrated it", place=name)
    w = weight.load()
    if last_axis(orientation) != scheme.axis:
        w = w.transpose(-1, -2)
    try:
        return quantize_matrices(quantizer, w, scheme)
    except CompileError as error:
        raise CompileError(error.message, place=name, remedy=error.remedy) from None


def quantize_matrices(quantizer: Quantizer, w: Tensor, scheme: WeightScheme) -> QuantizedTensor:
    """[R, L], or [E, R, L] expert by expert."""
    if w.dim() == 2:
        return quantizer.quantize(w, scheme, None)
    return filled(len(w), (quantizer.quantize(matrix, scheme, None) for matrix in w))
