"""Fixtures for every test: the compilation cache, and the folder of reference vectors where there is one."""

import json
import os
import pathlib
import sys
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
REQUIRE_SHARED = os.environ.get("JAXRL_REQUIRE_SHARED") == "1"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture(autouse=True)
def nothing_was_said() -> None:
    """What kernels say once a process, they say in every test. Most tests of the sandbox load none of them, nor jax."""
    if choice := sys.modules.get("jaxrl_kernels.choice"):
        choice.say_once.cache_clear()


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of recorded reference vectors and problem sets that may lie beside a checkout."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder of reference vectors beside the checkout")
    return folder


@pytest.fixture(scope="session")
def golden(shared: pathlib.Path) -> Callable[[str], list[dict[str, Any]]]:
    """``golden("verl/agg_loss")`` gives the cases of that file, with arrays put in place of their names."""

    def read(name: str) -> list[dict[str, Any]]:
        base = shared / "golden" / name
        document = json.loads(base.with_suffix(".json").read_text(encoding="utf-8"))
        arrays = np.load(base.with_suffix(".npz")) if "arrays" in document else {}

        def resolve(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: resolve(item) for key, item in value.items()}
            return arrays[value[1:]] if isinstance(value, str) and value.startswith("@") else value

        return [
            case | {"inputs": resolve(case["inputs"]), "outputs": resolve(case["outputs"])}
            for case in document["cases"]
        ]

    return read


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
