"""scripts/intervals.py: quantiles of Student's t, and differences paired by seed as summarize.py prints them."""

import intervals
import pytest
import summarize
from helpers import NO_METHOD, ONLY_BYOT, TEST_BLOCK, cells, images_record, make_finished_run, metrics, start_record

PRINTED = [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 10, 2.228), (0.95, 120, 1.980), (0.99, 10, 3.169)]


@pytest.mark.parametrize("level, df, printed", PRINTED)
def test_student_quantiles_are_those_of_printed_tables(level, df, printed):
    assert intervals.student_quantile(level, df) == pytest.approx(printed, abs=5e-4)


def test_student_quantile_between_whole_degrees_of_freedom():
    five = intervals.student_quantile(0.95, 5)
    between = intervals.student_quantile(0.95, 5.5)
    assert five > between > 2.447  # of 6


ONLY_DML = {"PSKD": False, "BYOT": False}


@pytest.fixture
def pairs(tmp_path, summary):
    """The differences from the baseline with two seeds, BYOT's -1 and -2, DML's -5 and -5, and a BYOT without one."""
    for seed, base, byot, dml in ((1, 30.0, 29.0, 25.0), (2, 32.0, 30.0, 27.0)):
        make_finished_run(tmp_path, f"base{seed}", base, seed, **NO_METHOD)
        make_finished_run(tmp_path, f"byot{seed}", byot, seed, **ONLY_BYOT)
        make_finished_run(tmp_path, f"dml{seed}", dml, seed, **ONLY_DML)
    make_finished_run(tmp_path, "byot3", 0.0, 3, **ONLY_BYOT)
    return summary("--pairs", "baseline")


def test_differences_are_paired_by_seed(pairs):
    byot, _ = cells(pairs)
    assert byot["methods"] == "BYOT"
    assert byot["n"] == "2"
    assert byot["seeds"] == "1 2"
    assert "- not paired: BYOT, seed 3 (no baseline of its network, images and seed)" in pairs


def test_intervals_pool_the_variance_of_all_settings(pairs):
    """Variances 1/2 and 0, pooled 1/4, with 4 x 2 / 5 x (2 - 1) = 1.6 degrees of freedom."""
    half = intervals.student_quantile(0.95, 1.6) * (0.25 / 2) ** 0.5
    byot, dml = cells(pairs)
    assert byot["top-1 err (%)"] == f"-1.50 [{-1.5 - half:+.2f}, {-1.5 + half:+.2f}]"
    assert dml["top-1 err (%)"] == f"-5.00 [{-5 - half:+.2f}, {-5 + half:+.2f}]*"  # leaves out 0
    assert "(settings: 2, degrees of freedom: 1.6)" in pairs


def test_unpooled_intervals_rest_on_each_settings_own_seeds(pairs, summary):
    """BYOT's differences are -1 and -2: deviation of the mean 1/2, one degree of freedom; DML's are equal."""
    out = summary("--pairs", "baseline", "--unpooled")
    half = intervals.student_quantile(0.95, 1) / 2
    byot, dml = cells(out)
    assert byot["top-1 err (%)"] == f"-1.50 [{-1.5 - half:+.2f}, {-1.5 + half:+.2f}]"
    assert dml["top-1 err (%)"] == "-5.00 [-5.00, -5.00]*"
    assert "is of each setting's own seeds (degrees of freedom: n - 1)" in out


def test_unpooled_without_pairs_is_refused(pairs, summary, capsys):
    with pytest.raises(SystemExit):
        summary("--unpooled")
    assert "argument --unpooled: has no effect without --pairs" in capsys.readouterr().err


def test_pairs_with_an_unknown_setting_are_refused(pairs, tmp_path, refused):
    assert "--pairs base: give one of baseline; BYOT; DML" in refused(
        summarize.main, [str(tmp_path), "--pairs", "base"]
    )


def test_a_setting_that_nothing_pairs_with_is_named(tmp_path, refused):
    make_finished_run(tmp_path, "a", 30.0, seed=1, **NO_METHOD)
    make_finished_run(tmp_path, "b", 30.0, seed=2)
    words = [str(tmp_path), "--pairs", "baseline"]
    assert "no run of another setting has its network, images and seed" in refused(summarize.main, words)


def test_one_seed_has_a_difference_and_no_interval(tmp_path, summary):
    make_finished_run(tmp_path, "base", 30.0, **NO_METHOD)
    make_finished_run(tmp_path, "byot", 29.0, **ONLY_BYOT)
    out = summary("--pairs", "baseline")
    (byot,) = cells(out)
    assert byot["top-1 err (%)"] == "-1.00"
    assert "interval" not in out


def test_runs_on_other_held_out_images_are_not_paired(tmp_path, summary):
    results = {"test": TEST_BLOCK}
    for name, methods, val in (("base", NO_METHOD, "2b"), ("byot", ONLY_BYOT, "2b"), ("all", {}, "9c")):
        images = images_record(val=val, test="3c")
        make_finished_run(tmp_path, name, 90.0, **methods, val_split=0.1, results=results, data=images)
    out = summary("--pairs", "baseline")
    (byot,) = cells(out)
    assert byot["methods"] == "BYOT"
    assert "- not paired: PSKD+BYOT+DML, seed 1 (no baseline of its network, images and seed)" in out


def test_times_of_different_machines_are_not_paired(tmp_path, summary):
    for name, methods, device in (("base", NO_METHOD, "H200"), ("byot", ONLY_BYOT, "H200"), ("all", {}, "L4")):
        make_finished_run(tmp_path, name, 20.0, **methods, results={"hours": 5.0}, starts=[start_record(device)])
    rows = cells(summary("--pairs", "baseline", "--metrics", "top1_error", "hours"))
    assert {row["methods"]: row["hours"] for row in rows} == {"BYOT": "+0.00", "PSKD+BYOT+DML": "—"}


def test_early_exit_is_compared_with_the_bases_plain_network(tmp_path, summary):
    test = {"epoch": 299, "temperatures": {}, "metrics": {"final": metrics(20.0)}}
    data = images_record(test="3c")
    make_finished_run(tmp_path, "base", 90.0, **NO_METHOD, results={"test": {"last": test}}, data=data)
    chosen = {"multiply_adds": 30, "accuracy": 79.0}
    test = test | {"early_exit": {"backbone_multiply_adds": 40, "chosen": chosen}}
    make_finished_run(tmp_path, "byot", 90.0, **ONLY_BYOT, results={"test": {"last": test}}, data=data)
    (row,) = cells(summary("--pairs", "baseline", "--metrics", "early_exit_error", "early_exit"))
    assert (row["early exit err (%)"], row["early exit (% MACs)"]) == ("+1.00", "-25.0")
