"""Reading recorded reference vectors."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


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
