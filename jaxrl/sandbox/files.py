"""Files that a call is given and files that it returns: their bytes on the way, and the trusted side's look at them."""

import contextlib
import fnmatch
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence

MOST_INODES = 4096  # of a working directory, itself included: files, folders, links
_ENTRY = struct.Struct("<HI")  # lengths of name and content
_PAGE = 4096  # what a file takes of the directory, at least
_MOST = 1024  # files that are given, and that are returned
_DEEPEST = 8  # folders that the search for returned files goes down
_WILDCARD = re.compile(r"[*?[]")


def check(given: Mapping[str, bytes], room: int) -> None:
    """Refuse files that a call cannot be given.

    Args:
        given: content by path relative to the call's working directory.
        room: bytes of that directory.

    Raises:
        ValueError: naming the path, or the sizes.
    """
    needed: set[str] = set()  # folders
    for name in given:
        parts = name.split("/")
        if not name or "\0" in name or len(name.encode()) > 255 or {"", ".", ".."} & set(parts):
            raise ValueError(
                f"file {name!r} is no plain relative path of at most 255 bytes; give one such as 'a/b.csv'"
            )
        folders = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
        clash = next((folder for folder in folders if folder in given), None)
        if clash is not None:
            raise ValueError(f"file {name!r} lies in {clash!r}, which is given as a file; rename one of them")
        needed.update(folders)
    total = sum(-(-len(data) // _PAGE) * _PAGE for data in given.values())
    if total > room or len(given) > _MOST:
        raise ValueError(
            f"{len(given)} files of {total} bytes (in pages of {_PAGE}) do not fit: at most {_MOST} files and "
            f"Limits.disk_mib ({room} bytes)"
        )
    if 1 + len(given) + len(needed) > MOST_INODES:
        raise ValueError(
            f"{len(given)} files in {len(needed)} folders do not fit: at most {MOST_INODES} with the directory itself; "
            "put more of them into one folder"
        )


def pack(files: Mapping[str, bytes]) -> bytes:
    """Names and contents in a row."""
    return b"".join(_ENTRY.pack(len(name.encode()), len(data)) + name.encode() + data for name, data in files.items())


def unpack(packed: bytes) -> Iterator[tuple[str, bytes]]:
    """What ``pack`` was given."""
    start = 0
    while start < len(packed):
        name_length, length = _ENTRY.unpack_from(packed, start)
        start += _ENTRY.size
        name = packed[start : start + name_length].decode()
        start += name_length
        yield name, packed[start : start + length]
        start += length


def place(packed: bytes, directory: str = ".") -> None:
    """Write the files into a directory; called by a child before its snippet begins.

    Raises:
        OSError: one cannot be written, or does not fit; then none of them is there.
    """
    placed = []
    try:
        for name, data in unpack(packed):
            path = os.path.join(directory, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                placed.append(path)
                file.write(data)
    except OSError:
        for path in placed:
            with contextlib.suppress(OSError):
                os.remove(path)
        raise


def gather(directory: int, patterns: Sequence[str], room: int) -> tuple[dict[str, bytes], int]:
    """The files below an open directory whose relative paths match, smallest path first.

    The directory is a snippet's own work: links are not followed, and only regular files are read.

    Args:
        directory: descriptor; stays open.
        patterns: as for ``fnmatch``; ``*`` matches ``/`` too.
        room: bytes to return at most; a file that does not fit is left out whole.

    Returns:
        Contents by path, and how many were left out: matching files, and folders where some may lie that could not be
        searched.
    """
    found: dict[str, bytes] = {}
    left_out = 0
    for name, parent in _walk(directory, "", 0):
        if parent is None:
            left_out += any(_may_match_below(name, pattern) for pattern in patterns)
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            data = _read(parent, name.rpartition("/")[2], room) if len(found) < _MOST and _is_text(name) else None
            if data is None:
                left_out += 1
            else:
                found[name] = data
                room -= len(data)
    return found, left_out


def _walk(directory: int, prefix: str, depth: int) -> Iterator[tuple[str, int | None]]:
    """Paths of regular files and the descriptors of their folders, open while the generator stands there.

    A folder that is too deep, or cannot be read, comes itself, with "/" at its end and None.
    """
    with os.scandir(directory) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        name = prefix + entry.name
        if entry.is_file(follow_symlinks=False):
            yield name, directory
        elif entry.is_dir(follow_symlinks=False):
            try:
                if depth == _DEEPEST:
                    raise OSError(f"{name!r} lies deeper than {_DEEPEST} folders")
                below = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            except OSError:
                yield name + "/", None
                continue
            try:
                yield from _walk(below, name + "/", depth + 1)
            finally:
                os.close(below)


def _may_match_below(folder: str, pattern: str) -> bool:
    """Whether the pattern may match a path that begins with the folder's."""
    fixed, *rest = _WILDCARD.split(pattern, maxsplit=1)
    return fixed.startswith(folder) or (bool(rest) and folder.startswith(fixed))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(directory: int, name: str, room: int) -> bytes | None:
    """The content of a regular file; None if it is larger than ``room`` or cannot be read."""
    with contextlib.suppress(OSError):
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
        with open(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and size <= room:
                return file.read(size)
    return None
