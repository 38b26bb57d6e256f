"""Kernels tried before a run: right ones pass, and what is wrong with others is said."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxrl_kernels import segment_ends, trial
from jaxrl_kernels.interval_attention import backends as interval
from jaxrl_kernels.paged_attention import backends as paged
from jaxrl_kernels.paged_attention.blocks import Shape

SCORES = trial.Scores(scale=0.5, soft_cap=20.0, windows=(0, 40))
ROWS = interval.Shape(rows=4, queries=4096, tokens=4096, groups=2, head_width=16, dtype="bfloat16")
PAGES = Shape(64, 256, 4, 2, 16, 16, 512, "bfloat16", "bfloat16")
DECODE = dataclasses.replace(PAGES, count=1)
Attend = Callable[..., tuple[jax.Array, jax.Array]]
TOKENS = 256


def with_row(monkeypatch: pytest.MonkeyPatch, table: dict[str, Any], attend: Attend) -> None:
    """As if the kernels for TPUs computed this."""
    row = dataclasses.replace(table["xla"], attend=attend)
    monkeypatch.setitem(table, "tpu", dataclasses.replace(row, devices=("",)))


def test_right_kernels_pass() -> None:
    on_a_ring = dataclasses.replace(ROWS, behind=True)
    found = trial.try_interval_attention("tpu_interpreted", on_a_ring, SCORES, by_position=True, tokens=TOKENS)
    assert found == ""
    assert trial.try_paged_attention("tpu_interpreted", PAGES, SCORES) == ""
    assert trial.try_group_decode("tpu_interpreted", DECODE, 4, SCORES) == ""


@pytest.mark.parametrize("page_dtype", ["int8", "float8_e4m3fn"])
def test_narrow_pages_pass(page_dtype: str) -> None:
    assert trial.try_paged_attention("xla", dataclasses.replace(PAGES, page_dtype=page_dtype)) == ""


def a_wrong_gradient(q: jax.Array, k: jax.Array, *others: Any) -> tuple[jax.Array, jax.Array]:
    return interval.BACKENDS["xla"].attend(q, jax.lax.stop_gradient(k), *others)


def segments_alone(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, *others: Any) -> tuple:
    """As if whatever ends elsewhere than its neighbour were a segment of its own."""
    number = jnp.cumsum(jnp.diff(end, axis=1, prepend=0) != 0, axis=1)
    return interval.BACKENDS["xla"].attend(q, k, v, segment_ends(jnp.where(end > 0, number, 0)), *others)


def no_window(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, window: jax.Array, *others: Any) -> tuple:
    return interval.BACKENDS["xla"].attend(q, k, v, end, 0 * window, *others)


def two_per_cent_more(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    output, log_total = interval.BACKENDS["xla"].attend(*arguments)
    return 1.02 * output, log_total


def the_usual_scale(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    *before, _, soft_cap, places, plan = arguments
    return interval.BACKENDS["xla"].attend(*before, ROWS.head_width**-0.5, soft_cap, places, plan)


def a_driver_that_fails(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    raise jax.errors.JaxRuntimeError("INTERNAL: no such instruction\nand much more")


@pytest.mark.parametrize(
    ("attend", "said"),
    [
        (a_wrong_gradient, r"its gradient of keys is off by \S+ where \S+ is allowed"),
        (segments_alone, "its output is off by"),
        (no_window, "its output is off by"),
        (two_per_cent_more, "its output is off by"),
        (the_usual_scale, "its output is off by"),
        (a_driver_that_fails, "it raised JaxRuntimeError: INTERNAL: no such instruction$"),
    ],
)
def test_what_is_wrong_is_said(attend: Attend, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_row(monkeypatch, interval.BACKENDS, attend)
    scores = dataclasses.replace(SCORES, windows=(0, 400))
    found = trial.try_interval_attention("tpu", dataclasses.replace(ROWS, dtype="float32"), scores, tokens=TOKENS)
    assert re.match(said, found)


def no_gradient_of_the_log_sum_exp(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    output, log_total = interval.BACKENDS["xla"].attend(*arguments)
    return output, jax.lax.stop_gradient(log_total)


def a_larger_log_sum_exp(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    output, log_total = interval.BACKENDS["xla"].attend(*arguments)
    return output, log_total + 0.1


def windows_by_index(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    *others, _, plan = arguments
    return interval.BACKENDS["xla"].attend(*others, None, plan)


@pytest.mark.parametrize(
    ("attend", "behind", "said"),
    [
        (no_gradient_of_the_log_sum_exp, True, "its gradient of queries is off by"),
        (a_larger_log_sum_exp, True, "its log-sum-exp is off by"),
        (windows_by_index, False, "its output is off by"),
    ],
)
def test_what_only_rings_or_trees_need_is_tried_for_them(
    attend: Attend, behind: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_row(monkeypatch, interval.BACKENDS, attend)
    shape = dataclasses.replace(ROWS, dtype="float32", behind=behind)
    assert trial.try_interval_attention("tpu", shape, SCORES, by_position=True, tokens=TOKENS).startswith(said)
    simple = dataclasses.replace(shape, behind=False)
    assert trial.try_interval_attention("tpu", simple, SCORES, tokens=TOKENS) == ""


def test_pages_out_of_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: jax.Array, keys: jax.Array, values: jax.Array, table: jax.Array, *others: Any) -> tuple:
        return paged.BACKENDS["xla"].attend(q, keys, values, table.at[:, 0].set(table[:, 1]), *others)

    with_row(monkeypatch, paged.BACKENDS, attend)
    assert trial.try_paged_attention("tpu", PAGES).startswith("its output is off by")


def test_scores_of_the_model_are_tried_on_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(*arguments: Any) -> tuple:
        *arrays, options, lists = arguments
        usual = dataclasses.replace(options, scale=DECODE.head_width**-0.5)
        return paged.BACKENDS["xla"].attend(*arrays, usual, lists)

    with_row(monkeypatch, paged.BACKENDS, attend)
    for found in (trial.try_paged_attention("tpu", DECODE, SCORES), trial.try_group_decode("tpu", DECODE, 4, SCORES)):
        assert found.startswith("its output is off by")
    assert trial.try_paged_attention("tpu", DECODE) == ""


def test_a_log_sum_exp_is_tried_where_rows_decode_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: jax.Array, *others: Any) -> tuple:
        output, log_total = paged.BACKENDS["xla"].attend(q, *others)
        return output, log_total if log_total is None or q.shape[1] == 1 else log_total + 0.1

    with_row(monkeypatch, paged.BACKENDS, attend)
    assert trial.try_paged_attention("tpu", PAGES) == trial.try_paged_attention("tpu", DECODE) == ""
    assert trial.try_group_decode("tpu", DECODE, 4).startswith("its output is off by")
