"""What README and docs/sandbox.md show runs as it stands, and their tables are those of the code."""

import ast
import asyncio
import dataclasses
import functools
import importlib.util
import inspect
import pathlib
import re
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest

from jaxrl.config import SandboxConfig
from jaxrl.sandbox import ClusterPool, Limits, Pool, Result, bench
from jaxrl.sandbox.bench import table
from tests.sandbox.ray_nodes import ClusterProcess, RayNodes, in_cluster
from tests.sandbox.served import Served
from tests.sandbox.test_languages import needs

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
README, SANDBOX = (REPOSITORY / path for path in ("README.md", "docs/sandbox.md"))
SERVER, CLUSTER = '"http://host:8780"', '"auto"'  # addresses in the examples, which a test replaces by its own
DOCUMENTS = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]


def examples(*documents: pathlib.Path) -> list[str]:
    """Blocks of Python."""
    return [block for path in documents for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)]


def title(example: str) -> str:
    return re.sub(r"\W+", " ", " ".join(example.split("\n")[2:4])).strip()[:40]


async def run(example: str) -> None:
    """As a notebook does, with names of its own."""
    code = compile(example, "example", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    assert isinstance(code, CodeType) and code.co_flags & inspect.CO_COROUTINE
    await FunctionType(code, {})()


def promised(example: str) -> list[str]:
    """What the comments behind its prints say."""
    return re.findall(r"^ *print\(.*\)  # (?!as they)(.*)$", example, re.MULTILINE)


def printed(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


LOCAL = [block for block in examples(README, SANDBOX) if SERVER not in block and "ClusterPool" not in block]


def test_there_are_examples_of_every_kind() -> None:
    assert len(LOCAL) >= 6
    assert [SERVER in block for block in examples(SANDBOX)].count(True) == 1
    assert [CLUSTER in block for block in examples(SANDBOX)].count(True) == 1


@pytest.mark.parametrize("example", LOCAL, ids=title)
def test_examples(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "language" in example.lower():
        needs("bash", "c++")
    asyncio.run(run(example))
    assert printed(capsys.readouterr().out) == promised(example)


def test_the_example_of_a_client(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (block for block in examples(SANDBOX) if SERVER in block)
    with Served(JAXRL_SANDBOX_TOKEN="from the token file") as served:
        asyncio.run(run(example.replace(SERVER, repr(served.url))))
    assert sorted(printed(capsys.readouterr().out)) == ["0 ok", "1 error"]


@pytest.fixture
def cluster() -> Iterator[ClusterProcess]:
    process = ClusterProcess()
    try:
        yield process
    finally:
        process.close()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs Ray: pip install "jaxrl[ray]"')
@in_cluster
async def test_the_example_of_a_cluster(nodes: RayNodes) -> None:
    (example,) = (block for block in examples(SANDBOX) if CLUSTER in block)
    nodes.have(1)
    shown: list[str] = []
    example = f"def print(*words): shown.append(' '.join(map(str, words)).strip())\n{example}"
    code = compile(example.replace(CLUSTER, repr(nodes.address)), "example", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    await FunctionType(code, {"shown": shown})()
    assert shown[0] == "ok 42" and len(shown) == 2


def rows(head: str) -> list[list[str]]:
    """The cells of the table of docs/sandbox.md that begins with this head."""
    text = SANDBOX.read_text()
    lines = text[text.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def knobs(head: str) -> dict[str, tuple[str, str]]:
    """(default, range) by name."""
    return {name.strip("`"): (default, limits) for name, default, _, limits, *_ in rows(head)}


def test_the_table_of_limits_is_whole() -> None:
    defaults = {name: repr(value) for name, value in vars(Limits()).items()}
    assert {name: default for name, (default, _) in knobs("`Limits`").items()} == defaults


def test_the_table_of_results_is_whole() -> None:
    shown = [name for fields, _ in rows("field") for name in re.findall(r"`(\w+)`", fields)]
    shown += ["stdout_bytes", "stderr_bytes"]  # beside the text that they are of
    assert sorted(shown) == sorted(field.name for field in dataclasses.fields(Result))


def test_the_table_of_the_pool_is_whole() -> None:
    arguments = list(inspect.signature(Pool).parameters.values())
    defaults = {argument.name: repr(argument.default) for argument in arguments}
    assert {name: default for name, (default, _) in knobs("`Pool`").items()} == defaults
    assert list(knobs("`Pool`")) == list(defaults), "in the order of the signature"
    assert defaults.keys() <= inspect.signature(ClusterPool).parameters.keys()


def test_the_table_says_what_a_run_can_set() -> None:
    configured = {name.strip("`") for name, _, _, _, config, _ in rows("`Pool`") if config == "yes"}
    limits, fields = set(vars(Limits())), set(vars(SandboxConfig()))
    assert fields == limits | configured | {"cluster"}
    for name, (default, _) in (knobs("`Limits`") | knobs("`Pool`")).items():
        if name in fields:
            assert repr(getattr(SandboxConfig(), name)) == default, name


@pytest.mark.parametrize(
    ("head", "make"),
    [("`Limits`", Limits), ("`Pool`", functools.partial(Pool, preload=()))],
    ids=["Limits", "Pool"],
)
def test_the_least_values_are_those_that_are_checked(head: str, make: Callable[..., Any]) -> None:
    seen = 0
    for name, (_, limits) in knobs(head).items():
        words = re.fullmatch(r"(above|at least) (\d+)", limits)
        if words:
            bound = int(words[2])
            with pytest.raises(ValueError, match=f"{name}={bound if words[1] == 'above' else bound - 1}"):
                make(**{name: bound if words[1] == "above" else bound - 1})
            make(**{name: bound + 0.01 if words[1] == "above" else bound})
            seen += 1
    assert seen >= 7


def demands() -> dict[str, set[str]]:
    """What the benchmark demands of each figure, as far as it stands in its source beside the figure's name."""
    found: dict[str, set[str]] = {}
    for path in pathlib.Path(bench.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            words = (
                [part.value for part in node.args if isinstance(part, ast.Constant)]
                if isinstance(node, ast.Call)
                else []
            )
            if words and re.fullmatch(r"S\d+", str(words[0])):
                found.setdefault(words[0], set()).update(w for w in map(str, words) if re.fullmatch(r"[<>]= [\d.]+", w))
    return found


def test_the_table_of_figures_has_them_all_with_their_demands() -> None:
    shown = {figure: set(re.findall(r"`([<>]= [\d.]+)`", demand)) for figure, _, demand in rows("figure")}
    assert list(shown) == list(table.FIGURES)
    found = demands()
    assert sum(map(len, found.values())) >= 20
    for figure, wanted in found.items():
        assert wanted <= shown[figure], figure


def anchors(path: pathlib.Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: pathlib.Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{document.name} links to {target}"
