"""Load a dual encoder of any family, ready to be evaluated, and say which weights it has.

| function | gives |
|---|---|
| [`load_dual_encoder`] | model, processor and revision, of any family |
| [`load_pair`] | model and processor, of any family |
| [`load_merged`] | a dual encoder that can be taught, its adapters merged |
| [`load_processor`] | the processor of a dual encoder that can be taught |
| [`load_checked`] | a model of a given class, every weight stored |
| [`read_config`] | a configuration of one of some kinds, its numbers within bounds |
| [`check_dual_encoder`] | nothing: says early what [`load_dual_encoder`] would refuse |
| [`check_model`] | a configuration, and that there are weights; none is fetched or read |

A folder's files are checked before anything is built of them: kind, sizes, names and types of the weights. Code that
lies beside a model is run by `trust_remote_code` alone.
"""

import logging
import math
import os
import pickle
import re
import string
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    has_file,
)

import modeling_dclip.auto_classes  # noqa: F401  registers the models of this package
from modeling_dclip.configuration_dclip import MODEL_SIZES, check_number, check_sizes
from modeling_dclip.configuration_dclip_teacher import NATIVE_ENCODERS
from modeling_dclip.encoders import DualEncoder
from modeling_dclip.encoders.families import WrongModelError, check_end_token, prepare_tokenizer
from modeling_dclip.encoders.fingerprints import model_revision
from modeling_dclip.encoders.open_clip import (
    OPEN_CLIP_PREFIX,
    OpenClipDualEncoder,
    check_open_clip,
    fingerprint_open_clip,
    load_open_clip,
)
from modeling_dclip.modeling_dclip import DCLIPModel
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher
from modeling_dclip.modeling_dmclip import DMCLIPModel
from modeling_dclip.processing_dclip import DCLIPProcessor

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FOLDER, ADAPTER_WEIGHTS = "adapter", "adapter_model.safetensors"  # where training writes adapters
# By model_type. A stock CLIP is the base that an adapter names, and becomes a DCLIP.
DUAL_ENCODERS: dict[str, Any] = {"dclip": DCLIPModel, "clip": DCLIPModel, "dmclip": DMCLIPModel}
# A student of another family of transformers (`NATIVE_ENCODERS`) stays what it is.
STUDENT_ENCODERS = (*DUAL_ENCODERS, *NATIVE_ENCODERS)
_NAMED = 5  # missing weights in a message
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}  # as safetensors calls them
_FLOAT32_WEIGHTS = ("logit_scale", "logit_bias", "A_log", "D")  # the last part of names that every model keeps so
_POINTER_BYTES = 1024  # git-lfs leaves smaller files in the place of weights
_WHOLE_NUMBERS = {"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL"}  # as safetensors calls them
_INDICES = ("position_ids", "num_batches_tracked", "token_type_ids", "relative_position_index")  # integers by design
_LARGEST_SIDE = MODEL_SIZES["image_size"][1]
# Families whose image encoders take square images and patches alone.
_SQUARE = ("clip", "dclip", "siglip", "altclip", "chinese_clip", "metaclip_2")


# What transformers ends in where a file says something else than it expects.
_UNREADABLE: tuple[type[BaseException], ...] = (
    *(AttributeError, LookupError, RecursionError, TypeError, ValueError, ZeroDivisionError),
    StrictDataclassError,
)


# What a file that `torch.save` did not write, or a cut one, ends in.
_UNPICKLED = (EOFError, OSError, RuntimeError, pickle.UnpicklingError)
# A RuntimeError of these words tells of the machine or of PyTorch, whatever was read.
_NOT_OF_FILE = re.compile(r"INTERNAL ASSERT|allocate memory|out of memory|CUDA error|can't start new thread")


