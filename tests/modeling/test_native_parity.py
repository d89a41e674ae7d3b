"""One released-layout checkpoint in our model, in transformers' native class and in a float64 model of the formulas.

All runs are fp32. Logits are of order 1 and each passes some 1e3 fp32 roundings of 6e-8 relative: the two agree to
about 1e-5, and 1e-4 (absolute, and relative to the norm) is the bound everywhere. A wrong epsilon, scale or tap order
costs 1e-3 or more.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from float64_model import Float64Model
from safetensors.torch import load_file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from kimi_linear.hub_card.exporter import ExportRequest, export
from kimi_linear.modeling.checkpoint.conversions import conversions_for_loading, released_layout_conversions
from kimi_linear.modeling.layers.moe import KimiTopkRouter

BOUND = 1e-4
# Names of tests/conftest.py's tiny checkpoints. The native class needs an MLA layer, to count positions.
NATIVE = ["hybrid", "interleaved", "two_groups", "four_groups", "not_renormalised", "dense", "all_mla"]
ALL = [*NATIVE, "all_kda"]


def assert_agree(ours: torch.Tensor, other: torch.Tensor, what: str = "") -> None:
    assert ours.shape == other.shape, what
    difference = (ours.double() - other.double()).detach()
    assert difference.abs().max() <= BOUND, f"{what} differ by {difference.abs().max():.1e} absolute"
    relative = difference.norm() / other.detach().double().norm()
    assert relative <= BOUND, f"{what} differ by {relative:.1e} of their norm"


def assert_gradients_agree(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(other)
    for name, expected in other.items():
        difference = (ours[name].double() - expected.double()).norm()
        assert difference <= BOUND * expected.norm(), f"{name} differs by {difference / expected.norm():.1e}"
    unused = [name for name, expected in other.items() if expected.norm() == 0]
    assert all(".experts." in name for name in unused), f"no gradient reaches {unused}"


def released_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of our or the native model under the released names."""
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        name = name.replace(".forget_gate.", ".")
        name = re.sub(r"\.mlp\.(experts|shared_experts|gate)\.", r".block_sparse_moe.\1.", name)
        if name.endswith(".conv1d.weight"):
            for kind, part in zip("qkv", gradient.chunk(3)):
                gradients[name.replace(".conv1d.", f".{kind}_conv1d.")] = part
        elif name.endswith(".experts.gate_up_proj"):
            for expert, (gate, up) in enumerate(part.chunk(2) for part in gradient):
                prefix = name.removesuffix("gate_up_proj")
                gradients[f"{prefix}{expert}.w1.weight"], gradients[f"{prefix}{expert}.w3.weight"] = gate, up
        elif name.endswith(".experts.down_proj"):
            for expert, part in enumerate(gradient):
                gradients[f"{name.removesuffix('down_proj')}{expert}.w2.weight"] = part
        else:
            gradients[name] = gradient
    return gradients


