"""How every command talks to its user: its help, and what it says of a mistake (one line on stderr, exit status 1).

A mistake of the user (a wrong file, a wrong option, a full disk, a missing package) is answered in one line. An error
in this code keeps its traceback, so that it can be reported and mended.
"""

import argparse
import csv
import functools
import io
import logging
import lzma
import os
import pickle
import re
import select
import shlex
import signal
import struct
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import pyarrow as pa
import yaml
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from modeling_dclip.interruption import INTERRUPTED, SIGNALS, end_now, exit_status

try:
    from httpx2 import HTTPError, InvalidURL, TransportError  # huggingface_hub 2
except ImportError:
    from httpx import HTTPError, InvalidURL, TransportError

logger = transformers_logging.get_logger(__name__)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Errors that come from what a user gave: a command answers each of them in one line.
FAILURES = (
    ValueError,  # a wrong value, file or field; also JSON, text encoding, most of Arrow
    OSError,  # a missing file, no permission, a full disk, a server that cannot be reached
    ImportError,  # an optional package that is not installed
    FloatingPointError,  # a run that diverged
    MemoryError,  # an input too large for this machine; for its GPU see `_lacks_gpu_memory`
    TransportError,  # a connection to the Hub that broke off
    HTTPError,  # an answer of the Hub that is none
    InvalidURL,
    DatasetsError,
    SafetensorError,
    StrictDataclassError,  # a field of a configuration of transformers
    pa.ArrowException,
    pickle.UnpicklingError,  # a checkpoint that is none
    yaml.YAMLError,
    csv.Error,
    *(lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error),  # a compressed file that is damaged
)

# Errors of one benchmark, model or picture that do not stop the others of an evaluation. Wider than FAILURES, as the
# measurements of hours are worth more than a traceback: a shape that does not fit, a device without memory or a
# missing method is reported with the error's type, and `TRANSFORMERS_VERBOSITY=info` shows its traceback.
BENCHMARK_FAILURES = (
    *FAILURES,
    *(ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, struct.error),
)

# What PyTorch, FAISS and the workers of a loader tell of the machine as a bare RuntimeError, and what to do. Any other
# RuntimeError is a bug, or belongs to the place that knows what was read.
_OF_MACHINE = {
    r"can't allocate memory|DefaultCPUAllocator|Cannot allocate memory|CUDA out of memory|CUDA error: out of memory": (
        "This machine has too little memory for it. Lower the batch size or num_workers, or take smaller images"
    ),
    r"inline_container|PytorchStreamWriter|PytorchStreamReader|No space left": (
        "A file of PyTorch could not be written or read whole. Is the disk full, or the file damaged?"
    ),
    r"DataLoader worker.* (?:is killed|exited unexpectedly)|shared memory|[Bb]us error": (
        "A worker process ended. Set num_workers to 0, or give the machine more memory and a larger /dev/shm"
    ),
    r"gloo|NCCL|ProcessGroup|TCPStore|Connection (?:reset|closed) by peer": (
        "Another process of this run has ended, or cannot be reached: its own message says why. Run the same command "
        "again; it continues from what was saved"
    ),
    r"faiss": "FAISS refuses it. Check the index's factory string and the number of images",
}


class Mistakes(ValueError):
    """Several mistakes of a user, told at once. [`command`] gives each of them a line.

    Args:
        errors (`Sequence[BaseException]`): One for each mistake, in the order of telling.
    """

    def __init__(self, errors: Sequence[BaseException]):
        self.errors = list(errors)
        super().__init__("; ".join(map(str, errors)))


