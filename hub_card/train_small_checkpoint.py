"""Train the small checkpoint of this package: every layer kind of the architecture in two million parameters.

    python -m kimi_linear.hub_card.train_small_checkpoint --out hub_card/small_checkpoint

Text and tokenizer come from the running Python's manual (see `small_corpus`). One thread does the arithmetic, so that
the same seed, torch and Python give the same weights however many cores there are.

Written to the folder: config.json, model.safetensors (bf16; `A_log` and `dt_bias` fp32), generation_config.json, the
tokenizer files, training.json (recipe, versions, losses), loss_curve.png and card_notes.md, which the exporter takes
into the model card. The code is not stored there: an export brings it. Needs matplotlib (in the dev extra).
"""

import argparse
import json
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ..configuration.configuration_kimi_linear import KimiLinearConfig
from ..modeling.modeling_kimi_linear import KimiLinearForCausalLM
from .small_corpus import Corpus, load_corpus
from .tokenizer_conversion import MIN_SLOTS, train_small_tokenizer, write_tokenizer_folder

TRAINING_FILE = "training.json"
CURVE_FILE = "loss_curve.png"
NOTES_FILE = "card_notes.md"
MAX_CONTEXT = 2048
EVALUATION_LENGTH = 512


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, besides the sources and the versions."""

    seed: int = 0
    steps: int = 2400
    batch_size: int = 4
    length: int = 256
    learning_rate: float = 4e-3
    final_learning_rate: float = 1e-4
    warmup_steps: int = 50
    weight_decay: float = 0.1
    # Share of input tokens replaced by random ones: read fifteen times, so small a corpus is otherwise learnt by heart.
    input_noise: float = 0.1
    clip_norm: float = 1.0
    num_ranks: int = 1260
    threads: int = 1
    evaluate_every: int = 100


@dataclass(frozen=True)
class Tokens:
    """The corpus as ids: one stream to train on, and each held-out topic, opened and closed by [EOS]."""

    training: torch.Tensor
    held_out: dict[str, torch.Tensor]


def make_tokenizer(corpus: Corpus, num_ranks: int, out: Path) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the training texts and write its files, generation_config.json among them."""
    ranks = train_small_tokenizer(corpus.training.values(), num_ranks)
    return write_tokenizer_folder(ranks, out, slots=MIN_SLOTS, tokenizer_config={"model_max_length": MAX_CONTEXT})


def small_config(tokenizer: PreTrainedTokenizerFast) -> KimiLinearConfig:
    """Three KDA layers and an MLA layer; the first has a dense MLP, the others 8 experts and a shared one."""
    return KimiLinearConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        initializer_range=0.06,  # the default suits a width of 2304
        model_max_length=MAX_CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        num_experts=8,
        num_experts_per_token=2,
        moe_intermediate_size=128,  # like hidden_size, a multiple of the group sizes that quantisers take
        linear_attn_config={"head_dim": 32, "num_heads": 4},
    )


