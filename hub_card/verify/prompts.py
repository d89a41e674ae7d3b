"""Tokenizer and chat text against what is known of the released ones (docs/checkpoint.md, "Chat")."""

import tempfile
from pathlib import Path
from typing import Any

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ..hub_files import has_chat_template
from ..tokenizer_conversion import convert_tiktoken_folder
from .report import Report

QUESTION = "Tell me about the french revolution."
# transformers' test of the native class has these ids, and the greedy continuation of the Instruct weights.
QUESTION_IDS = (163587, 2482, 163601, 69211, 1019, 1215, 276, 64782, 25317, 13, 163586, 163588, 69702, 163601)
ANSWER = (
    "The French Revolution (1789–1799) was a period of radical political and social upheaval in France that "  # noqa: RUF001
    "profoundly changed the course of modern history."
)
_CHAT_TEXT = f"<|im_user|>user<|im_middle|>{QUESTION}<|im_end|><|im_assistant|>assistant<|im_middle|>"
_SPECIAL = {
    "[BOS]": 163584, "[EOS]": 163585, "<|im_end|>": 163586, "<|im_user|>": 163587, "<|im_assistant|>": 163588,
    "<|im_middle|>": 163601, "[PAD]": 163839,
}  # fmt: skip
_RELEASED_VOCABULARY = 163840
# A token never crosses these places: capitals begin a piece, and so do other scripts.
_BOUNDARIES = {"HelloWorld": 5, "数学abc": 2}
_ROUND_TRIP = 'def f(x):\n\treturn "naïve — 数学" + str(x)  # 12345\n'


def load_tokenizer(folder: Path, config: KimiLinearConfig, report: Report) -> Any | None:
    """The folder's tokenizer, converted if it is tiktoken's file; None where there is none."""
    from transformers import PreTrainedTokenizerFast

    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        if not (folder / "tiktoken.model").is_file():
            report.unchecked("tokenizer: the folder has neither tokenizer.json nor tiktoken.model")
            return None
        with tempfile.TemporaryDirectory() as converted:
            convert_tiktoken_folder(folder, Path(converted), vocab_size=config.vocab_size)
            return PreTrainedTokenizerFast.from_pretrained(converted)
    except Exception as error:  # whatever a damaged file ends in
        report.wrong(f"tokenizer: it can't be loaded ({type(error).__name__}: {' '.join(str(error).split())})")
        return None


def is_released_vocabulary(config: KimiLinearConfig) -> bool:
    """Whether the reference ids mean anything for this config."""
    return config.vocab_size == _RELEASED_VOCABULARY


def check_tokenizer(folder: Path, tokenizer: Any, config: KimiLinearConfig, report: Report) -> None:
    """Ids of the reference prompt and of special tokens, where the vocabulary is the released one; else round trips."""
    ids = tokenizer(_ROUND_TRIP, add_special_tokens=False).input_ids
    again = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    report.judge(again == _ROUND_TRIP, f"tokenizer: {len(ids)} tokens of a text with code and Chinese give it back")
    if max(ids) >= config.vocab_size:
        report.wrong(f"tokenizer: it gives id {max(ids)}, and the embedding has {config.vocab_size} rows")
    if not has_chat_template(folder) and getattr(tokenizer, "chat_template", None) is None:
        report.unchecked("chat text: the folder has no chat template; `export --checkpoint` writes one")
    else:
        text = chat_text(tokenizer)
        said = "chat text: as in the reference example" if text == _CHAT_TEXT else f"chat text: it is {text!r}"
        report.judge(text == _CHAT_TEXT, said)
    if not is_released_vocabulary(config):
        report.unchecked(
            f"tokenizer ids: the reference ids are of a vocabulary of {_RELEASED_VOCABULARY}, and this one has "
            f"{config.vocab_size} tokens"
        )
        return
    found = {name: tokenizer.convert_tokens_to_ids(name) for name in _SPECIAL}
    wrong = [f"{name} is {found[name]} and not {_SPECIAL[name]}" for name in _SPECIAL if found[name] != _SPECIAL[name]]
    report.judge(not wrong, f"special tokens: {', '.join(wrong) or 'seven ids as released'}")
    ids = tuple(tokenizer(_CHAT_TEXT, add_special_tokens=False).input_ids)
    said = f"are {list(ids)}, the reference has {list(QUESTION_IDS)}" if ids != QUESTION_IDS else "as in the reference"
    report.judge(ids == QUESTION_IDS, f"tokenizer ids of the reference prompt: {said}")
    for text, place in _BOUNDARIES.items():
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        crossing = any(begin < place < end for begin, end in spans)
        report.judge(not crossing, f"tokenizer pieces: {text!r} is {'not ' * crossing}cut after {text[:place]!r}")


def chat_text(tokenizer: Any) -> str:
    """The reference question as a prompt for an answer."""
    turn = [{"role": "user", "content": QUESTION}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


__all__ = ["ANSWER", "QUESTION", "chat_text", "check_tokenizer", "is_released_vocabulary", "load_tokenizer"]
