"""What is read of a compiled program: kinds, groups, bytes along a ring, and turns of loops."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrl.check.collectives import Traffic, traffic

LOOP = """
%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%x), replica_groups=GROUPS, to_apply=%add
  ROOT %t = (s32[], f32[8,4]) tuple(%x, %all-reduce.1)
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5), metadata={op_name="while/cond"}
  %p = (s32[], f32[8,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8,4]) -> (s32[], f32[8,4]) {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %while.1 = (s32[], /*index=1*/f32[8,4]) while(%a), condition=%condition, body=%body
}
"""
BYTES = 8 * 4 * 4


@pytest.mark.parametrize(
    ("groups", "size", "neighbours"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4, 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", 2, 1),
        ("[2,4]<=[8]", 4, 4),
        ("[4,2]<=[2,4]T(1,0)", 2, 1),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4, 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", 2, 1),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 4, 4),
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", 8, 4),
    ],
)
def test_groups_and_loops(groups: str, size: int, neighbours: int) -> None:
    found = traffic(LOOP.replace("GROUPS", groups), inner=4)
    sent = int(2 * BYTES * (size - 1) / size)
    assert found == [Traffic("all-reduce", 5, 5 * sent, 5 * (sent // neighbours) if neighbours < size else 0)]


def test_a_group_of_one_sends_nothing() -> None:
    assert traffic(LOOP.replace("GROUPS", "{{0},{1},{2},{3}}"), inner=4) == []


FUSIONS = """
%start (a: f32[2,4]) -> f32[8,4] {
  ROOT %g.1 = f32[8,4] all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="3"}
}

%async_collective_fusion (a: f32[2,4]) -> f32[8,4] {
  ROOT %g.2 = f32[8,4] all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="3"}
}

%done (a: f32[2,4]) -> f32[8,4] {
  ROOT %g.3 = f32[8,4] all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="3"}
}

%body (a: f32[2,4]) -> f32[8,4] {
  %f.1 = f32[8,4] fusion(%a), kind=kCustom, calls=%start
  %f.2 = f32[8,4] fusion(%f.1), kind=kOutput, calls=%async_collective_fusion
  %f.3 = f32[8,4] fusion(%f.2), kind=kCustom, calls=%done
  ROOT %g.4 = f32[8,4] all-gather(%a), channel_id=9, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="4"}
}

ENTRY %main (a: f32[2,4]) -> f32[8,4] {
  ROOT %w = f32[8,4] while(%a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_one_that_a_tpu_starts_and_awaits_in_fusions_is_one() -> None:
    """Three instructions of one chain and one of another, in a loop of five turns."""
    assert traffic(FUSIONS, inner=4) == [Traffic("all-gather", 10, 10 * BYTES * 3 // 4)]


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("f32[8,4] all-gather(%a), replica_groups={{0,1,2,3}}, dimensions={0}", ("all-gather", BYTES * 3 // 4)),
        ("(f32[2,4], f32[8,4]) all-gather-start(%a), replica_groups={{0,1,2,3}}", ("all-gather", BYTES * 3 // 4)),
        ("f32[8,4] all-gather-done(%a)", None),
        ("((f32[8,4]), f32[2,4]) reduce-scatter-start(%a), replica_groups={{0,1,2,3}}", ("reduce-scatter", 32 * 3)),
        ("bf16[8,4] reduce-scatter(%a), replica_groups={{0,1,2,3}}, to_apply=%add", ("reduce-scatter", 64 * 3)),
        (
            "f32[8,4] collective-permute(%a), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
            ("collective-permute", BYTES),
        ),
        ("(f32[8,4], f32[8,4]) all-to-all(%a, %b), replica_groups={{0,1}}", ("all-to-all", BYTES)),
    ],
)
def test_bytes_of_each_kind(instruction: str, expected: tuple[str, int] | None) -> None:
    text = f"ENTRY %main (a: f32[8,4]) -> f32[8,4] {{\n  ROOT %r = {instruction}\n}}\n"
    found = [(one.kind, one.sent) for one in traffic(text, inner=4)]
    assert found == ([] if expected is None else [expected])


def test_a_real_program_whose_loop_turns_three_times() -> None:
    """Skipped on one device: then nothing is sent. ``test_this`` compiles for eight."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((2, 4)), NamedSharding(mesh, PartitionSpec("x")))

        def turn(total: jax.Array, _: None) -> tuple[jax.Array, None]:
            return total + jnp.sin(total) * x.sum(), None

        text = jax.jit(lambda: jax.lax.scan(turn, jnp.float32(0), None, length=3)[0]).lower().compile().as_text()
    assert sum(one.count for one in traffic(text, inner=2)) in (1, 3)
