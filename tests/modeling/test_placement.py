"""Models that accelerate has spread: which hooks stay, what a device map must say, what the layers are handed.

accelerate's hooks are real, over maps of "cpu" and "disk"; what they do with two GPUs is in tests/gpu/test_two_gpus.py.
"""

from functools import partial

import accelerate
import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from tiny_checkpoints import TINY_CONFIGS

from kimi_linear.modeling import placement
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForSequenceClassification, KimiLinearModel
from kimi_linear.modeling.placement import check_device_map, take_hooks_off_layers
from kimi_linear.modeling.plain_modules import hanging
from kimi_linear.modeling.prompt import carrying
from kimi_linear.modeling.prompt import segments as prompt_segments

NAMES = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(5)), "model.norm", "lm_head"]


def dispatched(model, offload_dir, disk=()):
    places = {name: "disk" if name in disk else "cpu" for name in NAMES[: len(model.model.layers) + 1] + NAMES[-2:]}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=offload_dir, force_hooks=True)


def hooked(model):
    return {name for name, module in model.named_modules() if "_hf_hook" in module.__dict__}


@torch.no_grad()
def test_hooks_inside_layers_are_taken_off(load_tiny, shared_tiny, random_ids, tmp_path):
    model = dispatched(load_tiny("hybrid"), tmp_path)
    before, layers = hooked(model), len(model.model.layers)
    take_hooks_off_layers(model)
    assert hooked(model) == {"", *NAMES[: layers + 1], *NAMES[-2:]} and len(before) > 10 * layers
    assert all(hanging(module) is None for module in list(model.modules())[1:])
    ids = random_ids(2, 9)
    assert torch.equal(model(ids).logits, shared_tiny("hybrid")(ids).logits)
    left = {name for name, module in model.named_modules() if "forward" in module.__dict__}
    assert left == hooked(model)


@torch.no_grad()
def test_hooks_that_bring_weights_or_do_something_else_stay(load_tiny, shared_tiny, random_ids, tmp_path):
    model = dispatched(load_tiny("hybrid"), tmp_path, disk=("model.layers.1",))
    add_hook_to_module(model.model.layers[0].self_attn.o_proj, CpuOffload("cpu"))
    before = hooked(model)
    take_hooks_off_layers(model)
    kept = {name for name in before if name.startswith(("model.layers.0", "model.layers.1"))}
    assert kept <= hooked(model) and "model.layers.2.self_attn.o_proj" not in hooked(model)
    ids = random_ids(2, 9)
    torch.testing.assert_close(model(ids).logits, shared_tiny("hybrid")(ids).logits)


def test_from_pretrained_takes_them_off(load_tiny, tmp_path):
    for kind, prefix in ((KimiLinearModel, ""), (KimiLinearForSequenceClassification, "model.")):
        layers = range(TINY_CONFIGS["hybrid"]["num_hidden_layers"])
        places = {f"{prefix}layers.{i}": "disk" if i == 1 else "cpu" for i in layers}
        places |= {f"{prefix}embed_tokens": "cpu", f"{prefix}norm": "cpu", "score": "cpu"}
        model = load_tiny("hybrid", kind, device_map=places, offload_folder=tmp_path)
        assert len(model.hf_device_map) == len(places)
        assert f"{prefix}layers.0" in hooked(model) and f"{prefix}layers.0.self_attn.o_proj" not in hooked(model)
        assert f"{prefix}layers.1.self_attn.o_proj" in hooked(model)


def test_a_removed_hook_leaves_a_plain_module(load_tiny, tmp_path):
    model = dispatched(load_tiny("hybrid"), tmp_path)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert hooked(model) == set() and all(hanging(module) is None for module in list(model.modules())[1:])
    model.lm_head.forward = partial(model.lm_head.forward)
    assert "forward that was replaced" in hanging(model.lm_head)


