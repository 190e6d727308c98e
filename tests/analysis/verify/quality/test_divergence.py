"""The measures of quality against plain float64 arithmetic, and what must not look good."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moec.analysis.verify.prompts import WordHashEncoder
from moec.analysis.verify.quality.divergence import Divergence, by_domain, compare
from moec.analysis.verify.quality.texts import DOMAINS, held_out, shipped
from moec.compiler.errors import CheckpointError, UserError


def probabilities(logits_TV: np.ndarray) -> np.ndarray:
    e = np.exp(logits_TV.astype(np.float64) - logits_TV.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(("tokens", "vocabulary"), [(2, 3), (65, 97), (130, 1001)])
def test_equals_the_definition_in_float64(tokens: int, vocabulary: int) -> None:
    rng = np.random.default_rng(tokens)
    a = rng.normal(0, 3, (tokens, vocabulary)).astype(np.float32)
    b = a + rng.normal(0, 1, a.shape).astype(np.float32)
    ids = rng.integers(0, vocabulary, tokens).tolist()
    found = Divergence.of([compare("x", ids, a, b)])
    p, q = probabilities(a), probabilities(b)
    kld = (p * np.log(p / q)).sum(-1)
    nll = [-np.log(x[np.arange(tokens - 1), ids[1:]]).mean() for x in (p, q)]
    # float32 log-probabilities: 1e-6 each
    assert found.kld == pytest.approx(kld.mean(), rel=1e-5)
    assert found.worst == pytest.approx(kld.max(), rel=1e-5)
    assert (found.reference_perplexity, found.perplexity) == pytest.approx(tuple(np.exp(nll)), rel=1e-5)
    assert found.top1 == (a.argmax(-1) == b.argmax(-1)).mean()
    assert found.tokens == tokens
    assert math.isnan(found.error)


def test_equal_models_are_at_zero_and_chunks_give_the_error_of_the_mean() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0, 3, (4, 20, 50)).astype(np.float32)
    ids = list(range(20))
    same = Divergence.of([compare("x", ids, chunk, chunk) for chunk in a])
    assert (same.kld, same.worst, same.top1, same.error) == (0, 0, 1, 0)
    assert same.perplexity == same.reference_perplexity
    rows = [
        compare(name, ids, chunk, chunk * scale)
        for name, chunk, scale in zip("xxyy", a, (1, 0.9, 0.8, 0.5), strict=True)
    ]
    means = [r.kld_T.mean() for r in rows]
    assert Divergence.of(rows).error == pytest.approx(np.std(means, ddof=1) / 2)
    assert list(by_domain(rows)) == ["x", "y"]
    assert by_domain(rows)["y"].kld > by_domain(rows)["x"].kld > 0


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_no_agreement(broken: float) -> None:
    a = np.random.default_rng(0).normal(0, 1, (5, 9)).astype(np.float32)
    b = a.copy()
    b[2, 4] = broken
    found = Divergence.of([compare("x", [1, 2, 3, 4, 5], a, b)])
    assert found.kld == found.worst == found.perplexity == np.inf
    assert found.top1 == 4 / 5
    assert found.median == 0
    assert found.to_json()["kld"] == "inf"


def test_logits_of_other_tokens_are_a_mistake() -> None:
    a = np.zeros((5, 9), np.float32)
    with pytest.raises(ValueError, match="of 4 tokens"):
        compare("x", [1, 2, 3, 4], a, a)


def test_shipped_text_has_what_it_says() -> None:
    encoder = WordHashEncoder(49152)
    chunks = held_out(encoder, template=None, tokens=1 << 20, longest=8192)
    assert {c.domain for c in chunks} == set(DOMAINS)
    assert {len(c.ids) for c in chunks} == {512}
    few = held_out(encoder, template=None, tokens=10, longest=40)
    assert [(c.domain, len(c.ids)) for c in few] == [(name, 40) for name in DOMAINS]
    # the text of a domain in order, nothing twice
    prose = [i for c in chunks if c.domain == "prose" for i in c.ids]
    assert prose == encoder.encode(shipped(None)["prose"])[: len(prose)]


def test_a_text_of_ones_own_and_one_that_is_too_little() -> None:
    encoder = WordHashEncoder(100)
    assert [len(c.ids) for c in held_out(encoder, template=None, tokens=512, longest=64, text="two words")] == [2]
    with pytest.raises(UserError, match="not two tokens"):
        held_out(encoder, template=None, tokens=512, longest=64, text="word")


def test_chats_are_written_with_the_models_template() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}"
    assert shipped(template)["chat"].startswith("<user>What is the capital of France")
    assert shipped(None)["chat"].startswith("User: What is the capital of France")
    for hostile in ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "{{ raise_exception('no') }}", "{% for %}"):
        with pytest.raises(CheckpointError, match="chat template cannot write"):
            shipped(hostile)
