"""scripts/summarize.py on the study's file and on run directories made by hand."""

import json
import re
from pathlib import Path

import pytest
import run_table
import summarize

STUDY = Path(run_table.__file__).parent / "results" / "cifar100_width16.jsonl"


def metrics(top1):
    return {"top1_error": top1, "top5_error": 4.0, "nll": 0.7, "ece": 4.0, "aurc": 50.0, "eaurc": 20.0}


def make_run(root, name, top1, seed=1, device="H200", results=(), last=(), **flags):
    """A run directory; row 8 of Table 1 in the paper's setting unless the flags differ."""
    usual = {"classifier_type": "resnet18", "PSKD": True, "BYOT": True, "DML": True, "end_epoch": 300}
    config = {**usual, "precision": "fp32", "workers": 4, "run_name": name, **flags, "seed": seed, "torch": "2.8"}
    config |= {"device_name": device, "git_commit": "0123456", "data": {"class_names": ["a"], "mean": [0.12345678]}}
    last = {"val": metrics(top1), "exits": [], "ensemble": None, **dict(last)}
    best = {**last, "val": metrics(top1 - 1)}
    usual = {"status": "finished", "epochs": 7, "seconds_per_epoch": 10.0, "last": last, "best": best}
    (root / name).mkdir(parents=True)
    (root / name / "config.json").write_text(json.dumps(config))
    (root / name / "results.json").write_text(json.dumps({**usual, **dict(results)}))


@pytest.fixture
def summary(tmp_path, capsys):
    """summary(*words) -> output of summarize.py on tmp_path."""

    def call(*words, path=tmp_path):
        summarize.main([str(path), *words])
        return capsys.readouterr().out

    return call


def cells(output, **labels):
    """Heading -> cell, for each line of the first table that has these labels."""
    table = output.partition("###")[2].partition("###")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    heads, _, *lines = [[cell.strip() for cell in line] for line in lines]
    rows = [dict(zip(heads, line, strict=True)) for line in lines]
    return [row for row in rows if labels.items() <= row.items()]


@pytest.mark.parametrize("words", [[], ["--pairs", "baseline"], ["--all_classifiers"]])
def test_study_file_gives_the_published_page(words, summary):
    out = summary(*words, path=STUDY)
    assert out.count("| resnet18 |") >= 7 and out in STUDY.with_name("README.md").read_text()


def test_best_epoch_is_of_the_test_split(summary):
    (row,) = cells(summary("--best", path=STUDY), methods="baseline")
    assert row["top-1 err (%)"] == "76.62 ± 0.90"  # of 76.09, 77.66 and 76.10


def test_mean_deviation_difference_and_mark(tmp_path, summary):
    for seed, top1 in ((1, 20.5), (2, 21.5), (3, 22.5)):  # mean 21.5, deviation 1; published 20.03: within 2
        make_run(tmp_path, f"a{seed}", top1, seed, results={"hours": 5.5})
    for seed, top1 in ((1, 20.2), (2, 20.4)):  # mean 20.3, deviation .14; published 19.94: over 2
        make_run(tmp_path, f"b{seed}", top1, seed, BYOT=False, DML=False)
    make_run(tmp_path, "c1", 30.0, PSKD=False, BYOT=False, DML=False)  # one run has no deviation and no mark
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
    make_run(tmp_path, "a", 20.0, last=last)
    (row,) = cells(summary("--table", "2"), row="2")
    assert list(row)[-4:] == ["4/4", "3/4", "1/4", "ensemble"]
    assert (row["4/4"], row["ensemble"]) == ("80.00 (79.76, +0.24)", "81.00 (79.68, +1.32)")
    assert (row["3/4"], row["1/4"]) == ("79.00 (78.92, +0.08)", "60.00 (67.90, -7.90)")  # exchanged in the paper
    rows = [(row["classifier"], row["ECE after T (%)"]) for row in cells(summary("--all_classifiers"))]
    assert rows == [("1/4", "1.25"), ("3/4", "1.50"), ("4/4", "2.00"), ("ensemble", "—")]


COMPARABLE = {"precision": "bf16", "DML_as_published": True}
OTHER = {"width": 8, "alpha": 0.2, "lr_decay_schedule": [15, 23], "future_flag": 1}


