"""Which isolation this machine gives, layer by layer, and what to do about what is missing.

Every layer is tried by itself in a fork of this process, so that one refusal does not hide the next; at the end a
whole jail is built, once for a live session and once for a call. Loads no jax.
"""

import asyncio
import dataclasses
import os
import platform
import time
from collections.abc import Callable
from functools import partial

from jaxrl.sandbox import cgroups, jail, landlock, languages, remedies, seccomp, syscalls
from jaxrl.sandbox.languages import Language
from jaxrl.sandbox.pool import Pool

_LANDLOCK = "a second wall around files; boot Linux 5.13 or newer with landlock among its lsm= modules"
_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One layer.

    Attributes:
        works: False where the machine refuses it.
        needed: the sandbox does not start without it.
        detail: what was found, or the system's own words for the refusal.
        remedy: what to do where it does not work, a line for each thing.
    """

    layer: str
    works: bool
    needed: bool
    detail: str = ""
    remedy: str = ""


def examine() -> list[Finding]:
    """Try every layer, the needed ones first; ends with a call in a whole jail."""
    machine = f"Linux {platform.release()} on {platform.machine()}"
    in_the_way = "\n".join(remedies.find())
    ordinary = _try("ordinary user", jail.become_ordinary, in_the_way)
    # The right of an ordinary user to one is what counts; root's tells at least whether the kernel has any.
    make = jail.become_isolated_user if ordinary.works else partial(syscalls.unshare, syscalls.CLONE_NEWUSER)
    user_namespace = _try("user namespace", make, in_the_way)
    layers: list[tuple[str, Callable[[], object], str]] = [
        (f"{name} namespace", lambda flag=flag: syscalls.unshare(flag), in_the_way)
        for name, flag in jail.NAMESPACES.items()
    ]
    layers += [
        ("read-only copies of mounts", _copy_a_mount, in_the_way),
        ("system-call filter", _filter, "the kernel needs CONFIG_SECCOMP_FILTER"),
        ("watch over memory requests", _watch_memory, "needs Linux 5.5 or newer, and no such watch around us"),
    ]
    if ordinary.works and user_namespace.works:
        inner = [_try(name, partial(_try_inside, action), remedy) for name, action, remedy in layers]
    else:
        needed = "a user namespace" if ordinary.works else "an ordinary user"
        inner = [Finding(name, False, True, f"not tried: needs {needed}") for name, _, _ in layers]
    known = landlock.version()
    return [
        Finding("system-call tables", seccomp.supported(), True, machine, "run on x86-64 or aarch64"),
        ordinary,
        user_namespace,
        *inner,
        Finding("Landlock", known > 0, False, f"version {known}" if known else "absent", _LANDLOCK),
        _huge_pages(),
        _memory_groups(),
        *map(_language, languages.LANGUAGES.values()),
        _live_session(),
        _whole_jail(),
    ]


def describe(findings: list[Finding]) -> str:
    """A line a layer, the remedy below what is missing."""
    width = max(len(finding.layer) for finding in findings)
    lines = []
    for finding in findings:
        word = "yes" if finding.works else "NO" if finding.needed else "no"
        lines.append(f"{word:>3}  {finding.layer:<{width}}  {finding.detail}".rstrip())
        if not finding.works:
            lines += [f"     {'':<{width}}  → {remedy}" for remedy in finding.remedy.splitlines()]
    if healthy(findings):
        lines.append("The sandbox works here.")
    else:
        lines.append("The sandbox does not start here. Without isolation, at your own risk: --unsafe-sandbox")
    return "\n".join(lines)


def healthy(findings: list[Finding]) -> bool:
    return all(finding.works for finding in findings if finding.needed)


def _try(layer: str, action: Callable[[], object], remedy: str) -> Finding:
    """Run ``action`` in a fork of this process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            action()
            text = ""
        except Exception as error:  # of any kind: a layer that breaks is no layer, and nothing may leave this fork
            text = str(error.__cause__ or error) or repr(error)
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        refusal = file.read().decode()
    os.waitpid(pid, 0)
    return Finding(layer, not refusal, True, refusal, remedy)


