"""
Nothing that hangs on the model is passed over by captured steps: in Triton's interpreter, against the layers.

Logits in fp32 agree as in test_decode_step_interpreted.py.
"""

from collections import OrderedDict
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from interpreted_steps import (
    MASK,
    PROMPT,
    close,
    few_programs,
    frozen,
    layer_by_layer,
    make_model,
    same_cache,
    stepping,
)
from torch import nn
from transformers.generation import BaseStreamer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.decode import path as decode_path

__all__ = ["few_programs", "frozen", "stepping"]  # fixtures
NEW = torch.tensor([[7]])


def steer(module):
    """Patch a module's forward on the instance, as steering vectors do."""
    forward = module.forward

    def steered(*args, **kwargs):
        output = forward(*args, **kwargs)
        return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1

    module.forward = steered


def replaced_weight(module):
    module.weight = nn.Parameter(module.weight.detach().flip(0).clone())


def moved_weight(model):
    """The model's cast and its way back: other values, perhaps at the old addresses."""
    model.half().float()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


def doubled(module, args, output):
    return 2 * output


def custom_experts(model):
    ALL_EXPERTS_FUNCTIONS.register("doubled_for_test", lambda self, x, index, weights: 0 * x)
    model.config._experts_implementation = "doubled_for_test"


CHANGES = {
    "hook on the final norm": lambda m: m.model.norm.register_forward_hook(doubled),
    "hook on the embedding": lambda m: m.model.embed_tokens.register_forward_hook(doubled),
    "hook on the head": lambda m: m.lm_head.register_forward_hook(doubled),
    "global hook": lambda m: nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if isinstance(module, nn.Embedding) else None
    ),
    "forward of a layer": lambda m: steer(m.model.layers[1]),
    "forward of a linear": lambda m: steer(m.model.layers[0].self_attn.o_proj),
    "forward of a convolution": lambda m: steer(m.model.layers[0].self_attn.q_conv1d),
    "forward of kv_b_proj": lambda m: steer(m.model.layers[1].self_attn.kv_b_proj),
    "forward of the decoder": lambda m: m.model.register_forward_hook(lambda module, args, output: None),
    "router's scaling": lambda m: setattr(m.model.layers[1].block_sparse_moe.gate, "scaling_factor", 9.0),
    "router's renormalisation": lambda m: setattr(m.model.layers[1].block_sparse_moe.gate, "renormalize", False),
    "router's count": lambda m: setattr(m.model.layers[1].block_sparse_moe.gate, "top_k", 1),
    "attention's scaling": lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.7),
    "epsilon": lambda m: setattr(m.model.norm, "variance_epsilon", 10.0),
    "experts' implementation": custom_experts,
    "a weight": lambda m: replaced_weight(m.model.layers[0].self_attn.o_proj),
    "the head's weight": lambda m: replaced_weight(m.lm_head),
    "a bias": lambda m: setattr(m.lm_head, "bias", nn.Parameter(torch.ones(128))),
    "a module": lambda m: setattr(m.model.layers[0].mlp, "up_proj", nn.Sequential(nn.Linear(64, 96), nn.SiLU())),
    "cast and back": moved_weight,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_two_forwards_of_ones_own_loop(change, stepping, frozen):
    model = make_model()
    cache = model(PROMPT[:1], use_cache=True).past_key_values
    model(NEW, past_key_values=cache)
    assert stepping == [(1, 1)]
    before = layer_by_layer(model, lambda: model(NEW, past_key_values=cache.fork(1)[0]).logits)
    handle = CHANGES[change](model)
    try:
        twin = cache.fork(1)[0]
        expected = layer_by_layer(model, lambda: model(NEW, past_key_values=twin).logits)
        assert change == "forward of the decoder" or not close(before, expected)  # the change counts
        assert close(model(NEW, past_key_values=cache).logits, expected)
        assert same_cache(cache, twin)
    finally:
        if hasattr(handle, "remove"):
            handle.remove()


@torch.no_grad()
def test_what_is_taken_away_is_noticed(stepping, frozen):
    model = make_model()
    cache = model(PROMPT[:1], use_cache=True).past_key_values
    handle = model.model.norm.register_forward_hook(doubled)
    steer(model.model.layers[1].self_attn.o_proj)
    model(NEW, past_key_values=cache)
    handle.remove()
    model(NEW, past_key_values=cache)
    assert not stepping
    del model.model.layers[1].self_attn.o_proj.forward
    model(NEW, past_key_values=cache)
    assert stepping == [(1, 1)]


def generate(model, **options):
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(PROMPT, attention_mask=MASK, **options).logits)


