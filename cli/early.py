"""--help and wrong flags are answered before torch is imported, which takes two seconds.

Flags take choices and defaults from files that import torch. So a command is imported twice: at first with
stand-ins for all packages from outside, only to parse the command line. If that is in order, or a stand-in
will not do, what was imported so is forgotten, and the command goes on as if nothing had been.
"""

import argparse
import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

ROOT = Path(__file__).parent.parent


class StandIn:
    """Stands for a package and for all that is in it: a module, a function, a base class, a decorator."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args, **more):
        return args[0] if args and callable(args[0]) else self

    def __mro_entries__(self, bases):
        return ()

    def unknown(self, *_):
        """Where something hangs on what it is, or would show it, it will not do."""
        raise TypeError

    __bool__ = __eq__ = __repr__ = unknown


class Outside:
    """Finds the packages that are neither Python's nor the project's, and makes them stand-ins."""

    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names and not own(top) and any(
                finder.find_spec(top, None) for finder in sys.meta_path if finder is not self):
            return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn()

    def exec_module(self, module):
        pass


class Parsed(BaseException):
    """The command line is in order."""


def own(top):
    return (ROOT / top).is_dir() or (ROOT / f"{top}.py").is_file()


def answer_flags(name):
    """Each command calls this first, with its __name__: if it is the one that was typed, and --help is asked
    for or a flag is wrong, the process ends here."""
    if name != "__main__" or "torch" in sys.modules:
        return

    def parse_args(*args):
        parse(*args)
        raise Parsed
    spec, parse, outside = sys.modules[name].__spec__, argparse.ArgumentParser.parse_args, Outside()
    argparse.ArgumentParser.parse_args = parse_args
    sys.meta_path.insert(0, outside)
    try:
        command = importlib.import_module(spec.name if spec else Path(sys.argv[0]).stem)
        command.run_main(command.main)
    except (Parsed, Exception):
        pass
    finally:
        argparse.ArgumentParser.parse_args = parse
        sys.meta_path.remove(outside)
        for name in [n for n, m in sys.modules.items() if isinstance(m, StandIn) or own(n.split(".")[0])]:
            del sys.modules[name]
