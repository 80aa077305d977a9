"""scripts/summarize.py on the study's file and on run directories made by hand."""

import re
import shlex
from pathlib import Path

import paper
import pytest
from helpers import NO_METHOD, TEST_BLOCK, cells, images_record, make_finished_run, metrics

from utils import flags

STUDY = Path(paper.__file__).parent / "results" / "cifar100_width16.jsonl"


PAGE = STUDY.with_name("README.md").read_text()
COMMANDS = re.findall(r"summarize.py scripts/results/(\w+\.jsonl)(.*)", PAGE)


@pytest.mark.parametrize(("file", "words"), COMMANDS)
def test_commands_of_the_results_page_give_its_tables(file, words, summary):
    out = summary(*shlex.split(words), path=STUDY.with_name(file))
    assert "| resnet18 |" in out
    assert out in PAGE


def test_intervals_of_the_answers_are_printed_by_the_commands(summary):
    _, _, rest = PAGE.partition("### The answers, with three seeds")
    answers, _, rest = rest.partition("### How the runs are made")
    _, _, tables = rest.partition("<!-- the outputs of the six commands above -->")
    tables += summary("--pairs", "baseline", "--unpooled", path=STUDY.with_name("cifar100_20classes.jsonl"))
    quoted = re.findall(r"[+-][\d.]+ \[[^]]+\]", " ".join(answers.split()))
    assert len(quoted) > 30
    for interval in quoted:
        assert f"| {interval}" in tables


def test_best_epoch_is_of_the_test_split(summary):
    (row,) = cells(summary("--best", path=STUDY), methods="baseline")
    assert row["top-1 err (%)"] == "76.62 ± 0.90"  # of 76.09, 77.66 and 76.10


def test_mean_deviation_difference_and_mark(tmp_path, summary):
    for seed, top1 in ((1, 20.5), (2, 21.5), (3, 22.5)):  # mean 21.5, deviation 1; published 20.03: within 2
        make_finished_run(tmp_path, f"a{seed}", top1, seed, results={"hours": 5.5})
    for seed, top1 in ((1, 20.2), (2, 20.4)):  # mean 20.3, deviation .14; published 19.94: over 2
        make_finished_run(tmp_path, f"b{seed}", top1, seed, BYOT=False, DML=False)
    make_finished_run(tmp_path, "c1", 30.0, **NO_METHOD)  # one run has no deviation and no mark
    out = summary()
    (row8,), (row4,), (row1,) = (cells(out, row=str(row)) for row in (8, 4, 1))
    assert (row8["methods"], row8["n"], row8["seeds"]) == ("PSKD+BYOT+DML", "3", "1 2 3")
    assert row8["top-1 err (%)"] == "21.50 ± 1.00 (20.03, +1.47)"
    assert (row8["s/epoch"], row8["hours"]) == ("10.0 ± 0.0 (32.08)", "5.50 ± 0.00")
    assert (row4["top-1 err (%)"], row4["hours"]) == ("20.30 ± 0.14 (19.94, +0.36*)", "—")
    assert row1["top-1 err (%)"] == "30.00 (21.41, +8.59)"
    assert "- 6 runs, last epoch, made on H200, torch 2.8, commit 0123456" in out
    assert cells(summary("--best"), row="8")[0]["top-1 err (%)"].startswith("20.50 ± 1.00 ")


def test_classifiers_have_their_right_names(tmp_path, summary):
    last = {"exits": [metrics(40.0), None, metrics(21.0)], "ensemble": metrics(19.0)}
    last["calibrated"] = {"val": {"ece": 2.0}, "exits": [{"ece": 1.25}, None, {"ece": 1.5}]}
    make_finished_run(tmp_path, "a", 20.0, last=last)
    (row,) = cells(summary("--table", "2"), row="2")
    assert list(row)[-4:] == ["4/4", "3/4", "1/4", "ensemble"]
    assert (row["4/4"], row["ensemble"]) == ("80.00 (79.76, +0.24)", "81.00 (79.68, +1.32)")
    assert (row["3/4"], row["1/4"]) == ("79.00 (78.92, +0.08)", "60.00 (67.90, -7.90)")  # exchanged in the paper
    rows = [(row["classifier"], row["ECE after T (%)"]) for row in cells(summary("--all_classifiers"))]
    assert rows == [("exit 1", "1.25"), ("exit 3", "1.50"), ("final", "2.00"), ("ensemble", "—")]


COMPARABLE = {"precision": "bf16", "DML_as_published": True}
OTHER = {"width": 8, "alpha": 0.2, "lr_decay_schedule": [15, 23], "future_flag": 1}


@pytest.mark.parametrize(("flag", "value"), [*COMPARABLE.items(), *OTHER.items()])
def test_runs_with_different_flags_are_never_averaged(flag, value, tmp_path, summary):
    make_finished_run(tmp_path, "a1", 20.0, seed=1)
    make_finished_run(tmp_path, "b1", 30.0, seed=2, **{flag: value})
    published = " (20.03, +9.97)" if flag in COMPARABLE else ""
    top1 = {row["methods"]: row["top-1 err (%)"] for row in cells(summary(), row="8")}
    assert top1 == {"PSKD+BYOT+DML": "20.00 (20.03, -0.03)", f"PSKD+BYOT+DML, {flag} {value}": f"30.00{published}"}


