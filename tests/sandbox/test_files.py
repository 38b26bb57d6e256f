"""Files that a call is given and files that it returns."""

import os
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.records import ToolStatus
from jaxrl.sandbox import Limits, files
from tests.sandbox.driver import LIMITS, Driver


@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda t: t.isprintable()), st.binary(max_size=50)))
def test_files_survive_the_way(content: dict[str, bytes]) -> None:
    assert dict(files.unpack(files.pack(content))) == content


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../b", "a//b", ".", "a\0b", "x" * 300])
def test_paths_that_leave_the_directory_are_refused(sandbox: Driver, name: str) -> None:
    with pytest.raises(ValueError, match="is no plain relative path"):
        sandbox.run("1", files={name: b""})


def test_a_file_in_a_file_is_refused(sandbox: Driver) -> None:
    with pytest.raises(ValueError, match="file 'a/b/c' lies in 'a/b', which is given as a file"):
        sandbox.run("1", files={"a/b/c": b"", "a/b": b"", "a/d": b""})


def test_files_larger_than_the_directory_are_refused(sandbox: Driver) -> None:
    with pytest.raises(ValueError, match=r"2 files of 9437184 bytes .* do not fit: .*\(8388608 bytes\)"):
        sandbox.run("1", files={"a": bytes(9 << 20), "b": b""})


@pytest.mark.parametrize("size", [10, 300_000], ids=["in the packet", "in a memory file"])
def test_a_call_reads_what_it_is_given_and_returns_what_it_wrote(sandbox: Driver, size: int) -> None:
    code = """
import os
text = open('in/data.csv').read()
os.makedirs('out/deep')
open('out/deep/copy.csv', 'w').write(text[::-1])
open('plot.png', 'wb').write(bytes([0, 255]))
open('other.txt', 'w').write('not asked for')
"""
    before = sandbox.resting()
    descriptors = len(os.listdir(f"/proc/{sandbox.pool.warden_pid}/fd"))
    text = "0123456789" * (size // 10)
    result = sandbox.run(code, files={"in/data.csv": text.encode()}, wanted=["*.csv", "plot.png"])
    assert result.status == ToolStatus.OK, result
    assert result.files == {
        "in/data.csv": text.encode(),
        "out/deep/copy.csv": text[::-1].encode(),
        "plot.png": bytes([0, 255]),
    }
    assert (sandbox.resting(), result.files_left_out) == (before, 0)
    assert len(os.listdir(f"/proc/{sandbox.pool.warden_pid}/fd")) == descriptors
    assert sandbox.run("import os; os.listdir('.')", wanted=["*"]).stdout == "[]\n", "nothing is left for the next"


def test_files_come_back_however_the_call_ended(sandbox: Driver) -> None:
    write = "open('half', 'w').write('done')\n"
    for end, status in (
        ("import os; os._exit(3)", ToolStatus.ERROR),
        ("while True: pass", ToolStatus.TIMEOUT),
        ("import os; os.kill(os.getpid(), 9) or os.abort()", None),
    ):
        result = sandbox.run(write + end, wanted=["half"])
        assert result.files == {"half": b"done"}, result
        assert status is None or result.status == status


def test_what_does_not_fit_is_left_out_and_counted(sandbox: Driver) -> None:
    code = "for n, size in enumerate([600_000, 600_000, 10]): open(f'f{n}', 'wb').write(bytes(size))"
    limits = Limits(**{**LIMITS.__dict__, "files_mib": 1})
    result = sandbox.run(code, wanted=["f*"], limits=limits)
    assert (sorted(result.files), result.files_left_out) == (["f0", "f2"], 1)


def test_what_cannot_come_back_is_counted(sandbox: Driver) -> None:
    code = r"""
import os
os.makedirs('/'.join('abcdefgh'))
open('a/b/c/d/e/f/g/h/near.txt', 'w').write('8 folders down')
os.makedirs('a/b/c/d/e/f/g/h/i/j')
for name in ('far.txt', 'farther.txt'): open('a/b/c/d/e/f/g/h/i/j/' + name, 'w')
os.mkdir(b'odd \xff')
for name in (b'odd \xff/in.txt', b'\xfe.txt', b'\xfe.png'): open(name, 'w')
"""
    result = sandbox.run(code, wanted=["*.txt"])
    assert result.files == {"a/b/c/d/e/f/g/h/near.txt": b"8 folders down"}, result
    assert result.files_left_out == 3, "the folder that is too deep, and two names that are no text"
    assert sandbox.run(code, wanted=["b/*", "x.txt"]).files_left_out == 0, "the deep folder is none of these"
    assert sandbox.run(code, wanted=["a/b/*"]).files_left_out == 1


def test_the_folders_of_given_files_count_as_well(sandbox: Driver) -> None:
    """What is let through can be laid down, and fills the directory to the last inode."""
    given = {f"{n}/a/b/c": b"" for n in range(1023)}
    code = "import os\ntry: os.mkdir('one more')\nexcept OSError as error: print(error.strerror)"
    result = sandbox.run(code, files=given | {"last/a/b": b""})
    assert (result.status, result.stdout) == (ToolStatus.OK, "No space left on device\n"), result
    with pytest.raises(ValueError, match="1024 files in 3072 folders do not fit: at most 4096"):
        sandbox.run(code, files=given | {"last/a/b/c": b""})


def test_promise_6_no_link_leads_the_collector_outside(sandbox: Driver, tmp_path: pathlib.Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    code = f"""
import os
os.symlink({str(secret)!r}, 'link'); os.symlink('/etc', 'folder'); os.symlink('/proc/self', 'proc')
os.mkfifo('pipe'); open('honest', 'w').write('mine'); os.mkdir('locked', 0)
os.mkdir(b'not \\xff text')
deep = '.'
for n in range(30): deep += '/d'; os.mkdir(deep)
open(deep + '/buried', 'w')
"""
    result = sandbox.run(code, wanted=["*"])
    assert (result.status, result.files) == (ToolStatus.OK, {"honest": b"mine"}), result
    unread = 1 if os.geteuid() == 0 else 2  # the folders that are too deep; and the locked one, which root may read
    assert result.files_left_out == unread, "a link is no file, so it is not even tried"


def test_promise_6_a_link_is_not_read_even_if_taken_for_a_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "secret").write_text("of the host")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        assert files._read(directory, "link", 100) is None
        assert files._read(directory, "secret", 100) == b"of the host"
    finally:
        os.close(directory)


def test_without_a_jail_files_work_too() -> None:
    with Driver(workers=1, slots=1, preload=(), unsafe=True) as driver:
        result = driver.run("open('b', 'w').write(open('a').read() * 2)", files={"a": b"x"}, wanted=["b"])
        assert result.files == {"b": b"xx"}
