"""A run does not start on kernels that compute something else than plain JAX on the devices at hand."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import pytest

from jaxrl.config import Config, ConfigError
from jaxrl.train.run import RunFolder
from jaxrl.train.session import open_session
from jaxrl_kernels.interval_attention import backends as interval
from jaxrl_kernels.paged_attention import backends as paged


def off_by_one_per_cent(attend: Callable[..., Any]) -> Callable[..., Any]:
    def other(q: jax.Array, *arguments: Any) -> Any:
        return attend(1.01 * q, *arguments)

    return other


def off_where_parts_are_joined(attend: Callable[..., Any]) -> Callable[..., Any]:
    def other(*arguments: Any) -> Any:
        output, log_total = attend(*arguments)
        return output, log_total if log_total is None else 1.01 * log_total

    return other


@pytest.mark.parametrize(
    ("table", "wrong", "what"),
    [
        (interval.BACKENDS, off_by_one_per_cent, "packed rows"),
        (paged.BACKENDS, off_by_one_per_cent, "KV pages"),
        (paged.BACKENDS, off_where_parts_are_joined, "KV pages that rows share"),
    ],
)
def test_kernels_that_compute_something_else_are_refused(
    table: dict[str, Any],
    wrong: Callable[..., Any],
    what: str,
    tiny_config: Config,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for every in (interval.BACKENDS, paged.BACKENDS):
        monkeypatch.setitem(every, "other", dataclasses.replace(every["xla"], plain=False))
    changes = {"attend": wrong(table["xla"].attend)} | ({"skips_empty": True} if table is paged.BACKENDS else {})
    monkeypatch.setitem(table, "other", dataclasses.replace(table["other"], **changes))
    config = dataclasses.replace(tiny_config, model=dataclasses.replace(tiny_config.model, attention="other"))
    message = f"attention over {what} by 'other' is not that of plain JAX on this cpu: its output is off by .*='xla'"
    with pytest.raises(ConfigError, match=message):
        open_session(config, RunFolder(tmp_path))