def encode(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """Ids of the training texts and dialogues in one stream, and of each held-out topic."""
    end = tokenizer.eos_token_id

    def ids_of(text: str) -> list[int]:
        return tokenizer.backend_tokenizer.encode(text).ids

    stream = [end]
    for text in corpus.training.values():
        stream += [*ids_of(text), end]
    for question, answer in corpus.dialogues:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        stream += [*ids_of(tokenizer.apply_chat_template(turns, tokenize=False)), end]
    held_out = {name: torch.tensor([end, *ids_of(text), end]) for name, text in corpus.held_out.items()}
    return Tokens(torch.tensor(stream), held_out)


@torch.no_grad()
def total_nats(model: KimiLinearForCausalLM, ids: torch.Tensor) -> float:
    """Loss summed over all ids of one text but the first, read in windows of EVALUATION_LENGTH tokens."""
    model.eval()
    total = 0.0
    for start in range(0, len(ids) - 1, EVALUATION_LENGTH):
        window = ids[None, start : start + EVALUATION_LENGTH + 1]
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
        total += F.cross_entropy(logits[0].float(), window[0, 1:], reduction="sum").item()
    return total


def held_out_loss(model: KimiLinearForCausalLM, tokens: Tokens) -> float:
    """Mean nats a token over the held-out topics."""
    return sum(total_nats(model, ids) for ids in tokens.held_out.values()) / _predicted(tokens)


def unigram_loss(tokens: Tokens, vocab_size: int) -> float:
    """Mean nats a token of the same tokens under the training frequencies, each count raised by one."""
    counts = torch.bincount(tokens.training, minlength=vocab_size).double() + 1
    log_probabilities = (counts / counts.sum()).log()
    return -sum(log_probabilities[ids[1:]].sum().item() for ids in tokens.held_out.values()) / _predicted(tokens)


def _predicted(tokens: Tokens) -> int:
    return sum(len(ids) - 1 for ids in tokens.held_out.values())


def train(model: KimiLinearForCausalLM, tokens: Tokens, recipe: Recipe) -> list[dict[str, float]]:
    """Train in place.

    Returns:
        `{"step", "training_loss", "held_out_loss"}` every `evaluate_every` steps, the training loss being the mean
        since the entry before.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe.weight_decay), betas=(0.9, 0.95))
    history, losses = [], []
    with tqdm(range(1, recipe.steps + 1), desc="training", unit="step") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, recipe)
            starts = torch.randint(len(tokens.training) - recipe.length, (recipe.batch_size, 1), generator=generator)
            batch = tokens.training[starts + torch.arange(recipe.length + 1)]
            inputs = _with_noise(batch[:, :-1], recipe.input_noise, model.config.vocab_size, generator)
            losses.append(_training_step(model, optimizer, inputs, batch[:, 1:], recipe.clip_norm))
            if step % recipe.evaluate_every == 0 or step == recipe.steps:
                entry = {"training_loss": sum(losses) / len(losses), "held_out_loss": held_out_loss(model, tokens)}
                bar.set_postfix({name: f"{loss:.3f}" for name, loss in entry.items()})
                history.append({"step": step, **entry})
                losses = []
    return history


def _with_noise(ids: torch.Tensor, share: float, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    replaced = torch.rand(ids.shape, generator=generator) < share
    return torch.where(replaced, torch.randint(vocab_size, ids.shape, generator=generator), ids)


def _training_step(
    model: KimiLinearForCausalLM,
    optimizer: torch.optim.Optimizer,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    clip_norm: float,
) -> float:
    model.train()
    logits = model(input_ids=inputs, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    model.update_correction_biases()
    return loss.item()


def _parameter_groups(model: KimiLinearForCausalLM, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, convolutions, `A_log` and `dt_bias` do not."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and "conv1d" not in name and "A_log" not in name
        (decayed if is_matrix else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def _learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to the final rate."""
    if step <= recipe.warmup_steps:
        return recipe.learning_rate * step / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    drop = recipe.learning_rate - recipe.final_learning_rate
    return recipe.final_learning_rate + drop * 0.5 * (1 + math.cos(math.pi * progress))


def save_model(model: KimiLinearForCausalLM, out: Path) -> KimiLinearForCausalLM:
    """Save in bf16 beside the tokenizer files, and return the model as loaded from there."""
    model.generation_config = GenerationConfig.from_pretrained(out)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        # Loading is what knows which parameters stay in fp32.
        saved = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        saved.save_pretrained(f"{folder}/bf16")
        # Without the code, which each export brings.
        for name in ("model.safetensors", "generation_config.json"):
            shutil.copyfile(f"{folder}/bf16/{name}", out / name)
        del saved.config.auto_map
        saved.config.save_pretrained(out)
    return KimiLinearForCausalLM.from_pretrained(out, dtype="auto")


def measure(model: KimiLinearForCausalLM, corpus: Corpus, tokens: Tokens) -> dict[str, Any]:
    """Losses of the saved model on held-out text, beside those of unigram frequencies."""
    nats = {name: total_nats(model, ids) for name, ids in tokens.held_out.items()}
    predicted = _predicted(tokens)
    tokens_per_byte = predicted / sum(len(text.encode()) for text in corpus.held_out.values())
    losses = {"model": sum(nats.values()) / predicted, "unigram": unigram_loss(tokens, model.config.vocab_size)}
    return {
        "tokens": predicted,
        "nats_per_token": losses,
        "bits_per_byte": {name: loss / math.log(2) * tokens_per_byte for name, loss in losses.items()},
        "model_nats_per_token_by_topic": {
            name: total / (len(tokens.held_out[name]) - 1) for name, total in nats.items()
        },
    }


def draw_curve(history: list[dict[str, float]], unigram: float, path: Path) -> None:
    """Plot training and held-out loss over steps, with the unigram baseline as a line."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [entry["step"] for entry in history]
    axes.plot(steps, [entry["training_loss"] for entry in history], label="training, inputs with noise")
    axes.plot(steps, [entry["held_out_loss"] for entry in history], label="held-out topics")
    axes.axhline(unigram, color="grey", linestyle="--", label="unigram frequencies, held-out topics")
    axes.set(xlabel="optimiser step", ylabel="loss, nats a token", title="Small Kimi Linear checkpoint", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=100)


def card_notes(report: dict[str, Any]) -> str:
    """What the model card says of this checkpoint, in Markdown."""
    held_out, recipe, versions = report["held_out"], report["recipe"], report["versions"]
    nats, bits = held_out["nats_per_token"], held_out["bits_per_byte"]
    best = min(report["history"], key=lambda entry: entry["held_out_loss"])
    return f"""\
**For trying and testing the code, not for use**: {report["parameters"]:,} parameters, trained from scratch on the
manual's topics of Python {versions["python"]} (`pydoc_data.topics`, © Python Software Foundation). It writes text that
looks like that manual and knows nothing. Questions it has seen are of the kind `Explain the with statement.`

| {len(held_out["model_nats_per_token_by_topic"])} held-out topics, {held_out["tokens"]:,} tokens | nats a token | \
bits a byte |
|---|---|---|
| this checkpoint, bf16 | {nats["model"]:.3f} | {bits["model"]:.3f} |
| unigram frequencies of the training tokens | {nats["unigram"]:.3f} | {bits["unigram"]:.3f} |

Paragraphs of held-out topics were removed from the training text. {recipe["steps"]:,} steps of {recipe["batch_size"]}
windows of {recipe["length"]} tokens, {recipe["input_noise"]:.0%} of the inputs replaced by random tokens, with seed
{recipe["seed"]}, took {report["minutes"]:.0f} minutes on one CPU core (torch {versions["torch"]}).
`python -m kimi_linear.hub_card.train_small_checkpoint` does it again. The held-out loss was lowest after
{best["step"]:,} steps ({best["held_out_loss"]:.3f}); training went on because the text became clearer.
"""


def run(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Train, save and measure; returns what training.json holds."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    start = time.monotonic()
    corpus = load_corpus()
    tokenizer = make_tokenizer(corpus, recipe.num_ranks, out)
    tokens = encode(corpus, tokenizer)
    model = KimiLinearForCausalLM(small_config(tokenizer))
    history = train(model, tokens, recipe)
    report = {
        "recipe": asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "corpus_sha256": corpus.sha256,
        "training_tokens": len(tokens.training),
        "parameters": model.num_parameters(),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "held_out": measure(save_model(model, out), corpus, tokens),
        "history": history,
    }
    (out / TRAINING_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / NOTES_FILE).write_text(card_notes(report), encoding="utf-8")
    draw_curve(history, report["held_out"]["nats_per_token"]["unigram"], out / CURVE_FILE)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the small checkpoint of kimi-linear on Python's own manual.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; files are overwritten")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimiser steps (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    report = run(parsed.out, replace(Recipe(), seed=parsed.seed, steps=parsed.steps))
    print(json.dumps(report["held_out"], indent=1))


if __name__ == "__main__":
    main()
