"""What the demo runs on an exported folder: only transformers and the folder's own code, nothing of this package.

python demo_session.py FOLDER
"""

import sys
import time
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline
from transformers.utils import logging

PROMPT = 'The "try" statement'
QUESTION = "Explain the with statement."
PROMPT_TOKENS, LONG_TOKENS, NEW_TOKENS = 1024, 8192, 64


def main(folder: str) -> None:
    """Load, complete, chat, report."""
    # Operations this small gain nothing from a second thread, and waiting for one that is not scheduled costs a lot.
    torch.set_num_threads(1)
    logging.disable_progress_bar()

    print("== Loaded with trust_remote_code")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    print(f"{type(model).__module__}.{type(model).__name__}, {model.dtype}".replace("transformers_modules.", ""))
    print(f"kimi_linear importable here: {'no' if find_spec('kimi_linear') is None else 'yes'}")

    print("\n== Completion, streamed, greedy")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**inputs, streamer=streamer, max_new_tokens=NEW_TOKENS, do_sample=False)

    print("\n== Chat turn through pipeline(), greedy")
    chat = pipeline("text-generation", model=folder, trust_remote_code=True)
    messages = [{"role": "user", "content": QUESTION}]
    answer = chat(messages, max_new_tokens=NEW_TOKENS, do_sample=False)[0]["generated_text"][-1]
    print(f"user: {QUESTION}\n{answer['role']}: {answer['content']}")

    print("\n== Report")
    print(f"parameters: {model.num_parameters():,}")
    report_cache_and_prompt_speed(model)
    report_decoding_speed(model)


@torch.no_grad()
def report_cache_and_prompt_speed(model: Any) -> None:
    """Read 1,024 and then 8,192 random tokens, and compare the cache with expanded keys and values."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, LONG_TOKENS), generator=generator)
    model(ids[:, :PROMPT_TOKENS], logits_to_keep=1)  # first calls set up threads and buffers
    start = time.perf_counter()
    output = model(ids[:, :PROMPT_TOKENS], use_cache=True, logits_to_keep=1)
    seconds = time.perf_counter() - start
    cache, sizes = output.past_key_values, {}
    sizes[PROMPT_TOKENS] = cache_bytes(model.config, cache)
    for begin in range(PROMPT_TOKENS, LONG_TOKENS, PROMPT_TOKENS):
        model(ids[:, begin : begin + PROMPT_TOKENS], past_key_values=cache, logits_to_keep=1)
    sizes[LONG_TOKENS] = cache_bytes(model.config, cache)

    print(f"\ncache bytes of one sequence   {PROMPT_TOKENS:>12,} {LONG_TOKENS:>12,} tokens")
    for name in sizes[PROMPT_TOKENS]:
        print(f"  {name:<28}{sizes[PROMPT_TOKENS][name]:>12,} {sizes[LONG_TOKENS][name]:>12,}")
    heads, width = model.config.num_attention_heads, model.config.qk_head_dim + model.config.v_head_dim
    print(
        "  this cache: measured (cache.nbytes, rows in use) after reading that many tokens.\n"
        f"  expanded K/V: computed, {heads} heads x {width} channels x {model.dtype.itemsize} bytes a token, layer:\n"
        "  in the MLA layers, beside the same KDA states; and in every layer, were all of them full attention."
    )
    where = f"batch 1, {str(model.dtype).removeprefix('torch.')}, {model.device}, {torch.get_num_threads()} thread"
    print(f"\nspeed ({where})")
    print(f"  prompt: {PROMPT_TOKENS / seconds:>8,.0f} tokens/s over {PROMPT_TOKENS:,} tokens")


def cache_bytes(config: Any, cache: Any) -> dict[str, int]:
    """Bytes that `cache` holds, and what the same tokens would take with expanded keys and values."""
    kinds = config.layer_types
    kda = sum(layer.nbytes for layer, kind in zip(cache.layers, kinds) if kind == "linear_attention")
    latent = next(layer for layer, kind in zip(cache.layers, kinds) if kind == "full_attention")
    width = config.qk_head_dim + config.v_head_dim
    expanded_layer = cache.get_seq_length() * config.num_attention_heads * width * latent.dtype.itemsize
    return {
        "this cache": cache.nbytes,
        "expanded K/V in MLA layers": kda + kinds.count("full_attention") * expanded_layer,
        "expanded K/V in every layer": len(kinds) * expanded_layer,
    }


def report_decoding_speed(model: Any) -> None:
    """Time `generate()` on a short prompt."""
    ids = torch.arange(16)[None]
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    seconds = time.perf_counter() - start
    print(f"  decode: {NEW_TOKENS / seconds:>8,.0f} tokens/s in generate(), {NEW_TOKENS} new after 16 tokens")


if __name__ == "__main__":
    main(sys.argv[1])
