"""
RL loops: TRL's GRPO rolls out by captured steps, with an unmerged adapter and in training mode; in the interpreter.

The prompt and the rollout go by the layers and by steps, the loss by a forward with gradients. In fp32 their
log-probabilities differ by rounding alone: 1e-5 is above that of logits of some units, and far below what one weight
left out makes.
"""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("datasets")
pytest.importorskip("trl")
pytest.importorskip("peft")

import datasets
import peft
import trl
from interpreted_steps import few_programs, make_model, stepping
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from benchmarks.rollouts import rollout_gaps

__all__ = ["few_programs", "stepping"]  # fixtures
COMPLETION = 4


def tokenizer():
    made = Tokenizer(WordLevel({str(i): i for i in range(128)}, unk_token="0"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="126", pad_token="127")


def test_grpo_with_an_adapter_under_checkpointing(stepping, tmp_path):
    def reward(completion_ids, **_):
        return [float(ids[0]) for ids in completion_ids]

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2, report_to=[],
        max_completion_length=COMPLETION, gradient_checkpointing=True, use_cpu=True, bf16=False, beta=0.1,
        save_strategy="no", disable_tqdm=True, learning_rate=0.1,
    )  # fmt: skip
    prompts = datasets.Dataset.from_list([{"prompt": "3 14 15"}, {"prompt": "9"}])
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], target_parameters=["experts.down_proj"])
    trainer = trl.GRPOTrainer(
        make_model(), reward, args=arguments, train_dataset=prompts, processing_class=tokenizer(), peft_config=config
    )
    factors = {name: x.detach().clone() for name, x in trainer.model.named_parameters() if x.requires_grad}
    trainer.train()
    assert stepping == [(2, 1)] * (COMPLETION - 1)
    assert any(not torch.equal(x, factors[name]) for name, x in trainer.model.named_parameters() if name in factors)
    assert trainer.model.training
    # A second rollout by the trained factors, and the forward that a loss is taken of.
    ids, mask = torch.tensor([[127, 3, 14], [9, 8, 7]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    gaps = rollout_gaps(trainer.model, ids, mask, COMPLETION)
    assert stepping == [(2, 1)] * 2 * (COMPLETION - 1) and float(gaps.max()) < 1e-5
