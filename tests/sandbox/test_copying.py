"""Copies of a working directory that somebody else has filled."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import pytest

from jaxrl.sandbox import copying


@contextlib.contextmanager
def opened(*folders: pathlib.Path) -> Iterator[list[int]]:
    descriptors = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY) for folder in folders]
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@pytest.fixture
def folders(tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    return source, target


def test_contents_modes_times_links_and_holes(folders: tuple[pathlib.Path, pathlib.Path]) -> None:
    source, target = folders
    (source / "a/b").mkdir(parents=True)
    (source / "a/b/data").write_bytes(os.urandom(3 << 20))
    (source / "empty").write_bytes(b"")
    with open(source / "sparse", "wb") as file:
        file.write(b"first")
        file.seek(8 << 20)
        file.write(b"last")
        file.truncate(16 << 20)
    (source / "out").symlink_to("/etc/passwd")
    (source / "a/run").write_text("x")
    os.chmod(source / "a/run", 0o4751)
    os.utime(source / "a/run", ns=(1_000_000_007, 2_000_000_009))
    os.chmod(source / "a/b", 0o750)
    os.mkfifo(source / "pipe")
    with opened(source, target) as (reading, writing):
        copying.copy_tree(reading, writing)
    assert sorted(path.name for path in target.rglob("*")) == ["a", "b", "data", "empty", "out", "run", "sparse"]
    for name in ("a/b/data", "empty", "sparse"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert (target / "sparse").stat().st_blocks == (source / "sparse").stat().st_blocks
    assert os.readlink(target / "out") == "/etc/passwd"
    status = (target / "a/run").stat()
    assert (status.st_mode & 0o7777, status.st_mtime_ns) == (0o751, 2_000_000_009)
    assert (target / "a/b").stat().st_mode & 0o777 == 0o750


def test_links_are_never_followed(folders: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path) -> None:
    source, target = folders
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (source / "folder").symlink_to(outside)
    (source / "file").symlink_to(outside / "secret")
    with opened(source, target) as (reading, writing):
        copying.copy_tree(reading, writing)
    assert (target / "folder").is_symlink() and (target / "file").is_symlink()


def test_too_deep_is_refused_and_leaves_no_descriptor(folders: tuple[pathlib.Path, pathlib.Path]) -> None:
    source, target = folders
    (source / "/".join("d" * 40)).mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd"))
    with opened(source, target) as (reading, writing), pytest.raises(OSError, match="deeper than 32"):
        copying.copy_tree(reading, writing)
    assert len(os.listdir("/proc/self/fd")) == before
