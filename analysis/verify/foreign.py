"""Verifies artifacts of foreign models: those of sources without an eager reference, such as transformers.

The exported graph takes the reference's place, and its fused nodes that of the reference's blocks.

    exported model        the model's own graph, before any pass, with the artifact's dequantized weights, against the
                          graph that the passes made, which then rounds nothing: every element
    free run, quantized   the last graph before the target's passes, rounding like the artifact, against measured drift;
                          where the session can, once more with both sides rounding no activations
    blocks                each fused node, taken apart, on the artifact's own input and routing

T tokens, V vocabulary, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from moec.analysis.verify import compare, tolerances
from moec.analysis.verify.blocks import FusedBlock, block_of, fused_nodes
from moec.analysis.verify.graphs import close_rows, moe_selection_scores
from moec.analysis.verify.interpret import GraphRunner, Override, WeightCache
from moec.analysis.verify.replay import replay_in_pieces, replay_prompt
from moec.analysis.verify.report import Check
from moec.analysis.verify.rounding import (
    attention_of,
    float_products,
    perturbed_operators,
    routed_as,
    unrounded_operators,
    untraced,
    with_weights_of,
)
from moec.analysis.verify.structure import has_target_operators
from moec.compiler.artifact import Artifact
from moec.compiler.errors import ArtifactError
from moec.compiler.pipeline import Pass, steps
from moec.compiler.program import Program
from moec.compiler.progress import Progress
from moec.compiler.reference import NOISE, OnLayer, Prompts, Replay, Routed, Selections
from moec.compiler.target import Session, Target
from moec.passes.absorb_latents import RULE as ABSORB


def as_compiled(artifact: Artifact, passes: Sequence[Pass]) -> list[Pass]:
    """The passes without those that change what is computed and that came after the artifact was compiled: keys and
    values of an older one are rounded where this version rounds latents."""
    known = {p.name for p in artifact.manifest.passes}
    return [p for p in passes if p.name != ABSORB or ABSORB in known]


def before_target(program: Program, passes: Sequence[Pass]) -> Program:
    """The program as the passes of the compiler leave it, before the first operator of a target appears."""
    for step in steps(program, passes):
        if has_target_operators(step.after):
            return step.before
        program = step.after
    return program


class GraphReference:
    """A program run on whole prompts, in calls of at most its `max_tokens`; `Reference` of compiler/reference.py."""

    def __init__(self, program: Program, cache: WeightCache, overrides: Mapping[Any, Override] | None = None) -> None:
        """`overrides`: operators that are computed otherwise than the program says, in every run."""
        self._program, self._cache, self._overrides = program, cache, overrides or {}
        self._nodes = {node: layer for layer, node in enumerate(fused_nodes(program))}

    def run(
        self,
        prompts: Prompts,
        on_layer: OnLayer | None = None,
        *,
        routing: Selections | None = None,
    ) -> dict[str, np.ndarray]:
        """Logits float32 [T, V] by prompt; `on_layer` sees the selections that every fused node makes, those included
        that `routing` replaces."""
        return self._run(prompts, on_layer, {}, routing)

    def perturbed(
        self,
        prompts: Prompts,
        on_layer: OnLayer | None = None,
        *,
        routing: Selections | None = None,
        relative: float = NOISE,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """`run` with noise of `relative` its size in every norm's output."""
        return self._run(prompts, on_layer, perturbed_operators(relative, seed), routing)

    def block(self, layer: int) -> FusedBlock:
        """The fused node of the `layer`-th MoE layer with its weights."""
        runner = GraphRunner(self._program, cache=self._cache)
        return block_of(next(n for n, at in self._nodes.items() if at == layer), runner)

    def _run(
        self,
        prompts: Prompts,
        on_layer: OnLayer | None,
        overrides: Mapping[Any, Override],
        routing: Selections | None,
    ) -> dict[str, np.ndarray]:
        overrides = {**self._overrides, **overrides}
        free = GraphRunner(self._program, overrides=overrides, cache=self._cache)
        parts: dict[int, dict[str, list[Routed]]] = {}
        logits = {}
        for name, ids in prompts.items():

            def observe(node: Node, args: tuple[Any, ...], value: Any, name: str = name) -> None:
                if node in self._nodes:
                    parts.setdefault(self._nodes[node], {}).setdefault(name, []).append(_routed(node, args))

            runner = free
            if routing is not None and self._nodes:
                forced = routed_as(routing[name], overrides)
                runner = GraphRunner(self._program, overrides=forced, cache=self._cache)
            logits[name] = run_chunks(runner, ids, self._program.info.max_tokens, observe)
        if on_layer is not None:
            for layer, by_prompt in sorted(parts.items()):
                on_layer(layer, self.block(layer), {name: _joined(found) for name, found in by_prompt.items()})
        return logits


