"""How a command ends: in one line on standard error, whatever went wrong, and without losing a save.

Exit status 2: the input was wrong, and no work has begun. 1: the work went wrong. 128 + n: signal n.
"""

import signal
import sys
from contextlib import contextmanager, suppress

import torch

from files.disk import let_go


def fail(message):
    """End with one line and exit status 2."""
    print("error:", " ".join(str(message).split())[:1000], file=sys.stderr)
    sys.exit(2)


@contextmanager
def before_work():
    """What goes wrong in here, before the work begins, is the input's fault."""
    try:
        yield
    except (ValueError, OSError) as problem:
        fail(problem)
    except RuntimeError as problem:
        if "memory" not in str(problem):
            raise
        fail(problem)


def run_main(main):
    """Call a command's main; Ctrl-C where nothing else catches it, such as while loading, ends quietly."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):          # what a terminal cannot show ends no run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)


class Stop:
    """Whether somebody wants the work to end: a first SIGINT or SIGTERM is a request, which the work looks
    at when it has come to a good place; a second one, or one within `at_once`, raises KeyboardInterrupt."""

    def __init__(self):
        self.asked, self.now = [], False

    def __call__(self, number, frame):
        self.asked.append(number)
        if self.now or len(self.asked) > 1:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self):
        """Nothing would be lost by stopping in here."""
        if self.asked:
            raise KeyboardInterrupt
        self.now = True
        try:
            yield
        finally:
            self.now = False


@contextmanager
def guarded(run, progress):
    """The work of training `run`: yields a Stop. What goes wrong in here ends the process with one line that
    says at which step, what to do, and which save is whole."""
    stop = Stop()
    old = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except (FloatingPointError, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as problem:
        what = {FloatingPointError: f"{problem}: start again with a lower --lr",
                torch.OutOfMemoryError: f"{problem}: try a smaller --micro-batch-size",
                KeyboardInterrupt: "stopped by " + (" and ".join(signal.Signals(n).name for n in stop.asked)
                                                   or "a signal to another of the processes")}
        if not run.writes and isinstance(problem, (FloatingPointError, KeyboardInterrupt)):
            sys.exit()          # so does the process that writes, and says why: with another status here,
                                # torchrun would end it in the midst of its last save
        progress.clear()
        rest = "Nothing was saved yet."
        if run.saved:
            rest = f"The save of step {run.saved} is whole: python train.py --resume {run.folder}"
        print(f"error: step {run.at}: {what.get(type(problem), problem)}. {rest}", file=sys.stderr)
        sys.exit(128 + stop.asked[0] if stop.asked else 1)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
        with suppress(OSError):                 # a disk that is full has been reported
            run.file.close()
        let_go(run.folder)
