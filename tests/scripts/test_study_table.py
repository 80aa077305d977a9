"""README's table of the study is what its script prints from the study's file."""

import json

import pytest
import study_table as script
from conftest import ROOT
from study_table import SETTINGS, STUDY, published, study_table

LINES = [json.loads(line) for line in STUDY.read_text().splitlines()]


def test_readme_holds_the_table_word_for_word():
    readme = (ROOT / "README.md").read_text()
    _, _, rest = readme.partition("<!-- printed by scripts/study_table.py -->\n")
    table, _, _ = rest.partition("\n<!-- end -->")
    assert table == study_table([STUDY])


def test_every_setting_of_the_study_has_a_row():
    lines = study_table([STUDY]).splitlines()
    first_cells = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    assert first_cells == list(SETTINGS.values())


def test_published_numbers_are_table_1s():
    assert published("PSKD+BYOT+DML") == "20.03, 4.15"
    assert published("baseline") == "21.41, 5.14"
    assert published("baseline, label_smoothing 0.1") == "-"


def test_the_file_has_three_seeds_of_all_settings():
    names = [run["name"] for run in LINES]
    assert len(set(names)) == len(names) == 3 * len(SETTINGS)
    settings = {name.rpartition("_seed")[0] for name in names}
    assert set(names) == {f"{setting}_seed{seed}" for setting in settings for seed in (1, 2, 3)}


def test_each_run_says_its_images_commit_and_machine():
    images, commits = set(), set()
    for run in LINES:
        config = run["config"]
        images.add((config["seed"], json.dumps(config["data"])))
        commits.add(config["git_commit"][:7])
        assert config["data"]["splits"]["test"]["images"] == 2000
        assert config["device_name"]
    assert len(images) == 3  # the seed draws the held-out images
    assert commits == {"3f04f64"}


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(runs) -> the error that the script prints for a study file of them."""

    def call(runs):
        file = tmp_path / "study.jsonl"
        file.write_text("".join(json.dumps(run) + "\n" for run in runs))
        assert script.main([str(file)]) == 1
        out, err = capsys.readouterr()
        assert not out
        return err

    return call


def with_config(run, **changes):
    return {**run, "config": {**run["config"], **changes}}


def test_a_file_without_runs_is_refused(refused):
    assert "no run in " in refused([])


def test_a_setting_that_is_none_of_the_tables_is_refused(refused):
    error = refused([*LINES, with_config(LINES[0], width=64)])
    assert "no setting of this table: baseline, " in error


def test_a_second_network_is_refused(refused):
    assert "several networks" in refused([*LINES, with_config(LINES[0], classifier_type="resnet50")])


def test_runs_that_cannot_be_paired_are_refused(refused):
    unpaired = [run for run in LINES if run["name"] != "baseline_seed2"]
    assert "PSKD, seed 2 (no baseline of its network, data and seed)" in refused(unpaired)


def test_a_damaged_run_is_refused(refused):
    assert "study.jsonl:31 " in refused([*LINES, {}])
