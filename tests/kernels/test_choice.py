"""Which backend computes what: on devices that are not there, whose kind is all that is asked for."""

import contextlib
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import pytest

from jaxrl_kernels import Groups, choice, group_decode
from jaxrl_kernels.group_decode.prefixes import chosen_for_parties
from jaxrl_kernels.interval_attention import backends as interval
from jaxrl_kernels.interval_attention import cudnn
from jaxrl_kernels.paged_attention import backends as paged
from jaxrl_kernels.paged_attention.blocks import Shape, blocks_for

ROW = interval.Shape(rows=1, queries=4096, tokens=4096, groups=4, head_width=128, dtype="bfloat16")
NOT_BY_CUDNN = (
    ({"queries": 1024}, "whole rows are needed, and the queries are a part of a row"),
    ({"behind": True}, "whole rows are needed, and the queries are a part of a row"),
    ({"soft_cap": 50.0}, "it has no soft cap on the scores, which is 50.0"),
    ({"segments": False}, "packed segments are needed, and rows hold shared prompts, trees or parts of rows"),
)
SLOTS = Shape(64, 1, 32, 8, 128, 16, 1024, "bfloat16", "bfloat16")


def on(kind: str) -> contextlib.AbstractContextManager[object]:
    """Programs are for a device of this kind."""
    device = jax.sharding.AbstractDevice(kind, 1, "tpu" if kind.startswith("TPU") else "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("one",), abstract_device=device))


def test_auto_takes_the_kernels_of_a_tpu_where_they_fit_and_says_once_why_not() -> None:
    long, many = dataclasses.replace(ROW, rows=64, tokens=32768, queries=32768), dataclasses.replace(SLOTS, rows=128)
    with on("TPU v5 lite"):
        assert interval.chosen("auto", ROW) == paged.chosen("auto", SLOTS) == "tpu"
        with pytest.warns(UserWarning, match="interval attention: 'tpu' is passed over: 64 rows of 32768 tokens"):
            assert interval.chosen("auto", long) == "xla"
        with pytest.warns(UserWarning, match="paged attention: 'tpu' is passed over: .* larger pages need fewer"):
            assert paged.chosen("auto", SLOTS, many) == "xla"
    assert interval.chosen("auto", ROW) == paged.chosen("auto", SLOTS) == "xla"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("NVIDIA A100-SXM4-40GB", {}, "needs a NVIDIA H100 or .* not 'NVIDIA A100-SXM4-40GB'; choose auto"),
        ("NVIDIA H100 80GB HBM3", {"dtype": "float32"}, "heads 64 or 128 wide in bfloat16 .* not 128 in float32"),
        ("NVIDIA H100 80GB HBM3", {"head_width": 96}, "heads 64 or 128 wide in bfloat16 .* not 96 in bfloat16"),
    ],
)
def test_refusals_name_the_limit(kind: str, change: dict[str, object], message: str) -> None:
    with on(kind):
        with pytest.raises(ValueError, match=f"implementation='mosaic_gpu' .*{message}"):
            interval.chosen("mosaic_gpu", dataclasses.replace(ROW, **change))


def test_a_tpu_that_nothing_is_compiled_for_has_no_kernels() -> None:
    for kind in ("TPU v5", "TPU v6 lite", "TPU7x"):
        with on(kind):
            assert interval.chosen("auto", ROW) == paged.chosen("auto", SLOTS) == "tpu"
    with on("TPU v4"):
        assert interval.chosen("auto", ROW) == paged.chosen("auto", SLOTS) == "xla"
        with pytest.raises(ValueError, match="needs a TPU v5 lite or .* or TPU7x, not 'TPU v4'; choose auto"):
            paged.chosen("tpu", SLOTS)


def test_what_is_said_once_is_not_said_again_after_a_library_caught_warnings() -> None:
    with on("TPU v5 lite"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(2):
            paged.chosen("auto", dataclasses.replace(SLOTS, head_width=64))
            blocks_for("TPU v5 lite", SLOTS)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
    messages = [str(warning.message) for warning in said]
    assert sum("'tpu' is passed over: a head of width 64" in message for message in messages) == 1
    assert sum("no block sizes for head width 128" in message for message in messages) == 1


def test_auto_takes_the_first_row_that_it_may_take_and_that_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend is a row of the table: nothing else lists it."""
    table = {"new": dataclasses.replace(paged.BACKENDS["xla"], devices=("NVIDIA",)), **paged.BACKENDS}
    monkeypatch.setattr(paged, "BACKENDS", table)
    with on("NVIDIA A100-SXM4-40GB"):
        assert paged.chosen("auto", SLOTS) == "new"
        table["new"] = dataclasses.replace(table["new"], automatic=False)
        assert paged.chosen("auto", SLOTS) == "xla" and paged.chosen("new", SLOTS) == "new"


def test_auto_takes_cudnn_on_gpus_whose_cudnn_knows_packed_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    with on("NVIDIA A100-SXM4-40GB"):
        assert interval.chosen("auto", ROW) == "xla"
    with on("NVIDIA H200"):
        assert (
            interval.chosen("auto", ROW) == interval.chosen("auto", dataclasses.replace(ROW, head_width=256)) == "cudnn"
        )
        with pytest.warns(UserWarning, match="'cudnn' is passed over: heads of a multiple of 8, .* not 128 in float32"):
            assert interval.chosen("auto", dataclasses.replace(ROW, dtype="float32")) == "xla"
        for change, reason in NOT_BY_CUDNN:
            choice.say_once.cache_clear()
            with pytest.warns(UserWarning, match=f"'cudnn' is passed over: {reason}"):
                assert interval.chosen("auto", dataclasses.replace(ROW, **change)) == "xla"
    with on("NVIDIA B200"):
        assert interval.chosen("auto", ROW) == "cudnn"
        with pytest.warns(UserWarning, match="at most 128, in bfloat16 or float16 are needed, not 256"):
            assert interval.chosen("auto", dataclasses.replace(ROW, head_width=256)) == "xla"
        monkeypatch.setattr(cudnn, "JAX_VERSIONS", ((0, 9), (0, 8)))
        with pytest.warns(UserWarning, match=r"its entry is private to jax and known of 0\.9 and 0\.8, not of 0\."):
            assert interval.chosen("auto", ROW) == "xla"


def test_auto_takes_no_kernel_that_has_room_for_one_part_of_a_decoding_group_alone() -> None:
    rows, heads, width, page, table = 256, 64, 128, 16, 490
    q, page_table = jax.ShapeDtypeStruct((rows, 1, heads, width), jnp.bfloat16), _integers(rows, table)
    pages = jax.ShapeDtypeStruct((8, 8, page, width), jnp.bfloat16)
    groups = Groups(_integers(rows, 32), _integers(rows), page_table, page_table)
    with on("TPU v5 lite"):
        own = Shape(rows, 1, heads, 8, width, page, table, "bfloat16", "bfloat16")
        assert paged.chosen("auto", own) == "tpu"
        with pytest.warns(UserWarning, match="passed over: 256 rows of 490 pages"):
            assert chosen_for_parties("auto", own, *groups.members.shape) == "xla"
            jax.eval_shape(group_decode, q, pages, pages, page_table, _integers(rows, 1), groups)


def _integers(*lengths: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(lengths, jnp.int32)
