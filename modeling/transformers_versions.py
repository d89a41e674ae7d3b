"""The versions of transformers that we serve: their range, and the two names that they have for the cache.

transformers 5.24 calls `cache` what was `past_key_values` before: as an argument of every forward, in what `generate()`
keeps between steps, and as a field of outputs. Our forwards and `generate()` take both names in every version, and what
they give to transformers has the installed version's name.
"""

import dataclasses
from typing import Any

import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The first and the last minor version that the tests run on; pyproject.toml has the same range.
OLDEST, NEWEST = (5, 10), (5, 24)

CACHE_NAME = (
    "cache" if "cache" in [field.name for field in dataclasses.fields(MoeModelOutputWithPast)] else "past_key_values"
)


def warn_outside_range() -> None:
    """One warning a process if the installed transformers is none that the tests ran on."""
    installed = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not OLDEST <= installed <= NEWEST:
        logger.warning_once(
            f"this Kimi Linear code was tested with transformers {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, "
            f"and {transformers.__version__} is installed; install a version of that range, or compare its answers "
            "with one before you rely on them"
        )


def name_language_model() -> None:
    """Let Trainer know that this class predicts the next token, where transformers has no class of that name.

    With label smoothing Trainer computes the loss itself, and shifts labels only for the names in this list. Versions
    before 5.17 lack ours, and compared each token with itself.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("kimi_linear", "KimiLinearForCausalLM")


def one_cache(past_key_values: Cache | None, cache: Cache | None, others: dict[str, Any]) -> Cache | None:
    """The cache that a forward was given under either of its names.

    Args:
        past_key_values, cache: the two names' values.
        others: the keyword arguments that the forward passes on without knowing them.

    Raises:
        ValueError: if the two names hold different caches.
        TypeError: if another argument holds a cache, which would be ignored otherwise, and tokens with it.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(
            "past_key_values and cache are two names of one argument and hold different caches; give one of them"
        )
    for name, value in others.items():
        if _holds_cache(value):
            raise TypeError(
                f"{name} holds a cache, and this model has no such argument: give it as cache or past_key_values"
            )
    return past_key_values if cache is None else cache


def _holds_cache(value: Any) -> bool:
    """Whether `value` is a cache, or a list, tuple or dict with one in it."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        return any(_holds_cache(part) for part in value)
    return isinstance(value, Cache)


def as_argument(cache: Cache | None) -> dict[str, Cache]:
    """`cache` as a keyword argument of the installed transformers; nothing if there is none."""
    return {} if cache is None else {CACHE_NAME: cache}


__all__ = ["CACHE_NAME", "NEWEST", "OLDEST", "as_argument", "name_language_model", "one_cache", "warn_outside_range"]
