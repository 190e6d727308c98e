"""The plots of a report as inline SVG, drawn by matplotlib without a display."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from moec.analysis.report.graphs import COLOURS, ENGINE
from moec.compiler.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moec.analysis.plan.planner import Plan

_PARTS = {
    "weights": ("weights", "#4c78a8"),
    "kv_cache": ("KV cache", "#eeca3b"),
    "activations": ("activations", "#f58518"),
    "program": ("program", "#b279a2"),
    "runtime": ("runtime", "#bab0ac"),
}
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "moec",  # the same page from the same data
    "text.parse_math": False,  # a $ in a name is a $
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches. MissingExtra without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra(
            "reports need matplotlib, which is not installed", remedy="pip install 'moec[report]'"
        ) from None
    matplotlib.rcParams.update(_STYLE)
    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure, title: str) -> str:
    """The figure as an <svg> element: no XML header, no metadata, a title for screen readers."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def sizes(by_role: Mapping[str, int]) -> str:
    """Stored bytes by role, one bar each."""
    rows = sorted(by_role.items(), key=lambda item: item[1])
    figure = new_figure(7.2, 0.5 + 0.32 * len(rows))
    axes = figure.subplots()
    names = [role for role, _ in rows]
    values = [count / 1e6 for _, count in rows]
    bars = axes.barh(names, values, color=[COLOURS.get(role, ENGINE) for role in names])
    total = sum(values) or 1.0
    labels = [f"{v:,.1f} MB  {v / total:.1%}" if v >= 0.1 else f"{v * 1e3:,.1f} kB  {v / total:.1%}" for v in values]
    axes.bar_label(bars, labels, padding=4)
    axes.set_xlim(0, (max(values, default=0) or 1) * 1.25)
    axes.set_xlabel("MB in the file")
    return svg(figure, "stored bytes by role")


def resident(runs: Sequence[Mapping[str, Any]]) -> str:
    """Resident memory of every stream at its contexts, by what holds it."""
    bars = [(f"{run['stream']}\n{p['context']}", p["memory"]) for run in runs for p in run["points"]]
    figure = new_figure(max(4.5, 0.8 * len(bars) + 2.2), 3.1)
    axes = figure.subplots()
    bottom = [0.0] * len(bars)
    for part, (label, colour) in _PARTS.items():
        heights = [memory[part] / 1e6 for _, memory in bars]
        axes.bar(range(len(bars)), heights, bottom=bottom, label=label, color=colour, width=0.7)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(bars)), [name for name, _ in bars])
    axes.set_ylabel("resident, MB")
    figure.legend(loc="outside right upper", frameon=False)
    return svg(figure, "resident memory by prompt and context")


def rates(runs: Sequence[Mapping[str, Any]]) -> str:
    """Prefill and decode rates by context, medians with the spread of the repeats."""
    figure = new_figure(7.2, 2.8)
    for axes, key, title in zip(
        figure.subplots(1, 2),
        ("prefill_tokens_per_s", "decode_tokens_per_s"),
        ("prefill, tokens/s", "decode, tokens/s"),
        strict=True,
    ):
        for run in runs:
            points = [p for p in run["points"] if p[key]]
            middle = [p[key]["median"] for p in points]
            below = [p[key]["median"] - p[key]["min"] for p in points]
            above = [p[key]["max"] - p[key]["median"] for p in points]
            axes.errorbar(
                [p["context"] for p in points], middle, yerr=[below, above], marker="o", markersize=3.5,
                linewidth=1.2, capsize=2, label=run["stream"], linestyle=":" if run["kind"] == "dummy" else "-",
            )  # fmt: skip
        _contexts(axes, sorted({p["context"] for run in runs for p in run["points"]}))
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return svg(figure, "tokens per second by context")


