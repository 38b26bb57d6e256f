"""What the build files promise about the tree. Bazel is not run: BUILD is read with stand-ins for its rules."""

import ast
import graphlib
import importlib.metadata
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("jaxrl", "kernels", "configs", "tests", "benchmarks", "launch")
TEXT_SUFFIXES = {".py", ".gin", ".md", ".toml", ".sh", ".yaml", ".bzl", ".sbatch", ""}

LINE_LIMIT = 600
KERNEL_LINE_LIMIT = 800

# Home folders and the like; a path that only exists on the machine of whoever wrote it.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root|workspace|work|mnt|scratch)/\w+")


def tree_files(*suffixes: str) -> Iterator[str]:
    """Paths of the tree's files, relative to the repository."""
    for folder in SOURCE_FOLDERS:
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts:
                yield path.relative_to(REPOSITORY).as_posix()


def glob(include: list[str], exclude: list[str] = [], allow_empty: bool = False) -> list[str]:  # noqa: B006
    """Bazel's glob, which unlike Python's fails where nothing matches unless told otherwise."""

    def matching(patterns: list[str]) -> set[str]:
        paths = (path for pattern in patterns for path in REPOSITORY.glob(pattern) if path.is_file())
        return {path.relative_to(REPOSITORY).as_posix() for path in paths}

    found = sorted(matching(include) - matching(exclude))
    assert found or allow_empty, f"glob({include}) in BUILD matches nothing; Bazel refuses that"
    return found


def read_build() -> list[dict[str, Any]]:
    """Every target of BUILD as its attributes, with the rule's name under ``rule``."""
    targets: list[dict[str, Any]] = []

    def rule(name: str) -> Callable[..., None]:
        return lambda **attributes: targets.append({"rule": name, **attributes})

    stand_ins = {name: rule(name) for name in ("py_library", "py_test", "genrule")}
    stand_ins |= {name: lambda *_, **__: None for name in ("load", "package", "exports_files")}
    source = (REPOSITORY / "BUILD").read_text(encoding="utf-8")
    exec(compile(source, "BUILD", "exec"), {"glob": glob, "requirement": "@pypi//{}".format, **stand_ins})
    return targets


@pytest.fixture(scope="module")
def targets() -> list[dict[str, Any]]:
    return read_build()


def files_of(target: dict[str, Any]) -> set[str]:
    return {*target.get("srcs", ()), *target.get("data", ())}


def test_every_source_recipe_and_test_stands_in_a_target(targets: list[dict[str, Any]]) -> None:
    covered = set().union(*map(files_of, targets))
    missing = sorted(set(tree_files(".py", ".gin")) - covered)
    assert not missing, f"in no target of BUILD (add the room to ROOMS): {missing}"


def test_every_target_names_what_exists_once(targets: list[dict[str, Any]]) -> None:
    names = [target["name"] for target in targets]
    assert len(names) == len(set(names))
    made = {file for target in targets for file in target.get("outs", ())}
    for target in targets:
        unknown = {dep for dep in target.get("deps", ()) if dep.startswith(":") and dep[1:] not in names}
        assert not unknown, f"{target['name']} depends on {unknown}, which BUILD does not define"
        absent = {file for file in files_of(target) - made if not (REPOSITORY / file).is_file()}
        assert not absent, f"{target['name']} lists {absent}, which do not exist"


def test_no_target_depends_on_itself(targets: list[dict[str, Any]]) -> None:
    makers = {file: target["name"] for target in targets for file in target.get("outs", ())}
    below = {
        target["name"]: {dep[1:] for dep in target.get("deps", ()) if dep.startswith(":")}
        | {makers[file] for file in files_of(target) if file in makers}
        for target in targets
    }
    graphlib.TopologicalSorter(below).prepare()  # raises CycleError, which names the circle


def test_every_test_file_is_run_by_a_test_target(targets: list[dict[str, Any]]) -> None:
    run = {file for target in targets if target["rule"] == "py_test" for file in target["args"]}
    assert run == {file for file in tree_files(".py") if re.fullmatch(r"tests/(.*/)?test_\w+\.py", file)}


