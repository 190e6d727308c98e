"""Codes of weights that are joined: carried bit for bit whichever way they lie, never mixed with others."""

from __future__ import annotations

import pytest
import torch

from moec.compiler.errors import CompileError
from moec.compiler.quant import QuantizedTensor
from moec.compiler.weights import CodeFormat, LazyWeight, QuantizedWeight, StoredCodes, joined_codes, stacked_codes
from moec.compiler.weights import Provenance as From

BITS = [2, 3, 4, 5, 6, 8]


def random_codes(*shape: int, bits: int = 4, zeros: bool = False, seed: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    *lead, width = shape
    groups = (*lead, width // 32)
    if bits == 4:
        codes = torch.randint(0, 256, (*lead, width // 2), generator=generator, dtype=torch.uint8)
    else:
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator, dtype=torch.int8)
    zero_points = torch.randn(groups, generator=generator) if zeros else None
    return QuantizedTensor(codes, torch.randn(groups, generator=generator).half(), bits, 32, zero_points)


def weight(tensor: QuantizedTensor, *, transposed: bool = False) -> LazyWeight:
    value = tensor.dequantize()
    value = value.transpose(-1, -2) if transposed else value
    stored = StoredCodes(
        CodeFormat(tensor.bits, 32, tensor.zero_points is not None), lambda: tensor, From("carried", "test"), transposed
    )
    return LazyWeight(tuple(value.shape), torch.float32, lambda: value, stored)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zeros", [False, True])
def test_dequantize_by_hand(bits: int, zeros: bool) -> None:
    """w = s (q - z), every bit of it: one subtraction and one product in fp32."""
    tensor = random_codes(3, 5, 64, bits=bits, zeros=zeros)
    q = tensor.unpacked().float()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert q.min() >= low
    assert q.max() <= high
    if tensor.zero_points is not None:
        q = q - tensor.zero_points.repeat_interleave(32, -1)
    assert torch.equal(tensor.dequantize(), q * tensor.scales.float().repeat_interleave(32, -1))


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_joining_codes_is_joining_weights(dim: int, transposed: bool, zeros: bool) -> None:
    parts = [weight(random_codes(64, 96, zeros=zeros, seed=s), transposed=transposed) for s in (1, 2)]
    joined = joined_codes(parts, dim, "w")
    assert joined is not None
    value = joined.load().dequantize()
    wanted = torch.cat([p.load() for p in parts], dim)
    assert torch.equal(value.transpose(-1, -2) if transposed else value, wanted)


@pytest.mark.parametrize("dim", [-1, -2])
def test_stacking_experts_of_pieces(dim: int) -> None:
    """Gates that are linears of their own, ups that are stacked already."""
    gates = [weight(random_codes(32, 64, seed=e)) for e in range(3)]
    ups = weight(random_codes(3, 32, 64, seed=9))
    codes = stacked_codes([[(gate, None), (ups, e)] for e, gate in enumerate(gates)], dim, "w13")
    assert codes is not None
    wanted = torch.stack([torch.cat([gate.load(), ups.load()[e]], dim) for e, gate in enumerate(gates)])
    assert torch.equal(codes.load().dequantize(), wanted)


def test_floats_have_no_codes() -> None:
    plain = LazyWeight((2, 32), torch.float32, lambda: torch.zeros(2, 32))
    assert joined_codes([plain, plain], -2, "w") is None
    assert stacked_codes([[(plain, None)]], -2, "w") is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (weight(random_codes(2, 64, bits=8)), "INT4 codes in groups of 32, and INT8 codes in groups of 32"),
        (weight(random_codes(2, 64, zeros=True)), "and INT4 codes with zero points in groups of 32"),
        (LazyWeight((2, 64), torch.float32, lambda: torch.zeros(2, 64)), "only one of them is stored as codes"),
    ],
)
def test_unlike_codes_are_not_joined(other: LazyWeight, message: str) -> None:
    joined = joined_codes([weight(random_codes(2, 64)), other], -2, "layer.w13")
    assert joined is not None
    with pytest.raises(CompileError, match=f"^layer.w13: .*{message}"):
        joined.load()


@pytest.mark.parametrize("zeros", [False, True])
def test_a_square_weight_knows_how_it_lies(zeros: bool) -> None:
    """Nothing of the values tells it."""
    tensor = random_codes(32, 32, zeros=zeros)
    tensors = {
        "q": LazyWeight((32, 16), torch.uint8, lambda: tensor.codes),
        "s": LazyWeight((32, 1), torch.float16, lambda: tensor.scales),
        "z": LazyWeight((32, 1), torch.float32, lambda: tensor.zero_points),  # type: ignore[arg-type, return-value]
    }
    for transposed in (False, True):
        held = QuantizedWeight(
            name="w",
            shape=(32, 32),
            role="ffn",
            codes="q",
            scales="s",
            zero_points="z" if zeros else None,
            format=CodeFormat(4, 32, zeros),
            group_axis="in",
            orientation="out_in",
            transposed=transposed,
            provenance=From("computed", "rtn"),
        )
        value = tensor.dequantize()
        assert torch.equal(held.dequantize(tensors), value.t() if transposed else value)
        assert held.tensors == (("q", "s", "z") if zeros else ("q", "s"))


def test_what_was_joined_of_what_was_stacked_leads_back_to_each_matrix() -> None:
    """Experts of their own, stacked to [E, N, K]; gates and ups joined; the way back from the joined weight."""
    matrices = {f"{part}.{e}": torch.randn(4, 6) for part in ("gate", "up") for e in range(3)}
    own = {n: LazyWeight((4, 6), torch.float32, lambda m=m: m) for n, m in matrices.items()}

    def stack(part: str) -> LazyWeight:
        origins = [o for e in range(3) for o in own[f"{part}.{e}"].taken(f"{part}.{e}", lambda v, e=e: v[e])]
        value = torch.stack([matrices[f"{part}.{e}"] for e in range(3)])
        return LazyWeight((3, 4, 6), torch.float32, lambda: value, origins=tuple(origins))

    gates, ups = stack("gate"), stack("up")
    origins = (*gates.taken("gate", lambda v: v[:, :4]), *ups.taken("up", lambda v: v[:, 4:]))
    joined = torch.cat([gates.load(), ups.load()], 1)
    assert {o.name for o in origins} == set(matrices)
    assert all(torch.equal(o.take(joined), matrices[o.name]) for o in origins)
    # one matrix of a weight that was itself made of others: the way ends at that weight
    (lost,) = gates.taken("gates", lambda v: v, index=1)
    assert (lost.name, lost.index) == ("gates", 1)
