"""What of a session's memory is a cell's own: the kernel's peaks are of a whole process."""

from jaxrl.records import ToolStatus
from tests.sandbox.cells import session
from tests.sandbox.driver import Driver

ERROR, MEMORY = ToolStatus.ERROR, ToolStatus.OUT_OF_MEMORY


def test_a_small_failing_cell_in_a_session_full_of_data_did_not_run_out_of_memory(sandbox: Driver) -> None:
    with session(sandbox) as cells:
        cells.out("data = bytearray(230 << 20)\nfor i in range(0, len(data), 4096): data[i] = 1")
        assert cells.run("1 / 0").status is ERROR
        assert cells.run("more = bytearray(60 << 20)").status is MEMORY
        assert cells.out("len(data) >> 20") == "230\n"


def test_a_cell_that_fails_after_one_that_came_to_the_limit_did_not_run_out_of_memory(sandbox: Driver) -> None:
    """The kernel's largest address space is of the process's whole life."""
    fill = "z = []\nwhile True: z.append(mmap.mmap(-1, 1 << 20))"
    with session(sandbox) as cells:
        cells.out("import mmap, os")
        assert cells.run(fill).status is MEMORY
        assert cells.run(fill).status in (MEMORY, ERROR), "it did not go beyond the first"
        cells.out("z.clear()")
        assert cells.run("1 / 0").status is ERROR
        left = cells.run("os._exit(257)")
        assert (left.status, left.exit_code, left.rebuilt) == (ERROR, 1, False)


def test_the_peak_of_a_cell_is_not_that_of_an_earlier_one(sandbox: Driver) -> None:
    take = "data = bytearray(100 << 20)\nfor i in range(0, len(data), 4096): data[i] = 1\ndel data"
    with session(sandbox) as cells:
        small, large, after, again = (cells.run(code).peak_rss_kib for code in ("x = 1", take, "x = 2", take))
        assert large - small > 90 << 10
        assert after - small < 20 << 10
        assert again - small > 90 << 10
