"""The loss of a training step, taken without logits: the same loss, and logits where somebody may read them."""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

OPTIONS = [
    {},
    {"num_items_in_batch": 7},
    {"num_items_in_batch": torch.tensor(7)},
    {"ignore_index": 5},
    {"shift_labels": torch.arange(18).reshape(2, 9)},
]


@pytest.fixture
def labels(random_ids):
    labels = random_ids(2, 9).clamp(min=5)
    labels[0, :4] = 5
    return labels


def gradients(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o), "mean"))
def test_loss_and_gradients(options, load_tiny, random_ids, labels):
    model, ids = load_tiny().train(), random_ids(2, 9)
    labels = labels if "ignore_index" in options else labels.masked_fill(labels == 5, -100)
    output = model(ids, labels=labels, use_cache=False, **options)
    wanted = model(ids, labels=labels, use_cache=False, skip_logits=False, **options)
    assert output.logits is None and wanted.logits.shape == (2, 9, model.config.vocab_size)
    assert abs(output.loss - wanted.loss) <= 1e-6 * wanted.loss
    for found, exact in zip(gradients(model, output.loss), gradients(model, wanted.loss)):
        assert (found is None) == (exact is None)
        assert found is None or (found - exact).norm() <= 1e-5 * exact.norm() + 1e-12


def test_nothing_to_learn_is_nan_as_in_pytorch(load_tiny, random_ids):
    model, ids = load_tiny().train(), random_ids(1, 4)
    none = torch.full_like(ids, -100)
    assert model(ids, labels=none).loss.isnan() and model(ids, labels=none, skip_logits=False).loss.isnan()
    assert model(ids, labels=none, num_items_in_batch=3).loss == 0
    for options in ({}, {"num_items_in_batch": 0}, {"num_items_in_batch": torch.tensor(0)}):
        model.zero_grad()
        model(ids, labels=none, **options).loss.backward()  # 0 / 0, whose gradients are zero and not NaN
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_who_reads_logits_has_them(load_tiny, random_ids):
    """Evaluation, training mode without gradients, a loss of one's own, a head with an adapter or a hook."""
    model, ids = load_tiny(), random_ids(1, 6)
    assert model(ids, labels=ids).logits is not None
    assert model(ids, labels=ids, skip_logits=True).logits is None
    model.train()
    with torch.no_grad():
        assert model(ids, labels=ids).logits is not None
    assert model(ids).logits is not None
    assert model(ids, labels=ids).logits is None
    handle = model.lm_head.register_forward_hook(lambda *args: None)
    assert model(ids, labels=ids).logits is not None
    handle.remove()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: ForCausalLMLoss(logits, labels, vocab_size) + 1
    assert model(ids, labels=ids).logits is not None
    del model._loss_function
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert model(ids, labels=ids).logits is not None


def test_autocast_is_the_head_s(load_tiny, random_ids):
    """fp32 weights under bf16 autocast, as Trainer(bf16=True) trains them."""
    model, ids = load_tiny().train(), random_ids(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, wanted = (model(ids, labels=ids, skip_logits=skip) for skip in (True, False))
    assert output.logits is None and output.loss.dtype == torch.float32
    assert abs(output.loss - wanted.loss) <= 2**-9 * wanted.loss
    output.loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_labels_that_do_not_fit(load_tiny, random_ids):
    model, ids = load_tiny().train(), random_ids(1, 6)
    with pytest.raises(ValueError, match="shift_labels must have a label for each of the 6 tokens, got 5"):
        model(ids, labels=ids, shift_labels=ids[:, 1:])
    for skip_logits in (True, False):
        with pytest.raises(ValueError, match="shift_labels hold 128, neither a token in"):
            model(ids, labels=ids, shift_labels=ids.clone().fill_(128), skip_logits=skip_logits)
