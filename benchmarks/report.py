"""What was measured beside what was aimed at: rows, ratios, and met or missed. Pure.

A question's figures are rows by name; a figure that could not be measured is missing, and so is
every ratio with it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Row = dict[str, float]
Rows = dict[str, Row]
Kind = Literal["at most", "at least"]


@dataclass(frozen=True)
class Column:
    """One column: the figure's key, its heading, its digits after the point."""

    key: str
    heading: str
    digits: int = 0

    def text(self, row: Mapping[str, float]) -> str:
        value = row.get(self.key)
        return "" if value is None else f"{value:,.{self.digits}f}"


@dataclass(frozen=True)
class Aim:
    """One aim and the figure that stands for it; None: it could not be measured."""

    what: str
    kind: Kind
    limit: float
    value: float | None

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value <= self.limit if self.kind == "at most" else self.value >= self.limit

    @property
    def verdict(self) -> str:
        """`met`, or by what factor it is missed."""
        if self.value is None:
            return "not measured"
        if self.met:
            return "met"
        more, less = max(self.value, self.limit), min(self.value, self.limit)
        return f"missed by {more / less:.2f}x" if less > 0 else "missed"

    def cells(self) -> tuple[str, str, str, str]:
        value = "" if self.value is None else _number(self.value)
        return self.what, value, f"{self.kind} {_number(self.limit)}", self.verdict


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def ratio(rows: Mapping[str, Row], over: str, under: str, key: str) -> float | None:
    """rows[over][key] / rows[under][key], None if one of them is missing or not positive."""
    above, below = rows.get(over, {}).get(key), rows.get(under, {}).get(key)
    return None if above is None or below is None or below <= 0 else above / below


def middle(rounds: Iterable[Mapping[str, float]]) -> Row:
    """The median of each figure over the rounds that have it."""
    found: dict[str, list[float]] = {}
    for one in rounds:
        for key, value in one.items():
            found.setdefault(key, []).append(value)
    return {key: statistics.median(values) for key, values in found.items()}


def percentile(values: Sequence[float], percent: int) -> float:
    """By nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


@dataclass
class Finding:
    """A question's answer: its rows, and what is to be said of them."""

    rows: Rows
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """One question: its columns, and its aims as functions of its rows."""

    name: str
    title: str
    columns: Sequence[Column]
    aims: Callable[[Rows], list[Aim]]


def table(question: Question, finding: Finding) -> list[list[str]]:
    """Headings, then a line a row; columns that no row has are left out."""
    shown = [c for c in question.columns if any(c.key in row for row in finding.rows.values())]
    lines = [["", *(c.heading for c in shown)]]
    lines += [[name, *(c.text(row) for c in shown)] for name, row in finding.rows.items()]
    return lines


def plain(lines: Sequence[Sequence[str]]) -> str:
    """Aligned for a terminal: names to the left, figures to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rest))


def aims_table(aims: Sequence[Aim]) -> list[list[str]]:
    return [["aim", "measured", "wanted", ""], *(list(aim.cells()) for aim in aims)]


def written(
    questions: Sequence[Question], findings: Mapping[str, Finding], *, as_markdown: bool = False
) -> str:
    """The whole report over whatever was measured."""
    draw = markdown if as_markdown else plain
    parts, aims = [], []
    for question in questions:
        finding = findings.get(question.name)
        if finding is None:
            continue
        heading = f"**{question.title}**" if as_markdown else f"== {question.title}"
        text = [heading, draw(table(question, finding))]
        text += [f"{note}" for note in finding.notes]
        parts.append(("\n\n" if as_markdown else "\n").join(text))
        aims += question.aims(finding.rows)
    if aims:
        parts.append(draw(aims_table(aims)))
    return "\n\n".join(parts)
