"""`python -m zi_experiments`."""

from zi_experiments.cli import main

if __name__ == "__main__":
    main()
