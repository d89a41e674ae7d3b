"""The cache argument under both of its names, arguments that nobody knows, and the range of transformers."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from tiny_checkpoints import TINY_CONFIGS
from transformers import DynamicCache, StaticCache
from transformers.modeling_outputs import MoeModelOutputWithPast

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling import transformers_versions
from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM, KimiLinearForSequenceClassification
from kimi_linear.modeling.transformers_versions import CACHE_NAME, NEWEST, OLDEST

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = tuple(int(part) for part in transformers.__version__.split(".")[:2])
NAMES = ["past_key_values", "cache"]
FORWARDS = ["decoder", "language model", "classifier"]


@pytest.fixture
def forward(model, load_tiny):
    """The public forward of a name in FORWARDS, without gradients."""

    def of(name: str):
        if name == "classifier":
            torch.manual_seed(0)
            found = load_tiny("hybrid", model_class=KimiLinearForSequenceClassification)
        else:
            found = model.model if name == "decoder" else model
        return torch.no_grad()(found)

    return of


def answer(outputs) -> torch.Tensor:
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", FORWARDS)
def test_a_forward_continues_from_the_cache_under_either_name(forward, model, random_ids, which, name):
    call, ids = forward(which), random_ids(1, 9)
    whole, cache = answer(call(ids)), KimiLinearCache(model.config)
    first = call(ids[:, :5], **{name: cache}, use_cache=True)
    assert first[CACHE_NAME] is cache and first.past_key_values is cache and cache.get_seq_length() == 5
    rest = answer(call(ids[:, 5:], **{name: cache}))
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(rest[:, -1] if rest.ndim == 3 else rest, whole[:, -1] if whole.ndim == 3 else whole)


@pytest.mark.parametrize("name", NAMES)
def test_generate_continues_from_the_cache_under_either_name(model, random_ids, name):
    ids, cache = random_ids(1, 9), KimiLinearCache(model.config)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.generate(ids[:, :5], max_new_tokens=1, **{name: cache})
    assert cache.get_seq_length() == 5
    output = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, **{name: cache})
    assert torch.equal(output.sequences, expected) and cache.get_seq_length() == 16
    assert output[CACHE_NAME] is cache and output.past_key_values is cache


@pytest.mark.parametrize("name", NAMES)
def test_masks_and_inputs_of_a_step_take_either_name(model, random_ids, name):
    ids, cache = random_ids(1, 6), KimiLinearCache(model.config)
    model(ids[:, :5], **{name: cache})
    assert model.prepare_inputs_for_generation(ids, **{name: cache})[CACHE_NAME] is cache
    embeds = model.model.embed_tokens(ids[:, 5:])
    mask = torch.tensor([[0, 1, 0, 1, 1, 1]])
    masks = model.create_masks_for_generate(
        config=model.config, inputs_embeds=embeds, attention_mask=mask, **{name: cache}
    )
    assert masks["full_attention"].shape[-1] == 6  # only the cache knows of the first five


@pytest.mark.parametrize("which", [*FORWARDS, "generate"])
def test_two_different_caches_are_refused(forward, model, random_ids, which):
    call = model.generate if which == "generate" else forward(which)
    caches = {name: KimiLinearCache(model.config) for name in NAMES}
    with pytest.raises(ValueError, match="two names of one argument"):
        call(random_ids(1, 3), **caches)
    call(random_ids(1, 3), past_key_values=caches["cache"], cache=caches["cache"])
    assert caches["cache"].get_seq_length() >= 3


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: [c], lambda c: (None, c), lambda c: {"held": [c]}])
@pytest.mark.parametrize("which", [*FORWARDS, "generate"])
def test_a_cache_under_another_name_is_refused(forward, model, random_ids, which, wrap):
    call = model.generate if which == "generate" else forward(which)
    for cache in (KimiLinearCache(model.config), DynamicCache(config=model.config)):
        with pytest.raises(TypeError, match="cache_params holds a cache"):
            call(random_ids(1, 3), cache_params=wrap(cache))


@pytest.mark.skipif(INSTALLED < (5, 24), reason="static caches can be cropped from transformers 5.24 on")
def test_a_static_cache_of_mla_layers_takes_drafts_back(shared_tiny, random_ids):
    model, ids = shared_tiny("all_mla"), random_ids(1, 6).repeat(1, 4)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False}
    cache = StaticCache(config=model.config, max_cache_len=64)
    drafted = model.generate(ids, cache=cache, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(drafted, model.generate(ids, **options))


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_layers_leave_the_cache_alone(load_tiny, random_ids, name):
    # A layer is run again on the way back, and would append its tokens a second time.
    model, ids = load_tiny("hybrid").train(), random_ids(1, 5)
    model.gradient_checkpointing_enable()
    cache = KimiLinearCache(model.config)
    model(ids, labels=ids, **{name: cache}).loss.backward()
    assert [layer.get_seq_length() for layer in cache.layers] == [0] * 4


def test_what_trainers_pass_beside_is_let_through(model, random_ids):
    ids = random_ids(2, 5)
    extra = {"num_items_in_batch": torch.tensor(8), "token_weights": torch.ones(2, 5), "tags": ["a", {"b": [1]}]}
    assert torch.equal(model(ids, **extra).logits, model(ids).logits)


def test_hooks_leave_the_cache_where_it_is_under_both_names():
    assert {"past_key_values", "cache"} <= set(KimiLinearForCausalLM._skip_keys_device_placement)
    assert {"past_key_values", "cache"} <= set(KimiLinearConfig.keys_to_ignore_at_inference)


def test_the_name_is_that_of_the_installed_version():
    assert (CACHE_NAME == "cache") is (INSTALLED >= (5, 24))
    assert CACHE_NAME in MoeModelOutputWithPast.__dataclass_fields__


# The range


@pytest.fixture
def warnings_of_a_model(monkeypatch):
    """Build a model under another version number; the warnings that come."""

    def of(version: str) -> list[str]:
        messages: list[str] = []
        transformers_versions.logger.warning_once.cache_clear()
        monkeypatch.setattr(transformers, "__version__", version)
        monkeypatch.setattr(transformers_versions.logger, "warning", lambda message, *_, **__: messages.append(message))
        for _ in range(2):
            KimiLinearForCausalLM(KimiLinearConfig.from_dict(TINY_CONFIGS["hybrid"]))
        return messages

    yield of
    transformers_versions.logger.warning_once.cache_clear()


@pytest.mark.parametrize("version", ["5.9.4", "5.25.0", "5.25.0.dev0", "6.0.0rc1", "4.57.1"])
def test_a_version_outside_the_range_gives_one_warning(warnings_of_a_model, version):
    (message,) = warnings_of_a_model(version)
    assert "5.10 to 5.24" in message and version in message


@pytest.mark.parametrize("version", ["5.10.0", "5.10.1", "5.17.0", "5.24.0", "5.24.3", transformers.__version__])
def test_a_version_inside_gives_none(warnings_of_a_model, version):
    assert warnings_of_a_model(version) == []


def test_the_range_is_the_same_everywhere():
    (old, new), dots = (OLDEST, NEWEST), "{}.{}".format
    below = dots(new[0], new[1] + 1)
    assert f'"transformers>={dots(*old)},<{below}"' in (ROOT / "pyproject.toml").read_text()
    lanes = dict(re.findall(r'"(newest|oldest)": "(\d+\.\d+)\.\d+"', (ROOT / "tasks.py").read_text()))
    assert lanes == {"oldest": dots(*old), "newest": dots(*new)}
    assert f"transformers {dots(*old)} to {dots(*new)}" in (ROOT / "README.md").read_text()


# What we override and call. A renamed argument is a red test here, and not wrong tokens.

GENERATION = transformers.generation.GenerationMixin
cache_utils, conversion_mapping, core_model_loading, masking_utils, modeling_layers = (
    importlib.import_module(f"transformers.{name}")
    for name in ("cache_utils", "conversion_mapping", "core_model_loading", "masking_utils", "modeling_layers")
)
# owner, name, arguments that our code gives or reads by name ("*": it passes everything on)
SEAMS = [
    (GENERATION, "generate", "inputs"),
    (GENERATION, "prepare_inputs_for_generation", f"input_ids next_sequence_length {CACHE_NAME} attention_mask"),
    (GENERATION, "prepare_inputs_for_generation", "inputs_embeds is_first_iteration"),
    (GENERATION, "_prepare_model_inputs", "inputs"),
    (GENERATION, "_get_candidate_generator", "generation_config"),
    (GENERATION, "_assisted_decoding", "input_ids"),
    (GENERATION, "_prepare_cache_for_generation", "generation_config model_kwargs generation_mode"),
    (GENERATION, "_sample", "input_ids logits_processor stopping_criteria generation_config synced_gpus streamer"),
    (GENERATION, "_prefill", "input_ids generation_config model_kwargs"),
    (GENERATION, "init_continuous_batching", ""),
    (transformers.PreTrainedModel, "_load_pretrained_model", "model state_dict checkpoint_files load_config"),
    (transformers.PreTrainedModel, "save_pretrained", "save_directory is_main_process state_dict"),
    (transformers.PreTrainedModel, "is_remote_code", ""),
    (torch.nn.Module, "_apply", "fn recurse"),
    (transformers.PreTrainedModel, "_init_weights", "module"),
    (torch.nn.Module, "_apply", "fn recurse"),
    (transformers.PreTrainedModel, "_can_set_experts_implementation", ""),
    (modeling_layers.GenericForSequenceClassification, "forward", f"input_ids {CACHE_NAME} labels"),
    (transformers.generation.PromptLookupCandidateGenerator, "get_candidates", "input_ids"),
    (cache_utils.Cache, "__init__", "layers"),
    (cache_utils.Cache, "crop", ""),
    (cache_utils.Cache, "get_seq_length", "layer_idx"),
    (cache_utils.Cache, "get_mask_sizes", "layer_idx"),
    (cache_utils.Cache, "has_previous_state", "layer_idx"),
    (cache_utils.Cache, "update", "layer_idx"),
    (cache_utils.Cache, "update_conv_state", "conv_states layer_idx"),
    (cache_utils.Cache, "update_recurrent_state", "recurrent_states layer_idx"),
    (cache_utils.Cache, "reorder_cache", "beam_idx"),
    (cache_utils.Cache, "batch_select_indices", "indices"),
    (cache_utils.Cache, "reset", ""),
    (masking_utils, "create_causal_mask", f"config inputs_embeds attention_mask {CACHE_NAME}"),
    (masking_utils, "create_causal_mask", "position_ids"),
    (conversion_mapping, "get_checkpoint_conversion_mapping", "model_type"),
    (core_model_loading, "WeightConverter", "source_patterns target_patterns operations"),
    (core_model_loading, "WeightRenaming", "source_patterns target_patterns"),
    (core_model_loading.WeightRenaming, "rename_source_key", "source_key"),
    (core_model_loading.ConversionOps, "convert", "input_dict source_patterns target_patterns"),
    (transformers.PreTrainedModel, "_get_dtype_plan", "dtype"),
]
# Private attributes of classes that are set by ours: one that transformers no longer knows would do nothing.
ATTRIBUTES = [
    "_no_split_modules", "_skip_keys_device_placement", "_keep_in_fp32_modules_strict", "_supports_sdpa",
    "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend", "_can_compile_fullgraph",
    "_is_stateful", "_can_record_outputs", "_weight_conversions", "_tied_weights_keys", "_tp_plan", "_pp_plan",
]  # fmt: skip
if OLDEST < INSTALLED:
    ATTRIBUTES.append("_fsdp_plan")  # 5.10 knows none


def seam_names(owner, name: str) -> list[str]:
    return list(inspect.signature(getattr(owner, name)).parameters)


@pytest.mark.parametrize("owner, name, arguments", SEAMS, ids=[f"{o.__name__}.{n}" for o, n, _ in SEAMS])
def test_what_we_override_and_call_has_the_arguments_that_we_know(owner, name, arguments):
    found = seam_names(owner, name)
    assert set(arguments.split()) <= set(found)


@pytest.mark.parametrize("name", ["_sample", "prepare_inputs_for_generation", "_prepare_cache_for_generation"])
def test_overrides_have_the_positions_of_what_they_override(name):
    theirs = seam_names(GENERATION, name)
    ours = [CACHE_NAME if part in NAMES else part for part in seam_names(KimiLinearForCausalLM, name)]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = inspect.signature(getattr(KimiLinearForCausalLM, name)).parameters.values()
    fixed = [part for part, p in zip(ours, known) if p.kind not in kinds]
    fixed = list(dict.fromkeys(fixed))
    assert fixed == theirs[: len(fixed)]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_transformers_still_reads_the_attributes_that_we_set(name):
    folder = Path(transformers.__file__).parent
    files = [*folder.glob("*.py"), *folder.glob("generation/*.py"), *folder.glob("utils/*.py")]
    files += [*folder.glob("integrations/*.py"), *folder.glob("distributed/*.py")]
    assert any(re.search(rf"\b{name}\b", path.read_text(encoding="utf-8")) for path in files)


def test_the_lists_hold_everything_private_that_we_override():
    listed = {name for _, name, _ in SEAMS} | set(ATTRIBUTES)
    overridden = {
        name
        for kind in (*KimiLinearForCausalLM.__mro__, *KimiLinearForSequenceClassification.__mro__)
        if kind.__module__.startswith("kimi_linear.")
        for name in vars(kind)
        if re.match("_[a-z]", name) and any(hasattr(base, name) for base in (transformers.PreTrainedModel, GENERATION))
    }
    assert {"_sample", "_load_pretrained_model", "_skip_keys_device_placement"} <= overridden <= listed | {"_fsdp_plan"}
