"""One picture: divergence from the float model against the bytes that a model takes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from moec.analysis.verify.quality.compared import Compared
from moec.compiler.errors import MissingExtra


def write_plot(file: Path, rows: Sequence[Compared], others: Collection[str] = ()) -> None:
    """An SVG. Both axes are better to the lower left; divergence is logarithmic. MissingExtra without matplotlib.

    others: names of rows that another engine runs; their points are hollow.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("a plot needs matplotlib", remedy="pip install 'moec[report]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        # a logarithmic axis has no zero: what is nearer than float32 can tell stands at its lower end
        y = max(row.found.kld, 1e-6)
        fill = "none" if row.name in others else "full"
        axes.plot(row.bytes / 1e6, y, "o", color="black", markersize=5, fillstyle=fill)
        axes.annotate(Path(row.name).name, (row.bytes / 1e6, y), textcoords="offset points", xytext=(6, 4), fontsize=9)
    axes.set_yscale("log")
    axes.set_xlim(left=0, right=1.5 * max(row.bytes for row in rows) / 1e6)  # room for names
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("MB, all files")
    axes.set_ylabel("mean KL divergence from the float model, nats")
    axes.grid(True, which="both", linewidth=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "moec"}):  # the same picture is the same file
        figure.savefig(file, format="svg", metadata={"Date": None})
