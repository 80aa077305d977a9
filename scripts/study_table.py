"""Print README's table of the study of twenty classes."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under PYTHONSAFEPATH
from intervals import pair_runs
from paper import table_rows
from runs import COLUMNS, Run, find_runs, group_runs
from tables import cell_text, make_paired_table, mean_cell

from utils.errors import UserError, print_error, run_command
from utils.parser import Parser, path_type

STUDY = Path(__file__).parent / "results" / "cifar100_20classes.jsonl"
SETTINGS = {  # the label that summarize.py gives a setting -> README's words
    "baseline": "none (baseline)",
    "baseline, label_smoothing 0.1": "label smoothing 0.1",
    "PSKD": "PS-KD",
    "BYOT": "BYOT",
    "BYOT, alpha 0.0, beta 0.0": "deep supervision (labels on the exits, no teacher)",
    "DML": "DML",
    "PSKD+BYOT": "PS-KD + BYOT",
    "PSKD+DML": "PS-KD + DML",
    "BYOT+DML": "BYOT + DML",
    "PSKD+BYOT+DML": "PS-KD + BYOT + DML",
}
SHOWN = ("top1_error", "ece", "nll_after_T", "augrc")
HEADING = [COLUMNS[key].heading for key in SHOWN]
HEADING = [
    "losses",
    *HEADING,
    "n",
    "top-1 err minus the baseline's",
    "another setting, the paper's: top-1 err, ECE (%)",
]


def published(label: str) -> str:
    """The paper's numbers for ResNet-18, `top-1 error, ECE`; a dash where it has none."""
    for row in table_rows(1):
        if row["model"] == "resnet18" and "+".join(row["methods"] or ["baseline"]) == label:
            return f"{row['top1_error']:.2f}, {row['ece']:.2f}"
    return "-"


def study_table(files: list[Path]) -> str:
    """Markdown: mean and standard deviation over seeds, and the paired difference with its 95 % interval.

    Raises:
        UserError: there are no runs, or some that have no place in the table. OSError: a file cannot be read.
    """
    groups, left_out = group_runs(find_runs(files), "last")
    by_label: dict[str, list[Run]] = {group[0].label: group for group in groups}
    paired, unpaired = pair_runs("baseline", groups)
    wrong = [
        *left_out,
        *unpaired,
        *(f"no setting of this table: {label}" for label in by_label if label not in SETTINGS),
    ]
    if len(by_label) < len(groups):
        wrong.append("several networks or data sets")
    if wrong or not groups:
        raise UserError("; ".join(wrong) or f"no run in {', '.join(map(str, files))}")
    differences, _ = make_paired_table("", {"top1_error": COLUMNS["top1_error"]}, paired)
    rows = [HEADING, ["---"] * len(HEADING)]
    for label, words in SETTINGS.items():
        if label not in by_label:  # not run yet
            rows.append([words, *[""] * (len(HEADING) - 2), published(label)])
            continue
        runs = by_label[label]
        row = [words]
        for key in SHOWN:
            row.append(cell_text(mean_cell(runs, key), key, COLUMNS[key].decimals, False))
        difference = ""
        for line, cells in zip(differences.lines, differences.cells, strict=True):
            if line.runs[0].label == label:
                difference = cell_text(cells["top1_error"], "top1_error", 2, True)
        rows.append([*row, str(len(runs)), difference, published(label)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("files", nargs="*", type=path_type, default=[STUDY], help="study files (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        print(study_table(args.files))
    except (OSError, UserError) as error:
        print_error(str(error))
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pager is no error
    run_command(main)
