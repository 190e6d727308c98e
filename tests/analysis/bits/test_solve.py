"""The mixture of formats against trying all of them, and the pattern text that says it."""

from __future__ import annotations

import itertools
import random
from fnmatch import fnmatchcase

import pytest

from moec.analysis.bits.choose import Costs, base_quantization, patterns, with_choices
from moec.analysis.bits.parts import Choice, Format, choices_of
from moec.analysis.bits.solve import UNITS, least_bytes, least_divergence
from moec.compiler.spec.quantization import Quantization


def parts(seed: int, count: int) -> list[tuple[Choice, ...]]:
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        sizes = sorted(generator.sample(range(10, 2000), generator.randint(1, 4)))
        klds = sorted((generator.random() for _ in sizes), reverse=True)
        formats: list[Format] = [("int4", 64), ("iq4_nl", 32), ("int8", 64), ("int8", 32)]
        found.append(tuple(Choice(*formats[i], klds[i], sizes[i]) for i in range(len(sizes))))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_no_mixture_is_better(seed: int) -> None:
    """Rooms of less than UNITS bytes have units of one byte: the solution is exact."""
    given = parts(seed, 5)
    every = [(sum(c.bytes for c in m), sum(c.kld for c in m)) for m in itertools.product(*given)]
    least, most = min(b for b, _ in every), max(b for b, _ in every)
    assert most - least < UNITS
    for room in (least, (least + most) // 2, least + (most - least) // 7, most, 2 * most):
        found = least_divergence(given, room)
        assert found is not None
        assert sum(c.bytes for c in found) <= room
        assert all(choice in own for choice, own in zip(found, given, strict=True))
        assert sum(c.kld for c in found) == pytest.approx(min(kld for size, kld in every if size <= room))
    assert least_divergence(given, least - 1) is None


@pytest.mark.parametrize("seed", range(4))
def test_large_rooms_are_kept_within(seed: int) -> None:
    given = [tuple(Choice(c.weights, c.group_size, c.kld, c.bytes * 9973) for c in own) for own in parts(seed, 40)]
    low, high = (sum(own[i].bytes for own in given) for i in (0, -1))
    last = float("inf")
    for room in range(low, high, (high - low) // 9):
        found = least_divergence(given, room)
        assert found is not None
        assert sum(c.bytes for c in found) <= room
        kld = sum(c.kld for c in found)
        assert kld <= last, "more room is never worse"
        last = kld


@pytest.mark.parametrize("seed", range(6))
def test_fewest_bytes_within_a_divergence(seed: int) -> None:
    given = parts(seed, 5)
    every = [(sum(c.bytes for c in m), sum(c.kld for c in m)) for m in itertools.product(*given)]
    finest = min(kld for _, kld in every)
    for most in (finest + 1e-9, finest + 0.4, 99.0):
        found = least_bytes(given, most)
        assert found is not None
        assert sum(c.kld for c in found) <= most
        assert sum(c.bytes for c in found) <= min(size for size, kld in every if kld <= most) + 2
    assert least_bytes(given, finest - 1e-6) is None


@pytest.mark.parametrize("seed", range(3))
def test_a_divergence_that_only_the_finest_reach(seed: int) -> None:
    """Many parts and units of many bytes: rounded up to units, the finest choices are more than their sum."""
    given = [tuple(Choice(c.weights, c.group_size, c.kld, c.bytes * 9973) for c in own) for own in parts(seed, 60)]
    finest = sum(own[-1].kld for own in given)
    for most in (finest + 1e-9, finest * 1.001, finest * 1.1):
        found = least_bytes(given, most)
        assert found is not None
        assert sum(c.kld for c in found) <= most


def test_formats_that_cost_more_in_both_are_left_out() -> None:
    errors: dict[Format, float] = {("int4", 32): 1.0, ("int4", 64): 1.5, ("iq4_nl", 32): 0.75}
    errors |= {("int8", 32): 0.01, ("int8", 64): 0.005}
    sizes: dict[Format, int] = {("int4", 32): 18, ("int4", 64): 17, ("iq4_nl", 32): 18, ("int8", 32): 34}
    sizes["int8", 64] = 33
    found = choices_of(0.2, errors, lambda kind, size: sizes[kind, size], ("int4", 32), list(errors))
    assert [(c.weights, c.group_size) for c in found] == [("int4", 64), ("iq4_nl", 32), ("int8", 64)]
    assert [c.kld for c in found] == pytest.approx([0.3, 0.15, 0.001])
    whole = [f for f in errors if f[0] != "iq4_nl"]  # kernels that know no levels
    found = choices_of(0.2, errors, lambda kind, size: sizes[kind, size], ("int4", 32), whole)
    assert [(c.weights, c.group_size) for c in found] == [("int4", 64), ("int4", 32), ("int8", 64)]


def test_patterns_say_every_choice() -> None:
    generator = random.Random(3)
    names = [(f"model.layers.{n}.{part}.weight",) for n in range(12) for part in ("v_proj", "down_proj")]
    names += [("model.embed_tokens.weight",), ("model.layers.1.w13", "model.layers.1.w2")]
    formats: list[Format] = [("int4", 32), ("int4", 64), ("iq4_nl", 32), ("int8", 32)]
    for _ in range(20):
        choices = [Choice(*generator.choice(formats), 0.0, 1) for _ in names]
        quantization = Quantization.model_validate({"weights": "int4", "ffn": "int8", "tensors": {"x.*": "fp32"}})
        done = with_choices(quantization, Costs(tuple(names), (), ()), choices)
        for own, choice in zip(names, choices, strict=True):
            for name in own:
                scheme = done.scheme_of("ffn", name)
                assert scheme is not None
                assert (scheme.weights, scheme.group_size) == (choice.weights, choice.group_size)
        assert done.scheme_of("ffn", "x.weight") is None, "what was fp32 stays so"
        assert Quantization.model_validate(done.model_dump(mode="json")) == done
    assert all(fnmatchcase("model.layers.7.v_proj.weight", p) for p, _ in patterns(names[:2], choices[:2])[:1])


def test_what_a_spec_keeps_in_fp32_stays() -> None:
    given = {"weights": "int8", "group_size": 128, "head": "fp32", "attention": {"weights": "int8", "group_size": 64}}
    base = base_quantization(Quantization.model_validate(given))
    assert base.scheme_of("head") is None
    assert {(s.bits, s.group_size) for r in ("attention", "ffn", "expert") if (s := base.scheme_of(r))} == {(4, 32)}
