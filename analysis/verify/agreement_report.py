"""The report of `moec verify --against`: one row per pair of members, who could not take part, who stands apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from moec.analysis.verify.report import Report


@dataclass(frozen=True)
class PairRow:
    """Two members on the same tokens. `relative_error`: worst row's largest difference over its largest logit, without
    `left_out` rows after a tie. `expert_sets`: share of equal selections; None where one of the two is not traceable.
    """

    a: str
    b: str
    rounded: bool
    sqnr_db: float
    median_cosine: float
    min_cosine: float
    max_abs_error: float
    relative_error: float
    left_out: int
    top1: float
    expert_sets: float | None
    passed: bool

    def to_json(self) -> dict[str, Any]:
        # JSON has no infinity and no NaN
        finite = {k: str(v) if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in vars(self).items()}
        return finite


@dataclass(frozen=True)
class AgreementReport(Report):
    """`odd`: who disagrees with most. `undecided`: disagreements are left that name nobody."""

    rows: tuple[PairRow, ...] = ()
    unavailable: Mapping[str, str] = field(default_factory=dict)
    odd: tuple[str, ...] = ()
    undecided: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            **super().to_json(),
            "pairs": [row.to_json() for row in self.rows],
            "unavailable": dict(self.unavailable),
            "odd_one_out": list(self.odd),
            "undecided": self.undecided,
        }

    def verdict(self) -> str:
        """One line: who agrees, or who does not."""
        if self.passed:
            members = dict.fromkeys(name for row in self.rows for name in (row.a, row.b))
            return f"agreed: {', '.join(members)}"
        if self.odd and not self.undecided:
            return f"odd one out: {', '.join(self.odd)}"
        pairs = ", ".join(f"{row.a} and {row.b}" for row in self.rows if not row.passed)
        named = f"odd one out: {', '.join(self.odd)}; " if self.odd else ""
        return f"{named}no majority: {pairs} disagree; another opinion (--against) would tell"

    def print(self, console: Console) -> None:
        console.print(f"verify {self.kind} {self.subject}", highlight=False, markup=False)
        columns = ("", "", "SQNR dB", "median cosine", "min", "max error", "relative", "top-1", "experts", "")
        table = Table(*columns, box=None, pad_edge=False)
        for row in self.rows:
            table.add_row(
                row.a, row.b, f"{row.sqnr_db:.1f}", f"{row.median_cosine:.7f}", f"{row.min_cosine:.6f}",
                f"{row.max_abs_error:.1e}", f"{row.relative_error:.1e}", f"{row.top1:.2%}",
                "-" if row.expert_sets is None else f"{row.expert_sets:.2%}",
                "[green]ok[/]" if row.passed else "[red]DISAGREE[/]",
            )  # fmt: skip
        console.print(table)
        for name, why in self.unavailable.items():
            console.print(f"  not available: {name}: {why}", highlight=False, markup=False)
        for name, value in self.figures.items():
            console.print(f"  {name}: {value}", highlight=False, markup=False)
        for check in self.failures:
            console.print(f"FAILED {check.line()}", style="bold red", highlight=False, markup=False)
        console.print(self.verdict(), style="bold green" if self.passed else "bold red", highlight=False, markup=False)
