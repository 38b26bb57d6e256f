"""The walls: refused rather than forgotten, the same for root and for an ordinary user, and absent only by request."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxrl.sandbox import jail
from tests.sandbox.driver import Driver

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

USE = """
import asyncio, json, sys
from jaxrl.sandbox import Limits, Pool, SandboxUnavailable
async def use(code, **settings):
    try:
        async with Pool(workers=1, slots=2, **settings) as pool:
            result = await pool.run(code)
            return {name: getattr(result, name) for name in ("status", "stdout", "stderr", "isolation")}
    except SandboxUnavailable as error:
        return {"refused": str(error)}
"""

# Refuse unshare and clone of a user namespace to this process and its children, as a container's filter does.
REFUSE = """
import errno
from jaxrl.sandbox import seccomp, syscalls
syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
seccomp.Filter([*seccomp._head(), *seccomp._deny({"unshare": (272, 97)}, errno.EPERM), (6, 0, 0, 0x7FFF0000)]).install()
"""

# Root becomes nobody in a private mount namespace where the interpreter is reachable, whatever folder it lies in.
ORDINARY = """
import os, sys
from jaxrl.sandbox import syscalls as s
def open_way(path):
    blocked = [f for f in reversed([path, *path.parents]) if not os.stat(f).st_mode & 0o001]
    if blocked:
        tree = s.clone_mount(str(path))
        s.mount("tmpfs", str(blocked[0]), "tmpfs", 0, "mode=755")
        os.makedirs(path)
        s.attach_mount(tree, str(path))
from pathlib import Path
s.unshare(s.CLONE_NEWNS)
s.mount("none", "/", "", s.MS_REC | s.MS_PRIVATE)
for place in {sys.base_prefix, sys.prefix, sys.argv[1]}:
    open_way(Path(place).resolve())
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
os.chdir("/")
os.execv(sys.executable, [sys.executable, "-c", sys.argv[2]])
"""


def python(*arguments: str) -> dict:
    """What a fresh interpreter prints, as JSON."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "HOME": "/nowhere",
    }
    done = subprocess.run(
        [sys.executable, "-c", *arguments], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_refused_namespaces_refuse_the_pool_unless_unsafe_is_asked_for() -> None:
    script = REFUSE + USE + "print(json.dumps([asyncio.run(use('6*7', preload=(), unsafe=u)) for u in (False, True)]))"
    jailed, unsafe = python(script)
    assert "namespace was refused" in jailed["refused"] and "--unsafe-sandbox" in jailed["refused"]
    assert (unsafe["status"], unsafe["stdout"], unsafe["isolation"]) == ("ok", "42\n", "unsafe: none")


def test_ordinary_user() -> None:
    code = (
        "import numpy, os\nopen('f', 'w').write('x')\n"
        "try: os.listdir('/etc'); print('GOT THROUGH')\nexcept OSError: pass\n"
        "print(numpy.arange(2), os.getpid(), os.listdir('.'))"
    )
    script = USE + f"print(json.dumps(asyncio.run(use({code!r}, preload=('numpy',)))))"
    if os.geteuid() == 0:
        result = python(ORDINARY, str(REPOSITORY), script)
    else:
        result = python(script)
    assert result.get("status") == "ok", result
    assert result["stdout"] == "[0 1] 1 ['f']\n"
    assert result["isolation"] == jail.JAILED


def test_view_of_the_host_is_the_interpreter_and_nothing_else(sandbox: Driver) -> None:
    view = jail.plan_view(("numpy",))
    code = """
import os
files = []
for folder, folders, names in os.walk("/"):
    if any(folder == f or folder.startswith(f + "/") for f in VIEW):
        folders.clear()
    else:
        files += [os.path.join(folder, name) for name in names]
sorted(files)""".replace("VIEW", repr(view.folders))
    assert eval(sandbox.run(code).stdout) == ["/dev/null", "/dev/random", "/dev/urandom", "/dev/zero"]
    assert not any(pathlib.Path(f) == REPOSITORY or REPOSITORY.is_relative_to(f) for f in view.folders)


def test_folders_of_the_view_do_not_lie_in_each_other() -> None:
    folders = jail.plan_view(("numpy",)).folders
    assert not [(a, b) for a in folders for b in folders if a != b and a.startswith(b + "/")]


def test_packages_in_the_temporary_folder_move_the_working_directory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mounting the call's directory over /tmp would hide them."""
    folder = pathlib.Path("/tmp/jaxrl-test-packages")
    folder.mkdir(mode=0o755, exist_ok=True)
    try:
        (folder / "found_in_tmp.py").write_text("value = 11")
        monkeypatch.syspath_prepend(str(folder))
        with Driver(workers=1, slots=1, preload=("found_in_tmp",)) as driver:
            result = driver.run("import found_in_tmp, os; found_in_tmp.value, os.getcwd(), os.listdir()")
        assert result.stdout == "(11, '/sandbox', [])\n", result
    finally:
        (folder / "found_in_tmp.py").unlink()
        folder.rmdir()


def test_the_doctor_names_what_is_missing() -> None:
    done = subprocess.run([sys.executable, "-m", "jaxrl.cli", "sandbox", "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "The sandbox works here." and f"{jail.JAILED}; a call took" in lines[-2]
    assert not any(line.startswith(" NO") for line in lines)

    script = REFUSE + "import sys; from jaxrl import cli; sys.exit(cli.main(['sandbox', 'doctor']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert " NO  user namespace              [Errno 1] unshare(0x10000000): Operation not permitted" in done.stdout
    assert "→ a system-call filter is around this process, as container runtimes have it" in done.stdout
    assert done.stdout.count("not tried: needs a user namespace") == 8
    assert done.stdout.splitlines()[-1].endswith("at your own risk: --unsafe-sandbox")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's own namespace of one user maps the root of the host")
def test_the_doctor_and_the_pool_say_who_is_missing_in_a_namespace_of_root_alone() -> None:
    script = """
import contextlib, io
from jaxrl.sandbox import doctor, syscalls
syscalls.unshare(syscalls.CLONE_NEWUSER)
for name, line in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(line)
with contextlib.redirect_stdout(io.StringIO()) as said:
    code = doctor.main()
print(json.dumps([code, said.getvalue(), asyncio.run(use("1", preload=()))]))"""
    code, said, pool = python(USE + script)
    remedy = "this process is root in a user namespace without user 65534"
    assert code == 1 and " NO  ordinary user" in said and f"→ {remedy}" in said and "none of the usual" not in said
    assert "yes  user namespace" in said and said.count("not tried: needs an ordinary user") == 8
    assert remedy in pool["refused"]


def test_the_doctor_and_the_pool_name_the_setting_that_forbids_namespaces() -> None:
    """An ordinary user's namespace in which the kernel's own limit allows no other, as a host may be set up."""
    script = """
import contextlib, io
from jaxrl.sandbox import doctor, jail
jail.become_isolated_user()
with open("/proc/sys/user/max_user_namespaces", "w") as file:
    file.write("0")
with contextlib.redirect_stdout(io.StringIO()) as said:
    code = doctor.main()
print(json.dumps([code, said.getvalue(), asyncio.run(use("1", preload=()))]))"""
    way = (ORDINARY, str(REPOSITORY)) if os.geteuid() == 0 else ()
    code, said, pool = python(*way, USE + script)
    remedy = "user namespaces are switched off: as root sysctl -w user.max_user_namespaces=15000"
    assert code == 1 and " NO  user namespace              [Errno 28]" in said and f"→ {remedy}" in said
    assert remedy in pool["refused"] and "kernel." not in pool["refused"], "and no setting that is not at fault"
