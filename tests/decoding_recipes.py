"""Decoding methods that transformers 5 fetches from the Hub, written here so that tests can run them offline.

Each is a `custom_generate` callable: `model.generate(ids, custom_generate=contrastive_search, ...)`. They use
the model as the Hub's recipes do: copies of the cache for candidates, selection of rows, hidden states of early layers.
With `use_cache=False` the same loop goes by whole forwards, which is what tests compare with.
"""

import torch
import torch.nn.functional as F


def _forward(model, ids: torch.Tensor, kwargs: dict, **options):
    """Run the tokens of `ids` that the cache in `kwargs` has not seen."""
    cache = kwargs.get("past_key_values")
    seen = 0 if cache is None else int(cache.get_seq_length())
    mask = kwargs.get("attention_mask")
    if mask is not None:
        mask = F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    return model(
        ids[:, seen:],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=cache is not None,
        return_dict=True,
        **options,
    )


def contrastive_search(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Of the `top_k` likeliest tokens take the one whose state least resembles the states before it (arXiv 2202.06417).

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config: as `generate()` passes them.
        kwargs: model arguments; `past_key_values` is copied `top_k` times over for the candidates of each step.

    Returns:
        [B, T + new] token ids.
    """
    alpha, width = generation_config.penalty_alpha, generation_config.top_k
    cache = kwargs.get("past_key_values")
    rows = input_ids.shape[0]
    outputs = _forward(model, input_ids, kwargs, output_hidden_states=True)
    logits, states = outputs.logits[:, -1], outputs.hidden_states[-1]  # [B, V], [B, T, D]
    while not stopping_criteria(input_ids, None).all():
        probabilities, tokens = logits_processor(input_ids, logits).softmax(-1).topk(width, dim=-1)  # [B, K]
        candidates = torch.cat([input_ids.repeat_interleave(width, 0), tokens.view(-1, 1)], dim=1)
        wide = dict(kwargs)
        if wide.get("attention_mask") is not None:
            wide["attention_mask"] = wide["attention_mask"].repeat_interleave(width, 0)
        if cache is not None:
            cache.batch_repeat_interleave(width)
        outputs = _forward(model, candidates, wide, output_hidden_states=True)
        new = outputs.hidden_states[-1][:, -1:]  # [B K, 1, D]
        before = states.repeat_interleave(width, 0)
        likeness = F.cosine_similarity(before, new, dim=-1)
        if wide.get("attention_mask") is not None:
            valid = F.pad(wide["attention_mask"], (0, likeness.shape[1] - wide["attention_mask"].shape[1]), value=1)
            likeness = likeness.masked_fill(valid == 0, -1.0)
        score = (1 - alpha) * probabilities - alpha * likeness.max(dim=-1).values.view(rows, width)
        chosen = torch.arange(rows) * width + score.argmax(-1)
        if cache is not None:
            cache.batch_select_indices(chosen)
        input_ids, logits = candidates[chosen], outputs.logits[chosen, -1]
        states = torch.cat([states, new[chosen]], dim=1)
    return input_ids


def dola(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Contrast the last layer's logits with those of the early layer that differs most from it (arXiv 2309.03883).

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config: as `generate()` passes them.
        kwargs: model arguments.

    Returns:
        [B, T + new] token ids.
    """
    while not stopping_criteria(input_ids, None).all():
        outputs = _forward(model, input_ids, kwargs, output_hidden_states=True)
        final = outputs.logits[:, -1].log_softmax(-1)
        early = torch.stack([model.lm_head(h[:, -1]).log_softmax(-1) for h in outputs.hidden_states[:-1]])  # [L, B, V]
        middle = (early.exp() + final.exp()).div(2).log()
        apart = [
            F.kl_div(middle, x.expand_as(middle), log_target=True, reduction="none").sum(-1) for x in (early, final)
        ]
        layer = (apart[0] + apart[1]).mean(-1).argmax()
        logits = logits_processor(input_ids, final - early[layer])
        input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=1)
    return input_ids


def group_beam_search(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Beams in groups; a group pays `diversity_penalty` for each token that an earlier group took (arXiv 1610.02424).

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config: as `generate()` passes them, with
            `num_beams` rows for each prompt.
        kwargs: model arguments; the rows of `past_key_values` follow the beams.

    Returns:
        [B num_beams, T + new] token ids, each group's beams from the best to the worst.
    """
    beams, groups = generation_config.num_beams, generation_config.num_beam_groups
    size, cache = beams // groups, kwargs.get("past_key_values")
    prompts = input_ids.shape[0] // beams
    totals = torch.full((prompts, groups, size), -1e9)
    totals[:, :, 0] = 0
    first = torch.arange(prompts)[:, None] * beams
    while not stopping_criteria(input_ids, None).all():
        logits = _forward(model, input_ids, kwargs).logits[:, -1]
        scores = logits_processor(input_ids, logits.log_softmax(-1)).view(prompts, groups, size, -1)
        vocabulary = scores.shape[-1]
        taken = torch.zeros(prompts, vocabulary)
        parents, tokens = [], []
        for group in range(groups):
            penalty = generation_config.diversity_penalty * taken
            continued = totals[:, group, :, None] + scores[:, group] - penalty[:, None]
            totals[:, group], flat = continued.flatten(1).topk(size, dim=-1)
            parents.append(first + group * size + flat // vocabulary)
            tokens.append(flat % vocabulary)
            taken.scatter_add_(1, tokens[-1], torch.ones(prompts, size))
        parent, token = torch.cat(parents, 1).flatten(), torch.cat(tokens, 1).flatten()
        input_ids = torch.cat([input_ids[parent], token[:, None]], dim=1)
        if cache is not None:
            cache.reorder_cache(parent)
    return input_ids
