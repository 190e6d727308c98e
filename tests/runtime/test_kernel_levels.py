"""Codes that are positions in a table give the bits of INT8 codes of the same values, on every instruction set."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from moec.compiler.ops.attributes import Routing
from moec.runtime import kernel_api
from moec.runtime.kernel_api import library
from moec.runtime.moe_config import Kind, WeightFormat
from tests.runtime.kernel_cases import LEVELS, Block, Weight, instruction_sets, random_block, random_weight

FORMATS = [
    WeightFormat(kind, 32, axis_out, rounded, f32_scales, by_block)
    for kind in LEVELS
    for axis_out in (False, True)
    for rounded, by_block in ((False, False), (True, False), (True, True))
    for f32_scales in (False, True)
]


@pytest.fixture(autouse=True)
def _best_isa_afterwards() -> Iterator[None]:
    yield
    kernel_api.set_isa("auto")
    kernel_api.set_threads(1)


def _shapes(fmt: WeightFormat) -> list[tuple[WeightFormat, int, int]]:
    """(format, N, K): odd where groups leave it open, and groups whose sums are beyond what float32 holds exactly."""
    rest = ((1, 8), (7, 5), (9, 30), (2, 163))  # groups, and the other dimension: its padding is of every length
    shapes = [(fmt, *((32 * g, other) if fmt.axis_out else (other, 32 * g))) for g, other in rest]
    long = replace(fmt, group_size=4096)
    return [*shapes, (long, *((4096, 9) if fmt.axis_out else (19, 4096)))]


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_linears_and_embeddings_are_those_of_int8(isa: str, fmt: WeightFormat) -> None:
    rng = np.random.default_rng(fmt.encode())
    kernel_api.set_isa(isa)
    for form, n, k in _shapes(fmt):
        w = random_weight(rng, form, n, k)
        wide = w.as_int8()
        for tokens in (1, 2, 3, 4, 7, 12, 13, 50):
            x = rng.standard_normal((tokens, k), dtype=np.float32)
            bias = rng.standard_normal(n, dtype=np.float32) if tokens % 2 else None
            expected = kernel_api.linear(x, wide.packed, n, wide.format, bias)
            assert np.array_equal(kernel_api.linear(x, w.packed, n, form, bias), expected)
        ids = rng.integers(0, n, 20)
        expected = kernel_api.embedding(ids, wide.packed, n, k, wide.format)
        assert np.array_equal(kernel_api.embedding(ids, w.packed, n, k, form), expected)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_gated_linears_are_those_of_int8(isa: str, fmt: WeightFormat) -> None:
    rng = np.random.default_rng(fmt.encode())
    kernel_api.set_isa(isa)
    w = random_weight(rng, fmt, 192, 41 if fmt.axis_out else 96)
    wide = w.as_int8()
    for tokens in (1, 5, 49):
        x = rng.standard_normal((tokens, w.k), dtype=np.float32)
        expected = kernel_api.gated_linear(x, wide.packed, 96, wide.format, 0)
        assert np.array_equal(kernel_api.gated_linear(x, w.packed, 96, fmt, 0), expected)


def _widened(block: Block) -> kernel_api.PreparedMoe:
    """The block with INT8 weights of the same values."""
    weights: dict[str, Weight] = {
        name: weight.as_int8()
        for name in ("w13", "w2", "shared_w13", "shared_w2")
        if (weight := getattr(block, name)) is not None
    }
    config = replace(block.config, **{name: weight.format for name, weight in weights.items()})  # type: ignore[arg-type]
    tensors = replace(block.prepared.tensors, **{name: weight.packed for name, weight in weights.items()})  # type: ignore[arg-type]
    return kernel_api.PreparedMoe(config, tensors)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_blocks_of_experts_are_those_of_int8(isa: str, fmt: WeightFormat) -> None:
    rng = np.random.default_rng(fmt.encode())
    kernel_api.set_isa(isa)
    block = random_block(
        rng,
        experts=5,
        d=96,
        width=64,
        top_k=2,
        routed=fmt,
        shared_width=96,
        shared=replace(fmt, axis_out=False),
        how=Routing(score="sigmoid", normalize="sum"),
        biases=True,
        shared_gate=True,
    )
    wide = _widened(block)
    for tokens, threads in ((1, 1), (3, 2), (60, 2)):
        kernel_api.set_threads(threads)
        x = rng.standard_normal((tokens, 96), dtype=np.float32)
        for found, expected in zip(block.prepared(x), wide(x), strict=True):
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("axis_out", [False, True])
def test_every_code_stands_for_its_level(kind: Kind, axis_out: bool) -> None:
    """Not by way of the packing that the other tests share: byte by byte, the first element in the low nibble."""
    fmt = WeightFormat(kind, 32, axis_out)
    codes = np.array([[low | high << 4 for low in range(16)] for high in range(16)], np.uint8)
    scales = np.full((16, 1), 0.5, np.float16)
    n, k = (32, 16) if axis_out else (16, 32)
    packed = kernel_api.pack(codes, scales, n, k, fmt)
    rows = kernel_api.embedding(np.arange(n), packed, n, k, fmt)
    stored = rows.T if axis_out else rows
    count = len(LEVELS[kind])  # where it is 8, the fourth bit of a nibble is ignored
    levels = np.array(LEVELS[kind] * (16 // count), np.float32)
    for high in range(16):
        assert np.array_equal(stored[high, ::2], levels / 2)
        assert (stored[high, 1::2] == levels[high] / 2).all()
    found, _ = kernel_api.unpack(packed, n, k, fmt)
    assert np.array_equal(found[0], codes & (count - 1) * 0x11)


@pytest.mark.parametrize("kind", range(max(Kind) + 1, 16))
def test_kinds_that_do_not_exist_are_refused(kind: int) -> None:
    size, kernels = ctypes.c_uint64(), library()
    for rest in (0, 32 << 8, 32 << 8 | 0x20):
        code = kernels.moec_packed_bytes(64, 64, rest | kind, ctypes.byref(size))
        with pytest.raises(kernel_api.KernelError, match="is not a weight format"):
            kernel_api._check(code)


@pytest.mark.parametrize("kind", [Kind.INT4, *LEVELS])
@pytest.mark.parametrize("axis_out", [False, True])
def test_lengths_that_do_not_fit_are_refused(kind: Kind, axis_out: bool) -> None:
    fmt = WeightFormat(kind, 32, axis_out)
    for wrong in (31, 33, 63):
        with pytest.raises(kernel_api.KernelError, match=f"groups of 32 along {wrong}"):
            kernel_api.packed_bytes(*((wrong, 16) if axis_out else (16, wrong)), fmt)
    n, k = (64, 16) if axis_out else (16, 64)
    scales = np.ones((16, 2), np.float16)
    for wide in (63, 65, 128):
        with pytest.raises(kernel_api.KernelError, match="codes"):
            kernel_api.pack(np.zeros(wide * 8, np.uint8), scales, n, k, fmt)
