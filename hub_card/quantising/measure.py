"""What quantising costs: loss and divergence from the source on held-out text, and what both write.

The text is the held-out topics of the Python manual (`small_corpus`), in windows of 512 tokens. Both models are loaded
one after the other; in between, the first one's log-probabilities are kept, in at most 1 GiB.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from ...modeling.modeling_kimi_linear import KimiLinearForCausalLM
from ..small_corpus import load_corpus

WINDOW = 512
PROMPT = 'The "try" statement'
NEW_TOKENS = 40
_MOST_LOGITS = 2**28


@dataclass(frozen=True)
class Reading:
    """What a model says of the text.

    Args:
        log_probabilities: [tokens, vocabulary] fp32, on the CPU.
        loss: mean nats a token.
        text: greedy continuation of PROMPT.
    """

    log_probabilities: torch.Tensor
    loss: float
    text: str


def windows_of(tokenizer: Any, vocab_size: int) -> list[torch.Tensor]:
    """Ids of the held-out text in windows [T + 1], T <= WINDOW, up to what `_MOST_LOGITS` allows."""
    room = max(_MOST_LOGITS // vocab_size, 2)
    windows = []
    for text in load_corpus().held_out.values():
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        for start in range(0, len(ids) - 1, WINDOW):
            windows.append(ids[start : start + min(WINDOW, room) + 1])
            room -= len(windows[-1]) - 1
            if room <= 0:
                return windows
    return windows


@torch.no_grad()
def read(model: KimiLinearForCausalLM, tokenizer: Any) -> Reading:
    """Loss, log-probabilities and greedy text of a model."""
    model.eval()
    parts, nats, count = [], 0.0, 0
    for window in windows_of(tokenizer, model.config.vocab_size):
        ids = window[None].to(model.device)
        parts.append(model(ids[:, :-1], use_cache=False).logits[0].float().log_softmax(-1).cpu())
        nats += F.nll_loss(parts[-1], window[1:], reduction="sum").item()
        count += len(window) - 1
    prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    output = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return Reading(torch.cat(parts), nats / count, text)


def divergence(reference: Reading, other: Reading) -> tuple[float, float]:
    """Mean KL divergence (reference || other) in nats a token, and the share of equal greedy tokens."""
    total, equal, count = 0.0, 0, 0
    for mine, its in _blocks(reference.log_probabilities, other.log_probabilities):
        total += (mine.exp() * (mine - its)).sum(-1).double().sum().item()
        equal += int((mine.argmax(-1) == its.argmax(-1)).sum())
        count += len(mine)
    return total / count, equal / count


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    yield from zip(*(tensor.split(WINDOW) for tensor in tensors))


def check(source: Path, quantised: Path) -> dict[str, Any]:
    """Both models' readings, compared.

    Args:
        source: folder of the unquantised checkpoint.
        quantised: folder of the quantised one, with tokenizer.

    Returns:
        tokens, losses (source, quantised), kl, agreement, prompt and texts.

    Raises:
        ValueError: if there is no tokenizer.
    """
    if not (quantised / "tokenizer.json").is_file():
        raise ValueError(f"--check needs a tokenizer, and {source} has none")
    tokenizer = AutoTokenizer.from_pretrained(quantised)
    placed = {"device_map": "auto"} if torch.cuda.is_available() else {}
    readings = []
    for folder in (source, quantised):
        model = KimiLinearForCausalLM.from_pretrained(folder, dtype="auto", **placed)
        readings.append(read(model, tokenizer))
        del model  # before the next one is loaded
    kl, agreement = divergence(*readings)
    return {
        "tokens": len(readings[0].log_probabilities),
        "losses": [reading.loss for reading in readings],
        "kl": kl,
        "agreement": agreement,
        "prompt": PROMPT,
        "texts": [reading.text for reading in readings],
    }


__all__ = ["Reading", "check", "divergence", "read", "windows_of"]
