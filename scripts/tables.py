"""Tables of runs: rows of words and numbers, and their text as markdown, CSV or LaTeX."""

import csv
import statistics
import sys
from typing import NamedTuple

from intervals import Intervals, Pairs, paired_intervals
from runs import COLUMNS, Column, Run, numbers

MISSING = "—"
LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: f"${c}$" for c in "<>|"},
    "±": r"$\pm$",
    MISSING: "--",
}


class Mean(NamedTuple):
    """Of several seeds, beside the paper's value, if there is one."""

    column: Column
    mean: float
    sd: float | None  # None for a single run
    published: float | None = None

    def text(self) -> str:
        """Such as `21.00 ± 1.00 (20.03, +0.97*)`: mean, standard deviation, published value, and ours minus it, with *
        if over two standard deviations."""
        decimals = self.column.decimals
        text = fixed(self.mean, decimals)
        if self.sd is not None:
            text += f" ± {self.sd:.{decimals}f}"
        if self.published is None:
            return text
        if self.column.owner == "times":  # of another machine
            return f"{text} ({self.published:.2f})"
        difference = self.mean - self.published
        mark = "*" if self.sd is not None and abs(difference) > 2 * self.sd else ""
        return f"{text} ({self.published:.2f}, {fixed(difference, decimals, '+')}{mark})"


class Difference(NamedTuple):
    """A mean of differences paired by seed."""

    column: Column
    mean: float
    sd: float | None
    half_width: float | None  # of its 95 % interval

    def text(self) -> str:
        """Such as `-1.50 [-2.10, -0.90]*`, with * where the interval excludes 0."""
        if self.half_width is None:
            return fixed(self.mean, self.column.decimals, "+")
        ends = (self.mean, self.mean - self.half_width, self.mean + self.half_width)
        mean, low, high = (fixed(value, self.column.decimals, "+") for value in ends)
        mark = "*" if abs(self.mean) > self.half_width else ""
        return f"{mean} [{low}, {high}]{mark}"


class Table(NamedTuple):
    title: str
    rows: list[dict[str, str | Mean | Difference | None]]  # by keys of COLUMNS, or other headings


def fixed(value: float, decimals: int, sign: str = "") -> str:
    """A number that is rounded to 0 has no minus."""
    return f"{round(value, decimals) + 0.0:{sign}.{decimals}f}"


def mean_cells(
    runs: list[Run], names: list[str], classifier: str | None = None, published: dict | None = None
) -> dict[str, Mean | None]:
    """Of columns by their names, or None where `numbers` is."""
    cells = {}
    for name in names:
        values = numbers(runs, COLUMNS[name], classifier)
        of_paper = (published or {}).get(name)
        cells[name] = values and Mean(COLUMNS[name], statistics.mean(values), deviation(values), of_paper)
    return cells


def difference_cells(
    paired: list[Pairs], column: Column, pooled: bool = True
) -> tuple[list[Difference | None], Intervals]:
    """A cell for each group, None where `numbers` is; and what the intervals rest on.

    pooled: their variance is that of all groups' differences, or else of each group's own.
    """
    found = []
    for group, partners in paired:
        values = numbers([*group.runs, *partners], column)
        found.append(values and [a - b for a, b in zip(values, values[len(partners) :], strict=False)])
    intervals = paired_intervals(found)
    cells = []
    for values, half_width in zip(found, intervals.half_widths, strict=True):
        if values and not pooled:
            (half_width,) = paired_intervals([values]).half_widths
        cells.append(values and Difference(column, statistics.mean(values), deviation(values), half_width))
    return cells, intervals


def deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def text_rows(table: Table) -> list[list[str]]:
    """The heading and a row of text for each row, without empty columns."""
    keys = [key for key in table.rows[0] if any(row[key] for row in table.rows)]
    rows = [[COLUMNS[key].heading if key in COLUMNS else key for key in keys]]
    for row in table.rows:
        cells = [row[key] or MISSING for key in keys]
        rows.append([cell if isinstance(cell, str) else cell.text() for cell in cells])
    return rows


def print_markdown(tables: list[Table], notes: list[str]) -> None:
    for table in tables:
        print(f"### {table.title}\n")
        heading, *rows = text_rows(table)
        for row in [heading, ["---"] * len(heading), *rows]:
            print("|", " | ".join(cell.replace("|", "\\|") for cell in row), "|")
        print()
    for note in notes:
        print("-", note)


def print_latex(tables: list[Table], notes: list[str]) -> None:
    """For a document with \\usepackage{booktabs}."""
    for table in tables:
        heading, *rows = text_rows(table)
        print(f"\\begin{{table}}\n\\centering\n\\caption{{{latex(table.title)}}}")
        print(f"\\begin{{tabular}}{{{'l' * len(heading)}}}\n\\toprule")
        print(" & ".join(map(latex, heading)), "\\\\\n\\midrule")
        for row in rows:
            print(" & ".join(map(latex, row)), "\\\\")
        print("\\bottomrule\n\\end{tabular}\n\\end{table}\n")
    for note in notes:
        print("%", note)


def latex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(LATEX.get(c, c) for c in text)


def print_csv(tables: list[Table], notes: list[str]) -> None:
    """One table of all rows; notes go to standard error."""
    lines = []
    for table in tables:
        for row in table.rows:
            line = {"table": table.title}
            for key, cell in row.items():
                if isinstance(cell, str):
                    line[key] = cell
                elif cell is not None:
                    _, *parts = cell._fields  # without the column
                    line |= {f"{key} {part}".removesuffix(" mean"): getattr(cell, part) for part in parts}
            lines.append(line)
    writer = csv.DictWriter(sys.stdout, dict.fromkeys(key for line in lines for key in line), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    for note in notes:
        print(note, file=sys.stderr)


FORMATS = {"markdown": print_markdown, "csv": print_csv, "latex": print_latex}