class _Reading:
    """Tells of a model's file that transformers cannot read: by its name, not by what went wrong in between.

    Args:
        what (`str`): What is read, and where.
        advice (`str`): What to do.
        errors (`tuple`): What a wrong file ends in. An error of the bare type `Exception`, which the tokenizers
            package raises for whatever it cannot parse, is always told; a RuntimeError about the machine never is.
    """

    def __init__(self, what: str, advice: str, errors: tuple[type[BaseException], ...] = _UNREADABLE):
        self.what, self.advice, self.errors = what, advice, errors

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if (
            kind is not None
            and not issubclass(kind, WrongModelError)
            and (kind is Exception or issubclass(kind, self.errors))
            and not (issubclass(kind, RuntimeError) and _NOT_OF_FILE.search(str(error)))
        ):
            reason = " ".join(str(error).split()) or kind.__name__
            if issubclass(kind, pickle.UnpicklingError):  # PyTorch's goes on to advise to run what the file holds
                reason = reason.partition(". ")[0]
            raise ValueError(f"Expected {self.what}, got: {reason.rstrip('.')}. {self.advice}") from error


def read_config(
    name: str | os.PathLike,
    kinds: Collection[str] | None = None,
    *,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
) -> PreTrainedConfig:
    """Read the configuration of a model, before the model is built.

    Args:
        name (`str` or `os.PathLike`): Folder or Hub id.
        kinds (`Collection[str]`, *optional*): The model types that are expected; any if not given.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.
        local_files_only (`bool`, *optional*, defaults to `False`): Do not ask the Hub.

    Returns:
        `PreTrainedConfig`: Its numbers are within bounds, and in a folder the weights are as large as it says.

    Raises:
        OSError: If there is none.
        WrongModelError: If it is of another kind.
        ValueError: If it is damaged, asks for a model out of bounds, or for a much larger one than the weights are, or
            if its folder holds a pipe, a device or a link to nothing.
    """
    _require_files(name)
    with _Reading(f"a model's configuration at '{name}'", "Save config.json again, or name another model."):
        try:
            stored: Any = PreTrainedConfig.get_config_dict(name, local_files_only=local_files_only)[0]
        except OSError as error:
            raise _no_model(name, error) from error
        found = stored.get("model_type")
        if kinds is not None and found not in kinds:
            if found == "siglip2" and "siglip" in kinds:
                raise WrongModelError(
                    f"Expected a model that takes square images at '{name}', got SigLIP 2 in its NaFlex form, whose "
                    "images have any shape. Name a SigLIP 2 of fixed size, such as google/siglip2-base-patch16-224."
                )
            *others, last = kinds
            named = f"{', '.join(others)} or {last}" if others else last
            raise WrongModelError(
                f"Expected a model of type {named} at '{name}', got {found!r}. Name another folder or another model."
            )
        _check_stored(stored, str(found))
        config = AutoConfig.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=local_files_only
        )
        check_sizes(config)
        _require_square(config)
    if Path(name).is_dir():
        _compare_sizes(config, Path(name))
    return config


def check_model(name: str | os.PathLike, kinds: Collection[str] | None = None) -> PreTrainedConfig:
    """Say early that a model is missing, of another kind or without weights. No weight is fetched or read.

    Args:
        name (`str` or `os.PathLike`): Folder or Hub id.
        kinds (`Collection[str]`, *optional*): The model types that are expected; any if not given.

    Returns:
        `PreTrainedConfig`: As [`read_config`] gives it.

    Raises:
        OSError: If there is none, or it has no weights.
        WrongModelError: If it is of another kind.
        ValueError: As [`read_config`]; of a folder also if a file of weights is cut or holds integers.
    """
    _check_folder(str(name))
    config = read_config(name, kinds)
    stored = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    if not Path(name).is_dir() and not any(has_file(str(name), file) for file in stored):
        raise FileNotFoundError(
            f"Expected weights at '{name}' ({SAFE_WEIGHTS_NAME}), got a configuration alone. Name another model."
        )
    return config


