"""The plots of a training report as inline SVG. L MoE layers, E experts, D domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moec.analysis.report.figures import new_figure, svg

Lines = Sequence[Mapping[str, Any]]
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#9d755d", "#eeca3b", "#72b7b2")


def colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def losses(steps: Lines, evaluations: Lines, bounds: Mapping[str, int]) -> str:
    """Training loss, and held-out loss by domain, over the tokens of the run. bounds: where each stage begins."""
    figure = new_figure(9.6, 3.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for index, (stage, start) in enumerate(bounds.items()):
        own = [line for line in steps if line["stage"] == stage]
        xs, ys = [(start + x["tokens"]) / 1e6 for x in own], [x["lm_loss"] for x in own]
        left.plot(xs, ys, color=colour(index), linewidth=1, label=stage)
    left.set(title="training loss, per step", xlabel="million tokens", ylabel="nats per predicted token")
    left.legend(frameon=False)
    domains = sorted({domain for line in evaluations for domain in line["heldout"]})
    for index, domain in enumerate(domains):
        # a stage's first evaluation is at the tokens of the last one's end; a gap keeps their contexts apart
        xs, ys = [], []
        for stage, start in bounds.items():
            own = [line for line in evaluations if line["stage"] == stage and domain in line["heldout"]]
            xs += [*((start + line["tokens"]) / 1e6 for line in own), float("nan")]
            ys += [*(line["heldout"][domain] for line in own), float("nan")]
        right.plot(np.asarray(xs), np.asarray(ys), color=colour(index), marker=".", markersize=4, label=domain)
    for start in list(bounds.values())[1:]:
        for axes in (left, right):
            axes.axvline(start / 1e6, color="#c9ced6", linewidth=0.8, zorder=0)
    right.set(title="held-out loss by domain", xlabel="million tokens")
    right.legend(frameon=False, ncols=2)
    return svg(figure, "loss curves")


def balance(steps: Lines, bounds: Mapping[str, int], control: Lines) -> str:
    """Load of the busiest expert over the mean, by layer, and dropped pairs; the control beside them."""
    figure = new_figure(9.6, 3.2)
    left, right = figure.subplots(1, 2)
    layers = len(steps[0]["load_max_over_mean"])
    xs = [(bounds[line["stage"]] + line["tokens"]) / 1e6 for line in steps]
    for layer in range(layers):
        left.plot(
            xs, [s["load_max_over_mean"][layer] for s in steps], color=colour(layer), linewidth=0.9, label=f"{layer}"
        )
    left.axhline(1.5, color="#8a919c", linewidth=0.8, linestyle="--")
    left.set(title="busiest expert / mean, by layer (dashed: 1.5)", xlabel="million tokens", yscale="log")
    left.legend(frameon=False, title="layer", ncols=2)
    right.plot(xs, [100 * s["dropped_fraction"] for s in steps], color=colour(0), linewidth=1, label="this run")
    if control:
        per_step = steps[0]["tokens"] / max(1, steps[0]["step"])
        shown = [line["step"] * per_step / 1e6 for line in control]
        right.plot(
            shown, [100 * c["dropped_fraction"] for c in control], color=colour(3), linewidth=1, label="no balancing"
        )
        left.plot(shown, [max(c["load_max_over_mean"]) for c in control], color="#1c2430", linewidth=1, linestyle=":")
    right.set(title="dropped pairs, %", xlabel="million tokens")
    right.legend(frameon=False)
    return svg(figure, "expert load and dropped pairs")


def loads(by_stage: Mapping[str, np.ndarray]) -> str:
    """How held-out text of all domains is spread over the experts, [L, E] by stage: 1 is an even share."""
    figure = new_figure(9.6, 0.9 + 0.28 * max(len(p) for p in by_stage.values()))
    all_axes = figure.subplots(1, len(by_stage), sharey=True, squeeze=False)[0]
    for axes, (stage, p_LE) in zip(all_axes, by_stage.items(), strict=True):
        image = axes.imshow(p_LE * p_LE.shape[1], cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
        axes.set(title=stage, xlabel="expert")
    all_axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=all_axes.tolist(), label="share / even share", shrink=0.9)
    return svg(figure, "expert load by layer and stage")


def utilisation(names: Sequence[str], p_DLE: np.ndarray, stage: str) -> str:
    """Normalised frequency by domain: a block of domains for each layer, experts ordered by the domain they serve."""
    domains, layers, _ = p_DLE.shape
    figure = new_figure(9.6, 0.7 + 0.17 * domains * layers)
    all_axes = figure.subplots(layers, 1, squeeze=False)[:, 0]
    for layer, axes in enumerate(all_axes):
        p_DE = p_DLE[:, layer]
        order = np.lexsort((-p_DE.max(axis=0), p_DE.argmax(axis=0)))
        image = axes.imshow(p_DE[:, order] * p_DE.shape[1], cmap="viridis", vmin=0, vmax=3, aspect="auto")
        axes.set_yticks(range(domains), names, fontsize=7)
        axes.set_xticks([])
        axes.set_ylabel(f"layer {layer}", fontsize=8)
    all_axes[-1].set_xlabel("experts, those that serve the same domain most side by side")
    figure.colorbar(image, ax=all_axes.tolist(), label="share / even share", shrink=0.8)
    return svg(figure, f"utilisation by domain after {stage}")


def divergences(by_stage: Mapping[str, Mapping[str, Any]]) -> str:
    """Jensen-Shannon divergence between domains by layer, beside shuffled labels, and entropy by domain."""
    figure = new_figure(9.6, 3.2)
    left, right = figure.subplots(1, 2)
    for index, (stage, found) in enumerate(by_stage.items()):
        layers = range(len(found["divergence"]))
        left.plot(layers, found["divergence"], color=colour(index), marker="o", markersize=4, label=stage)
        left.plot(layers, found["control_by_layer"], color=colour(index), linestyle=":", linewidth=1.2)
    left.set(title="divergence between domains (dotted: shuffled labels)", xlabel="layer", ylabel="bits")
    left.set_xticks(list(layers))
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    names = next(iter(by_stage.values()))["domains"]
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        effective = [float(np.mean(np.exp2(found["entropy"][index]))) for found in by_stage.values()]
        right.bar(np.arange(len(by_stage)) + index * width, effective, width, color=colour(index), label=name)
    right.set_xticks(np.arange(len(by_stage)) + 0.4 - width / 2, list(by_stage))
    right.set(title="effective experts, 2^entropy, mean of layers")
    right.legend(frameon=False, ncols=2, fontsize=7)
    right.set_ylim(0, 1.45 * right.get_ylim()[1] / 1.05)
    return svg(figure, "divergence and entropy")


def rounding(widths: Mapping[str, Mapping[str, Any]]) -> str:
    """What QAT gains over PTQ: the mean with its interval, and each seed."""
    figure = new_figure(6.2, 2.4)
    axes = figure.subplots()
    names = list(widths)
    for place, found in enumerate(widths.values()):
        low, high = found["interval"]
        axes.plot([low, high], [place, place], color=colour(0), linewidth=3, alpha=0.5)
        axes.plot(found["gain_by_seed"], [place] * len(found["gain_by_seed"]), "o", color=colour(1), markersize=4)
        axes.plot(found["gain"], place, "|", color="#1c2430", markersize=14)
    axes.axvline(0, color="#8a919c", linewidth=0.8)
    labels = [f"INT{name}{' (stress)' if found['stress'] else ''}" for name, found in widths.items()]
    axes.set_yticks(range(len(names)), labels)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlabel("PTQ - QAT in nats (above 0: QAT is better); bar: 95%, points: seeds")
    return svg(figure, "QAT against PTQ")


def throughput(steps: Lines, bounds: Mapping[str, int]) -> str:
    """Tokens per second as logged."""
    figure = new_figure(6.2, 2.4)
    axes = figure.subplots()
    for index, stage in enumerate(bounds):
        own = [line for line in steps if line["stage"] == stage]
        axes.plot([(bounds[stage] + x["tokens"]) / 1e6 for x in own], [x["tokens_per_s"] for x in own],
                  color=colour(index), linewidth=1, label=stage)  # fmt: skip
    axes.set(xlabel="million tokens", ylabel="tokens / s")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, ncols=4, fontsize=7)
    return svg(figure, "throughput")