def test_changes_in_the_middle_of_generate(stepping, frozen):
    class Steers(BaseStreamer):
        def __init__(self, model):
            self.model, self.left = model, 4  # the prompt, and three tokens

        def put(self, value):
            self.left -= 1
            if self.left == 0:
                steer(self.model.model.layers[0])

        def end(self):
            del self.model.model.layers[0].forward

    model = make_model()
    prompt = PROMPT[1:]

    def steered():
        output = model.generate(prompt, streamer=Steers(model), max_new_tokens=6, do_sample=False, eos_token_id=None,
                                pad_token_id=0, return_dict_in_generate=True, output_logits=True)  # fmt: skip
        return torch.stack(output.logits)

    expected = layer_by_layer(model, steered)
    assert close(steered(), expected)
    assert stepping == [(1, 1)] * 2


def test_data_swapped_between_two_texts(stepping, frozen):
    model = make_model()
    before = generate(model)
    weight = model.model.layers[0].self_attn.o_proj.weight
    weight.data = weight.data.flip(0).clone()
    expected = layer_by_layer(model, lambda: generate(model))
    assert close(generate(model), expected) and not close(before, expected)
    assert len(stepping) == 8


def test_another_dtype(stepping, frozen):
    """fp16 rounds at 1e-3; logits of two ways agree to some of that."""
    model = make_model()
    generate(model)
    model.half()
    expected = layer_by_layer(model, lambda: generate(model))
    logits = generate(model)
    assert len(stepping) == 8 and float((logits - expected).norm() / expected.norm()) < 1e-2


