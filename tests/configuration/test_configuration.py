"""The configuration: released fields in and out, names that tools look for, and contradictions refused by name."""

import copy
import json
import pickle
import re
from typing import Any

import pytest
import torch
import transformers
from tiny_checkpoints import RELEASED_CONFIG, tiny_config
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

# What transformers writes about itself, and a null that it leaves out.
NOT_KEPT = {"transformers_version", "rope_scaling"}
# Fields without a default of ours: who made the file, and what the weights are.
NOT_ARCHITECTURE = {"architectures", "auto_map", "dtype", "transformers_version", "rope_scaling", "model_type"}


def linear_attn(**changes: Any) -> dict[str, Any]:
    """The released linear_attn_config cut to four layers, with changes."""
    lists = {"kda_layers": [1, 2, 3], "full_attn_layers": [4]}
    return {"linear_attn_config": {**lists, "head_dim": 16, "num_heads": 4, "short_conv_kernel_size": 4, **changes}}


def tiny(**changes: Any) -> KimiLinearConfig:
    return KimiLinearConfig(**tiny_config(**changes))


# Released fields


@pytest.fixture
def released(tmp_path) -> tuple[KimiLinearConfig, dict[str, Any]]:
    """The released config.json read from a folder, and what `save_pretrained` makes of it."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_CONFIG))
    config = KimiLinearConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "saved")
    return config, json.loads((tmp_path / "saved" / "config.json").read_text())


def test_the_released_file_is_written_back_as_it_was_read(released):
    _, written = released
    assert {k: v for k, v in written.items() if k not in NOT_KEPT} == {
        k: v for k, v in RELEASED_CONFIG.items() if k not in NOT_KEPT
    }
    assert written.get("rope_scaling") is None


def test_a_second_round_trip_changes_nothing(released, tmp_path):
    _, written = released
    KimiLinearConfig.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == written


@pytest.mark.parametrize("field", sorted(set(RELEASED_CONFIG) - NOT_ARCHITECTURE))
def test_the_default_is_the_released_value(field):
    assert getattr(KimiLinearConfig(), field) == RELEASED_CONFIG[field]


@pytest.mark.parametrize(
    "field, value",
    [
        ("kda_backend", "torch"),
        ("router_weight_uses_score_correction_bias", True),
        ("output_router_logits", True),
    ],
)
def test_our_own_switches_are_written_only_when_set(field, value, tmp_path):
    assert field not in KimiLinearConfig().to_dict()
    KimiLinearConfig(**{field: value}).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())[field] == value
    assert getattr(KimiLinearConfig.from_pretrained(tmp_path), field) == value


# What vLLM's and the makers' code read from the file; SGLang shares the makers' names.
@pytest.mark.parametrize("field", ["num_experts_per_token", "num_shared_experts", "moe_renormalize", "mla_use_nope"])
def test_names_that_serving_engines_read_stay_in_the_file(released, field):
    assert field in released[1]


@pytest.mark.parametrize("field", ["layer_types", "mlp_layer_types", "num_experts_per_tok", "max_position_embeddings"])
def test_names_that_only_transformers_uses_stay_out_of_the_file(released, field):
    assert field not in released[1]


# Names that tools look for


@pytest.mark.parametrize(
    "alias, value",
    [
        ("num_experts_per_tok", 8),
        ("max_position_embeddings", 1048576),
        ("head_dim", 72),
        ("num_local_experts", 256),
        ("n_routed_experts", 256),
        ("n_shared_experts", 1),
        ("n_group", 1),
        ("norm_topk_prob", True),
        ("qk_head_dim", 192),
        ("linear_head_dim", 128),
        ("linear_num_heads", 32),
        ("linear_conv_kernel_dim", 4),
    ],
)
def test_aliases_answer_with_the_released_value(alias, value):
    assert getattr(KimiLinearConfig(**RELEASED_CONFIG), alias) == value


@pytest.mark.parametrize(
    "alias, field, value",
    [
        ("num_experts_per_tok", "num_experts_per_token", 4),
        ("max_position_embeddings", "model_max_length", 100),
        ("num_local_experts", "num_experts", 16),
    ],
)
def test_aliases_can_be_given_and_set(alias, field, value):
    config = KimiLinearConfig(**{alias: value})
    assert getattr(config, field) == value
    setattr(config, alias, value + 1)
    assert getattr(config, field) == value + 1


def test_layer_numbers_turn_zero_based():
    config = KimiLinearConfig(**RELEASED_CONFIG)
    full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert full == [3, 7, 11, 15, 19, 23, 26]
    assert config.layer_types.count("linear_attention") == 20
    assert config.mlp_layer_types == ["dense"] + ["sparse"] * 26


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"first_k_dense_replace": 0}, ["sparse"] * 4),
        ({"first_k_dense_replace": 3}, ["dense"] * 3 + ["sparse"]),
        ({"first_k_dense_replace": 0, "moe_layer_freq": 2}, ["sparse", "dense"] * 2),
        ({"num_experts": 0}, ["dense"] * 4),
        ({"num_experts": None}, ["dense"] * 4),
    ],
)
def test_mlp_layer_types_follow_the_released_fields(changes, expected):
    assert tiny(**changes).mlp_layer_types == expected


@pytest.mark.parametrize("layers, full", [(4, [4]), (5, [4, 5]), (1, [1]), (9, [4, 8, 9])])
def test_the_default_pattern_is_every_fourth_layer_and_the_last(layers, full):
    config = KimiLinearConfig(num_hidden_layers=layers)
    assert config.linear_attn_config["full_attn_layers"] == full
    assert config.linear_attn_config["kda_layers"] == [i for i in range(1, layers + 1) if i not in full]


@pytest.mark.parametrize("given, other", [("kda_layers", "full_attn_layers"), ("full_attn_layers", "kda_layers")])
def test_one_list_implies_the_other(given, other):
    config = KimiLinearConfig(num_hidden_layers=4, linear_attn_config={given: [1, 3]})
    assert config.linear_attn_config[other] == [2, 4]


def test_native_style_layer_types_fill_the_lists():
    layer_types = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    config = KimiLinearConfig(num_hidden_layers=4, layer_types=layer_types)
    assert config.linear_attn_config["kda_layers"] == [1, 3]
    assert config.linear_attn_config["full_attn_layers"] == [2, 4]
    assert config.layer_types == layer_types
    # Both forms at once are fine if they agree.
    assert tiny(layer_types=["linear_attention"] * 2 + ["full_attention"] * 2).layer_types[2] == "full_attention"


@pytest.fixture(scope="module")
def tiny_model() -> KimiLinearForCausalLM:
    with torch.device("meta"):
        return KimiLinearForCausalLM(tiny())


@pytest.mark.parametrize(
    "plan, pattern, style",
    [
        (name, pattern, style)
        for name in ("base_model_tp_plan", "base_model_ep_plan")
        for pattern, style in getattr(KimiLinearConfig, name).items()
    ],
)
def test_every_parallel_plan_entry_names_something_in_the_model(tiny_model, plan, pattern, style):
    names = [name for name, _ in tiny_model.model.named_modules()]
    names += [name for name, _ in tiny_model.model.named_parameters()]
    matcher = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    assert any(matcher.fullmatch(name) for name in names), f"{plan} names {pattern}, which the model lacks"
    if style == "ep_dispatch_experts" and style not in ALL_PARALLEL_STYLES:
        pytest.skip(f"transformers {transformers.__version__} lacks the expert-parallel style of newer versions")
    assert style in ALL_PARALLEL_STYLES


def test_pipeline_plan_covers_the_decoder_in_order(tiny_model):
    modules = [name for name, _ in tiny_model.model.named_children()]
    assert list(KimiLinearConfig.base_model_pp_plan) == modules
    for name in (*tiny_model._tp_plan, *tiny_model._pp_plan):
        if "*" not in name:
            assert tiny_model.get_submodule(name) is not None


# Contradictions: the message must name the field, the value and the rule.
CONTRADICTIONS = {
    "layer in both lists": (linear_attn(kda_layers=[1, 2, 3, 4]), ["[4]", "both", "exactly one"]),
    "layer in none": (linear_attn(kda_layers=[1, 3]), ["[2]", "neither", "exactly one"]),
    "layer 0": (linear_attn(kda_layers=[0, 1, 2, 3]), ["kda_layers", "0", "1-based"]),
    "layer beyond the last": (linear_attn(full_attn_layers=[4, 5]), ["full_attn_layers", "5", "num_hidden_layers=4"]),
    "layer twice": (linear_attn(kda_layers=[1, 2, 2, 3]), ["kda_layers", "[2]", "more than once"]),
    "layer is a string": (linear_attn(kda_layers=["1", 2, 3]), ["kda_layers", "'1'", "1-based"]),
    "lists are null": (linear_attn(kda_layers=None), ["kda_layers", "None", "list"]),
    "not a dictionary": ({"linear_attn_config": [1, 2]}, ["linear_attn_config", "[1, 2]", "dictionary"]),
    "KDA head size": (linear_attn(head_dim=0), ["head_dim", "=0", "positive integer"]),
    "KDA heads": (linear_attn(num_heads=-1), ["num_heads", "=-1", "positive integer"]),
    "convolution taps": (linear_attn(short_conv_kernel_size=None), ["short_conv_kernel_size", "None", "positive"]),
    "top-k above experts": ({"num_experts_per_token": 9}, ["num_experts_per_token=9", "num_experts=8"]),
    "top-k 0": ({"num_experts_per_token": 0}, ["num_experts_per_token=0", "positive"]),
    "top-k null": ({"num_experts_per_token": None}, ["num_experts_per_token=None", "positive"]),
    "negative experts": ({"num_experts": -4}, ["num_experts=-4", "positive"]),
    "groups don't divide": ({"num_expert_group": 3}, ["num_expert_group=3", "divide", "num_experts=8"]),
    "groups of one expert": ({"num_expert_group": 8, "topk_group": 3}, ["num_expert_group=8", "at least 2"]),
    "top groups above groups": (
        {"num_expert_group": 2, "topk_group": 3},
        ["topk_group=3", "num_expert_group=2"],
    ),
    "top groups 0": ({"topk_group": 0}, ["topk_group=0", "positive"]),
    "top-k above the groups' reach": (
        {"num_expert_group": 4, "topk_group": 1},
        ["num_experts_per_token=3", "2 experts", "topk_group=1", "num_expert_group=4"],
    ),
    "shared experts": ({"num_shared_experts": -1}, ["num_shared_experts=-1", "zero or more"]),
    "expert width": ({"moe_intermediate_size": 0}, ["moe_intermediate_size=0", "positive"]),
    "dense layers": ({"first_k_dense_replace": -1}, ["first_k_dense_replace=-1", "zero or more"]),
    "MoE frequency": ({"moe_layer_freq": 0}, ["moe_layer_freq=0", "positive"]),
    "router activation": (
        {"moe_router_activation_func": "softmax"},
        ["moe_router_activation_func='softmax'", "sigmoid"],
    ),
    "head_dim": ({"head_dim": 17}, ["head_dim=17", "hidden_size // num_attention_heads = 16"]),
    "latent width": ({"kv_lora_rank": 0}, ["kv_lora_rank=0", "positive"]),
    "MLA head size": ({"qk_nope_head_dim": 0}, ["qk_nope_head_dim=0", "positive"]),
    "value head size": ({"v_head_dim": 16.0}, ["v_head_dim=16.0", "positive integer"]),
    "no vocabulary": ({"vocab_size": 0}, ["vocab_size=0", "positive"]),
    "KV heads": ({"num_key_value_heads": 1}, ["num_key_value_heads=1", "num_attention_heads=4"]),
    "norm epsilon": ({"rms_norm_eps": 0.0}, ["rms_norm_eps=0.0", "positive"]),
    "rotary MLA": ({"mla_use_nope": False}, ["mla_use_nope=False", "true"]),
    "rope scaling": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["rope_scaling", "null"]),
    "MTP layers": ({"num_nextn_predict_layers": 1}, ["num_nextn_predict_layers=1", "0"]),
    "K3 gate bound": ({"gate_lower_bound": -5.0}, ["gate_lower_bound=-5.0", "Kimi K3"]),
    "K3 full-rank gate": ({"use_full_rank_gate": True}, ["use_full_rank_gate=True", "Kimi K3"]),
    "K3 output gate": ({"mla_use_output_gate": True}, ["mla_use_output_gate=True", "Kimi K3"]),
    "K3 residuals": ({"attn_res_block_size": 4}, ["attn_res_block_size=4", "Kimi K3"]),
    "K3 query compression": ({"q_lora_rank": 16}, ["q_lora_rank=16", "Kimi K3"]),
    "K3 activation": ({"hidden_act": "situ"}, ["hidden_act='situ'", "silu"]),
    "backend": ({"kda_backend": "cuda"}, ["kda_backend='cuda'", "auto, triton, fla, torch"]),
    "padding beyond the vocabulary": ({"pad_token_id": 128}, ["pad_token_id=128", "vocab_size=128"]),
    "negative padding": ({"pad_token_id": -1}, ["pad_token_id=-1", "vocab_size=128"]),
    "layer_types against the lists": (
        {"layer_types": ["full_attention"] * 4},
        ["layer_types", "full_attention", "linear_attn_config"],
    ),
    "layer_types of unknown kind": (
        {"linear_attn_config": None, "layer_types": ["mamba"] * 4},
        ["neither", "[1, 2, 3, 4]"],
    ),
    "mlp_layer_types against the fields": (
        {"mlp_layer_types": ["dense"] * 4},
        ["mlp_layer_types", "first_k_dense_replace"],
    ),
}


@pytest.mark.parametrize("changes, parts", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_are_refused_with_field_value_and_rule(changes, parts):
    with pytest.raises(ValueError) as error:
        tiny(**changes)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"gate_lower_bound": None},
        {"use_full_rank_gate": False},
        {"pad_token_id": None},
        {"pad_token_id": 0},
        {"num_shared_experts": 0},
        {"num_expert_group": 4, "topk_group": 2},
        {"head_dim": 8},  # qk_rope_head_dim, which transformers' native class writes there
        {"num_experts": 0, "num_experts_per_token": 100},  # no experts, nothing to contradict
    ],
    ids=str,
)
def test_values_at_the_edge_of_the_rules_are_accepted(changes):
    tiny(**changes)


def test_a_contradiction_in_the_file_is_refused_on_loading(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(topk_group=2)))
    with pytest.raises(ValueError, match="topk_group=2"):
        KimiLinearConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_experts_per_token", 9, "num_experts_per_token=9"),
        ("num_hidden_layers", 5, r"layers \[5\] stand in neither"),
        ("num_hidden_layers", 3, "holds 4"),
        ("kda_backend", "cuda", "kda_backend='cuda'"),
        ("mla_use_nope", False, "mla_use_nope=False"),
        ("pad_token_id", 500, "pad_token_id=500"),
    ],
)
def test_fields_changed_after_construction_are_caught_when_a_model_is_built(field, value, message):
    config = tiny()
    setattr(config, field, value)
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        KimiLinearForCausalLM(config)


def test_the_released_padding_may_be_set_after_a_smaller_vocabulary():
    """Who leaves `pad_token_id` out has the released one, and can mend it before a model is built."""
    config = tiny(vocab_size=128)
    fields = {name: value for name, value in config.to_dict().items() if name != "pad_token_id"}
    config = KimiLinearConfig(**fields)
    assert config.pad_token_id == 163839
    with torch.device("meta"):
        with pytest.raises(ValueError, match=r"pad_token_id=163839.*vocab_size=128"):
            KimiLinearForCausalLM(config)
        config.pad_token_id = 0
        KimiLinearForCausalLM(config)


def test_lists_changed_in_place_are_caught_when_a_model_is_built():
    config = tiny()
    config.linear_attn_config["kda_layers"].append(4)
    with torch.device("meta"), pytest.raises(ValueError, match=r"layers \[4\] stand in both"):
        KimiLinearForCausalLM(config)


# Copies


def through_pickle(config: KimiLinearConfig) -> KimiLinearConfig:
    return pickle.loads(pickle.dumps(config))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_copies_equal_the_original_and_are_independent(duplicate):
    config = tiny(kda_backend="torch", routed_scaling_factor=1.5)
    other = duplicate(config)
    assert type(other) is KimiLinearConfig
    assert other.to_dict() == config.to_dict()
    assert other.kda_backend == "torch"
    other.linear_attn_config["kda_layers"].clear()
    other.num_experts = 4
    assert config.linear_attn_config["kda_layers"] == [1, 2]
    assert config.num_experts == 8


def test_the_caller_s_dictionary_is_left_alone():
    given = {"head_dim": 16}
    KimiLinearConfig(num_hidden_layers=4, linear_attn_config=given)
    assert given == {"head_dim": 16}


def test_two_default_configs_share_nothing():
    one, two = KimiLinearConfig(), KimiLinearConfig()
    one.linear_attn_config["kda_layers"].append(99)
    assert 99 not in two.linear_attn_config["kda_layers"]


def test_from_dict_accepts_what_to_dict_gives():
    config = KimiLinearConfig(**RELEASED_CONFIG)
    assert KimiLinearConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


# config.json of transformers' native class


NATIVE = {
    "defaults": {},
    "other sizes": {
        "num_hidden_layers": 6,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "linear_conv_kernel_dim": 3,
        "mlp_layer_types": ["dense", "dense"] + ["sparse"] * 4,
        "num_local_experts": 8,
        "n_group": 2,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "max_position_embeddings": 77,
    },
    "layer lists": {"num_hidden_layers": 4, "layer_types": ["full_attention", "linear_attention"] * 2},
    "dense": {"num_hidden_layers": 4, "mlp_layer_types": ["dense"] * 4},
    "sparse": {"num_hidden_layers": 4, "mlp_layer_types": ["sparse"] * 4},
    "released": {name: value for name, value in RELEASED_CONFIG.items() if name not in ("auto_map", "architectures")},
}


@pytest.mark.parametrize("name", NATIVE)
def test_what_the_native_class_writes_is_read(native_class, tmp_path, name):
    written = native_class.config_class(**NATIVE[name])
    written.save_pretrained(tmp_path)
    ours = KimiLinearConfig.from_pretrained(tmp_path)
    for field, value in json.loads((tmp_path / "config.json").read_text()).items():
        if field not in ("head_dim", "transformers_version", "model_type", "dtype"):
            assert getattr(ours, field) == value, field
    again = KimiLinearConfig.from_dict(ours.to_dict())
    assert again.layer_types == written.layer_types and again.mlp_layer_types == written.mlp_layer_types


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"qk_head_dim": 100}, "qk_head_dim=100 contradicts.*192"),
        ({"linear_head_dim": 64, "linear_attn_config": {"head_dim": 32}}, "linear_head_dim=64 contradicts.*=32"),
        ({"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types=.*contradicts"),
    ],
)
def test_options_of_the_native_class_that_this_model_lacks_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        KimiLinearConfig(**fields)
