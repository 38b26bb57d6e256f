import pytest

from jaxrl.observe import alarms
from jaxrl.observe.alarms import WINDOW, new_alarms, ringing

HEALTHY = {
    "pass_rate": 0.6,
    "calls": 1.2,
    "capped_share": 0.02,
    "repeated_call_share": 0.05,
    "loss": -0.01,
    "grad_norm": 0.4,
}


def history(**changes: float | None) -> list[dict[str, float | None]]:
    return [HEALTHY] * 2 * WINDOW + [HEALTHY | changes] * WINDOW


def test_a_healthy_run_is_silent() -> None:
    assert ringing(history()) == {}
    assert ringing([]) == {}
    assert ringing([HEALTHY]) == {}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("pass_rate_falling", {"pass_rate": 0.3}, "from 60% to 30%"),
        ("tool_calls_vanishing", {"calls": 0.1}, "from 1.20 to 0.10"),
        ("lengths_at_cap", {"capped_share": 0.5}, "50% of the responses"),
        ("calls_repeated", {"repeated_call_share": 0.4}, "40% of the tool calls"),
        ("not_finite", {"loss": float("nan")}, "loss is nan"),
        ("not_finite", {"grad_norm": None}, "grad_norm is not finite"),
    ],
)
def test_each_alarm_names_its_figure_and_only_its_own(name: str, changes: dict, message: str) -> None:
    found = ringing(history(**changes))
    assert list(found) == [name]
    assert message in found[name]


def test_one_bad_step_is_noise_except_where_numbers_end() -> None:
    bad = {"pass_rate": 0.0, "calls": 0.0, "capped_share": 1.0, "repeated_call_share": 1.0}
    assert ringing([HEALTHY] * 30 + [HEALTHY | bad]) == {}
    assert ringing([HEALTHY] * 3 + [HEALTHY | {"loss": None}])


def test_an_alarm_is_new_once() -> None:
    steps = history(capped_share=0.9)
    new = [list(new_alarms(steps[: end + 1])) for end in range(len(steps))]
    assert sum(map(len, new)) == 1
    assert new_alarms([]) == {}


def test_steps_without_a_metric_are_passed_over() -> None:
    mixed = [row for pair in zip(history(calls=0.0), [{"loss": 1.0}] * 3 * WINDOW, strict=True) for row in pair]
    assert alarms.tool_calls_vanishing(mixed)
    assert alarms.pass_rate_falling([{"loss": 1.0}] * 50) is None
