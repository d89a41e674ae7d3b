"""Trainer puts back what its checkpoints hold: losses after resuming are those of the run that went on.

All runs are fp32 on one thread and repeat the same operations, so that resumed losses equal the others to 1e-5 (the
order in which gloo sums two ranks doesn't change).
"""

import pytest
import torch
import transformers
from tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from two_processes import run_on_two_processes

from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

# Also run by two processes, as text. Losses are logged with all their digits.
TRAIN = """
import torch
from transformers import Trainer, TrainingArguments
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM


class Exact(Trainer):
    def log(self, logs, *args, **kwargs):
        self.losses = [*getattr(self, "losses", []), *([logs["loss"]] if "loss" in logs else [])]
        return super().log(logs, *args, **kwargs)


def trainer(folder, out, **options):
    rows = [{"input_ids": [i + 3, i + 5, i + 9, i + 2], "labels": [i + 3, i + 5, i + 9, i + 2]} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(out), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=2,
        max_steps=4, save_steps=2, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, seed=1, **options,
    )
    model = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Exact(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def whole_and_resumed(folder, out, **options):
    whole = trainer(folder, out, **options)
    whole.train()
    resumed = trainer(folder, out, **options)
    resumed.train(resume_from_checkpoint=f"{out}/checkpoint-2")
    return whole.losses, resumed.losses
"""
exec(TRAIN)

DDP = (
    TRAIN
    + """
whole, resumed = whole_and_resumed(folder, scratch)
assert len(whole) == 4 and len(resumed) == 2, (whole, resumed)
assert abs(whole[0] - whole[3]) > 1e-2, whole  # the weights have moved
for a, b in zip(whole[2:], resumed):
    assert abs(a - b) < 1e-5, (whole, resumed)
"""
)

# accelerate has no FSDP on CPUs, so without Trainer: its load_fsdp_model ends in the same set_model_state_dict.
FSDP2 = """
import copy
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

mesh = init_device_mesh("cpu", (2,))
full = StateDictOptions(full_state_dict=True)


def shard(model):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, steps):
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(ids[rank : rank + 1], labels=ids[rank : rank + 1], use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


other = copy.deepcopy(whole)
with torch.no_grad():
    for parameter in other.parameters():
        parameter.mul_(0.5)
model, again, stacked = (shard(copy.deepcopy(each).train()) for each in (whole, other, other))
train(model, 2)
states = get_model_state_dict(model, options=full)
if rank == 0:
    whole.save_pretrained(scratch, state_dict=states)
dist.barrier()
released = load_file(f"{scratch}/model.safetensors")
assert any("experts.0.w1" in name for name in released)
set_model_state_dict(again, released, options=full)
set_model_state_dict(stacked, get_model_state_dict(model, options=full), options=full)
expected = train(model, 2)
assert abs(expected[0] - expected[1]) > 1e-2
assert train(again, 2) == expected
assert train(stacked, 2) == expected
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume")
    write_checkpoint(path, TINY_CONFIGS["hybrid"])
    return path


def test_resumed_losses_are_those_of_the_uninterrupted_run(folder, tmp_path):
    whole, resumed = whole_and_resumed(folder, tmp_path)  # noqa: F821
    assert abs(whole[0] - whole[3]) > 1e-2
    assert resumed == pytest.approx(whole[2:], abs=1e-5)


def test_the_best_checkpoint_is_put_back(folder, tmp_path):
    # The metric is turned round, so that the first checkpoint counts as the best one.
    best = trainer(  # noqa: F821
        folder,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-2")
    expected = KimiLinearForCausalLM.from_pretrained(best.state.best_model_checkpoint).state_dict()
    for name, tensor in best.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.processes
def test_resuming_on_two_processes(folder, tmp_path):
    bodies = [FSDP2, DDP]
    if transformers.__version__.startswith("5.10."):
        # Its Trainer loads the optimiser to "cpu:0", a device that torch.load doesn't know.
        bodies.remove(DDP)
    run_on_two_processes("\n".join(bodies), folder, tmp_path)
