"""The Python tool: code in, standard output and the value of the last expression out."""

import dataclasses
from typing import Any

from jaxrl.records import ToolCall, ToolStatus
from jaxrl.sandbox import Result, Runner
from jaxrl.text.chat import ToolSchema

_TYPES = {"code": str, "input": str}


class PythonTool:
    """Runs each call in a fresh interpreter of a sandbox pool; nothing is kept between calls."""

    schema = ToolSchema(
        name="python",
        description="Runs Python code and returns what it prints, and the value of a last expression.",
        parameters={
            "type": "object",
            "properties": {
                "code": {"type": "string", "description": "The program."},
                "input": {"type": "string", "description": "Its standard input."},
            },
            "required": ["code"],
        },
    )

    def __init__(self, pool: Runner) -> None:
        self._pool = pool

    async def call(self, arguments: Any, seconds: float) -> ToolCall:
        """As ``Tool.call``."""
        if (complaint := _complaint(arguments)) is not None:
            kept = arguments if isinstance(arguments, dict) else {}
            return ToolCall(self.schema.name, kept, ToolStatus.BAD_ARGUMENTS, stderr=complaint)
        limits = self._pool.limits
        limits = dataclasses.replace(limits, wall_seconds=min(limits.wall_seconds, seconds))
        result = await self._pool.run(arguments["code"], stdin=arguments.get("input", ""), echo=True, limits=limits)
        return ToolCall(
            name=self.schema.name,
            arguments=arguments,
            status=result.status,
            stdout=result.stdout,
            stderr=_error_text(result),
            seconds=result.wall_seconds,
            queue_seconds=result.queue_seconds,
            attempts=result.attempts,
            isolation=result.isolation,
        )


def _complaint(arguments: Any) -> str | None:
    """What is wrong with the arguments, in a line that helps to write them better; None where they are right."""
    if not isinstance(arguments, dict):
        return 'arguments must be an object such as {"code": "print(1)"}'
    if "code" not in arguments:
        return 'missing argument "code"'
    for name, value in arguments.items():
        if name not in _TYPES:
            return f'unknown argument "{name}"; there are: {", ".join(_TYPES)}'
        if not isinstance(value, _TYPES[name]):
            return f'argument "{name}" must be a string'
    return None


def _error_text(result: Result) -> str:
    """Standard error, with the reason added where a program failed and said nothing."""
    if result.status is not ToolStatus.ERROR or result.stderr.strip():
        return result.stderr
    if result.signal:
        return f"killed by signal {result.signal}"
    return f"exit status {result.exit_code}"
