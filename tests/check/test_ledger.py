"""What lies on a device at each moment."""

import dataclasses

import pytest

from jaxrl.check.ledger import fits, fullest, moments
from jaxrl.check.programs import Resident
from jaxrl.check.worker import Compiled

RESIDENT = Resident(weights=10, optimizer=20, offloaded=0, reference=5, engine=4, pages=40, gradients=10, hand_over=2)
PROGRAMS = {
    "first": Compiled(results=11, temporary=100),
    "more": Compiled(results=1, temporary=110),
    "apply": Compiled(temporary=7),
    "score": Compiled(results=2, temporary=50),
    "decode": Compiled(results=1, temporary=30),
}
STAYS = 10 + 20 + 5 + 4 + 40


def totals(resident: Resident = RESIDENT, **how: bool) -> dict[str, int]:
    return {moment.name: moment.total for moment in moments(resident, 3, PROGRAMS, **how)}


def test_every_moment() -> None:
    assert totals() == {
        "first": STAYS + 10 + 100 + 3,  # its result is the gradients
        "more": STAYS + 10 + 110 + 1 + 3,
        "apply": STAYS + 10 + 7,
        "score": STAYS + 52 + 3,
        "decode": STAYS + 31,
        "hand over": STAYS + 2,
    }


def test_offloaded_moments_are_there_for_the_update_alone() -> None:
    offloaded = dataclasses.replace(RESIDENT, optimizer=0, offloaded=20)
    here, away = totals(), totals(offloaded)
    assert away["apply"] == here["apply"]
    assert {name: here[name] - away[name] for name in here if name != "apply"} == dict.fromkeys(
        here.keys() - {"apply"}, 20
    )


def test_rounds_beside_the_update_find_its_gradients() -> None:
    assert totals(ahead=True)["decode"] == totals()["decode"] + 10
    assert totals(ahead=True)["more"] == totals()["more"]


def test_devices_apart_hold_what_is_theirs() -> None:
    apart = totals(apart=True, ahead=True)
    assert apart["decode"] == 4 + 40 + 31
    assert apart["more"] == totals()["more"] - 44
    assert apart["hand over"] == 10 + 20 + 5 + 2


def test_what_lays_out_weights_anew_counts_while_they_travel() -> None:
    found = moments(RESIDENT, 3, PROGRAMS | {"hand over": Compiled(arguments=1, results=2, temporary=6)})
    assert [moment.name for moment in found] == [*PROGRAMS, "hand over"]
    assert found[-1].total == STAYS + 2 + 9


def test_a_critics_update_finds_its_own_gradients_and_rounds_beside_it_the_larger() -> None:
    resident = dataclasses.replace(RESIDENT, critic=15, critic_offloaded=30)
    programs = {name: Compiled(temporary=50) for name in ("values", "critic more", "critic apply", "decode")}
    found = {moment.name: moment.total - STAYS - 15 - 50 for moment in moments(resident, 3, programs, ahead=True)}
    assert found == {"values": 3, "critic more": 15 + 3, "critic apply": 15 + 30, "decode": 15, "hand over": 2 - 50}


def test_the_verdict() -> None:
    found = moments(RESIDENT, 3, PROGRAMS)
    assert fullest(found).name == "more"
    assert fits(found, fullest(found).total)
    assert not fits(found, fullest(found).total - 1)


def test_what_the_compiler_refused_does_not_fit_whatever_the_sum() -> None:
    refused = PROGRAMS | {"decode": Compiled(temporary=1, refused="RESOURCE_EXHAUSTED: no room")}
    found = moments(RESIDENT, 3, refused)
    assert fullest(found).name == "decode"
    assert not fits(found, 10**9)


@pytest.mark.parametrize(
    "part", ["weights", "optimizer", "critic", "critic_optimizer", "teacher", "reference", "engine", "pages"]
)
def test_every_part_counts_once(part: str) -> None:
    more = dataclasses.replace(RESIDENT, **{part: getattr(RESIDENT, part) + 1000})
    assert all(value == totals()[name] + 1000 for name, value in totals(more).items())