def _contexts(axes: Any, values: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{v // 1024}K" if v % 1024 == 0 else str(v) for v in values])
    axes.minorticks_off()
    axes.set_xlabel("context, tokens")


def experts(found: Mapping[str, Any]) -> str:
    """Utilisation by layer and expert, a map for each domain; the same order of experts in all.

    A cell is an expert's share of its layer's selections, in units of an even share; logarithmic, white: never.
    """
    import numpy as np

    figure = new_figure(9.6, 0.6 + len(found["domains"]) * max(1.1, 0.055 * found["layers"] + 0.55))
    from matplotlib.colors import LogNorm

    grid = figure.subplots(len(found["domains"]), 1, sharex=True, squeeze=False)[:, 0]
    first_LE = np.array(next(iter(found["domains"].values()))["counts"])
    order_LE = np.argsort(-first_LE, axis=1, kind="stable")
    image = None
    for axes, (name, domain) in zip(grid, found["domains"].items(), strict=True):
        counts_LE = np.take_along_axis(np.array(domain["counts"], dtype=float), order_LE, axis=1)
        shares_LE = counts_LE / np.maximum(counts_LE.sum(1, keepdims=True), 1) * counts_LE.shape[1]
        shown = np.ma.masked_equal(shares_LE, 0.0)
        image = axes.imshow(
            shown, aspect="auto", interpolation="nearest", cmap="viridis_r", norm=LogNorm(0.05, 16, clip=True)
        )
        used = f"{domain['experts_used']} experts ({domain['experts_used_share']:.0%})"
        axes.set_title(f"{name}: {used}, entropy {domain['entropy']:.3f}", loc="left", fontsize=9)
        axes.set_ylabel("layer")
        for side in ("top", "right"):
            axes.spines[side].set_visible(True)
    grid[-1].set_xlabel(f"experts of each layer, by their use in {next(iter(found['domains']))}")
    assert image is not None
    bar = figure.colorbar(image, ax=list(grid), label="selections over an even share", shrink=0.7, pad=0.01)
    bar.set_ticks([0.1, 1, 10], labels=["0.1", "1", "10"])
    return svg(figure, "expert utilisation by layer and domain")


def budget(plan: Plan, measured: Mapping[int, float]) -> str:
    """Planned memory by context against the device's budget; `measured`: resident bytes here, by context."""
    assert plan.device is not None
    figure = new_figure(5.1, 2.8)
    axes = figure.subplots()
    contexts = [m.context for m in plan.by_context]
    parts = {
        "weights": ([m.weights + m.copies + m.tables for m in plan.by_context], _PARTS["weights"][1]),
        "KV cache": ([m.cache for m in plan.by_context], _PARTS["kv_cache"][1]),
        "activations": ([m.activations for m in plan.by_context], _PARTS["activations"][1]),
        "runtime": ([m.runtime for m in plan.by_context], _PARTS["runtime"][1]),
    }
    bottom = [0.0] * len(contexts)
    for name, (values, colour) in parts.items():
        heights = [v / 1e6 for v in values]
        axes.bar(range(len(contexts)), heights, bottom=bottom, label=name, color=colour, width=0.6)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.axhline(plan.device.budget / 1e6, color="#c1121f", linewidth=1.4, label="budget of an app")
    if plan.needs < plan.peak.peak:
        axes.axhline(plan.needs / 1e6, color="black", linewidth=1.0, linestyle="--", label="memory budget")
    known = [(i, measured[c] / 1e6) for i, c in enumerate(contexts) if c in measured]
    if known:
        axes.plot(*zip(*known, strict=True), "D", color="black", markersize=5, label="measured")
    axes.set_xticks(range(len(contexts)), [f"{c:,}" for c in contexts])
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("MB")
    figure.legend(loc="outside right upper", frameon=False)
    return svg(figure, f"memory by context against the budget of {plan.device.title}")


def latency(plan: Plan, measured: Mapping[int, float]) -> str:
    """Tokens per second of decoding by context: the device's roofline, what is expected, and what was measured here."""
    figure = new_figure(4.7, 2.8)
    axes = figure.subplots()
    contexts = [m.context for m in plan.by_context]
    axes.plot(contexts, [s.roofline_tokens_per_s for s in plan.decode], "--", color="#888888", label="roofline")
    expected = [s.expected_tokens_per_s for s in plan.decode if s.expected_tokens_per_s is not None]
    if len(expected) == len(contexts):
        axes.plot(contexts, expected, "o-", color="#4c78a8", label="expected")
    if measured:
        axes.plot(list(measured), list(measured.values()), "D", color="black", markersize=5, label="measured")
    _contexts(axes, contexts)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("decode, tokens/s")
    figure.legend(loc="outside right upper", frameon=False)
    assert plan.device is not None
    return svg(figure, f"decode rate by context on {plan.device.title}")
