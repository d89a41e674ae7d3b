"""Errors of bf16 logits by captured steps, layer by layer, and of transformers' native class, against a float32 run.

    python -m benchmarks.errors [--steps 64] [--batches 1 8] [--out result.json]

Two models. `small checkpoint`: hub_card's, trained; its tokens are held-out text. `scaled`: the released widths and
heads with 8 layers, 32 experts and 32,768 tokens, random weights, so that its float32 version fits beside the others;
its tokens are random. Each is loaded from one folder in the released layout, in bf16, and once in float32 with the
PyTorch path of KDA, the reference. All see a prompt and then `--steps` tokens one by one, whichever they would have
chosen. Native computes KDA by fla where that is installed (a minute at first use), else in PyTorch. The logits of these
steps are compared:

`relative` is the norm of the differences by that of the reference's logits, over all of a case; `typical` the median of
the same by position (an expert chosen otherwise in one position counts in the first, hardly in the second); `largest`
the largest difference, in units of the logits; `agreement` the share of positions with the reference's greedy token.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, DynamicCache

from benchmarks.full_model import free_memory, random_model
from benchmarks.record import write
from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.hub_card.exporter import SMALL_CHECKPOINT
from kimi_linear.hub_card.measure.timing import layer_by_layer
from kimi_linear.hub_card.small_corpus import load_corpus
from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

PROMPT_TOKENS = 256
SCALED = {"num_hidden_layers": 8, "num_experts": 32, "vocab_size": 32768}
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def scaled_config() -> KimiLinearConfig:
    """The released shape with fewer layers, experts and tokens."""
    pattern = dict(KimiLinearConfig().linear_attn_config)
    for key in ("kda_layers", "full_attn_layers"):
        pattern[key] = [layer for layer in pattern[key] if layer <= SCALED["num_hidden_layers"]]
    return KimiLinearConfig(**SCALED, **_SPECIAL_TOKENS, linear_attn_config=pattern, layer_types=None)


@torch.no_grad()
def logits_of(model: Any, cache: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """[B, T - prompt, vocab_size] in float32: logits of the tokens of `ids` [B, T] after the prompt, one by one."""
    model(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    steps = ids[:, prompt:].split(1, dim=1)
    return torch.cat([model(step, past_key_values=cache, use_cache=True).logits for step in steps], dim=1).float()


def errors(logits: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """What the module's docstring says of each."""
    difference = logits - reference
    by_position = difference.norm(dim=-1) / reference.norm(dim=-1)
    return {
        "relative": float(difference.norm() / reference.norm()),
        "typical": float(by_position.median()),
        "largest": float(difference.abs().max()),
        "agreement": float((logits.argmax(-1) == reference.argmax(-1)).float().mean()),
    }


def measure(folder: Path, all_ids: list[torch.Tensor], prompt: int, device: str = "cuda") -> Iterator[dict[str, Any]]:
    """Errors of the three ways for each of `all_ids` [B, T]; `folder` is a checkpoint in the released layout."""
    place = {"device_map": {"": device}}
    all_ids = [ids.to(device) for ids in all_ids]
    exact = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32, kda_backend="torch", **place).eval()
    references = [logits_of(exact, KimiLinearCache(exact.config), ids, prompt) for ids in all_ids]
    del exact
    ours = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **place).eval()
    if not ours.decode_path.startswith("captured steps"):
        raise SystemExit(f"the model decodes {ours.decode_path}")
    native = transformers.KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **place).eval()
    for ids, reference in zip(all_ids, references, strict=True):
        found = {"captured steps": logits_of(ours, KimiLinearCache(ours.config), ids, prompt)}
        with layer_by_layer(ours):
            found["layer by layer"] = logits_of(ours, KimiLinearCache(ours.config), ids, prompt)
        found["native"] = logits_of(native, DynamicCache(config=native.config), ids, prompt)
        size = {"batch": ids.shape[0], "positions": ids.shape[0] * (ids.shape[1] - prompt)}
        size["logits_rms"] = float(reference.square().mean().sqrt())
        yield from ({"way": way, **size, **errors(logits, reference)} for way, logits in found.items())


def scaled_rows(batches: list[int], length: int) -> Iterator[dict[str, Any]]:
    """Rows of `measure` for the released shape scaled down, over random tokens."""
    with tempfile.TemporaryDirectory() as folder:
        random_model(KimiLinearForCausalLM, scaled_config()).save_pretrained(folder)
        free_memory()
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(3, SCALED["vocab_size"], (batch, length), generator=generator) for batch in batches]
        yield from measure(Path(folder), ids, PROMPT_TOKENS)


def small_checkpoint_rows(batches: list[int], length: int) -> Iterator[dict[str, Any]]:
    """Rows of `measure` for the small checkpoint, over pieces of held-out texts."""
    tokenizer = AutoTokenizer.from_pretrained(SMALL_CHECKPOINT)
    ids = [tokenizer(text, return_tensors="pt").input_ids[0] for _, text in sorted(load_corpus().held_out.items())]
    pieces = torch.cat([text[: len(text) // length * length].view(-1, length) for text in ids])
    if len(pieces) < max(batches):
        raise SystemExit(f"held-out texts give {len(pieces)} pieces of {length} tokens, no batch of {max(batches)}")
    yield from measure(SMALL_CHECKPOINT, [pieces[:batch] for batch in batches], PROMPT_TOKENS)


def main() -> None:
    """Parse the command line, run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=64, help="tokens one by one, after a prompt of 256")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    models = {"small_checkpoint": small_checkpoint_rows, "scaled": scaled_rows}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    print(
        "model            | batch | way            | relative | typical | largest (of rms) | greedy agreement",
        flush=True,
    )
    for name, rows_of in models.items():
        for row in rows_of(arguments.batches, PROMPT_TOKENS + arguments.steps):
            found[name].append(row)
            write(arguments.out, "errors", **found)
            print(
                f"{name:16} | {row['batch']:5} | {row['way']:14} | {row['relative']:8.5f} | {row['typical']:7.5f} | "
                f"{row['largest']:7.4f} {row['largest'] / row['logits_rms']:8.4f} | {row['agreement']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
