"""Quantised checkpoints: packed in memory, right against their dequantised weights in float64, saved bit for bit."""

import json
import re
import types

import pytest
import torch
import transformers
from float64_model import Float64Model
from packed_weights import (
    COMPRESSED,
    EXPERTS,
    IGNORED,
    LAYOUTS,
    QUANTISED_CONFIG,
    config_of,
    format_of,
    quantised_tensors,
    random_weight,
    write_quantised,
)
from safetensors.torch import load_file
from tiny_checkpoints import released_tensors, tiny_config

from kimi_linear.kernels.weights.handle import WeightHandle
from kimi_linear.modeling.checkpoint.packed_loading import prepare_packed
from kimi_linear.modeling.checkpoint.packed_modules import KimiPackedExperts, KimiPackedLinear
from kimi_linear.modeling.checkpoint.schemes import compressed_format
from kimi_linear.modeling.decode import path as decode_path
from kimi_linear.modeling.modeling_kimi_linear import (
    KimiLinearForCausalLM,
    KimiLinearForSequenceClassification,
    KimiLinearModel,
)

pytest.importorskip("compressed_tensors", reason="its files are read by transformers with it (in the dev extra)")

# As in the other tests of fp32 logits: of order 1 to 10, each after some 1e3 roundings of 6e-8.
BOUND = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture
def folder_of(tmp_path):
    """Folder of a tiny quantised checkpoint: `folder_of("w4a16 g32")`; a function may change its tensors first."""

    def make(layout: str = "w4a16 g32", change=None, **fields):
        stored, _ = quantised_tensors(layout)
        if change is not None:
            change(stored)
        write_quantised(tmp_path / "quantised", layout, stored, **fields)
        return tmp_path / "quantised"

    return make


def load(folder, model_class=KimiLinearForCausalLM, **options):
    return model_class.from_pretrained(folder, **options).eval()


def held_bytes(model) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(x.numel() * x.element_size() for x in tensors)


def assert_same_files(folder, again) -> None:
    before, after = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert (after[name].dtype, after[name].shape) == (x.dtype, x.shape), name
        assert after[name].contiguous().view(-1).view(torch.uint8).equal(x.contiguous().view(-1).view(torch.uint8)), (
            name
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_layout_is_right_stays_packed_and_is_saved_bit_for_bit(layout, tmp_path, random_ids):
    stored, dense = quantised_tensors(layout)
    write_quantised(tmp_path / "file", layout, stored)
    model, ids = load(tmp_path / "file"), random_ids(2, 9)
    logits = model(ids).logits
    torch.testing.assert_close(logits, Float64Model(QUANTISED_CONFIG, dense)(ids).float().detach(), **BOUND)
    # Twice, because compressed-tensors would unpack its layers at the first forward.
    assert torch.equal(model(ids).logits, logits)
    assert held_bytes(model) == sum(x.numel() * x.element_size() for x in stored.values())
    assert isinstance(model.model.layers[0].self_attn.q_proj, KimiPackedLinear)
    assert isinstance(model.model.layers[1].block_sparse_moe.experts, KimiPackedExperts)
    model.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "file", tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(ids).logits, logits)


@torch.no_grad()
def test_tokens_over_a_cache_give_the_logits_of_the_whole(folder_of, random_ids):
    model, ids = load(folder_of()), random_ids(2, 9)
    cache = model(ids[:, :-1]).past_key_values
    step = model(ids[:, -1:], past_key_values=cache).logits[:, 0]
    torch.testing.assert_close(step, model(ids).logits[:, -1], **BOUND)


def test_bf16_model_keeps_the_file_s_scales(folder_of, tmp_path):
    model = load(folder_of(), dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight_scale.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(x / "model.safetensors") for x in (folder_of(), tmp_path / "again"))
    assert all(torch.equal(after[name], x) for name, x in before.items() if ".weight_" in name)


