"""How far log-probabilities of generation are from those of the forward that training takes its loss of.

    python -m benchmarks.rollouts [--model FOLDER] [--rows 16] [--prompt 64] [--new 128] [--lora 16] [--device cuda]
                                  [--out result.json]

RL weighs a token by the quotient of its probability in training and in generation, and takes it for one at the first
step. The model stays in training mode, as TRL leaves it; its adapter, if any, is unmerged. Each dtype is one row: the
mean and the largest |difference| of a sampled token's log-probability by captured steps (where there are any) and by
layers, both against the training forward, and the mean of exp(difference), the quotient itself.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_sizes import add_lora
from benchmarks.record import write
from kimi_linear.hub_card.exporter import SMALL_CHECKPOINT
from kimi_linear.hub_card.measure.timing import layer_by_layer
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM


def rollout_gaps(model: Any, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int, **options: Any) -> torch.Tensor:
    """|difference| of each generated token's log-probability, [B, new_tokens]; see `_differences`."""
    return _differences(model, ids, mask, new_tokens, **options).abs()


def _differences(model: Any, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int, **options: Any) -> torch.Tensor:
    """Log-probability of each token that `generate()` sampled: in a training forward, less that in generation.

    Args:
        model: perhaps PEFT's wrapper; it stays in the mode that it is in.
        ids: [B, T] prompts, left-padded.
        mask: [B, T], zero at padding.
        new_tokens: to generate, without an end.
        options: of `generate()`.
    """
    settings = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0, **options}
    with torch.no_grad():
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=None,
            return_dict_in_generate=True, output_logits=True, **settings,
        )  # fmt: skip
    new = made.sequences[:, ids.shape[1] :]
    whole = torch.cat([mask, torch.ones_like(new)], dim=1)
    with torch.enable_grad():
        logits = model(input_ids=made.sequences, attention_mask=whole, use_cache=False).logits.detach()
    trained = _of_tokens(logits[:, ids.shape[1] - 1 : -1], new)
    return trained - _of_tokens(torch.stack(made.logits, dim=1), new)


def _of_tokens(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]


def _measure(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(1000, model.config.vocab_size)
    ids = torch.randint(3, vocabulary, (arguments.rows, arguments.prompt), generator=generator).to(arguments.device)
    mask = torch.ones_like(ids)
    mask[0, : arguments.prompt // 2] = 0
    row: dict[str, Any] = {"dtype": str(model.dtype), "way": model.decode_path.split(":")[0]}
    for way in ("steps", "layers"):
        if way == "layers":
            with layer_by_layer(model):
                found = _differences(model, ids, mask, arguments.new)
        else:
            found = _differences(model, ids, mask, arguments.new)
        row[way] = {
            "mean": float(found.abs().mean()),
            "largest": float(found.abs().max()),
            "quotient": float(found.exp().mean()),
        }
    return row


def main() -> None:
    """Parse the command line, run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SMALL_CHECKPOINT, help="a checkpoint (default: the small one)")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--lora", type=int, help="give the model an unmerged adapter of this rank")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = KimiLinearForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(arguments.device).train()
        if arguments.lora:
            add_lora(model, arguments.lora).train()
        rows.append(_measure(model, arguments))
        for way in ("steps", "layers"):
            cells = ", ".join(f"{name} {value:.2e}" for name, value in rows[-1][way].items())
            print(f"{rows[-1]['dtype']:15} generation by {way:6} ({rows[-1]['way']}): {cells}", flush=True)
    write(arguments.out, "rollouts", rows=rows)


if __name__ == "__main__":
    main()