class MistakeCollector:
    """Lets several checks run, and then tells of all that they refuse.

    Example:
        >>> found = MistakeCollector()
        >>> for number in (1, 2):
        ...     with found.collecting():
        ...         raise ValueError(f"mistake {number}")
        >>> found.tell()
        Traceback (most recent call last):
        modeling_dclip.data.failures.Mistakes: mistake 1; mistake 2
    """

    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep a mistake that is raised inside. A bug passes. What was told before is not told again."""
        try:
            yield
        except FAILURES as error:
            told = {str(one) for one in self.errors}
            new = error.errors if isinstance(error, Mistakes) else [error]
            self.errors += [one for one in new if str(one) not in told]

    def tell(self) -> None:
        """Raise what was collected.

        Raises:
            BaseException: The only mistake as it was raised.
            Mistakes: Several.
        """
        if len(self.errors) > 1:
            raise Mistakes(self.errors)
        if self.errors:
            raise self.errors[0]


_OF_WORKER = re.compile(r"Caught (?P<kind>\w+) in .*?\nOriginal Traceback .*\n(?:\w+\.)*\w+: (?P<text>.*)", re.DOTALL)
# Of an address: user and password before the host, and what follows the path.
_SECRETS = re.compile(r"(https?://)(?:[^/\s'\"]*@)?([^\s'\"?]*)(?:\?[^\s'\"]*)?")
_LONG = re.compile(r"(\S{60})\S{500,}")  # a value of a thousand digits, say; no path is as long


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
        text = match["text"]
    if (advice := _of_machine(error)) is not None:
        text = f"{advice} ({text.splitlines()[0] if text else type(error).__name__})."
    return without_secrets(_LONG.sub(r"\1...", " ".join(text.split()))) or type(error).__name__


def _lacks_gpu_memory(error: BaseException) -> bool:
    """Whether it is a `torch.OutOfMemoryError`, told by name: this module does not wait for PyTorch to load."""
    return any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)


def _of_machine(error: BaseException) -> str | None:
    """What to do about an error by which a library tells of the machine; `None` of any other error."""
    if not isinstance(error, (RuntimeError, MemoryError)):
        return None
    if isinstance(error, MemoryError) or _lacks_gpu_memory(error):
        return next(iter(_OF_MACHINE.values())) if not str(error).startswith("Expected") else None
    return next((advice for pattern, advice in _OF_MACHINE.items() if re.search(pattern, str(error))), None)


def _names(kinds: Iterable[type]) -> set[str]:
    """The names of classes and of all that are derived from them."""
    return {name for kind in kinds for name in (kind.__name__, *_names(kind.__subclasses__()))}


def is_mistake(error: BaseException) -> bool:
    """Whether an error comes from what a user gave or from the machine. All others are bugs, and keep their traceback.

    An error of a worker process counts as what it was there: PyTorch passes some on as a bare RuntimeError.

    Args:
        error (`BaseException`): Any.

    Example:
        >>> is_mistake(ValueError("a")), is_mistake(RuntimeError("a"))
        (True, False)
    """
    if isinstance(error, FAILURES) or _lacks_gpu_memory(error) or _of_machine(error) is not None:
        return True
    match = _OF_WORKER.fullmatch(str(error)) if isinstance(error, RuntimeError) else None
    return match is not None and match["kind"] in _names(FAILURES)


def describe_failure(what: str, error: BaseException) -> str:
    """One line on what failed and why. With `TRANSFORMERS_VERBOSITY=info` the traceback goes to the log."""
    if transformers_logging.get_verbosity() <= logging.INFO:  # as `command` asks
        logger.warning("%s failed here:", what, exc_info=error)
    return f"{without_secrets(what)}: {type(error).__name__}: {one_line(error)}"


# Secrets.

_HIDDEN = "***"
_SECRET = r"[\w.-]*(?:token|passw(?:or)?d|secret|api_?key|access_?key|credential|signature|authorization)"
_SECRET_NAME = re.compile(rf"(?:--)?(?:{_SECRET})", re.IGNORECASE)
# A name with its value; the first group is kept: `--hub_token X`, `token=X`, `"token": "X"`, `Authorization: Basic X`.
_PAIRS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(--{_SECRET}\s+)(?!-)\S+",
        rf"((?<![\w-])(?:{_SECRET}|sig|auth)=)[^\s\"'&,;)}}\]]+",
        rf"(\\?[\"']{_SECRET}\\?[\"']\s*:\s*\\?[\"'])[^\"'\\]+",
        r"(\bauthorization\\?[\"']?\s*[:=]\s*)(?:(?:bearer|basic|token)\s+)?[^\s\"',;]+",
        r"(\bbearer\s+)[\w.~+/=-]{8,}",
    )
]
_LOGIN = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@\"']+@", re.IGNORECASE)  # https://user:password@host
_KNOWN_FORM = re.compile(r"\b(?:hf_|api_org_|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|sk-)[A-Za-z0-9_-]{10,}")
_LONG_ENOUGH = 8  # a shorter value of the environment is hardly secret, and may stand in any text


def redact(text: str) -> str:
    """A text without its secrets: tokens and passwords by their name or form, and those of the environment.

    Everything that a run records or says of its command line and its arguments goes through here.

    Example:
        >>> redact("--student.hub_token abc https://me:abc@host/a?token=abc hf_abcdefghijkl")
        '--student.hub_token *** https://***@host/a?token=*** ***'
    """
    for name, value in os.environ.items():
        if _SECRET_NAME.fullmatch(name) and len(value) >= _LONG_ENOUGH:
            text = text.replace(value, _HIDDEN)
    for pattern in _PAIRS:
        text = pattern.sub(rf"\g<1>{_HIDDEN}", text)
    return _KNOWN_FORM.sub(_HIDDEN, _LOGIN.sub(rf"\g<1>{_HIDDEN}@", text))


def redact_values(value: Any) -> Any:
    """Lists, dictionaries and texts without secrets: of each text, and of each key that names one.

    Example:
        >>> redact_values({"hub_token": "abc", "a": ["https://me:abc@host"], "seed": 0, "token": None})
        {'hub_token': '***', 'a': ['https://***@host'], 'seed': 0, 'token': None}
    """
    if isinstance(value, dict):
        return {
            name: _HIDDEN if isinstance(one, str) and _SECRET_NAME.fullmatch(str(name)) else redact_values(one)
            for name, one in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact_values(one) for one in value]
    return redact(value) if isinstance(value, str) else value


def recorded_command(program: str, words: Sequence[str]) -> str:
    """A command line as it is recorded: as it was typed, without secrets.

    Args:
        program (`str`): What was run, e.g. `"eval.py"`.
        words (`Sequence[str]`): The words after it.

    Example:
        >>> recorded_command("eval.py", ["--a", "b c", "--hub_token", "x y"])
        "eval.py --a 'b c' --hub_token ***"
    """
    kept: list[str] = []
    hides = False
    for word in words:
        if word.startswith("--"):
            name, equals, _ = word.partition("=")
            hides = _SECRET_NAME.fullmatch(name) is not None
            kept.append(f"{name}={_HIDDEN}" if hides and equals else shlex.quote(redact(word)))
        elif not hides:
            kept.append(shlex.quote(redact(word)))
        elif not kept[-1].endswith(_HIDDEN):
            kept.append(_HIDDEN)
    return " ".join([program, *kept])


# Interruptions.


class _Interruption:
    """What signals do while a command runs: the first one raises `KeyboardInterrupt`, a second one ends at once."""

    current: "_Interruption | None" = None

    def __init__(self) -> None:
        self.number = 0  # of the signal that came

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            end_now(self.number)
        self.number = number
        raise KeyboardInterrupt

    def end(self) -> None:
        """Say so, and end with the signal's status. Further signals end at once and say nothing more."""
        status = exit_status(self.number or signal.SIGINT)
        if self.number:
            for number in SIGNALS:
                signal.signal(number, lambda *_: os._exit(status))
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(f"\n{INTERRUPTED}\n")
        sys.exit(status)


