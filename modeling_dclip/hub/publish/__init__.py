"""Publish a trained model on the Hub, in three passes: gather the facts, stage the repositories, push them."""

import shlex
import textwrap
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modeling_dclip.data.files import temporary_folder
from modeling_dclip.hub.publish.arguments import DELAYS_S, PublishArguments
from modeling_dclip.progress import count_of

# The rest is imported where it is needed: PyTorch and transformers take seconds, for which `--help` need not wait.
if TYPE_CHECKING:
    from modeling_dclip.hub.publish.push import Pushed
    from modeling_dclip.hub.publish.staging import StagedRepo

DRY_RUN_FOLDER = "outputs/publish"  # of a dry run; a folder in it for each dual encoder, named as its repository
PUBLISH_COMMAND = "python -m modeling_dclip.hub.publish"
_WIDTH = 120  # of a line in the terminal


def check_publication(arguments: PublishArguments, delays: tuple[float, ...] = DELAYS_S) -> None:
    """Check what can be checked before there is a model: the name, the licence and the token.

    Args:
        arguments ([`PublishArguments`]): The arguments of the publication.
        delays (`tuple[float, ...]`, *optional*): Seconds before each repetition after a failure that may pass.

    Raises:
        ConnectionError: If the Hub cannot be reached or stays busy.
        PermissionError: If the token is missing, unknown, or may not write there.
        PublicationError: If several of these are wrong.
        ValueError: If the name or the licence is not valid.
    """
    from huggingface_hub import HfApi

    from modeling_dclip.hub.publish.facts import Problems, check_repo_name
    from modeling_dclip.hub.publish.licences import check_licence
    from modeling_dclip.hub.publish.push import check_access

    problems = Problems()
    problems.find(lambda: check_repo_name(arguments.repo_id))
    problems.find(lambda: check_licence(arguments.license, arguments.license_name, arguments.license_link, []))
    if not any("repo_id" in str(problem) for problem in problems.found):
        problems.find(lambda: check_access(str(arguments.repo_id), HfApi(), delays))
    problems.report()