def router_outputs(model: torch.nn.Module, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weights, experts) of each router of our or the native model, in order of expert number."""
    calls = []

    def record(_, __, output):
        weights, experts = output[1:]
        order = experts.argsort(dim=-1)
        calls.append((weights.gather(1, order), experts.gather(1, order)))

    routers = [module for module in model.modules() if type(module).__name__.endswith("TopkRouter")]
    handles = [router.register_forward_hook(record) for router in routers]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return calls


@pytest.fixture(scope="module")
def native(native_class, load_tiny):
    loaded = {}

    def load(name: str):
        if name not in loaded:
            loaded[name] = load_tiny(name, native_class)
            assert type(loaded[name]).__module__.startswith("transformers.")
        return loaded[name]

    return load


@pytest.fixture(scope="module")
def float64(tiny_folder):
    def build(name: str) -> Float64Model:
        tensors = {}
        for file in tiny_folder(name).glob("*.safetensors"):
            tensors.update(load_file(file))
        return Float64Model(json.loads((tiny_folder(name) / "config.json").read_text()), tensors)

    return build


# Against the formulas in float64


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_logits_and_hidden_states_are_those_of_the_formulas(name, shared_tiny, float64, random_ids):
    ids, oracle = random_ids(2, 70), float64(name)  # beyond one chunk of 64
    expected = oracle(ids)
    outputs = shared_tiny(name)(ids, output_hidden_states=True)
    assert_agree(outputs.logits, expected, "logits")
    assert len(outputs.hidden_states) == len(oracle.hidden_states)
    for i, (ours, other) in enumerate(zip(outputs.hidden_states, oracle.hidden_states)):
        assert_agree(ours, other, f"hidden states {i}")


@pytest.mark.parametrize("name", ["hybrid", "all_kda", "four_groups"])
@torch.no_grad()
def test_decoding_token_by_token_stays_with_the_formulas_for_200_tokens(name, shared_tiny, float64, random_ids):
    ids, model, cache = random_ids(1, 200), shared_tiny(name), None
    logits = []
    for t in range(ids.shape[1]):
        outputs = model(ids[:, t : t + 1], past_key_values=cache)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    assert_agree(torch.cat(logits, 1), float64(name)(ids), "logits")


@pytest.mark.parametrize("name", ["hybrid", "all_kda"])
@torch.no_grad()
def test_padded_rows_follow_the_formulas(name, shared_tiny, float64, random_ids):
    ids, model, oracle = random_ids(2, 24), shared_tiny(name), float64(name)
    for rows in (slice(7, None), slice(None, 17)):  # left padding, then right padding
        mask = torch.zeros_like(ids)
        mask[0, rows], mask[1] = 1, 1
        logits = model(ids, attention_mask=mask).logits
        assert_agree(logits[0, rows], oracle(ids[:1, rows])[0], "logits of the padded row")
        assert_agree(logits[1], oracle(ids[1:])[0], "logits of the full row")


@pytest.mark.parametrize("name", ["hybrid", "all_kda", "four_groups", "not_renormalised"])
def test_loss_and_every_gradient_are_those_of_the_formulas(name, load_tiny, float64, random_ids):
    ids, model, oracle = random_ids(2, 40), load_tiny(name), float64(name)
    loss = model(ids, labels=ids).loss
    loss.backward()
    expected = torch.nn.functional.cross_entropy(oracle(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    assert_agree(loss[None], expected[None], "loss")
    learned = {key: t.grad for key, t in oracle.tensors.items() if not key.endswith("e_score_correction_bias")}
    assert_gradients_agree(released_gradients(model), learned)


@pytest.mark.parametrize("renormalise", [True, False])
@torch.no_grad()
def test_biased_router_weights_are_scores_plus_bias(load_tiny, renormalise):
    options = {"router_weight_uses_score_correction_bias": True, "moe_renormalize": renormalise}
    router = load_tiny("hybrid", **options).model.layers[1].block_sparse_moe.gate
    x = torch.randn(50, router.weight.shape[1], generator=torch.Generator().manual_seed(0))
    biased = (x @ router.weight.T).sigmoid() + router.e_score_correction_bias
    expected = biased.sort(dim=-1, descending=True)
    expected_weights, expected_experts = expected.values[:, : router.top_k], expected.indices[:, : router.top_k]
    if renormalise:
        expected_weights = expected_weights / expected_weights.sum(-1, keepdim=True)

    _, weights, experts = router(x)
    order = weights.argsort(dim=-1, descending=True)
    assert torch.equal(experts.gather(1, order), expected_experts)
    torch.testing.assert_close(weights.gather(1, order), expected_weights * 2.446)
    router.biased_weights = False
    assert (router(x)[1] - weights).abs().max() > 1e-2, "the switch must change the weights"


# Against transformers' native class


@pytest.mark.parametrize("name", NATIVE)
@torch.no_grad()
def test_prompt_matches_native_layer_by_layer(name, shared_tiny, native, random_ids):
    ids = random_ids(2, 70)
    ours = shared_tiny(name)(ids, output_hidden_states=True)
    other = native(name)(ids, output_hidden_states=True)
    assert_agree(ours.logits, other.logits, "logits")
    assert len(ours.hidden_states) == len(other.hidden_states) == len(native(name).model.layers) + 1
    for i, (a, b) in enumerate(zip(ours.hidden_states, other.hidden_states)):
        assert_agree(a, b, f"hidden states {i}")


@pytest.mark.parametrize("name", ["hybrid", "interleaved", "all_mla"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batch_matches_native_at_valid_positions(name, side, shared_tiny, native, random_ids):
    ids = random_ids(3, 30)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((11, 2, 0)):
        mask[row, slice(0, padding) if side == "left" else slice(30 - padding, None)] = 0
    ids = ids.masked_fill(mask == 0, 127)
    ours = shared_tiny(name)(ids, attention_mask=mask).logits
    other = native(name)(ids, attention_mask=mask).logits
    assert_agree(ours[mask.bool()], other[mask.bool()], "logits")


@pytest.mark.parametrize("name", ["hybrid", "all_mla"])
@torch.no_grad()
def test_decoding_token_by_token_matches_native(name, shared_tiny, native, random_ids):
    # Past a chunk of 64. That nothing drifts in 200 tokens the formulas above say.
    ids, steps = random_ids(2, 70), []
    for model in (shared_tiny(name), native(name)):
        cache, logits = None, []
        for t in range(ids.shape[1]):
            outputs = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
        steps.append(torch.cat(logits, 1))
    assert_agree(*steps, "logits")


@pytest.mark.parametrize("name", ["hybrid", "interleaved", "four_groups"])
@torch.no_grad()
def test_prompt_in_three_parts_matches_native(name, shared_tiny, native, random_ids):
    ids = random_ids(2, 90)
    logits = []
    for model in (shared_tiny(name), native(name)):
        cache, parts = None, []
        for part in ids.split([37, 5, 48], dim=1):
            outputs = model(part, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            parts.append(outputs.logits)
        logits.append(torch.cat(parts, 1))
    assert_agree(*logits, "logits")
    assert_agree(logits[0], native(name)(ids).logits, "logits of the parts and of the whole")


@pytest.mark.parametrize("name", NATIVE)
def test_greedy_generation_matches_native_for_64_tokens(name, shared_tiny, native, random_ids):
    options = {"max_new_tokens": 64, "do_sample": False}
    ours = shared_tiny(name).generate(random_ids(2, 9), **options)
    assert ours.shape == (2, 73)
    assert torch.equal(ours, native(name).generate(random_ids(2, 9), **options))


@pytest.mark.parametrize("name", ["hybrid", "interleaved"])
def test_beam_search_matches_native(name, shared_tiny, native, random_ids):
    options = {"max_new_tokens": 24, "do_sample": False, "num_beams": 4, "num_return_sequences": 3}
    ours = shared_tiny(name).generate(random_ids(2, 9), **options)
    assert ours.shape == (6, 33)
    assert torch.equal(ours, native(name).generate(random_ids(2, 9), **options))


@pytest.mark.parametrize("name", ["hybrid", "two_groups", "four_groups", "not_renormalised"])
def test_router_chooses_and_weighs_experts_as_native(name, shared_tiny, native, random_ids):
    ours = router_outputs(shared_tiny(name), random_ids(2, 60))
    other = router_outputs(native(name), random_ids(2, 60))
    assert len(ours) == len(other) == len(native(name).model.layers) - 1
    for i, ((weights, experts), (native_weights, native_experts)) in enumerate(zip(ours, other)):
        assert torch.equal(experts, native_experts), f"router {i} chooses other experts"
        assert_agree(weights, native_weights, f"weights of router {i}")


@pytest.mark.parametrize("name", ["hybrid", "four_groups", "dense", "all_mla"])
def test_loss_and_every_gradient_match_native(name, load_tiny, native_class, random_ids):
    ids = random_ids(2, 70)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    models = [load_tiny(name), load_tiny(name, native_class)]
    losses = [model(ids, labels=labels).loss for model in models]
    for loss in losses:
        loss.backward()
    assert_agree(losses[0][None], losses[1][None], "loss")
    assert_gradients_agree(*(released_gradients(model) for model in models))


@torch.no_grad()
def test_logits_with_routing_pinned_to_native(load_tiny, native, random_ids):
    """The diagnostic next to the end-to-end number: what is left when both mix the same experts the same way."""
    ids, model = random_ids(2, 70), load_tiny("four_groups")
    choices = iter([])

    def replay(_, __, output):
        weights, experts = next(choices)
        return output[0], weights, experts

    for router in (module for module in model.modules() if isinstance(module, KimiTopkRouter)):
        router.register_forward_hook(replay)
    choices = iter(router_outputs(native("four_groups"), ids))
    assert_agree(model(ids).logits, native("four_groups")(ids).logits, "logits")


# Both in one process


def test_native_conversions_are_replaced_and_those_of_the_user_kept(native_class, model):
    """transformers 5.17 to 5.22 find the native class's conversions for our model_type and hand them to our loader."""
    of_the_user = WeightRenaming("old_head", "lm_head")
    found = [*get_checkpoint_conversion_mapping("kimi_linear"), of_the_user]
    conversions = conversions_for_loading(found, None, model)
    assert of_the_user in conversions
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    targets = {pattern for entry in converters for pattern in entry.target_patterns}
    assert targets == {pattern for entry in released_layout_conversions() for pattern in entry.target_patterns}


