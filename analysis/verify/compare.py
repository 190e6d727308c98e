"""A session against the eager reference: the checks of `moec verify ARTIFACT`, whatever target made the session.

    layers          each layer started from the artifact's own values: the inputs of its MoE block (attention, norms),
                    its output with the routing forced (experts, shared expert), the router on the same input, and the
                    selections that the reference makes by itself
    logits          of the last norm and the head, started likewise
    free run        whole prompts from token ids on, each side with its own routing and its own errors accumulated; and
                    where the session can, once more without rounding of activations, so that errors accumulate but the
                    drift that rounding makes of them does not
    consistency     odd chunks and decoding against one prefill; a second run against the first

The longest prompt is run twice, at once and in odd chunks and single tokens; both are compared layer by layer.

T tokens, V vocabulary, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moec.analysis.verify import metrics, tolerances
from moec.analysis.verify.blocks import FusedBlock
from moec.analysis.verify.graphs import close_rows
from moec.analysis.verify.metrics import RouterAgreement
from moec.analysis.verify.phases import Drift, judge_elements, judge_steps, tail_cosine, tail_limit
from moec.analysis.verify.replay import experts_used, replay_in_pieces, replay_prompt
from moec.analysis.verify.report import Check, LayerRow
from moec.analysis.verify.tolerances import Tolerance
from moec.compiler.progress import Progress
from moec.compiler.reference import (
    FLOAT_NOISE,
    NOISE,
    Followed,
    LayerReference,
    Reference,
    ReferenceBlock,
    Replay,
    Routed,
)
from moec.compiler.target import MoeTrace, Session

DECODE_STEPS = 8
_CLOSE = {"atol": tolerances.FLOAT_ATOL, "rtol": tolerances.FLOAT_RTOL}


@dataclass
class Comparison:
    """What `compare` finds."""

    quantized: bool
    checks: list[Check] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def compare(
    session: Session,
    reference: LayerReference,
    prompts: Mapping[str, Sequence[int]],
    *,
    layer_names: Sequence[str],
    quantized: bool,
    float_reference: Reference | None = None,
    unrounded: Session | None = None,
    progress: Progress,
) -> Comparison:
    """Run everything. `layer_names` are the MoE layers in order. `quantized` chooses the tolerances. `float_reference`
    has the same codes and rounds no activations: the distance from it is reported, and `unrounded`, the artifact run
    likewise, must equal it."""
    found = Comparison(quantized)
    replays = {}
    with progress.stage("run the artifact", len(prompts) + 1) as step:
        for name, ids in prompts.items():
            replays[name] = replay_prompt(session, ids, len(layer_names))
            step(name)
        longest = max(prompts, key=lambda name: len(prompts[name]))
        steps = min(DECODE_STEPS, len(prompts[longest]))
        pieces = replay_in_pieces(session, prompts[longest], len(layer_names), steps)
        step(f"{longest} in pieces")
    if layer_names:
        _layer_by_layer(found, reference, {**replays, f"{longest} in pieces": pieces}, layer_names, progress)
    drift, tied = free_run(found, reference, replays, len(layer_names), progress)
    consistency(found, session, longest, replays[longest], pieces, drift, tied[longest], steps)
    if float_reference is not None:
        without_rounding(found, float_reference, unrounded, replays, len(layer_names), progress, steps)
    return found


def _worst(values: Mapping[str, float], *, low: bool = True) -> tuple[float, str]:
    """The value furthest from good, and where; NaN counts as worst."""
    where = min(values, key=lambda k: (not np.isnan(values[k]), values[k] if low else -values[k]))
    return values[where], where


def logits_figures(prefix: str, replays: Mapping[str, Replay], logits: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Pooled over the tokens of all prompts; SQNR is the worst prompt's."""
    return _figures(prefix, {name: (logits[name], replay.logits_TV) for name, replay in replays.items()})


