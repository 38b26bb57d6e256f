"""Names of targets, and what is said of names that are none."""

import itertools

import pytest

from jaxrl.check.targets import CHIPS, EXAMPLES, GIB, SHAPES, parse
from jaxrl.config import ConfigError


@pytest.mark.parametrize(
    ("name", "devices", "topology"),
    [
        ("v5p-64", 64, "v5p:4x4x4"),
        ("v5e-256", 256, "v5e:16x16"),
        ("V5E-8", 8, "v5e:2x4"),
        ("2x v5e-256", 512, "v5e:16x16"),
        ("2xv5e-256", 512, "v5e:16x16"),
        ("h200x8", 8, "1x1x8"),
        ("h200x64", 64, "1x8x8"),
        ("h100x3", 3, "1x1x3"),
    ],
)
def test_names(name: str, devices: int, topology: str) -> None:
    target = parse(name)
    assert (target.devices, target.topology) == (devices, topology)
    assert parse(target.name) == target


def test_every_shape_has_as_many_chips_as_it_is_said_to() -> None:
    for sizes in SHAPES.values():
        for count, shape in sizes.items():
            product = 1
            for side in shape.split("x"):
                product *= int(side)
            assert product == count, shape


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p64", r"no such target; did you mean v5p-64\?"),
        ("h20x8", r"no such target; did you mean h200x8\?"),
        ("v5q-64", r"did you mean v5p-64\?.*this\. For example v5p-64, v5e-8"),
        ("b200x8", r"no such target"),
        ("v4-8", r"no such target"),
        ("v5e-12", r"no such slice; choose one of v5e-4, v5e-8, v5e-16"),
        ("h200x12", r"12 GPUs are no number of whole hosts; give 1 to 8, or a multiple of 8"),
        ("h200x0", r"0 GPUs"),
        ("0x v5e-8", r"no such slice"),
        ("", r"no such target"),
    ],
)
def test_what_is_no_target(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(name)


def test_examples_are_targets() -> None:
    assert all(parse(name).name == name for name in EXAMPLES)


def test_what_jax_can_use_of_the_memory() -> None:
    assert parse("v5e-8").memory() == int(15.75 * GIB)
    assert parse("h200x8").memory() == int(0.75 * CHIPS["h200"].memory)
    assert parse("h200x8").memory(0.9) == int(0.9 * CHIPS["h200"].memory)
    assert parse("v5e-8").memory(0.9) == int(15.75 * GIB)


def test_larger_targets_of_a_kind() -> None:
    assert list(parse("v5e-64").and_larger()) == [parse("v5e-64"), parse("v5e-128"), parse("v5e-256")]
    assert list(parse("2x v5e-128").and_larger()) == [parse("2x v5e-128"), parse("2x v5e-256")]
    assert list(itertools.islice(parse("h200x8").and_larger(), 3)) == [parse(f"h200x{count}") for count in (8, 16, 32)]


def test_the_smallest_targets_of_other_kinds() -> None:
    assert parse("v5e-8").other_kinds() == [parse("v5p-4"), parse("v6e-4")]
    assert parse("2x v5p-64").other_kinds() == [parse("2x v5e-4"), parse("2x v6e-4")]
    assert parse("h100x8").other_kinds() == [parse("h200x1")]