def run_chunks(runner: GraphRunner, ids: Sequence[int], longest: int, observe: Any = None) -> np.ndarray:
    """All logits [T, V] of a prompt from an empty cache, in calls of at most `longest` tokens."""
    runner.reset()
    return np.concatenate(
        [runner(ids[start : start + longest], start, observe).numpy() for start in range(0, len(ids), longest)]
    )


def _routed(node: Node, args: tuple[Any, ...]) -> Routed:
    scores, k = moe_selection_scores(node, args)
    return Routed(scores.numpy(), scores.topk(k, -1).indices.numpy(), np.zeros((len(scores), k), np.float32))


def _joined(parts: Sequence[Routed]) -> Routed:
    return Routed(
        np.concatenate([p.scores_TE for p in parts]),
        np.concatenate([p.indices_TK for p in parts]),
        np.concatenate([p.weights_TK for p in parts]),
    )


def compare_foreign(
    session: Session,
    exported: Program,
    last: Program,
    prompts: Prompts,
    *,
    target: Target,
    quantized: bool,
    rounds_activations: bool,
    unrounded: Session | None,
    progress: Progress,
) -> compare.Comparison:
    """`exported`: the program before any pass; `last`: before the target's passes (see `before_target`), whose
    attention is computed as `target` does. `unrounded`: the artifact run with float activations: of its rounding only
    that of the cache and of attention over it is left."""
    found = compare.Comparison(quantized)
    cache = WeightCache()
    attention = attention_of(target)
    reference = GraphReference(last, cache, attention)
    layers = fused_nodes(last)
    names = last.info.moe_layers or tuple(node.name for node in layers)
    if len(names) != len(layers):
        raise ArtifactError(
            f"{len(names)} MoE layers are listed, the graph has {len(layers)}", remedy="compile it again"
        )
    with progress.stage("run the artifact", len(prompts) + 1):
        replays = {name: replay_prompt(session, ids, len(layers)) for name, ids in prompts.items()}
        longest = max(prompts, key=lambda name: len(prompts[name]))
        steps = min(compare.DECODE_STEPS, len(prompts[longest]))
        pieces = replay_in_pieces(session, prompts[longest], len(layers), steps)
    with progress.stage("compare block by block", max(len(layers), 1)) as step:
        for layer in range(len(layers)):
            everything = {**replays, f"{longest} in pieces": pieces}
            found.layers.append(compare.block_row(layer, names[layer], reference.block(layer), everything, quantized))
            step(names[layer])
    compare.judge_layers(found)
    drift, tied = compare.free_run(found, reference, replays, len(layers), progress)
    compare.consistency(found, session, longest, replays[longest], pieces, drift, tied[longest], steps)
    logits = _exported_logits(with_weights_of(exported, last), prompts, cache, progress)
    found.figures.update(compare.logits_figures("against the exported model: ", replays, logits))
    _codes_found(found, untraced(exported, last))
    _passes_elements(found, GraphReference(last, cache, unrounded_operators()), prompts, logits, progress)
    if not rounds_activations:
        _exported_elements(found, replays, {longest: pieces}, logits, tied, steps)
    elif unrounded is None:
        value = compare.logits_figures("", replays, logits)["median cosine"]
        found.checks.append(Check("exported model: median cosine", value, tolerances.EXPORTED_COSINE))
    if unrounded is not None:
        unrounding = GraphReference(last, cache, {**float_products(), **attention})
        compare.without_rounding(found, unrounding, unrounded, replays, len(layers), progress, steps)
    return found


