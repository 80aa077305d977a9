"""README's table of the study is what its script prints from the study's file."""

import json

from conftest import ROOT
from study_table import SETTINGS, STUDY, published, study_table

LINES = [json.loads(line) for line in STUDY.read_text().splitlines()]


def test_readme_holds_the_table_word_for_word():
    readme = (ROOT / "README.md").read_text()
    _, _, rest = readme.partition("<!-- printed by scripts/study_table.py -->\n")
    table, _, _ = rest.partition("\n<!-- end -->")
    assert table == study_table(STUDY)


def test_every_setting_of_the_study_has_a_row():
    lines = study_table(STUDY).splitlines()
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
