"""Fixtures for every test: the compilation cache, and the folder of reference vectors where there is one."""

import os
import pathlib
from collections.abc import Generator

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
REQUIRE_SHARED = os.environ.get("JAXRL_REQUIRE_SHARED") == "1"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of recorded reference vectors and problem sets that may lie beside a checkout."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder of reference vectors beside the checkout")
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With JAXRL_REQUIRE_SHARED=1 a test that wants the reference vectors may not be skipped, whatever the reason."""
    report = yield
    if REQUIRE_SHARED and report.skipped and not hasattr(report, "wasxfail") and "shared" in item.fixturenames:
        report.outcome = "failed"
        report.longrepr = f"skipped, but JAXRL_REQUIRE_SHARED=1: {call.excinfo.value if call.excinfo else ''}"
    return report
