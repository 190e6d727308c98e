"""Utilisation's measures, and the page of a training run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moec.cli.main import run as command
from moec.training.report import ReportError, balance_table, heldout_table, read_run, write_report
from moec.training.utilisation import by_domain, divergence, entropy, frequencies, summary

counts = hnp.arrays(
    np.int64, st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9)), elements=st.integers(0, 99)
)


@settings(max_examples=100, deadline=None)
@given(counts)
def test_divergence_is_between_nothing_and_all(c_DLE: np.ndarray) -> None:
    p_DLE = frequencies(c_DLE)
    assert np.allclose(p_DLE.sum(-1), 1, atol=1e-12)  # float64 sums of at most 9 terms
    d_L = divergence(p_DLE)
    assert (d_L >= 0).all()
    assert (d_L <= np.log2(len(p_DLE)) + 1e-9).all()
    assert (entropy(p_DLE) <= np.log2(p_DLE.shape[-1]) + 1e-9).all()
    assert np.allclose(divergence(np.repeat(p_DLE[:1], 3, axis=0)), 0, atol=1e-9)


def test_domains_that_share_no_expert_are_as_far_apart_as_possible() -> None:
    p_DLE = np.eye(4)[:, None, :]
    assert divergence(p_DLE) == pytest.approx([2.0])
    assert entropy(p_DLE) == pytest.approx(np.zeros((4, 1)))
    # by hand: H(.75, .25) = 0.8113, the parts have 0 and 1 bit
    assert divergence(np.array([[[1.0, 0.0]], [[0.5, 0.5]]])) == pytest.approx([0.8112781 - 0.5], abs=1e-6)


def rows_of(random: np.random.Generator, special: bool) -> tuple[np.ndarray, list[str]]:
    labels = [name for name in ("a", "b", "c") for _ in range(20)]
    favourite = {"a": 0, "b": 3, "c": 5}
    rows = []
    for label in labels:
        p = np.ones(8)
        if special:
            p[favourite[label]] += 4
        rows.append(random.multinomial(200, p / p.sum(), size=2))
    return np.stack(rows), labels


def test_the_control_tells_specialisation_from_chance() -> None:
    random = np.random.default_rng(3)
    special = summary(*rows_of(random, True))
    # a favourite has 5 of 12 selections, the other seven 1 of 12 each: 8000 selections of a domain are that within 1%,
    # whose divergence changes by under a tenth; the control's is the noise of 8000 selections and of dealt labels
    exact = divergence(np.stack([(np.ones(8) + 4 * np.eye(8)[e]) / 12 for e in (0, 3, 5)])[:, None])
    assert special["divergence_mean"] == pytest.approx(float(exact[0]), rel=0.1)
    assert special["divergence_mean"] > 5 * special["control_largest"]
    assert special["p_value"] == pytest.approx(1 / 201)
    alike = [summary(*rows_of(random, False))["p_value"] for _ in range(20)]
    assert sum(p <= 0.05 for p in alike) <= 5  # one in twenty is expected; six or more has probability 0.0003


def test_counts_of_domains_are_sums_of_their_rows() -> None:
    c_RLE, labels = rows_of(np.random.default_rng(4), True)
    c_DLE = by_domain(c_RLE, labels, ["b", "a"])
    assert (c_DLE[0] == c_RLE[20:40].sum(0)).all()
    assert (c_DLE[1] == c_RLE[:20].sum(0)).all()


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two stages with metrics as `moec train` writes them."""
    random = np.random.default_rng(1)
    run = tmp_path / "run"
    run.mkdir()
    stages = [
        {"name": "pretrain", "mixture": {"web": 3, "code": 1}},
        {"name": "sft", "mixture": {"chat": 1}},
    ]
    record = {
        "name": "small",
        "spec": {"training": {"stages": stages}},
        "seed": 1,
        "threads": 1,
        "digests": {"training": "a" * 64, "corpus": "b" * 64, "tokenizer": "c" * 64},
        "versions": {"torch": "<b>2</b>"},
    }
    (run / "run.json").write_text(json.dumps(record))
    lines: list[dict[str, Any]] = []
    for stage in ("pretrain", "sft"):
        for step in range(0, 31, 10):
            place = {"stage": stage, "step": step, "tokens": 100 * step}
            domains = ("chat", "code", "web")
            if step:
                load = [1 + 3 / step, 1.2]
                lines.append(
                    place | {"loss": 5.0, "lm_loss": 5.0 - step / 50, "z_loss": 1.0, "lr": 1e-3, "grad_norm": 1.0}
                    | {"dropped_fraction": 1 / step, "load_max_over_mean": load, "tokens_per_s": 1000.0 + step}
                )  # fmt: skip
            loads = {d: random.integers(1, 99, (2, 4)).tolist() for d in domains}
            losses = dict.fromkeys(domains, 6.0 - step / 20) | {"web": 6.0}
            lines.append(
                place | {"heldout": losses, "heldout_accuracy": dict.fromkeys(domains, 0.1), "expert_load": loads}
                | ({"distinct_per_16_tokens": {"chat": 4.0 - step / 30, "web": 4.0}} if stage == "sft" else {})
            )  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("html", "body", "main", "section", "table", "svg", "div"):
            self.open.append(tag)
        self.loaded += [f"{k}={v}" for k, v in attrs if k in ("src", "href") and v and not v.startswith(("#", "data:"))]

    def handle_endtag(self, tag: str) -> None:
        if self.open and tag == self.open[-1]:
            self.open.pop()


