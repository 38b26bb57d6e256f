"""The search for remedies: which are judged, in which rounds, and what is found."""

import dataclasses
import threading

import pytest

from jaxrl.check import mending, remedies, run, targets
from jaxrl.check.programs import Resident
from jaxrl.check.remedies import Remedy
from jaxrl.config import Config

ASKED = targets.parse("v5e-8")
NOTHING = Resident(*[0] * len(dataclasses.fields(Resident)))


def remedy(price: float, target: targets.Target = ASKED, **settings: int) -> Remedy:
    return Remedy({f"EngineConfig.{name}": value for name, value in settings.items()}, target, price, ("words",))


def never(one: Remedy, other: Remedy) -> bool:
    return False


def test_the_cheapest_three_that_help_are_found_and_no_more_are_judged() -> None:
    proposed = (remedy(price, slots=price) for price in range(1, 100))
    found, tried = mending.search(proposed, lambda one: "fits" if one.price % 2 else None, never)
    assert [one.price for one, _ in found] == [1, 3, 5]
    assert {outcome for _, outcome in found} == {"fits"}
    assert tried == 5 and next(proposed).price == 6  # 1, 2, 3; then one in place of 2; then one in place of 4


def test_what_says_little_beside_one_that_helps_is_not_judged_but_beside_one_that_does_not_it_is() -> None:
    judged: list[float] = []

    def judge(one: Remedy) -> bool | None:
        judged.append(one.price)
        return None if one.price == 1 else True

    def same_slots(one: Remedy, other: Remedy) -> bool:
        return one.settings == other.settings

    proposed = iter([remedy(price, slots=slots) for price, slots in ((1, 8), (2, 8), (3, 8), (4, 16))])
    found, tried = mending.search(proposed, judge, same_slots)
    assert [one.price for one, _ in found] == [2, 4] and tried == 3
    assert sorted(judged) == [1, 2, 4]


def test_what_a_cheaper_one_found_later_makes_pointless_gives_up_its_place() -> None:
    """1 is judged with 3 and 4 and fails; then 2, which had waited for 1, helps, and 3 says little beside it."""

    def little(one: Remedy, other: Remedy) -> bool:
        return (one.price, other.price) in ((2, 1), (3, 2))

    proposed = (remedy(price, slots=price) for price in range(1, 100))
    found, _ = mending.search(proposed, lambda one: None if one.price == 1 else True, little)
    assert [one.price for one, _ in found] == [2, 4, 5]


def test_no_more_than_so_many_are_judged_and_none_where_none_are_proposed() -> None:
    found, tried = mending.search((remedy(price) for price in range(1, 100)), lambda one: None, never)
    assert found == [] and tried == mending.TRIES
    assert mending.search(iter(()), lambda one: True, never) == ([], 0)


def test_two_are_judged_side_by_side() -> None:
    both = threading.Barrier(mending.AT_ONCE, timeout=30)

    def judge(one: Remedy) -> bool:
        if one.price < 3:
            both.wait()
        return True

    found, _ = mending.search((remedy(price) for price in range(1, 4)), judge, never)
    assert len(found) == 3


def test_what_a_judge_raises_ends_the_search() -> None:
    def judge(one: Remedy) -> None:
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        mending.search(iter([remedy(1.0)]), judge, never)


@pytest.mark.parametrize("name", ["v5e-8", "v6e-4", "h100x8"])
def test_three_remedies_are_found_for_the_large_recipe_where_estimates_are_right(name: str) -> None:
    """With the real proposals, judged by the estimate they were proposed by, which says nothing of wider targets."""
    recipe, asked = run.configuration("rstar2_14b", []), targets.parse(name)
    base = run.Result(recipe, asked, asked.devices, asked.memory(), 0, NOTHING, {})

    def needs(config: Config, devices: int) -> int:
        return run._needs(config, devices, base=base)

    def judge(one: Remedy) -> int | None:
        needed = needs(remedies.changed(recipe, one.settings), one.target.devices)
        return needed if needed <= one.target.memory() else None

    proposed = remedies.candidates(recipe, asked, asked.devices, asked.memory(), needs)
    found, tried = mending.search(proposed, judge, lambda one, other: remedies.says_little(one, other, recipe, asked))
    assert tried == len(found) == mending.REMEDIES
    assert len({one.options(asked) for one, _ in found}) == mending.REMEDIES
    assert needs(recipe, asked.devices) > asked.memory()
