"""What a publication is asked for. It is read before PyTorch is, for which `--help` need not wait."""

from dataclasses import dataclass, field
from typing import Any

from modeling_dclip.data.specs import Range

DELAYS_S = (1.0, 2.0, 4.0, 8.0)  # before each repetition of a call to the Hub that failed


def _help(text: str, default: Any = None, **options: Any) -> Any:
    return field(default=default, metadata={"help": text}, **options)


@dataclass
class PublishArguments:
    """Arguments of `python -m modeling_dclip.hub.publish`."""

    model: str = field(
        metadata={"help": "Folder of the trained dual encoder, as train.py wrote it: outputs/mine/student."}
    )
    results: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Results files, or folders of them; the card shows the records of these weights. The default is "
            "the folder `results` of the model's run, and its file `results.json`."
        },
    )
    repo_id: str | None = _help(
        "Needed: namespace/name of the dual encoder. The other repositories get the suffix -vision or -teacher."
    )
    license: str | None = _help(
        "Needed: licence of the weights, by its id on the Hub: mit, apache-2.0, cc-by-nc-4.0, other, and so on."
    )
    teacher: str | None = _help("Folder of the trained teacher, to publish it too: outputs/mine/teacher.")
    license_name: str | None = _help("Name of the licence, if the licence is `other`.")
    license_link: str | None = _help("Address of the licence's text, if the licence is `other`.")
    dataset: list[str] = field(
        default_factory=list,
        metadata={
            "help": 'Names of the training data for the card: words ("pictures of our garden"), or an id of the Hub '
            "(me/photos), which becomes a link."
        },
    )
    language: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Languages of the captions for the card, by their codes: en, de. By default English where the "
            "training data are known to be, else the card states none."
        },
    )
    examples: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Pictures to publish with the card: files named as what they show (a-red-bicycle.jpg), a folder "
            "of such, a spec of captioned images (csv:TABLE.csv:FOLDER@4), or none. By default only drawn scenes are "
            "shown, where the model was trained on them; photographs are published only if named here."
        },
    )
    base_model: str | None = _help("Hub id of the model that training started from, if that was a local copy.")
    hardware: str | None = _help('Hardware that it was trained on, for the card: "one A100".')
    emissions_grams: float | None = field(
        default=None,
        metadata={"help": "CO2-equivalent of the training in grams, for the card.", "range": Range(0, 1e15)},
    )
    private: bool = _help("Make the repositories private.", False)
    dry_run: bool = _help("Write the folders and list what would be pushed. Nothing leaves this machine.", False)
    staging: str | None = _help(
        "Folder to write the repositories in; what an earlier run wrote there is replaced. The default is a temporary "
        "one, or outputs/publish/NAMESPACE/NAME with dry_run."
    )
    cards: str | None = _help("Folder of the cards' templates. The default is hub_cards of this checkout.")
