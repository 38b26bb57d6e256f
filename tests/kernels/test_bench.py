"""The table of block sizes: sizes are tried, the fastest are written, and the kernels read them."""

import pathlib

import numpy as np
import pytest

from jaxrl.cli import BAD_USAGE, main
from jaxrl_kernels import block_sizes, tuning
from jaxrl_kernels.block_sizes import Key, Sizes
from jaxrl_kernels.paged_attention.blocks import Shape, blocks_for

EXTENT = tuning.Extent(tokens=256, rounds=1, query_heads=4, kv_heads=2, slots=2, chunks=1, chunk=64)


def test_every_candidate_is_run_and_the_fastest_is_written(tmp_path: pathlib.Path) -> None:
    options = {"backend": "tpu_interpreted", "widths": (8,)}
    sizes = [(256, 128), (512, 256), (1024, 512)]
    for tried, key, runs in (
        (tuning.packed_rows(EXTENT, candidates=sizes, **options), Key("interval_attention", "cpu", 8), 2),
        (tuning.pages(EXTENT, page_sizes=(16,), candidates=sizes, **options), Key("paged_attention", "cpu", 8, 16), 4),
    ):
        results = list(tuning.written(tried, tmp_path / "table.json", "256 tokens"))
        ran = [(result.key, result.rows, result.keys) for result in results]
        assert ran == [(key, *pair) for pair in sizes[::2]], "the second candidate is cut to what the third is"
        assert all(len(result.seconds) == runs and min(result.seconds) > 0 for result in results)
        least = [min(times) for times in zip(*(result.seconds for result in results), strict=True)]
        fastest = min(results, key=lambda result: sum(np.divide(result.seconds, least)))
        got = block_sizes.read(tmp_path / "table.json")[key]
        assert (got.rows, got.keys) == (fastest.rows, fastest.keys) and got.measured.endswith("256 tokens")
    assert block_sizes.read(tmp_path / "table.json").items() > block_sizes.read().items()


def test_every_run_counts_the_same_and_what_the_compiler_refused_is_never_chosen() -> None:
    key, other = Key("paged_attention", "TPU v5", 128, 16), Key("paged_attention", "TPU v5", 256, 16)
    results = [
        tuning.Tried(key, 512, 1024, refused="RESOURCE_EXHAUSTED: scoped vmem"),
        tuning.Tried(key, 256, 512, (0.001, 0.9)),
        tuning.Tried(key, 128, 256, (0.002, 0.8)),
        tuning.Tried(other, 256, 512, refused="RESOURCE_EXHAUSTED: scoped vmem"),
    ]
    found = tuning.fastest(results, "here")
    assert {key: (sizes.rows, sizes.keys) for key, sizes in found.items()} == {key: (256, 512)}


def test_the_kernels_take_what_the_table_says(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    table, key = tmp_path / "table.json", Key("paged_attention", "TPU7x", 128, 16)
    shape = Shape(4, 256, 8, 2, 128, 16, 256, "bfloat16", "bfloat16")
    message = "no block sizes for head width 128 and pages of 16 tokens on 'TPU7x'; .* fit but were not measured"
    with pytest.warns(UserWarning, match=message):
        before = blocks_for("TPU7x", shape)
    block_sizes.write({key: Sizes(128, 256, "today")}, table)
    monkeypatch.setattr(block_sizes, "table", lambda: block_sizes.read(table))
    blocks = blocks_for("TPU7x", shape)
    assert (before.rows, before.pages) == (256, 32) and (blocks.rows, blocks.pages) == (128, 16)
    block_sizes.write({key: Sizes(1 << 16, 1 << 16)}, table)
    assert blocks_for("TPU7x", shape).pages <= 64, "memory is the bound, whatever the table says"


def test_a_file_that_is_no_table_is_refused(tmp_path: pathlib.Path) -> None:
    table, key = tmp_path / "table.json", Key("paged_attention", "TPU v5", 128, 16)
    block_sizes.write({key: Sizes(256, 512)}, table)
    good = table.read_text()
    for text, said in (
        ("no", "but no JSON"),
        ("{}", "but a dict"),
        ("[1]", "1 has not kernel, device, head_width, page, rows, keys, measured"),
        ('[{"rows": 3}]', "{'rows': 3} has not kernel"),
        (good.replace('"rows": 256', '"rows": 0'), r"rows of .*'rows': 0,.* is not an integer of at least 1"),
        (good.replace('"rows": 256', '"rows": true'), r"rows of .*'rows': True,.* is not an integer of at least 1"),
        (good.replace('"keys": 512', '"keys": 512.0'), r"keys of .*'keys': 512.0,.* is not an integer of at least 1"),
        (good.replace('"page": 16', '"page": -1'), r"page of .*'page': -1,.* is not an integer of at least 0"),
        (good.replace('"TPU7x"', "7"), r"device of .*'device': 7,.* is not a string"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=f"table.json is no table of block sizes.*{said}.*; `jaxrl bench kernels"):
            block_sizes.write({}, table)


def test_sizes_are_only_measured_where_there_is_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--tune"]) == BAD_USAGE
    assert "--tune measures sizes of blocks on a TPU, and this is 'cpu'" in capsys.readouterr().err
    assert main(["bench", "kernels", "--table", "sizes.json"]) == BAD_USAGE
    assert "--table sizes.json is written by --tune alone; give both" in capsys.readouterr().err