def _codes_found(found: compare.Comparison, lost: Sequence[str]) -> None:
    """A weight whose codes cannot be put into the exported model would be compared with its float value."""
    detail = f"{', '.join(lost[:3])}: say `origins` where the weight is made" if lost else ""
    name = "exported model: weights without their codes"
    found.checks.append(Check(name, float(len(lost)), tolerances.NO_FAULTS, detail=detail))


def _passes_elements(
    found: compare.Comparison,
    passes: GraphReference,
    prompts: Prompts,
    exported: Mapping[str, np.ndarray],
    progress: Progress,
) -> None:
    """What the passes made of the model, rounding nothing, against the model as it was exported: the same codes, every
    element. With it, an artifact that computes what the passes' graph says is the model."""
    routed: dict[int, Mapping[str, Routed]] = {}
    with progress.stage("run the graph of the passes", 1):
        logits = passes.run(prompts, compare.keeping(routed, lambda layer: None))
    tied = compare.tied_tokens(prompts, routed)
    ratios = {name: close_rows(exported[name], logits[name], tied[name])[0] for name in prompts}
    where = max(ratios, key=lambda name: ratios[name])
    limit = tolerances.FLOAT_CLOSE
    if 1 < ratios[where] < np.inf:
        # both graphs round, each in its own way: so must both sides of the distance that is allowed
        one, other = (passes.perturbed(prompts, seed=seed) for seed in (0, 1))
        limit = tolerances.deep_float(max(close_rows(one[n], other[n], tied[n])[0] for n in prompts))
    found.checks.append(Check("exported model: every element of the passes' graph", ratios[where], limit, where))


def _exported_logits(
    program: Program, prompts: Prompts, cache: WeightCache, progress: Progress
) -> dict[str, np.ndarray]:
    runner = GraphRunner(program, cache=cache)
    with progress.stage("run the exported model", len(prompts)), torch.no_grad():
        return {name: run_chunks(runner, ids, program.info.max_tokens) for name, ids in prompts.items()}


def _exported_elements(
    found: compare.Comparison,
    replays: Mapping[str, Replay],
    pieces: Mapping[str, Replay],
    logits: Mapping[str, np.ndarray],
    tied: Mapping[str, np.ndarray],
    steps: int,
) -> None:
    """The artifact against the model as it was exported, element by element: passes and kernels together. What was
    prefilled at once, in odd chunks, and decoded in `steps` single tokens is judged apart."""
    phases: dict[str, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]] = {
        "every element": {name: (logits[name], r.logits_TV, tied[name]) for name, r in replays.items()},
    }
    for name, replay in pieces.items():
        head, single = compare.pieces_of(logits[name], replay, steps)
        after_tie_T = np.logical_or.accumulate(tied[name])
        phases["odd chunks, every element"] = {name: (*head, after_tie_T[: len(head[0])])}
        phases["decode steps, every element"] = {name: (*single, after_tie_T[len(head[0]) :])}
    for phase, rows in phases.items():
        ratios = {name: close_rows(*of)[0] for name, of in rows.items()}
        where = max(ratios, key=lambda name: ratios[name])
        found.checks.append(Check(f"exported model: {phase}", ratios[where], tolerances.FLOAT_CLOSE, where))
    top1 = compare.logits_figures("", replays, logits)["top-1 agreement"]
    found.checks.append(Check("exported model: top-1 agreement", top1, tolerances.TOP1))
