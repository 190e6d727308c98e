"""Divergence from the float model against bytes: our formats and methods beside llama.cpp's. `make bench-quality`.

The model is SmolLM2-135M-Instruct taken off its 4-bit grid (`real_model.py`), the text is what `moec quality` measures
on, the float model is transformers' weights in float32. Every side reads the same token ids and runs as it ships: our
artifacts with INT8 activations and cache, llama.cpp with its own INT8 activations and float16 cache. Both calibrate on
the same text: pieces of the running Python's own documentation and library, and the shipped prompts.

What was made is kept in --out: a second run continues. Results: quality.json, quality.svg, of all rows that are there.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from peers import llama_quality
from real_model import NotReached, gguf_file, transformers_folder
from safetensors.torch import load_file

from moec.analysis.bits.choose import choose, measured, sizes
from moec.analysis.bits.report import spec_text
from moec.analysis.verify.quality.compared import Compared
from moec.analysis.verify.quality.divergence import Divergence
from moec.analysis.verify.quality.fidelity import (
    ArtifactModel,
    FloatModel,
    Model,
    TokenizerEncoder,
    encoder_of,
    measure,
    template_of,
)
from moec.analysis.verify.quality.plot import write_plot
from moec.analysis.verify.quality.texts import ALL_TOKENS, LENGTH, Chunk, held_out, written
from moec.cli.output import table
from moec.compiler import build
from moec.compiler.artifact import MANIFEST, Artifact
from moec.compiler.errors import UserError
from moec.compiler.progress import Progress
from moec.compiler.source import CHAT_TEMPLATE, TOKENIZER
from moec.compiler.spec.loader import parse_spec
from moec.compiler.spec.model import Spec
from moec.compiler.texts import shipped_prompts
from moec.compiler.tokenizer import load_tokenizer

CALIBRATION_TOKENS = 32768
DISTILLED_TOKENS = 65536  # of `distilled`, where the noise in the gradient of less text is the limit
INT4: dict[str, Any] = {"weights": "int4", "expert_group_axis": "in"}
IQ4_NL: dict[str, Any] = {**INT4, "weights": "iq4_nl"}
NL3: dict[str, Any] = {**INT4, "weights": "nl3"}
THREE_BITS = {f"*.{part}_proj.weight": {"weights": "nl3", "group_size": 32} for part in ("gate", "up", "q")}
OURS: dict[str, dict[str, Any]] = {
    "INT4": INT4,
    "INT4 gptq": {**INT4, "method": "gptq"},
    "INT4 awq_gptq": {**INT4, "method": "awq_gptq"},
    "INT4, table INT8": {**INT4, "embedding": "int8"},
    "INT4, table INT8, weighted": {**INT4, "embedding": "int8", "method": "weighted"},
    "INT4, table INT8, gptq": {**INT4, "embedding": "int8", "method": "gptq"},
    "INT4, table INT8, awq_gptq": {**INT4, "embedding": "int8", "method": "awq_gptq"},
    "INT4, table INT8, distilled": {**INT4, "embedding": "int8", "method": "distilled"},
    "INT4 g64, table INT8, awq_gptq": {**INT4, "group_size": 64, "embedding": "int8", "method": "awq_gptq"},
    "IQ4_NL, awq_gptq": {**IQ4_NL, "method": "awq_gptq"},
    "IQ4_NL, distilled": {**IQ4_NL, "method": "distilled"},
    "NL3 for gate, up and q, else IQ4_NL, awq_gptq": {**IQ4_NL, "method": "awq_gptq", "tensors": THREE_BITS},
    "NL3, awq_gptq": {**NL3, "method": "awq_gptq"},
    "NL3, distilled": {**NL3, "method": "distilled"},
    "INT8": {**INT4, "weights": "int8"},
}
MIXED = {f"mixed, {size} MB": float(size) for size in (92, 87, 84, 72, 65)}  # whole artifacts of at most so many MB
CHOSEN = Path(__file__).with_name("mixed")  # specs that `moec quantize` wrote
PEERS = {  # name: format, with an importance matrix
    "Q4_0": ("Q4_0", False),
    "Q4_0 imatrix": ("Q4_0", True),
    "IQ4_XS imatrix": ("IQ4_XS", True),
    "Q4_K_S imatrix": ("Q4_K_S", True),
    "Q4_K_M imatrix": ("Q4_K_M", True),
    "Q8_0": ("Q8_0", False),
    "F32": ("F32", False),
}


@dataclass(frozen=True)
class Setting:
    """What every row shares. `float_TV`: the float model's logits of all chunks, one after the other."""

    out: Path
    folder: Path
    chunks: list[Chunk]
    float_TV: np.ndarray
    calibration: Path
    progress: Progress


