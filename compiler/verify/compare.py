"""A session against the eager reference: the checks of `moec verify ARTIFACT`, whatever target made the session.

    end to end      logits of whole prompts, each side with its own routing and its own errors accumulated
    router          the reference's own selections against the artifact's, at the same token and layer
    layers          the reference block fed with the artifact's own input and routing: arithmetic alone, no history;
                    and the reference router on that input: routing alone
    consistency     decoding and odd chunks against one prefill; a second run against the first

T tokens, V vocabulary, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from moec.compiler.model.simulate import Routed
from moec.compiler.progress import Progress
from moec.compiler.target import MoeTrace, Session
from moec.compiler.verify import metrics, tolerances
from moec.compiler.verify.graphs import close_rows
from moec.compiler.verify.metrics import RouterAgreement
from moec.compiler.verify.replay import (
    Replay,
    decode_tail,
    experts_used,
    odd_cuts,
    prefill_in_chunks,
    replay_prompt,
)
from moec.compiler.verify.report import Check, LayerRow
from moec.compiler.verify.tolerances import Tolerance

DECODE_STEPS = 8


class ReferenceBlock(Protocol):
    """One MoE layer of the eager model."""

    def route(self, x_TD: np.ndarray, forced_TK: np.ndarray | None = None) -> Routed:
        """Select freely; `weights_TK` belong to `forced_TK` when it is given, else to the free selection."""
        ...

    def output(self, x_TD: np.ndarray, indices_TK: np.ndarray) -> np.ndarray:
        """The block's output with the routing forced to `indices_TK`, float32 [T, D]."""
        ...


# called once per MoE layer while its weights are in memory: (layer, block, prompt name -> the free selection)
OnLayer = Callable[[int, ReferenceBlock, Mapping[str, Routed]], None]


class Reference(Protocol):
    """The eager model with the artifact's codes, run layer by layer over all prompts at once."""

    def run(self, prompts: Mapping[str, Sequence[int]], on_layer: OnLayer | None = None) -> Mapping[str, np.ndarray]:
        """Logits float32 [T, V] by prompt."""
        ...


@dataclass
class Comparison:
    """What `compare` collects on its way; `checks()` judges it."""

    quantized: bool
    checks: list[Check] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def compare(
    session: Session,
    reference: Reference,
    prompts: Mapping[str, Sequence[int]],
    *,
    layer_names: Sequence[str],
    quantized: bool,
    float_reference: Reference | None = None,
    progress: Progress,
) -> Comparison:
    """Run everything. `layer_names` are the MoE layers in order; `float_reference` has the same codes and rounds no
    activations."""
    found = Comparison(quantized)
    replays = {}
    with progress.stage("run the artifact", len(prompts)) as step:
        for name, ids in prompts.items():
            replays[name] = replay_prompt(session, ids, len(layer_names))
            step(name)
    routers: dict[int, RouterAgreement] = {}
    tied = {name: np.zeros(len(ids), dtype=bool) for name, ids in prompts.items()}
    with progress.stage("run the reference", max(len(layer_names), 1)) as step:

        def on_layer(layer: int, block: ReferenceBlock, free: Mapping[str, Routed]) -> None:
            found.layers.append(_layer_row(layer, layer_names[layer], block, replays, quantized=quantized))
            for name, routed in free.items():
                actual = replays[name].layers[layer].indices_TK
                agreement = _agreement(routed, actual)
                routers[layer] = routers.get(layer, RouterAgreement(0, 0, 0)) + agreement
                gaps = metrics.selection_gaps(routed.scores_TE, actual.shape[-1])
                tied[name] |= gaps < tolerances.TIE_GAP
            step(layer_names[layer])

        logits = reference.run(prompts, on_layer)
    _end_to_end(found, replays, logits, tied)
    _consistency(found, session, replays, tied, progress)
    if layer_names:
        _routing(found, routers, layer_names)
        _layers(found)
    if float_reference is not None:
        with progress.stage("run the reference with float activations"):
            float_logits = float_reference.run(prompts)
        found.figures.update(_logits_figures("against float activations: ", replays, float_logits))
    return found


def _agreement(reference: Routed, actual_TK: np.ndarray) -> RouterAgreement:
    return metrics.router_agreement(reference.indices_TK, actual_TK, reference.scores_TE, tie_gap=tolerances.TIE_GAP)


