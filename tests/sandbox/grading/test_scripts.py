"""The snippets that carry the package's text into a jail."""

import pathlib
import subprocess
import sys

import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox.grading import codec, scripts
from tests.sandbox.driver import Driver

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("version", [sys.hexversion, 1], ids=["same interpreter", "another"])
def test_a_snippet_runs_on_any_interpreter(sandbox: Driver, version: int) -> None:
    script = scripts.answer("def f(x): return x + 1", "", "f")
    assert script.count(str(sys.hexversion)) == 1
    files = {codec.QUESTIONS: codec.line(codec.pack(((1,), {}))).encode()}
    script = script.replace(str(sys.hexversion), str(version))
    result = sandbox.run(script, files=files, wanted=[codec.ANSWERS])
    assert (result.status, result.files) == (ToolStatus.OK, {codec.ANSWERS: b'["value", 2]\n'}), result


def test_every_process_grades_by_the_same_version() -> None:
    command = [sys.executable, "-c", f"from {scripts.__name__} import VERSION; print(VERSION)"]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == scripts.VERSION
