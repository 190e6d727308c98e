"""The comparison of a session with the reference: equal models pass, and every kind of damage fails the right check."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moec.analysis.verify.compare import Comparison, compare
from moec.analysis.verify.phases import Drift, judge_elements, judge_steps
from moec.analysis.verify.prompts import WordHashEncoder, prompt_ids
from moec.analysis.verify.report import Report
from moec.compiler.errors import ArtifactError
from moec.compiler.progress import Progress
from moec.sources.decoder.decoder import Decoder
from tests.analysis.verify.fakes import FakeSession, blocks, decoder, reference

PROMPTS = prompt_ids(WordHashEncoder(211), tokens=160)
NAMES = [f"model.layers.{n}.feed_forward" for n in range(3)]


def _compare(
    session, against=None, *, quantized=False, prompts=PROMPTS, names=NAMES, floats=None, unrounded=None
) -> Comparison:
    with torch.no_grad():
        return compare(
            session,
            reference(decoder()) if against is None else against,
            prompts,
            layer_names=names,
            quantized=quantized,
            float_reference=floats,
            unrounded=unrounded,
            progress=Progress(quiet=True),
        )


def _failed(found: Comparison) -> set[str]:
    return {c.name for c in found.checks if not c.passed}


@pytest.mark.parametrize("quantized", [False, True])
def test_equal_models_pass(quantized):
    found = _compare(FakeSession(decoder()), quantized=quantized, floats=reference(decoder()))
    assert _failed(found) == set(), [c.line() for c in found.checks]
    assert [row.layer for row in found.layers] == [0, 1, 2]
    assert all(row.passed and row.tokens == 200 for row in found.layers)
    assert found.figures["against float activations: top-1 agreement"] == 1.0


def test_without_rounding_no_drift_is_allowed():
    """A run that rounds nothing drifts by nothing: its limits are the limits of single layers."""
    good, bad = FakeSession(decoder()), FakeSession(decoder(1))
    floats = reference(decoder())
    found = _compare(good, quantized=True, floats=floats, unrounded=good)
    checks = {c.name: c for c in found.checks if "float activations" in c.name}
    assert {name.split("free run, float activations: ")[1] for name in checks if name.startswith("free")} == {
        "median cosine", "top-1 agreement", "expert sets equal", "cosine of all but the worst 5%",
    }  # fmt: skip
    assert {name.split(": ")[1] for name in checks if not name.startswith("free")} == {
        "odd chunks, median cosine", "odd chunks, worst cosine", "decode steps, median cosine",
        "decode steps, worst cosine", "expert sets equal",
        *(f"{phase}, elements of the {row} row" for phase in ("prefill", "odd chunks", "decode steps")
          for row in ("median", "worst")),
    }  # fmt: skip
    assert all(c.passed for c in checks.values())
    assert checks["free run, float activations: median cosine"].tolerance.limit == pytest.approx(0.9999, abs=1e-7)
    wrong = _compare(good, quantized=True, floats=floats, unrounded=bad)
    assert _failed(wrong) == set(checks)


def test_a_dense_model_has_no_layers_to_check():
    def dense():  # type: ignore[no-untyped-def]
        return decoder(
            architecture="mobilellm", moe=None, ffn_width=96, attention_window={"size": 9, "every_nth_global": 2}
        )

    found = _compare(FakeSession(dense()), reference(dense()), names=[])
    assert found.layers == []
    assert _failed(found) == set()
    other = _compare(
        FakeSession(decoder(1, architecture="mobilellm", moe=None, ffn_width=96)), reference(dense()), names=[]
    )
    assert "free run: every element" in _failed(other)


def test_arithmetic_damage_in_one_layer_is_told_from_routing():
    session = FakeSession(decoder(), damage=lambda layer, y: y * 1.01 if layer == 1 else y)
    found = _compare(session)
    failed = _failed(found)
    assert {"block outputs: every element", "free run: every element"} <= failed
    assert "block inputs: every element" not in failed, "the next layer must not be blamed"
    assert "router: expert sets equal, same input" not in failed
    assert [row.layer for row in found.layers if not row.passed] == [1]
    check = next(c for c in found.checks if c.name == "block outputs: every element")
    assert check.where.startswith("layer 1")
    assert check.detail == "missed by layers 1"


def test_one_wrong_expert_fails_a_quantized_artifact():
    model = decoder()
    with torch.no_grad():
        experts = blocks(model)[2].experts
        gate, up = experts.gate_up_proj[3].chunk(2, -1)
        experts.gate_up_proj[3] = torch.cat((up, gate), -1)
    found = _compare(FakeSession(model), quantized=True)
    assert "block outputs: min cosine" in _failed(found)
    assert [row.layer for row in found.layers if not row.passed] == [2]


def test_a_router_without_its_bias_fails_as_routing():
    model = decoder()
    blocks(model)[0].expert_bias.data.zero_()
    found = _compare(FakeSession(model), quantized=True)
    failed = _failed(found)
    assert "router: expert sets equal, same input" in failed
    assert "router: expert sets equal" in failed
    row = found.layers[0]
    assert not row.passed
    assert row.min_cosine > 0.999, "with routing forced the arithmetic of the layer is right"


def test_a_bf16_router_fails():
    model = decoder()
    weight = blocks(model)[1].router.weight
    weight.data = weight.data.to(torch.bfloat16).to(torch.float32)
    failed = _failed(_compare(FakeSession(model), quantized=True))
    assert "router: combine weights" in failed


def test_another_scale_of_the_combine_weights_fails():
    model = decoder()
    blocks(model)[0].scale = 2.4
    assert "router: combine weights" in _failed(_compare(FakeSession(model), quantized=True))


def test_wrong_attention_is_told_from_wrong_experts():
    model = decoder(rope={"theta": 100.0, "interleaved": True})
    found = _compare(FakeSession(model), quantized=True)
    failed = _failed(found)
    assert {"block inputs: median cosine", "free run: median cosine"} <= failed
    assert not any(name.startswith(("block outputs", "router: combine")) for name in failed)


def test_a_wrong_head_is_seen_in_the_logits_alone():
    class Head(FakeSession):
        def prefill(self, ids, logits="last"):
            return super().prefill(ids, logits) * np.linspace(0.9, 1.1, 211, dtype=np.float32)

    failed = _failed(_compare(Head(decoder()), quantized=True))
    assert "logits: median cosine" in failed
    assert not any(name.startswith("block") for name in failed)


def test_drift_does_not_excuse_an_error():
    """A perturbed float reference does not drift, so a free run is held to the strict limit."""
    found = _compare(FakeSession(decoder()), quantized=True)
    check = next(c for c in found.checks if c.name == "free run: median cosine")
    assert check.tolerance.limit == pytest.approx(0.9999, abs=1e-6)


class _Forgetful(FakeSession):
    """Restarts its positions at every call."""

    def prefill(self, ids, logits="last"):
        self.position = 0
        return super().prefill(ids, logits)


class _Stale(FakeSession):
    """Computes something else after some time: here from the second run on."""

    def prefill(self, ids, logits="last"):
        self.calls = getattr(self, "calls", 0) + 1
        return super().prefill(ids, logits) + (1e-3 if self.calls > len(PROMPTS) + 11 else 0.0)


def test_decoding_at_wrong_positions_fails():
    failed = _failed(_compare(_Forgetful(decoder()), quantized=True))
    assert {"consistency: odd chunks, worst cosine", "consistency: decode steps, median cosine"} <= failed
    assert "block inputs: min cosine" in failed


class _LateSteps(FakeSession):
    """A call of one token stands at the position before its own, over the last row of the cache; prefill is right."""

    def prefill(self, ids, logits="last"):
        late = len(ids) == 1 and self.position > 0
        self.position -= late
        out = super().prefill(ids, logits)
        self.position += late
        return out


class _OneWrongStep(FakeSession):
    """One single step of eight turns by eight degrees."""

    def prefill(self, ids, logits="last"):
        out = super().prefill(ids, logits)
        if len(ids) > 1 or self.position != 37:
            return out
        noise = np.random.default_rng(0).standard_normal(out.shape).astype(np.float32)
        return out + 0.14 * noise * np.linalg.norm(out) / np.linalg.norm(noise)


def dense() -> Decoder:
    """Without MoE blocks nothing is traced: only whole runs are compared."""
    return decoder(architecture="mobilellm", moe=None, ffn_width=96)


@pytest.mark.parametrize("quantized", [False, True])
def test_single_steps_that_are_wrong_fail_where_all_of_prefill_is_right(quantized):
    found = _compare(_LateSteps(dense()), reference(dense()), names=[], quantized=quantized)
    wanted = {"median cosine", "worst cosine"} if quantized else {"every element"}
    assert _failed(found) == {f"consistency: decode steps, {name}" for name in wanted}


def test_the_one_step_that_is_wrong_is_seen():
    failed = _failed(_compare(_OneWrongStep(dense()), reference(dense()), names=[], quantized=True))
    assert failed == {"consistency: decode steps, worst cosine"}


def test_single_steps_are_judged_without_rounding_too():
    good, late = FakeSession(dense()), _LateSteps(dense())
    floats = reference(dense())
    found = _compare(good, reference(dense()), names=[], quantized=True, floats=floats, unrounded=late)
    judged = ("median cosine", "worst cosine", "elements of the median row", "elements of the worst row")
    assert _failed(found) == {f"float activations, routed alike: decode steps, {n}" for n in judged}


def test_elements_of_one_row_and_of_most_rows_are_told_apart_and_drift_excuses_what_it_is():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((40, 300)).astype(np.float32)
    size_T1 = np.abs(a).max(-1, keepdims=True)
    one = a.copy()
    one[7, 5] += 0.05 * size_T1[7, 0]  # a cosine of 0.99999: no angle shows it

    def failed(b: np.ndarray, drift: Drift) -> list[str]:
        return [c.name for c in judge_elements("", "x", {"p": (a, b)}, drift) if not c.passed]

    assert failed(a + 1e-6 * size_T1, Drift.none()) == []
    assert failed(one, Drift.none()) == ["x, elements of the worst row"]
    most = a + 0.01 * size_T1
    assert failed(most, Drift.none()) == ["x, elements of the median row"]
    assert failed(most, Drift(np.zeros(40), np.full(40, 0.003))) == []
    assert failed(np.where(a == a[3], np.nan, a), Drift.none()) == ["x, elements of the worst row"]
    assert judge_elements("", "x", {"p": (a[:0], a[:0])}, Drift.none()) == []


def test_a_twentieth_of_the_rows_cannot_hide_and_drift_excuses_what_it_is():
    rng = np.random.default_rng(0)
    drift = Drift(np.abs(rng.normal(0, 1e-3, 512)), np.zeros(512))
    a = rng.standard_normal((40, 300)).astype(np.float32)
    near = a + 0.02 * rng.standard_normal(a.shape).astype(np.float32)  # 1 - cosine of 2e-4
    assert all(c.passed for c in judge_steps("", a, near, 8, drift, "x"))
    assert not any(c.passed for c in judge_steps("", a, near, 8, Drift.none(), "x") if "median" in c.name)
    one = near.copy()
    one[-3] = a[-4]
    assert [c.name for c in judge_steps("", a, one, 8, drift, "x") if not c.passed] == ["decode steps, worst cosine"]
    one[-3] = np.nan
    assert [c.name for c in judge_steps("", a, one, 8, drift, "x") if not c.passed] == ["decode steps, worst cosine"]


@pytest.mark.parametrize(("count", "counted"), [(10, False), (20, True), (30, True)])
def test_chance_decides_on_which_side_of_a_twentieth_far_rows_are(count: int, counted: bool) -> None:
    """Of 512 rows 26 are a twentieth, 10 a standard deviation twice."""
    rows = np.full(512, 1e-4)
    rows[:count] = 1e-2
    assert (Drift(rows, np.zeros(512)).tail > 5e-3) == counted


def test_a_second_run_that_differs_fails():
    assert "consistency: a second run is identical" in _failed(_compare(_Stale(decoder()), quantized=True))


def test_not_a_number_fails_everything_it_touches():
    session = FakeSession(decoder(), damage=lambda layer, y: y * np.nan if layer == 2 else y)
    found = _compare(session, quantized=True)
    assert {"logits: median cosine", "logits: top-1 agreement", "block outputs: min cosine"} <= _failed(found)
    Report("artifact", "x", tuple(found.checks), tuple(found.layers), found.figures).to_json()


def test_missing_traces_are_an_error_not_a_pass():
    session = FakeSession(decoder())
    session.take_traces = list  # type: ignore[method-assign]
    with pytest.raises(ArtifactError, match="traced MoE layers"):
        _compare(session)