def _no_model(name: str | os.PathLike, error: OSError) -> OSError:
    """The error of a name that is neither a folder nor known to the Hub; of a folder the error itself."""
    if Path(name).exists():
        return error
    if is_offline_mode():
        return OSError(
            f"Expected a model at '{name}', got neither a folder of that name nor a model of the Hub that is on this "
            "machine, and HF_HUB_OFFLINE forbids to ask the Hub. Check the name, or unset HF_HUB_OFFLINE."
        )
    reason = " ".join(str(error).split()).partition(". ")[0].partition(" If this is a private")[0]
    return OSError(
        f"Expected a model at '{name}', got neither a folder of that name nor a model of the Hub ({reason}). Check "
        "the name."
    )


def _require_files(name: str | os.PathLike) -> None:
    """Refuse a folder with a pipe, a device or a link to nothing in it: opening one may never end."""
    folder = Path(name)
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        if not path.is_file() and not path.is_dir():
            raise ValueError(
                f"Expected files in the model's folder '{name}', got a pipe, a device or a link to nothing: "
                f"'{path.name}'. Remove it or fetch the model again."
            )


def _require_square(config: PreTrainedConfig) -> None:
    """Refuse lists as sizes where the family divides one number by the other."""
    vision = getattr(config, "vision_config", None)
    for name in ("image_size", "patch_size"):
        if config.model_type in _SQUARE and not isinstance(value := getattr(vision, name, 1), int):
            raise ValueError(f"vision_config.{name}: expected an integer, got {value!r:.80}")


def _check_stored(stored: dict[str, Any], whose: str) -> None:
    """Check the numbers of a configuration as it is stored: families divide by them, or build lists as long."""
    for name, value in stored.items():
        if isinstance(value, dict):
            _check_stored(value, name)
        elif name in MODEL_SIZES and isinstance(value, (int, float)) and not isinstance(value, bool):
            check_number(f"{whose}.{name}", value, *MODEL_SIZES[name])


def _least_weights(config: PreTrainedConfig) -> int:
    """How many weights a model of this configuration has at least: two matrices a layer, and its words."""
    sizes = [getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "intermediate_size")]
    layers, width, inner = (value if isinstance(value, int) else 0 for value in sizes)
    vocabulary = getattr(config, "vocab_size", None)
    inside = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return (
        layers * width * inner * 2
        + (vocabulary * width if isinstance(vocabulary, int) else 0)
        + sum(_least_weights(one) for one in inside if isinstance(one, PreTrainedConfig))
    )


def _compare_sizes(config: PreTrainedConfig, folder: Path) -> None:
    stored = 0
    for path in folder.glob("*.safetensors"):
        stored += check_weights(path)
    if stored and (asked := _least_weights(config)) > 4 * stored + 1_000_000:
        raise ValueError(
            f"Expected the model that config.json in '{folder}' describes, of {asked:,} weights or more, got files "
            f"with {stored:,}. The configuration is damaged or another model's."
        )


def require_dual_encoder(model: Any, where: str = "") -> None:
    """Refuse a model that does not embed images and texts.

    Args:
        model: Any, or the class of one.
        where (`str`, *optional*): Where it came from, for the message.

    Raises:
        WrongModelError: If one of the two methods is missing.
    """
    missing = [name for name in ("get_image_features", "get_text_features") if not hasattr(model, name)]
    if missing:
        name = (model if isinstance(model, type) else type(model)).__name__
        raise WrongModelError(
            "Expected a dual encoder such as CLIPModel with get_image_features and "
            f"get_text_features{f' at {where!r}' if where else ''}, got {name} without {missing}. "
            "Name the dual checkpoint, not one tower."
        )


