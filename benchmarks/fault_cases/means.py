"""How a command is struck while it runs."""

import os
from collections.abc import Callable
from signal import Signals

from fault_cases.disk import Disk
from fault_cases.process import Command, Ended, run
from fault_cases.trial import Moment, Place, Trial

KILL, CTRL_C, TERM = Signals.SIGKILL, Signals.SIGINT, Signals.SIGTERM
Strike = Callable[[Trial, Place], Ended]


def killed(number: Signals, moment: Moment, *, to_all: bool = False) -> Strike:
    """A signal at a moment."""

    def strike(trial: Trial, place: Place) -> Ended:
        with Command(trial.command(place)) as command:
            command.wait_for(lambda: moment(place))
            command.send(number, to_all=to_all)
            return command.end()

    return strike


def worker_killed(moment: Moment) -> Strike:
    """As the kernel ends a process that takes too much memory: one of those that do the work."""

    def strike(trial: Trial, place: Place) -> Ended:
        with Command(trial.command(place)) as command:
            command.wait_for(lambda: moment(place))
            os.kill(command.workers()[0], KILL)
            return command.end()

    return strike


def starved(spare: int, moment: Moment, *flags: str) -> Strike:
    """From a moment on, so many bytes more of memory and no others."""

    def strike(trial: Trial, place: Place) -> Ended:
        with Command([*trial.command(place), *flags]) as command:
            command.wait_for(lambda: moment(place))
            command.starve(spare)
            return command.end()

    return strike


def worker_starved(spare: int, moment: Moment = lambda place: True) -> Strike:
    """The same of one of the processes that do the work."""

    def strike(trial: Trial, place: Place) -> Ended:
        with Command(trial.command(place)) as command:
            command.wait_for(lambda: bool(command.workers()) and moment(place))
            command.starve(spare, command.workers()[0])
            return command.end()

    return strike


def full_from_the_start(disk: Disk, leave: int = 0) -> Strike:
    """A disk that is full when the command begins."""

    def strike(trial: Trial, place: Place) -> Ended:
        if type(disk) is Disk:
            disk.fill(0, leave)
            return run(trial.command(place))
        with Command(trial.command(place), ["prlimit", f"--fsize={leave}"]) as command:
            return command.end()

    return strike


def filled(disk: Disk, moment: Moment, leave: int = 0) -> Strike:
    """A disk that somebody else fills meanwhile."""

    def strike(trial: Trial, place: Place) -> Ended:
        with Command(trial.command(place)) as command:
            command.wait_for(lambda: moment(place))
            disk.fill(command.pid, leave)
            if place.site is not None:
                place.site.go_on.set()
            return command.end()

    return strike


def undisturbed(trial: Trial, place: Place) -> Ended:
    """Nothing happens now: what is wrong was there before."""
    return run(trial.command(place))


def resumed(trial: Trial, place: Place) -> Ended:
    """The command that goes on; what is wrong was there before."""
    return run(trial.again(place))
