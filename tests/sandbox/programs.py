"""Random programs whose end is known before they run."""

import dataclasses
import random
import signal
from collections.abc import Iterator, Sequence

from hypothesis import strategies as st

from jaxrl.records import ToolStatus
from jaxrl.sandbox import Limits, Result

OK, ERROR, TIMEOUT = ToolStatus.OK, ToolStatus.ERROR, ToolStatus.TIMEOUT
MEMORY, OUTPUT = ToolStatus.OUT_OF_MEMORY, ToolStatus.OUTPUT_LIMIT

_USUAL = Limits(cpu_seconds=1.0, wall_seconds=2.0, memory_mib=128, output_kib=8, output_hard_mib=2, disk_mib=8)
_SHORT = dataclasses.replace(_USUAL, cpu_seconds=0.15, wall_seconds=0.4)
# Ends that take work to reach: they must come long before the time is up, however slow the machine.
_PATIENT = dataclasses.replace(_USUAL, cpu_seconds=20.0, wall_seconds=60.0)


@dataclasses.dataclass(frozen=True)
class Program:
    """A snippet, what it may use, and how it must end."""

    code: str
    status: ToolStatus
    end: tuple[int | None, int | None] | None  # exit code and signal; None where either may win
    limits: Limits

    def misjudged(self, result: Result) -> str:
        """What is wrong with a result of this program; "" where nothing is."""
        end = (result.exit_code, result.signal)
        if (result.status, result.attempts) == (self.status, 1) and self.end in (None, end):
            return ""
        return f"{self.status} {self.end}, but {result.status} {end}: {self.code!r} said {result.stderr[-300:]!r}"


# What comes first and changes nothing about the end.
_BEGINNINGS = (
    "",
    "print('infra_error timeout out_of_memory')",
    "import sys; print('Traceback (most recent call last): MemoryError', file=sys.stderr)",
    "total = sum(range({n}))",
    "def work(n):\n    return [n] * 3\nwork({n})",
    "try:\n    1 / 0\nexcept ZeroDivisionError as error: print(error)",
    "try:\n    raise SystemExit({n})\nexcept SystemExit: pass",
    "import threading\nthreading.Thread(target=print, args=({n},)).start()",
    "import time; time.sleep(0.0{digit})",
    "open('f{n}', 'w').write('x' * {n})",
    "import math; math.factorial({n} % 300)",
    "print('x' * 20_000)",
    "import os; os.kill(os.getpid(), 15)",
)

_OKS = (
    "",
    "1 + {n}",
    "raise SystemExit",
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "import threading, time; threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
    "import atexit; atexit.register(print, {n})",
    "try:\n    [0] * 10**11\nexcept MemoryError: pass",
    "import os\nfor fd in range(3): os.close(fd)",
    "import time; time.sleep(0.4)",
    "sum(range(5 * 10**6))",
)
_ERRORS = (
    "1 / 0",
    "x = (",
    "undefined_{n}",
    "raise MemoryError",
    "raise TimeoutError({n})",
    "raise KeyboardInterrupt",
    "assert {n} < 0",
    "import no_such_module_{n}",
    "def f(n): return f(n + 1)\nf(0)",
    "import sys; sys.exit('infra_error')",
    "input()",
    "raise BaseException({n})",
)
_BUSY = (
    "while True: pass",
    "import itertools; sum(itertools.repeat(0))",
    "x = 10**(10**9)",
    "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
)
_ASLEEP = (
    "import time; time.sleep(1e6)",
    "import threading; threading.Event().wait()",
    "import threading, time; threading.Thread(target=time.sleep, args=(1e6,)).start()",
    "import atexit, time; atexit.register(time.sleep, 1e6)",
    "import os; os.read(os.pipe()[0], 1)",
    "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, 1)\n    except OSError: pass\nsignal.pause()",
)
_HUNGRY = (
    "x = [0] * 10**10",
    "x = bytearray(10**9)",
    "x = []\nwhile True: x.append(' ' * 10**6)",
    "x = []\nwhile True: x.append(len(x))",
    "s = 'x'\nwhile True: s += s",
    "d = dict()\nwhile True: d[len(d)] = str(len(d)) * 50",
    "import mmap\nx = [mmap.mmap(-1, 9 << 20) for _ in range(99)]",
    "import mmap\nx = [mmap.mmap(-1, 1 << 20) for _ in range(999)]",
    "import numpy\nx = [numpy.zeros(10**6) for _ in range(99)]",
    "import numpy\nx = [numpy.zeros(10**5) for _ in range(999)]",
)
_LOUD = (
    "while True: print('x' * 1000)",
    "import sys\nwhile True: sys.stderr.write('y' * 1000)",
    "import os\nwhile True: os.write(1, b'a' * 999); os.write(2, b'b' * 999)",
    "print('z' * (3 << 20))",
)
_FATAL = ("import ctypes; ctypes.string_at(0)", "import os; os.abort()")


def _all_ends() -> Iterator[Program]:
    killed = (None, int(signal.SIGKILL))
    kinds = (
        (_OKS, OK, (0, None), _USUAL),
        (_ERRORS, ERROR, (1, None), _USUAL),
        (_FATAL, ERROR, (None, int(signal.SIGSEGV)), _USUAL),
        (_BUSY, TIMEOUT, killed, _SHORT),
        (_ASLEEP, TIMEOUT, killed, _SHORT),
        (_HUNGRY, MEMORY, None, _PATIENT),
        (_LOUD, OUTPUT, None, _PATIENT),
    )
    for codes, status, end, limits in kinds:
        yield from (Program(code, status, end, limits) for code in codes)
    for number in (2, 98, 121, 124, 137, 255):
        yield Program(f"import sys; sys.exit({number})", ERROR, (number, None), _USUAL)
        yield Program(f"import os; os._exit({number})", ERROR, (number, None), _USUAL)


ENDS = tuple(_all_ends())


def begun(end: Program, beginnings: Sequence[str], number: int) -> Program:
    """A program of some harmless beginnings and one end, with a number (0 to 9999) of its own."""
    code = "\n".join([*beginnings, end.code])
    code = code.replace("{n}", str(number)).replace("{digit}", str(number % 10))
    return dataclasses.replace(end, code=code)


def programs() -> st.SearchStrategy[Program]:
    """Any end behind up to three beginnings."""
    beginnings = st.lists(st.sampled_from(_BEGINNINGS), max_size=3)
    return st.builds(begun, st.sampled_from(ENDS), beginnings, st.integers(0, 9999))


def batch(count: int, seed: int) -> list[Program]:
    """So many programs in random order, every end as often as any other."""
    draw = random.Random(seed)
    ends = [ENDS[n % len(ENDS)] for n in range(count)]
    draw.shuffle(ends)
    return [begun(end, draw.sample(_BEGINNINGS, draw.randrange(4)), draw.randrange(10_000)) for end in ends]