def test_prompt_tuning_with_left_padding(stepping):
    """PEFT puts virtual tokens into the mask by its own prepare_inputs_for_generation on the instance."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    model = make_model()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = peft.get_peft_model(model, config).eval()
    wrapped.prompt_encoder.default.embedding.weight.data.normal_()
    expected = layer_by_layer(model, lambda: generate(wrapped))
    logits = generate(wrapped)
    assert close(logits, expected), [float((x - y).abs().max()) for x, y in zip(logits, expected)]
    assert stepping  # through forward, one token at a time
    assert close(generate(model), layer_by_layer(model, lambda: generate(model)))


def test_trl_and_accelerate_around_the_root(stepping):
    trl_utils, accelerate = pytest.importorskip("trl.trainer.utils"), pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # a trainer's, of another test
    model = make_model()
    expected = layer_by_layer(model, lambda: generate(model))
    trl_utils.add_fused_lm_head(model)
    assert close(generate(model), expected) and len(stepping) == 4
    accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model, evaluation_mode=True)
    stepping.clear()
    expected = layer_by_layer(model, lambda: generate(model))
    assert torch.equal(generate(model), expected) and not stepping  # fp32 weights under autocast to bf16
    assert "one forward at a time, since the model has a forward" in model.decode_path
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@torch.no_grad()
def test_float32_under_autocast(stepping):
    """The prompt leaves bf16 windows; a step that took them for fp32 would write past their end."""
    model, new = make_model(), torch.tensor([[7], [8]])

    def run(tokens_inside, tokens_outside):
        with torch.autocast("cpu", torch.bfloat16):
            cache = model(PROMPT, attention_mask=MASK, use_cache=True).past_key_values
            logits = [model(new, past_key_values=cache).logits for _ in range(tokens_inside)]
        logits += [model(new, past_key_values=cache).logits for _ in range(tokens_outside)]
        return torch.cat(logits, dim=1).float(), cache

    for tokens in ((2, 0), (0, 1), (1, 1)):
        expected, wanted = layer_by_layer(model, partial(run, *tokens))
        logits, cache = run(*tokens)
        assert torch.equal(logits, expected) and same_cache(cache, wanted) and not stepping
    expected, wanted = layer_by_layer(model, partial(run, 0, 2))
    logits, cache = run(0, 2)  # the first token outside goes by the layers, which leave fp32 windows
    assert close(logits, expected) and same_cache(cache, wanted) and stepping == [(2, 1)]
    with torch.autocast("cpu", torch.bfloat16):
        cache = model(PROMPT, attention_mask=MASK, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"layer 0 of past_key_values holds windows .* of torch.bfloat16 on cpu"):
        model._decode.step(model, 2, 1).prepare(cache, new)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["strided", "transposed", "integers"])
def test_masks_of_any_layout(layout, stepping):
    model = make_model()
    mask = torch.nn.functional.pad(MASK, (0, 1), value=1)
    wide = torch.zeros(2, 20, dtype=torch.bool)
    wide[:, ::2] = mask.bool()
    given = {"strided": wide[:, ::2], "transposed": mask.bool().t().contiguous().t(), "integers": mask}[layout]
    cache = model(PROMPT, attention_mask=MASK, use_cache=True).past_key_values
    twin, new = cache.fork(1)[0], torch.tensor([[7], [8]])
    expected = layer_by_layer(model, lambda: model(new, attention_mask=mask, past_key_values=twin).logits)
    assert close(model(new, attention_mask=given, past_key_values=cache).logits, expected)
    assert stepping == [(2, 1)]
    if layout == "strided":
        with pytest.raises(ValueError, match="dense in its last dimension"):
            model._decode.step(model, 2, 1).prepare(cache, new, wide[:, ::2])


def test_masks_elsewhere_are_refused_by_the_step(stepping):
    """A step reads the mask by address: one on another device would hand it an address of that device."""
    inputs = make_model()._decode.step(make_model(), 2, 1).inputs
    inputs.check_mask(torch.ones(1, 9, dtype=torch.bool).expand(2, 9), 7)
    for mask, what in (
        (torch.ones(2, 7, dtype=torch.bool, device="meta"), "on meta"),
        (torch.ones(2, 7), "torch.float32"),
        (torch.ones(2, 6, dtype=torch.bool), r"at least 7\] on cpu.*got \[2, 6\]"),
        (torch.ones(1, 7, dtype=torch.bool), r"got \[1, 7\]"),
    ):
        with pytest.raises(ValueError, match=what):
            inputs.check_mask(mask, 7)


def test_steps_are_dropped_within_the_lock(stepping):
    class Watched(OrderedDict):
        def clear(self):
            assert path._lock._is_owned()
            super().clear()
            cleared.append(True)

    model, cleared = make_model(), []
    path = model._decode
    step = path.step(model, 1, 1)
    path._steps = Watched(path._steps)
    model.model.norm.variance_epsilon = 0.1
    assert path.step(model, 1, 1) is not step and cleared == [True]


@torch.no_grad()
@pytest.mark.parametrize("what", ["strides", "rows", "length", "float64"])
def test_caches_that_a_step_would_misread(what, stepping):
    model = make_model()
    cache = model(PROMPT[:1], use_cache=True).past_key_values
    step, layer = model._decode.step(model, 1, 1), cache.layers[0]
    if what == "strides":
        layer.state = layer.state.transpose(2, 3)
    elif what == "rows":
        layer.window = layer.window.repeat(2, 1, 1)
    elif what == "length":
        cache.layers[1].storage = cache.layers[1].storage[:, :3].contiguous()
    else:
        layer.state = layer.state.double()
    with pytest.raises(ValueError, match="past_key_values holds"):
        step.prepare(cache, NEW)
    assert not stepping


@torch.no_grad()
def test_drafts_of_any_length_do_not_evict_one_another(stepping):
    model = make_model()
    steps = [model._decode.step(model, 1, tokens) for tokens in range(1, 17)]
    assert all(model._decode.step(model, 1, tokens) is steps[tokens - 1] for tokens in range(16, 0, -1))


def test_kept_steps_are_bounded_by_bytes(stepping, monkeypatch):
    model = make_model()
    first = model._decode.step(model, 1, 1)
    monkeypatch.setattr(decode_path, "_KEPT_BYTES", 2 * first.nbytes)
    model._decode.step(model, 1, 2)
    assert [key[1:] for key in model._decode._steps] == [(1, 2)] or sum(
        s.nbytes for s in model._decode._steps.values()
    ) <= 2 * first.nbytes
    assert model._decode.step(model, 1, 1) is not first


@torch.no_grad()
def test_a_draft_of_the_default_assistant_goes_by_steps(stepping):
    """Twenty drafted tokens and the one before them, verified in parts and taken back."""
    model, drafts = make_model(), torch.arange(21)[None] + 30
    caches = []
    for _ in range(2):
        cache = KimiLinearCache(model.config)
        cache.activate_past_recording()
        caches.append(model(PROMPT[1:], past_key_values=cache).past_key_values)
    expected = layer_by_layer(model, lambda: model(drafts, past_key_values=caches[1]).logits)
    assert close(model(drafts, past_key_values=caches[0]).logits, expected)
    assert stepping == [(1, 16), (1, 5)]
    assert "16 new tokens of a sequence and 512 of all" in model.decode_path
    for cache in caches:
        cache.crop(-20)
    assert same_cache(*caches)


class Recorded:
    """Stands for a CUDA graph or event: notes what happens in which order."""

    def __init__(self, notes):
        self.notes = notes

    def replay(self):
        self.notes.append("replay")

    def record(self, stream):
        self.notes.append("record")


def test_the_event_follows_the_copy_of_the_logits(stepping, monkeypatch):
    model, notes = make_model(), []
    step = model._decode.step(model, 1, 1)
    step.parts[0]._graph = step.parts[0]._done = Recorded(notes)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 5})())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: notes.append("keep"))
    step.run(lambda logits: notes.append("copy"))
    kept = len(step.plan.buffers())
    assert notes == ["keep"] * kept + ["replay", "copy", "record"] and kept > 10
    notes.clear()
    with pytest.raises(KeyboardInterrupt):
        step.run(lambda logits: (_ for _ in ()).throw(KeyboardInterrupt))
    assert notes == ["replay", "record"]