@pytest.mark.parametrize(("places", "message"), [
    ({"model.layers.0.mlp": 1}, r"splits model\.layers\.0 .*on cuda:0, model\.layers\.0\.mlp\..* on cuda:1"),
    ({"model.layers.1.self_attn.A_log": "cpu"}, r"splits model\.layers\.1 \(model\.layers\.1\.self_attn\.A_log on cpu"),
    ({"model.layers.2": None}, r"no place to model\.layers\.2\."),
    ({"lm_head": None}, r"no place to lm_head\.weight"),
    ({"model.norm": None, "": "cuda:1"}, None),
    ({"model.layers.0": "cuda:0", "model.layers.0.mlp": 0, "model.layers.1": torch.device("cuda", 1)}, None),
])  # fmt: skip
def test_maps_that_split_a_layer_or_leave_something_out(model, places, message):
    whole = dict.fromkeys(NAMES[: len(model.model.layers) + 1] + NAMES[-2:], 0)
    places = {name: place for name, place in {**whole, **places}.items() if place is not None}
    if message is None:
        check_device_map(model, places)
        return
    with pytest.raises(ValueError, match=message):
        check_device_map(model, places)


def test_the_boundary_refuses_such_maps(load_tiny, tmp_path):
    for places in ({"": "cpu", "model.layers.1.block_sparse_moe": "disk"}, {"model": "cpu"}):
        with pytest.raises(ValueError, match=r"device_map (splits|gives no place)"):
            load_tiny("hybrid", device_map=places, offload_folder=tmp_path)


class Elsewhere:
    """Stands for a layer on another device."""

    def __init__(self, layer, device):
        self.self_attn, self.device = layer.self_attn, torch.device(device)


def test_layers_are_handed_what_they_take(model, monkeypatch):
    """Once a device, and nothing is copied where it already is."""
    monkeypatch.setattr(carrying, "device_of_layer", lambda layer: layer.device)
    monkeypatch.setattr(carrying, "carried", lambda x, device: copies.append(device) or x.to("meta"))
    copies, x, mask = [], torch.zeros(1, 2, 8), torch.ones(1, 2)
    there = torch.device("meta")
    layer, padding = model.model.layers[0], object()
    held = carrying.Carrying(x, position_ids=mask, padding=padding, cu_seqlens=None)
    hidden, options = held.beside(Elsewhere(layer, "cpu"), x)
    assert hidden is x and options == {"position_ids": mask, "padding": padding, "cu_seqlens": None}
    assert held.beside(Elsewhere(layer, "meta"), x)[0] is x and not copies  # accelerate brings the weights
    other = torch.device("cuda", 1)
    hidden, options = held.beside(Elsewhere(layer, other), x)
    assert copies == [other, there] and options["position_ids"] is not mask and options["padding"] is padding
    again, same = held.beside(Elsewhere(layer, other), x)
    assert copies == [other, there, other] and same is options and again is not x
    with pytest.raises(ValueError, match=r"model\.layers\.0 is in torch\.float32 .* before it are in torch\.bfloat16"):
        held.beside(Elsewhere(layer, other), x.bfloat16())


def test_spread_prompts_take_shorter_segments(model, monkeypatch):
    monkeypatch.setattr(prompt_segments, "SEGMENT_TOKENS", 256)
    monkeypatch.setattr(prompt_segments, "SPREAD_SEGMENT_TOKENS", 128)
    ids = torch.zeros(1, 200, dtype=torch.int64)
    given = (ids, None, None, None, {})
    with torch.no_grad():
        assert not prompt_segments.takes_segments(model.model, *given)
        devices = iter(["cpu", *["meta"] * 99])
        monkeypatch.setattr(placement, "device_of_layer", lambda layer: next(devices))
        assert placement.is_spread(model.model)
        devices = iter(["cpu", *["meta"] * 99])
        assert prompt_segments.takes_segments(model.model, *given)


def test_progress_waits_for_segments_that_are_done(monkeypatch):
    """On a GPU the host launches up to two segments more before it waits for one and reports it."""
    notes, events = [], iter(range(9))

    class Event:
        def __init__(self):
            self.number = next(events)

        def synchronize(self):
            notes.append(f"wait {self.number}")

    stream = type("Stream", (), {"record_event": lambda self: Event()})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    progress = prompt_segments.Progress(lambda done, total: notes.append((done, total)), 50)
    for end in (16, 32, 48, 50):
        progress.launched(end, torch.device("cuda", 1))
        notes.append(f"launched {end}")
    progress.wait()
    reports = [
        "wait 0",
        (16, 50),
        "launched 48",
        "wait 1",
        (32, 50),
        "launched 50",
        "wait 2",
        (48, 50),
        "wait 3",
        (50, 50),
    ]
    assert notes == ["launched 16", "launched 32", *reports]
    prompt_segments.Progress(None, 50).launched(16, torch.device("cuda", 1))
    assert next(events) == 4  # nothing to wait for where nothing is reported