class Recorded:
    """The float model's logits, read from a file: they are computed once for all rows."""

    def __init__(self, setting: Setting) -> None:
        self.name, self.bytes, self._logits_TV = "float", 0, setting.float_TV

    def logits(self, chunks: Sequence[Chunk]) -> Iterator[np.ndarray]:
        at = 0
        for chunk in chunks:
            yield np.array(self._logits_TV[at : at + len(chunk.ids)])
            at += len(chunk.ids)


def prepare(out: Path, progress: Progress) -> Setting:
    """The float model, the tokens and what the float model says of them."""
    out.mkdir(parents=True, exist_ok=True)
    folder = transformers_folder(jitter=True)
    template = (folder / CHAT_TEMPLATE).read_text("utf-8") if (folder / CHAT_TEMPLATE).exists() else None
    encoder = TokenizerEncoder(load_tokenizer(folder / TOKENIZER))
    chunks = held_out(encoder, template=template, tokens=ALL_TOKENS, longest=LENGTH)
    file = out / "float.npy"
    if not file.exists():
        spec = Spec.model_validate(_raw(folder, None))
        model = FloatModel(spec, build.open_checkpoint(spec, folder))
        part = file.with_suffix(".part.npy")
        with progress.stage(f"the float model on {sum(len(c.ids) for c in chunks)} tokens"):
            np.save(part, np.concatenate(list(model.logits(chunks))))
        part.rename(file)
    calibration = out / "calibration.jsonl"
    if not calibration.exists():
        lines = calibration_lines(template)
        calibration.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return Setting(out, folder, chunks, np.load(file, mmap_mode="r"), calibration, progress)


def calibration_lines(template: str | None) -> list[dict[str, str]]:
    """Prose, code, conversations and short questions, none of them in the held-out text: the documentation of this
    Python's language (PSF-2.0), modules of its library, and the prompts that moec ships."""
    import argparse as a
    import csv as b
    import tarfile as c
    import textwrap as d
    from pydoc_data.topics import topics

    lines = [{"domain": "prose", "text": topics[name]} for name in sorted(topics) if len(topics[name]) > 2000]
    lines += [{"domain": "library", "text": inspect.getsource(module)} for module in (a, b, c, d)]
    said = [(f"Explain {name.lower()} in Python.", topics[name][:1500]) for name in sorted(topics)]
    for module in (a, b, c, d):
        for name, function in inspect.getmembers(module, inspect.isroutine):
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                code = f"```python\n{inspect.getsource(function)}```"
                said.append((f"How is {name} of {module.__name__} written?", code))
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": answer}] for q, answer in said]
    lines += [{"domain": "chat", "text": written(template, chat)} for chat in chats]
    return lines + [{"domain": p.domain, "text": p.text} for p in shipped_prompts()]


def _raw(folder: Path, quantization: dict[str, Any] | None) -> dict[str, Any]:
    model = {"transformers": str(folder), "context": 1024}
    return {"name": "smollm2", "model": model, "quantization": quantization or "none", "targets": ["xnnpack"]}


def _spec(setting: Setting, quantization: dict[str, Any]) -> Spec:
    if "method" in quantization:
        tokens = DISTILLED_TOKENS if quantization["method"] == "distilled" else CALIBRATION_TOKENS
        calibration = {"jsonl": str(setting.calibration), "tokens": tokens}
        quantization = {**quantization, "calibration": calibration}
    return parse_spec(yaml.safe_dump(_raw(setting.folder, quantization)), folder=setting.folder)


def ours(name: str, setting: Setting) -> Model:
    """An artifact of the row's quantization, compiled once."""
    return _artifact(name, setting, lambda: _spec(setting, OURS[name]))


def mixed(name: str, setting: Setting) -> Model:
    """An artifact of the bits that `moec quantize` chooses for a size, or has chosen: what is in CHOSEN is taken."""
    known = CHOSEN / f"{_file(name)}.yaml"
    if known.exists():
        quantization = yaml.safe_load(known.read_text("utf-8"))["quantization"]
        return _artifact(name, setting, lambda: _spec(setting, quantization))

    def spec() -> Spec:
        given, target = _spec(setting, {**INT4, "method": "distilled"}), "xnnpack"
        store = build.open_checkpoint(given, setting.folder)
        costs = measured(given, store, target, setting.progress)
        room = sizes(given, store, target, costs, most=round(MIXED[name] * 1e6), device=None)
        chosen = choose(given, costs, room)
        text = spec_text(chosen, f"moec quantize --target-size {MIXED[name]:g}: {chosen.bytes / 1e6:.1f} MB")
        (setting.out / f"{_file(name)}.yaml").write_text(text, encoding="utf-8")
        return chosen.spec

    return _artifact(name, setting, spec)


