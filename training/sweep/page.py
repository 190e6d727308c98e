"""What a sweep leaves for people and machines: the report as plain values, runs.csv for `moec fit`, and the plot."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from moec.analysis.report.figures import new_figure, svg
from moec.training.sweep.effects import COMPARED, CONFIDENCE, Blocks, Effect, Observation, effects
from moec.training.sweep.grid import Point
from moec.training.sweep.sweep import Planned, Swept

#: The first four are those of `moec fit`.
COLUMNS = (
    "active_parameters", "tokens", "experts", "loss", "granularity", "shared", "d_model", "total_parameters", "seed",
    "point",
)  # fmt: skip
METHOD = (
    "differences within seeds: least squares of loss = point + seed + noise, the noise's variance from the residuals "
    "of all points; Student's t, the pairs of values of one factor together at the confidence (Bonferroni). It speaks "
    "of other seeds, not of other held-out text. low_alone, high_alone: the paired t-test over the seeds' differences, "
    "which does not assume that the noise is as large at every point."
)
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2")
_INK, _GREY = "#1c2430", "#8a919c"


def plan_facts(planned: Planned) -> dict[str, Any]:
    """The plan as plain values: seconds, tokens, parameters; deviations as parts of one."""
    asked = planned.asked
    return {
        "name": asked.spec.name,
        "stage": planned.stage.name,
        "seeds": list(planned.seeds),
        "device": planned.device,
        "tolerance": asked.tolerance,
        "width_multiple": asked.multiple,
        "budget_seconds": asked.time,
        "runs": len(planned.runs),
        "predicted_seconds": planned.predicted,
        "points": [_point_facts(planned, point) for point in planned.points],
        "left_out": [asdict(left) for left in planned.left_out],
    }


def _point_facts(planned: Planned, point: Point) -> dict[str, Any]:
    moe = point.config.moe
    widths = {"ffn_width": point.config.ffn_width} if moe is None else {"moe": moe.model_dump(mode="json")}
    shape = {key: value for key, value in vars(point).items() if key != "config"}
    return {"name": point.name, **shape, **widths, "predicted_seconds": planned.seconds[point.name]}


def observations(swept: Swept) -> list[Observation]:
    """The losses of the runs that have one."""
    cells = {point.name: point.cell for point in swept.planned.points}
    return [
        Observation(r.point, r.seed, f"{cells[r.point]}-s{r.seed}", r.loss) for r in swept.trained if r.loss is not None
    ]


def report(swept: Swept) -> dict[str, Any]:
    """Everything that is known of a sweep, finished or not. MissingExtra without scipy."""
    planned, losses = swept.planned, observations(swept)
    fitted, found = Blocks(losses), effects(planned.points, losses) if losses else ()
    by_point = {p.name: [o.loss for o in losses if o.point == p.name] for p in planned.points}
    each = [
        _point_facts(planned, point)
        | {
            "losses": {str(o.seed): o.loss for o in losses if o.point == point.name},
            "loss": statistics.fmean(by_point[point.name]) if by_point[point.name] else None,
        }
        for point in planned.points
    ]
    return {
        **plan_facts(planned),
        "points": each,
        "method": METHOD,
        "confidence": CONFIDENCE,
        "noise": {"deviation": fitted.deviation, "degrees_of_freedom": fitted.degrees},
        "effects": [
            asdict(effect) | {"separable": effect.separable, "separable_alone": effect.separable_alone}
            for effect in found
        ],
        "verdicts": verdicts(planned, found),
        "trained": len(swept.trained),
        "lost": [asdict(result) for result in swept.lost],
        "waiting": [{"point": point, "seed": seed} for point, seed in swept.waiting],
    }


def verdicts(planned: Planned, found: Sequence[Effect]) -> dict[str, str]:
    """For each factor with two values or more in the grid: what its intervals say."""
    said = {}
    for factor in COMPARED:
        asked: tuple[Any, ...] = getattr(planned.asked.grid, factor)
        own = [effect for effect in found if effect.factor == factor]
        if len(asked) < 2:
            continue
        if not own:
            said[factor] = "nothing to compare"
        elif any(effect.low is None for effect in own):
            said[factor] = "no interval: more seeds are needed"
        elif any(effect.separable and effect.separable_alone for effect in own):
            said[factor] = "separable"
        elif any(effect.separable for effect in own):
            said[factor] = "separable if the noise is as large at every point; its seeds alone do not tell"
        else:
            said[factor] = "not separable at this size"
    return said


def value_text(factor: str, value: Any) -> str:
    """`E=8`, `g=4`, `shared`, `none shared`."""
    if factor == "experts":
        return "dense" if value == 1 else f"E={value}"
    if factor == "granularity":
        return f"g={value}"
    return "shared" if value else "none shared"


def runs_csv(swept: Swept) -> str:
    """A line for each trained run, as `moec fit` reads them: parameters and tokens in ones, the tables among them."""
    points = {point.name: point for point in swept.planned.points}
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for r in swept.trained:
        p = points[r.point]
        writer.writerow(
            [p.active, r.tokens, p.experts, r.loss, p.granularity, int(p.shared), p.d_model, p.total, r.seed, p.name]
        )
    return stream.getvalue()


def plot(found: Mapping[str, Any], title: str) -> str:
    """The report as an SVG: every run's loss within its seed on the left, effects with their intervals on the right.

    Left: losses less the mean of their seed (of those at one size and number of tokens). MissingExtra without
    matplotlib.
    """
    points = [p for p in found["points"] if p["losses"]]
    rows = max(len(points), len(found["effects"]), 2)
    figure = new_figure(10.5, 1.2 + 0.28 * rows)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [_label(p, found["points"]) for p in points]
    for place, centred in enumerate(_centred(points)):
        for order, value in enumerate(centred.values()):
            left.plot(value, place, "o", color=_COLOURS[order % len(_COLOURS)], markersize=4, alpha=0.8)
        left.plot(float(np.mean(list(centred.values()))), place, "|", color=_INK, markersize=14)
    left.axvline(0, color=_GREY, linewidth=0.8)
    left.set_yticks(range(len(names)), names)
    left.set(xlabel="held-out loss less its seed's mean, nats (a dot: a seed)", title=title)
    left.invert_yaxis()
    for place, effect in enumerate(found["effects"]):
        colour = _COLOURS[COMPARED.index(effect["factor"])]
        if effect["low"] is not None:
            right.plot([effect["low"], effect["high"]], [place, place], color=colour, linewidth=3, alpha=0.5)
        right.plot(effect["difference"], place, "|", color=_INK, markersize=14)
    right.axvline(0, color=_GREY, linewidth=0.8)
    labels = [_effect_label(effect) for effect in found["effects"]]
    right.set_yticks(range(len(labels)), labels)
    right.set(xlabel=f"difference, nats; bar: {found['confidence']:.0%} within a factor", title="effects")
    right.invert_yaxis()
    return svg(figure, "losses and effects of the sweep") + "\n"


def _centred(points: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The losses of each point by seed, less the mean over the points of its size and tokens that have that seed."""
    sums: dict[Any, list[float]] = {}
    for p in points:
        for seed, loss in p["losses"].items():
            sums.setdefault((p["d_model"], p["tokens"], seed), []).append(loss)
    means = {key: statistics.fmean(values) for key, values in sums.items()}
    return [{seed: loss - means[p["d_model"], p["tokens"], seed] for seed, loss in p["losses"].items()} for p in points]


def _label(point: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> str:
    block = "dense" if point["experts"] == 1 else f"E={point['experts']}, g={point['granularity']}"
    parts = [block + (", shared" if point["shared"] else "")]
    if len({p["d_model"] for p in points}) > 1:
        parts.append(f"d {point['d_model']}")
    if len({p["tokens"] for p in points}) > 1:
        parts.append(f"{point['tokens'] / 1e6:g} M")
    return ", ".join(parts)


def _effect_label(effect: Mapping[str, Any]) -> str:
    factor = effect["factor"]
    return f"{value_text(factor, effect['before'])} to {value_text(factor, effect['after'])}"
