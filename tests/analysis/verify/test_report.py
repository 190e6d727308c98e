"""The report: status, JSON, JUnit XML, the table; and the prompts that ship with the project."""

from __future__ import annotations

import io
import json
import math
from xml.etree import ElementTree

import pytest
from rich.console import Console

from moec.analysis.verify import tolerances
from moec.analysis.verify.prompts import WordHashEncoder, prompt_ids
from moec.analysis.verify.report import Check, LayerRow, Report
from moec.compiler.texts import DOMAINS, prompts


def _row(layer: int, *, sqnr: float, passed: bool = True) -> LayerRow:
    return LayerRow(
        layer=layer, name="model.layers.0.feed_forward", tokens=100, ties=2, experts_used=17, router=0.999,
        router_same_input=1.0, weights_ratio=0.1, input_median_cosine=0.99999, input_min_cosine=0.9999, input_ratio=2.0,
        median_cosine=0.99999, min_cosine=0.9999, sqnr_db=sqnr, max_abs_error=1e-4, output_ratio=3.0, passed=passed,
    )  # fmt: skip


def _report(*, value: float = 0.99999, rows: tuple[LayerRow, ...] = ()) -> Report:
    return Report("artifact", "out", (Check("logits cosine", value, tolerances.MEDIAN_COSINE, where="math"),), rows)


def test_a_check_that_was_not_made_fails():
    assert Report("artifact", "out", ()).exit_status == 1


@pytest.mark.parametrize("value", [math.nan, -math.inf, 0.9999, 0.0])
def test_a_failed_check_is_named_with_its_amount(value):
    report = _report(value=value)
    assert report.exit_status == 1
    text = io.StringIO()
    report.print(Console(file=text, width=160))
    assert "FAILED logits cosine" in text.getvalue()
    assert "must be > 0.9999 cosine" in text.getvalue()
    loaded = json.loads(json.dumps(report.to_json()))
    assert loaded["passed"] is False
    assert loaded["checks"][0]["name"] == "logits cosine"
    suite = ElementTree.fromstring(report.junit()).find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")


def test_a_passing_report():
    report = _report(rows=(_row(0, sqnr=60.0), _row(1, sqnr=40.0), _row(2, sqnr=50.0)))
    assert report.exit_status == 0
    assert [r.layer for r in report.worst_layers(2)] == [1, 2]
    suite = ElementTree.fromstring(report.junit()).find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("4", "0")
    text = io.StringIO()
    report.print(Console(file=text, width=160))
    assert text.getvalue().rstrip().endswith("passed")


def test_failed_layers_come_first():
    report = _report(rows=(_row(0, sqnr=10.0), _row(1, sqnr=40.0, passed=False)))
    assert [r.layer for r in report.worst_layers(2)] == [1, 0]


def test_json_has_stable_keys_and_no_infinities():
    document = _report(rows=(_row(0, sqnr=math.inf),)).to_json()
    assert list(document) == ["format_version", "kind", "subject", "passed", "checks", "layers", "figures", "about"]
    json.dumps(document, allow_nan=False)
    assert document["layers"][0]["sqnr_db"] == "inf"


def test_every_tolerance_has_a_reason_and_rejects_nan():
    listed = [t for t in vars(tolerances).values() if isinstance(t, tolerances.Tolerance)]
    assert len(listed) >= 6
    for tolerance in listed:
        assert len(tolerance.reason) > 40
        assert not tolerance.holds(math.nan)


def test_prompts_are_real_text_of_four_domains():
    texts = prompts()
    assert tuple(texts) == DOMAINS
    encoder = WordHashEncoder(128_256)
    for name, text in texts.items():
        ids = encoder.encode(text)
        assert 300 <= len(ids) <= 3000, name
        lines = [line for line in text.splitlines() if len(line) > 30]
        assert len(set(lines)) == len(lines), f"{name} repeats itself"
        assert len(set(ids)) > 150, name


@pytest.mark.parametrize("vocab", [1, 2, 97, 128_256])
def test_hashed_words_are_in_range_and_stable(vocab):
    encoder = WordHashEncoder(vocab)
    ids = encoder.encode("the cat and the dog, 42 of them")
    assert all(0 <= i < vocab for i in ids)
    assert ids == encoder.encode("the cat and the dog, 42 of them")
    if vocab > 1:
        assert 0 not in ids


def test_equal_words_share_an_id_and_others_mostly_do_not():
    ids = WordHashEncoder(128_256).encode(" the cat the dog")
    assert ids[0] == ids[2]
    assert len({ids[0], ids[1], ids[3]}) == 3


def test_prompt_ids_share_the_tokens():
    ids = prompt_ids(WordHashEncoder(1000), tokens=100)
    assert {name: len(v) for name, v in ids.items()} == dict.fromkeys(DOMAINS, 25)
    assert len(prompt_ids(WordHashEncoder(1000), tokens=5, text="one two three")["text"]) == 3


def test_small_samples_and_drift_lower_a_limit_by_what_chance_explains():
    sets = tolerances.ROUTER_SETS
    assert tolerances.of_sample(sets, 10**9).limit == pytest.approx(sets.limit, abs=1e-5)
    assert 0.974 < tolerances.of_sample(sets, 500).limit < sets.limit, "a bf16 router (2.6% changed) must still fail"
    assert tolerances.beyond_drift(sets, 0.0).limit == sets.limit
    assert tolerances.beyond_drift(sets, 0.01).limit == pytest.approx(sets.limit - 0.02)
    assert tolerances.beyond_drift(sets, 0.01, 400).limit < tolerances.beyond_drift(sets, 0.01, 40_000).limit
    assert not tolerances.beyond_drift(sets, math.nan).holds(1.0)
