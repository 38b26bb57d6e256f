"""What the doctor says is in the way, for the machines that users have: as trees of what their kernels show."""

import os
import pathlib
import re
import sys

import pytest

from jaxrl.sandbox import remedies

SETTINGS = "proc/sys/user/max_user_namespaces"
DEBIAN = "proc/sys/kernel/unprivileged_userns_clone"
UBUNTU = "proc/sys/kernel/apparmor_restrict_unprivileged_userns"
STATUS = "proc/self/status"
MAP = "proc/self/uid_map"
LABEL = "proc/self/attr/current"
FREE = {
    SETTINGS: "63000\n",
    DEBIAN: "1\n",
    UBUNTU: "0\n",
    STATUS: "Name:\tpython\nSeccomp:\t0\n",
    LABEL: "unconfined\n",
}

MACHINES = {
    "none at all": ({SETTINGS: "0\n"}, ["sysctl -w user.max_user_namespaces=15000"]),
    "older Debian": ({DEBIAN: "0\n"}, ["sysctl -w kernel.unprivileged_userns_clone=1"]),
    "Ubuntu 24.04": ({UBUNTU: "1\n"}, ["sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"]),
    "Docker": (
        {STATUS: "Name:\tpython\nSeccomp:\t2\nSeccomp_filters:\t1\n", LABEL: "docker-default (enforce)\n"},
        ["--security-opt seccomp=unconfined", "docker-default holds.*--security-opt apparmor=unconfined"],
    ),
    "Docker on Ubuntu 24.04": (
        {UBUNTU: "1\n", STATUS: "Seccomp:\t2\n", LABEL: "docker-default (enforce)\n"},
        ["apparmor_restrict_unprivileged_userns=0", "seccomp=unconfined", "apparmor=unconfined"],
    ),
    "Kubernetes": (
        {STATUS: "Seccomp:\t2\n", LABEL: "cri-containerd.apparmor.d (enforce)\n"},
        ["seccompProfile.type: Unconfined", "cri-containerd.apparmor.d.*appArmorProfile.type: Unconfined"],
    ),
    "Podman on Fedora": (
        {STATUS: "Seccomp:\t2\n", LABEL: "system_u:system_r:container_t:s0:c1,c2\0"},
        ["seccomp=unconfined", "--security-opt label=disable"],
    ),
    "a profile that only complains": ({LABEL: "python (complain)\n"}, ["none of the usual reasons"]),
    "a label of SELinux outside of containers": (
        {LABEL: "unconfined_u:unconfined_r:unconfined_t:s0\0"},
        ["none of the usual reasons"],
    ),
    "root in a namespace of one user": (
        {STATUS: "Uid:\t0\t0\t0\t0\n", MAP: "         0          0          1\n"},
        ["without user 65534.*: map that user too"],
    ),
    "root of the host": ({STATUS: "Uid:\t0\t0\t0\t0\n", MAP: "0 0 4294967295\n"}, ["none of the usual reasons"]),
    "root that is an ordinary user outside": (
        {STATUS: "Uid:\t0\t0\t0\t0\n", MAP: "0 1000 1\n"},
        ["none of the usual reasons"],
    ),
    "an ordinary user in a namespace of one": (
        {STATUS: "Uid:\t1000\t1000\t1000\t1000\n", MAP: "1000 0 1\n"},
        ["none of the usual reasons"],
    ),
    "nothing": ({}, ["none of the usual reasons.*CONFIG_USER_NS"]),
}


def machine(folder: pathlib.Path, shown: dict[str, str]) -> str:
    for path, text in shown.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return str(folder)


@pytest.mark.parametrize("name", MACHINES)
def test_each_thing_in_the_way_and_no_other_has_its_remedy(name: str, tmp_path: pathlib.Path) -> None:
    shown, expected = MACHINES[name]
    found = remedies.find(machine(tmp_path, FREE | shown), "6.8.0-31-generic")
    assert len(found) == len(expected), found
    for remedy, words in zip(found, expected, strict=True):
        assert re.search(words, remedy), remedy


def test_a_machine_that_shows_nothing(tmp_path: pathlib.Path) -> None:
    assert remedies.find(str(tmp_path), "6.8.0") == remedies.find(machine(tmp_path, FREE), "6.8.0")


@pytest.mark.parametrize(("release", "old"), [("5.4.0-26-generic", True), ("5.11.22", True), ("5.12.0", False)])
def test_old_kernels(release: str, old: bool, tmp_path: pathlib.Path) -> None:
    found = remedies.find(machine(tmp_path, FREE), release)
    assert (f"boot Linux 5.12 or newer; this is {release}" in found) is old
    assert len(found) == 1


def test_the_profile_for_ubuntu_is_of_the_interpreter_that_the_sandbox_starts(tmp_path: pathlib.Path) -> None:
    (remedy,) = remedies.find(machine(tmp_path, FREE | {UBUNTU: "1"}), "6.8.0")
    interpreter = os.path.realpath(sys.executable)
    assert (
        f"\\nprofile jaxrl {interpreter} flags=(unconfined) {{\\n  userns,\\n}}\\n' > /etc/apparmor.d/jaxrl" in remedy
    )
