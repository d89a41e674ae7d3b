"""One model over several devices or processes computes what it computes on one: accelerate, tensor parallel, FSDP2.

Processes talk gloo on the CPU. All runs are fp32; sums over ranks come in another order, so that logits of order 1
agree to some 1e-5 and gradients to 1e-5 of their norm.
"""

import accelerate
import pytest
import torch
import transformers
from tensor_files import assert_same_tensors, read_folder
from tiny_checkpoints import TINY_CONFIGS
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES
from two_processes import run_on_two_processes

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

BOUND = {"atol": 1e-4, "rtol": 1e-4}
CONFIG = TINY_CONFIGS["interleaved"]


def size(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


# accelerate


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.65, 0.8])
def test_a_device_map_never_splits_a_decoder_layer(share):
    with torch.device("meta"):
        model = KimiLinearForCausalLM(KimiLinearConfig(**CONFIG))
    assert {type(layer).__name__ for layer in model.model.layers} == set(model._no_split_modules)
    budget = {0: int(size(model) * share), "cpu": int(size(model) * 0.3), "disk": size(model)}
    device_map = accelerate.infer_auto_device_map(
        model, max_memory=budget, no_split_module_classes=list(model._no_split_modules)
    )
    assert len(set(device_map.values())) > 1
    for name in device_map:
        assert name.count(".") <= 2, f"{name} is part of a decoder layer"


@pytest.fixture
def offloaded(tiny_folder, tmp_path):
    """The model with about half of its layers on disk."""
    folder = tiny_folder("interleaved")
    total = size(KimiLinearForCausalLM.from_pretrained(folder))
    model = KimiLinearForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": int(total * 0.6)}, offload_folder=tmp_path / "offload"
    ).eval()
    places = {str(place) for place in model.hf_device_map.values()}
    assert places == {"cpu", "disk"}, model.hf_device_map
    kinds = {
        model.config.layer_types[int(name.split(".")[2])]
        for name, place in model.hf_device_map.items()
        if place == "disk" and name.startswith("model.layers.")
    }
    assert kinds == {"linear_attention", "full_attention"}
    return model


@torch.no_grad()
def test_offloading_to_disk_changes_nothing(offloaded, shared_tiny, random_ids):
    ids = random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    whole = shared_tiny("interleaved")
    torch.testing.assert_close(offloaded(ids).logits, whole(ids).logits, **BOUND)
    expected = whole(ids, attention_mask=mask).logits
    torch.testing.assert_close(offloaded(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()], **BOUND)


def test_generation_with_layers_on_disk(offloaded, shared_tiny, random_ids):
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    ids = random_ids(2, 9)
    assert torch.equal(offloaded.generate(ids, **options), shared_tiny("interleaved").generate(ids, **options))


@torch.no_grad()
def test_dispatching_a_loaded_model(load_tiny, shared_tiny, random_ids, tmp_path):
    model = load_tiny("interleaved")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    device_map |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(5)}
    model = accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.model.layers[1].self_attn.kv_b_proj.weight.device.type == "meta"
    ids = random_ids(2, 20)
    cache = model(ids[:, :12]).past_key_values
    step = model(ids[:, 12:13], past_key_values=cache).logits
    torch.testing.assert_close(step, shared_tiny("interleaved")(ids[:, :13]).logits[:, 12:], **BOUND)


@pytest.mark.skipif(
    transformers.__version__.startswith("5.10."),
    reason="transformers 5.10 looks for offloaded weights under their names on disk, for every model it converts",
)
def test_an_offloaded_model_saves_the_released_tensors(offloaded, tiny_folder, tmp_path):
    offloaded.save_pretrained(tmp_path / "saved")
    assert_same_tensors(read_folder(tmp_path / "saved"), read_folder(tiny_folder("interleaved")))


# Two processes, which find each other through a file: a port that was free may not be when it is used. The bodies run
# on both ranks after PREAMBLE, one after the other; an assertion that fails on one ends both and shows its line.

PARALLEL_CHECKS = """
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-4)
options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
assert torch.equal(model.generate(ids[:, :9], **options), whole.generate(ids[:, :9], **options))
"""

TENSOR_PARALLEL = (
    """
model = KimiLinearForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
experts, mlp = model.model.layers[1].block_sparse_moe.experts, model.model.layers[0].mlp
assert local(experts.gate_up_proj).shape == (8, 32, 64), local(experts.gate_up_proj).shape
assert local(experts.down_proj).shape == (8, 64, 16)
assert local(mlp.up_proj.weight).shape == (48, 64)
"""
    + PARALLEL_CHECKS
    + """
model.save_pretrained(scratch + "/saved")
dist.barrier()
saved = KimiLinearForCausalLM.from_pretrained(scratch + "/saved").state_dict()
for name, tensor in whole.state_dict().items():
    assert torch.equal(saved[name], tensor), name
"""
)

EXPERT_PARALLEL = (
    """
from transformers.distributed import DistributedConfig
config = DistributedConfig(tp_size=2, ep_size=2)
model = KimiLinearForCausalLM.from_pretrained(folder, distributed_config=config).eval()
experts = model.model.layers[1].block_sparse_moe.experts
weight = experts.gate_up_proj.to_local() if hasattr(experts.gate_up_proj, "to_local") else experts.gate_up_proj
assert weight.shape == (4, 64, 64), weight.shape
"""
    + PARALLEL_CHECKS
)

FSDP = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
model = KimiLinearForCausalLM.from_pretrained(folder).train()
mesh = init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
whole.train()
row = ids[rank : rank + 1]  # each rank its own row; the mean over ranks is the loss of both
loss = model(row, labels=row, use_cache=False).loss
loss.backward()
expected = whole(ids, labels=ids, use_cache=False).loss
expected.backward()
mean = loss.detach().clone()
dist.all_reduce(mean)
torch.testing.assert_close(mean / 2, expected.detach(), atol=1e-5, rtol=1e-5)
wanted = dict(whole.named_parameters())
for name, parameter in model.named_parameters():
    gradient, other = parameter.grad.full_tensor(), wanted[name].grad
    assert other.norm() > 0, name
    assert (gradient - other).norm() <= 1e-5 * other.norm(), name
for each in (model, whole):
    torch.optim.SGD(each.parameters(), lr=0.1).step()
for name, parameter in model.named_parameters():
    torch.testing.assert_close(parameter.full_tensor(), wanted[name].detach(), atol=1e-5, rtol=1e-5)
"""


@pytest.mark.processes
def test_tensor_parallel_expert_parallel_and_fsdp2_on_two_processes(tiny_folder, tmp_path):
    bodies = [TENSOR_PARALLEL, EXPERT_PARALLEL, FSDP]
    if "ep_dispatch_experts" not in ALL_PARALLEL_STYLES:  # older transformers lack the style of our plan
        bodies.remove(EXPERT_PARALLEL)
    run_on_two_processes("\n".join(bodies), tiny_folder("interleaved"), tmp_path)