def test_runs_of_other_machines_and_versions_are_one_group(tmp_path, summary):
    make_finished_run(tmp_path, "a1", 20.0, seed=1, workers=1, compile=True, processes=1)
    make_finished_run(tmp_path, "a2", 21.0, seed=2, workers=9, label_smoothing=0.0, val_split=None, device="L4")
    file = tmp_path / "a1" / "results.json"
    file.write_text(file.read_text().replace('"eaurc"', '"renamed"'))
    make_finished_run(tmp_path, "b1", 20.0, PSKD=False)
    out = summary()
    (row,) = cells(out, row="8")
    assert (row["seeds"], row["top-1 err (%)"]) == ("1 2", "20.50 ± 0.71 (20.03, +0.47)")
    assert row["E-AURC (x 1000)"] == "—"  # one of the two lacks it
    assert row["s/epoch"] == "—"  # seconds on two machines have no mean
    assert "made on H200, torch 2.8, commit 0123456; L4, torch 2.8, commit 0123456" in out


def test_runs_outside_the_papers_tables_have_their_own(tmp_path, summary):
    make_finished_run(tmp_path, "a", 20.0, classifier_type="resnet34")
    out = summary()
    assert out.startswith("### Other runs: cifar100\n")
    assert cells(out)[0]["network"] == "resnet34"


OTHER_DATA = [
    ({"data_type": "folder"}, "folder"),
    ({"data_type": "tinyimagenet"}, "tinyimagenet"),
    ({"classes": 20}, "cifar100, classes 20"),
    ({"limit_train": 4000}, "cifar100, limit_train 4000"),
]


def test_other_data_never_stand_in_the_papers_tables(tmp_path, summary):
    make_finished_run(tmp_path, "paper", 20.0)
    for i, (config, _) in enumerate(OTHER_DATA):
        make_finished_run(tmp_path, str(i), 30.0 + i, **config)
    out = summary()
    assert len(cells(out)) == 1  # Table 1 has the one run
    tables = dict(re.findall(r"### (.*)\n\n(?:.*\n){2}((?:\|.*\n)+)", out))
    for i, (_, name) in enumerate(OTHER_DATA):
        table = tables[f"Other runs: {name}"]
        assert table.count("| resnet18 |") == 1
        assert f"| {30 + i}.00 |" in table


def test_another_test_split_is_another_data_set(tmp_path, summary):
    make_finished_run(tmp_path, "a1", 20.0, 1)
    make_finished_run(tmp_path, "a2", 30.0, 2, data=images_record(val="9c"))
    make_finished_run(tmp_path, "a3", 40.0, 3, data={"mean": [0.5], "std": [0.25]})  # of an older run
    out = summary("--table", "1")
    for facts in ("test images 100, test digest 2b2b2b2b2b2b", "test images 100, test digest 9c9c", "test images not"):
        assert f"### Table 1: networks and losses, cifar100 ({facts}" in out
    assert out.count("| 8 | resnet18 |") == 3
    assert "±" not in out


def test_other_training_images_are_another_setting(tmp_path, summary):
    make_finished_run(tmp_path, "a1", 20.0, 1)
    make_finished_run(tmp_path, "a2", 30.0, 1, data=images_record(train="9c"))  # no duplicate
    make_finished_run(tmp_path, "b", 25.0, 1, PSKD=False)
    out = summary()
    labels = [row["methods"] for row in cells(out, n="1")]
    assert labels == ["BYOT+DML", *(f"PSKD+BYOT+DML, train digest {digest * 6}" for digest in ("1a", "9c"))]
    assert "left out" not in out


def test_without_test_split_the_held_out_images_have_a_table_of_their_own(tmp_path, summary):
    make_finished_run(tmp_path, "a", 20.0, val_split=0.1, data_type="folder", results={"test": {}})
    out = summary()
    assert out.startswith("### Other runs: folder, no test split: held-out images\n")
    assert cells(out)[0]["top-1 err (%)"] == "20.00"


def test_seeds_that_hold_out_other_images_are_one_setting(tmp_path, summary):
    for seed in (1, 2):
        data = images_record(f"{seed}a", f"{seed}b", "3c") | {"mean": [seed / 10]}
        make_finished_run(tmp_path, f"a{seed}", 90.0, seed, val_split=0.1, results={"test": TEST_BLOCK}, data=data)
    (row,) = cells(summary(), row="8")
    assert (row["seeds"], row["top-1 err (%)"]) == ("1 2", "20.00 ± 0.00")
    make_finished_run(
        tmp_path, "b1", 90.0, 1, val_split=0.1, results={"test": TEST_BLOCK}, data=images_record("1a", "9b", "3c")
    )
    assert re.search(r"b1 \(the same flags and seed as \S+/a1, which is used, but with other val images\)", summary())


