"""What `python -m zi_experiments.dashboard` is told, and what it does then."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from zi_experiments import environment
from zi_experiments.config.composition import from_choices
from zi_experiments.config.schema import ConfigError, Tracking

_INSTALL = "pip install wandb-workspaces"  # the extra `dashboard`


def main(arguments: Sequence[str]) -> int:
    """Save the view, or write it into a file where nobody is logged in. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m zi_experiments.dashboard",
        description="One saved view of W&B with the charts of the report. It is made, or replaced if it is there.",
    )
    parser.add_argument("--project", help="W&B project; default: that of runs")
    parser.add_argument("--entity", help="W&B user or team; default: that of runs")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/dashboard.json"),
        metavar="FILE",
        help="where the view goes without a login; default: outputs/dashboard.json",
    )
    asked = parser.parse_args(arguments)
    try:
        return _save(_tracking(asked.project, asked.entity), asked.output)
    except ConfigError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "wandb_workspaces":
            raise
        return _refuse(f"wandb-workspaces is not installed: {_INSTALL}")
    except OSError as error:
        return _refuse(f"{asked.output} cannot be written ({error.strerror}): pass --output /another/file")
    except Exception as error:  # W&B raises errors of many kinds for variables and logins that it does not take
        lines = str(error).split("\n")
        return _refuse(
            f"W&B says {' '.join(line.strip() for line in lines[:3])}: check the WANDB_… variables, or wandb login"
        )


def _tracking(project: str | None, entity: str | None) -> Tracking:
    """Return the settings of tracking=wandb, as a run without arguments has them."""
    typed = {"tracking.project": project, "tracking.entity": entity}
    return from_choices({}, {key: value for key, value in typed.items() if value is not None}).tracking


def _save(tracking: Tracking, output: Path) -> int:
    mode = tracking.mode.value
    environment.prepare_for_wandb(mode)
    from zi_experiments.dashboard import view
    from zi_experiments.results.sinks.wandb import login_mode

    is_asked = mode in ("auto", "online")
    if is_asked and login_mode() == "online":
        print(view.save(tracking.project, tracking.entity))
        return 0
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(view.text(tracking.project) + "\n")
    what = "wandb login, or set WANDB_API_KEY" if is_asked else "unset WANDB_MODE"
    why = "nobody is logged in to W&B" if is_asked else f"WANDB_MODE is {mode}"
    print(f"{output} has the view, since {why}: {what}, and type the same again to save it")
    return 0


def _refuse(text: str) -> int:
    print(f"refused: {text}", file=sys.stderr)
    return 1
