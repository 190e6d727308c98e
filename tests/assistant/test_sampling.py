"""Sampling: each processor against transformers', and what the whole must hold whatever the logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.assistant.sampling import Sampler, Sampling, log_probabilities, recommended, score
from moec.compiler.errors import ArtifactError, RunError


def drawn(logits: Any, count: int = 400, **given: Any) -> set[int]:
    return {Sampler(Sampling(**{"temperature": 1.0, "seed": seed, **given}))(np.array(logits)) for seed in range(count)}


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert Sampler(Sampling())(np.array([0.0, 3.0, 3.0, -np.inf], np.float32)) == 1


def test_sampling_follows_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    sampler = Sampler(Sampling(temperature=1.0, seed=5))
    counts = np.bincount([sampler(logits) for _ in range(4000)], minlength=4) / 4000
    # 4 standard deviations of a share of 4000 draws are at most 4 * sqrt(0.25 / 4000) = 0.032
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.032)


@pytest.mark.parametrize(("top_p", "count"), [(0.4, 1), (0.5, 1), (0.6, 2), (0.9, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, count: int) -> None:
    # exact in binary, so that "reaches 0.5" is not a matter of rounding
    assert drawn(np.log([0.5, 0.25, 0.1875, 0.0625]), top_p=top_p) == set(range(count))


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (3, 3), (4, 4), (9, 4), (0, 4)])
def test_top_k_keeps_so_many(top_k: int, count: int) -> None:
    assert drawn(np.log([0.5, 0.25, 0.1875, 0.0625]), top_k=top_k) == set(range(count))


@pytest.mark.parametrize(("min_p", "count"), [(0.0, 4), (0.125, 4), (0.13, 3), (0.5, 2), (1.0, 1)])
def test_min_p_is_a_share_of_the_likeliest(min_p: float, count: int) -> None:
    assert drawn(np.log([0.5, 0.25, 0.1875, 0.0625]), min_p=min_p) == set(range(count))


def test_the_seed_repeats() -> None:
    logits = np.random.default_rng(0).normal(size=50)

    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.5, top_p=0.95, seed=seed))
        return [sampler(logits) for _ in range(20)]

    assert draws(3) == draws(3) != draws(4)


def test_extreme_logits_do_not_overflow() -> None:
    logits = np.array([1e30, -1e30, -np.inf], np.float32)
    assert Sampler(Sampling(temperature=1e-3, seed=0))(logits) == 0
    for bad in ([np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf], []):
        with pytest.raises(ArtifactError, match=r"^build/a: the logits are not finite"):
            Sampler(Sampling(), "build/a")(np.array(bad))


def test_the_extremes_of_penalty_and_bias_leave_a_token() -> None:
    top = float(np.finfo(np.float32).max)
    logits = np.array([top, top, -top], np.float32)
    for penalty in (1e-3, 100.0):
        given = Sampling(temperature=1e-3, top_p=0.5, min_p=1.0, repeat_penalty=penalty, logit_bias={1: 1e6, 2: -1e6})
        assert Sampler(given, prompt=[0, 1, 2])(logits) in (0, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("min_p", 1.01),
        ("min_p", -0.1),
        ("repeat_penalty", 0.0),
        ("repeat_penalty", 1e-310),  # a score divided by it is infinite
        ("presence_penalty", float("inf")),
        ("frequency_penalty", 101.0),
        ("seed", -1),
        ("seed", 1 << 64),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: float("inf")}),
        ("logit_bias", {1: 1.7e308}),
        ("logit_bias", dict.fromkeys(range(100_001), 0.0)),
    ],
)
def test_options_are_checked(name: str, value: Any) -> None:
    with pytest.raises(RunError):
        Sampling(**{name: value})


def test_presence_and_frequency_count_new_tokens_only() -> None:
    """OpenAI's definition: logit - presence * [occurred] - frequency * occurrences; greedy shows who wins when."""
    logits = np.array([2.0, 1.5, 0.0])
    once = Sampler(Sampling(presence_penalty=1.0), prompt=[0, 0, 0])
    assert [once(logits) for _ in range(4)] == [0, 1, 0, 0]  # 2; then 1 and 1.5; then 1 and 0.5, for good
    often = Sampler(Sampling(frequency_penalty=0.4), prompt=[1])
    assert [often(logits) for _ in range(4)] == [0, 0, 1, 0]  # 2, 1.6, 1.2 against 1.5; then 1.2 against 1.1


def test_bias_and_mask() -> None:
    logits = np.array([2.0, 1.5, 0.0])
    assert Sampler(Sampling(logit_bias={2: 3.0}))(logits) == 2
    assert Sampler(Sampling(logit_bias={0: -np.inf}))(logits) == 1
    assert Sampler(Sampling())(logits, np.array([False, False, True])) == 2
    with pytest.raises(RunError, match="logit bias for token 3, which is not in the vocabulary; ids are 0 to 2"):
        Sampler(Sampling(logit_bias={3: 1.0}))(logits)
    with pytest.raises(RunError, match="no token is left"):
        Sampler(Sampling(logit_bias={2: -np.inf}))(logits, np.array([False, False, True]))


# --- against transformers --------------------------------------------------------------------------------------------

# no value twice, and steps that are far from where rounding of float32 decides who is kept
LOGITS = st.lists(st.integers(-4000, 4000), min_size=2, max_size=60, unique=True)