def check_weights(path: Path) -> int:
    """Check that a file of weights has its full length, and holds numbers of the right kind. No value is read.

    Args:
        path (`Path`): A safetensors file.

    Returns:
        `int`: How many numbers it holds.

    Raises:
        ValueError: If it is cut or none, or holds integers as weights.
    """
    small = path.is_file() and path.stat().st_size < _POINTER_BYTES
    hint = " A file as small may be a pointer of git-lfs: `git lfs pull` fetches what it stands for." if small else ""
    numbers = 0
    try:
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  it is no mapping
                tensor = weights.get_slice(name)
                numbers += math.prod(tensor.get_shape())
                if tensor.get_dtype() in _WHOLE_NUMBERS and not name.endswith(_INDICES):
                    raise ValueError(
                        f"Expected weights as floating-point numbers in '{path}', got {name!r} as "
                        f"{tensor.get_dtype()}. Save the model in float32, float16 or bfloat16."
                    )
    except SafetensorError as error:
        raise ValueError(
            f"Expected whole weights in '{path}', got a damaged file ({error}). Fetch it again.{hint}"
        ) from error
    return numbers


def check_values(model: PreTrainedModel, name: str) -> None:
    """Refuse weights that no training gives: NaN, infinity, or a part of the model whose matrices are all 0.

    Args:
        model (`PreTrainedModel`): Loaded.
        name (`str`): Where it came from, for the message.

    Raises:
        ValueError: Naming the first weight or part.
    """
    odd = [key for key, value in model.named_parameters() if not torch.isfinite(value).all()]
    if odd:
        raise ValueError(
            f"Expected finite weights at '{name}', got NaN or infinity in {odd[0]} ({len(odd)} in all). The "
            "training diverged, or the file is damaged; take another checkpoint."
        )
    for part, module in model.named_children():
        matrices = [value for value in module.parameters() if value.ndim > 1]
        if matrices and not any(bool(value.any()) for value in matrices):
            raise ValueError(
                f"Expected trained weights at '{name}', got only zeros in {part}. The file is damaged; take another."
            )


def stored_dtype(name: str | os.PathLike) -> str:
    """The type of a model's weights as they are stored, such as `"float16"`.

    Args:
        name (`str` or `os.PathLike`): Folder or Hub id.

    Returns:
        `str`: float16 or bfloat16 if all matrices in a folder's files have it, without those that every model keeps
        in float32; else float32. Of a Hub id, what its config says.
    """
    folder = Path(name)
    whole = folder / SAFE_WEIGHTS_NAME
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{whole.stem}-*-of-*{whole.suffix}"))
    if not files:
        stated = str(AutoConfig.from_pretrained(name).dtype).removeprefix("torch.")
        return stated if stated in _DTYPES.values() else "float32"
    kinds = set()
    for path in files:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            kinds |= {
                one.get_dtype() for key, one in slices.items() if len(one.get_shape()) > 1 and not stays_float32(key)
            }
    return _DTYPES.get(min(kinds), "float32") if len(kinds) == 1 else "float32"


def stays_float32(name: str) -> bool:
    """Whether every model keeps a weight of this name in float32, whatever type the others have.

    Args:
        name (`str`): In a state dict.

    Example:
        >>> stays_float32("clip.logit_scale"), stays_float32("visual_projection.weight")
        (True, False)
    """
    return name.rpartition(".")[2] in _FLOAT32_WEIGHTS


def load_checked(model_class: Any, name: str | os.PathLike, **options: Any) -> Any:
    """Load a model of which every weight is stored; transformers would draw a missing one at random, with a warning.

    Args:
        model_class (`type`): With `from_pretrained`: a model or one of transformers' Auto classes.
        name (`str` or `os.PathLike`): Folder or Hub id.
        options: Of `from_pretrained`. `dtype` is float32 unless given.

    Returns:
        `PreTrainedModel`: In eval mode, on the CPU.

    Raises:
        OSError: If there is no such model, or a folder without config.json or weights.
        WrongModelError: If a teacher is asked for, and it is none.
        ValueError: If a weight is missing, of another shape, no number, or all of a part are 0; or as [`read_config`].
    """
    kinds = ["dclip_teacher"] if model_class is DCLIPTeacher else None
    trusted = options.get("trust_remote_code", False)
    _check_folder(str(name))
    if "config" not in options:
        read_config(name, kinds, trust_remote_code=trusted)
    elif Path(name).is_dir():
        _compare_sizes(options["config"], Path(name))
    shapes = {"ignore_mismatched_sizes": True}  # they are told below
    told = _Reading(
        f"weights at '{name}' that fit its configuration", "Fetch them again.", (LookupError, RuntimeError)
    )
    if (path := find_pickled_weights(name)) is not None:
        what = f"whole weights in '{path}', to be read without running code"
        told = _Reading(what, "Fetch them again.", (*_UNREADABLE, *_UNPICKLED))
    try:
        with told:
            model, report = model_class.from_pretrained(
                name, output_loading_info=True, **({"dtype": torch.float32} | shapes | options)
            )
    except OSError as error:
        raise _no_model(name, error) from error
    except SafetensorError as error:
        raise ValueError(
            f"Expected whole weights at '{name}', got a damaged file ({error}). Fetch it again."
        ) from error
    _check_report(report, type(model).__name__, str(name))
    check_values(model, str(name))
    return model.eval()