BOTH_SCRIPT = """
import json, sys
import torch, transformers
sys.modules["kimi_linear"] = None  # ours must come from the exported folder alone
folder, saved, *order = sys.argv[1:]
load = {
    "native": lambda: transformers.KimiLinearForCausalLM.from_pretrained(folder),
    "ours": lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
}
ids = torch.arange(2, 42).view(2, 20)
models, logits, tokens = {}, {}, {}
for who in [*order, order[0]]:  # the first one loads once more after the second
    models[who] = load[who]().eval()
    for name, model in models.items():
        with torch.no_grad():
            logits.setdefault(name, []).append(model(ids).logits)
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        tokens[name] = model.generate(ids, **options).tolist()
models["ours"].save_pretrained(saved)
print("REPORT" + json.dumps({
    "modules": {name: type(model).__module__ for name, model in models.items()},
    "repeats": {name: max((x - runs[0]).abs().max().item() for x in runs) for name, runs in logits.items()},
    "difference": (logits["ours"][0] - logits["native"][0]).abs().max().item(),
    "scale": logits["native"][0].abs().max().item(),
    "tokens": tokens,
}))
"""


@pytest.mark.processes
@pytest.mark.parametrize("order", [("native", "ours"), ("ours", "native")], ids=["native_first", "ours_first"])
def test_both_classes_load_and_run_in_one_process(order, native_class, tiny_folder, tmp_path):
    exported, saved = tmp_path / "exported", tmp_path / "saved"
    export(ExportRequest(out=exported, checkpoint=tiny_folder("four_groups"), weights="copy"))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", BOTH_SCRIPT, exported, saved, *order]
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads(process.stdout.rpartition("REPORT")[2])

    assert report["modules"]["native"].startswith("transformers.models.kimi_linear")
    assert report["modules"]["ours"].startswith("transformers_modules.")
    assert report["repeats"] == {"native": 0.0, "ours": 0.0}, "a model computes otherwise beside the other"
    assert report["difference"] <= BOUND < report["scale"]
    assert report["tokens"]["ours"] == report["tokens"]["native"]

    def tensors(folder):
        return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}

    original, written = tensors(exported), tensors(saved)
    assert set(written) == set(original)
    assert all(torch.equal(written[name], tensor) for name, tensor in original.items())
