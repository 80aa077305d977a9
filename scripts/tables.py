"""Tables of runs as markdown, CSV or LaTeX."""

import csv
import io
import statistics
import sys
from typing import NamedTuple

from intervals import paired_intervals
from runs import TIMES, Column, Run

from utils.errors import printable

MISSING = "—"
LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    MISSING: "--",
}


class Cell(NamedTuple):
    mean: float
    sd: float | None  # None for a single run
    published: float | None = None
    half_width: float | None = None  # of the mean's 95 % interval


class Line(NamedTuple):
    runs: list[Run]  # of one setting, one per seed
    row: str  # its number in the paper's table, the classifier, or nothing
    published: dict  # column -> the paper's value


class Table(NamedTuple):
    title: str
    columns: dict[str, Column]
    lines: list[Line]
    cells: list[dict[str, Cell]]  # of each line, the columns that all of its runs have
    row_heading: str = "row"
    is_difference: bool = False


def make_table(title: str, columns: dict[str, Column], lines: list[Line], row_heading: str = "row") -> Table:
    """A table of means over seeds."""
    cells = []
    for line in lines:
        found = {key: mean_cell(line.runs, key, line.published.get(key)) for key in columns}
        cells.append({key: cell for key, cell in found.items() if cell is not None})
    return Table(printable(title), columns, lines, cells, row_heading)


def mean_cell(runs: list[Run], column: str, published: float | None = None) -> Cell | None:
    """None where a run lacks the number, or where it is a time and several machines were used."""
    machines = frozenset.union(*(run.machines for run in runs))
    if any(column not in run.values for run in runs) or (column in TIMES and len(machines) > 1):
        return None
    values = [run.values[column] for run in runs]
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Cell(statistics.mean(values), sd, published)


def make_paired_table(
    title: str, columns: dict[str, Column], groups: list[list[Run]], pooled: bool = True
) -> tuple[Table, str]:
    """A table of differences from a base, as `pair_runs` returns them, with 95 % intervals; a line on the intervals.

    pooled: their variance is that of all groups' differences, or else of each group's own.
    """
    lines = [Line(runs, "", {}) for runs in groups]
    table = make_table(title, columns, lines)._replace(is_difference=True)
    rests_on = {}  # words -> columns' headings
    for key, column in columns.items():
        having = [i for i, cells in enumerate(table.cells) if key in cells]
        for together in [having] if pooled else [[i] for i in having]:
            intervals = paired_intervals([[run.values[key] for run in groups[i]] for i in together])
            for i, half_width in zip(together, intervals.half_widths, strict=True):
                table.cells[i][key] = table.cells[i][key]._replace(half_width=half_width)
            if intervals.num_settings:
                words = f"{intervals.num_settings} settings, {intervals.degrees_of_freedom:.1f} degrees of freedom"
                rests_on.setdefault(words, []).append(column.heading)
    if not pooled:
        return table, "n - 1 degrees of freedom" if rests_on else ""
    shown = [words if len(rests_on) == 1 else f"{', '.join(found)}: {words}" for words, found in rests_on.items()]
    return table, "; ".join(shown)


def cell_text(cell: Cell | None, column: str, decimals: int, is_difference: bool) -> str:
    """Such as `21.00 ± 1.00 (20.03, +0.97*)`: mean, standard deviation, published value, and ours minus it, with * if
    over two standard deviations. A difference has its interval, with * where that leaves out 0."""
    if cell is None:
        return MISSING
    if is_difference:
        return difference_text(cell, decimals)
    text = f"{cell.mean:.{decimals}f}"
    if cell.sd is not None:
        text += f" ± {cell.sd:.{decimals}f}"
    if cell.published is None:
        return text
    if column in TIMES:  # of another machine
        return f"{text} ({cell.published:.2f})"
    difference = cell.mean - cell.published
    mark = "*" if cell.sd is not None and abs(difference) > 2 * cell.sd else ""
    return f"{text} ({cell.published:.2f}, {difference:+.{decimals}f}{mark})"


def difference_text(cell: Cell, decimals: int) -> str:
    """Such as `-1.50 [-2.10, -0.90]*`."""
    text = f"{cell.mean:+.{decimals}f}"
    if cell.half_width is None:
        return text
    low = cell.mean - cell.half_width
    high = cell.mean + cell.half_width
    mark = "*" if low > 0 or high < 0 else ""
    return f"{text} [{low:+.{decimals}f}, {high:+.{decimals}f}]{mark}"


def shown_columns(tables: list[Table]) -> list[str]:
    """The columns that have a number somewhere, in order."""
    found = {}
    for table in tables:
        for key in table.columns:
            if any(key in cells for cells in table.cells):
                found[key] = True
    return list(found)


def text_rows(table: Table) -> list[list[str]]:
    """The heading and a row per line, without columns that are empty."""
    shown = shown_columns([table])
    heading = ["network", "methods", "n", "seeds", *(table.columns[key].heading for key in shown)]
    rows = [[table.row_heading, *heading]]
    for line, cells in zip(table.lines, table.cells, strict=True):
        seeds = " ".join(str(run.seed) for run in line.runs)
        run = line.runs[0]
        row = [line.row, printable(run.network), run.label, str(len(line.runs)), seeds]
        for key in shown:
            row.append(cell_text(cells.get(key), key, table.columns[key].decimals, table.is_difference))
        rows.append(row)
    if not any(line.row for line in table.lines):
        rows = [row[1:] for row in rows]
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
        print("\\begin{table}\n\\centering")
        print(f"\\caption{{{latex(table.title)}}}")
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
    """One table of all lines; notes go to standard error."""
    columns = shown_columns(tables)
    parts = ["", " sd", " published", " difference"]
    if any(table.is_difference for table in tables):
        parts += [" low", " high"]
    heading = ["table", "row", "network", "methods", "n", "seeds"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*heading, *(f"{key}{part}" for key in columns for part in parts)])
    for table in tables:
        for line, cells in zip(table.lines, table.cells, strict=True):
            run = line.runs[0]
            seeds = " ".join(str(run.seed) for run in line.runs)
            row = [table.title, line.row, run.network, run.label, len(line.runs), seeds]
            for key in columns:
                row += csv_numbers(cells.get(key))[: len(parts)]
            writer.writerow(row)
    print(file.getvalue(), end="")
    for note in notes:
        print(note, file=sys.stderr)


def csv_numbers(cell: Cell | None) -> list[str]:
    """Mean, standard deviation, published value, ours minus it, and the ends of the interval; empty where unknown."""
    if cell is None:
        return [""] * 6
    difference = low = high = None
    if cell.published is not None:
        difference = cell.mean - cell.published
    if cell.half_width is not None:
        low, high = cell.mean - cell.half_width, cell.mean + cell.half_width
    numbers = (cell.mean, cell.sd, cell.published, difference, low, high)
    return ["" if value is None else f"{value:.6g}" for value in numbers]


FORMATS = {"markdown": print_markdown, "csv": print_csv, "latex": print_latex}
