"""scripts/intervals.py: quantiles of Student's t, and differences paired by seed as summarize.py prints them."""

import intervals
import pytest
from helpers import NO_METHOD, ONLY_BYOT, TEST_BLOCK, cells, images_record, make_finished_run


def test_student_quantiles_are_those_of_printed_tables():
    printed = {1: 12.706, 2: 4.303, 4: 2.776, 10: 2.228, 15: 2.131, 120: 1.980}
    assert {df: round(intervals.student_quantile(0.95, df), 3) for df in printed} == printed
    assert intervals.student_quantile(0.95, 5) > intervals.student_quantile(0.95, 5.5) > 2.447  # of 6
    assert intervals.student_quantile(0.99, 10) == pytest.approx(3.169, abs=5e-4)


def test_differences_are_paired_by_seed(tmp_path, summary):
    for seed, base, byot, dml in ((1, 30.0, 29.0, 25.0), (2, 32.0, 30.0, 27.0)):
        make_finished_run(tmp_path, f"base{seed}", base, seed, **NO_METHOD)
        make_finished_run(tmp_path, f"byot{seed}", byot, seed, **ONLY_BYOT)
        make_finished_run(tmp_path, f"dml{seed}", dml, seed, **{**NO_METHOD, "DML": True})
    make_finished_run(tmp_path, "byot3", 0.0, 3, **ONLY_BYOT)  # no baseline has seed 3
    out = summary("--pairs", "baseline")
    byot, dml = cells(out)
    # BYOT: -1, -2, variance 1/2; DML: -5, -5, variance 0. Pooled 1/4, with 4 x 2 / 5 x (2 - 1) = 1.6 degrees of freedom
    half = intervals.student_quantile(0.95, 1.6) * (0.25 / 2) ** 0.5
    assert (byot["methods"], byot["n"], byot["seeds"]) == ("BYOT", "2", "1 2")
    assert byot["top-1 err (%)"] == f"-1.50 [{-1.5 - half:+.2f}, {-1.5 + half:+.2f}]"
    assert dml["top-1 err (%)"] == f"-5.00 [{-5 - half:+.2f}, {-5 + half:+.2f}]*"  # leaves out 0
    assert "(resnet18, cifar100: 2 settings, 1.6 degrees of freedom)" in out
    assert "- not paired: BYOT, seed 3 (no baseline of its network, data and seed)" in out
    with pytest.raises(SystemExit):
        summary("--pairs", "base")


def test_one_seed_has_a_difference_and_no_interval(tmp_path, summary):
    make_finished_run(tmp_path, "base", 30.0, **NO_METHOD)
    make_finished_run(tmp_path, "byot", 29.0, **ONLY_BYOT)
    out = summary("--pairs", "baseline")
    assert cells(out)[0]["top-1 err (%)"] == "-1.00" and "interval" not in out


def test_runs_on_other_held_out_images_are_not_paired(tmp_path, summary):
    for name, methods, val in (("base", NO_METHOD, "2b"), ("byot", ONLY_BYOT, "2b"), ("all", {}, "9c")):
        data = images_record(val=val, test="3c")
        make_finished_run(tmp_path, name, 90.0, **methods, val_split=0.1, results={"test": TEST_BLOCK}, data=data)
    out = summary("--pairs", "baseline")
    assert [row["methods"] for row in cells(out)] == ["BYOT"]
    assert "- not paired: PSKD+BYOT+DML, seed 1 (its baseline has other val images)" in out
