"""Bring a folder to a repository of the Hub: one commit, or none where nothing differs;
transient failures are tried again.
"""

import fnmatch
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from modeling_dclip.encoders.fingerprints import hash_file, hash_git_blob

try:
    from httpx2 import TransportError  # huggingface_hub 2
except ImportError:
    from httpx import TransportError

logger = logging.getLogger(__name__)

# Busy, broken or timed out; 412: another commit came first, and the difference has to be taken again.
TRANSIENT = {408, 412, 429, 500, 502, 503, 504}
DELAYS_S = (1.0, 2.0, 4.0, 8.0)
# What publishing writes, and so may delete when it writes it no more. Other files of a repository are left alone.
OWNED = ("*.py", "*.safetensors", "*.safetensors.index.json", "examples/*.png", "adapter/adapter_*")

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Pushed:
    """What became of a repository: its `url`, the `commit` it now is at, and the files that changed."""

    repo_id: str
    url: str
    commit: str
    changed: tuple[str, ...]
    deleted: tuple[str, ...]


def retrying(attempt: Callable[[], Answer], what: str, delays: tuple[float, ...] = DELAYS_S) -> Answer:
    """Do something over the network, again after a wait where the failure is transient.

    Args:
        attempt (`Callable`): Safe to repeat.
        what (`str`): It, for messages.
        delays (`tuple[float, ...]`, *optional*): Seconds before each repetition.

    Returns:
        What `attempt` returns.

    Raises:
        ConnectionError: If the last repetition fails so too.
        HfHubHTTPError: If the Hub refuses.
    """
    for number, delay in enumerate((*delays, None), start=1):
        try:
            return attempt()
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status not in TRANSIENT:
                raise
            problem, last = f"the Hub answered {status}", error
        except TransportError as error:
            problem, last = f"{type(error).__name__}: {error}", error
        if delay is None:
            raise ConnectionError(
                f"Expected {what} to succeed, got {problem}, {number} times. Try again later: what was pushed is not "
                "pushed again."
            ) from last
        logger.warning("%s: %s; trying again in %.1f s", what, problem, delay)
        time.sleep(delay)
    raise AssertionError("unreachable")  # the loop returns or raises


def check_repo_name(repo_id: str) -> None:
    """Check the form of a repository's name, without network.

    Raises:
        ValueError: If it is not `namespace/name`, or longer suffixes do not fit.
    """
    try:
        validate_repo_id(f"{repo_id}-teacher")
    except HFValidationError as error:
        raise ValueError(f"repo_id: expected namespace/name as the Hub takes it, got {repo_id!r}: {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id: expected namespace/name, for example me/dclip-vitb16, got {repo_id!r}.")


def check_access(repo_id: str, api: HfApi, delays: tuple[float, ...] = DELAYS_S) -> str:
    """See that the token may write to a namespace, before anything long begins.

    Args:
        repo_id (`str`): `namespace/name`.
        api (`HfApi`): Of the Hub to push to.
        delays (`tuple[float, ...]`, *optional*): Of [`retrying`].

    Returns:
        `str`: The token's user.

    Raises:
        ConnectionError: If the Hub cannot be reached.
        PermissionError: If there is no token, the Hub does not know it, or it may not write there.
        ValueError: If the name is none.
    """
    check_repo_name(repo_id)
    namespace = repo_id.split("/")[0]
    try:
        who = retrying(api.whoami, "asking the Hub whose token this is", delays)
    except LocalTokenNotFoundError as error:
        raise PermissionError(
            f"Expected a token of the Hub to push to {repo_id}, got none. Set HF_TOKEN or run `hf auth login`."
        ) from error
    except HfHubHTTPError as error:
        raise PermissionError(
            f"Expected a token that {api.endpoint} knows, got the answer {error.response.status_code} to this one. "
            "Make a token with the role 'write' in the settings of your account, and set HF_TOKEN or run `hf auth "
            "login`."
        ) from error
    names = [who["name"], *(organisation["name"] for organisation in who.get("orgs", []))]
    if namespace not in names:
        raise PermissionError(
            f"Expected a repository of {' or '.join(names)}, whose token this is, got {repo_id!r}. Name another, or "
            "use another token."
        )
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PermissionError(
            f"Expected a token that may write, got one of {who['name']} that only reads. Make one with the role "
            "'write'."
        )
    return who["name"]


