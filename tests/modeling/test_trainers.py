"""Trainer and TRL take a step: they pass arguments of their own to the forward, and read its outputs by name."""

import math

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

datasets = pytest.importorskip("datasets")


@pytest.fixture
def rows(random_ids):
    """Two token rows of the same length, as a dataset."""
    ids = random_ids(2, 12).tolist()
    return datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def settings(folder) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def test_trainer_takes_a_step_and_evaluates(load_tiny, rows, tmp_path):
    model = load_tiny("hybrid")
    before = model.lm_head.weight.detach().clone()
    trainer = Trainer(model, TrainingArguments(**settings(tmp_path)), train_dataset=rows, eval_dataset=rows)
    assert math.isfinite(trainer.train().training_loss)
    assert not before.equal(model.lm_head.weight)
    # The evaluation gathers all outputs but the ones that the config names, which caches are among.
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.predict(rows).predictions.shape == (2, 12, model.config.vocab_size)


def test_label_smoothing_compares_with_the_next_token(load_tiny, rows, tmp_path):
    model, epsilon = load_tiny("hybrid"), 0.1
    options = TrainingArguments(**settings(tmp_path), label_smoothing_factor=epsilon)
    got = Trainer(model, options, eval_dataset=rows).evaluate()["eval_loss"]
    ids = torch.tensor(rows["input_ids"])
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=epsilon)
    assert got == pytest.approx(expected.item(), abs=1e-4)


def test_supervised_fine_tuning_of_trl_takes_a_step(load_tiny, rows, tmp_path):
    trl = pytest.importorskip("trl")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = WordLevel({str(i): i for i in range(128)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), eos_token="126", pad_token="127")
    model = load_tiny("hybrid")
    before = model.lm_head.weight.detach().clone()
    arguments = trl.SFTConfig(**settings(tmp_path), bf16=False)
    rows = rows.remove_columns("labels")
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    assert math.isfinite(trainer.train().training_loss)
    assert not before.equal(model.lm_head.weight)