def theirs(logits: np.ndarray, given: Sampling, prompt: list[int]) -> dict[int, float]:
    """What transformers keeps, with its weights: its processors in the order of its `generate`."""
    from transformers.generation import logits_process as lp

    made: list[Any] = []
    if given.logit_bias:
        made.append(lp.SequenceBiasLogitsProcessor({(token,): bias for token, bias in given.logit_bias.items()}))
    if given.repeat_penalty != 1.0:
        made.append(lp.RepetitionPenaltyLogitsProcessor(given.repeat_penalty))
    made.append(lp.TemperatureLogitsWarper(given.temperature))
    if given.top_k:
        made.append(lp.TopKLogitsWarper(given.top_k))
    if given.top_p < 1.0:
        made.append(lp.TopPLogitsWarper(given.top_p))
    if given.min_p:
        made.append(lp.MinPLogitsWarper(given.min_p))
    ids = torch.tensor([prompt], dtype=torch.long)
    scores = torch.from_numpy(logits)[None]
    for process in made:
        scores = process(ids, scores)
    probabilities = scores.softmax(-1)[0]
    return {i: float(p) for i, p in enumerate(probabilities) if p > 0}


@settings(max_examples=300, deadline=None)
@given(
    values=LOGITS,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 40]),
    top_p=st.sampled_from([0.2, 0.71, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.21]),
    repeat_penalty=st.sampled_from([1.0, 0.8, 1.3]),
    data=st.data(),
)
def test_kept_tokens_and_their_weights_are_those_of_transformers(
    values: list[int],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repeat_penalty: float,
    data: st.DataObject,
) -> None:
    pytest.importorskip("transformers", reason="the independent party: pip install 'moec[transformers]'")
    token = st.integers(0, len(values) - 1)
    prompt = data.draw(st.lists(token, min_size=1, max_size=5))
    bias = data.draw(st.dictionaries(token, st.sampled_from([-2.0, 1.25]), max_size=3))
    given = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        logit_bias=bias,
    )
    # float64 on both sides: what is compared is the definition, and a sum near top_p is rounded alike
    logits = np.array(values, np.float64) / 400
    ids, weights = Sampler(given, prompt=prompt).distribution(logits)
    ours = dict(zip(ids.tolist(), (weights / weights.sum()).tolist(), strict=True))
    wanted = theirs(logits, given, prompt)
    # tokens of weight 1e-12 may lie on either side of a cumulative sum that rounds near 1
    assert {i for i, p in ours.items() if p > 1e-12} == {i for i, p in wanted.items() if p > 1e-12}
    for token, probability in ours.items():
        assert probability == pytest.approx(wanted.get(token, 0.0), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.01, 1.0, 6.0]), top_p=st.sampled_from([0.1, 0.5, 0.95]))
def test_top_p_of_a_large_vocabulary_sorts_no_more_than_it_must_and_keeps_the_same(
    seed: int, spread: float, top_p: float
) -> None:
    """20,000 tokens: flat distributions need more than the first 1024 of them."""
    logits = np.random.default_rng(seed).normal(size=20_000) * spread
    kept, weights = Sampler(Sampling(temperature=1.0, top_p=top_p)).distribution(logits)
    order = np.argsort(-logits, kind="stable")
    sums = np.cumsum(np.exp(logits[order] - logits.max()))
    # the sums of different orders differ by some units of 2^-52 each: one token more or less
    assert abs(len(kept) - (np.searchsorted(sums, top_p * sums[-1]) + 1)) <= 1
    assert set(kept.tolist()) <= set(order[: len(kept)].tolist())
    assert weights.max() == 1.0


# --- log-probabilities ------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40), top=st.integers(0, 8))
def test_log_probabilities_are_torchs(values: list[float], top: int) -> None:
    logits = np.array(values, np.float32)
    wanted = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    np.testing.assert_allclose(log_probabilities(logits), wanted, atol=1e-12)  # float64 on both sides
    found = score(logits, 0, top)
    assert found.log_probability == pytest.approx(wanted[0], abs=1e-12)
    assert len(found.top) == min(top, len(values))
    assert [i for i, _ in found.top] == np.argsort(-wanted, kind="stable")[:top].tolist() or len(set(values)) < len(
        values
    )


# --- what a model recommends ------------------------------------------------------------------------------------------


def config(folder: Path, **keys: Any) -> Path:
    file = folder / "generation_config.json"
    file.write_text(json.dumps(keys))
    return file


def test_what_a_generation_config_recommends(tmp_path: Path) -> None:
    assert recommended(tmp_path / "none.json") == Sampling()
    assert recommended(config(tmp_path, temperature=0.6)) == Sampling()  # transformers: greedy without do_sample
    assert recommended(config(tmp_path, do_sample=True)) == Sampling(temperature=1.0, top_k=50)
    chosen = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}
    wanted = Sampling(temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repeat_penalty=1.1)
    found = recommended(config(tmp_path, do_sample=True, **chosen))
    assert found == wanted
    assert found.words() == "temperature 0.6, top-k 20, top-p 0.95, min-p 0.05, seed 0, repeat penalty 1.1"
    assert found.given(temperature=0.0, seed=None) == Sampling(top_k=20, top_p=0.95, min_p=0.05, repeat_penalty=1.1)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ('{"do_sample": true, "temperature": "hot"}', "temperature is not a number"),
        ('{"do_sample": true, "top_k": 1e400}', "cannot convert float infinity"),
        ('{"do_sample": true, "top_p": 7}', "top-p 7"),
        ('{"repetition_penalty": NaN}', "repeat penalty nan"),
    ],
)
def test_a_damaged_one_is_named(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(text)
    with pytest.raises(ArtifactError, match=what) as caught:
        recommended(file)
    assert str(caught.value).startswith(str(file))