def _check_report(report: dict[str, Any], kind: str, name: str) -> None:
    if other := sorted(report.get("mismatched_keys", ())):
        key, stored, expected = other[0]
        raise ValueError(
            f"Expected the weights of {kind} that config.json at '{name}' describes, got {len(other)} of another "
            f"shape, such as {key} with {tuple(stored)} in place of {tuple(expected)}. The configuration or the "
            "weights are another model's."
        )
    if missing := sorted(report["missing_keys"]):
        named = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise ValueError(
            f"Expected all weights of {kind} at '{name}', got {len(missing)} missing ({named}): they would be random. "
            "It is another architecture's checkpoint, or one tower's."
        )


def load_pair(spec: str | Path, *, trust_remote_code: bool = False) -> tuple[DualEncoder, Any]:
    """Load a dual encoder in float32 on the CPU, in eval mode, with its processor.

    The image processor has the PIL backend where there is one.

    Args:
        spec (`str` or `Path`): A folder, a Hub id, or one of open_clip's.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.

    Returns:
        `tuple`: The model, and a processor with `image_processor` and `tokenizer`.

    Raises:
        FileNotFoundError: If a folder is missing or holds no weights.
        ImportError: If open_clip is named and not installed.
        WrongModelError: If the model is no dual encoder.
        ValueError: If weights are damaged or missing, if the processor lacks files or one half, if the tokenizer's
            end token is not the text encoder's, or as in [`load_open_clip`].
    """
    name = str(spec)
    if name.startswith(OPEN_CLIP_PREFIX):
        return load_open_clip(name)
    options = {"trust_remote_code": trust_remote_code}
    _check_folder(name)
    is_student = _is_student(read_config(name, trust_remote_code=trust_remote_code))
    model = load_checked(DCLIPModel if is_student else AutoModel, name, **options)
    require_dual_encoder(model, name)
    processor = load_processor(name) if is_student else _load_processor(name, options)
    check_processor(processor, name)
    prepare_tokenizer(processor.tokenizer, model.config.model_type)
    check_vocabulary(model, processor.tokenizer, name)
    check_end_token(model, processor.tokenizer, name)
    if getattr(processor.image_processor, "backend", "pil") != "pil":
        logger.warning(
            "%s has no image processor of the PIL backend: its pixels differ from PIL's by 1-2 grey levels.", name
        )
    return model, processor


def _is_student(config: PreTrainedConfig) -> bool:
    """Whether a stock CLIP was saved as one of ours, whose code lies beside it and which this package has."""
    named = (getattr(config, "auto_map", None) or {}).get("AutoConfig")
    return config.model_type == "clip" and named == "configuration_dclip.DCLIPConfig"


def _check_folder(name: str) -> None:
    _require_files(name)
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"Expected config.json in '{folder}', got none. Name the folder that a model was saved in."
            )
        if not any(folder.glob("*.safetensors")) and find_pickled_weights(folder) is None:
            raise FileNotFoundError(
                f"Expected *.safetensors or {WEIGHTS_NAME} in {name}, got none. Save the model with `save_pretrained`."
            )
    elif folder.is_absolute() or len(folder.parts) > 2 or name.startswith("."):  # a Hub id is organisation/name
        raise FileNotFoundError(f"Expected a folder with a model at {name}, got none. Check the path.")


