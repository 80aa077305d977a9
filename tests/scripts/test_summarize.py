"""scripts/summarize.py on the study's files and on run directories made by hand."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import paper
import pytest
import summarize
from helpers import NO_METHOD, TEST_BLOCK, cells, images_record, make_finished_run, metrics, start_record

import main

RESULTS = Path(paper.__file__).parent / "results"
PAGE = (RESULTS / "README.md").read_text()
TABLES = (RESULTS / "tables.md").read_text()  # what the page's commands print
COMMANDS = re.findall(r"summarize.py scripts/results/([\w*]+\.jsonl)(.*)", PAGE)
COMMANDS += [(files.replace("*", ""), words) for files, words in COMMANDS if "*" in files]  # seeds 1 to 3 alone


def study(files: str) -> list[str]:
    return sorted(map(str, RESULTS.glob(files)))


@pytest.mark.parametrize(("files", "words"), COMMANDS)
def test_commands_of_the_results_page_give_its_tables(files, words, summary):
    first, *others = study(files)
    out = summary(*others, *shlex.split(words), path=first)
    assert "| resnet18 |" in out
    assert out in TABLES


def test_every_table_of_a_study_is_printed_by_a_command():
    assert TABLES.count("\n### ") == len(COMMANDS) == 20


def test_intervals_of_the_answers_are_printed_by_the_commands(summary):
    answers, _, _ = PAGE.partition("### The protocol")
    tables = TABLES
    for files in ("cifar100_20classes.jsonl", "cifar100_20classes*.jsonl"):
        first, *others = study(files)
        tables += summary(*others, "--pairs", "baseline", "--unpooled", path=first)
    quoted = re.findall(r"[+-][\d.]+ \[[^]]+\]", " ".join(answers.split()))
    assert len(quoted) > 30
    for interval in quoted:
        assert f"| {interval}" in tables


def test_small_study_in_the_readme_is_rounded_from_the_tables(summary):
    first, *others = study("cifar100_20classes*.jsonl")
    names = ("top1_error", "nll_after_T", "early_exit_error", "early_exit")
    pairs = summary(*others, "--pairs", "baseline", "--metrics", *names, path=first)
    rows = {row["methods"]: row for row in cells(pairs)}
    top1 = [rows[name]["top-1 err (%)"] for name in ("BYOT", "PSKD+BYOT+DML", "PSKD", "DML", "deep supervision")]
    expected = []
    for cell in (*top1, rows["BYOT"]["early exit err (%)"]):
        mean, low, high = map(float, re.findall(r"[+-][\d.]+", cell))
        expected += [mean, (high - low) / 2]
    _, _, section = (paper.ROOT / "README.md").read_text().partition("\n## A small study\n")
    quoted = re.findall(r"(-?[\d.]+) ± ([\d.]+)", section)
    assert [float(text) for pair in quoted for text in pair] == pytest.approx(expected, abs=0.051)

    ece = {row["methods"]: float(row["ECE (%)"].split()[0]) for row in cells(summary(*others, path=first))}
    assert f"from {ece['baseline']:.1f} to {ece['PSKD']:.1f} %, DML to {ece['DML']:.1f} %" in section
    nll = [-float(mean) for mean in re.findall(r"-0\.\d+(?= \[-0\.\d+, -0)", pairs)]
    assert f"NLL is, by {min(nll):.2f} to {max(nll):.2f} nats" in section
    cost = 100 + float(rows["BYOT"]["early exit (% MACs)"].split()[0])
    section = " ".join(section.split())
    assert f"takes {cost:.0f} % of the plain network's" in section
    rises = []
    for line in "".join(Path(file).read_text() for file in (first, *others)).splitlines():
        run = json.loads(line)
        if run["name"].startswith("BYOT_seed"):
            last = run["results"]["test"]["last"]
            early = 100 - last["early_exit"]["chosen"]["accuracy"]
            rises.append(early - last["metrics"]["final"]["top1_error"])
    mean = sum(rises) / len(rises)
    assert f"rises by {mean:.1f} points, in one run of five by {max(rises):.1f}; from" in section


def test_the_study_has_five_seeds_of_all_settings_by_one_commit():
    configs = {}
    for file in study("cifar100_20classes*.jsonl"):
        for line in Path(file).read_text().splitlines():
            run = json.loads(line)
            configs[run["name"]] = run["config"]
    assert set(configs) == {f"{name}_seed{seed}" for name in paper.SETTINGS for seed in range(1, 6)}
    images = {(config["seed"], json.dumps(config["data"])) for config in configs.values()}
    assert len(images) == 5  # the seed draws the held-out images
    assert {config["git_commit"][:7] for config in configs.values()} == {"3f04f64"}
    # with today's program, a sixth seed joins its setting
    assert all(
        config["data"]["splits"].keys() == {"train_and_val", "train", "val", "test"} for config in configs.values()
    )


def test_best_epoch_is_of_the_test_split(summary):
    (row,) = cells(summary("--best", path=RESULTS / "cifar100_width16.jsonl"), methods="baseline")
    assert row["top-1 err (%)"] == "76.62 ± 0.90"  # of 76.09, 77.66 and 76.10


def test_the_papers_setting_is_main_pys_defaults():
    defaults = vars(main.default_args()) | {"precision": "fp32", "lr_decay_schedule": [150, 225]}
    setting = paper.PUBLISHED["setting"]
    assert setting == {name: defaults[name] for name in setting}
    left_out = defaults.keys() - setting.keys() - main.RUNTIME_FLAGS
    assert not any(defaults[name] for name in left_out)  # off


def test_help_needs_neither_pytorch_nor_main():
    code = "import sys, summarize\ntry: summarize.main(['--help'])\nfinally: print({'torch', 'main'} & {*sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(RESULTS.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("usage")
    assert done.stdout.endswith("set()\n")


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
    assert "- runs: 6, last epoch, made on H200, torch 2.8, commit 0123456" in out
    assert cells(summary("--best"), row="8")[0]["top-1 err (%)"].startswith("20.50 ± 1.00 ")


def test_classifiers_have_their_right_names(tmp_path, summary):
    val = {"exit 1": metrics(40.0), "exit 3": metrics(21.0), "ensemble": metrics(19.0)}
    calibrated = {"exit 1": {"ece": 1.25}, "exit 3": {"ece": 1.5}, "final": {"ece": 2.0}}
    block = {"epoch": 299, "temperatures": {}, "metrics": {"final": metrics(20.0), **val}, "calibrated": calibrated}
    data = images_record(train_and_val="4d", test="3c")
    make_finished_run(tmp_path, "a", 90.0, results={"test": {"last": block}}, data=data)
    (row,) = cells(summary("--table", "2"), row="2")
    assert (row["final err (%)"], row["ensemble err (%)"]) == ("20.00 (20.24, -0.24)", "19.00 (20.32, -1.32)")
    # exchanged in the paper
    assert (row["exit 3 err (%)"], row["exit 1 err (%)"]) == ("21.00 (21.08, -0.08)", "40.00 (32.10, +7.90)")
    rows = [(row["classifier"], row["ECE after T (%)"]) for row in cells(summary("--all_classifiers"))]
    assert rows == [("exit 1", "1.25"), ("exit 3", "1.50"), ("final", "2.00"), ("ensemble", "—")]


COMPARABLE = {"precision": "bf16", "DML_as_published": True}
OTHER = {"width": 8, "alpha": 0.2, "lr": 0.10000004, "lr_decay_schedule": [15, 23], "future_flag": 1}


@pytest.mark.parametrize(("flag", "value"), [*COMPARABLE.items(), *OTHER.items()])
def test_runs_with_different_flags_are_never_averaged(flag, value, tmp_path, summary):
    make_finished_run(tmp_path, "a1", 20.0, seed=1)
    make_finished_run(tmp_path, "b1", 30.0, seed=2, **{flag: value})
    published = " (20.03, +9.97)" if flag in COMPARABLE else ""
    top1 = {row["methods"]: row["top-1 err (%)"] for row in cells(summary(), row="8")}
    assert top1 == {"PSKD+BYOT+DML": "20.00 (20.03, -0.03)", f"PSKD+BYOT+DML, {flag} {value}": f"30.00{published}"}


def test_the_studys_settings_have_their_names(tmp_path, summary):
    for name, flags in paper.SETTINGS.items():
        make_finished_run(tmp_path, name, 20.0, **{**NO_METHOD, **flags})
    make_finished_run(tmp_path, "other", 20.0, **{**NO_METHOD, "DML": True, "label_smoothing": 0.1})
    tables = summary("--metrics", "top1_error")
    labels = re.findall(r"resnet18 \| ([^|]+) \|", tables)
    assert set(labels) == {*(name.replace("_", " ") for name in paper.SETTINGS), "DML, label_smoothing 0.1"}


def test_runs_of_other_machines_and_versions_are_one_group(tmp_path, summary):
    make_finished_run(tmp_path, "a1", 20.0, 1, results={"hours": 5.0})
    make_finished_run(tmp_path, "a2", 21.0, 2, label_smoothing=0.0, val_split=None, starts=[start_record("L4")])
    make_finished_run(tmp_path, "b1", 20.0, PSKD=False, results={"hours": 5.0})
    out = summary()
    (row,) = cells(out, row="8")
    assert (row["seeds"], row["top-1 err (%)"]) == ("1 2", "20.50 ± 0.71 (20.03, +0.47)")
    assert row["hours"] == "—"  # one of the two lacks them
    assert row["s/epoch"] == "—"  # seconds on two machines have no mean
    assert "made on H200, torch 2.8, commit 0123456; L4, torch 2.8, commit 0123456" in out


def test_a_start_that_trained_no_epoch_leaves_the_times(tmp_path, summary):
    late = {**start_record("L4"), "epoch": 300}
    make_finished_run(tmp_path, "a", 20.0, 1, starts=[start_record(), late])
    make_finished_run(tmp_path, "b", 21.0, 2)
    assert cells(summary(), row="8")[0]["s/epoch"].startswith("10.0 ± 0.0")


OTHER_DATA = [
    ({"classifier_type": "resnet34"}, "cifar100"),  # another network than the paper's
    ({"data_type": "folder"}, "folder"),
    ({"classes": 20}, "cifar100, classes 20"),
    ({"limit_train": 4000}, "cifar100, limit_train 4000"),
    ({"data_type": "folder", "val_split": 0.1}, "folder, no test metrics: held-out images"),
]


def test_other_runs_never_stand_in_the_papers_tables(tmp_path, summary):
    make_finished_run(tmp_path, "paper", 20.0)
    for i, (config, _) in enumerate(OTHER_DATA):
        make_finished_run(tmp_path, str(i), 30.0 + i, **config)
    out = summary()
    assert len(cells(out)) == 1  # Table 1 has the one run
    tables = dict(re.findall(r"### (.*)\n\n(?:.*\n){2}((?:\|.*\n)+)", out))
    for i, (_, name) in enumerate(OTHER_DATA):
        table = tables[f"Other runs: {name}"]
        assert table.count("| resnet") == 1
        assert f"| {30 + i}.00 |" in table


def test_another_test_split_is_another_data_set(tmp_path, summary):
    make_finished_run(tmp_path, "a1", 20.0, 1)
    make_finished_run(tmp_path, "a2", 30.0, 2, data=images_record(val="9c"))
    make_finished_run(tmp_path, "a3", 40.0, 3, data={"mean": [0.5], "std": [0.25]})  # of an older run
    out = summary("--table", "1")
    for images in ("100, digest 2b2b2b2b2b2b", "100, digest 9c9c9c9c9c9c", "not recorded"):
        assert f"### Table 1: networks and losses, cifar100 (test images {images})" in out
    assert out.count("| 8 | resnet18 |") == 3
    assert "±" not in out


def test_other_training_images_are_another_setting(tmp_path, summary):
    make_finished_run(tmp_path, "a1", 20.0, 1)
    make_finished_run(tmp_path, "a2", 30.0, 1, data=images_record(train="9c"))  # no duplicate
    make_finished_run(tmp_path, "b", 25.0, 1, PSKD=False)
    out = summary()
    labels = [row["methods"] for row in cells(out, n="1")]
    assert labels == ["BYOT+DML", *(f"PSKD+BYOT+DML, train images 100, digest {digest * 6}" for digest in ("1a", "9c"))]
    assert "left out" not in out


def test_held_out_images_of_other_seeds_are_one_setting_and_of_other_images_are_not(tmp_path, summary):
    for seed, images in ((1, "4d"), (2, "4d"), (3, "5e")):
        data = images_record(train=f"{seed}a", val=f"{seed}b", test="3c", train_and_val=images)
        make_finished_run(tmp_path, str(seed), 90.0, seed, val_split=0.1, results={"test": TEST_BLOCK}, data=data)
    rows = [(row["seeds"], row["top-1 err (%)"]) for row in cells(summary(), row="8")]
    assert rows == [("1 2", "20.00 ± 0.00"), ("3", "20.00")]


def test_processes_and_allowed_changes_are_other_settings(tmp_path, summary):
    change = {"epoch": 3, "name": "end_epoch", "before": 150, "after": 300}
    make_finished_run(tmp_path, "a1", 20.0, 1)
    make_finished_run(tmp_path, "a2", 30.0, 2, starts=[start_record(processes=2)])
    make_finished_run(tmp_path, "a3", 40.0, 3, changes=[change])
    make_finished_run(tmp_path, "a4", 50.0, 4, starts=[start_record(), start_record(processes=4)])
    out = summary()
    changed = "changed end_epoch 150 -> 300 after epoch 3"
    top1 = {row["methods"].partition(", ")[2]: row["top-1 err (%)"] for row in cells(out, row="8")}
    assert top1 == {"": "20.00 (20.03, -0.03)", "processes 2": "30.00", changed: "40.00", "processes 1 and 4": "50.00"}


def test_runs_behind_symbolic_links_are_found_once(tmp_path, summary):
    make_finished_run(tmp_path / "elsewhere", "a", 20.0)
    experiments = tmp_path / "experiments"
    experiments.mkdir()
    for name in ("one", "two"):
        (experiments / name).symlink_to(tmp_path / "elsewhere" / "a")
    (experiments / "circle").symlink_to(experiments)
    out = summary(path=experiments)
    assert cells(out, row="8")[0]["n"] == "1"
    assert "left out" not in out


def test_unusable_runs_are_named_and_not_averaged(tmp_path, summary):
    make_finished_run(tmp_path, "a1", 20.0, seed=1)
    make_finished_run(tmp_path, "again", 90.0, seed=1)
    make_finished_run(tmp_path, "cut", 90.0, seed=2, results={"status": "interrupted"})
    make_finished_run(tmp_path, "young", 90.0, seed=5)
    (tmp_path / "young" / "results.json").unlink()
    os.mkfifo(tmp_path / "young" / "results.json")
    out = summary(str(tmp_path / "absent"))
    (row,) = cells(out, row="8")
    assert (row["seeds"], row["top-1 err (%)"]) == ("1", "20.00 (20.03, -0.03)")
    reasons = dict(re.findall(r"- left out: \S+/(\w+) \((.{20})", out))
    assert reasons["again"] == "the same flags and s"
    assert reasons["cut"] == "interrupted, 300 of "
    assert set(reasons) == {"absent", "again", "cut", "young"}


DAMAGE = {
    "list": ("results.json", "{", '[], {"was": '),
    "bare": ("results.json", '"last": {', '"was": {'),
    "text": ("results.json", '"nll": 0.5', '"nll": "low"'),
    "nan": ("results.json", '"nll": 0.5', '"nll": NaN'),
    "large": ("results.json", '"nll": 0.5', '"nll": 1e308'),
    "time": ("results.json", '"seconds_per_epoch": 10.0', '"seconds_per_epoch": null'),
    "seed": ("config.json", '"seed": 1', '"seed": "1"'),
    "starts": ("config.json", '"starts": [', '"starts": null, "was": ['),
    "changes": ("config.json", '"changes": [', '"changes": [5'),
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


def test_without_a_finished_run_the_error_says_why(tmp_path, refused):
    make_finished_run(tmp_path, "cut", 20.0, results={"status": "interrupted"})
    error = refused(summarize.main, [str(tmp_path)])
    assert re.search(r"no finished run in .*; \S+/cut \(interrupted, ", error)


def test_columns_that_no_classifier_has_are_an_error(refused):
    words = [str(RESULTS / "cifar100_width16.jsonl"), "--all_classifiers", "--metrics", "hours"]
    assert refused(summarize.main, words) == "error: no classifier has these metrics\n"


def test_published_rows_are_the_papers():
    first = paper.table_rows(1)
    combinations = [[], ["BYOT"], ["DML"], ["PSKD"], ["PSKD", "BYOT"], ["PSKD", "DML"], ["BYOT", "DML"]]
    assert [row["methods"] for row in first] == 3 * [*combinations, ["PSKD", "BYOT", "DML"]]
    assert (first[23]["aurc"], first[7]["ece"]) == (45.71, 4.15)


def test_a_rerun_that_took_another_time_is_the_same_run(tmp_path, summary):
    for name, seconds in (("a", 10.0), ("b", 12.0)):
        make_finished_run(tmp_path, name, 20.0, results={"seconds_per_epoch": seconds})
    out = summary()
    assert "the same flags and seed" in out
    assert "other numbers" not in out


def test_export_keeps_a_second_run_of_one_seed_that_has_other_numbers(tmp_path, capsys):
    file = tmp_path / "runs.jsonl"
    for name, top1 in (("a", 30.0), ("b", 31.0)):
        make_finished_run(tmp_path / name, name, top1)
        assert summarize.main([str(tmp_path / name), "--export", str(tmp_path / f"{name}.jsonl")]) == 0
    file.write_text("".join((tmp_path / f"{name}.jsonl").read_text() for name in "ab"))
    before = file.read_text()
    assert summarize.main([str(file), "--export", str(file)]) == 1
    assert "with other numbers" in capsys.readouterr().err
    assert file.read_text() == before
