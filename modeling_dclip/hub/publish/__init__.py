"""Publish a trained model on the Hub, in three passes: gather the facts, stage the repositories, push them."""

from pathlib import Path

from huggingface_hub import HfApi

from modeling_dclip.data.files import check_new_folder, temporary_folder
from modeling_dclip.hub.publish.facts import PublishArguments, check_repo_name, gather
from modeling_dclip.hub.publish.licences import check_licence
from modeling_dclip.hub.publish.push import DELAYS_S, Pushed, check_access, push_repos
from modeling_dclip.hub.publish.staging import StagedRepo, list_files, stage

DRY_RUN_FOLDER = "outputs/publish"


def check_publication(arguments: PublishArguments, delays: tuple[float, ...] = DELAYS_S) -> None:
    """Check what can be checked before there is a model: the name, the licence and the token.

    Args:
        arguments ([`PublishArguments`]): The arguments of the publication.
        delays (`tuple[float, ...]`, *optional*): Seconds before each repetition after a failure that may pass.

    Raises:
        ConnectionError: If the Hub cannot be reached or stays busy.
        PermissionError: If the token is missing, unknown, or may not write there.
        ValueError: If the name or the licence is not valid.
    """
    check_repo_name(arguments.repo_id)
    check_licence(arguments.license, arguments.license_name, arguments.license_link, [])
    check_access(arguments.repo_id, HfApi(), delays)


def publish(arguments: PublishArguments, delays: tuple[float, ...] = DELAYS_S) -> list[StagedRepo] | list[Pushed]:
    """Gather the facts, write and check the repositories, and push them.

    Args:
        arguments ([`PublishArguments`]): What to publish. With `dry_run` nothing is pushed and the Hub is not asked.
        delays (`tuple[float, ...]`, *optional*): Seconds before each repetition after a failure that may pass.

    Returns:
        `list[StagedRepo]` of a dry run, else `list[Pushed]`.

    Raises:
        ConnectionError: If the Hub cannot be reached or stays busy.
        FileExistsError, FileNotFoundError, ValueError: If the publication is not complete. Then nothing
            was pushed.
        PermissionError: If the token is missing, unknown, or may not write there.
    """
    with temporary_folder() as temporary:
        root = Path(arguments.staging or (DRY_RUN_FOLDER if arguments.dry_run else temporary / "repos"))
        check_new_folder(root)
        if not arguments.dry_run:
            check_publication(arguments, delays)
        facts = gather(arguments)
        staged = stage(facts, root)
        return staged if arguments.dry_run else push_repos(staged, private=arguments.private, delays=delays)


def describe_publication(done: list[StagedRepo] | list[Pushed]) -> str:
    """Say what was done with each repository, or in a dry run what would be done.

    Args:
        done (`list[StagedRepo]` or `list[Pushed]`): What [`publish`] returned.

    Returns:
        `str`: One line for each repository; in a dry run also one for each file.
    """
    lines = []
    for repo in done:
        if isinstance(repo, StagedRepo):
            files = list_files(repo.folder)
            size_mib = sum((repo.folder / name).stat().st_size for name in files) / 2**20
            lines.append(f"{repo.repo_id}: would push {len(files)} files, {size_mib:.1f} MiB, from {repo.folder}")
            lines += [f"    {name}" for name in files]
        elif repo.changed or repo.deleted:
            lines.append(
                f"{repo.url}: {len(repo.changed)} files written, {len(repo.deleted)} deleted, commit {repo.commit}"
            )
        else:
            lines.append(f"{repo.url}: nothing to change, commit {repo.commit}")
    return "\n".join(lines)
