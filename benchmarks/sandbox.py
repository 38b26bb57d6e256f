"""Figures S1 to S15 of the sandbox, each beside what is demanded of it: the same as ``jaxrl sandbox bench``.

python benchmarks/sandbox.py --json
python benchmarks/sandbox.py --figures S1,S4 --rounds 9
"""

import sys

from jaxrl.cli import main

if __name__ == "__main__":
    sys.exit(main(["sandbox", "bench", *sys.argv[1:]]))
