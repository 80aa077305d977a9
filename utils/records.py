"""An epoch's record, a line of metrics.jsonl: its classifiers by name, the best one, and the table of results."""

from utils.metrics import SHOWN


def classifiers(record: dict) -> dict[str, dict]:
    """The metrics of every classifier that a loss trains, by its name: `exit 1`, `exit 2`, ..., `final`, `ensemble`.

    record: a line of metrics.jsonl, or a block of the test split. `val` there is the final classifier; an exit whose
    classifier no loss trains is null, and so is the ensemble of one classifier.
    """
    named = {f"exit {i}": metrics for i, metrics in enumerate(record["exits"], start=1)}
    named["final"] = record["val"]
    named["ensemble"] = record.get("ensemble")
    return {name: metrics for name, metrics in named.items() if metrics}


def best_record(history: list[dict]) -> dict | None:
    """The epoch of lowest top-1 error, the earliest where several tie."""
    return min(history, key=lambda record: record["val"]["top1_error"], default=None)


def results_table(results: dict) -> str:
    """Each classifier's metrics in the last and the best epoch, and on the test split, if there is one, as they are,
    after temperature scaling, and with early exit."""
    headings = [metric.heading for metric in SHOWN.values()]
    units = [metric.unit for metric in SHOWN.values()]
    rows = [["", *headings], ["", *units]]
    titles = {"last": "last epoch", "best": "best epoch"}
    if results["last"] == results.get("best"):
        titles = {"last": "last and best epoch"}
    for name, title in titles.items():
        if name not in results:
            continue
        rows += metric_rows(f"{title} ({results[name]['epoch'] + 1})", results[name])
        test = results.get("test", {}).get(name)
        if test:
            rows += metric_rows(f"{title}, test split", test)
            rows += metric_rows(f"{title}, test split, after temperature scaling", test["calibrated"])
            if test["early_exit"]:
                rows.append([early_exit_line(test["early_exit"])])
    lines = []
    for label, *cells in rows:
        aligned = [f"{cell:>11}" for cell in cells]
        lines.append(f"{label:14}" + "".join(aligned))
    return "\n".join(lines)


def metric_rows(title: str, record: dict) -> list[list[str]]:
    """Rows of a title and of each classifier that a loss trains."""
    rows = [[title]]
    for name, metrics in classifiers(record).items():
        cells = []
        for key, metric in SHOWN.items():
            cells.append(f"{metrics[key]:.{metric.decimals}f}" if key in metrics else "-")
        rows.append([f"  {name}", *cells])
    return rows


def early_exit_line(early_exit: dict) -> str:
    """What early exit costs and errs at the chosen threshold."""
    chosen = early_exit["chosen"]
    share = 100 * chosen["multiply_adds"] / early_exit["backbone_multiply_adds"]
    error = f"top-1 err {100 - chosen['accuracy']:.2f} % with {share:.0f} % of the backbone's MACs (multiply-adds)"
    return f"  early exit at confidence {chosen['threshold']:.2f}, chosen on held-out images: {error}"