def find_pickled_weights(name: str | os.PathLike) -> Path | None:
    """The file of a folder whose weights `torch.save` wrote, as the first CLIPs have; `None` beside safetensors.

    transformers reads tensors alone from it, so that no code in it is run.

    Args:
        name (`str` or `os.PathLike`): Folder or Hub id.

    Returns:
        `Path` or `None`: The weights, or where there are several files their index.
    """
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return None
    return next((folder / one for one in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if (folder / one).is_file()), None)


def _load_processor(name: str, options: dict[str, Any]) -> Any:
    _require_files(name)
    what = f"the files of a processor in {name!r} (preprocessor_config.json and those of a tokenizer)"
    with _Reading(what, "Save them beside the weights.", (*_UNREADABLE, OSError)):
        return AutoProcessor.from_pretrained(name, backend="pil", **options)


def check_processor(processor: Any, name: str) -> None:
    """Refuse a processor that lacks one half, or whose tokenizer transformers made up because its files are missing.

    Args:
        processor: With `image_processor` and `tokenizer`.
        name (`str`): Where it came from, for the message.

    Raises:
        ValueError: If something is missing, or the tokenizer's longest text is no number of tokens; the message says
            what.
    """
    lacking = [half for half in ("image_processor", "tokenizer") if getattr(processor, half, None) is None]
    if lacking:
        raise ValueError(
            f"Expected a processor with image_processor and tokenizer in {name!r}, got {type(processor).__name__} "
            f"without {lacking}. Save both beside the weights."
        )
    # Where the files are missing, transformers makes a tokenizer without a vocabulary, without a warning.
    _check_pixels(processor.image_processor, name)
    _check_length(processor.tokenizer, name)
    read = processor.tokenizer(list(string.ascii_lowercase))["input_ids"]
    if len({tuple(ids) for ids in read}) == 1:
        raise ValueError(
            f"Expected a tokenizer that tells letters apart in {name!r}, got a {type(processor.tokenizer).__name__} "
            f"of {len(processor.tokenizer)} tokens that does not. Save the tokenizer's files beside the weights."
        )


