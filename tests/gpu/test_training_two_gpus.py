"""A training step under DDP and FSDP2 on two GPUs against one process. `python -m pytest -m gpu`."""

import pytest
import torch
from tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from two_processes import GPU_PREAMBLE, run_on_two_processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

DDP = """
from torch.nn.parallel import DistributedDataParallel
model = DistributedDataParallel(KimiLinearForCausalLM.from_pretrained(folder).to("cuda", whole.dtype).train())
named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
full = lambda gradient: gradient
"""
FSDP2 = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
model = KimiLinearForCausalLM.from_pretrained(folder).to("cuda", whole.dtype).train()
mesh = init_device_mesh("cuda", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
named = dict(model.named_parameters())
full = lambda gradient: gradient.full_tensor()
"""
# Each rank has its own row; the mean over ranks is the loss of both. Sums over rows are made in another order.
STEP = """
whole.train()
output = model(input_ids=ids[rank : rank + 1], labels=ids[rank : rank + 1], use_cache=False)
assert output.logits is None
output.loss.backward()
expected = whole(ids, labels=ids, use_cache=False).loss
expected.backward()
mean = output.loss.detach().clone()
dist.all_reduce(mean)
bound = 1e-4 if whole.dtype == torch.float32 else 4 * 2**-7
assert abs(mean / 2 - expected.detach()) <= bound * expected.detach()
for name, other in whole.named_parameters():
    gradient = full(named[name].grad)
    assert other.grad.norm() > 0, name
    assert (gradient - other.grad).norm() <= bound * other.grad.norm(), name
"""


@pytest.mark.parametrize("body", [DDP, FSDP2], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_on_two_gpus(body, dtype, tmp_path):
    write_checkpoint(tmp_path / "tiny", TINY_CONFIGS["hybrid"])
    preamble = f"{GPU_PREAMBLE}\nwhole = whole.to({dtype})\n"
    run_on_two_processes(body + STEP, tmp_path / "tiny", tmp_path, preamble)