@pytest.mark.parametrize(("flag", "value"), [*COMPARABLE.items(), *OTHER.items()])
def test_runs_with_different_flags_are_never_averaged(flag, value, tmp_path, summary):
    make_run(tmp_path, "a1", 20.0, seed=1)
    make_run(tmp_path, "b1", 30.0, seed=2, **{flag: value})
    published = " (20.03, +9.97)" if flag in COMPARABLE else ""
    top1 = {row["methods"]: row["top-1 err (%)"] for row in cells(summary(), row="8")}
    assert top1 == {"PSKD+BYOT+DML": "20.00 (20.03, -0.03)", f"PSKD+BYOT+DML, {flag} {value}": f"30.00{published}"}


def test_runs_of_other_machines_and_versions_are_one_group(tmp_path, summary):
    make_run(tmp_path, "a1", 20.0, seed=1, workers=1, compile=True, processes=1)
    make_run(tmp_path, "a2", 21.0, seed=2, workers=9, processes=2, label_smoothing=0.0, val_split=None, device="L4")
    file = tmp_path / "a1" / "results.json"
    file.write_text(file.read_text().replace('"eaurc"', '"renamed"'))
    make_run(tmp_path, "b1", 20.0, PSKD=False)
    out = summary()
    (row,) = cells(out, row="8")
    assert (row["seeds"], row["top-1 err (%)"]) == ("1 2", "20.50 ± 0.71 (20.03, +0.47)")
    assert row["E-AURC (x 1000)"] == "—"  # one of the two lacks it
    assert row["s/epoch"] == "—"  # seconds on two machines have no mean
    assert "made on H200, torch 2.8, commit 0123456; L4, torch 2.8, commit 0123456" in out


def test_runs_outside_the_papers_tables_have_their_own(tmp_path, summary):
    make_run(tmp_path, "a", 20.0, classifier_type="resnet34")
    out = summary()
    assert out.startswith("### Other runs\n") and cells(out)[0]["network"] == "resnet34"


def test_unusable_runs_are_named_and_not_averaged(tmp_path, summary):
    make_run(tmp_path, "a1", 20.0, seed=1)
    make_run(tmp_path, "again", 90.0, seed=1)
    make_run(tmp_path, "cut", 90.0, seed=2, results={"status": "interrupted"})
    for name, content in (("list", "[]"), ("empty", ""), ("bare", '{"status": "finished"}')):
        make_run(tmp_path, name, 90.0, seed=4)
        (tmp_path / name / "results.json").write_text(content)
    make_run(tmp_path, "young", 90.0, seed=5)
    (tmp_path / "young" / "results.json").unlink()
    out = summary()
    (row,) = cells(out, row="8")
    assert (row["seeds"], row["top-1 err (%)"]) == ("1", "20.00 (20.03, -0.03)")
    reasons = re.findall(r"- left out: \S+/(\w+ \(.{12})", out)
    assert [reason.split()[0] for reason in reasons] == ["again", "bare", "cut", "empty", "list", "young"]
    assert {"again (the same fla", "bare (no entry 'la", "cut (interrupted,"} <= set(reasons)


def test_differences_are_paired_by_seed(tmp_path, summary):
    for seed, base, byot in ((1, 30.0, 29.0), (2, 32.0, 30.0)):
        make_run(tmp_path, f"base{seed}", base, seed, PSKD=False, BYOT=False, DML=False)
        make_run(tmp_path, f"byot{seed}", byot, seed, PSKD=False, DML=False)
    make_run(tmp_path, "byot3", 0.0, 3, PSKD=False, DML=False)  # no baseline has seed 3
    (row,) = cells(summary("--pairs", "baseline"))
    assert (row["methods"], row["n"], row["seeds"], row["top-1 err (%)"]) == ("BYOT", "2", "1 2", "-1.50 ± 0.71")
    with pytest.raises(SystemExit):
        summary("--pairs", "base")


def test_export_can_be_read_and_has_no_paths(tmp_path, summary):
    for seed in (1, 2):
        make_run(tmp_path, f"a{seed}", 20.0 + seed, seed, data_path="/home/me")
    file = tmp_path / "study.jsonl"
    before = summary("--export", str(file))
    assert summary(path=file) == before
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["name"] for record in records] == ["a1", "a2"]
    config = records[0]["config"]
    assert config["data"] == {"mean": [0.123457]} and "data_path" not in config and config["device_name"] == "H200"


def test_published_rows_are_the_papers():
    first = run_table.table_rows(1)
    combinations = [[], ["BYOT"], ["DML"], ["PSKD"], ["PSKD", "BYOT"], ["PSKD", "DML"], ["BYOT", "DML"]]
    assert [row["methods"] for row in first] == 3 * [*combinations, ["PSKD", "BYOT", "DML"]]
    assert (first[23]["aurc"], first[7]["ece"]) == (45.71, 4.15)
