"""Kimi Linear for Hugging Face transformers: decoder, language model and sequence classifier (arXiv 2510.26692)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.configuration_kimi_linear import KimiLinearConfig
from .cache.kimi_linear_cache import KimiLinearCache
from .checkpoint.mixin import ReleasedCheckpointMixin
from .checkpoint.packed_modules import KimiPackedLinear
from .decode.path import DecodePath
from .generate.mixin import KimiGenerationMixin
from .input_checks import (
    check_cache,
    check_cache_dtype,
    check_embeddings,
    check_label_values,
    check_labels,
    check_mask,
    check_mask_values,
    check_positions,
    check_token_ids,
    checkpointing_over_cache_error,
)
from .layers.decoder_layer import KimiDecoderLayer
from .layers.initialisation import initialise
from .layers.masks import make_masks
from .layers.mla_attention import KimiMLAAttention
from .layers.moe import KimiTopkRouter
from .layers.norms import KimiRMSNorm
from .layers.sequence_layout import PaddingLayout, packing_of
from .plain_modules import Noticing, reads_weights
from .prompt.carrying import Carrying
from .prompt.path import PromptPath
from .prompt.segments import forward_in_segments, takes_segments
from .training.loss import loss_without_logits
from .transformers_versions import CACHE_NAME, as_argument, name_language_model, one_cache, warn_outside_range

logger = logging.get_logger(__name__)


class KimiLinearPreTrainedModel(Noticing, ReleasedCheckpointMixin, PreTrainedModel):
    """Weight initialisation, loading from the released layout, and what transformers asks about the architecture."""

    config: KimiLinearConfig
    config_class = KimiLinearConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KimiDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]  # the layers' name, and the boundary's since 5.24
    # Kept in fp32 when the model is loaded in bf16 or fp16: rounding A_log changes exp(A_log) by up to 0.9%.
    # Correction biases move by 1e-3 in training, less than bf16 can tell apart.
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "e_score_correction_bias"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # True would make transformers refuse speculative decoding; our cache takes tokens back, and others are refused.
    _is_stateful = False
    _can_record_outputs = {
        "router_logits": OutputRecorder(KimiTopkRouter, index=0),
        "hidden_states": KimiDecoderLayer,
        "attentions": OutputRecorder(KimiMLAAttention, index=1),
    }

    def __init__(self, config: KimiLinearConfig, *args: Any, **kwargs: Any) -> None:
        warn_outside_range()
        name_language_model()
        config.check_consistency()  # fields may have been changed since the config was built
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, KimiPackedLinear):
            return  # zero until it is loaded, as are packed experts
        super()._init_weights(module)
        initialise(module, std=self.config.initializer_range)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """True. transformers would look for the decorator in the text of this file, but the experts have their own."""
        return True

    def update_correction_biases(self, rate: float = 1e-3) -> None:
        """Balance the experts of every MoE layer (arXiv 2408.15664); call it after each optimiser step.

        Args:
            rate: step of the bias, 1e-3 in DeepSeek-V3.
        """
        for module in self.modules():
            if isinstance(module, KimiTopkRouter):
                module.update_correction_bias(rate)


def _taking_tokens(cache: Cache | None) -> AbstractContextManager[None]:
    """See `KimiLinearCache.taking_tokens`; caches of transformers, and compiled graphs, go without."""
    if isinstance(cache, KimiLinearCache) and not torch.compiler.is_compiling():
        return cache.taking_tokens("a forward")
    return nullcontext()


@reads_weights
class KimiLinearModel(KimiLinearPreTrainedModel):
    """The decoder: embedding, layers, final norm."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(KimiDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = KimiRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        keep_last: int | None = None,
        prompt_progress: Callable[[int, int], None] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Run new tokens through the decoder.

        Args:
            input_ids: [B, T] int64; give either these or `inputs_embeds`.
            attention_mask: [B, cached + T], zero at padding, which may be anywhere; or a 4D mask, which only MLA layers
                can honour; or the dict that `create_masks_for_generate` makes.
            position_ids: [B, T]. The model has no positions; restarts in them mark packed sequences.
            past_key_values: cache to continue from: a `KimiLinearCache`, or transformers' own from our config.
            inputs_embeds: [B, T, hidden_size] in place of `input_ids`.
            use_cache: whether to make a cache when none is given.
            keep_last: how many last positions of `last_hidden_state` are needed; a prompt taken in segments (see
                prompt_segments) leaves out the others.
            prompt_progress: called with (tokens done, tokens of the prompt) after each segment of such a prompt.
            cache: another name of `past_key_values`, transformers' own since 5.24.
            kwargs: `cu_seq_lens_q` [N + 1] (with `cu_seq_lens_k`, `max_length_q`, ...) for packed sequences,
                `output_hidden_states`, `output_attentions` (eager attention only), `output_router_logits`.

        Raises:
            ValueError: for token ids outside the vocabulary, a mask or cache that doesn't fit, or bad boundaries.
            TypeError: for a cache under a name that is none of its two.
        """
        past_key_values = one_cache(past_key_values, cache, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if takes_segments(self, tokens, attention_mask, position_ids, past_key_values, kwargs):
            return forward_in_segments(
                self,
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                keep_last=keep_last,
                prompt_progress=prompt_progress,
                **kwargs,
            )
        if inputs_embeds is None:
            check_token_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        check_embeddings(inputs_embeds, self.config.hidden_size)
        batch_size, length = inputs_embeds.shape[:2]
        check_positions(position_ids, batch_size, length)
        cu_seqlens, position_ids = packing_of(
            batch_size, length, attention_mask, position_ids, past_key_values, kwargs.get("cu_seq_lens_q")
        )
        if cu_seqlens is not None:
            use_cache = False  # packed sequences would need a state each
        if use_cache and past_key_values is None:
            past_key_values = KimiLinearCache(self.config)
        if past_key_values is not None:
            check_cache(past_key_values, self.config, batch_size)
            check_cache_dtype(past_key_values, inputs_embeds)
        past_length = self._past_length(past_key_values)
        check_mask(attention_mask, batch_size, length, past_length)
        check_mask_values(attention_mask)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and past_length:
            raise checkpointing_over_cache_error(past_length)
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device)[None] + (past_length or 0)

        if not isinstance(attention_mask, dict):
            attention_mask = make_masks(
                self.config, inputs_embeds, attention_mask, past_key_values, position_ids, packed=cu_seqlens is not None
            )
        padding_mask = attention_mask.get("linear_attention")
        padding = None if padding_mask is None else PaddingLayout.from_mask(padding_mask)

        with _taking_tokens(past_key_values):
            hidden_states = inputs_embeds
            carrying = Carrying(
                hidden_states,
                attention_mask=attention_mask.get("full_attention"),
                padding=padding,
                cu_seqlens=cu_seqlens,
                position_ids=position_ids,
            )
            for layer in islice(self.layers, self.config.num_hidden_layers):  # a slice would register them anew
                hidden_states, options = carrying.beside(layer, hidden_states)
                hidden_states = layer(
                    hidden_states,
                    **options,
                    # By this name GradientCheckpointingLayer finds it and leaves it out; else a replay would write it.
                    **{CACHE_NAME: past_key_values},
                    **kwargs,
                )
            hidden_states = self.norm(hidden_states)
        return MoeModelOutputWithPast(last_hidden_state=hidden_states, **as_argument(past_key_values))

    def _past_length(self, past_key_values: Cache | None) -> int | None:
        """Cached positions, or None where only transformers' linear-attention layers, which don't count, hold them."""
        if past_key_values is None:
            return 0
        if isinstance(past_key_values, KimiLinearCache) or "full_attention" in self.config.layer_types:
            return past_key_values.get_seq_length()
        return None


@reads_weights
class KimiLinearForCausalLM(KimiLinearPreTrainedModel, KimiGenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__(config)
        self.model = KimiLinearModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._decode, self._prompts = DecodePath(), PromptPath()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        prompt_progress: Callable[[int, int], None] | None = None,
        cache: Cache | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As `KimiLinearModel.forward`, and logits.

        Args:
            labels: [B, T] token ids, -100 where no loss is wanted; shifted inside.
            logits_to_keep: compute logits of the last so many positions only (0: of all), or of these indices.
            prompt_progress: called with (tokens done, tokens of the prompt) after each segment of a long prompt; an
                argument of `generate()` too.
            skip_logits: with `labels`, whether to compute the loss without the logits of all tokens, and leave them
                None. None: in training mode with gradients, outside compiled graphs. Where the loss needs them (a loss
                function of your own, an adapter on the head) they are there.

        Returns:
            logits [B, T or logits_to_keep, vocab_size], the loss if `labels` are given, and what else was asked for.
        """
        past_key_values = one_cache(past_key_values, cache, kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if labels is None and inputs_embeds is None:
            logits, held = self._planned_logits(
                input_ids, attention_mask, position_ids, past_key_values, use_cache, kept, prompt_progress, kwargs
            )
            if logits is not None:
                return MoeCausalLMOutputWithPast(logits=logits, **as_argument(held))
        with _taking_tokens(past_key_values):
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                keep_last=logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep > 0 else None,
                prompt_progress=prompt_progress,
                **kwargs,
            )
            if torch.is_tensor(kept):
                kept = kept.to(outputs.last_hidden_state.device)
            hidden, loss, logits = outputs.last_hidden_state[:, kept], None, None
            if labels is not None:
                vocab_size, ignore_index = self.config.vocab_size, kwargs.get("ignore_index", -100)
                check_labels(labels, *hidden.shape[:2], vocab_size, ignore_index=ignore_index)
                if kwargs.get("shift_labels") is not None:
                    check_label_values(kwargs["shift_labels"], vocab_size, ignore_index, name="shift_labels")
                if self._skips_logits() if skip_logits is None else skip_logits:
                    loss = loss_without_logits(self, hidden, labels, **kwargs)
            if loss is None:
                logits = self.lm_head(hidden)
            if loss is None and labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **as_argument(outputs.get(CACHE_NAME)),
        )

    def _skips_logits(self) -> bool:
        return self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    @staticmethod
    def create_masks_for_generate(
        past_key_values: Cache | None = None, cache: Cache | None = None, **kwargs: Any
    ) -> dict[str, torch.Tensor | None]:
        """Masks made ahead of a compiled step, by layer type (called by `generate`)."""
        names = ("config", "inputs_embeds", "attention_mask", "position_ids")
        arguments = {name: kwargs.pop(name, None) for name in names}
        return make_masks(**arguments, past_key_values=one_cache(past_key_values, cache, kwargs))


class KimiLinearForSequenceClassification(GenericForSequenceClassification, KimiLinearPreTrainedModel):
    """The decoder with a linear head over each row's last token that isn't padding."""

    def __init__(self, config: KimiLinearConfig) -> None:
        # The generic class would build its decoder with AutoModel, which for this model_type may be the native one.
        KimiLinearPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = KimiLinearModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """As transformers' generic classifier, arguments as in `KimiLinearModel.forward`.

        Args:
            labels: [B] classes, or what `config.problem_type` asks for.
        """
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **as_argument(one_cache(past_key_values, cache, kwargs)),
            **kwargs,
        )


__all__ = [
    "KimiLinearForCausalLM",
    "KimiLinearForSequenceClassification",
    "KimiLinearModel",
    "KimiLinearPreTrainedModel",
]