def page_of(folder: Path) -> str:
    pytest.importorskip("matplotlib", reason="needs the report extra: pip install 'moec[report]'")
    out = folder.parent / "out" / "page.html"
    write_report(folder, out)
    text = out.read_text("utf-8")
    page = _Page()
    page.feed(text)
    assert not page.open, f"not closed: {page.open}"
    assert not page.loaded, "the page loads something"
    return text


def test_a_page_needs_nothing_and_says_what_is_missing(folder: Path) -> None:
    text = page_of(folder)
    assert text.count("<svg") == 5
    assert "Not measured for this run" in text
    assert "&lt;b&gt;2&lt;/b&gt;" in text  # what a record says is text
    assert "the loss did not fall at each of them for web" in text
    assert re.search(
        r"sft, locality 0.0.*<td>change</td><td class=\"n\">-25%</td><td class=\"n\">\+0%</td>", text, re.S
    )
    assert "pretrain, locality" not in text  # a run from before it was measured


def test_what_was_measured_is_shown(folder: Path) -> None:
    c_RLE, labels = rows_of(np.random.default_rng(5), True)
    width = {"ptq_of_sft": 5.1, "float_continued": [5.0], "ptq": [5.05], "qat": [5.01], "gain": 0.04,
             "gain_by_seed": [0.04], "interval": [0.03, 0.05], "stress": False}  # fmt: skip
    measured = {
        "experts": {"pretrain": summary(c_RLE, labels)},
        "control": [
            {"step": s, "loss": 5.0, "dropped_fraction": 0.3, "load_max_over_mean": [4.0, 2.0]} for s in (10, 20)
        ],
        "rounding": {"rows": 7, "float": 5.0, "widths": {"4": width, "2": width | {"stress": True}}},
        "tasks": {"sft": {"chat_exact": {"exact_match": 0.25, "exact_match_stderr": 0.03}}},
        "responses": {
            "questions": 9,
            "right": {"midtrain": 0.125, "sft": 0.352},
            "base": "midtrain",
            "gain": {"sft": {"gain": 0.227, "interval": [0.15, 0.3]}},
        },
    }
    (folder / "measured.json").write_text(json.dumps(measured))
    text = page_of(folder)
    assert text.count("<svg") == 7
    assert re.search(r"INT2 \(stress test\).*\+0\.0300 to \+0\.0500", text, re.DOTALL)
    assert "0.250" in text
    assert re.search(r"midtrain</td>.*12\.5%.*sft</td>.*35\.2%.*\+22\.7 points.*\+15\.0 to \+30\.0", text, re.DOTALL)
    rows = balance_table(read_run(folder))
    assert rows[-1]["name"] == "pretrain, to step 20, no balancing"
    assert rows[-1]["dropped"] == pytest.approx(0.3)
    assert rows[-1]["worst"] == pytest.approx(4.0)
    assert rows[-2]["dropped"] == pytest.approx((0.1 + 0.05) / 2)


def test_the_held_out_load_has_the_mixture_of_its_stage(folder: Path) -> None:
    rows = {row["name"]: row for row in balance_table(read_run(folder))}
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if "expert_load" in line]
    loads = {line["stage"]: line["expert_load"] for line in last}  # the last of each stage stays
    p = {d: np.asarray(c, float) / np.sum(c, axis=-1, keepdims=True) for d, c in loads["pretrain"].items()}
    mixed_LE = 0.75 * p["web"] + 0.25 * p["code"]
    assert rows["pretrain"]["heldout"] == pytest.approx((4 * mixed_LE).max(), rel=1e-12)  # 4 experts: the mean is 1/4
    chat_LE = np.asarray(loads["sft"]["chat"], float)
    assert rows["sft"]["heldout"] == pytest.approx((chat_LE.max(-1) / chat_LE.mean(-1)).max(), rel=1e-12)


def test_tables_hold_the_first_and_the_last(folder: Path) -> None:
    first, second = heldout_table(read_run(folder))
    assert first["shares"] == {"web": 0.75, "code": 0.25}
    assert (first["first"]["code"], first["last"]["code"]) == (6.0, 4.5)
    assert first["rising"] == ["web"]
    assert second["stage"] == "sft"


def test_a_line_cut_short_by_a_kill_is_left_out_and_damage_is_named(folder: Path) -> None:
    file = folder / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"stage": "sft", "st')
    assert len(read_run(folder).steps) == 6
    file.write_text('{"stage"\n' + whole)
    with pytest.raises(ReportError, match=r"metrics\.jsonl:1: damaged"):
        read_run(folder)
    file.write_text("")
    with pytest.raises(ReportError, match="no step was logged"):
        read_run(folder)
    file.unlink()
    with pytest.raises(ReportError, match="no metrics"):
        read_run(folder)
    (folder / "run.json").write_text("[]")
    with pytest.raises(ReportError, match="not an object"):
        read_run(folder)


def test_the_command_writes_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the report extra: pip install 'moec[report]'")
    out = folder.parent / "r.html"
    assert command(["report", str(folder), "--out", str(out)]) == 0
    assert "Expert load by layer and stage" in out.read_text("utf-8")
