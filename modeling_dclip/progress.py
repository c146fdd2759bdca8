"""How a command shows that it works: bars for what takes long, durations and numbers as people write them.

This module is imported before anything heavy, because tqdm reads its settings when it is imported. It changes nothing
in a process that only uses the package as a library.
"""

import os
import sys

from .interruption import is_command

BAR_AFTER_SECONDS = 3  # what is done sooner shows no bar, whichever library draws it
LOG_EVERY_SECONDS = 30  # into a file, where each state of a bar stays


def show_few_bars() -> None:
    """Let every bar of this process wait, and change rarely if stderr is no terminal. `TQDM_*` that are set stay."""
    os.environ.setdefault("TQDM_DELAY", str(BAR_AFTER_SECONDS))
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", str(LOG_EVERY_SECONDS))


def count_of(number: int, thing: str) -> str:
    """A number of things in words.

    Example:
        >>> count_of(1, "image"), count_of(12000, "step")
        ('1 image', '12,000 steps')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def duration_in_words(seconds: float) -> str:
    """How long something took.

    Args:
        seconds (`float`): At least 0.

    Returns:
        `str`: In two units at most; the smaller one is left out where it is 0.

    Example:
        >>> [duration_in_words(seconds) for seconds in (0.2, 1.2, 75, 7260, 90000)]
        ['less than a second', '1 second', '1 minute 15 seconds', '2 hours 1 minute', '1 day 1 hour']
    """
    if seconds < 0.95:
        return "less than a second"
    units = [("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)]
    left = round(seconds)
    for (name, size), (smaller, part) in zip(units, units[1:], strict=False):
        if left >= size:
            rest = (left % size) // part
            return count_of(left // size, name) + (f" {count_of(rest, smaller)}" if rest else "")
    return count_of(left, "second")


if is_command():
    show_few_bars()