def _worst(values: Mapping[str, float], *, low: bool = True) -> tuple[float, str]:
    """The value furthest from good, and where; NaN counts as worst."""
    where = min(values, key=lambda k: (not np.isnan(values[k]), values[k] if low else -values[k]))
    return values[where], where


# --- end to end -----------------------------------------------------------------------------------------------------


def _end_to_end(
    found: Comparison, replays: Mapping[str, Replay], logits: Mapping[str, np.ndarray], tied: Mapping[str, np.ndarray]
) -> None:
    figures = _logits_figures("", replays, logits)
    found.figures.update(figures)
    if found.quantized:
        found.checks.append(Check("logits: median cosine", figures["median cosine"], tolerances.MEDIAN_COSINE))
    else:
        ratios, explained, tokens = {}, 0, 0
        for name, replay in replays.items():
            ratios[name], left_out = close_rows(logits[name], replay.logits_TV, tied[name])
            explained, tokens = explained + left_out, tokens + len(replay.ids)
        worst, where = _worst(ratios, low=False)
        detail = f"{explained} of {tokens} tokens left out after a tie" if explained else ""
        found.checks.append(Check("logits: every element", worst, tolerances.FLOAT_CLOSE, where, detail))
        found.checks.append(Check("logits: tokens compared", 1 - explained / tokens, tolerances.COMPARED))
    found.checks.append(Check("logits: top-1 agreement", figures["top-1 agreement"], tolerances.TOP1))


