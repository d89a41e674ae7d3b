"""`python -m kimi_linear.hub_card verify`: arguments are those of `cli`."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ...modeling.checkpoint.refusals import refuse_method
from ...modeling.checkpoint.schemes import quantization_fields
from ..hub_files import read_config
from ..measure.machine import device_kind
from ..model_card import guess_base_model
from .layout import check_layout, differing_fields
from .one_pass import PASSAGE, judge_logits, run_pass
from .prompts import ANSWER, chat_text, check_tokenizer, is_released_vocabulary, load_tokenizer
from .report import Report
from .streaming import model_dtype
from .whole_model import STEP_TOLERANCE, compare_steps, find_room, generate_ids, load_whole

_RANDOM_IDS = 64


@dataclass(frozen=True)
class VerifyRequest:
    """What to verify.

    Args:
        folder: an exported or a released folder.
        generate: whether to compare greedy text too.
        headers_only: whether to leave the weights unread.
        device: "auto", "cuda" or "cpu".
    """

    folder: Path
    generate: bool = False
    headers_only: bool = False
    device: str = "auto"


@dataclass(frozen=True)
class _Text:
    """The tokens of the pass.

    Args:
        ids: [T].
        prompt: how many of them are the prompt; the others continue it.
        kind: "random" ids, an English "passage", the "reference" prompt and answer, or a prompt and what `generate()`
            made of it ("generated").
    """

    ids: torch.Tensor
    prompt: int
    kind: str

    @property
    def known(self) -> int:
        """How many tokens are not the model's own words."""
        return self.prompt if self.kind == "generated" else len(self.ids)


def verify(request: VerifyRequest) -> int:
    """Look at everything that can be looked at, print what was found; returns the exit code.

    Raises:
        ValueError: if there is no folder of this model.
    """
    folder = request.folder
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give one with config.json and weights")
    config, _ = read_config(folder / "config.json")
    kind = device_kind(request.device)
    report = Report()
    if (quantisation := quantization_fields(config)) is not None:
        report.note(f"quantised ({quantisation['quant_method']}): layers are compared with their dequantised weights")
    stored = check_layout(folder, config, report)
    tokenizer = load_tokenizer(folder, config, report)
    if tokenizer is not None:
        check_tokenizer(folder, tokenizer, config, report)
    if request.headers_only:
        report.unchecked("the numbers in the weights: --headers-only leaves them unread")
    elif not stored or report.texts("wrong"):
        report.unchecked("the numbers in the weights: mend what is wrong above first")
    else:
        _check_numbers(request, config, stored, tokenizer, kind, report)
    return report.close()


def _check_numbers(
    request: VerifyRequest, config: KimiLinearConfig, stored: dict[str, Any], tokenizer: Any, kind: str, report: Report
) -> None:
    try:
        if (quantisation := quantization_fields(config)) is not None:
            refuse_method(quantisation, f"quantization_config of {request.folder}")
    except ValueError as error:
        report.unchecked(f"the numbers in the weights: {error}")
        return
    weights = sum(tensor.nbytes for tensor in stored.values())
    text = _text(request.folder, config, tokenizer)
    room = find_room(weights, kind)
    whole_is_useful = request.generate or kind == "cuda"
    if kind != "cuda":
        report.unchecked("captured steps against layers: steps need an NVIDIA GPU")
    if whole_is_useful and not room.fits:
        report.unchecked(f"what needs the whole model in memory (captured steps, generate()): {room.why}")
    elif whole_is_useful:
        model = load_whole(request.folder, kind)
        if kind == "cuda":
            compare_steps(model, text.ids, report)
        if request.generate:
            text = _generate(model, text, tokenizer, report)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    logits = run_pass(config, stored, text.ids, kind, report)
    if logits is None:
        return
    judge_logits(logits, text.ids, text.known, tokenizer is not None, report)
    if request.generate:
        _judge_greedy(logits, text, tokenizer, request.folder, config, report)


def _text(folder: Path, config: KimiLinearConfig, tokenizer: Any) -> _Text:
    """The reference prompt and answer where the vocabulary is the released one, else a passage of English."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return _Text(
            torch.randint(0, config.vocab_size, (_RANDOM_IDS,), generator=generator), _RANDOM_IDS // 2, "random"
        )
    if is_released_vocabulary(config) and getattr(tokenizer, "chat_template", None) is not None:
        prompt, whole = (_ids(tokenizer, chat_text(tokenizer) + text) for text in ("", ANSWER))
        return _Text(whole, len(prompt), "reference")
    ids = _ids(tokenizer, PASSAGE)
    return _Text(ids, len(ids) // 2, "passage")


def _ids(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def _generate(model: Any, text: _Text, tokenizer: Any, report: Report) -> _Text:
    """The prompt with what `generate()` makes of it, which the pass is to confirm."""
    prompt = text.ids[: text.prompt]
    new = generate_ids(model, prompt)
    if tokenizer is not None:
        report.note(f"generate() continues: {tokenizer.decode(new)!r}")
    if text.kind != "reference":
        return _Text(torch.cat([prompt, new]), text.prompt, "generated")
    if tokenizer.decode(new).startswith(ANSWER):
        report.right("generate(): it continues with the reference answer")
    return text


def near_ties(logits: torch.Tensor, chosen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Whether each of the tokens `chosen` [T] has the largest of its `logits` [T, V], up to rounding: [T] bool.

    Two ways to compute the same logits in `dtype` may differ by what `STEP_TOLERANCE` allows, so two tokens whose
    logits are no further apart may change places.
    """
    behind = logits.max(-1).values - logits.gather(1, chosen[:, None])[:, 0]
    return behind <= STEP_TOLERANCE * torch.finfo(dtype).eps * logits.square().mean(-1).sqrt()


def _judge_greedy(
    logits: torch.Tensor, text: _Text, tokenizer: Any, folder: Path, config: KimiLinearConfig, report: Report
) -> None:
    """Whether greedy decoding gives the answer that `text` holds: each of its tokens must have the largest logit."""
    answer = text.ids[text.prompt :]
    scores = logits[text.prompt - 1 : -1].cpu()
    best = scores.argmax(-1)
    close = near_ties(scores, answer, model_dtype(config))
    ties = int((close & (best != answer)).sum())
    said = f" ({ties} of them as good as tied with another)" if ties else ""
    agreeing = int(close.long().cumprod(0).sum())
    if text.kind == "generated":
        count = int(close.sum())
        said = f"greedy text: one pass confirms {count} of the {len(answer)} tokens that generate() made{said}"
        report.judge(count == len(answer), said)
    if text.kind != "reference":
        report.unchecked("greedy reference text: there is one for the released Instruct weights alone")
        return
    said = f"greedy reference text: the first {agreeing} of {len(answer)} tokens{said}"
    if agreeing == len(answer):
        report.right(said)
        return
    found, wanted = (tokenizer.decode(ids[agreeing : agreeing + 1]) for ids in (best, answer))
    said += f", then {found!r} and not {wanted!r}"
    known = (guess_base_model(folder) or folder.name).lower()
    if quantization_fields(config) is not None or "base" in known or differing_fields(config):
        report.note(f"{said}; it is known of the Instruct weights in bf16, others may differ")
    else:
        report.wrong(said)


__all__ = ["VerifyRequest", "verify"]