def validate_online(card: str, what: str, delays: tuple[float, ...] = DELAYS_S) -> None:
    """Have the Hub check a card's metadata.

    Raises:
        ConnectionError: If the Hub cannot be reached.
        ValueError: If it finds fault with them.
    """
    try:
        retrying(ModelCard(card).validate, f"checking the card of {what}", delays)
    except ValueError as error:
        raise ValueError(f"Expected metadata that the Hub takes in the card of {what}, got: {error}") from error


def check_base_models(names: list[str], api: HfApi, delays: tuple[float, ...] = DELAYS_S) -> None:
    """See that models which cards name as their base are on the Hub: a relative folder looks like an id.

    Raises:
        ConnectionError: If the Hub cannot be reached.
        ValueError: If one is not there.
    """
    for name in names:
        try:
            retrying(lambda name=name: api.model_info(name), f"asking for {name}", delays)
        except HfHubHTTPError as error:
            raise ValueError(
                f"base_model: expected a model of the Hub, got {name!r}, which it does not know. If that is a folder, "
                "publish from where training ran, or give --base_model."
            ) from error


def push_folder(
    repo_id: str,
    folder: Path,
    api: HfApi,
    *,
    message: str,
    private: bool = False,
    delays: tuple[float, ...] = DELAYS_S,
) -> Pushed:
    """Make a repository hold a folder: created if need be, then one commit of all that differs, or none.

    Files that publishing does not write, such as an `onnx` folder, stay.

    Args:
        repo_id (`str`): `namespace/name`.
        folder (`Path`): Complete.
        api (`HfApi`): Of the Hub to push to.
        message (`str`): Of the commit.
        private (`bool`, *optional*, defaults to `False`): Make it private; one that exists has to be.
        delays (`tuple[float, ...]`, *optional*): Of [`retrying`].

    Returns:
        [`Pushed`]

    Raises:
        ConnectionError, PermissionError: If the Hub cannot be reached, or refuses.
        ValueError: If it should be private and exists in public.
    """

    def attempt() -> Pushed:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.repo_info(repo_id)
        if private and not info.private:
            raise ValueError(
                f"Expected {repo_id} to be private, got one that is public already. Change it on its page."
            )
        remote = {
            entry.path: entry for entry in api.list_repo_tree(repo_id, recursive=True) if isinstance(entry, RepoFile)
        }
        changed, deleted = find_differences(folder, remote)
        commit = info.sha
        if changed or deleted:
            operations: list[Any] = [CommitOperationAdd(path, folder / path) for path in changed]
            operations += [CommitOperationDelete(path) for path in deleted]
            # On another parent than was compared the Hub refuses, and the comparison is made again.
            commit = api.create_commit(repo_id, operations, commit_message=message, parent_commit=info.sha).oid
        return Pushed(repo_id, f"{api.endpoint}/{repo_id}", commit, tuple(changed), tuple(deleted))

    try:
        return retrying(attempt, f"pushing to {repo_id}", delays)
    except HfHubHTTPError as error:
        raise PermissionError(
            f"Expected to push to {repo_id}, got the answer {error.response.status_code}: "
            f"{error.server_message or error}. Is the token allowed to write there?"
        ) from error


def find_differences(folder: Path, remote: dict[str, RepoFile]) -> tuple[list[str], list[str]]:
    """Compare a folder with a repository by content.

    Args:
        folder (`Path`): What should be there.
        remote (`dict[str, RepoFile]`): What is, by path.

    Returns:
        `tuple[list[str], list[str]]`: Paths to write, and paths to delete.
    """
    local = list_files(folder)
    changed = [path for path in local if path not in remote or not _is_same(folder / path, remote[path])]
    stale = [path for path in sorted(remote) if path not in local and any(_matches(path, owned) for owned in OWNED)]
    return changed, stale


def list_files(folder: Path) -> list[str]:
    """The files below a folder, as paths inside a repository, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _matches(path: str, pattern: str) -> bool:
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)


def _is_same(path: Path, remote: RepoFile) -> bool:
    """Whether a file is the remote one: by SHA-256 where that is a large file, else by git's name of its content."""
    if path.stat().st_size != remote.size:
        return False
    if remote.lfs:
        return hash_file(path) == remote.lfs.sha256
    return hash_git_blob(path) == remote.blob_id
