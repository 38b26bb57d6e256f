"""Bytes between pool and warden: what goes in comes out, however the stream is cut."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.sandbox.protocol import (
    Call,
    CellHead,
    FrameReader,
    Kind,
    Limits,
    Outcome,
    Report,
    frame,
    pack_cells,
    pack_ids,
    unpack_cells,
    unpack_for_child,
    unpack_ids,
)

positive = st.integers(1, 1 << 20)
limits = st.builds(
    Limits,
    cpu_seconds=st.floats(0.01, 1e6),
    wall_seconds=st.floats(0.01, 1e6),
    memory_mib=st.integers(16, 1 << 20),
    output_kib=positive,
    output_hard_mib=positive,
    disk_mib=positive,
    open_files=positive,
    threads=positive,
    files_mib=positive,
    processes=positive,
)
calls = st.builds(
    Call,
    id=st.integers(0, 2**64 - 1),
    code=st.binary(),
    stdin=st.binary(),
    echo=st.booleans(),
    limits=limits,
    submitted=st.floats(0, 1e9),
    attempts=st.integers(0, 255),
    tenant=st.integers(0, 2**32 - 1),
    files=st.binary(),
    wanted=st.text(),
    processes=st.booleans(),
    command=st.text(),
    replay=st.booleans(),
)
seconds = st.floats(0, 1e6)
reports = st.builds(
    Report,
    id=st.integers(0, 2**64 - 1),
    outcome=st.sampled_from(Outcome),
    attempts=st.integers(0, 255),
    exit_code=st.integers(-1, 255),
    signal=st.integers(0, 64),
    cpu_seconds=seconds,
    wall_seconds=seconds,
    queue_seconds=seconds,
    peak_rss_kib=st.integers(0, 2**40),
    stdout=st.binary(),
    stderr=st.binary(),
    stdout_truncated=st.booleans(),
    stderr_truncated=st.booleans(),
    files=st.binary(),
    files_left_out=st.integers(0, 2**32 - 1),
    survived=st.booleans(),
    node=st.just(""),  # is not packed
)


@given(calls)
def test_call_round_trip(call: Call) -> None:
    assert Call.unpack(call.pack()) == call
    limits = dataclasses.astuple(call.limits)
    command = call.command.encode()
    flags = call.echo + 2 * call.replay
    assert unpack_for_child(call.pack()) == (call.code, flags, limits, call.files, command, bool(call.wanted))


@given(st.lists(st.binary()), st.integers(0, 2**64 - 1), st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_cells_and_their_heads_round_trip(cells: list[bytes], session: int, flags: tuple[bool, bool, bool]) -> None:
    assert unpack_cells(pack_cells(cells)) == cells
    head = CellHead(session, *flags)
    assert CellHead.unpack(head.pack() + b"rest") == (head, b"rest")
    assert unpack_ids(pack_ids([session, 0, len(cells)])) == [session, 0, len(cells)]


@given(reports)
def test_report_round_trip(report: Report) -> None:
    assert Report.unpack(report.pack()) == report


@given(st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=50))), st.integers(1, 20))
def test_frames_survive_any_cut(frames: list[tuple[Kind, bytes]], step: int) -> None:
    stream = b"".join(frame(kind, body) for kind, body in frames)
    reader, found = FrameReader(), []
    for start in range(0, len(stream), step):
        found += list(reader.feed(stream[start : start + step]))
    assert found == frames


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Limits)])
def test_limits_must_be_positive(field: str) -> None:
    with pytest.raises(ValueError, match=rf"Limits\.{field}=0 must be above 0"):
        Limits(**{field: 0})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Limits)])
@pytest.mark.parametrize("value", [1 << 32, 1 << 40, math.inf, math.nan])
def test_limits_must_fit_where_they_are_packed(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Limits\.{field}={value} must .* below 2\*\*32"):
        Limits(**{field: value})


def test_memory_below_what_a_start_needs() -> None:
    with pytest.raises(ValueError, match="memory_mib=8 is too small: 16"):
        Limits(memory_mib=8)
