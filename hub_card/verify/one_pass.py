"""One pass over a known text, layer by layer from disk: what the layers, the routers and the logits look like."""

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ...configuration.configuration_kimi_linear import KimiLinearConfig
from ..measure.random_models import native_class
from .layout import StoredTensor
from .native_layer import native_output
from .report import Report
from .streaming import StreamedModel, Tensors, dense_tensors

# English that any language model finds easy; the small checkpoint was trained on such.
PASSAGE = (
    'The "try" statement specifies exception handlers and/or cleanup code for a group of statements. The "for" '
    "statement is used to iterate over the elements of a sequence, such as a string, a tuple or a list."
)
# Each implementation rounds about a dozen times on the way through a layer, which makes 2 to 3 units in the last place
# of the residual stream; a wrong layer differs by its whole share of the stream.
LAYER_TOLERANCE = 8
# Mean surprise of the next token, as a share of that of a guess among all tokens, above which nothing was learnt.
_UNTRAINED = 0.75
_ENOUGH_TOKENS = 16


@dataclass
class LayerFacts:
    """What a pass showed of one layer.

    Args:
        index: from zero.
        rms: root mean square of the output.
        finite: whether all of it is.
        experts: tokens that each expert got, or None in a dense layer.
        native: difference to transformers' layer on the same input, relative, median over tokens; None if not compared.
        worst: the same, largest over tokens.
    """

    index: int
    rms: float
    finite: bool
    experts: torch.Tensor | None = None
    native: float | None = None
    worst: float | None = None


