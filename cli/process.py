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


STREAMS = ("stdin", "r", "strict"), ("stdout", "w", "replace"), ("stderr", "w", "replace")


def command(main):
    """A decorator for the main of a command: it ends as the head of this file says."""
    @wraps(main)
    def ends(argv=None):
        # A closed stream gives and takes nothing. (A file opened later would get its number, and its words.)
        # What a terminal cannot show ends no run; what comes in and is no text is not made to be one.
        for name, mode, errors in STREAMS:
            stream = getattr(sys, name) or open(os.devnull, mode)
            setattr(sys, name, stream)
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors=errors)
        try:
            main(argv)
            return sys.stdout.flush()
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


@contextmanager
def work(what, smaller, heard=(signal.SIGINT,)):
    """What goes wrong in here is not the input's fault: it becomes a Failed that says `what.where()` it was
    and how it goes on, `what.how_to_go_on()`. smaller: the flag that takes less memory; heard: the
    `signals`."""
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
            by = heard[0].name if heard else "a signal to another of the processes"
            said, status = f"stopped by {by}", 128 + heard[0] if heard else 1
        raise Failed(f"{what.where()}: {said}. {what.how_to_go_on()}", status) from None


@contextmanager
def signals():
    """The list of the SIGINTs and SIGTERMs that are heard in here. The first is a request, at which the work
    looks when it has come to a good place; a second one raises KeyboardInterrupt."""
    heard = []

    def hear(number, frame):
        heard.append(signal.Signals(number))
        if len(heard) > 1:
            raise KeyboardInterrupt

    before = {s: signal.signal(s, hear) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield heard
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