def _logits_figures(prefix: str, replays: Mapping[str, Replay], logits: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Pooled over the tokens of all prompts; SQNR is the worst prompt's."""
    cosines, matches, ratios = [], [], []
    for name, replay in replays.items():
        cosines.append(metrics.row_cosines(logits[name], replay.logits_TV))
        matches.append(metrics.top1_matches(logits[name], replay.logits_TV))
        ratios.append(metrics.sqnr_db(logits[name], replay.logits_TV))
    all_cosines = np.concatenate(cosines)
    return {
        f"{prefix}SQNR dB (worst prompt)": min(ratios),
        f"{prefix}median cosine": float(np.median(all_cosines)),
        f"{prefix}min cosine": float(all_cosines.min()),
        f"{prefix}top-1 agreement": float(np.concatenate(matches).mean()),
    }


def _routing(found: Comparison, routers: Mapping[int, RouterAgreement], layer_names: Sequence[str]) -> None:
    total = sum(routers.values(), RouterAgreement(0, 0, 0))
    by_layer = {layer_names[n]: r.fraction for n, r in routers.items()}
    worst, where = _worst(by_layer)
    found.checks.append(
        Check(
            "router: expert sets equal end to end",
            total.fraction,
            tolerances.ROUTER_SETS,
            detail=f"{total.ties} ties of {total.tokens} left out; lowest {worst:.4%} in {where}",
        )
    )
    found.figures["router ties left out"] = f"{total.ties} of {total.tokens}"


# --- per layer, routing forced --------------------------------------------------------------------------------------


def _layer_row(
    layer: int, name: str, block: ReferenceBlock, replays: Mapping[str, Replay], *, quantized: bool
) -> LayerRow:
    trace = _pooled([r.layers[layer] for r in replays.values()])
    routed = block.route(trace.x_TD, forced_TK=trace.indices_TK)
    agreement = _agreement(routed, trace.indices_TK)
    reference_TD = block.output(trace.x_TD, trace.indices_TK)
    close = {"atol": tolerances.FLOAT_ATOL, "rtol": tolerances.FLOAT_RTOL}
    cosine = metrics.Cosine.of(reference_TD, trace.y_TD)
    row = LayerRow(
        layer=layer,
        name=name,
        tokens=agreement.tokens,
        ties=agreement.ties,
        router=agreement.fraction,
        weights_ratio=metrics.tolerance_ratio(routed.weights_TK, trace.weights_TK, **close),
        sqnr_db=metrics.sqnr_db(reference_TD, trace.y_TD),
        median_cosine=cosine.median,
        min_cosine=cosine.minimum,
        max_abs_error=metrics.max_abs_error(reference_TD, trace.y_TD),
        float_ratio=metrics.tolerance_ratio(reference_TD, trace.y_TD, **close),
        experts_used=experts_used(replays, layer),
        passed=False,
    )
    return LayerRow(**{**vars(row), "passed": all(t.holds(v) for _, v, t in _row_limits(row, quantized))})


def _row_limits(row: LayerRow, quantized: bool) -> list[tuple[str, float, Tolerance]]:
    """What one layer must satisfy."""
    limits = [
        ("router: expert sets equal, same input", row.router, tolerances.ROUTER_SAME_INPUT),
        ("router: combine weights", row.weights_ratio, tolerances.COMBINE_WEIGHTS),
    ]
    if quantized:
        limits.append(("layer outputs: median cosine", row.median_cosine, tolerances.MEDIAN_COSINE))
        limits.append(("layer outputs: min cosine", row.min_cosine, tolerances.LAYER_MIN_COSINE))
    else:
        limits.append(("layer outputs: every element", row.float_ratio, tolerances.FLOAT_CLOSE))
    return limits


def _layers(found: Comparison) -> None:
    """One check per limit, with the value of the worst layer and how many layers miss it."""
    by_limit: dict[str, list[tuple[float, Tolerance, LayerRow]]] = {}
    for row in found.layers:
        for name, value, tolerance in _row_limits(row, found.quantized):
            by_limit.setdefault(name, []).append((value, tolerance, row))
    for name, values in by_limit.items():
        tolerance = values[0][1]
        measured = {f"layer {row.layer} {row.name}": value for value, _, row in values}
        worst, where = _worst(measured, low=tolerance.relation.startswith(">"))
        missed = [str(row.layer) for value, t, row in values if not t.holds(value)]
        detail = f"missed by layers {', '.join(missed)}" if missed else ""
        found.checks.append(Check(name, worst, tolerance, where, detail))


def _pooled(traces: Sequence[MoeTrace]) -> MoeTrace:
    return MoeTrace(
        layer=traces[0].layer,
        x_TD=np.concatenate([t.x_TD for t in traces]),
        indices_TK=np.concatenate([t.indices_TK for t in traces]),
        weights_TK=np.concatenate([t.weights_TK for t in traces]),
        y_TD=np.concatenate([t.y_TD for t in traces]),
    )


# --- the artifact against itself ------------------------------------------------------------------------------------


def _consistency(
    found: Comparison,
    session: Session,
    replays: Mapping[str, Replay],
    tied: Mapping[str, np.ndarray],
    progress: Progress,
) -> None:
    """Decoding, odd chunks and repetition, on the longest prompt; all must equal the one prefill."""
    name, replay = max(replays.items(), key=lambda item: len(item[1].ids))
    tokens = len(replay.ids)
    steps = min(DECODE_STEPS, tokens)
    tail_TV = replay.logits_TV[tokens - steps :]
    with progress.stage("decode, chunks, repetition"):
        decoded_TV = decode_tail(session, replay.ids, steps)
        chunked_TV = prefill_in_chunks(session, replay.ids, odd_cuts(tokens))
        session.reset()
        again_TV = np.asarray(session.prefill(list(replay.ids), logits="all"))
        session.reset()
        last_1V = np.asarray(session.prefill(list(replay.ids), logits="last")).reshape(1, -1)
    pairs = {
        f"{steps} decode steps equal prefill": (tail_TV, decoded_TV),
        "odd chunks equal one prefill": (replay.logits_TV, chunked_TV),
        "last logits equal all logits": (tail_TV[-1:], last_1V),
    }
    for label, (expected, actual) in pairs.items():
        if found.quantized:
            cosine = metrics.Cosine.of(expected, actual)
            found.checks.append(Check(f"consistency: {label}", cosine.median, tolerances.MEDIAN_COSINE, name))
        else:
            # a tie anywhere before may have gone the other way: the rows that it explains are the last ones
            after_tie_T = np.logical_or.accumulate(tied[name])[-len(expected) :]
            ratio, _ = close_rows(expected, actual, after_tie_T)
            found.checks.append(Check(f"consistency: {label}", ratio, tolerances.FLOAT_CLOSE, name))
    error = metrics.max_abs_error(replay.logits_TV, again_TV)
    found.checks.append(Check("consistency: a second run is identical", error, tolerances.IDENTICAL, name))
