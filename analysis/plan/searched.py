"""The result of a search as a spec, and as a picture."""

from __future__ import annotations

from pathlib import Path

from moec.analysis.plan.search import Candidate, Found
from moec.compiler.errors import MissingExtra, UserError
from moec.compiler.spec import Spec, parse_spec


def spec_text(found: Candidate, name: str, device: str, target: str, law: str) -> str:
    """A YAML spec of the shape that `moec compile` and `moec train` take. It is read back before it is returned."""
    c = found.config
    lines = [
        f"# {found.label}: found by `moec search` for {device}, {found.tokens / 1e9:g} B training tokens;",
        f"# predicted loss {found.loss:.4f} ({law}). {found.total:,} parameters, {found.active:,} active.",
        f"name: {name}",
        "model:",
        f"  architecture: {c.architecture}",
        *(f"  {key}: {getattr(c, key)}" for key in ("layers", "d_model", "heads", "kv_heads", "head_dim")),
        f"  vocab_size: {c.vocab_size}",
        f"  context: {c.context}",
        "  norm_eps: 1.0e-5",
        "  qk_norm: true",
        "  tied_embeddings: true",
        f"  rope: {{theta: {c.rope.theta}, interleaved: true}}",
    ]
    if c.moe is not None:
        lines += [
            "  moe:",
            *(f"    {key}: {getattr(c.moe, key)}" for key in ("experts", "top_k", "expert_width", "shared_width")),
            "    score: sigmoid",
            "    selection_bias: true",
            "    normalize: true",
            f"    scale: {c.moe.scale}",
        ]
    else:
        lines.append(f"  ffn_width: {c.ffn_width}")
    lines += [
        f"  bos_id: {c.bos_id}",
        f"  eos_ids: [{', '.join(map(str, c.eos_ids))}]",
        "quantization: {weights: int4, group_size: 32, activations: int8, kv_cache: int8, router: fp32}",
        f"targets: [{target}]",
        f"device: {device}",
    ]
    text = "\n".join(lines) + "\n"
    read: Spec = parse_spec(text, file=name)
    assert read.model == c, "the spec does not say what was found"
    return text


def check_plot(file: Path) -> None:
    """Before the work: MissingExtra without matplotlib, UserError for a file it cannot write."""
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("--plot needs matplotlib", remedy="pip install 'moec[plan]'") from None
    del matplotlib
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{file.suffix or 'no suffix'} is no picture", place=str(file), remedy="use .png, .svg or .pdf")
    if not file.parent.is_dir():
        raise UserError("no such folder", place=str(file.parent), remedy="make it first, or choose another --plot")


def plot(found: Found, file: Path, title: str) -> None:
    """The front: predicted loss against peak memory, one mark a number of experts."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    front = found.front
    axes.step([c.peak / 1e6 for c in front], [c.loss for c in front], where="post", color="0.6", linewidth=1)
    for experts in sorted({c.experts for c in front}):
        marks = [c for c in front if c.experts == experts]
        label = "dense" if experts == 1 else f"E = {experts}"
        axes.plot([c.peak / 1e6 for c in marks], [c.loss for c in marks], "o", markersize=5, label=label)
    axes.plot([found.best.peak / 1e6], [found.best.loss], "*", markersize=14, color="black", label=found.best.label)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("peak memory, MB")
    axes.set_ylabel("predicted loss")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)