def test_processes_and_allowed_changes_are_other_settings(tmp_path, summary):
    change = {"epoch": 3, "name": "end_epoch", "before": 150, "after": 300}
    make_finished_run(tmp_path, "a1", 20.0, 1)
    make_finished_run(tmp_path, "a2", 30.0, 2, processes=2)
    make_finished_run(tmp_path, "a3", 40.0, 3, changes=[change])
    start = {"device_name": "H200", "torch": "2.8", "git_commit": "0", "new_fact": 5}
    make_finished_run(
        tmp_path, "a4", 50.0, 4, starts=[{**start, "processes": 1}, {**start, "processes": 4}], new_fact=5
    )
    out = summary()
    changed = "changed end_epoch 150 -> 300 after epoch 3"
    top1 = {row["methods"].partition(", ")[2]: row["top-1 err (%)"] for row in cells(out, row="8")}
    assert top1 == {"": "20.00 (20.03, -0.03)", "processes 2": "30.00", changed: "40.00", "processes 1 and 4": "50.00"}


def test_times_are_those_of_one_machine(tmp_path, summary):
    start = {"torch": "2.8", "git_commit": "0"}
    starts = [{"device_name": "L4", **start}, {"device_name": "H200", **start}]
    make_finished_run(tmp_path, "a1", 20.0, 1, starts=starts, results={"hours": 5.0})
    make_finished_run(tmp_path, "b1", 20.0, 1, starts=starts[1:], PSKD=False, results={"hours": 5.0})
    by_row = {row["row"]: (row["s/epoch"], row["hours"]) for row in cells(summary())}
    assert by_row == {"8": ("—", "—"), "7": ("10.0 (31.73)", "5.00")}


def test_unusable_runs_are_named_and_not_averaged(tmp_path, summary):
    make_finished_run(tmp_path, "a1", 20.0, seed=1)
    make_finished_run(tmp_path, "again", 90.0, seed=1)
    make_finished_run(tmp_path, "cut", 90.0, seed=2, results={"status": "interrupted"})
    for name, content in (("list", "[]"), ("empty", ""), ("bare", '{"status": "finished"}')):
        make_finished_run(tmp_path, name, 90.0, seed=4)
        (tmp_path / name / "results.json").write_text(content)
    make_finished_run(tmp_path, "young", 90.0, seed=5)
    (tmp_path / "young" / "results.json").unlink()
    out = summary()
    (row,) = cells(out, row="8")
    assert (row["seeds"], row["top-1 err (%)"]) == ("1", "20.00 (20.03, -0.03)")
    reasons = re.findall(r"- left out: \S+/(\w+ \(.{12})", out)
    assert [reason.split()[0] for reason in reasons] == ["again", "bare", "cut", "empty", "list", "young"]
    assert {"again (the same fla", "bare (no entry 'la", "cut (interrupted,"} <= set(reasons)


DAMAGE = {
    "text": ("results.json", '"nll": 0.5', '"nll": "low"'),
    "nan": ("results.json", '"nll": 0.5', '"nll": NaN'),
    "null": ("results.json", '"nll": 0.5', '"nll": null'),
    "time": ("results.json", '"seconds_per_epoch": 10.0', '"seconds_per_epoch": null'),
    "val": ("results.json", '"val": {', '"val": [], "was": {'),
    "cost": ("results.json", '"exits": []', '"exits": [], "early_exit": {"chosen": {}, "backbone_multiply_adds": 0}'),
    "seed_text": ("config.json", '"seed": 1', '"seed": "1"'),
    "seed": ("config.json", '"seed": 1', '"seed": [7]'),
    "starts": ("config.json", '"seed"', '"starts": null, "seed"'),
    "device": ("config.json", '"device_name"', '"no_name"'),
    "changes": ("config.json", '"seed"', '"changes": [5], "seed"'),
    "deep": ("config.json", '"seed"', f'"deep": {"[" * 100_000}, "seed"'),
    "splits": ("config.json", '"splits": {', '"splits": [], "was": {'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_run_is_named_and_left_out(name, tmp_path, summary):
    make_finished_run(tmp_path, "good", 20.0, 2)
    make_finished_run(tmp_path, "bad", 90.0, 1)
    file, old, new = DAMAGE[name]
    content = (tmp_path / "bad" / file).read_text()
    assert old in content
    (tmp_path / "bad" / file).write_text(content.replace(old, new))
    out = summary()
    assert cells(out, row="8")[0]["seeds"] == "2"
    assert re.search(r"- left out: \S+/bad \(.+\)\n", out)


def test_no_device_is_touched(tmp_path, summary, monkeypatch):
    monkeypatch.setattr(flags, "_check_machine", None)  # asks the GPU for memory
    make_finished_run(tmp_path, "a", 20.0)
    assert cells(summary(), row="8")


def test_published_rows_are_the_papers():
    first = paper.table_rows(1)
    combinations = [[], ["BYOT"], ["DML"], ["PSKD"], ["PSKD", "BYOT"], ["PSKD", "DML"], ["BYOT", "DML"]]
    assert [row["methods"] for row in first] == 3 * [*combinations, ["PSKD", "BYOT", "DML"]]
    assert (first[23]["aurc"], first[7]["ece"]) == (45.71, 4.15)
