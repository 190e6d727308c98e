"""Trains mobilemoe-nano on real text through all four stages and measures what training should show.

    .venv/bin/python bench/train_report.py --out build/train-report          (`make train-report`)

Each part writes OUT/parts/NAME.json; a part that is there is not done again, and training continues from its last
state, so a stopped report goes on where it was. Nothing is chosen by held-out text: the spec is what the repository
holds, and every figure comes from its last step.

    corpus    real text from packages (`moec data build`)
    run       four stages (`moec train`)
    control   the first tenth of pre-training again, without balancing: same weights, same batches
    rounding  QAT and, for fairness, the same further training without rounding, then rounded after: paired seeds
    experts   which experts the domains use after each stage, beside a control with shuffled labels
    tasks     lm-evaluation-harness on the checkpoints of the stages and on the compiled artifact
    responses right next tokens of held-out responses, asked in the chat form and as running text, question by question
    exported  logits of the QAT model beside those of its artifact, with float activations and with INT8
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.compiler.progress import Progress
from moec.compiler.spec import Spec, load_spec
from moec.compiler.spec.training import TrainingStage
from moec.compiler.target import Session
from moec.sources.decoder.config import DecoderConfig
from moec.training.checkpoints import initial_weights, load_model, load_weights, stored_weights
from moec.training.data.batches import Batch, Batches, heldout
from moec.training.data.build import build
from moec.training.data.fetch import default_cache
from moec.training.data.shards import INDEX, Corpus
from moec.training.data.sources import DOMAINS
from moec.training.model import TrainingDecoder
from moec.training.parallel import World
from moec.training.rounding import Rounding
from moec.training.run import train
from moec.training.stage import Trainer
from moec.training.stages import data_seed

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "specs" / "models" / "mobilemoe-nano.yaml"
SEEDS = (1, 2, 3)
WIDTHS = (4, 3, 2)
CONTROL = 0.1  # of pre-training
ROUNDING_TOKENS = 100_000  # at scale 1, of further training for each seed and width
HELDOUT_TOKENS = 8192  # of each domain, for the comparison of QAT and PTQ
RESAMPLES = 10_000
TASK_ROWS = 240
PARTS = ("corpus", "run", "control", "rounding", "experts", "tasks", "responses", "exported")


def main() -> None:
    """Do every part that is missing, then write the report."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    report = Report(arguments.out, scaled(load_spec(SPEC), arguments.scale), arguments.scale, arguments.cache)
    for name in PARTS:
        if arguments.only is None or name in arguments.only.split(","):
            report.part(name, getattr(report, name))
    if arguments.only is None or "report" in arguments.only.split(","):
        report.write()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train mobilemoe-nano and report.")
    parser.add_argument("--out", type=Path, default=Path("build/train-report"))
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for downloads")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--scale", type=float, default=1.0, help="of every stage's tokens")
    parser.add_argument("--only", help="parts, comma-separated")
    return parser.parse_args()


def scaled(spec: Spec, scale: float) -> Spec:
    """The spec with `scale` times the tokens in every stage: warm-up and evaluations keep their places in it."""
    if scale == 1 or spec.training is None:
        return spec
    stages = [
        stage.model_copy(
            update={
                "tokens": int(stage.tokens * scale),
                "eval_every": None if stage.eval_every is None else max(1, int(stage.eval_every * scale)),
                "learning_rate": stage.learning_rate.model_copy(
                    update={"warmup": int(stage.learning_rate.warmup * scale)}
                ),
            }
        )
        for stage in spec.training.stages
    ]
    return spec.model_copy(update={"training": spec.training.model_copy(update={"stages": tuple(stages)})})


