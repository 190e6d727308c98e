"""What a verification found: checks with their tolerance, rows per MoE layer, figures. JSON, JUnit XML, a table."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

from moec.analysis.verify.tolerances import Tolerance

if TYPE_CHECKING:
    from moec.analysis.verify.quality.fidelity import Fidelity

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Check:
    """One comparison against one tolerance. `where` says which prompt, layer or pass is worst."""

    name: str
    value: float
    tolerance: Tolerance
    where: str = ""
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.tolerance.holds(self.value)

    def line(self) -> str:
        """`name: 0.98 at layer 3, must be > 0.9999 (cosine)`."""
        at = f" at {self.where}" if self.where else ""
        more = f"; {self.detail}" if self.detail else ""
        t = self.tolerance
        return f"{self.name}: {_number(self.value)}{at}, must be {t.relation} {t.limit:g} {t.unit}{more}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "value": _json_number(self.value),
            "relation": self.tolerance.relation,
            "limit": self.tolerance.limit,
            "unit": self.tolerance.unit,
            "where": self.where,
            "detail": self.detail,
            "reason": self.tolerance.reason,
        }


@dataclass(frozen=True)
class LayerRow:
    """One MoE layer of the artifact against the reference, which started from the artifact's previous layer.

    `router`: share of tokens (clear of ties) whose selection the reference arrives at by itself; `router_same_input`:
    given the artifact's input. `weights_ratio`: combine weights of the artifact's selection. `input_*`: the block's
    input, that is attention and norms. The others: the block's output for the artifact's input and routing, that is its
    experts. A ratio is in units of the float tolerance: at most 1 is within.
    """

    layer: int
    name: str
    tokens: int
    ties: int
    experts_used: int
    router: float
    router_same_input: float
    weights_ratio: float
    input_median_cosine: float
    input_min_cosine: float
    input_ratio: float
    median_cosine: float
    min_cosine: float
    sqnr_db: float
    max_abs_error: float
    output_ratio: float
    passed: bool
    has_inputs: bool = True
    has_router: bool = True

    def to_json(self) -> dict[str, Any]:
        return {key: _json_number(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class Report:
    """The result of one verification. `figures` are measured and reported, not judged."""

    kind: str
    subject: str
    checks: tuple[Check, ...]
    layers: tuple[LayerRow, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    # of an artifact: what quantization cost, or why that is not known
    fidelity: Fidelity | None = field(default=None, kw_only=True)

    @property
    def passed(self) -> bool:
        """Whether every check passed. A report without checks has verified nothing, and fails."""
        return bool(self.checks) and all(c.passed for c in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if not c.passed)

    @property
    def exit_status(self) -> int:
        return 0 if self.passed else 1

    def worst_layers(self, count: int = 3) -> tuple[LayerRow, ...]:
        """Layers with the lowest SQNR, failed ones first."""
        return tuple(sorted(self.layers, key=lambda row: (row.passed, row.sqnr_db))[:count])

    def to_json(self) -> dict[str, Any]:
        fidelity = {} if self.fidelity is None else {"fidelity": self.fidelity.to_json()}
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "subject": self.subject,
            "passed": self.passed,
            "checks": [c.to_json() for c in self.checks],
            "layers": [row.to_json() for row in self.layers],
            "figures": _json_tree(self.figures),
            "about": _json_tree(self.about),
            **fidelity,
        }

    def junit(self) -> str:
        """JUnit XML: one test case per check and one per layer, the failure message says by how much."""
        cases = [(c.name, c.passed, c.line(), c.tolerance.reason) for c in self.checks]
        cases += [(f"layer {r.layer} {r.name}".strip(), r.passed, _layer_line(r), "") for r in self.layers]
        suite = ElementTree.Element(
            "testsuite",
            name=f"moec verify {self.kind}",
            tests=str(len(cases)),
            failures=str(sum(not passed for _, passed, _, _ in cases)),
            errors="0",
        )
        for name, passed, line, reason in cases:
            case = ElementTree.SubElement(suite, "testcase", classname=_xml_text(self.subject), name=_xml_text(name))
            if not passed:
                failure = ElementTree.SubElement(case, "failure", message=_xml_text(line))
                failure.text = _xml_text(reason)
            else:
                ElementTree.SubElement(case, "system-out").text = _xml_text(line)
        root = ElementTree.Element("testsuites")
        root.append(suite)
        ElementTree.indent(root)
        return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"

    def text(self, *, width: int = 160) -> str:
        """What `print` shows, without colours."""
        stream = io.StringIO()
        self.print(Console(file=stream, width=width, no_color=True))
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def print(self, console: Console) -> None:
        """The table for people: checks, figures, and the worst layers (all of them when any failed)."""
        console.print(f"verify {self.kind} {self.subject}", highlight=False, markup=False)
        console.print(_checks_table(self.checks))
        if self.layers:
            shown = self.layers if any(not row.passed for row in self.layers) else self.worst_layers()
            title = (
                "MoE layers"
                if len(shown) == len(self.layers)
                else f"worst {len(shown)} of {len(self.layers)} MoE layers"
            )
            console.print(_layers_table(shown, title))
        for name, value in self.figures.items():
            console.print(f"  {name}: {_figure(value)}", highlight=False, markup=False)
        for check in self.failures:
            console.print(f"FAILED {check.line()}", style="bold red", highlight=False, markup=False)
        if self.fidelity is not None:
            for line in self.fidelity.lines():
                console.print(f"  quantization, {line}", highlight=False, markup=False)
        more = "" if self.fidelity is None else f"; {self.fidelity.line()}"
        style = "bold green" if self.passed else "bold red"
        console.print(("passed" if self.passed else "FAILED") + more, style=style, highlight=False, markup=False)


def _checks_table(checks: Iterable[Check]) -> Table:
    table = Table("check", "measured", "required", "where", "", box=None, pad_edge=False)
    for c in checks:
        mark = "[green]ok[/]" if c.passed else "[red]FAILED[/]"
        required = f"{c.tolerance.relation} {c.tolerance.limit:g} {c.tolerance.unit}"
        table.add_row(c.name, _number(c.value), required, "\n".join(filter(None, (c.where, c.detail))), mark)
    return table


def _layers_table(rows: Iterable[LayerRow], title: str) -> Table:
    columns = (
        "layer",
        "ties",
        "router",
        "input cosine",
        "min",
        "output cosine",
        "min",
        "SQNR dB",
        "max error",
        "experts",
    )
    table = Table(*columns, "", title=title, title_justify="left", box=None, pad_edge=False)
    for r in rows:
        table.add_row(
            f"{r.layer} {r.name}".strip(), str(r.ties), f"{r.router:.3%}",
            f"{r.input_median_cosine:.7f}", f"{r.input_min_cosine:.6f}",
            f"{r.median_cosine:.7f}", f"{r.min_cosine:.6f}", f"{r.sqnr_db:.1f}", f"{r.max_abs_error:.1e}",
            str(r.experts_used), "[green]ok[/]" if r.passed else "[red]FAILED[/]",
        )  # fmt: skip
    return table


def _layer_line(r: LayerRow) -> str:
    return (
        f"layer {r.layer}: router {r.router:.4%}, same input {r.router_same_input:.4%} ({r.ties} ties left out), "
        f"input cosine median {r.input_median_cosine:.7f} min {r.input_min_cosine:.7f}, "
        f"output cosine median {r.median_cosine:.7f} min {r.min_cosine:.7f}, SQNR {r.sqnr_db:.1f} dB, "
        f"max error {r.max_abs_error:.3e}"
    )


def _number(value: float) -> str:
    return f"{value:.6g}" if not math.isfinite(value) or abs(value) < 0.9 or abs(value) > 1.1 else f"{value:.7f}"


def _figure(value: object) -> str:
    return _number(value) if isinstance(value, float) else str(value)


def _json_number(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become the strings "inf", "-inf" and "nan"."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _json_tree(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _json_tree(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_tree(v) for v in value]
    return _json_number(value)


def _xml_text(text: str) -> str:
    """Without the control characters that XML 1.0 forbids."""
    return "".join(ch for ch in text if ch in "\t\n\r" or ord(ch) >= 0x20)
