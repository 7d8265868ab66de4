"""`python -m zi_experiments.dashboard`."""

import sys

from zi_experiments.dashboard.command import main
from zi_experiments.runtime import stdio

if __name__ == "__main__":
    stdio.install()
    sys.exit(main(sys.argv[1:]))
