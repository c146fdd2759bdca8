"""What one publication may set."""

from dataclasses import dataclass, field
from typing import Any


def _help(text: str, default: Any = None, **options: Any) -> Any:
    return field(default=default, metadata={"help": text}, **options)


@dataclass
class PublishArguments:
    """Of `python -m modeling_dclip.hub.publish`."""

    model: str = field(metadata={"help": "Folder of the trained dual encoder, as train.py wrote it."})
    results: list[str] = field(
        metadata={"help": "Results files, or folders of them; the records of these weights are shown."}
    )
    repo_id: str = field(
        metadata={"help": "namespace/name of the dual encoder; the others get -vision, -teacher, -clip behind it."}
    )
    license: str = field(metadata={"help": "Of the weights, as the Hub writes it, for example mit."})
    teacher: str | None = _help("Folder of the trained teacher, to be published too.")
    license_name: str | None = _help("With the licence `other`: its name.")
    license_link: str | None = _help("With the licence `other`: where it can be read.")
    base_model: str | None = _help("Hub id of the model it starts from, where it was trained from a local copy.")
    hardware: str | None = _help("What it was trained on, for the card.")
    emissions_grams: float | None = _help("CO2-equivalent of the training in grams, for the card.")
    private: bool = _help("Make the repositories private.", False)
    dry_run: bool = _help("Write the folders and say what would be pushed; nothing leaves this machine.", False)
    staging: str | None = _help(
        "Folder to write the repositories in; by default a temporary one, outputs/publish with dry_run."
    )
    cards: str | None = _help("Folder of the cards' templates; by default hub_cards of this checkout.")
