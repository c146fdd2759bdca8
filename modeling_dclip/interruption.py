"""How a command ends when it is interrupted: Ctrl+C, SIGTERM or SIGHUP give one line and the usual exit status.

This module is imported before anything heavy, because loading PyTorch takes seconds in which a user may change their
mind. It changes nothing in a process that only uses the package as a library.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

INTERRUPTED = "Interrupted. Run the same command again; it continues from what it has saved."
# Ctrl+C, the polite end by a scheduler, and a closed terminal; not all systems have all.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def exit_status(number: int) -> int:
    """What a shell gives a command that a signal ended.

    Example:
        >>> exit_status(2)
        130
    """
    return 128 + number


def end_now(number: int, frame: FrameType | None = None) -> None:
    """Say that the command was interrupted and end the process. It needs no part of Python that may be half loaded."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one line for all processes of a launch
        os.write(2, f"\n{INTERRUPTED}\n".encode())
    os._exit(exit_status(number))


def is_command() -> bool:
    """Whether this process is a command of this package: a script beside it, or `python -m` with a module of it."""
    if sys.argv[:1] == ["-m"]:  # Python is looking for the module
        return any(word.split(".")[0] == __package__ for word in sys.orig_argv)
    script, root = getattr(sys.modules.get("__main__"), "__file__", None), Path(__file__).resolve().parents[1]
    places = (root, root / "benchmarks", root / "hub_cards" / "space")
    return script is not None and Path(script).resolve().parent in places


def take_signals() -> None:
    """Let the signals end this process plainly, except those that whoever started it wants to be ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end_now)


if is_command():
    take_signals()
