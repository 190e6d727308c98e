"""The smaller parts: recovering the residual stream, joining traces, adversarial weights, differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moec.analysis.verify.diff import diff_texts, logits_figures
from moec.analysis.verify.replay import bounds, joined_traces, replay_in_pieces, replay_prompt
from moec.analysis.verify.weights import adversarial_weights
from moec.compiler.program import Role
from moec.compiler.target import MoeTrace
from moec.sources.decoder.following import stream_of
from tests.analysis.verify.fakes import FakeSession, decoder


@pytest.mark.parametrize("seed", range(5))
def test_the_stream_is_recovered_from_its_norm(seed):
    generator = torch.Generator().manual_seed(seed)
    width = int(torch.randint(17, 300, (), generator=generator))
    h = torch.randn(9, width, generator=generator) * torch.rand(9, 1, generator=generator) * 10
    norm = 1 + 0.3 * torch.randn(width, generator=generator)
    norm[torch.randint(0, width, (2,), generator=generator)] = 0.0  # a norm may blot out an element
    x = torch.nn.functional.rms_norm(h, (width,), norm, 1e-5)
    torch.testing.assert_close(stream_of(x, norm, h), h, atol=1e-5, rtol=1e-5)
    near = h * (1 + 1e-3 * torch.randn(h.shape, generator=generator))
    errors = (stream_of(x, norm, near) - h)[:, norm != 0].norm() / h.norm()
    assert errors < 4e-3 / width**0.5, "the length is fitted: far better than the estimate it was fitted to"


def test_a_stream_in_another_direction_is_not_hidden():
    h, other = torch.randn(3, 50), torch.randn(3, 50)
    x = torch.nn.functional.rms_norm(other, (50,), torch.ones(50), 1e-5)
    recovered = stream_of(x, torch.ones(50), h)
    cosines = torch.nn.functional.cosine_similarity(recovered, other).abs()
    torch.testing.assert_close(cosines, torch.ones(3), atol=1e-5, rtol=0)


def _trace(layer: int, tokens: int, value: float) -> MoeTrace:
    def of(width: int) -> np.ndarray:
        return np.full((tokens, width), value, np.float32)

    return MoeTrace(layer, of(4), of(2).astype(np.int32), of(2), of(4))


def test_traces_of_several_calls_are_joined_in_order():
    joined = joined_traces([_trace(0, 2, 1), _trace(1, 2, 2), _trace(0, 3, 3), _trace(1, 3, 4)])
    assert [t.layer for t in joined] == [0, 1]
    assert joined[0].x_TD[:, 0].tolist() == [1, 1, 3, 3, 3]
    assert joined[1].y_TD.shape == (5, 4)


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (2, 1), (9, 8), (33, 8)])
def test_pieces_give_all_rows_and_all_traces(tokens, steps):
    session = FakeSession(decoder())
    ids = list(range(tokens))
    whole, pieces = replay_prompt(session, ids, 3), replay_in_pieces(session, ids, 3, steps)
    np.testing.assert_allclose(pieces.logits_TV, whole.logits_TV, atol=1e-4)
    for a, b in zip(whole.layers, pieces.layers, strict=True):
        np.testing.assert_allclose(a.y_TD, b.y_TD, atol=1e-4)


def test_bounds_cover_every_token():
    for tokens in (1, 2, 8, 9, 71, 72, 200):
        assert bounds(tokens)[0] == 0
        assert bounds(tokens)[-1] == tokens
        assert sorted(set(bounds(tokens))) == bounds(tokens)


def test_adversarial_weights_are_reproducible_and_not_neutral():
    shapes = {"norm": (64,), "bias": (16,), "router": (16, 64), "experts": (16, 64, 32)}
    roles = {"norm": Role.NORM, "bias": Role.ROUTER, "router": Role.ROUTER, "experts": Role.EXPERT}
    first, second, other = (adversarial_weights(shapes, roles, seed=s) for s in (0, 0, 1))
    for name in shapes:
        assert torch.equal(first[name].load(), second[name].load())
        assert not torch.equal(first[name].load(), other[name].load())
    assert abs(float(first["norm"].load().mean()) - 1) < 0.2
    assert float(first["bias"].load().abs().min()) > 0
    assert float((first["router"].load() @ torch.randn(64)).std()) > 0.7


def test_a_difference_of_texts_is_shown_with_its_place():
    same = diff_texts("a\nb\n", "a\nb\n", names=("x", "y"))
    assert same.same
    other = diff_texts("a\nb\nc", "a\nB\nc", names=("x", "y"))
    assert not other.same
    assert "-b" in other.lines
    assert "+B" in other.lines


def test_logits_of_two_sessions_are_compared():
    prompts = {"p": [1, 2, 3, 4], "q": [5, 6]}
    same = logits_figures(FakeSession(decoder()), FakeSession(decoder()), prompts)
    assert same["max abs error"] == 0
    assert same["top-1 agreement"] == 1
    assert same["tokens"] == 6
    other = logits_figures(FakeSession(decoder()), FakeSession(decoder(1)), prompts)
    assert other["max abs error"] > 0.1
    assert other["median cosine"] < 0.9