def publish(arguments: PublishArguments, delays: tuple[float, ...] = DELAYS_S) -> "list[StagedRepo] | list[Pushed]":
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
        PublicationError: If several things are wrong.
    """
    from huggingface_hub import HfApi

    from modeling_dclip.hub.publish.facts import Problems, gather
    from modeling_dclip.hub.publish.push import check_access, push_repos
    from modeling_dclip.hub.publish.staging import check_staging, stage

    problems = Problems()
    with temporary_folder() as temporary:
        repo_id, root = str(arguments.repo_id), temporary / "repos"
        if _is_name(arguments.repo_id):
            if arguments.dry_run or arguments.staging:
                root = Path(arguments.staging or Path(DRY_RUN_FOLDER, *repo_id.split("/")))
                problems.find(lambda: check_staging(root, repo_id))
            if not arguments.dry_run:
                problems.find(lambda: check_access(repo_id, HfApi(), delays))
        staged = stage(gather(arguments, problems), root)
        return staged if arguments.dry_run else push_repos(staged, private=arguments.private, delays=delays)


def _is_name(repo_id: str | None) -> bool:
    """Whether the Hub may be asked about a name; what is wrong with it is told by [`gather`]."""
    from modeling_dclip.hub.publish.facts import Problems, check_repo_name

    problems = Problems()
    problems.find(lambda: check_repo_name(repo_id))
    return not problems.found


def describe_publication(done: "list[StagedRepo] | list[Pushed]") -> str:
    """Say what was done with each repository, or in a dry run what would be done.

    Args:
        done (`list[StagedRepo]` or `list[Pushed]`): What [`publish`] returned.

    Returns:
        `str`: A line for each repository; in a dry run also its files.
    """
    from modeling_dclip.hub.publish.staging import StagedRepo, list_files

    lines = []
    for repo in done:
        if isinstance(repo, StagedRepo):
            files = list_files(repo.folder)
            size = sum((repo.folder / name).stat().st_size for name in files)
            lines.append(f"{repo.repo_id}: would push {count_of(len(files), 'file')}, {_show_size(size)}")
            names = textwrap.wrap(", ".join(files), _WIDTH - 4, break_on_hyphens=False, break_long_words=False)
            lines += [f"    {line}" for line in names]
        elif repo.changed or repo.deleted:
            deleted = f", {len(repo.deleted)} deleted" if repo.deleted else ""
            written = f"{count_of(len(repo.changed), 'file')} written{deleted}"
            lines.append(f"{repo.url}: {written}, commit {repo.commit}")
        else:
            lines.append(f"{repo.url}: nothing to change, commit {repo.commit}")
    return "\n".join(lines)


def describe_dry_run(arguments: PublishArguments, done: "list[StagedRepo] | list[Pushed]") -> str:
    """Say what a dry run wrote, what it changed, and what to do next.

    Args:
        arguments ([`PublishArguments`]): Those of the dry run.
        done (`list[StagedRepo]`): What [`publish`] returned.

    Returns:
        `str`: Lines; the last one says what to read.
    """
    from modeling_dclip.hub.publish.staging import StagedRepo

    staged = [repo for repo in done if isinstance(repo, StagedRepo)]
    cards = [str(repo.folder / "README.md") for repo in reversed(staged)]  # the dual encoder's first
    lines = [describe_publication(staged), "", _describe_changes(staged), *_describe_open_ends(arguments, staged), ""]
    lines += [
        "To push it:",
        f"  {shlex.join([*PUBLISH_COMMAND.split(), *to_words(replace(arguments, dry_run=False))])}",
        "",
    ]
    return "\n".join([*lines, f"Nothing was pushed; read {', '.join(cards)}"])


def _describe_changes(staged: "list[StagedRepo]") -> str:
    if all(repo.changed is None for repo in staged):
        return "Written for the first time. The same command again replaces the folders and says what changed."
    told = {
        "Changed since the last dry run:": [(repo, repo.changed) for repo in staged if repo.changed],
        "Left out, which the last dry run wrote:": [(repo, repo.left_out) for repo in staged if repo.left_out],
    }
    lines = []
    for title, changes in told.items():
        lines += [title] if changes else []
        lines += [f"  {repo.folder.name}: {_list_some(names)}" for repo, names in changes]
    return "\n".join(lines) or "Nothing changed since the last dry run."


def _list_some(names: tuple[str, ...], most: int = 4) -> str:
    more = f" and {count_of(len(names) - most, 'other file')}" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _describe_open_ends(arguments: PublishArguments, staged: "list[StagedRepo]") -> list[str]:
    """What the user may want to add, or has to do before pushing."""
    from huggingface_hub import ModelCard, get_token

    from modeling_dclip.encoders.loading import stored_dtype
    from modeling_dclip.hub.publish.pictures import EXAMPLES
    from modeling_dclip.hub.publish.staging import list_files

    dual = next(repo for repo in staged if repo.kind == "dual")
    shown = [name for name in list_files(dual.folder) if name.startswith(f"{EXAMPLES}/")]
    lines = [f"Older results that the card leaves out: {', '.join(dual.passed_over)}."] if dual.passed_over else []
    if arguments.examples and shown:
        lines.append(f"{count_of(len(shown), 'example picture')} will be public. Make sure that you may publish them.")
        if missing := len(shown) - len(ModelCard.load(dual.folder / "README.md").data.to_dict().get("widget", [])):
            lines.append(
                f"{count_of(missing, 'example picture')} of the card's table will not be in the Hub's widget, which "
                "takes texts apart at commas."
            )
    elif not arguments.examples and not shown:
        lines.append(
            "No example pictures: your own are not published unless you name them, with --examples FILE... or "
            "--examples csv:TABLE.csv:FOLDER@4."
        )
    if "base_model" not in ModelCard.load(dual.folder / "README.md").data.to_dict():
        lines.append(
            "The card names no base model, because training started from a folder. Where that is a copy of a model on "
            "the Hub, name it with --base_model NAME."
        )
    if "language" not in ModelCard.load(dual.folder / "README.md").data.to_dict():
        lines.append("The card names no language, because that of the captions is not known. Name it: --language en")
    saved, published = stored_dtype(arguments.model), stored_dtype(dual.folder)
    if saved != published:
        lines.append(
            f"The weights go out in {published}, in which the results were measured; training saved them in {saved}, "
            "which takes half the space. transformers computes in the type that is stored."
        )
    if not arguments.dataset and not _reads_known_data(arguments):
        lines.append("The card names the training data by file only; --dataset NAME... gives them a name.")
    beside = Path(arguments.model).parent / "teacher"
    if arguments.teacher is None and (beside / "config.json").is_file():
        lines.append(f"The teacher is not published; --teacher {beside} adds it.")
    if get_token() is None:
        lines.append("No token on this machine yet: run `hf auth login` before you push.")
    return lines


def _reads_known_data(arguments: PublishArguments) -> bool:
    """Whether a reader knows the training data by their kind, such as COCO; not files of one's own."""
    from modeling_dclip.hub.publish.licences import read_arguments

    specs = read_arguments(arguments.model)["train_datasets"] or []
    return not any(spec.partition(":")[0] in ("csv", "images", "parquet", "disk", "wds") for spec in specs)


def to_words(arguments: PublishArguments) -> list[str]:
    """The words of a command line that give these arguments.

    Example:
        >>> to_words(PublishArguments("a/student", repo_id="me/clip", license="mit", private=True))
        ['--model', 'a/student', '--repo_id', 'me/clip', '--license', 'mit', '--private']
    """
    words = []
    for one in fields(arguments):
        value = getattr(arguments, one.name)
        if value == (one.default if one.default_factory is MISSING else one.default_factory()):
            continue
        given = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{one.name}", *map(str, given)]
    return words


def _show_size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