def _check_length(tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer whose longest text is no number of tokens."""
    length = getattr(tokenizer, "model_max_length", 1)
    if not isinstance(length, (int, float)) or isinstance(length, bool) or not length >= 1:
        raise ValueError(
            f"Expected a number of tokens from 1 under 'model_max_length' of the tokenizer in {name!r}, got "
            f"{length!r:.80}. Save the tokenizer that the model was trained with."
        )


def _check_pixels(image_processor: Any, name: str) -> None:
    """Refuse numbers of an image processor that make no picture of a picture."""
    where = f"preprocessor_config.json of '{name}': "
    for key in ("image_mean", "image_std"):
        given: Any = getattr(image_processor, key, None)
        for value in given if isinstance(given, (list, tuple)) else [] if given is None else [given]:
            check_number(where + key, value, 0 if key == "image_std" else -1e3, 1e3, above=key == "image_std")
    if (factor := getattr(image_processor, "rescale_factor", None)) is not None:
        check_number(f"{where}rescale_factor", factor, 0, 1e3, above=True)
    for key in ("size", "crop_size"):
        given = getattr(image_processor, key, None)
        for side in ("height", "width", "shortest_edge"):
            value = given.get(side) if hasattr(given, "get") else None
            if isinstance(value, (int, float)):
                check_number(f"{where}{key}.{side}", value, 1, _LARGEST_SIDE)
    with _Reading(f"an image processor in '{name}' that makes pixels of a picture", "Save the model's own beside it."):
        pixels = image_processor(images=[Image.new("RGB", (40, 36))], return_tensors="pt")["pixel_values"]
        if not torch.isfinite(pixels).all():
            raise ValueError("pixels that are not finite")


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that gives ids for which the text encoder has no embedding.

    Args:
        model ([`DualEncoder`]): Any.
        tokenizer: The model's.
        name (`str`): Where both came from, for the message.

    Raises:
        ValueError: If an id is too large.
    """
    words = getattr(getattr(model.config, "text_config", None), "vocab_size", None)
    known = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    if isinstance(words, int) and known and (largest := max(known.values())) >= words:
        raise ValueError(
            f"Expected a tokenizer of at most {words} tokens in '{name}', as many as the text encoder embeds, got ids "
            f"up to {largest}. Save the tokenizer that the model was trained with."
        )


def check_dual_encoder(spec: str | Path, *, trust_remote_code: bool = False) -> None:
    """Say early what [`load_dual_encoder`] would refuse, as far as configuration, processor and names show it.

    No weight is fetched or read.

    Args:
        spec, trust_remote_code: As in [`load_dual_encoder`].

    Raises:
        OSError: If there is no such model, or it has no weights.
        ImportError: If open_clip is named and not installed.
        WrongModelError: If the model is no dual encoder.
        ValueError: If the configuration, the processor or a file of weights is damaged or another model's, or
            open_clip does not know a name.
    """
    name, options = str(spec), {"trust_remote_code": trust_remote_code}
    if name.startswith(OPEN_CLIP_PREFIX):
        check_open_clip(name)
        return
    config = read_config(name, trust_remote_code=True) if trust_remote_code else check_model(name)
    _check_folder(name)
    if (kind := MODEL_MAPPING.get(type(config), None)) is not None:
        require_dual_encoder(kind, name)
    processor = load_processor(name) if _is_student(config) else _load_processor(name, options)
    check_processor(processor, name)
    check_vocabulary(SimpleNamespace(config=config), processor.tokenizer, name)


def load_dual_encoder(spec: str | Path, *, trust_remote_code: bool = False) -> tuple[DualEncoder, Any, str]:
    """Load any CLIP-like model in float32 on the CPU, in eval mode, with the PIL image processor.

    Args:
        spec (`str` or `Path`): A folder or Hub id of a dual encoder of this package or of transformers (CLIP, SigLIP,
            SigLIP 2, ALIGN, AltCLIP, Chinese-CLIP, MetaCLIP 2, ...), or `open_clip:NAME:PRETRAINED`, where PRETRAINED
            is a tag or a file of weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.

    Returns:
        `tuple`: The model, with `get_image_features` and `get_text_features`; its processor; and the revision of its
            weights: `sha256:<hex>` of a folder's files or of open_clip's state dict, or `commit:<hash>` of the Hub.

    Raises:
        FileNotFoundError: If a folder is missing or holds no weights.
        ImportError: If open_clip is named and not installed.
        WrongModelError: If the model is no dual encoder.
        ValueError: If weights or half of the processor are missing, or open_clip does not know a name.
    """
    model, processor = load_pair(spec, trust_remote_code=trust_remote_code)
    if isinstance(model, OpenClipDualEncoder):
        return model, processor, f"sha256:{fingerprint_open_clip(model)}"
    return model, processor, model_revision(spec, model)


def load_merged(model: str | os.PathLike) -> PreTrainedModel:
    """Load a dual encoder that can be taught in float32, with PEFT adapters merged.

    Adapters in the folder, or in `adapter/` of a folder without whole weights, are loaded over the model that they
    name and merged into it.

    Args:
        model (`str` or `os.PathLike`): Folder or Hub id.

    Returns:
        `PreTrainedModel`: Of one of [`STUDENT_ENCODERS`], in eval mode, on the CPU.

    Raises:
        ImportError: If there are adapters and `peft` is not installed.
        ValueError: If it is no dual encoder, a weight is missing, or the file is damaged.
    """
    if (adapter := find_adapter(model)) is not None:
        return _merge_adapters(adapter)
    if not Path(model).exists():
        _check_folder(str(model))
    found = read_config(model, STUDENT_ENCODERS).model_type
    return load_checked(DUAL_ENCODERS.get(found, AutoModel), model)


def _merge_adapters(folder: Path) -> PreTrainedModel:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError(
            f"'{folder}' holds adapters: expected peft, got {error}. Install it with `pip install "
            "modeling_dclip[peft]`."
        ) from error
    told = _Reading(f"an adapter at '{folder}'", "Save it again.", (*_UNREADABLE, RuntimeError, SafetensorError))
    with told:
        base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise ValueError(
            f"Expected base_model_name_or_path in {folder / ADAPTER_CONFIG}, got none. Name the model there."
        )
    model = load_merged(base)
    with told:
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload().eval()
    check_values(merged, str(folder))
    return merged


def find_adapter(model: str | os.PathLike) -> Path | None:
    """The folder of an adapter that replaces whole weights, if there is one.

    It is the model's own folder, or `adapter/` in it, where training with `merge_adapter: false` writes.
    """
    folder, inner = Path(model), Path(model) / ADAPTER_FOLDER
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    return inner if (inner / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file() else None


def load_tokenizer(name: str | os.PathLike) -> Any:
    """Load a tokenizer that a text encoder will be made for.

    Args:
        name (`str` or `os.PathLike`): Folder or Hub id.

    Returns:
        `PreTrainedTokenizerBase`: As [`~modeling_dclip.encoders.families.prepare_tokenizer`] gives it.

    Raises:
        ValueError: If it is missing or damaged.
    """
    _require_files(name)
    with _Reading(f"the files of a tokenizer at '{name}'", "Name another.", (*_UNREADABLE, OSError)):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        _check_length(tokenizer, str(name))
        return prepare_tokenizer(tokenizer)


def load_image_processor(name: str | os.PathLike) -> Any:
    """Load the image processor of one tower, of the PIL backend where there is one.

    Args:
        name (`str` or `os.PathLike`): Folder or Hub id.

    Returns:
        `BaseImageProcessor`

    Raises:
        ValueError: If it is missing or damaged, or its numbers make no picture.
    """
    _require_files(name)
    what = f"an image processor at '{name}' (preprocessor_config.json)"
    with _Reading(what, "Save it beside the weights.", (*_UNREADABLE, OSError)):
        image_processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    _check_pixels(image_processor, str(name))
    return image_processor


def load_processor(model: str | os.PathLike, kind: type | None = None) -> Any:
    """Load the processor of a dual encoder that can be taught, or of a teacher.

    Args:
        model (`str` or `os.PathLike`): Folder or Hub id.
        kind (`type`, *optional*): Its class, for a teacher [`DCLIPTeacherProcessor`]. By default [`DCLIPProcessor`]
            for a CLIP and the models of this package, and its own for another family.

    Returns:
        `ProcessorMixin`: With an image processor of the PIL backend where there is one.

    Raises:
        ValueError: If a file is missing or damaged, or the image processor's numbers make no picture.
    """
    _require_files(model)
    what = f"the files of a processor in '{model}' (preprocessor_config.json and those of a tokenizer)"
    with _Reading(what, "Save them beside the weights.", (*_UNREADABLE, OSError)):
        family = None if kind is not None else _stored_family(model)
        if family in NATIVE_ENCODERS:
            processor: Any = AutoProcessor.from_pretrained(model, backend="pil", trust_remote_code=False)
        else:
            loaded: Any = DCLIPProcessor if kind is None else kind
            processor = loaded.from_pretrained(model, trust_remote_code=False)
    check_processor(processor, str(model))
    prepare_tokenizer(processor.tokenizer, family)
    return processor


def _stored_family(model: str | os.PathLike) -> str | None:
    """The model type in a configuration; `None` if there is none, as in a folder with a processor alone."""
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        return None
    stored: Any = PreTrainedConfig.get_config_dict(model)[0]
    return stored.get("model_type")
