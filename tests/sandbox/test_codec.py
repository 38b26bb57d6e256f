"""What is read and what the description allows are the same; what is written is read back."""

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

import jsonschema
import openapi_spec_validator
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.records import ToolStatus
from jaxrl.sandbox import (
    ClusterPool,
    Language,
    Limits,
    Pool,
    RemoteSession,
    Result,
    Runner,
    RunnerSession,
    SandboxClient,
    Session,
    codec,
    openapi,
    wire,
)

DOCUMENT = openapi.document()
FULL = {
    "calls": [
        {
            "code": "print(1)",
            "stdin": "2",
            "echo": False,
            "limits": {"cpu_seconds": 0.5, "memory_mib": 64, "threads": None},
            "files": {"a/b.csv": "AAEC/w=="},
            "wanted": ["*.png"],
            "language": "bash",
            "processes": True,
        },
        {"code": ""},
    ]
}


def validator(record: str) -> jsonschema.Draft202012Validator:
    schemas = DOCUMENT["components"]["schemas"]
    return jsonschema.Draft202012Validator(
        {"$ref": f"#/components/schemas/{record}", "components": {"schemas": schemas}}
    )


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value inside, its own first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, item in items for place in places(item, (*path, key))]


def replaced(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    whole = copy.deepcopy(value)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return whole


VALUES = [
    None, True, False, -5, 0, 1, 15, 16, 100, 0.5, 16.0, 16.5, -1e300, "", "AAEC/w==", "AAE", "%%%%", "é", "\ud800",
    "python", "C", [], [""], ["a", 1], ["a"] * 64, ["a"] * 65, {}, {"x": ""}, {"x": "?"}, {"code": ""},
    {"code": "", "x": 1}, {"code": 1}, [{"code": ""}], [{}], {"calls": []}, {"cpu_seconds": 1}, {"cpu": 1},
    {"threads": None, "disk_mib": 2}, {"base64": "AAEC/w=="}, {"base64": "?"}, {"base64": "", "x": 1},
]  # fmt: skip


@pytest.mark.parametrize("place", places(FULL), ids=str)
def test_a_request_is_read_exactly_where_its_schema_holds(place: tuple) -> None:
    accepted = []
    for value in VALUES:
        document = replaced(FULL, place, value)
        try:
            codec.read(wire.BatchRequest, document)
            accepted.append(True)
        except codec.Malformed:
            accepted.append(False)
        assert accepted[-1] == validator("BatchRequest").is_valid(document), document
    assert True in accepted and False in accepted


def test_the_undisturbed_request_is_accepted() -> None:
    """Without this the property above could hold because everything is refused."""
    request = codec.read(wire.BatchRequest, FULL)
    assert request.calls[0].files == {"a/b.csv": b"\x00\x01\x02\xff"}
    assert request.calls[1] == wire.RunRequest("", limits=None, wanted=())
    assert validator("BatchRequest").is_valid(FULL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limits": {"memory_mib": 15}}, "calls[0].limits.memory_mib is 15 but must be at least 16"),
        ({"limits": {"threads": 0}}, "calls[0].limits.threads is 0 but must be greater than 0"),
        ({"limits": {"cpu": 1}}, "calls[0].limits.cpu is 1 but must be left out: the fields are cpu_seconds, "),
        ({"files": {"a": "?"}}, "calls[0].files.a is '?' but must be a string of base64"),
        ({"wanted": ["*"] * 65}, "must be at most 64 of them"),
        ({"echo": 1}, "calls[0].echo is 1 but must be true or false"),
        ({"stdin": ["x" * 1000]}, "… but must be a string"),
    ],
)
def test_a_complaint_names_place_value_and_limit(change: dict, message: str) -> None:
    with pytest.raises(codec.Malformed) as refusal:
        codec.read(wire.BatchRequest, {"calls": [{"code": ""} | change]})
    assert message in str(refusal.value) and len(str(refusal.value)) < 300
    with pytest.raises(codec.Malformed, match="calls is None but must be given"):
        codec.read(wire.BatchRequest, {})