def _try_inside(action: Callable[[], object]) -> None:
    """As an ordinary user in a user namespace of its own."""
    jail.become_isolated_user()
    action()


def _copy_a_mount() -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    tree = syscalls.clone_mount("/")
    syscalls.restrict_mount(tree, syscalls.MOUNT_ATTR_RDONLY)


def _filter() -> None:
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.template_filter().install()
    seccomp.child_filter().install()


def _watch_memory() -> None:
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.memory_watch(1 << 30).install(listen=True)


def _huge_pages() -> Finding:
    try:
        with open(_HUGE_PAGES) as file:
            chosen = file.read().partition("[")[2].partition("]")[0]
    except OSError:
        chosen = "absent"
    remedy = f"forks with large libraries cost twice as much; echo madvise > {_HUGE_PAGES}"
    return Finding("huge pages", chosen in ("always", "madvise"), False, chosen, remedy)


def _memory_groups() -> Finding:
    """Makes a group and removes it."""
    layer = "memory cgroup"
    try:
        place = cgroups.find()
        groups = cgroups.Groups(place)
        try:
            groups.take(64 << 20, 1)
        finally:
            groups.close()
    except (cgroups.CgroupsUnavailable, OSError) as error:
        reason, _, remedies = str(error).partition(". Remedies: ")
        return Finding(layer, False, False, f"{reason}; calls that start processes need one", remedies)
    others = [purpose for purpose in place.folders if purpose != "memory"]
    return Finding(layer, True, False, f"version {place.version}, with {', '.join(others) or 'nothing else'}")


def _language(language: Language) -> Finding:
    missing = language.missing()
    if missing is not None:
        places = ", ".join(languages.search_path())
        return Finding(f"language {language.name}", False, False, f"no {missing} in {places}", f"install {missing}")
    return Finding(
        f"language {language.name}", True, False, languages.locate((language.build or language.run)[0]) or ""
    )


def _whole_jail() -> Finding:
    """A pool with one bare template, and the second of two calls."""

    async def call() -> Finding:
        async with Pool(workers=1, slots=1, preload=()) as pool:
            await pool.run("1")
            began = time.perf_counter()
            result = await pool.run("6 * 7")
            milliseconds = 1e3 * (time.perf_counter() - began)
        if (str(result.status), result.stdout) != ("ok", "42\n"):
            words = f"{result.status}: {result.stderr}"
            return Finding("a call in the whole jail", False, True, words, "report this, with the lines above")
        words = f"{result.isolation}; a call took {milliseconds:.1f} ms"
        return Finding("a call in the whole jail", True, True, words)

    try:
        return asyncio.run(call())
    except jail.SandboxUnavailable as error:
        return Finding(
            "a call in the whole jail", False, True, str(error.__cause__ or error).partition(". Remedies")[0]
        )


def _live_session() -> Finding:
    """A cell, and one of a copy by copy-on-write, neither in a process that had to be rebuilt."""
    layer = "live session"
    remedy = "copies are rebuilt from their cells instead, which costs time; in Docker --cap-add SYS_PTRACE"

    async def cells() -> Finding:
        async with Pool(workers=1, slots=1, preload=()) as pool, pool.session() as session:
            results = [await session.run("x = 42")]
            (copy,) = await session.fork(1)
            async with copy:
                results.append(await copy.run("x"))
        first, second = results
        if not any(result.rebuilt for result in results) and (str(first.status), second.stdout) == ("ok", "42\n"):
            return Finding(layer, True, False, "copied by copy-on-write")
        words = "the copy had to be rebuilt" if second.rebuilt else f"{second.status}: {first.stderr}{second.stderr}"
        return Finding(layer, False, False, words, remedy)

    try:
        return asyncio.run(cells())
    except jail.SandboxUnavailable as error:
        return Finding(layer, False, False, f"not tried: {str(error.__cause__ or error).partition('. Remedies')[0]}")


def main() -> int:
    """``jaxrl sandbox doctor``; 0 if the sandbox works here, else 1."""
    findings = examine()
    print(describe(findings))
    return 0 if healthy(findings) else 1