def _figures(prefix: str, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    cosines = np.concatenate([metrics.row_cosines(r, a) for r, a in pairs.values()])
    return {
        f"{prefix}SQNR dB (worst prompt)": min(metrics.sqnr_db(r, a) for r, a in pairs.values()),
        f"{prefix}median cosine": float(np.median(cosines)),
        f"{prefix}min cosine": float(cosines.min()),
        f"{prefix}relative error (worst row)": max(metrics.row_error(r, a) for r, a in pairs.values()),
        f"{prefix}top-1 agreement": float(
            np.concatenate([metrics.top1_matches(r, a) for r, a in pairs.values()]).mean()
        ),
    }


# --- layer by layer -------------------------------------------------------------------------------------------------


def _layer_by_layer(
    found: Comparison,
    reference: LayerReference,
    replays: Mapping[str, Replay],
    layer_names: Sequence[str],
    progress: Progress,
) -> None:
    own = RouterAgreement(0, 0, 0)
    with progress.stage("compare layer by layer", len(layer_names)) as step:

        def on_layer(layer: int, block: ReferenceBlock, followed: Mapping[str, Followed]) -> None:
            nonlocal own
            row, agreement = _layer_row(layer, layer_names[layer], block, replays, followed, quantized=found.quantized)
            found.layers.append(row)
            own = own + agreement
            step(layer_names[layer])

        logits = reference.follow(replays, on_layer)
    figures = logits_figures("", replays, logits)
    found.figures.update(figures)
    found.figures["router: ties left out"] = f"{own.ties} of {own.tokens}"
    if found.quantized:
        found.checks.append(Check("logits: median cosine", figures["median cosine"], tolerances.MEDIAN_COSINE))
    else:
        ratios = {n: metrics.tolerance_ratio(logits[n], r.logits_TV, **_CLOSE) for n, r in replays.items()}
        worst, where = _worst(ratios, low=False)
        found.checks.append(Check("logits: every element", worst, tolerances.FLOAT_CLOSE, where))
    found.checks.append(Check("logits: top-1 agreement", figures["top-1 agreement"], tolerances.TOP1))
    detail = f"{own.ties} ties of {own.tokens} left out"
    limit = tolerances.of_sample(tolerances.ROUTER_SETS, own.compared)
    found.checks.append(Check("router: expert sets equal", own.fraction, limit, detail=detail))
    judge_layers(found)


def _layer_row(
    layer: int,
    name: str,
    block: ReferenceBlock,
    replays: Mapping[str, Replay],
    followed: Mapping[str, Followed],
    *,
    quantized: bool,
) -> tuple[LayerRow, RouterAgreement]:
    """The row, and the agreement of the selections that the reference makes on its own input."""
    trace = _pooled([r.layers[layer] for r in replays.values()])
    x_TD = np.concatenate([followed[prompt].x_TD for prompt in replays])
    y_TD = np.concatenate([followed[prompt].y_TD for prompt in replays])
    same = block.route(trace.x_TD, forced_TK=trace.indices_TK)
    on_same = _agreement(same, trace.indices_TK)
    own = _agreement(block.route(x_TD), trace.indices_TK)
    inputs, outputs = metrics.Cosine.of(x_TD, trace.x_TD), metrics.Cosine.of(y_TD, trace.y_TD)
    row = LayerRow(
        layer=layer,
        name=name,
        tokens=on_same.tokens,
        ties=on_same.ties,
        experts_used=experts_used(replays, layer),
        router=own.fraction,
        router_same_input=on_same.fraction,
        weights_ratio=metrics.tolerance_ratio(same.weights_TK, trace.weights_TK, **_CLOSE),
        input_median_cosine=inputs.median,
        input_min_cosine=inputs.minimum,
        input_ratio=metrics.tolerance_ratio(x_TD, trace.x_TD, **_CLOSE),
        median_cosine=outputs.median,
        min_cosine=outputs.minimum,
        sqnr_db=metrics.sqnr_db(y_TD, trace.y_TD),
        max_abs_error=metrics.max_abs_error(y_TD, trace.y_TD),
        output_ratio=metrics.tolerance_ratio(y_TD, trace.y_TD, **_CLOSE),
        passed=False,
    )
    passed = all(tolerance.holds(value) for _, value, tolerance in _row_limits(row, quantized))
    return LayerRow(**{**vars(row), "passed": passed}), own


def block_row(layer: int, name: str, block: FusedBlock, replays: Mapping[str, Replay], quantized: bool) -> LayerRow:
    """A block alone: output and router on the artifact's own input. What leads to that input is not measured."""
    trace = _pooled([r.layers[layer] for r in replays.values()])
    y_TD = block.output(trace.x_TD, trace.indices_TK, trace.weights_TK)
    outputs = metrics.Cosine.of(y_TD, trace.y_TD)
    same, ties, weights_ratio = float("nan"), 0, float("nan")
    if block.shared_input:
        routed = block.route(trace.x_TD, forced_TK=trace.indices_TK)
        agreement = _agreement(routed, trace.indices_TK)
        same, ties = agreement.fraction, agreement.ties
        weights_ratio = metrics.tolerance_ratio(routed.weights_TK, trace.weights_TK, **_CLOSE)
    row = LayerRow(
        layer=layer,
        name=name,
        tokens=len(trace.x_TD),
        ties=ties,
        experts_used=experts_used(replays, layer),
        router=same,
        router_same_input=same,
        weights_ratio=weights_ratio,
        input_median_cosine=float("nan"),
        input_min_cosine=float("nan"),
        input_ratio=float("nan"),
        median_cosine=outputs.median,
        min_cosine=outputs.minimum,
        sqnr_db=metrics.sqnr_db(y_TD, trace.y_TD),
        max_abs_error=metrics.max_abs_error(y_TD, trace.y_TD),
        output_ratio=metrics.tolerance_ratio(y_TD, trace.y_TD, **_CLOSE),
        passed=False,
        has_inputs=False,
        has_router=block.shared_input,
    )
    passed = all(tolerance.holds(value) for _, value, tolerance in _row_limits(row, quantized))
    return LayerRow(**{**vars(row), "passed": passed})


def _agreement(reference: Routed, actual_TK: np.ndarray) -> RouterAgreement:
    return metrics.router_agreement(reference.indices_TK, actual_TK, reference.scores_TE, tie_gap=tolerances.TIE_GAP)


def _row_limits(row: LayerRow, quantized: bool) -> list[tuple[str, float, Tolerance]]:
    """What one layer must satisfy."""
    limits: list[tuple[str, float, Tolerance]] = []
    if row.has_router:
        limits.append(("router: expert sets equal, same input", row.router_same_input, tolerances.ROUTER_SAME_INPUT))
        limits.append(("router: combine weights", row.weights_ratio, tolerances.COMBINE_WEIGHTS))
    if row.has_inputs and not quantized:
        limits.append(("block inputs: every element", row.input_ratio, tolerances.FLOAT_CLOSE))
    if row.has_inputs and quantized:
        limits.append(("block inputs: median cosine", row.input_median_cosine, tolerances.MEDIAN_COSINE))
        limits.append(("block inputs: min cosine", row.input_min_cosine, tolerances.LAYER_MIN_COSINE))
    if not quantized:
        limits.append(("block outputs: every element", row.output_ratio, tolerances.FLOAT_CLOSE))
        return limits
    limits.append(("block outputs: median cosine", row.median_cosine, tolerances.MEDIAN_COSINE))
    limits.append(("block outputs: min cosine", row.min_cosine, tolerances.LAYER_MIN_COSINE))
    limits.append(("block outputs: SQNR", row.sqnr_db, tolerances.LAYER_SQNR))
    return limits


def judge_layers(found: Comparison) -> None:
    """One check per limit, with the value of the worst layer and the layers that miss it."""
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


# --- free run -------------------------------------------------------------------------------------------------------


def free_run(
    found: Comparison,
    reference: Reference,
    replays: Mapping[str, Replay],
    moe_layers: int,
    progress: Progress,
) -> tuple[Drift, dict[str, np.ndarray]]:
    """End to end from token ids on. Returns how far the reference drifts from itself when perturbed, and by prompt the
    tokens with a tie in any layer, bool [T]."""
    prompts = {name: replay.ids for name, replay in replays.items()}
    routed: dict[int, Mapping[str, Routed]] = {}
    with progress.stage("run the reference", max(moe_layers, 1)) as step:
        logits = reference.run(prompts, keeping(routed, step))
    tied = tied_tokens(prompts, routed)
    if found.quantized:
        with progress.stage("run the reference perturbed", max(moe_layers, 1)) as step:
            return _beyond_drift(found, "free run: ", reference, (logits, routed), replays, step), tied
    found.figures.update(logits_figures("free run: ", replays, logits))
    _free_run_float(found, reference, replays, logits, tied)
    return Drift.none(), tied


def tied_tokens(
    prompts: Mapping[str, Sequence[int]], routed: Mapping[int, Mapping[str, Routed]]
) -> dict[str, np.ndarray]:
    """By prompt, whether a selection of a token is a tie in any layer, bool [T]."""
    tied = {name: np.zeros(len(ids), dtype=bool) for name, ids in prompts.items()}
    for by_prompt in routed.values():
        for name, r in by_prompt.items():
            tied[name] |= metrics.selection_gaps(r.scores_TE, r.indices_TK.shape[-1]) < tolerances.TIE_GAP
    return tied


def _beyond_drift(
    found: Comparison,
    prefix: str,
    reference: Reference,
    free: tuple[Mapping[str, np.ndarray], Mapping[int, Mapping[str, Routed]]],
    replays: Mapping[str, Replay],
    step: Callable[[str], None],
    relative: float = NOISE,
) -> Drift:
    """Whole runs of the artifact against those of the reference, `free`: no further than both drift, which the
    perturbed reference tells. Returns that drift."""
    logits, routed = free
    prompts = {name: replay.ids for name, replay in replays.items()}
    perturbed_routed: dict[int, Mapping[str, Routed]] = {}
    perturbed = reference.perturbed(prompts, keeping(perturbed_routed, step), relative=relative)
    figures = logits_figures(prefix, replays, logits)
    found.figures.update(figures)
    drift = _figures("", {name: (logits[name], perturbed[name]) for name in prompts})
    tokens = sum(len(ids) for ids in prompts.values())
    values: list[tuple[str, float, Tolerance, float, int | None, str]] = [
        (name, figures[f"{prefix}{name}"], tolerance, drift[name], count, "")
        for name, tolerance, count in (
            ("median cosine", tolerances.MEDIAN_COSINE, None),
            ("top-1 agreement", tolerances.TOP1, tokens),
        )
    ]
    if routed:
        sets = _sets(routed, lambda name, layer: replays[name].layers[layer].indices_TK)
        itself = _sets(routed, lambda name, layer: perturbed_routed[layer][name].indices_TK)
        ties = f"; {sets.ties} ties of {sets.tokens} left out"
        limit = tolerances.ROUTER_SETS
        values.append(("expert sets equal", sets.fraction, limit, itself.fraction, itself.compared, ties))
    for name, value, tolerance, same, count, more in values:
        limit = tolerances.beyond_drift(tolerance, 1 - same, count)
        detail = f"the reference with itself, perturbed: {same:.7g}{more}"
        found.checks.append(Check(f"{prefix}{name}", value, limit, detail=detail))
    rows = Drift.of(logits, perturbed)
    cosines_T = np.concatenate(
        [metrics.row_cosines(logits[name], replay.logits_TV) for name, replay in replays.items()]
    )
    detail = f"the reference with itself, perturbed: {1 - rows.tail:.7g}"
    limit = tail_limit(rows)
    found.checks.append(Check(f"{prefix}cosine of all but the worst 5%", tail_cosine(cosines_T), limit, detail=detail))
    return rows


def _free_run_float(
    found: Comparison,
    reference: Reference,
    replays: Mapping[str, Replay],
    logits: Mapping[str, np.ndarray],
    tied: Mapping[str, np.ndarray],
) -> None:
    ratios, explained, tokens = {}, 0, 0
    for name, replay in replays.items():
        ratios[name], left_out = close_rows(logits[name], replay.logits_TV, tied[name])
        explained, tokens = explained + left_out, tokens + len(replay.ids)
    worst, where = _worst(ratios, low=False)
    detail = f"{explained} of {tokens} tokens left out after a tie" if explained else ""
    limit = tolerances.FLOAT_CLOSE
    if worst > 1 and np.isfinite(worst):
        perturbed = reference.perturbed({name: replay.ids for name, replay in replays.items()})
        limit = tolerances.deep_float(max(close_rows(logits[n], perturbed[n], tied[n])[0] for n in replays))
    found.checks.append(Check("free run: every element", worst, limit, where, detail))
    found.checks.append(Check("free run: tokens compared", 1 - explained / tokens, tolerances.COMPARED))
    top1 = float(found.figures["free run: top-1 agreement"])
    found.checks.append(Check("free run: top-1 agreement", top1, tolerances.TOP1))


def without_rounding(
    found: Comparison,
    reference: Reference,
    session: Session | None,
    replays: Mapping[str, Replay],
    moe_layers: int,
    progress: Progress,
    steps: int,
) -> None:
    """How far rounding takes the artifact from float activations; and its codes, run without rounding, end to end.

    The second drifts little, since only the KV cache rounds: its limits are close to those of a single layer. The
    longest prompt runs once more in odd chunks and `steps` single tokens, which are judged apart.
    """
    prompts = {name: replay.ids for name, replay in replays.items()}
    routed: dict[int, Mapping[str, Routed]] = {}
    with progress.stage("run the reference with float activations", max(moe_layers, 1)) as step:
        logits = reference.run(prompts, keeping(routed, step))
    found.figures.update(logits_figures("against float activations: ", replays, logits))
    if session is None:
        return
    prefix = "free run, float activations: "
    with progress.stage("run the artifact with float activations", max(moe_layers, 1)) as step:
        unrounded = {name: replay_prompt(session, ids, moe_layers) for name, ids in prompts.items()}
        _beyond_drift(found, prefix, reference, (logits, routed), unrounded, step, FLOAT_NOISE)
        name = max(prompts, key=lambda prompt: len(prompts[prompt]))
        pieces = replay_in_pieces(session, prompts[name], moe_layers, steps)
    with progress.stage("run the reference with the artifact's routing", max(moe_layers, 1)):
        found.checks += _routed_alike(reference, unrounded, name, pieces, steps)


def _routed_alike(
    reference: Reference, whole: Mapping[str, Replay], name: str, pieces: Replay, steps: int
) -> list[Check]:
    """Every row of a run without rounding of activations, `pieces` being that of prompt `name` in pieces.

    The reference takes the artifact's experts: one flipped step of the KV cache may change the selection of a token
    whose ranks are close, which is right and changes its logits by a tenth. What the reference would have selected is
    judged instead. Drift is measured only if there is something to excuse.
    """
    prefix, runs = "float activations, routed alike: ", {**whole, f"{name} in pieces": pieces}
    prompts = {prompt: replay.ids for prompt, replay in runs.items()}
    routing = {prompt: [t.indices_TK for t in replay.layers] for prompt, replay in runs.items()}
    routed: dict[int, Mapping[str, Routed]] = {}
    logits = reference.run(prompts, keeping(routed, lambda layer: None), routing=routing)
    pieces_TV = logits[f"{name} in pieces"]
    head, single = pieces_of(pieces_TV, pieces, steps)
    phases = {
        "prefill": {prompt: (logits[prompt], replay.logits_TV) for prompt, replay in whole.items()},
        "odd chunks": {name: head},
        "decode steps": {name: single},
    }

    def judged(drift: Drift, flips: float) -> list[Check]:
        checks = judge_steps(prefix, pieces_TV, pieces.logits_TV, steps, drift, name)
        for phase, pairs in phases.items():
            checks += judge_elements(prefix, phase, pairs, drift)
        if routed:
            sets = _sets(routed, lambda prompt, layer: routing[prompt][layer])
            limit = tolerances.beyond_drift(tolerances.ROUTER_SETS, flips, sets.compared)
            checks.append(Check(f"{prefix}expert sets equal", sets.fraction, limit))
        return checks

    checks = judged(Drift.none(), 0.0)
    if all(check.passed for check in checks):
        return checks
    moved: dict[int, Mapping[str, Routed]] = {}
    perturbed = reference.perturbed(prompts, keeping(moved, lambda layer: None), routing=routing, relative=FLOAT_NOISE)
    flips = 1 - _sets(routed, lambda prompt, layer: moved[layer][prompt].indices_TK).fraction if routed else 0.0
    return judged(Drift.of(logits, perturbed), flips)


def pieces_of(
    reference_TV: np.ndarray, pieces: Replay, steps: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(reference, actual) of the rows that came in odd chunks, and of the `steps` that were decoded one at a time."""
    head = len(reference_TV) - steps
    return (reference_TV[:head], pieces.logits_TV[:head]), (reference_TV[head:], pieces.logits_TV[head:])


def keeping(kept: dict[int, Mapping[str, Routed]], step: Callable[[str], None]):  # type: ignore[no-untyped-def]
    def on_layer(layer: int, block: ReferenceBlock, routed: Mapping[str, Routed]) -> None:
        kept[layer] = dict(routed)
        step(f"layer {layer}")

    return on_layer


def _sets(routed: Mapping[int, Mapping[str, Routed]], actual: Callable[[str, int], np.ndarray]) -> RouterAgreement:
    agreements = (_agreement(r, actual(name, n)) for n, by_prompt in routed.items() for name, r in by_prompt.items())
    return sum(agreements, RouterAgreement(0, 0, 0))


# --- the artifact against itself ------------------------------------------------------------------------------------


def consistency(
    found: Comparison,
    session: Session,
    name: str,
    whole: Replay,
    pieces: Replay,
    drift: Drift,
    tied_T: np.ndarray,
    steps: int,
) -> None:
    """The longest prompt: in pieces, a second time, and with the logits of its last token alone."""
    session.reset()
    again_TV = np.asarray(session.prefill(list(whole.ids), logits="all"))
    session.reset()
    last_1V = np.asarray(session.prefill(list(whole.ids), logits="last")).reshape(1, -1)
    if found.quantized:
        # every piece has been compared layer by layer; together they drift like any two runs
        found.checks += judge_steps("consistency: ", whole.logits_TV, pieces.logits_TV, steps, drift, name)
    else:
        found.checks += _steps_in_float(whole.logits_TV, pieces.logits_TV, tied_T, steps, name)
    last = "consistency: last logits equal all logits"
    if found.quantized:
        cosine = metrics.Cosine.of(whole.logits_TV[-1:], last_1V).median
        found.checks.append(Check(last, cosine, tolerances.MEDIAN_COSINE, name))
    else:
        ratio = metrics.tolerance_ratio(whole.logits_TV[-1:], last_1V, **_CLOSE)
        found.checks.append(Check(last, ratio, tolerances.FLOAT_CLOSE, name))
    error = metrics.max_abs_error(whole.logits_TV, again_TV)
    found.checks.append(Check("consistency: a second run is identical", error, tolerances.IDENTICAL, name))


def _steps_in_float(
    whole_TV: np.ndarray, pieces_TV: np.ndarray, tied_T: np.ndarray, steps: int, name: str
) -> list[Check]:
    """Every element of the rows that came in odd chunks, and of those that were decoded one at a time."""
    head = len(whole_TV) - steps
    after_tie_T = np.logical_or.accumulate(tied_T)  # a tie before the first decode step explains one that follows
    checks = []
    for label, rows in (("odd chunks", slice(0, head)), ("decode steps", slice(head, None))):
        if len(whole_TV[rows]):
            ratio, _ = close_rows(whole_TV[rows], pieces_TV[rows], after_tie_T[rows])
            checks.append(Check(f"consistency: {label}, every element", ratio, tolerances.FLOAT_CLOSE, name))
    return checks