def test_libraries_depend_on_what_they_import(targets: list[dict[str, Any]]) -> None:
    distributions = importlib.metadata.packages_distributions()
    problems = []
    for target in targets:
        if target["rule"] != "py_library" or target.get("testonly"):
            continue
        wanted = set()
        for file in target.get("srcs", ()):
            if (REPOSITORY / file).is_file():
                for module in imported_modules(REPOSITORY / file):
                    wanted |= dependency_names(module, target["name"], distributions)
        if missing := wanted - {canonical(dep) for dep in target.get("deps", ())}:
            problems.append(f"{target['name']} imports but does not list {sorted(missing)}")
    assert not problems, f"fix ROOMS in BUILD: {problems}"


def imported_modules(path: pathlib.Path) -> set[str]:
    """Modules that a file imports anywhere; "jaxrl.room" for everything inside a room."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "jaxrl":
            modules |= {f"jaxrl.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return {".".join(module.split(".")[: 2 if module.startswith("jaxrl.") else 1]) for module in modules}


def dependency_names(module: str, target: str, distributions: dict[str, list[str]]) -> set[str]:
    top, _, room = module.partition(".")
    if top in sys.stdlib_module_names or target in (top, room):
        return set()
    if top == "jaxrl":
        return set() if room.startswith("__") or not room else {f":{room}"}
    if top.startswith("jaxrl_"):
        return {f":{top.replace('jaxrl_configs', 'configs')}"}
    return {canonical(f"@pypi//{distributions[top][0]}")}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower() if name.startswith("@pypi") else name


def test_the_lock_names_every_dependency_within_its_bounds() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    locked = {}
    for line in (REPOSITORY / "requirements_lock.txt").read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"([\w.-]+)==(\S+)", line):
            locked[canonical(f"@pypi//{match[1]}")] = match[2]
    for text in project["dependencies"] + project["optional-dependencies"]["test"]:
        requirement = requirements.Requirement(text)
        version = locked.get(canonical(f"@pypi//{requirement.name}"))
        assert version, f"{requirement.name} is not in requirements_lock.txt; its first lines say how to write it again"
        assert requirement.specifier.contains(version), f"requirements_lock.txt has {requirement.name}=={version}"


def test_every_dependency_is_explained() -> None:
    document = (REPOSITORY / "docs" / "dependencies.md").read_text(encoding="utf-8").lower()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = itertools.chain.from_iterable(project["optional-dependencies"].values())
    for text in [*project["dependencies"], *extras]:
        name = re.match(r"[\w-]+(\[\w+\])?", text).group().lower()
        assert f"`{name}`" in document, f"{name} is not explained in docs/dependencies.md"


def test_files_stay_within_their_limits() -> None:
    for file in tree_files(".py"):
        lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
        limit = KERNEL_LINE_LIMIT if file.startswith("kernels/") else LINE_LIMIT
        assert len(lines) <= limit, f"{file} has {len(lines)} lines, the limit is {limit}; split it by concept"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_failed_benchmark_lets_the_others_run(tmp_path: pathlib.Path) -> None:
    """With a stand-in for the interpreter, which says what it runs and fails one."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$1"\n! [ "$1" = benchmarks/$FAILING.py ]\n')
    python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "setup.py", ".venv/installed", ".venv/installed-test"):
        (tmp_path / name).touch()
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    ran = []
    for target, failing in (("bench", "sandbox"), ("bench", "none"), ("bench-long", "soak")):
        environment = os.environ | {"FAILING": failing, "MAKEFLAGS": ""}  # these tests may be run by make
        command = ["make", "--no-print-directory", target]
        done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        assert (done.returncode == 0) is (failing == "none")
        ran += done.stdout.split() if failing != "none" else []
    files = [file for file in tree_files(".py") if file.startswith("benchmarks/")]
    assert sorted(ran) == sorted(file for file in files if "__main__" in (REPOSITORY / file).read_text())


def test_no_file_names_a_path_of_one_machine() -> None:
    this_file = pathlib.Path(__file__).relative_to(REPOSITORY).as_posix()
    top_level = [path.name for path in REPOSITORY.iterdir() if path.is_file() and not path.name.startswith(".git")]
    documents = [path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").rglob("*.md")]
    for file in [*tree_files(*TEXT_SUFFIXES), *top_level, *documents, ".ci/run"]:
        if file == this_file:
            continue
        for number, line in enumerate((REPOSITORY / file).read_text(encoding="utf-8").splitlines(), start=1):
            assert not MACHINE_PATH.search(line), f"{file}:{number} names a path of one machine: {line.strip()}"
