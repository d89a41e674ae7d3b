"""What needs the whole model in memory: captured steps against layers, and a text from `generate()`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...modeling.cache.kimi_linear_cache import KimiLinearCache
from ...modeling.modeling_kimi_linear import KimiLinearForCausalLM
from ..measure.timing import layer_by_layer
from ..random_weights import available_memory
from .report import Report

NEW_TOKENS = 40
# As for one layer, and 27 of them add up like the square root: 8 times 5 units, halved by the final norm's rounding.
STEP_TOLERANCE = 16
_STEPS = 16
_SPARE = 2 * 2**30


@dataclass(frozen=True)
class Room:
    """Whether a whole model fits, and why not."""

    fits: bool
    why: str


def find_room(weights: int, kind: str) -> Room:
    """Compare `weights` bytes, a tenth more and 2 GiB with what is free on the GPUs or in main memory."""
    needed = int(weights * 1.1) + _SPARE
    if kind == "cuda":
        free = sum(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    else:
        free = available_memory() or 0
    where = "on the GPUs" if kind == "cuda" else "in memory"
    return Room(needed <= free, f"it takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free {where}")


def load_whole(folder: Path, kind: str) -> Any:
    """The folder's model on the GPUs, or in main memory."""
    place: Any = "auto" if kind == "cuda" else {"": "cpu"}
    model = KimiLinearForCausalLM.from_pretrained(folder, dtype="auto", device_map=place)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def compare_steps(model: Any, ids: torch.Tensor, report: Report) -> None:
    """Logits of the last tokens of `ids` [T], one by one, by captured steps and layer by layer."""
    said = model.decode_path
    if not said.startswith("captured steps"):
        report.unchecked(f"captured steps against layers: the model decodes {said}")
        return
    steps = min(_STEPS, len(ids) - 1)
    ids = ids[None].to(model.device)
    captured = _logits_of_last(model, ids, steps)
    with layer_by_layer(model):
        layers = _logits_of_last(model, ids, steps)
    errors = (captured - layers).norm(dim=-1) / layers.norm(dim=-1)
    same = int((captured.argmax(-1) == layers.argmax(-1)).sum())
    limit = max(STEP_TOLERANCE * torch.finfo(model.dtype).eps, 1e-4)
    median = float(errors.median())
    report.judge(
        median <= limit,
        f"captured steps against layers: logits of {steps} tokens differ by {median:.1e} of their norm in the median "
        f"({limit:.1e} allowed, {float(errors.max()):.1e} at most), {same} of {steps} greedy tokens are the same",
    )


def _logits_of_last(model: Any, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """[steps, vocab_size] in fp32: logits of the last `steps` tokens of `ids` [1, T], one by one over a cache."""
    cache = KimiLinearCache(model.config)
    model(ids[:, :-steps], past_key_values=cache, use_cache=True, logits_to_keep=1)
    parts = ids[:, -steps:].split(1, dim=1)
    return torch.cat([model(part, past_key_values=cache, use_cache=True).logits[0] for part in parts]).float()


def generate_ids(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    """Greedy new tokens [at most NEW_TOKENS] after `prompt` [T]."""
    ids = prompt[None].to(model.device)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
    return text[0, len(prompt) :].cpu()


__all__ = ["NEW_TOKENS", "Room", "compare_steps", "find_room", "generate_ids", "load_whole"]
