"""How a command ends: in one line on standard error, whatever went wrong, without losing a save.

Exit status 2: the input was wrong, and no work has begun. 1: the work went wrong. 128 + n: signal n.
"""

import os
import signal
import sys
from contextlib import contextmanager
from functools import wraps

import torch

from cli.cards import first


class Failed(Exception):
    """Work that went wrong, and the exit status."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def out_of_memory(problem):
    """Whether an exception says that memory has run out."""
    words = str(problem)
    return isinstance(problem, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in words \
        or "can't allocate memory" in words


def command(main):
    """A decorator for the main of a command: it ends as the head of this file says."""
    @wraps(main)
    def ends(argv=None):
        for stream in (sys.stdin, sys.stdout, sys.stderr):      # what a terminal cannot show ends no run
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        try:
            main(argv)
            return sys.stdout.flush() if sys.stdout else None
        except KeyboardInterrupt:
            problem, status = None, 130
        except BrokenPipeError:                                 # nobody reads on: that is no fault
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            problem, status = None, 141
        except Failed as failed:
            problem, status = failed, failed.status
        except FloatingPointError as wrong:
            problem, status = wrong, 1
        except (ValueError, OSError) as wrong:
            problem, status = wrong, 2
        except RuntimeError as wrong:
            if not out_of_memory(wrong):
                raise
            problem, status = f"not enough memory: {str(wrong).splitlines()[0]}", 2
        if str(problem or ""):
            print("error:", " ".join(str(problem).split())[:1000], file=sys.stderr)
        sys.exit(status)
    return ends


class Stop:
    """Whether somebody wants the work to end: a first SIGINT or SIGTERM is a request, which the work looks
    at when it has come to a good place; a second one raises KeyboardInterrupt."""

    def __init__(self):
        self.asked = []

    def __call__(self, number, frame):
        self.asked.append(number)
        if len(self.asked) > 1:
            raise KeyboardInterrupt


@contextmanager
def work(what, smaller, stop=None):
    """What goes wrong in here is not the input's fault: it becomes a Failed that says `what.where()` it was
    and what of the work is kept, `what.kept()`. smaller: the flag that takes less memory."""
    asked = stop.asked if stop else [signal.SIGINT]
    try:
        yield
    except BrokenPipeError:
        raise
    except (FloatingPointError, OSError, RuntimeError, MemoryError, KeyboardInterrupt) as problem:
        said, status = f"{problem}", 1
        if out_of_memory(problem):
            said = f"not enough memory ({said.splitlines()[0][:200]}): try a smaller {smaller}"
        elif isinstance(problem, RuntimeError):
            raise
        elif not first() and not isinstance(problem, OSError):
            sys.exit()          # the first process says why. If this one ended with another status,
                                # torchrun would kill the first in the midst of its last save
        elif isinstance(problem, FloatingPointError) and getattr(what, "at", 0) > 1:
            said += ": start again with a lower --lr"           # at the first step it is not to blame
        elif isinstance(problem, KeyboardInterrupt):
            names = [signal.Signals(n).name for n in dict.fromkeys(asked)] or ["a signal to another of the processes"]
            said, status = f"stopped by {' and '.join(names)}", (128 + asked[0]) if asked else 1
        raise Failed(f"{what.where()}: {said}. {what.kept()}", status) from None


@contextmanager
def signals():
    """A Stop that hears SIGINT and SIGTERM."""
    stop = Stop()
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
