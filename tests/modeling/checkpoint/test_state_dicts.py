"""`load_state_dict` of either expert layout, where resuming and accelerate end. Values are compared exactly."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import TINY_CONFIGS, released_tensors, write_checkpoint
from transformers.initialization import no_init_weights

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

CONFIG = TINY_CONFIGS["hybrid"]
EXPERTS = "model.layers.1.block_sparse_moe.experts"


@pytest.fixture
def fresh() -> KimiLinearForCausalLM:
    """A model with other weights than the checkpoint's."""
    torch.manual_seed(1)
    return KimiLinearForCausalLM(KimiLinearConfig(**CONFIG)).eval()


@pytest.fixture
def released() -> dict[str, torch.Tensor]:
    return released_tensors(CONFIG)


def halves(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Two shards; the tensors of one expert lie in both."""
    return [{name: x for i, (name, x) in enumerate(tensors.items()) if i % 2 == part} for part in (0, 1)]


def assert_equal_state(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    wanted = expected.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("assign", [False, True])
def test_the_released_layout_fills_the_whole_model(fresh, released, model, assign):
    given = dict(released)
    assert not any(fresh.load_state_dict(given, strict=True, assign=assign))
    assert given.keys() == released.keys(), "the caller's dictionary was changed"
    assert_equal_state(fresh, model)


def test_the_stacked_layout_still_does(fresh, model):
    assert not any(fresh.load_state_dict(model.state_dict(), strict=True))
    assert_equal_state(fresh, model)


def test_the_names_of_llm_compressor_are_read(fresh, released, model):
    renamed = released
    for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        renamed = {name.replace(f".{ours}.weight", f".{theirs}.weight"): x for name, x in renamed.items()}
    fresh.load_state_dict(renamed, strict=True)
    assert_equal_state(fresh, model)


@pytest.mark.parametrize("assign", [False, True])
def test_shards_fill_the_model_one_after_another(fresh, released, model, assign):
    first, second = halves(released)
    missing = fresh.load_state_dict(first, strict=False, assign=assign).missing_keys
    assert {name for name in missing if ".experts." in name} == {name for name in second if ".experts." in name}
    keys = fresh.load_state_dict(second, strict=False, assign=assign)
    assert not [name for name in (*keys.missing_keys, *keys.unexpected_keys) if ".experts." in name]
    assert_equal_state(fresh, model)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_on_meta_takes_them_too(released, model, shards):
    with torch.device("meta"):
        empty = KimiLinearForCausalLM(KimiLinearConfig(**CONFIG))
    for part in [released] if shards == 1 else halves(released):
        empty.load_state_dict(part, strict=False, assign=True)
    assert_equal_state(empty, model)


def test_some_experts_alone_are_replaced(load_tiny, released, random_ids):
    changed = load_tiny()
    before = copy.deepcopy(changed.state_dict())
    name = f"{EXPERTS}.3.w3.weight"
    changed.load_state_dict({name: -released[name]}, strict=False)
    for key, tensor in changed.state_dict().items():
        if key != f"{EXPERTS}.gate_up_proj":
            assert torch.equal(tensor, before[key]), key
    expected = before[f"{EXPERTS}.gate_up_proj"]
    expected[3, 32:] *= -1
    assert torch.equal(changed.state_dict()[f"{EXPERTS}.gate_up_proj"], expected)
    changed(random_ids(1, 5))  # the others were there before


def test_a_missing_expert_is_named_in_a_strict_load(fresh, released):
    del released[f"{EXPERTS}.5.w2.weight"]
    with pytest.raises(RuntimeError, match=r"Missing.*experts\.5\.w2\.weight"):
        fresh.load_state_dict(released)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["5.w1.qweight", "8.w1.weight", "5.w4.weight"])
def test_what_nobody_reads_ends_the_load(fresh, released, name, strict):
    released[f"{EXPERTS}.{name}"] = torch.zeros(32, 64)
    with pytest.raises(RuntimeError, match=f"nobody reads {EXPERTS}.{name}"):
        fresh.load_state_dict(released, strict=strict)


def test_a_tensor_of_another_shape_ends_the_load(fresh, released):
    released[f"{EXPERTS}.5.w2.weight"] = torch.zeros(32, 64)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*experts\.5\.w2\.weight: \[32, 64\], not \[64, 32\]"):
        fresh.load_state_dict(released, strict=False)


def test_both_layouts_of_one_parameter_end_the_load(fresh, released, model):
    released[f"{EXPERTS}.down_proj"] = model.state_dict()[f"{EXPERTS}.down_proj"]
    with pytest.raises(RuntimeError, match=r"both .*experts\.down_proj and .*experts\.0\.w2\.weight"):
        fresh.load_state_dict(released, strict=False)


def test_a_copied_model_loads_into_itself(fresh, released, model):
    twin = copy.deepcopy(fresh)
    twin.load_state_dict(released)
    assert_equal_state(twin, model)
    assert not torch.equal(fresh.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(fresh.state_dict()[f"{EXPERTS}.down_proj"], model.state_dict()[f"{EXPERTS}.down_proj"])


def test_experts_under_an_adapter(fresh, released, model):
    peft = pytest.importorskip("peft")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = peft.get_peft_model(fresh, peft.LoraConfig(r=2, target_parameters=parameters)).base_model.model
    inside = f"{EXPERTS}.base_layer.base_layer."
    given = {name.replace(f"{EXPERTS}.", inside): tensor for name, tensor in released.items() if EXPERTS in name}
    missing = adapted.load_state_dict(given, strict=False).missing_keys
    assert not [name for name in missing if name.startswith(inside)]
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(adapted.state_dict()[inside + name], model.state_dict()[f"{EXPERTS}.{name}"])


def test_distributed_parameters_take_their_share(released, fresh, model):
    """Two ranks of a group that sends nothing: this one gets the first half of the experts, or of their width."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        experts = fresh.get_submodule(EXPERTS)
        for name, dim in (("gate_up_proj", 0), ("down_proj", 2)):
            sharded = distribute_tensor(getattr(experts, name).detach(), mesh, [Shard(dim)], src_data_rank=None)
            setattr(experts, name, torch.nn.Parameter(sharded))
        given = {name.removeprefix(f"{EXPERTS}."): x for name, x in released.items() if name.startswith(EXPERTS)}
        experts.load_state_dict(given)
        whole = model.get_submodule(EXPERTS)
        assert torch.equal(experts.gate_up_proj.to_local(), whole.gate_up_proj[:4])
        assert torch.equal(experts.down_proj.to_local(), whole.down_proj[:, :, :16])
    finally:
        dist.destroy_process_group()


# Loaders that end in load_state_dict, and those that don't


def test_load_sharded_checkpoint(fresh, tmp_path, model):
    from transformers.trainer_utils import load_sharded_checkpoint

    write_checkpoint(tmp_path, CONFIG, shards=3)
    load_sharded_checkpoint(fresh, str(tmp_path), strict=False)
    assert_equal_state(fresh, model)


@pytest.mark.parametrize("shards", [1, 3])
def test_accelerate_without_a_device_map(fresh, tmp_path, model, released, shards):
    accelerate = pytest.importorskip("accelerate")
    if shards == 1:
        save_file(released, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:
        write_checkpoint(tmp_path, CONFIG, shards=shards)
    accelerate.load_checkpoint_in_model(fresh, str(tmp_path))
    assert_equal_state(fresh, model)


def test_experts_that_nothing_filled_are_refused_at_the_first_forward(tmp_path, random_ids):
    accelerate = pytest.importorskip("accelerate")
    write_checkpoint(tmp_path, CONFIG)
    with no_init_weights():
        empty = KimiLinearForCausalLM(KimiLinearConfig(**CONFIG))
    filled = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path), device_map={"": "cpu"})
    with pytest.raises(ValueError, match=r"experts \[0, 1, 2, 3, 4, 5, 6, 7\] of a layer hold NaN.*from_pretrained"):
        filled(random_ids(1, 5))


def test_memory_given_to_a_meta_model_does_not_pass_for_experts(released, random_ids, model):
    with torch.device("meta"):
        empty = KimiLinearForCausalLM(KimiLinearConfig(**CONFIG)).eval()
    empty.to_empty(device="cpu")
    without_one = {name: tensor for name, tensor in released.items() if not name.startswith(f"{EXPERTS}.6.")}
    empty.load_state_dict(without_one, strict=False)
    ids = random_ids(1, 5)
    with pytest.raises(ValueError, match=r"experts \[6\] of a layer hold NaN"):
        empty(ids)
    empty.load_state_dict(released)
    assert torch.equal(empty(ids).logits, model(ids).logits)
