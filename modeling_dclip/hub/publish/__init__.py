"""Publish a trained model: stage the repositories in a folder, check them, and push each in one commit."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard

from modeling_dclip.hub.publish.cards import load_jinja
from modeling_dclip.hub.publish.facts import PublishArguments
from modeling_dclip.hub.publish.licences import check_licence
from modeling_dclip.hub.publish.push import (
    DELAYS_S,
    Pushed,
    check_access,
    check_base_models,
    check_repo_name,
    list_files,
    push_folder,
    validate_online,
)
from modeling_dclip.hub.publish.staging import StagedRepo, stage_repos

MESSAGE = "Publish with modeling_dclip"
DRY_RUN_FOLDER = "outputs/publish"


def check_publication(arguments: PublishArguments, delays: tuple[float, ...] = DELAYS_S) -> None:
    """See what can be seen before there is a model: the name, the licence, the token, the templates' library.

    Args:
        arguments ([`PublishArguments`]): Of the publication to come.
        delays (`tuple[float, ...]`, *optional*): As for [`publish`].

    Raises:
        ConnectionError: If the Hub cannot be reached or stays busy.
        ImportError: If jinja2 is not installed.
        PermissionError: If the token is missing, unknown, or may not write there.
        ValueError: If the name or the licence is none.
    """
    check_repo_name(arguments.repo_id)
    check_licence(arguments.license, arguments.license_name, arguments.license_link, [])
    load_jinja()
    check_access(arguments.repo_id, HfApi(), delays)


def publish(arguments: PublishArguments, delays: tuple[float, ...] = DELAYS_S) -> list[StagedRepo] | list[Pushed]:
    """Write the repositories, check them, and push them.

    Args:
        arguments ([`PublishArguments`]): What, as what, and whether at all.
        delays (`tuple[float, ...]`, *optional*): Seconds before each repetition of what failed transiently.

    Returns:
        `list[StagedRepo]` of a dry run, else `list[Pushed]`.

    Raises:
        ConnectionError: If the Hub cannot be reached or stays busy.
        FileExistsError, FileNotFoundError, ImportError, ValueError: If the publication is not complete. Then nothing
            was pushed.
        PermissionError: If the token is missing, unknown, or may not write there.
    """
    if arguments.dry_run:
        check_repo_name(arguments.repo_id)
        return stage_repos(arguments, Path(arguments.staging or DRY_RUN_FOLDER))
    check_publication(arguments, delays)
    api = HfApi()
    with tempfile.TemporaryDirectory() as temporary:
        staged = stage_repos(arguments, Path(arguments.staging or f"{temporary}/repos"))
        cards = {repo.repo_id: (repo.folder / "README.md").read_text(encoding="utf-8") for repo in staged}
        for repo_id, card in cards.items():
            validate_online(card, repo_id, delays)
        check_base_models(list(ModelCard(cards[arguments.repo_id]).data.get("base_model") or []), api, delays)
        options = {"message": MESSAGE, "private": arguments.private, "delays": delays}
        return [push_folder(repo.repo_id, repo.folder, api, **options) for repo in staged]


def describe_publication(done: list[StagedRepo] | list[Pushed]) -> str:
    """Say what became of each repository, or would."""
    lines = []
    for repo in done:
        if isinstance(repo, StagedRepo):
            files = list_files(repo.folder)
            size = sum((repo.folder / name).stat().st_size for name in files) / 2**20
            lines.append(f"{repo.repo_id}: would push {len(files)} files, {size:.1f} MiB, from {repo.folder}")
            lines += [f"    {name}" for name in files]
        elif repo.changed or repo.deleted:
            lines.append(
                f"{repo.url}: {len(repo.changed)} files written, {len(repo.deleted)} deleted, commit {repo.commit}"
            )
        else:
            lines.append(f"{repo.url}: already as it should be, commit {repo.commit}")
    return "\n".join(lines)
