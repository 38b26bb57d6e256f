"""What the kernels cost beside plain alternatives: the same as ``jaxrl bench kernels``.

python benchmarks/kernels.py --json
"""

import sys

from jaxrl.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "kernels", *sys.argv[1:]]))
