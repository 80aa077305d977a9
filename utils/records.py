"""An epoch's record, as metrics.jsonl and results.json hold it: the best one, and the table of results."""

from utils.metrics import SHOWN


def best_record(history: list[dict]) -> dict | None:
    """The epoch of lowest top-1 error, the earliest where several tie."""
    return min(history, key=lambda record: record["val"]["top1_error"], default=None)


def results_table(results: dict) -> str:
    """Each classifier's metrics in the last and the best epoch, and on the test split, if there is one, as they are,
    after temperature scaling, and with early exit."""
    rows = [["", *(m.heading for m in SHOWN.values())], ["", *(m.unit for m in SHOWN.values())]]
    titles = {"last": "last epoch", "best": "best epoch"}
    if results["last"] == results.get("best"):
        titles = {"last": "last and best epoch"}
    for name, title in titles.items():
        if name in results:
            rows += metric_rows(f"{title} ({results[name]['epoch'] + 1})", results[name])
        if test := results.get("test", {}).get(name):
            rows += metric_rows(f"{title}, test split", test)
            rows += metric_rows(f"{title}, test split, after temperature scaling", test["calibrated"])
            if test["early_exit"]:
                chosen = test["early_exit"]["chosen"]
                share = 100 * chosen["multiply_adds"] / test["early_exit"]["backbone_multiply_adds"]
                error = f"top-1 err {100 - chosen['accuracy']:.2f} % with {share:.0f} % of the backbone's multiply-adds"
                rows.append(
                    [f"  early exit at confidence {chosen['threshold']:.2f}, chosen on held-out images: {error}"]
                )
    return "\n".join(f"{label:14}" + "".join(f"{cell:>11}" for cell in cells) for label, *cells in rows)


def metric_rows(title: str, record: dict) -> list[list[str]]:
    """Rows of a title and of each classifier that a loss trains."""
    rows = [[title]]
    classifiers = {f"  exit {i}": metrics for i, metrics in enumerate(record["exits"], start=1)}
    for label, metrics in {**classifiers, "  final": record["val"], "  ensemble": record.get("ensemble")}.items():
        if metrics:
            cells = [f"{metrics[name]:.{m.decimals}f}" if name in metrics else "-" for name, m in SHOWN.items()]
            rows.append([label, *cells])
    return rows