class _Watcher:
    """Collects `LayerFacts` while a `StreamedModel` computes."""

    def __init__(self, config: KimiLinearConfig, compare: bool, bar: Any) -> None:
        self.config, self.compare, self.bar = config, compare, bar
        self.facts: list[LayerFacts] = []
        self.problem: str | None = None
        self.chosen: torch.Tensor | None = None

    def saw_router(self, module: nn.Module, arguments: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        self.chosen = output[2]

    def __call__(
        self, index: int, layer: nn.Module, given: torch.Tensor, output: torch.Tensor, tensors: Tensors
    ) -> None:
        facts = LayerFacts(index, float(output.float().square().mean().sqrt()), bool(torch.isfinite(output).all()))
        if self.chosen is not None:
            facts.experts = torch.bincount(self.chosen.flatten().cpu(), minlength=self.config.num_experts)
            self.chosen = None
        if self.compare and self.problem is None:
            try:
                theirs = native_output(self.config, index, dense_tensors(layer, tensors), given)
                errors = (output - theirs).float().norm(dim=-1) / theirs.float().norm(dim=-1)
                facts.native, facts.worst = float(errors.median()), float(errors.max())
            except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
                self.problem = f"layer {index + 1}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.facts.append(facts)
        self.bar.update()


def run_pass(
    config: KimiLinearConfig, stored: dict[str, StoredTensor], ids: torch.Tensor, device: str, report: Report
) -> torch.Tensor | None:
    """Logits [T, vocab_size] in fp32 of `ids` [T]; judges layers, routers and agreement with the native class.

    Returns:
        None if the weights can't be read into our modules.
    """
    try:
        native_class()
        compare = True
    except ValueError as error:
        compare = False
        report.unchecked(f"agreement with transformers' own class: {error}")
    with tqdm(total=config.num_hidden_layers, desc="layers from disk", file=sys.stderr, leave=False) as bar:
        watcher = _Watcher(config, compare, bar)
        try:
            streamed = StreamedModel(config, stored, device)
            for layer in streamed.model.model.layers:
                if layer.is_moe:
                    layer.block_sparse_moe.gate.register_forward_hook(watcher.saw_router)
            logits = streamed.logits(ids[None], watcher)[0].float()
        except (ValueError, RuntimeError) as error:
            report.wrong(f"reading the layers: {' '.join(str(error).split())[:400]}")
            return None
    show_layers(watcher.facts, config)
    judge_layers(watcher.facts, config, len(ids), streamed.dtype, report)
    if watcher.problem is not None:
        report.unchecked(f"agreement with transformers' own class: it failed at {watcher.problem}")
    return logits


def show_layers(facts: list[LayerFacts], config: KimiLinearConfig) -> None:
    """A table, one line a layer."""
    print("\nlayer  kind  output rms  experts used  busiest  native differs by (worst token)")
    for one in facts:
        kind = "KDA" if config.layer_types[one.index] == "linear_attention" else "MLA"
        used = busiest = ""
        if one.experts is not None:
            used = f"{int((one.experts > 0).sum())} of {config.num_experts}"
            busiest = f"{float(one.experts.max() / one.experts.sum()):.1%}"
        native = f"{one.native:.1e} ({one.worst:.1e})" if one.native is not None else "-"
        print(f"{one.index + 1:5}  {kind:4}  {one.rms:10.4g}  {used:>12}  {busiest:>7}  {native}")
    print(flush=True)


def judge_layers(
    facts: list[LayerFacts], config: KimiLinearConfig, tokens: int, dtype: torch.dtype, report: Report
) -> None:
    """Findings on finite outputs, collapsed routers and the native class."""
    broken = [one.index + 1 for one in facts if not one.finite]
    report.judge(not broken, f"layers: {'all outputs are finite' if not broken else f'not finite from {broken[0]} on'}")
    routed = [one for one in facts if one.experts is not None]
    few = config.num_experts_per_token
    if routed and tokens >= _ENOUGH_TOKENS and few < config.num_experts:
        stuck = [one.index + 1 for one in routed if int((one.experts > 0).sum()) <= few]
        used = sorted(int((one.experts > 0).sum()) for one in routed)
        said = f"layers {stuck} send every token to the same {few} experts" if stuck else (
            f"{used[0]}{f' to {used[-1]}' if used[-1] > used[0] else ''} of {config.num_experts} experts get tokens"
        )  # fmt: skip
        report.judge(not stuck, f"routers: {said}")
    elif routed:
        report.unchecked(f"routers: {tokens} tokens and {config.num_experts} experts are too few to tell")
    compared = [one for one in facts if one.native is not None]
    if compared:
        limit = max(LAYER_TOLERANCE * torch.finfo(dtype).eps, 1e-4)
        off = [one for one in compared if not one.native <= limit]
        most = max(compared, key=lambda one: one.native if one.native == one.native else math.inf)
        said = f"layers {[one.index + 1 for one in off]} differ" if off else f"{len(compared)} layers agree"
        report.judge(
            not off,
            f"agreement with transformers' own class, layer by layer on the same input: {said} "
            f"(at most {most.native:.1e} of the stream's norm in the median token, {limit:.1e} allowed)",
        )


def judge_logits(logits: torch.Tensor, ids: torch.Tensor, known: int, is_text: bool, report: Report) -> None:
    """Findings on finite and plausible logits.

    Args:
        logits: [T, V].
        ids: [T], their tokens.
        known: how many of these, from the first, are not the model's own words.
        is_text: whether they are words at all.
        report: for the findings.
    """
    if not report.judge(bool(torch.isfinite(logits).all()), "logits: all finite"):
        return
    vocabulary = logits.shape[-1]
    logits, following = logits[: known - 1], ids[1:known].to(logits.device)
    surprise = float(torch.nn.functional.cross_entropy(logits, following))
    chance = math.log(vocabulary)
    hits = float((logits.argmax(-1) == following).float().mean())
    said = f"next token of a known text: surprise {surprise:.2f} nats (a guess among {vocabulary} has {chance:.2f}), "
    said += f"{hits:.0%} guessed"
    if not is_text:
        report.unchecked(f"whether the logits are plausible: without a tokenizer there is no text ({said})")
    elif surprise < _UNTRAINED * chance:
        report.right(f"logits: {said}")
    else:
        report.wrong(f"logits: {said}: these weights have learnt nothing, or are read wrongly")


__all__ = ["PASSAGE", "LayerFacts", "judge_layers", "judge_logits", "run_pass", "show_layers"]
