"""What pools and calls may be given, on any machine and on this one."""

import functools
import os
import resource
from collections.abc import Sequence

from jaxrl.sandbox import arguments, descriptors, jail
from jaxrl.sandbox.languages import Language
from jaxrl.sandbox.protocol import MOST_COPIES, Limits

# Neither these folders, nor one that contains them, is shown to code: they hold secrets, or other programs' files.
_PRIVATE = ("/etc", "/home", "/root", "/tmp", "/var", "/var/tmp")
_CLOSED = ("/boot", "/dev", "/proc", "/run", "/sys")  # nor anything in these, which reach into the running machine
_SECRETS = (".aws", ".config", ".docker", ".gnupg", ".kube", ".ssh")  # nor in these, of the home folder


def check_call(
    code: object,
    stdin: object,
    echo: object,
    limits: object,
    tenant: object,
    files: object,
    wanted: object,
    language: object,
    processes: object,
) -> None:
    """Refuse arguments of ``Pool.run`` of a wrong kind, and text that cannot travel.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_cell(code, echo, files, wanted)
    arguments.kind("stdin", stdin, (str, bytes), "str or bytes")
    check_limits(limits)
    check_tenant(tenant)
    arguments.kind("language", language, (str, Language), "a name or a sandbox.Language")
    arguments.flag("processes", processes)


def check_cell(code: object, echo: object, files: object, wanted: object) -> None:
    """Refuse arguments of ``Session.run`` of a wrong kind, and names and patterns that no file can have.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    arguments.kind("code", code, str, "str")
    arguments.flag("echo", echo)
    arguments.files(files)
    arguments.texts("wanted", wanted)
    for path in files or ():
        _check_unicode("a path in files", path)
    check_wanted(wanted)


def check_wanted(patterns: Sequence[str]) -> None:
    """Refuse patterns that no file below the working directory matches.

    Raises:
        ValueError: naming the pattern.
    """
    for pattern in patterns:
        _check_unicode("an entry of wanted", pattern)
        if pattern.startswith("/") or ".." in pattern.split("/"):
            raise ValueError(
                f"wanted names {pattern!r}, which leads out of the working directory; give a pattern for paths in it,"
                " such as 'out/*.txt'"
            )


def _check_unicode(name: str, text: str) -> None:
    """Refuse text that has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}={text!r} holds half a surrogate pair, which has no UTF-8; leave it out") from error


def check_tenant(tenant: object) -> None:
    """Refuse what cannot name a tenant.

    Raises:
        TypeError, ValueError: naming the value.
    """
    arguments.kind("tenant", tenant, str, "str")
    _check_unicode("tenant", tenant)


def check_session(limits: object, tenant: object, checkpoint: object, live: object) -> None:
    """Refuse arguments of ``Pool.session`` of a wrong kind.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_limits(limits)
    check_tenant(tenant)
    arguments.flag("checkpoint", checkpoint)
    arguments.flag("live", live)


def check_copies(copies: object) -> None:
    """Refuse a number of copies that ``Session.fork`` cannot be asked for.

    Raises:
        TypeError, ValueError: naming it.
    """
    arguments.whole("copies", copies)
    if copies > MOST_COPIES:
        raise ValueError(f"copies={copies} must be at most {MOST_COPIES}; fork several times for more")


def check_limits(limits: object) -> None:
    """Refuse what is neither Limits nor None.

    Raises:
        TypeError: naming the value.
    """
    arguments.kind("limits", limits, (Limits, type(None)), "a sandbox.Limits, or None for the pool's")


@functools.lru_cache(256)
def check_host(limits: Limits) -> None:
    """Refuse limits that no call can be given here, since this process is under lower ones itself.

    Raises:
        ValueError: naming both.
    """
    for name, number, ours, option in (
        ("open_files", resource.RLIMIT_NOFILE, 0, "n"),
        ("threads", resource.RLIMIT_NPROC, 0, "u"),
        ("processes", resource.RLIMIT_NPROC, 1, "u"),  # besides the parent of a program, which is ours
    ):
        limit = resource.getrlimit(number)[1]
        most = limit - ours
        if limit != resource.RLIM_INFINITY and getattr(limits, name) > most:
            raise ValueError(
                f"Limits.{name}={getattr(limits, name)} must be at most {most}, since this process has no more itself; "
                f"lower it, or raise that (ulimit -H{option})"
            )


def check_descriptors(workers: int, calls: int) -> None:
    """Refuse more calls at once than this process may have descriptors for.

    Raises:
        ValueError: naming both.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    needed = descriptors.needed(workers, calls)
    if limit != resource.RLIM_INFINITY and needed > limit:
        raise ValueError(
            f"slots + slow_slots = {calls} with workers={workers} need {needed} descriptors, and this process may have "
            f"{limit}; lower them, or raise that (ulimit -Hn)"
        )


def check_installed(program_folders: Sequence[str]) -> None:
    """Refuse folders for programs that this machine does not have.

    Raises:
        ValueError: naming the folder.
    """
    for folder in program_folders:
        if not os.path.isdir(folder):
            raise ValueError(f"program_folders names {folder!r}, which is no folder here: install it, or leave it out")


def check_shown(folder: str) -> None:
    """Refuse a folder that would show code what it must not see.

    Raises:
        ValueError: naming the folder and what lies there.
    """
    if not os.path.isabs(folder):
        raise ValueError(f"program_folders names {folder!r}, which is relative; give its path from / on")
    real = os.path.realpath(folder)
    home = os.path.realpath(os.path.expanduser("~"))
    secrets = [os.path.join(home, name) for name in _SECRETS]
    shown = [path for path in (*_PRIVATE, *_CLOSED, home, *secrets) if jail.inside(os.path.realpath(path), real)]
    shown += [path for path in (*_CLOSED, *secrets) if jail.inside(real, os.path.realpath(path))]
    if shown:
        raise ValueError(
            f"program_folders names {folder!r}, which would show {shown[0]} to the code; give the folders of the "
            "programs alone, such as '/opt/tool/bin' and '/opt/tool/lib'"
        )
