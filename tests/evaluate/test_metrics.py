import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.evaluate.metrics import avg_at_k, maj_at_k, mean_interval, pass_at_k

rows = st.lists(st.booleans(), min_size=1, max_size=7)


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=4))
def test_avg_is_the_mean_over_problems_of_their_means(correct):
    assert avg_at_k(correct).value == pytest.approx(np.mean([np.mean(row) for row in correct]))


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=4), st.integers(1, 7))
def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples(correct, k):
    """Against the definition: draw k of the n samples in every way there is."""
    chances = [np.mean([any(chosen) for chosen in itertools.combinations(row, k)]) for row in correct if len(row) >= k]
    value = pass_at_k(correct, k).value
    assert math.isnan(value) if not chances else value == pytest.approx(np.mean(chances))


def test_pass_at_k_known_values():
    assert pass_at_k([[True, False, False, False]], 2).value == pytest.approx(0.5)
    assert pass_at_k([[True] * 4, [False] * 4], 4).value == pytest.approx(0.5)
    with pytest.raises(ValueError, match="k >= 1"):
        pass_at_k([[True]], 0)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7))
def test_maj_is_the_chance_of_a_random_draw_among_the_most_voted(votes):
    """Against the definition: every order of breaking ties, equally likely."""
    cast = [vote for vote in votes if vote is not None]
    most = max((cast.count(vote) for vote in cast), default=0)
    winners = sorted({vote for vote in cast if cast.count(vote) == most})
    expected = np.mean([winner == "a" for winner in winners]) if winners else 0.0
    assert maj_at_k([votes], [[vote == "a" for vote in votes]]).value == pytest.approx(expected)


def test_maj_known_values():
    assert maj_at_k([["5", "5", "6"], ["7", "8"]], [[True, True, False], [False, True]]).value == pytest.approx(0.75)
    assert maj_at_k([[], ["1"]], [[], [True]]).value == 1.0, "a problem without samples does not count"


def test_nothing_to_average_is_nan():
    assert all(math.isnan(value) for value in (avg_at_k([[]]).value, pass_at_k([[True]], 2).low, maj_at_k([], []).high))


def test_interval_of_independent_trials_is_wilsons():
    """Of n problems with one sample each n* is n−1; Wilson's bounds solve (p − b)² = t² b(1 − b) / n*."""
    values = [1.0] * 7 + [0.0] * 3
    estimate = mean_interval(values)
    t = 2.262157162740992  # 97.5 % point for 9 degrees of freedom
    assert estimate.low < estimate.value == 0.7 < estimate.high
    for bound in (estimate.low, estimate.high):
        assert (0.7 - bound) ** 2 == pytest.approx(t**2 * bound * (1 - bound) / 9)


def test_interval_shrinks_with_the_spread_over_problems():
    close, far = mean_interval([0.4, 0.5, 0.6, 0.5] * 8), mean_interval([0.0, 1.0, 0.0, 1.0] * 8)
    assert close.value == far.value and close.high - close.low < 0.2 * (far.high - far.low)
    plain = 2.0395 * np.std([0.4, 0.5, 0.6, 0.5] * 8, ddof=1) / math.sqrt(32)
    assert close.high - close.value == pytest.approx(plain, rel=0.01), "in the middle it is p ± t·s/√n"


def test_unanimous_problems_have_a_bound_and_no_certainty():
    t = 2.0017174830120923  # 97.5 % point for 58 degrees of freedom
    assert mean_interval([1.0] * 59).low == pytest.approx(1 / (1 + t**2 / 59))
    assert mean_interval([0.0] * 59).high == pytest.approx(1 - 1 / (1 + t**2 / 59))
    assert mean_interval([1.0] * 59).high == pytest.approx(1.0) and mean_interval([0.0] * 59).low == pytest.approx(0.0)
    assert (mean_interval([0.5]).low, mean_interval([0.5]).high) == (0.0, 1.0)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.125, 0.5, 1.0]), min_size=1, max_size=20))
def test_interval_holds_the_value_and_lies_between_0_and_1(values):
    estimate = mean_interval(values)
    assert 0.0 <= estimate.low <= estimate.value + 1e-12
    assert estimate.value - 1e-12 <= estimate.high <= 1.0


@pytest.mark.parametrize("chance", [0.02, 0.05, 0.3, 0.9])
def test_the_interval_holds_the_truth_about_95_times_of_100(chance):
    """64 problems of spread difficulty, 8 samples each, as an in-loop evaluation has them."""
    draw = np.random.default_rng(0)
    trials, held = 1000, 0
    for _ in range(trials):
        difficulty = draw.beta(4 * chance, 4 * (1 - chance), 64)
        estimate = mean_interval(draw.binomial(8, difficulty) / 8)
        held += estimate.low <= chance <= estimate.high
    assert 0.91 <= held / trials <= 0.985