FIELDS = {
    "status": st.sampled_from(ToolStatus),
    "stdout": st.text(),
    "stderr": st.text(),
    "exit_code": st.none() | st.integers(0, 255),
    "signal": st.none() | st.integers(1, 64),
    "cpu_seconds": st.floats(0, 1e6),
    "wall_seconds": st.floats(0, 1e6),
    "queue_seconds": st.floats(0, 1e6),
    "peak_rss_kib": st.integers(0, 1 << 40),
    "attempts": st.integers(0, 9),
    "stdout_truncated": st.booleans(),
    "stderr_truncated": st.booleans(),
    "isolation": st.text(max_size=5),
    "files": st.dictionaries(st.text(max_size=5), st.binary(), max_size=2),
    "files_left_out": st.integers(0, 99),
    "stdout_bytes": st.none() | st.binary(),
    "stderr_bytes": st.none() | st.binary(),
    "stage": st.sampled_from(["run", "build"]),
    "node": st.text(max_size=5),
    "rebuilt": st.booleans(),
    "replay_differs": st.booleans(),
}
RESULTS = st.builds(Result, **FIELDS)


def test_every_field_of_a_result_is_drawn() -> None:
    assert set(FIELDS) == {field.name for field in dataclasses.fields(Result)}
    assert set(FULL["calls"][0]) == {field.name for field in dataclasses.fields(wire.RunRequest)}


@settings(deadline=None)
@given(RESULTS)
def test_a_result_arrives_as_it_was_and_as_described(result: Result) -> None:
    sent = json.loads(json.dumps(codec.write(result)))
    assert codec.read(Result, sent, closed=False) == result
    validator("Result").validate(sent)
    assert codec.read(Result, sent | {"new_in_some_later_version": 1}, closed=False) == result


def test_the_description_is_valid() -> None:
    openapi_spec_validator.validate(DOCUMENT)


def test_pools_and_request_take_the_same_arguments() -> None:
    arguments = inspect.signature(Runner.run, eval_str=True, locals={"Language": Language, "Result": Result}).parameters
    for kind in (Pool, ClusterPool, SandboxClient):
        assert arguments == inspect.signature(kind.run).parameters, kind
    assert [field.name for field in dataclasses.fields(wire.RunRequest)] == [
        name for name in arguments if name not in ("self", "tenant")
    ]


def test_sessions_and_requests_take_the_same_arguments() -> None:
    def arguments(work: Callable[..., object]) -> list[inspect.Parameter]:
        names = {"Language": Language, "Result": Result}
        return list(inspect.signature(work, eval_str=True, locals=names).parameters.values())

    def fields(record: type) -> list[str]:
        return [field.name for field in dataclasses.fields(record)]

    for kind in (Pool, ClusterPool, SandboxClient):
        assert arguments(Runner.session) == arguments(kind.session), kind
    for kind in (Session, RemoteSession):
        for name in ("run", "fork", "close"):
            assert arguments(getattr(RunnerSession, name)) == arguments(getattr(kind, name)), (kind, name)
    opening = [argument.name for argument in arguments(Runner.session)]
    assert fields(wire.SessionRequest) == [name for name in opening if name not in ("self", "tenant")]
    assert fields(wire.CellRequest) == [*(argument.name for argument in arguments(RunnerSession.run)[1:]), "number"]


def test_no_limit_of_a_call_exceeds_the_server() -> None:
    most = Limits(cpu_seconds=2, memory_mib=100)
    assert wire.capped(None, most) == most
    asked = codec.read(wire.PartialLimits, {"cpu_seconds": 1, "memory_mib": 5000, "threads": None})
    assert wire.capped(asked, most) == dataclasses.replace(most, cpu_seconds=1)
    whole = wire.request("", "", True, Limits(cpu_seconds=0.5), None, (), "python", False).limits
    assert wire.capped(whole, most) == dataclasses.replace(most, cpu_seconds=0.5)
