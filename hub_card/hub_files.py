"""The small files of a Hub folder: config.json, generation_config.json, tokenizer files, licence of the code."""

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

from ..configuration.configuration_kimi_linear import KimiLinearConfig
from .code_flattening import SOURCE_ROOT
from .tokenizer_conversion import convert_tiktoken_folder

AUTO_MAP = {
    "AutoConfig": "configuration_kimi_linear.KimiLinearConfig",
    "AutoModel": "modeling_kimi_linear.KimiLinearModel",
    "AutoModelForCausalLM": "modeling_kimi_linear.KimiLinearForCausalLM",
    "AutoModelForSequenceClassification": "modeling_kimi_linear.KimiLinearForSequenceClassification",
}
GENERATION_FILE = "generation_config.json"
CODE_LICENCE_FILE = "LICENSE-code"

_FAST_TOKENIZER_FILES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# What transformers 5 writes of how a tokenizer was loaded before it was saved.
_ABOUT_THE_SAVING_PROCESS = ("backend", "is_local", "local_files_only")
# <|im_end|> ends a chat turn and [EOS] a text; the released config.json names only the first.
_RELEASED_STOPS = [163586, 163585]


def read_config(path: Path) -> tuple[KimiLinearConfig, dict[str, Any]]:
    """The checked config in `path`, and the file's own fields.

    Raises:
        ValueError: not a config.json of this model; the message names file and field.
    """
    fields = _read_json(path)
    if fields.get("model_type") != KimiLinearConfig.model_type:
        raise ValueError(f"{path} is of model_type {fields.get('model_type')!r}, not 'kimi_linear'")
    try:
        return KimiLinearConfig.from_dict(fields), fields
    # Validation of field types raises classes of huggingface_hub that differ between its versions.
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error


def write_config(config: KimiLinearConfig, fields: dict[str, Any], folder: Path) -> None:
    """Write config.json: every released field, what else the source had, and an `auto_map` to our code.

    Args:
        config: the model's config.
        fields: fields of the source's config.json; those that `config` does not know are kept as they are.
        folder: where to write.
    """
    known = config.to_dict()
    # The base class adds a dozen fields of its own that the released file doesn't have.
    declared = set(KimiLinearConfig.__annotations__) | {"dtype", "model_type", "transformers_version"}
    written = fields | {name: value for name, value in known.items() if name in declared | set(fields)}
    written["architectures"] = ["KimiLinearForCausalLM"]
    written["auto_map"] = AUTO_MAP
    if "transformers_version" in fields:
        written["transformers_version"] = fields["transformers_version"]
    _write_json(folder / "config.json", dict(sorted(written.items())))


def write_generation_config(source: Path | None, config: KimiLinearConfig, folder: Path) -> None:
    """Copy the source's generation_config.json, or make one from the ids in `config`."""
    given = source / GENERATION_FILE if source else None
    if given is not None and given.is_file():
        _write_json(folder / GENERATION_FILE, _read_json(given))
        return
    stops = config.eos_token_id
    ids = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    ids["eos_token_id"] = _RELEASED_STOPS if stops == _RELEASED_STOPS[0] else stops
    _write_json(folder / GENERATION_FILE, {name: value for name, value in ids.items() if value is not None})


def write_tokenizer(source: Path, config: KimiLinearConfig, folder: Path) -> bool:
    """Copy a fast tokenizer, or convert tiktoken.model to one; returns whether the source has a tokenizer.

    The conversion also writes generation_config.json.

    Raises:
        ValueError: malformed tokenizer files.
    """
    if not (source / "tokenizer.json").is_file():
        if not (source / "tiktoken.model").is_file():
            return False
        convert_tiktoken_folder(source, folder, vocab_size=config.vocab_size)
        return True
    for name in _FAST_TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / "tokenizer_config.json").is_file():
        settings = _read_json(source / "tokenizer_config.json")
        # Both would name Python files that are not exported.
        if settings.pop("auto_map", None) is not None:
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        _write_json(folder / "tokenizer_config.json", readable_by_transformers_4(settings))
    return True


def saved_by_transformers_5(settings: dict[str, Any]) -> bool:
    """Whether a tokenizer_config.json names what only transformers 5 knows: its class, a list of extra tokens."""
    return settings.get("tokenizer_class") == "TokenizersBackend" or isinstance(
        settings.get("extra_special_tokens"), list
    )


def readable_by_transformers_4(settings: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json as transformers 4.57 and 5 read it: the older class name and list of special tokens."""
    settings = {name: value for name, value in settings.items() if name not in _ABOUT_THE_SAVING_PROCESS}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        extra = settings.pop("extra_special_tokens")
        known = settings.get("additional_special_tokens") or []
        settings["additional_special_tokens"] = [*known, *(token for token in extra if token not in known)]
    return settings


def has_chat_template(folder: Path) -> bool:
    """Whether the exported tokenizer can format a conversation."""
    settings = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        settings.is_file() and "chat_template" in _read_json(settings)
    )


def write_code_licence(folder: Path) -> None:
    """Write the licence of the code, under a name that leaves LICENSE to the weights.

    Raises:
        ValueError: the installation has lost it.
    """
    in_source_tree = SOURCE_ROOT / "LICENSE"
    if in_source_tree.is_file():
        text = in_source_tree.read_text(encoding="utf-8")
    else:
        # In a clone that `pip install .` was run in, the folder kimi_linear.egg-info, which has none, may come first.
        installed = importlib.metadata.distributions(name="kimi-linear")
        text = next(filter(None, (distribution.read_text("licenses/LICENSE") for distribution in installed)), None)
    if not text:
        raise ValueError("the installed kimi-linear has lost its LICENSE, which must go with its code: reinstall it")
    (folder / CODE_LICENCE_FILE).write_text(text, encoding="utf-8", newline="\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


__all__ = [
    "AUTO_MAP",
    "has_chat_template",
    "read_config",
    "readable_by_transformers_4",
    "saved_by_transformers_5",
    "write_code_licence",
    "write_config",
    "write_generation_config",
    "write_tokenizer",
]
