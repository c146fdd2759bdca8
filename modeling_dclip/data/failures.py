"""How every command talks to its user: its help, and what it says of a mistake (one line on stderr, exit status 1).

A mistake of the user (a wrong file, a wrong option, a full disk, a missing package) is answered in one line. An error
in this code keeps its traceback, so that it can be reported and mended.
"""

import argparse
import functools
import logging
import pickle
import re
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import pyarrow as pa
import torch
import yaml
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

try:
    from httpx2 import TransportError  # huggingface_hub 2
except ImportError:
    from httpx import TransportError

logger = transformers_logging.get_logger(__name__)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Errors that come from what a user gave: a command answers each of them in one line.
FAILURES = (
    ValueError,  # a wrong value, file or field; also JSON, text encoding, most of Arrow
    OSError,  # a missing file, no permission, a full disk, a server that cannot be reached
    ImportError,  # an optional package that is not installed
    FloatingPointError,  # a run that diverged
    MemoryError,  # an input too large for this machine
    torch.OutOfMemoryError,  # or for its GPU
    TransportError,  # a connection to the Hub that broke off
    DatasetsError,
    SafetensorError,
    StrictDataclassError,  # a field of a configuration of transformers
    pa.ArrowException,
    pickle.UnpicklingError,  # a checkpoint that is none
    yaml.YAMLError,
)

# Errors of one benchmark, model or picture that do not stop the others of an evaluation. Wider than FAILURES, as the
# measurements of hours are worth more than a traceback: a shape that does not fit, a device without memory or a
# missing method is reported with the error's type, and `TRANSFORMERS_VERBOSITY=info` shows its traceback.
BENCHMARK_FAILURES = (*FAILURES, ArithmeticError, LookupError, RuntimeError, TypeError)

_OF_WORKER = re.compile(r"Caught \w+ in .*?\nOriginal Traceback .*\n(?:\w+\.)*\w+: (.*)", re.DOTALL)
# Of an address: user and password before the host, and what follows the path.
_SECRETS = re.compile(r"(https?://)(?:[^/\s'\"]*@)?([^\s'\"?]*)(?:\?[^\s'\"]*)?")
_LONG = re.compile(r"(\S{60})\S{500,}")  # a value of a thousand digits, say; no path is as long
_INTERRUPTED = 130  # what a shell gives a command that Ctrl+C ended


def without_secrets(text: str) -> str:
    """A text whose addresses have lost user names, passwords and what follows `?`, where tokens stand.

    Example:
        >>> without_secrets("got https://me:word@example.org/a.tar?key=1")
        'got https://example.org/a.tar'
    """
    return _SECRETS.sub(r"\1\2", text) if "://" in text else text


def one_line(error: BaseException) -> str:
    """The message of an error with its line breaks folded and endless words cut; its type's name if it has none.

    Of an error in a worker of a data loader only the message itself is left, without the worker's traceback; of an
    address neither user nor password nor what follows `?`.

    Example:
        >>> one_line(ValueError("Expected one,\\n  got two."))
        'Expected one, got two.'
    """
    text = str(error)
    if match := _OF_WORKER.fullmatch(text):
        text = match[1]
    return without_secrets(_LONG.sub(r"\1...", " ".join(text.split()))) or type(error).__name__


def describe_failure(what: str, error: BaseException) -> str:
    """One line on what failed and why. With `TRANSFORMERS_VERBOSITY=info` the traceback goes to the log."""
    if transformers_logging.get_verbosity() <= logging.INFO:  # as `command` asks
        logger.warning("%s failed here:", what, exc_info=error)
    return f"{without_secrets(what)}: {type(error).__name__}: {one_line(error)}"


def command(main: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate the `main` of a command: a mistake of the user ends in one line on stderr and exit status 1.

    `TRANSFORMERS_VERBOSITY=info` shows the traceback instead. Ctrl+C ends with exit status 130, without a traceback.

    Args:
        main (`Callable`): The function; what it returns is passed on.

    Returns:
        `Callable`: It raises `SystemExit` instead of any of [`FAILURES`] and of `KeyboardInterrupt`.
    """

    @functools.wraps(main)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            sys.stderr.write("Interrupted.\n")
            sys.exit(_INTERRUPTED)
        except FAILURES as error:
            if transformers_logging.get_verbosity() <= logging.INFO:
                raise
            sys.exit(f"Failed: {one_line(error)} (TRANSFORMERS_VERBOSITY=info shows where in the code)")

    return run


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The help of a command: the description as it is written, and the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required or action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)