def _file(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def _artifact(name: str, setting: Setting, spec: Callable[[], Spec]) -> Model:
    place = setting.out / _file(name)
    if not (place / MANIFEST).exists():
        build.compile(spec(), out=place, progress=setting.progress)
    artifact = Artifact.open(place)
    own = held_out(encoder_of(artifact), template=template_of(artifact), tokens=ALL_TOKENS, longest=LENGTH)
    assert own == setting.chunks, "the artifact reads other tokens than the float model"
    model = ArtifactModel(artifact)
    model.name = name
    return model


def peer(name: str, setting: Setting) -> Model:
    """A GGUF file of llama.cpp's own quantizer, made once from the same floats."""
    cache, progress = setting.out / "llama.cpp", setting.progress
    bindings = llama_quality.bindings(cache, progress)
    origin = setting.out / "float.gguf"
    if not origin.exists():
        part = origin.with_suffix(".part")
        llama_quality.write_float(gguf_file(), load_file(setting.folder / "model.safetensors"), part)
        part.rename(origin)
    kind, weighted = PEERS[name]
    file, matrix = origin, None
    if weighted:
        matrix, text = setting.out / "importance.gguf", setting.out / "calibration.txt"
        if not matrix.exists():
            lines = [json.loads(line) for line in setting.calibration.read_text("utf-8").splitlines()]
            text.write_text("\n".join(line["text"] for line in lines), encoding="utf-8")
            llama_quality.importance(origin, text, matrix, cache, progress)
    if kind != "F32":
        file = setting.out / f"{name.replace(' ', '-')}.gguf"
        llama_quality.quantize(origin, kind, file, cache, progress, matrix=matrix)
    vocab_size = setting.float_TV.shape[-1]
    return llama_quality.LlamaModel(f"llama.cpp {name}", file, bindings, vocab_size)


def _row_file(name: str, make: Any, setting: Setting) -> Path:
    found: Path = setting.out / "rows" / f"{make.__name__}-{_file(name)}.json"
    return found


def row(name: str, make: Any, setting: Setting) -> Compared:
    """One row, measured once."""
    file = _row_file(name, make, setting)
    if not file.exists():
        model = make(name, setting)
        (found,) = measure(Recorded(setting), [model], setting.chunks, setting.progress)
        assert found.overall is not None
        row = Compared(model.name, model.bytes, "float", found.overall, dict(found.domains))
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(asdict(row), indent=1), encoding="utf-8")
    raw = json.loads(file.read_text("utf-8"))
    domains = {k: Divergence(**v) for k, v in raw["domains"].items()}
    return Compared(**{**raw, "found": Divergence(**raw["found"]), "domains": domains})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench/quality"))
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows alone, by their names in the table")
    parser.add_argument("--no-peers", action="store_true", help="without llama.cpp, whose first build takes long")
    options = parser.parse_args()
    every: list[tuple[str, Any]] = [
        *((n, ours) for n in OURS),
        *((n, mixed) for n in MIXED),
        *((n, peer) for n in PEERS),
    ]
    wanted = [(n, make) for n, make in every if make is not peer or not options.no_peers]
    if options.only:
        unknown = set(options.only) - {n for n, _ in wanted}
        if unknown:
            parser.error(f"no rows called {', '.join(sorted(unknown))}; there are {', '.join(n for n, _ in wanted)}")
        wanted = [(n, make) for n, make in wanted if n in options.only]
    try:
        setting = prepare(options.out, Progress())
        for name, make in wanted:
            row(name, make, setting)
        done = [(n, make) for n, make in every if _row_file(n, make, setting).exists()]
        rows = [row(name, make, setting) for name, make in done]
        write_plot(options.out / "quality.svg", rows, [r.name for r in rows if r.name.startswith("llama.cpp")])
    except (UserError, NotReached) as error:
        print(error, file=sys.stderr)
        return 2
    document = {"tokens": rows[0].found.tokens, "models": [r.to_json() for r in rows]}
    (options.out / "quality.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    table(
        f"SmolLM2-135M-Instruct off its grid, {rows[0].found.tokens:,} tokens, "
        f"perplexity of the float model {rows[0].found.reference_perplexity:.2f}",
        ["model", "MB", "KL divergence", "±", "99%", "top-1", "perplexity"],
        [
            (r.name, f"{r.bytes / 1e6:.1f}", f"{f.kld:.4f}", f"{f.error:.4f}", f"{f.p99:.3f}", f"{f.top1:.1%}",
             f"{f.perplexity:.2f}")
            for r, f in ((r, r.found) for r in rows)
        ],
        right=range(1, 7),
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
