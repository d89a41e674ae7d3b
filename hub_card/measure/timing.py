"""Time of a captured step and of `generate()`, on whatever device the model is."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...modeling.decode.step import DecodeStep

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False, "eos_token_id": None},
    "eos": {"do_sample": False, "eos_token_id": 163586},
    "sampled": {"do_sample": True, "eos_token_id": 163586},
}
# New tokens of two runs whose difference is taken.
NEW_TOKENS = (8, 264)
_WARM_UP = 2


def wait_for_gpus() -> None:
    """Wait for everything that was launched on any GPU; nothing to do where there is none."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def replay_ms(step: DecodeStep, cache: Any, repeats: int = 40) -> float:
    """Median time of one step, which keeps reading and writing the cache at the same length."""
    ids = torch.randint(0, min(1000, step.config.vocab_size), (step.batch, step.tokens), device=step.device)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with step.lock:
            step.prepare(cache, ids)
            start.record()
            step.run()  # without `commit`: the next one begins at the same position
            end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[repeats // 4 :])


def generate_seconds(model: Any, cache: Any, batch: int, count: int, **options: Any) -> float:
    """Time of `generate()` of `count` new tokens over a filled cache, which it lengthens.

    Raises:
        ValueError: if the text ended before.
    """
    ids = torch.zeros(batch, cache.get_seq_length() + 1, dtype=torch.long, device=model.device)
    wait_for_gpus()
    start = time.perf_counter()
    text = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, pad_token_id=0, max_new_tokens=count, **options
    )
    wait_for_gpus()
    seconds = time.perf_counter() - start
    if text.shape[1] != ids.shape[1] + count:
        raise ValueError(f"the end token came after {text.shape[1] - ids.shape[1]} of {count} tokens: choose another")
    return seconds


def generate_ms(model: Any, cache: Any, batch: int, new_tokens: tuple[int, int] = NEW_TOKENS, **options: Any) -> float:
    """Time a token inside `generate()`, the difference of two counts of new tokens; a first call goes untimed."""
    few, many = new_tokens
    seconds = [generate_seconds(model, cache, batch, count, **options) for count in (_WARM_UP, few, many)]
    return (seconds[2] - seconds[1]) / (many - few) * 1e3


@contextmanager
def layer_by_layer(model: Any) -> Iterator[None]:
    """Inside, `model` decodes layer by layer: a hook that does nothing hangs on it, and captured steps step aside."""
    handle = model.model.norm.register_forward_pre_hook(lambda module, arguments: None)
    try:
        yield
    finally:
        handle.remove()


__all__ = ["NEW_TOKENS", "WAYS", "generate_ms", "generate_seconds", "layer_by_layer", "replay_ms", "wait_for_gpus"]
