"""The example of the documentation runs, and prints what its comments say."""

import ast
import asyncio
import inspect
import pathlib
import re
from types import CodeType, FunctionType

import pytest

DOCUMENT = pathlib.Path(__file__).resolve().parents[3] / "docs" / "sandbox.md"


def test_the_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    section = DOCUMENT.read_text(encoding="utf-8").partition("\n## Grading\n")[2]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert example is not None
    code = compile(example[1], "example", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    assert isinstance(code, CodeType) and code.co_flags & inspect.CO_COROUTINE
    asyncio.run(FunctionType(code, {})())
    said = re.findall(r"^ *print\(.*\)  # (.*)$", example[1], re.MULTILINE)
    assert len(said) == 3
    assert capsys.readouterr().out.splitlines() == said
