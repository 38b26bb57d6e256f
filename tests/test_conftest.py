"""What the fixtures promise: with JAXRL_REQUIRE_SHARED=1 no test that wants the vectors is skipped in silence."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

CONFTEST = pathlib.Path(__file__).with_name("conftest.py")
TESTS = """
import pytest

def test_wants_vectors(shared):
    pass

def test_wants_vectors_and_a_library(shared):
    pytest.importorskip("a_library_that_nobody_has")

def test_skips_for_another_reason():
    pytest.skip("no GPU")
"""


@pytest.mark.parametrize(
    ("present", "required", "outcome"),
    [
        (False, False, "3 skipped"),
        (False, True, "1 skipped, 2 errors"),
        (True, False, "1 passed, 2 skipped"),
        (True, True, "1 failed, 1 passed, 1 skipped"),
    ],
)
def test_reference_vectors(tmp_path: pathlib.Path, present: bool, required: bool, outcome: str) -> None:
    folder = tmp_path / "checkout" / "tests"
    folder.mkdir(parents=True)
    shutil.copy(CONFTEST, folder)
    (folder / "test_it.py").write_text(TESTS)
    if present:
        (tmp_path / "shared").mkdir()
    environment = os.environ | {"JAXRL_REQUIRE_SHARED": "1" if required else ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", folder, folder]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False).stdout
    assert f" {outcome} in " in shown.splitlines()[-1], shown
