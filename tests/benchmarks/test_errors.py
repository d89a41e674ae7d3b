"""benchmarks.errors without a GPU: what it counts, and that all its models are loaded from one folder."""

import pytest
import torch

from benchmarks import errors
from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.decode import path as decode_path
from kimi_linear.modeling.prompt import path as prompt_path


def test_errors_of_known_logits():
    reference = torch.tensor([[[3.0, 4.0], [0.0, 5.0], [5.0, 0.0]]])
    logits = torch.tensor([[[3.0, 4.5], [0.0, 5.0], [2.0, 3.0]]])
    found = errors.errors(logits, reference)
    assert found["relative"] == pytest.approx((18.25 / 75) ** 0.5)
    assert found["typical"] == pytest.approx(0.1)
    assert found["largest"] == 3.0
    assert found["agreement"] == pytest.approx(2 / 3)


def test_a_hook_makes_it_go_by_layers(model, monkeypatch):
    monkeypatch.setattr(decode_path, "gpu_has_kernels", lambda model: True)
    assert model.decode_path.startswith("captured steps")
    with errors.layer_by_layer(model):
        assert "hook" in model.decode_path
    assert model.decode_path.startswith("captured steps")


def test_steps_after_a_prompt_are_those_of_the_whole(model, random_ids):
    ids = random_ids(2, 12)
    with torch.no_grad():
        expected = model(ids).logits[:, 8:]
    torch.testing.assert_close(
        errors.logits_of(model, KimiLinearCache(model.config), ids, 8), expected, atol=1e-4, rtol=0
    )


def test_scaled_shape_keeps_the_released_widths():
    config, released = errors.scaled_config(), errors.KimiLinearConfig()
    kept = set(released.to_dict()) - set(errors.SCALED) - set(errors._SPECIAL_TOKENS)
    changed = {key for key in kept if getattr(config, key, None) != getattr(released, key, None)}
    assert changed == {"linear_attn_config"}
    assert config.layer_types == released.layer_types[:8]


def test_three_ways_from_one_folder(native_class, tiny_folder, random_ids, monkeypatch):
    """On a CPU there are no captured steps, so that both of ours go by layers and agree."""
    monkeypatch.setattr(decode_path, "gpu_has_kernels", lambda model: True)
    monkeypatch.setattr(decode_path.DecodePath, "step", lambda *_: None)
    monkeypatch.setattr(prompt_path.PromptPath, "hidden_states", lambda *_: None)
    folder = tiny_folder("hybrid", torch.bfloat16)
    rows = list(errors.measure(folder, [random_ids(1, 30), random_ids(2, 30)], 20, "cpu"))
    assert [(row["batch"], row["way"]) for row in rows] == [
        (batch, way) for batch in (1, 2) for way in ("captured steps", "layer by layer", "native")
    ]
    for row in rows:
        assert 0 < row["typical"] < 0.05
        assert row["positions"] == 10 * row["batch"]
    assert rows[0] == {**rows[1], "way": "captured steps"}


def test_refuses_a_machine_without_steps(tiny_folder, random_ids):
    with pytest.raises(SystemExit, match="layer by layer"):
        next(errors.measure(tiny_folder("hybrid"), [random_ids(1, 9)], 4, "cpu"))
