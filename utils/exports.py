"""A run's record -> the files that others read: config.json, metrics.jsonl, results.json."""

import json
import statistics

from utils.records import Classifiers, RunRecord, best_epoch, early_exit_line, results_table, to_json


def exports(run: RunRecord, status: str, runtime_flags: set[str]) -> dict[str, str]:
    """The files' contents by name.

    Args:
        status: running, finished, interrupted or failed.
        runtime_flags: names of flags that do not define the experiment.
    """
    origin = {"data": to_json(run.data), "starts": to_json(run.starts), "changes": to_json(run.changes)}
    environment = {name: value for name, value in origin["starts"][-1].items() if name not in ("epoch", "resumed_from")}
    config = {**run.args, **environment, **origin, "runtime": sorted(runtime_flags)}
    return {
        "results.json": json.dumps(results(run, status), indent=1) + "\n",
        "metrics.jsonl": "".join(json.dumps(to_json(epoch)) + "\n" for epoch in run.history),
        "config.json": json.dumps(config, indent=1) + "\n",
    }


def results(run: RunRecord, status: str) -> dict:
    """The content of results.json."""
    history = run.history
    seconds = [epoch.seconds + epoch.seconds_validation + epoch.seconds_saving for epoch in history]
    found = {
        "status": status,
        "epochs": len(history),
        "seconds_per_epoch": statistics.median(epoch.seconds for epoch in history),
        "hours": sum(seconds) / 3600,
        "last": to_json(history[-1]),
        "best": to_json(best_epoch(history)),
    }
    return found if run.test is None else found | {"test": to_json(run.test)}


def report(run: RunRecord) -> str:
    """The table of a finished run's results: its last and best epoch, on the test split too, if there is one."""
    last, best = run.history[-1], best_epoch(run.history)
    epochs = {"last and best": last} if last is best else {"last": last, "best": best}
    blocks: dict[str, Classifiers] = {}
    notes = []
    for name, epoch in epochs.items():
        title = f"{name} epoch ({epoch.epoch + 1})"
        blocks[title] = epoch.val
        test = (run.test or {}).get(name[:4])
        if test and test.metrics:
            blocks[f"{title}, test split"] = test.metrics
            blocks[f"{title}, test split, after temperature scaling"] = test.calibrated
        if test and test.early_exit:
            notes.append(f"{title}: {early_exit_line(test.early_exit)}")
    return "\n".join([results_table(blocks), *notes])
