"""However much one tenant submits, another waits for a bounded number of calls: told by order of ends, not by times."""

import asyncio
import collections

from jaxrl.records import ToolStatus
from tests.sandbox.driver import Driver

SLOTS = 2
# A call waits for those that run, for one turn of each other tenant at either door, and for what ends before its report
# is read: five as a rule, and far below the 64 that are in the queue before it.
BOUND = 24


def test_a_flood_of_thousands_delays_another_by_a_few_calls() -> None:
    with Driver(workers=1, slots=SLOTS, slow_slots=0, queue=64, preload=()) as driver:

        async def flood() -> list[int]:
            done = 0

            async def one() -> None:
                nonlocal done
                assert (await driver.pool.run("1", tenant="flood")).status is ToolStatus.OK
                done += 1

            flooding = [asyncio.create_task(one()) for _ in range(5000)]
            while done < 20:
                await asyncio.sleep(0.01)
            waited = []
            for n in range(40):
                before = done
                assert (await driver.pool.run(f"{n}", tenant="other")).stdout == f"{n}\n"
                waited.append(done - before)
            assert done < 4000, "the flood was over before the others had been served"
            for task in flooding:
                task.cancel()
            await asyncio.gather(*flooding, return_exceptions=True)
            return waited

        waited = driver.wait(flood())
        assert max(waited) <= BOUND, waited
        assert driver.run("6 * 7").stdout == "42\n"


def test_tenants_share_the_slots_evenly_whatever_they_submit() -> None:
    """While the smallest has calls left, every tenant gets a like number of answers."""
    counts = {"large": 160, "middle": 80, "small": 30}
    with Driver(workers=1, slots=SLOTS, slow_slots=0, queue=16, preload=()) as driver:

        async def all_of_them() -> list[str]:
            order = []

            async def one(tenant: str) -> None:
                await driver.pool.run("1", tenant=tenant)
                order.append(tenant)

            await asyncio.gather(*(one(tenant) for tenant, count in counts.items() for _ in range(count)))
            return order

        order = driver.wait(all_of_them())
    assert collections.Counter(order) == counts
    last = max(index for index, tenant in enumerate(order) if tenant == "small")
    shares = collections.Counter(order[:last])
    # The 16 places of the queue were all taken by the first tenant before the others came.
    assert all(abs(shares[tenant] - counts["small"]) <= 16 + BOUND for tenant in ("large", "middle")), shares


def test_kinds_of_templates_are_no_way_around_a_turn(sandbox: Driver) -> None:
    """A tenant that floods both kinds of template is still one tenant."""

    async def flood() -> list[int]:
        done = 0

        async def one(code: str) -> None:
            nonlocal done
            await sandbox.pool.run(code, tenant="flood")
            done += 1

        flooding = [asyncio.create_task(one(("1", "import numpy")[n % 2])) for n in range(600)]
        while done < 10:
            await asyncio.sleep(0.01)
        waited = []
        for code in ("2", "import numpy; 2") * 8:
            before = done
            assert (await sandbox.pool.run(code, tenant="other")).stdout == "2\n"
            waited.append(done - before)
        for task in flooding:
            task.cancel()
        await asyncio.gather(*flooding, return_exceptions=True)
        return waited

    waited = sandbox.wait(flood())
    assert max(waited) <= BOUND, waited
