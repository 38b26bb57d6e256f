import dataclasses
import json
import pathlib

import pytest

from jaxrl.observe.report import SUMMARY_FILE, Comparison, Estimate, Report, final_table, write_summary
from jaxrl.observe.terminal import plain_text


@pytest.fixture
def report() -> Report:
    return Report(
        title="quickstart",
        run_folder="runs/quickstart",
        steps=100,
        comparisons=(
            Comparison("pass@1, sampled", Estimate(0.48, 0.45, 0.51), Estimate(0.9, 0.87, 0.92)),
            Comparison("pass@8", None, Estimate(0.99, 0.97, 1.0)),
        ),
        tool_error_share_in_correct=0.043,
        tokens_per_second=1234.4,
        seconds_by_phase={"update": 120.0, "rollout": 300.0},
        export_path="runs/quickstart/export",
        next_command="jaxrl rollout quickstart",
    )


def test_the_summary_holds_what_is_promised(tmp_path: pathlib.Path, report: Report) -> None:
    values = json.loads(write_summary(tmp_path, report).read_text())
    assert values["pass_rate_before"] == 0.48
    assert values["pass_rate_after"] == 0.9
    assert values["tool_error_share_in_correct"] == 0.043
    assert values["tokens_per_second"] == 1234.4
    assert values["seconds_by_phase"] == {"update": 120.0, "rollout": 300.0}
    assert values["seconds"] == 420.0
    assert values["evaluations"][1] == {
        "label": "pass@8",
        "before": None,
        "after": {"value": 0.99, "low": 0.97, "high": 1.0},
    }
    assert [path.name for path in tmp_path.iterdir()] == [SUMMARY_FILE]


def test_the_table_names_everything_a_user_wants_next(report: Report) -> None:
    text = plain_text(final_table(report))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "pass@1, sampled 48.0% (45.0 to 51.0) 90.0% (87.0 to 92.0) +42.0 points" in lines
    assert "pass@8 - 99.0% (97.0 to 100.0) -" in lines
    assert "failed tool calls in correct episodes 4.3%" in lines
    assert "response tokens a second 1,234" in lines
    assert "time 7:00: rollout 5:00 (71%), update 2:00 (29%)" in lines
    assert "exported model runs/quickstart/export" in lines
    assert "try next jaxrl rollout quickstart" in lines
    assert "left out" not in text and "nothing to train on" not in text and "alarm" not in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_what_went_wrong_is_shown(report: Report) -> None:
    troubled = dataclasses.replace(
        report, left_out=3, skipped_steps=2, alarms=("pass rate fell",), tool_error_share_in_correct=None
    )
    lines = [" ".join(line.split()) for line in plain_text(final_table(troubled)).splitlines()]
    assert "episodes left out (our faults) 3" in lines
    assert "steps with nothing to train on 2" in lines
    assert "alarm pass rate fell" in lines
    assert "failed tool calls in correct episodes no calls" in lines


def test_a_run_that_measured_nothing_still_reports(tmp_path: pathlib.Path, report: Report) -> None:
    empty = dataclasses.replace(report, comparisons=(), seconds_by_phase={})
    assert json.loads(write_summary(tmp_path, empty).read_text())["pass_rate_after"] is None
    assert "before" not in plain_text(final_table(empty))