def test_fp32_scales_in_a_bf16_model_are_kept(tmp_path):
    stored, _ = quantised_tensors("fp8 channel", torch.float32)
    write_quantised(tmp_path / "file", "fp8 channel", stored, dtype="bfloat16")
    model = load(tmp_path / "file", dtype=torch.bfloat16)
    for dtype in (torch.float16, torch.bfloat16):
        model = model.to(dtype)  # casting leaves packed weights as they are
        experts = model.model.layers[1].block_sparse_moe.experts
        assert experts.gate_up_proj_packed.dtype == torch.float8_e4m3fn
        assert torch.equal(experts.down_proj_scale[3, :64], stored[f"{EXPERTS}.3.w2.weight_scale"])


# ---- what is wrong in a file


def nan_scale(stored):
    stored[f"{EXPERTS}.2.w3.weight_scale"][5, 0] = torch.nan


def infinite_scale(stored):
    stored["model.layers.0.self_attn.q_proj.weight_scale"][0, 0] = torch.inf


def wrong_group_size(stored):
    for name in [name for name in stored if name.endswith("w2.weight_scale")]:
        stored[name] = stored[name].repeat_interleave(2, dim=1)  # as of groups of 16


def wrong_dtype(stored):
    stored[f"{EXPERTS}.1.w1.weight_packed"] = stored[f"{EXPERTS}.1.w1.weight_packed"].view(torch.uint8)


def wrong_shape_entry(stored):
    stored[f"{EXPERTS}.1.w2.weight_shape"] = torch.tensor([64, 48])


def missing_scale(stored):
    del stored["model.layers.0.self_attn.k_proj.weight_scale"]


def missing_expert(stored):
    del stored[f"{EXPERTS}.3.w1.weight_packed"]


def plain_weight(stored):
    for part in ("packed", "scale", "shape"):
        del stored[f"model.layers.0.self_attn.k_proj.weight_{part}"]
    stored["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(64, 64)


def quantised_router(stored):
    stored["model.layers.1.block_sparse_moe.gate.weight_packed"] = torch.zeros(4, 8, dtype=torch.int32)


WRONG = {
    nan_scale: r"experts\.2\.w3\.weight_scale is damaged: .*NaN or infinite",
    infinite_scale: r"layers\.0\.self_attn\.q_proj\.weight_scale is damaged: .*NaN or infinite",
    wrong_group_size: r"experts\.0\.w2\.weight_scale is \[64, 4\] .* groups of 32 needs \[64, 2\]",
    wrong_dtype: r"experts\.1\.w1\.weight_packed is \[40, 32\] of uint8.* needs \[40, 8\] of int32",
    wrong_shape_entry: r"experts\.1\.w2\.weight_shape says \[64, 48\], but .* is \[64, 40\]",
    missing_scale: r"lacks model\.layers\.0\.self_attn\.k_proj\.weight_scale",
    missing_expert: r"gate_up_proj|w1\.weight_packed",
    plain_weight: r"lacks model\.layers\.0\.self_attn\.k_proj\.weight_packed.* ignore list",
    quantised_router: r"block_sparse_moe\.gate\.weight_packed .* quantised tensor.* nobody would read",
}


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_wrong_files_are_refused_by_name_and_rule(folder_of, change):
    with pytest.raises((ValueError, RuntimeError), match=WRONG[change]):
        load(folder_of(change=change))


def test_parts_of_a_config_that_cannot_be_read_are_refused(folder_of):
    base = config_of("w4a16 g32", IGNORED)
    for fields, message in (
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "kv_cache_scheme"),
        ({"ignore": [*IGNORED, f"{EXPERTS}.2.w1"]}, r"experts\.2\.w1 the format of unquantised weights"),
        ({"ignore": [*IGNORED, r"re:.*experts\.\d+\.w2"]}, "only some of w1, w3 and w2"),
    ):
        with pytest.raises(ValueError, match=message):
            load(folder_of(quantization_config={**base, **fields}))


def test_formats_that_a_mixed_config_does_not_name_are_inferred_as_the_library_does():
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationScheme

    for name, group in COMPRESSED.items():
        inferred = infer_module_format(torch.nn.Linear, QuantizationScheme(**{**group, "format": None})).value
        assert compressed_format({**group, "format": None}, "mixed-precision").name.startswith(inferred), name


def test_tensor_parallelism_is_refused(folder_of):
    model = load(folder_of())
    options = types.SimpleNamespace(device_mesh=object(), hf_quantizer=None)
    with pytest.raises(NotImplementedError, match="tensor parallelism: packed weights"):
        prepare_packed(model, None, options)


