"""The server's description of itself: OpenAPI 3.1, with schemas from the dataclasses that requests are read into."""

from typing import Any

from jaxrl import __version__
from jaxrl.sandbox import codec
from jaxrl.sandbox.result import Result
from jaxrl.sandbox.wire import (
    BatchLine,
    BatchRequest,
    CellRequest,
    ClosedSession,
    Copies,
    ForkRequest,
    Health,
    OpenSession,
    Problem,
    RunRequest,
    SessionRequest,
    TakeBackRequest,
    TakenBack,
)

_ABOUT = (
    "Runs untrusted code: Python in a fork of a warm, jailed interpreter for each call, Bash and C++ as programs in a "
    "jail of their own; the cells of a session share their state. Whatever the code does, the answer is 200 and the "
    "result's status says how it ended; `infra_error` is a fault of the service, never of the code. Answers of 400 and "
    "above, 500 apart, mean that nothing was run. Where output is not UTF-8, its bytes are in `stdout_bytes` and "
    "`stderr_bytes`, and `stdout` and `stderr` have U+FFFD in the place of what cannot be decoded."
)
_LINES = "A line of JSON a call, in the order in which they end. Fewer lines than calls: the server was stopped."
_REFUSALS = {
    400: "The request does not fit its schema, or gives files that cannot be laid out.",
    401: "The bearer token is missing or wrong.",
    403: "The server has no token, and the request names another host than loopback, or comes from a web page.",
    404: "There is no such session of this token's: it was closed, or not used for too long.",
    408: "The request did not come whole in time.",
    411: "The request does not say its length.",
    413: "The request, or a session's cells together, are larger than the server takes.",
    415: "The request is not application/json.",
    422: "A call asks for a language, or for processes, for which this server's machine lacks something.",
    429: "As many calls are waiting, or sessions open, as the server lets. Try again after the seconds of Retry-After.",
    500: "The server failed. A call may have run.",
    503: "The server is shutting down. Try again, there or elsewhere, after the seconds of Retry-After.",
}
_TENANT = {
    "name": "X-Tenant",
    "in": "header",
    "description": "On whose behalf: waiting tenants take turns. Tenants of different tokens are different.",
    "schema": {"type": "string", "maxLength": 256, "pattern": "^[ -~]*$"},
}


_ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "What opening the session, or the fork that made it, gave.",
    "schema": {"type": "string"},
}
_JSON, _JSON_LINES = "application/json", "application/x-ndjson"


def document() -> dict[str, Any]:
    """The whole description, as JSON values."""
    records: dict[str, Any] = {}
    refusals = {str(status): _refusal(status, records) for status in _REFUSALS}

    def described(record: type, closed: bool) -> dict[str, Any]:
        return codec.schema(record, records, closed=closed)

    def done(answer: type, told: str, kind: str = _JSON) -> dict[str, Any]:
        return {"description": told, "content": {kind: {"schema": described(answer, False)}}}

    def post(name: str, summary: str, asked: type, answered: dict[str, Any], session: bool = False) -> dict[str, Any]:
        told = {status: words for status, words in refusals.items() if session or status != "404"}
        return {
            "post": {
                "operationId": name,
                "summary": summary,
                "parameters": [_ID] if session else [_TENANT],
                "requestBody": {"required": True, "content": {_JSON: {"schema": described(asked, True)}}},
                "responses": {"200": answered} | told,
            }
        }

    ended = "It ends when it is closed, or is not used for `idle_seconds`."
    run = post("run", "Run a snippet.", RunRequest, done(Result, "How it ended."))
    batch = post("batch", "Run many.", BatchRequest, done(BatchLine, _LINES, _JSON_LINES))
    opening = post("open", "Begin a session.", SessionRequest, done(OpenSession, f"It is there. {ended}"))
    cell = post("cell", "Run a cell, after those before.", CellRequest, done(Result, "How it ended."), session=True)
    fork = post(
        "fork", "Copy a session as it is now.", ForkRequest, done(Copies, f"Each is a session. {ended}"), session=True
    )
    undoing = post(
        "takeBack",
        "Undo cells and forks whose answers were lost or not waited for.",
        TakeBackRequest,
        done(TakenBack, "They are undone."),
        session=True,
    )
    closing = {
        "operationId": "close",
        "summary": "End a session; its copies live on.",
        "parameters": [_ID],
        "responses": {"200": done(ClosedSession, "Nothing is left of it.")}
        | {status: refusals[status] for status in ("401", "403", "404", "500")},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxrl sandbox", "version": __version__, "description": _ABOUT},
        "security": [{"token": []}],
        "paths": {
            "/v1/run": run,
            "/v1/batch": batch,
            "/v1/sessions": opening,
            "/v1/sessions/{id}": {"delete": closing},
            "/v1/sessions/{id}/cells": cell,
            "/v1/sessions/{id}/fork": fork,
            "/v1/sessions/{id}/take-back": undoing,
            "/v1/health": {"get": _health(described(Health, False))},
            "/metrics": {"get": _plain("metrics", "Prometheus' text format.", "text/plain", refusals)},
            "/openapi.json": {"get": _plain("openapi", "This description.", "application/json", {})},
        },
        "components": {"schemas": records, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _refusal(status: int, records: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": codec.schema(Problem, records, closed=False)}}
    wait = {"description": "Seconds to wait.", "schema": {"type": "integer"}}
    headers = {"headers": {"Retry-After": wait}} if status in (429, 503) else {}
    return {"description": _REFUSALS[status], "content": content} | headers


def _health(schema: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    return {
        "operationId": "health",
        "summary": "Whether the server takes calls. Needs no token.",
        "security": [],
        "responses": {
            "200": {"description": "It does.", "content": content},
            "503": {"description": "It does not, or not for long.", "content": content},
        },
    }


def _plain(name: str, summary: str, kind: str, refusals: dict[str, Any]) -> dict[str, Any]:
    """What takes no arguments; open to everybody where it refuses nobody."""
    responses = {"200": {"description": summary, "content": {kind: {}}}}
    told = {status: refusals[status] for status in ("401", "403", "500", "503") if status in refusals}
    described = {"operationId": name, "summary": summary, "responses": responses | told}
    return described if refusals else described | {"security": []}