class Report:
    """The parts; each returns what it measured as plain values."""

    def __init__(self, out: Path, spec: Spec, scale: float, cache: Path) -> None:
        self.out, self.spec, self.scale, self.cache = out, spec, scale, cache
        self.progress = Progress()
        assert spec.training is not None
        assert isinstance(spec.model, DecoderConfig)
        self.training, self.model = spec.training, spec.model
        self.rounding_tokens = int(ROUNDING_TOKENS * scale)
        (out / "parts").mkdir(parents=True, exist_ok=True)

    def part(self, name: str, make: Callable[[], Any]) -> None:
        """Run a part unless its result is there."""
        file = self.out / "parts" / f"{name}.json"
        if file.exists():
            return
        print(f"--- {name}", flush=True)
        started, cpu = time.perf_counter(), time.process_time()
        result = make()
        spent = {"seconds": round(time.perf_counter() - started, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        self._write(file, {"result": result, **spent, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]})

    def read(self, name: str) -> Any:
        """The result of a finished part, None of a missing one."""
        file = self.out / "parts" / f"{name}.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else None

    @property
    def corpus_folder(self) -> Path:
        return self.out / "corpus"

    @property
    def run_folder(self) -> Path:
        return self.out / "run"

    def stage(self, name: str) -> TrainingStage:
        return next(stage for stage in self.training.stages if stage.name == name)

    # --- parts --------------------------------------------------------------------------------------------------------

    def corpus(self) -> Any:
        """The corpus's index: documents, tokens, sources with licences."""
        if not (self.corpus_folder / INDEX).exists():
            build(self.corpus_folder, DOMAINS, cache=self.cache, progress=self.progress)
        return Corpus.open(self.corpus_folder).index

    def run(self) -> Any:
        """The four stages: their length, time and last held-out losses."""
        done = train(
            self.spec,
            data=self.corpus_folder,
            out=self.run_folder,
            resume=(self.run_folder / "run.json").exists(),
            threads=torch.get_num_threads(),
            progress=self.progress,
        )
        return [vars(stage) for stage in done.stages]

    def control(self) -> Any:
        """Without balancing: drops and load, at steps that the run logged with it."""
        stage = self.stage("pretrain")
        unbalanced = stage.model_copy(update={"balancing": stage.balancing.model_copy(update={"kind": "none"})})
        trainer = self._trainer(unbalanced, initial_weights(self.model, self.training.seed), self.training.seed)
        lines = []
        steps = max(stage.log_every, int(stage.steps * CONTROL))
        for step in range(1, steps + 1):
            record = trainer.step()
            if step % stage.log_every == 0:
                lines.append({key: record[key] for key in ("step", "loss", "dropped_fraction", "load_max_over_mean")})
                print(f"control {step}/{steps}: dropped {record['dropped_fraction']:.3f}", flush=True)
        return lines

    def rounding(self) -> Any:
        """QAT against the same training without rounding, rounded after; per width, seed and held-out row."""
        file = self.out / "parts" / "rounding-rows.json"
        rows: dict[str, list[float]] = json.loads(file.read_text("utf-8")) if file.exists() else {}
        sft = self.run_folder / "sft"
        for bits in WIDTHS:
            if f"sft:{bits}" not in rows:
                rows[f"sft:{bits}"] = self._row_losses(load_model(sft, self.model, self._rounding(bits)))
        if "sft:float" not in rows:
            rows["sft:float"] = self._row_losses(load_model(sft, self.model))
        for seed in SEEDS:
            if f"ptq:{WIDTHS[0]}:{seed}" not in rows:
                plain = self._continued(seed, None)
                rows[f"float:{seed}"] = self._row_losses(plain)
                for bits in WIDTHS:
                    rounded = TrainingDecoder(self.model, self._rounding(bits))
                    rounded.load_state_dict(plain.state_dict())
                    rows[f"ptq:{bits}:{seed}"] = self._row_losses(rounded)
                self._write(file, rows)
            for bits in WIDTHS:
                if f"qat:{bits}:{seed}" not in rows:
                    rows[f"qat:{bits}:{seed}"] = self._row_losses(self._continued(seed, bits))
                    self._write(file, rows)
                    gain = np.mean(rows[f"ptq:{bits}:{seed}"]) - np.mean(rows[f"qat:{bits}:{seed}"])
                    print(f"int{bits}, seed {seed}: PTQ - QAT = {gain:+.4f} nats", flush=True)
        return {
            "rows": len(rows["sft:float"]),
            "float": float(np.mean(rows["sft:float"])),
            "widths": {bits: _paired(rows, bits) for bits in WIDTHS},
        }

    def experts(self) -> Any:
        """Use of experts by domain after each stage."""
        from moec.training.utilisation import expert_rows, summary

        found = {}
        for stage in self.training.stages:
            model = load_model(self.run_folder / stage.name, self.model)
            counts_RLE, labels = expert_rows(model, Corpus.open(self.corpus_folder), context=256, rows=24)
            found[stage.name] = summary(counts_RLE, labels, seed=0)
        return found

    def tasks(self) -> Any:
        """Accuracy and perplexity of the stages' checkpoints and of the compiled artifact."""
        from moec.compiler import build as compiler
        from moec.training.evaluate import evaluate

        artifact = self.out / "artifact"
        compiler.compile(self.spec, checkpoint=self.run_folder / "qat", out=artifact, progress=self.progress)
        chat, plain = (
            ["instructions_choice", "instructions_exact"],
            ["instructions_choice_plain", "instructions_exact_plain"],
        )
        # the base model has never met the chat form: it is asked as running text too
        asked = {
            "pretrain": (self.run_folder / "pretrain", chat + plain, False),
            "midtrain": (self.run_folder / "midtrain", plain, False),
            "sft": (self.run_folder / "sft", chat, False),
            "qat, simulated": (self.run_folder / "qat", chat, True),
            "artifact": (artifact, chat, False),
        }
        found = {}
        for name, (place, tasks, simulate) in asked.items():
            file = self.out / "parts" / f"tasks-{name.split(',')[0]}.json"
            if not file.exists():
                include = [self.corpus_folder]
                done = evaluate(
                    place, tasks, include=include, limit=TASK_ROWS, simulate=simulate, progress=self.progress
                )
                self._write(file, done)
            found[name] = json.loads(file.read_text("utf-8"))["results"]
        return found

    def responses(self) -> Any:
        """Share of right next tokens in the right answers of the choice task, and what SFT adds to the better base.

        Free of chance and of one wrong token spoiling an answer. The base model is asked in both forms: it has met
        questions as running text only.
        """
        rights: dict[str, list[tuple[int, int]]] = {}
        for name, form in (("midtrain", ""), ("midtrain, running text", "_plain"), ("sft", ""), ("qat", "")):
            file = self.corpus_folder / "tasks" / f"instructions_choice{form}.jsonl"
            rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            stage = name.split(",")[0]
            rights[name] = right_tokens(self.run_folder / stage, rows, simulate=stage == "qat")
        whole = [place for place, row in enumerate(zip(*rights.values(), strict=True)) if all(of for _, of in row)]
        rights = {name: [pairs[place] for place in whole] for name, pairs in rights.items()}
        base = max((name for name in rights if name.startswith("midtrain")), key=lambda name: _share(rights[name]))
        return {
            "questions": len(whole),
            "right": {name: _share(pairs) for name, pairs in rights.items()},
            "base": base,
            "gain": {name: _gain(rights[name], rights[base]) for name in ("sft", "qat")},
        }

    def exported(self) -> Any:
        """Cosines between the two models' logits at every position of one held-out row of each domain.

        Free: each chooses its experts. Forced: the QAT model is given the experts that the artifact chose. Where two
        experts score nearly alike, the last bit of a rounding decides, and another expert is another answer.
        """
        from moec.compiler import build as compiler
        from moec.training.evaluate_models import checkpoint_decoder

        corpus, qat = Corpus.open(self.corpus_folder), self.run_folder / "qat"
        context = self.stage("qat").context
        rows = [next(heldout(corpus, d, context, context)).tokens_BT[0].tolist() for d in corpus.domains]
        found = {}
        for activations in ("fp32", "int8"):
            assert self.spec.quantization is not None
            rounds = self.spec.quantization.model_copy(update={"activations": activations, "kv_cache": activations})
            spec = self.spec.model_copy(update={"quantization": rounds})
            out = self.out / f"artifact-{activations}"
            decoder = checkpoint_decoder(qat, simulate=activations == "int8")
            artifact = compiler.compile(spec, checkpoint=qat, out=out, progress=self.progress)
            with closing(compiler.load(artifact)) as session:
                found[activations] = _beside(session, decoder, rows)
        return found

    def write(self) -> None:
        """results.json and report.html of whatever parts there are."""
        from moec.training.report import write_report

        results = {name: part for name in PARTS if (part := self.read(name)) is not None}
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        everything = {"spec": self.spec.name, "scale": self.scale, "machine": machine, "parts": results}
        self._write(self.out / "results.json", everything)
        self._write(self.run_folder / "measured.json", {name: part["result"] for name, part in results.items()})
        write_report(self.run_folder, self.out / "report.html")
        print(self.out / "report.html")

    # --- tools --------------------------------------------------------------------------------------------------------

    def _rounding(self, bits: int | None) -> Rounding | None:
        assert self.spec.quantization is not None
        return None if bits is None else Rounding(self.spec.quantization, bits)

    def _trainer(
        self, stage: TrainingStage, weights: Iterator[Any], seed: int, rounding: Rounding | None = None
    ) -> Trainer:
        model = TrainingDecoder(self.model, rounding)
        load_weights(model, weights)
        data = Batches(
            self.corpus_folder,
            stage.mixture,
            stage.context,
            stage.batch_tokens,
            data_seed(seed, stage.name),
            response_weight=stage.response_weight,
        )
        return Trainer(model, stage, data, World())

    def _continued(self, seed: int, bits: int | None) -> TrainingDecoder:
        """The SFT checkpoint trained on as stage `qat` does, for fewer tokens, with or without rounding."""
        stage = self.stage("qat")
        rate = stage.learning_rate.model_copy(update={"warmup": self.rounding_tokens // 20})
        stage = stage.model_copy(update={"tokens": self.rounding_tokens, "learning_rate": rate})
        weights = stored_weights(self.run_folder / "sft", self.model)
        trainer = self._trainer(stage, weights, seed, self._rounding(bits))
        for _ in range(stage.steps):
            trainer.step()
        return trainer.model

    @torch.no_grad()
    def _row_losses(self, model: TrainingDecoder) -> list[float]:
        """Nats per predicted token of each held-out row, domains one after the other, all in float32."""
        model.eval()
        found: list[float] = []
        for domain in DOMAINS:
            for batch in heldout(self.corpus_folder, domain, self.stage("qat").context, HELDOUT_TOKENS):
                found += _losses(model, batch)
        return found

    @staticmethod
    def _write(file: Path, value: Any) -> None:
        part = file.with_suffix(".part")
        part.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
        part.replace(file)


@torch.no_grad()
def right_tokens(checkpoint: Path, rows: list[dict[str, Any]], *, simulate: bool) -> list[tuple[int, int]]:
    """(tokens of the answer that were the likeliest, given the question and the answer before them; tokens) a row.

    (0, 0) for a row that does not fit into the model's context.
    """
    from moec.compiler.tokenizer import load_tokenizer
    from moec.training.evaluate_models import HarnessModel, checkpoint_model

    model = checkpoint_model(checkpoint, simulate)
    harness = HarnessModel(model, load_tokenizer(checkpoint / "tokenizer.json"))
    pairs = [
        (harness.tok_encode(row["prompt"]), harness.tok_encode(row["choices"][row["gold"]], add_special_tokens=False))
        for row in rows
    ]
    found = [(0, 0)] * len(rows)
    fits = [place for place, (question, answer) in enumerate(pairs) if len(question) + len(answer) <= model.context]
    scored = model.scores([[*pairs[place][0], *pairs[place][1]][:-1] for place in fits])
    for place, logits_TV in zip(fits, scored, strict=True):
        question, answer = pairs[place]
        likeliest = logits_TV[len(question) - 1 :].argmax(axis=1)
        found[place] = (int((likeliest == np.asarray(answer)).sum()), len(answer))
    return found


def _beside(session: Session, decoder: TrainingDecoder, rows: list[list[int]]) -> dict[str, Any]:
    """An artifact beside the model it was exported from: logits, with own experts and the same, and sets of experts."""
    from moec.training.evaluate_models import EagerModel

    model = EagerModel(decoder)
    free, forced, same = [], [], []
    session.trace(True)
    for row in rows:
        session.reset()
        logits_TV = np.array(session.prefill(row, logits="all"))
        chosen_LTK = [torch.from_numpy(trace.indices_TK).long() for trace in session.take_traces()]
        with expert_choices(decoder) as own_LTK:
            free.append((logits_TV, next(model.scores([row]))))
        with expert_choices(decoder, chosen_LTK):
            forced.append((logits_TV, next(model.scores([row]))))
        for own_TK, chosen_TK in zip(own_LTK, chosen_LTK, strict=True):
            same.append((own_TK.sort().values == chosen_TK.sort().values).all(dim=-1).numpy())
    sets = float(np.mean(np.concatenate(same)))
    return {"free": _agreement(free), "forced": _agreement(forced), "same_expert_sets": sets}


@contextmanager
def expert_choices(decoder: TrainingDecoder, given_LTK: list[Tensor] | None = None) -> Iterator[list[Tensor]]:
    """Collect the experts that each MoE layer selects, int64 [T, K]; or have it take the given ones, weighed by it."""
    chosen: list[Tensor] = []
    for layer, block in enumerate(decoder.blocks):

        def select(scores_NE: Tensor, layer: int = layer, own: Any = block.select) -> Tensor:
            chosen.append(own(scores_NE) if given_LTK is None else given_LTK[layer])
            return chosen[-1]

        block.select = select  # type: ignore[method-assign]
    try:
        yield chosen
    finally:
        for block in decoder.blocks:
            del block.select  # the class's own again


def _agreement(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Of the cosines at all positions the least, a low quantile and the median; how often the likeliest ids agree."""
    cosines, same = [], []
    for a_TV, b_TV in pairs:
        norms_T = np.linalg.norm(a_TV, axis=1) * np.linalg.norm(b_TV, axis=1)
        cosines += ((a_TV * b_TV).sum(axis=1) / norms_T).tolist()
        same += (a_TV.argmax(axis=1) == b_TV.argmax(axis=1)).tolist()
    low, median = np.quantile(cosines, (0.01, 0.5))
    return {
        "positions": len(cosines),
        "least": min(cosines),
        "one_in_100_below": float(low),
        "median": float(median),
        "same_likeliest": float(np.mean(same)),
    }


def _share(pairs: list[tuple[int, int]]) -> float:
    right, of = np.asarray(pairs).sum(axis=0)
    return float(right / of)


def _gain(after: list[tuple[int, int]], before: list[tuple[int, int]]) -> dict[str, Any]:
    """The difference of the shares, with a 95% interval by bootstrap over the questions, which are the same."""
    a_Q2, b_Q2 = np.asarray(after), np.asarray(before)
    random = np.random.default_rng(0)
    picks = random.integers(0, len(a_Q2), (RESAMPLES, len(a_Q2)))
    sums_a, sums_b = a_Q2[picks].sum(axis=1), b_Q2[picks].sum(axis=1)
    low, high = np.quantile(sums_a[:, 0] / sums_a[:, 1] - sums_b[:, 0] / sums_b[:, 1], (0.025, 0.975))
    return {"gain": _share(after) - _share(before), "interval": [float(low), float(high)]}


def _losses(model: TrainingDecoder, batch: Batch) -> list[float]:
    (logits_BTV,) = model(batch.tokens_BT, batch.documents_BT)
    nll_BT = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch.targets_BT.flatten(), reduction="none")
    mask_BT = batch.loss_mask_BT
    return ((nll_BT.view_as(mask_BT) * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1)).tolist()


def _paired(rows: dict[str, list[float]], bits: int) -> dict[str, Any]:
    """PTQ - QAT in nats: the mean, and a 95% interval by bootstrap over seeds and, within each, over rows."""
    gain_SR = np.stack([np.subtract(rows[f"ptq:{bits}:{s}"], rows[f"qat:{bits}:{s}"]) for s in SEEDS])
    random = np.random.default_rng(0)
    seeds = random.integers(0, len(gain_SR), (RESAMPLES, len(gain_SR)))
    picks = random.integers(0, gain_SR.shape[1], (RESAMPLES, gain_SR.shape[1]))  # the same rows for every seed
    means = [gain_SR[s][:, r].mean() for s, r in zip(seeds, picks, strict=True)]
    low, high = np.quantile(means, (0.025, 0.975))
    mean = {kind: [float(np.mean(rows[f"{kind}:{bits}:{s}"])) for s in SEEDS] for kind in ("ptq", "qat")}
    return {
        "ptq_of_sft": float(np.mean(rows[f"sft:{bits}"])),
        "float_continued": [float(np.mean(rows[f"float:{s}"])) for s in SEEDS],
        "ptq": mean["ptq"],
        "qat": mean["qat"],
        "gain": float(gain_SR.mean()),
        "gain_by_seed": gain_SR.mean(axis=1).tolist(),
        "interval": [float(low), float(high)],
        "stress": bits < 4,
    }


if __name__ == "__main__":
    main()
