"""README's table of the study is what its script prints from the study's file."""

from conftest import ROOT
from study_table import SETTINGS, STUDY, published, study_table


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