def _leave_signals_to_parent() -> None:
    """In a forked process, e.g. a data loader's worker: the main process answers Ctrl+C, and ends its workers."""
    if _Interruption.current is not None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_signals_to_parent)


@contextmanager
def _interruptible() -> Iterator[_Interruption]:
    """Take the signals, and give them back at a plain end. What the starter of the process ignores stays ignored."""
    interruption, before = _Interruption(), _Interruption.current
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    old = {number: signal.getsignal(number) for number in SIGNALS}
    hook = sys.unraisablehook

    def end_in_callback(unraisable: "sys.UnraisableHookArgs") -> None:
        if interruption.number and issubclass(unraisable.exc_type, KeyboardInterrupt):
            end_now(interruption.number)  # it was raised where Python can only drop it
        hook(unraisable)

    sys.unraisablehook, _Interruption.current = end_in_callback, interruption
    for number, handler in old.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, interruption)
    try:
        yield interruption
    finally:
        sys.unraisablehook, _Interruption.current = hook, before
        if not interruption.number:
            for number, handler in old.items():
                signal.signal(number, handler)


def _follow_launcher() -> None:
    """End as by SIGTERM when `accelerate launch` is gone, which does not tell its process that it was ended."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or threading.current_thread() is not threading.main_thread():
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="launcher").start()


def _has_no_reader(stream: object) -> bool:
    """Whether a stream is a pipe that nobody reads any more, as after `| head`."""
    try:
        poll = select.poll()
        poll.register(stream, 0)  # type: ignore[arg-type]
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, TypeError, ValueError):  # a system without poll; a stream without a descriptor
        return False


@contextmanager
def _quiet_without_reader() -> Iterator[None]:
    """Once nobody reads what the command prints, end it as a signal would: quietly. A mistake keeps its line."""
    end: SystemExit | None = None
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    try:
        try:
            yield
        except SystemExit as error:
            end = error
        for stream in streams:
            stream.flush()
    except BrokenPipeError:
        gone = [stream for stream in streams if _has_no_reader(stream)]
        if not gone:
            raise  # another pipe, e.g. the connection to a server
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in gone:  # what it still holds would be complained of when Python ends
            os.dup2(nowhere, stream.fileno())
        end = end if end is not None and end.code else SystemExit(exit_status(_CLOSED_PIPE))
    if end is not None:
        raise end


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Put a field in front of what is wrong with its value.

    Args:
        field (`str`): As the user wrote it.

    Raises:
        FileNotFoundError, OSError, ImportError, ValueError: As it was raised inside, with the field. An error that
            names it already, and several [`Mistakes`], are passed on.
    """
    try:
        yield
    except FAILURES as error:
        if isinstance(error, Mistakes) or str(error).startswith(field):
            raise
        text = one_line(error)
        text = text[0].lower() + text[1:] if text.startswith("Expected ") else text
        kinds = (FileNotFoundError, OSError, ImportError)
        kind = next((one for one in kinds if isinstance(error, one)), ValueError)
        raise kind(f"{field}: {text}") from error


