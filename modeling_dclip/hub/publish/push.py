"""Push folders to repositories of the Hub: one commit each, or none where nothing differs.

Failures that may pass (a busy Hub, a lost connection, a commit of somebody else in between) are tried again.
"""

import fnmatch
import glob
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.hf_api import RepoFile

from modeling_dclip.data.failures import TransportError
from modeling_dclip.data.files import read_text
from modeling_dclip.encoders.fingerprints import hash_file, hash_git_blob
from modeling_dclip.hub.publish.arguments import DELAYS_S
from modeling_dclip.hub.publish.facts import check_repo_name
from modeling_dclip.hub.publish.staging import StagedRepo, list_files

logger = logging.getLogger(__name__)

# The Hub is busy, broken or too slow. 412: somebody else has committed since the files were compared.
TRANSIENT = {408, 412, 429, 500, 502, 503, 504}
# The files that publishing writes. Those that it no longer writes are deleted; all other files of a repository stay.
OWNED = ("*.py", "*.safetensors", "*.safetensors.index.json", "examples/*.png", "examples/*.jpg", "adapter/adapter_*")
MESSAGE = "Publish with modeling_dclip"

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Pushed:
    """A repository after pushing.

    Args:
        repo_id (`str`): Its id on the Hub.
        url (`str`): The address of its page.
        commit (`str`): The commit that it is at now.
        changed, deleted (`tuple[str, ...]`): Files that were written and deleted; both empty if nothing differed.
    """

    repo_id: str
    url: str
    commit: str
    changed: tuple[str, ...]
    deleted: tuple[str, ...]


def push_repos(
    staged: Sequence[StagedRepo], *, private: bool = False, delays: tuple[float, ...] = DELAYS_S
) -> list[Pushed]:
    """Push all repositories of a publication, after the Hub has accepted all of their cards.

    Args:
        staged (`Sequence[StagedRepo]`): The written repositories, in the order of pushing.
        private (`bool`, *optional*, defaults to `False`): Make the repositories private.
        delays (`tuple[float, ...]`, *optional*): Seconds before each repetition after a failure that may pass.

    Returns:
        `list[Pushed]`: In the same order.

    Raises:
        ConnectionError: If the Hub cannot be reached or stays busy.
        PermissionError: If the Hub refuses.
        ValueError: If the Hub does not accept a card or does not know a base model, or a repository that should be
            private is public. In the first two cases nothing was pushed.
    """
    api = HfApi()
    cards = {repo.repo_id: read_text(repo.folder / "README.md") for repo in staged}
    for repo_id, card in cards.items():
        validate_online(card, repo_id, delays)
    base_models = [name for card in cards.values() for name in ModelCard(card).data.get("base_model") or []]
    check_base_models(list(dict.fromkeys(base_models)), api, delays)
    return [push_folder(repo.repo_id, repo.folder, api, private=private, delays=delays) for repo in staged]


def retrying(attempt: Callable[[], _Result], what: str, delays: tuple[float, ...] = DELAYS_S) -> _Result:
    """Do something over the network, and repeat it after failures that may pass.

    Args:
        attempt (`Callable`): What to do; it must be safe to repeat.
        what (`str`): Its name, for messages.
        delays (`tuple[float, ...]`, *optional*): Seconds before each repetition.

    Returns:
        What `attempt` returns.

    Raises:
        ConnectionError: If the last repetition fails in the same way.
        HfHubHTTPError: If the Hub refuses.
    """
    number = 0
    while True:
        number += 1
        try:
            return attempt()
        except HfHubHTTPError as error:
            if error.response.status_code not in TRANSIENT:
                raise
            problem = f"the Hub answered {error.response.status_code}"
            cause: Exception = error
        except TransportError as error:
            problem, cause = f"{type(error).__name__}: {error}", error
        if number > len(delays):
            raise ConnectionError(
                f"Expected {what} to succeed, got {problem}, {number} times. Try again later. Files that are already "
                "on the Hub are not pushed again."
            ) from cause
        logger.warning("%s: %s; trying again in %.1f s", what, problem, delays[number - 1])
        time.sleep(delays[number - 1])