# ---- ways of loading


def test_skeleton_has_the_packed_bytes(folder_of):
    # What device_map="auto" counts.
    folder = folder_of()
    with torch.device("meta"):
        model = KimiLinearForCausalLM(KimiLinearForCausalLM.config_class.from_pretrained(folder))
    counted = {name: x.nbytes for name, x in model.named_parameters() if name.endswith("_packed")}
    assert counted == {name: x.nbytes for name, x in load(folder).named_parameters() if name.endswith("_packed")}
    assert sum(counted.values()) > 0.3 * sum(x.nbytes for x in load(folder).parameters())


def test_classifier_has_a_dense_head(folder_of):
    model = load(folder_of(), KimiLinearForSequenceClassification)
    assert type(model.score) is torch.nn.Linear and model.score.weight.isfinite().all()
    assert isinstance(model.model.layers[0].self_attn.q_proj, KimiPackedLinear)


def test_fewer_layers_leave_out_the_others(folder_of):
    linear = QUANTISED_CONFIG["linear_attn_config"] | {"full_attn_layers": []}
    model = load(folder_of(), num_hidden_layers=1, linear_attn_config=linear)
    assert len(model.model.layers) == 1


@torch.no_grad()
def test_decoder_alone_and_config_alone(folder_of, random_ids):
    folder, ids = folder_of(), random_ids(1, 5)
    decoder, whole = load(folder, KimiLinearModel), load(folder)
    assert torch.equal(decoder(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    config = KimiLinearForCausalLM.config_class.from_pretrained(folder)  # quantization_config is a dictionary here
    built = KimiLinearForCausalLM(config).eval()
    assert {name: x.shape for name, x in built.state_dict().items()} == {
        name: x.shape for name, x in whole.state_dict().items()
    }
    built.load_state_dict(load_file(folder / "model.safetensors"))
    assert torch.equal(built(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("layout", ["w4a16 g32", "fp8 channel"])
@torch.no_grad()
def test_names_of_llm_compressor_are_read_and_the_released_ones_saved(folder_of, tmp_path, random_ids, layout):
    def rename(stored):
        for name in list(stored):
            new = name
            for old, other in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
                new = re.sub(rf"(experts\.\d+)\.{old}\.", rf"\1.{other}.", new)
            stored[new] = stored.pop(name)

    ids = random_ids(1, 5)
    expected = load(folder_of(layout))(ids).logits
    model = load(folder_of(layout, rename))
    assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path / "again")
    folder_of(layout)
    assert_same_files(tmp_path / "quantised", tmp_path / "again")


@pytest.mark.parametrize("layout", ["w4a16 g32", "fp8 tensor static"])
@torch.no_grad()
def test_load_state_dict_reads_the_released_names_in_shards(folder_of, random_ids, layout):
    folder, ids = folder_of(layout), random_ids(1, 5)
    model = load(folder)
    expected, tensors = model(ids).logits, load_file(folder / "model.safetensors")
    for x in (*model.parameters(), *model.buffers()):
        if x.dtype not in (torch.float8_e4m3fn, torch.int64):
            x.zero_()
    names = sorted(tensors)
    first = model.load_state_dict({name: tensors[name] for name in names[::2]}, strict=False)
    assert any(".experts." in name for name in first.missing_keys) and not first.unexpected_keys
    model.load_state_dict({name: tensors[name] for name in names[1::2]}, strict=False)
    assert torch.equal(model(ids).logits, expected)
    model.load_state_dict(model.state_dict())  # its own names, too
    with pytest.raises(RuntimeError, match=r"nobody reads .*experts\.9\.w1"):
        model.load_state_dict({**tensors, f"{EXPERTS}.9.w1.weight": torch.zeros(1)})


@pytest.mark.parametrize("layout", ["w4a16 g32 asymmetric", "fp8 channel", "nvfp4", "fp8 blocks"])
@torch.no_grad()
def test_offloaded_to_disk(folder_of, tmp_path, random_ids, layout):
    pytest.importorskip("accelerate")
    folder, ids = folder_of(layout), random_ids(1, 5)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "lm_head": "cpu"}
    model = load(folder, device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.bfloat16)
    assert torch.equal(model(ids).logits, load(folder, dtype=torch.bfloat16)(ids).logits)


REQUESTS = {
    "w4a16 g32": lambda: transformers.CompressedTensorsConfig(run_compressed=False),
    "fp8 blocks": lambda: transformers.FineGrainedFP8Config(dequantize=True, modules_to_not_convert=IGNORED),
}


@pytest.mark.parametrize("layout", REQUESTS)
@torch.no_grad()
def test_dequantised_on_request_and_saved_dense(folder_of, tmp_path, random_ids, layout):
    folder, ids = folder_of(layout), random_ids(1, 5)
    model = load(folder, quantization_config=REQUESTS[layout]())
    assert not any(isinstance(x, KimiPackedLinear | KimiPackedExperts) for x in model.modules())
    torch.testing.assert_close(model(ids).logits, load(folder)(ids).logits, **BOUND)
    model.save_pretrained(tmp_path / "dense")
    assert f"{EXPERTS}.0.w1.weight" in load_file(tmp_path / "dense" / "model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(load(tmp_path / "dense")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("layout", ["w4a16 g32", "fp8 channel", "fp8 blocks"])
@torch.no_grad()
def test_layers_of_different_formats(tmp_path, random_ids, layout):
    # Layer 2's experts are bf16 as in the file, under names that layer 1's FP8 experts have too.
    config = {
        **QUANTISED_CONFIG,
        **tiny_config(kda_layers=(1,), full_attn_layers=(2, 3), num_experts=4, num_experts_per_token=2),
    }
    stored, dense, generator = {}, {}, torch.Generator().manual_seed(1)
    format, kept = format_of(layout), "model.layers.2.block_sparse_moe.experts"
    for name, tensor in released_tensors(config).items():
        stored[name], dense[name] = tensor, tensor.double()
        if ".1.block_sparse_moe.experts." in name:
            held = random_weight(format, *tensor.shape, generator)
            del stored[name]
            stored |= {f"{name.removesuffix('.weight')}.{format.disk_name(part)}": x for part, x in held.items()}
            parts = held["packed"], held[format.scale_name]
            dense[name] = WeightHandle(format, tuple(tensor.shape), *parts).dequantize()
    plain = [name for name, x in stored.items() if name in dense and x.ndim == 2 and x.dtype == torch.float32]
    ignored = [name.removesuffix(".weight") for name in plain]
    write_quantised(tmp_path / "file", layout, stored, **config, quantization_config=config_of(layout, ignored))
    model, ids = load(tmp_path / "file"), random_ids(1, 5)
    assert not isinstance(model.get_submodule(kept), KimiPackedExperts)
    torch.testing.assert_close(model(ids).logits, Float64Model(config, dense)(ids).float().detach(), **BOUND)
    model.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "file", tmp_path / "again")


def test_decode_path_says_for_which_formats_there_are_no_kernels(folder_of, monkeypatch):
    monkeypatch.setattr(decode_path, "gpu_has_kernels", lambda model: True)
    assert load(folder_of()).decode_path.startswith("captured steps")
    assert "packed weights: no kernels for nvfp4-pack-quantized float4" in load(folder_of("nvfp4")).decode_path


# ---- training


def test_lora_trains_over_packed_weights(folder_of, random_ids):
    peft = pytest.importorskip("peft")
    model, ids = load(folder_of()), random_ids(2, 9)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model = peft.prepare_model_for_kbit_training(model)
    after = model.state_dict()
    assert all(after[name].dtype == x.dtype for name, x in before.items() if "experts" in name)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "kv_b_proj"])).train()
    trainable = [x for x in adapted.parameters() if x.requires_grad]
    assert all(x.dtype == torch.float32 for x in trainable)
    optimiser, losses = torch.optim.AdamW(trainable, lr=0.05), []
    for _ in range(3):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in trainable)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    held = {name.replace(".base_layer", ""): x for name, x in adapted.get_base_model().state_dict().items()}
    assert all(torch.equal(held[name], x) for name, x in before.items() if "experts" in name or "_proj" in name)
    for safe in (False, True):
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            adapted.merge_adapter(safe_merge=safe)
