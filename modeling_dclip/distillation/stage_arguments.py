"""What every stage that trains may set: trackers, memory-saving optimisers, and adapters in place of whole weights."""

import importlib.util
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

# What an adapter is made from. Records that were written before these fields were know nothing of them: at their defaults they decide nothing.
ADAPTER_FIELDS = (
    "lora_rank", "lora_alpha", "lora_dropout", "use_dora", "lora_target_modules", "lora_text", "merge_adapter",
)  # fmt: skip

# Optimisers of TrainingArguments with their state in 8 bits, and the package that each needs.
EIGHT_BIT_PACKAGES = {
    "adamw_torch_8bit": "torchao",
    **dict.fromkeys(
        ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "ademamix_8bit", "paged_ademamix_8bit", "lion_8bit", "paged_lion_8bit",
         "rmsprop_bnb_8bit"),
        "bitsandbytes",
    ),
}  # fmt: skip


def describe(text: str, default: Any = None, **metadata: Any) -> Any:
    """A field with its default and its one documentation, which `--help` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **metadata})
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class StageTrainingArguments(TrainingArguments):
    """Defaults of every stage that trains."""

    report_to: list[str] = describe(
        "Where to log besides the console and trainer_state.json: auto (tensorboard where it is installed), none, or trackers by name, such "
        "as tensorboard, wandb, trackio.",
        ["auto"],
    )
    remove_unused_columns: bool = describe("Must stay false: batches hold columns that no forward names.", False)
    dataloader_drop_last: bool = describe(
        "Drop the last, smaller batch of an epoch: its negatives would be fewer.", True
    )
    logging_nan_inf_filter: bool = describe("Hide NaN in the log. Off: a NaN stops the run at the next log.", False)
    logging_steps: float = describe("Log every so many steps; below 1 a share of all steps.", 50)
    save_strategy: str = describe("When to save checkpoints: no, steps or epoch.", "epoch")
    save_total_limit: int | None = describe("Checkpoints to keep.", 1)
    lr_scheduler_type: str = describe("Schedule of the learning rate.", "constant")
    ddp_find_unused_parameters: bool | None = describe("Look for unused parameters; every trained one is used.", False)
    image_cache_mib: int = describe(
        "Bound in MiB a process for decoded pixels held in memory; 0 decodes every time.", 2048
    )

    def __post_init__(self):
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns: expected false, got true. Batches hold columns that no forward names."
            )
        self.report_to = _find_trackers(self.report_to)
        package = EIGHT_BIT_PACKAGES.get(str(self.optim))
        if package is not None and not is_installed(package):
            raise ImportError(
                f"optim: expected the package {package} for {str(self.optim)!r}, got none. Install it with `pip install {package}`, or take "
                "adamw_torch."
            )
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # else a warning an epoch
        super().__post_init__()


@dataclass
class AdapterArguments(StageTrainingArguments):
    """Low-rank adapters in place of whole weights. They decide nothing where `lora_rank` is left out."""

    lora_rank: int | None = describe("Train low-rank adapters (LoRA) of this rank, every other weight frozen.")
    lora_alpha: int | None = describe("Their scale is this over the rank; by default the rank, a scale of 1.")
    lora_dropout: float = describe("Dropout in front of them, in [0, 1).", 0.0)
    use_dora: bool = describe("DoRA: a trained magnitude beside the low-rank direction.", False)
    lora_target_modules: list[str] = describe(
        "Last names of the linear layers to adapt. By default the projections of attention, of Mamba mixers and of MLPs.",
        [],
    )
    merge_adapter: bool = describe(
        "Save whole weights, the adapter merged in, beside the adapter. Off: the adapter alone.", True
    )

    def __post_init__(self):
        defaults = {f.name: default_of(f) for f in fields(self) if f.name in ADAPTER_FIELDS}
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        if self.lora_rank is None and changed:
            raise ValueError(f"{changed[0]}: expected lora_rank beside it, got none. Set the rank, for example 16.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank: expected 1 or more, got {self.lora_rank}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: expected a share in [0, 1), got {self.lora_dropout}.")
        if self.lora_rank is not None and not is_installed("peft"):
            raise ImportError(
                'lora_rank: expected the package peft, got none. Install it with `pip install "modeling_dclip[peft]"`.'
            )
        super().__post_init__()


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    return importlib.util.find_spec(package) is not None


def default_of(one: Any) -> Any:
    """The default of a field."""
    return one.default_factory() if callable(one.default_factory) else one.default


def _find_trackers(names: str | list[str]) -> list[str]:
    """The trackers that a run reports to, all of them there."""
    names = [names] if isinstance(names, str) else list(names)
    if names == ["auto"]:
        return ["tensorboard"] if is_installed("tensorboard") else []
    if names in (["none"], ["all"], []):
        return names if names == ["all"] else []
    available = get_available_reporting_integrations()
    if missing := [name for name in names if name not in available]:
        raise ImportError(
            f"report_to: expected a tracker that is installed ({', '.join(available) or 'there is none'}), got {missing[0]!r}. Install it "
            f"with `pip install {missing[0]}`, or write report_to none: losses also go to trainer_state.json."
        )
    return names