_CLOSED_PIPE = 13  # SIGPIPE, which Python ignores and Windows lacks
_WHERE = "(TRANSFORMERS_VERBOSITY=info shows where in the code)"
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def _told(error: BaseException) -> str:
    """What a command says of a mistake: one line, or one for each of several."""
    if not isinstance(error, Mistakes):
        return f"Failed: {redact(one_line(error))} {_WHERE}"
    lines = [f"  {number}. {redact(one_line(one))}" for number, one in enumerate(error.errors, 1)]
    return "\n".join([f"Failed: {len(lines)} mistakes, found before any work: {_WHERE}", *lines])


def check_launcher() -> None:
    """Refuse to run as one process where `accelerate launch` was asked for several.

    Without GPUs, or with `--cpu`, it starts one process whatever `--num_processes` says. It then sets the address
    where several would meet, but not how many there are.

    Raises:
        ValueError: Saying what to run instead.
    """
    met = "ACCELERATE_MIXED_PRECISION" in os.environ and {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
    if met and not any(name in os.environ for name in _WORLD_SIZES):
        raise ValueError(
            "accelerate launch: expected as many processes as --num_processes says, got one: without GPUs, or with "
            "--cpu, accelerate starts no more. Run the script with `python` alone: one process, which uses all cores."
        )


def command(main: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate the `main` of a command: a mistake of the user ends in one line on stderr and exit status 1.

    `TRANSFORMERS_VERBOSITY=info` shows the traceback instead. Ctrl+C, SIGTERM and SIGHUP end with one line and exit
    status 130, 143 and 129; so does the end of `accelerate launch`. A second signal ends at once. Where the reader of
    its output has gone (`| head`), it ends with status 141 and says nothing.

    Args:
        main (`Callable`): The function; what it returns is passed on.

    Returns:
        `Callable`: It raises `SystemExit` instead of any error that [`is_mistake`] and of `KeyboardInterrupt`.
    """

    @functools.wraps(main)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        _follow_launcher()
        for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks stops no command
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        with _quiet_without_reader(), _interruptible() as interruption:
            try:
                check_launcher()
                return main(*args, **kwargs)
            except KeyboardInterrupt:
                interruption.end()
                raise
            except (*FAILURES, RuntimeError) as error:
                if isinstance(error, BrokenPipeError) and any(map(_has_no_reader, (sys.stdout, sys.stderr))):
                    raise
                if transformers_logging.get_verbosity() <= logging.INFO or not is_mistake(error):
                    raise
                sys.exit(_told(error))

    return run


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The help of a command: the description as it is written, and the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required or action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)
