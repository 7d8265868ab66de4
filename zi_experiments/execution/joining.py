"""A Hydra callback: the launchers of one command meet before the first run, and all but the first of them stay in it."""

import logging
import sys
import traceback
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from zi_experiments import environment, lines
from zi_experiments.config.validation import is_endpoint

_launched: environment.Launched | None = None
_has_met = False


def take_launcher(arguments: list[str]) -> list[str]:
    """Note what another launcher says of this process. Return the arguments of the command, with what follows from that.

    Raises `ValueError` for what does not go with it.
    """
    global _launched
    arguments = [each for each in arguments if not each.startswith("--local_rank")]  # which deepspeed's launcher adds
    _launched = found = environment.launched()
    if len(environment.distributed_variables()) == 5:
        environment.forget_launcher()
    if found is None:
        return arguments
    typed = {each.partition("=")[0] for each in arguments}
    if found.endpoint is None and "launch.rdzv_endpoint" not in typed:
        if found.number:
            sys.exit(1)  # the first one says why
        raise ValueError(
            f"a launcher has started {found.processes} processes of this command and has not said where they meet: "
            "pass launch.rdzv_endpoint=node0:29500, for example: the machine of the first process, and a port that is "
            "free there"
        )
    follows = {
        "hardware.num_gpus": found.processes,
        "launch.nnodes": found.machines,
        "launch.rdzv_endpoint": found.endpoint,
    }
    settings = [f"{key}={value}" for key, value in follows.items() if key not in typed]
    # flags have to be together, before all settings or after them
    end = max((index + 1 for index, each in enumerate(arguments) if "=" in each and each[0] != "-"), default=None)
    return [*arguments, *settings] if end is None else [*arguments[:end], *settings, *arguments[end:]]


class Nodes(Callback):
    """The first launcher returns from here and carries out the command; the others carry out what it sends, and exit."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _join(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if "BasicLauncher" in config.hydra.launcher._target_:  # others start processes for jobs
            _join(config)


def follows(config: DictConfig) -> bool:
    """Return whether this process has carried out its part of a job that Slurm runs on several machines.

    The first process of the job returns False, once it has met the others; so does one that is alone.
    """
    global _launched
    if not environment.is_job_of_slurm() or (found := environment.launched()) is None:
        return False
    _launched = found
    environment.forget_launcher()
    if config.launch.rdzv_endpoint is None:
        config.launch.rdzv_endpoint = found.endpoint
    try:
        _join(config)
    except SystemExit:
        return True  # submitit waits for a result
    return False


def _join(config: DictConfig) -> None:
    launch = config.launch
    processes = _launched.processes if _launched else launch.nnodes
    if config.plan_only:
        if _launched and _launched.number:
            sys.exit(0)  # the first one plans
        return
    if processes < 2 or not is_endpoint(launch.rdzv_endpoint or ""):
        return  # validation says what is wrong
    _meet(launch, processes)


def leave(code: Any) -> None:
    """Tell the other launchers, if there are any, that this command ends with that code of `sys.exit`."""
    if _has_met:
        from zi_experiments.execution import nodes

        nodes.leave(code if isinstance(code, int) else int(code is not None))


def _meet(launch: Any, processes: int) -> None:
    global _has_met
    for name in ("torch.distributed.elastic", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is said once
    from rich.console import Console

    from zi_experiments.execution import follower, launcher, nodes
    from zi_experiments.runtime.rendezvous import Hello, NobodyCameError, meet

    console = Console()
    launcher.warm_up()  # before there are threads

    def hello(number: int) -> Hello:
        return nodes.hello(number, _launched)

    def tell(text: str) -> None:
        lines.say(text, console)

    try:
        met = meet(launch.rdzv_endpoint, processes, _launched, hello, launch.timeout_s, tell)
    except NobodyCameError as error:
        problem = f"{error} within {launch.timeout_s:g} s, at launch.rdzv_endpoint={launch.rdzv_endpoint}"
        if not error.is_first:
            sys.exit(lines.fit(f"killed: {problem}", sys.stderr))
        nodes.set_problem(problem)
        return
    _has_met = True
    if met.number == 0:
        group = nodes.Group(met, hello(0), _launched)
        nodes.set_group(group)
        tell(f"{processes} launchers have met: {', '.join(group.hosts)}")
        return
    tell(f"launcher {met.number} of {processes}: the first, at {launch.rdzv_endpoint}, writes the record")
    try:
        code = follower.serve(met, hello(met.number), console)
    except Exception:  # Hydra would warn, and go on to carry out the command here as well
        traceback.print_exc()
        code = 1
    sys.exit(code)
