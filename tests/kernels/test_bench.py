"""The measurements of kernels: sizes of blocks are tried, and the fastest become a line of the table."""

import math

import pytest

from jaxrl.cli import BAD_USAGE, main
from jaxrl_kernels import bench
from jaxrl_kernels.interval_attention.blocks import TABLE


def test_every_candidate_is_run_or_refused_and_the_fastest_becomes_a_line() -> None:
    candidates = ((256, 128), (512, 128))
    results = list(bench.tried(128, 1, backend="tpu_interpreted", widths=(8,), candidates=candidates))
    assert [(result.rows, result.keys) for result in results] == list(candidates)
    assert all(0 < result.seconds < math.inf for result in results)
    fastest = min(results, key=lambda result: result.seconds)
    table = eval("{" + bench.line_of_table(8, results) + "}")
    assert table == {("cpu", 8): (fastest.rows, fastest.keys)}
    assert {(type(kind), type(width)) for kind, width in TABLE} == {(type(kind), type(width)) for kind, width in table}


def test_what_the_compiler_refused_is_never_chosen() -> None:
    refused = bench.Tried(64, 2048, 1024, math.inf, "RESOURCE_EXHAUSTED: scoped vmem")
    slow = bench.Tried(64, 512, 256, 2.0)
    assert bench.line_of_table(64, [refused, slow]).endswith("64): (512, 256),")
    with pytest.raises(ValueError, match="no sizes of blocks fit for head width 64; the last word: RESOURCE_EXHAUSTED"):
        bench.line_of_table(64, [refused])


def test_sizes_are_only_measured_where_there_is_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--tune"]) == BAD_USAGE
    assert "--tune measures sizes of blocks on a TPU, and this is 'cpu'" in capsys.readouterr().err
