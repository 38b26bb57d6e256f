"""What rStar2's own runner says of a failing cell, against what ours says: other words, the same facts."""

import json
import pathlib
import re

from jaxrl.records import ToolStatus
from tests.sandbox.driver import Driver

_RELEASE = re.compile(r"(?P<type>\w+)(?: at line (?P<line>\d+))?: (?P<message>.*?)(?: \(<unknown>, line \d+\))?")


def test_errors_of_the_release_are_told_in_full(sandbox: Driver, shared: pathlib.Path) -> None:
    """Type, message, line and source line of every failing stateless case stand in our traceback as well.

    The release leaves the line out where statements and a last expression are mixed; ours always has it.
    """
    cases = json.loads((shared / "golden/rstar/sim_jupyter.json").read_text())["cases"]
    failing = [case for case in cases if not case["inputs"]["history"] and case["outputs"]["exit_code"] == 1]
    assert len(failing) >= 6
    results = sandbox.run_all([case["inputs"]["code"] for case in failing])
    for case, result in zip(failing, results, strict=True):
        told, *source = case["outputs"]["stderr"].splitlines()
        found = _RELEASE.fullmatch(told)
        assert found is not None, told
        assert result.status is ToolStatus.ERROR
        assert result.stderr.splitlines()[-1] == f"{found['type']}: {found['message']}", case["id"]
        assert all(line.strip() in result.stderr for line in source), case["id"]
        assert found["line"] is None or f'File "main.py", line {found["line"]}' in result.stderr, case["id"]


def test_what_a_cell_writes_to_its_error_stream_is_passed_on(sandbox: Driver, shared: pathlib.Path) -> None:
    cases = json.loads((shared / "golden/rstar/sim_jupyter.json").read_text())["cases"]
    (case,) = (case for case in cases if case["id"] == "stderr_write")
    result = sandbox.run(case["inputs"]["code"])
    assert (result.stdout, result.stderr) == (case["outputs"]["stdout"], case["outputs"]["stderr"])
