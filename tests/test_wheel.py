"""The built wheel works without the checkout.

The fresh environment gets jaxrl from the wheel, and its dependencies by a .pth file that appends the site-packages of
the running environment: what is tested is what the wheel itself must bring (packages, recipes, console script,
metadata), and installing a gigabyte of dependencies again would test nothing more. A folder named in a .pth file does
not get its own .pth files run, so the editable install of the checkout stays out of reach; a test makes sure of it.
"""

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PACKAGED = ("jaxrl", "kernels", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(*command: str | pathlib.Path, cwd: pathlib.Path, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """Run to the end, without a terminal or the variables of this environment; show the output of what failed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    finished = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert finished.returncode == 0, f"{command} returned {finished.returncode}\n{finished.stdout}\n{finished.stderr}"
    return finished


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Built from a copy, because setuptools writes into the tree it builds, and packs what it left there before."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGED:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", output, source, cwd=source)
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The bin folder of an environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_wheel_holds_every_package_and_recipe_and_nothing_else(wheel: pathlib.Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        folder_in_wheel + path.relative_to(REPOSITORY / folder).as_posix()
        for folder, folder_in_wheel in [
            ("jaxrl", "jaxrl/"),
            ("kernels/jaxrl_kernels", "jaxrl_kernels/"),
            ("configs", "jaxrl_configs/"),
        ]
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in (".py", ".gin", ".json")
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_is_imported_and_not_the_checkout(environment: pathlib.Path, tmp_path: pathlib.Path) -> None:
    program = "import jaxrl as a, jaxrl_kernels as b, jaxrl_configs as c; print(a.__file__, b.__file__, c.__file__)"
    places = run(environment / "python", "-c", program, cwd=tmp_path).stdout.split()
    assert len(places) == 3 and all(place.startswith(str(environment.parent)) for place in places)


def test_metadata(environment: pathlib.Path, tmp_path: pathlib.Path) -> None:
    program = "import importlib.metadata as m; d = m.metadata('jaxrl'); print(d['License-Expression'], d['Version'])"
    assert run(environment / "python", "-c", program, cwd=tmp_path).stdout.split() == [
        "Apache-2.0", importlib.metadata.version("jaxrl"),
    ]  # fmt: skip


def test_the_command_explains_itself(environment: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shown = run(environment / "jaxrl", "--help", cwd=tmp_path).stdout
    for verb in ("train", "sft", "eval", "rollout", "export", "import"):
        assert verb in shown


def test_two_steps_of_training_by_recipe_name(environment: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    shown = run(environment / "jaxrl", "train", "smoke", "--run", folder, cwd=tmp_path, seconds=500).stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    assert 0 <= summary["pass_rate_after"] <= 1
    assert "step 2/2" in shown and "step 1/2" in shown
    assert (folder / "config.gin").is_file() and (folder / "export" / "config.json").is_file()
    assert all(len(line) <= 100 for line in shown.splitlines() if line.startswith("step "))