def check_access(repo_id: str, api: HfApi, delays: tuple[float, ...] = DELAYS_S) -> str:
    """Check that the token may write to a namespace, before anything long begins.

    Args:
        repo_id (`str`): `namespace/name`.
        api (`HfApi`): The Hub to push to.
        delays (`tuple[float, ...]`, *optional*): As for [`retrying`].

    Returns:
        `str`: The name of the token's user.

    Raises:
        ConnectionError: If the Hub cannot be reached.
        PermissionError: If there is no token, the Hub does not know it, or it may not write there.
        ValueError: If `repo_id` is not a name of a repository.
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
            "Make a token with the role 'write' in the settings of your account, and set HF_TOKEN or run "
            "`hf auth login`."
        ) from error
    names = [who["name"], *(organisation["name"] for organisation in who.get("orgs", []))]
    if namespace not in names:
        raise PermissionError(
            f"Expected a repository of {' or '.join(names)}, whom the token belongs to, got {repo_id!r}. Give another "
            "name, or use another token."
        )
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PermissionError(
            f"Expected a token that may write, got one of {who['name']} that only reads. Make one with the role "
            "'write'."
        )
    return who["name"]


def validate_online(card: str, repo_id: str, delays: tuple[float, ...] = DELAYS_S) -> None:
    """Let the Hub check a card's metadata.

    Args:
        card (`str`): The rendered card.
        repo_id (`str`): The card's repository, for messages.
        delays (`tuple[float, ...]`, *optional*): As for [`retrying`].

    Raises:
        ConnectionError: If the Hub cannot be reached.
        ValueError: If the Hub does not accept them.
    """
    try:
        retrying(ModelCard(card).validate, f"checking the card of {repo_id}", delays)
    except ValueError as error:
        raise ValueError(f"Expected metadata that the Hub accepts in the card of {repo_id}, got: {error}") from error


def check_base_models(names: Sequence[str], api: HfApi, delays: tuple[float, ...] = DELAYS_S) -> None:
    """Check that the Hub has the models that the cards name as their base; a relative folder looks like an id.

    Args:
        names (`Sequence[str]`): Ids of models.
        api (`HfApi`): The Hub to push to.
        delays (`tuple[float, ...]`, *optional*): As for [`retrying`].

    Raises:
        ConnectionError: If the Hub cannot be reached.
        ValueError: If the Hub does not know one.
    """
    for name in names:
        try:
            retrying(partial(api.model_info, name), f"asking for {name}", delays)
        except HfHubHTTPError as error:
            raise ValueError(
                f"base_model: expected a model of the Hub, got {name!r}, which it does not know. If that is a folder, "
                "publish from the folder where training ran, or give --base_model."
            ) from error


def push_folder(
    repo_id: str, folder: Path, api: HfApi, *, private: bool = False, delays: tuple[float, ...] = DELAYS_S
) -> Pushed:
    """Make a repository hold the files of a folder, in one commit, or in none if it already does.

    The repository is created if needed. Files that publishing does not write, such as an `onnx` folder, stay.

    Args:
        repo_id (`str`): `namespace/name`.
        folder (`Path`): The complete repository.
        api (`HfApi`): The Hub to push to.
        private (`bool`, *optional*, defaults to `False`): Make it private. An existing repository must be private.
        delays (`tuple[float, ...]`, *optional*): As for [`retrying`].

    Returns:
        [`Pushed`]

    Raises:
        ConnectionError: If the Hub cannot be reached.
        PermissionError: If the Hub refuses.
        ValueError: If the repository should be private and exists in public.
    """

    def attempt() -> Pushed:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.repo_info(repo_id)
        if private and not info.private:
            raise ValueError(f"Expected {repo_id} to be private, got a public one. Change it on its page of the Hub.")
        entries = api.list_repo_tree(repo_id, recursive=True)
        remote = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        changed, deleted = find_differences(folder, remote)
        commit = str(info.sha)
        if changed or deleted:
            # Exact names in place of patterns, because `*` of `upload_folder` crosses folders: "*.safetensors" would
            # delete somebody's onnx/model.safetensors. It makes one commit of fewer than 250 files. If somebody else
            # has committed since `info`, the Hub answers 412, and the comparison is made again.
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=MESSAGE,
                parent_commit=info.sha,
                allow_patterns=[glob.escape(path) for path in changed],
                delete_patterns=[glob.escape(path) for path in deleted] or None,
            ).oid
        return Pushed(repo_id, f"{api.endpoint}/{repo_id}", commit, tuple(changed), tuple(deleted))

    try:
        return retrying(attempt, f"pushing to {repo_id}", delays)
    except HfHubHTTPError as error:
        raise PermissionError(
            f"Expected to push to {repo_id}, got the answer {error.response.status_code}: "
            f"{error.server_message or error}. Is the token allowed to write there?"
        ) from error


def find_differences(folder: Path, remote: Mapping[str, RepoFile]) -> tuple[list[str], list[str]]:
    """Compare a folder with a repository by the files' content.

    `upload_folder` compares too, but it does not say what it changed, and cannot tell our files from others.

    Args:
        folder (`Path`): What the repository should hold.
        remote (`Mapping[str, RepoFile]`): What the repository holds, by path.

    Returns:
        `tuple[list[str], list[str]]`: Paths to write, and paths to delete.
    """
    local = list_files(folder)
    changed = [path for path in local if path not in remote or not _is_same(folder / path, remote[path])]
    stale = [path for path in sorted(remote) if path not in local and any(_matches(path, owned) for owned in OWNED)]
    return changed, stale


def _matches(path: str, pattern: str) -> bool:
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)


def _is_same(path: Path, remote: RepoFile) -> bool:
    """Compare a file by SHA-256 if the remote one is stored as a large file, else by git's hash of its content."""
    if path.stat().st_size != remote.size:
        return False
    if remote.lfs:
        return hash_file(path) == remote.lfs.sha256
    return hash_git_blob(path) == remote.blob_id
