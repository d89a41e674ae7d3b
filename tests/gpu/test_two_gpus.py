"""A model that is not on the current GPU, and one that accelerate spread over two. `python -m pytest -m gpu`."""

import threading

import pytest
import torch
from tiny_checkpoints import tiny_config, write_checkpoint

from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.decode import hand_over
from kimi_linear.modeling.decode import path as decode_path
from kimi_linear.modeling.decode.step_part import StepPart
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM
from kimi_linear.modeling.prompt import segments as prompt_segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
NAMES = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(5)), "model.norm", "lm_head"]
MAPS = {
    "on the second": {"": 1},
    "on both": dict(zip(NAMES, [0, 0, 0, 1, 1, 1, 1, 1])),
    "alternating": dict(zip(NAMES, [0, 0, 1, 0, 1, 0, 1, 1])),
    "uneven": dict(zip(NAMES, [1, 0, 0, 0, 0, 1, 1, 1])),
    "only the head": dict(zip(NAMES, [0, 0, 0, 0, 0, 0, 0, 1])),
    "head and norm apart": dict(zip(NAMES, [1, 1, 1, 0, 0, 0, 0, 1])),
}
OPTIONS = {"max_new_tokens": 20, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, tiny_config(kda_layers=(1, 2, 3), full_attn_layers=(4, 5)))
    return folder


def load(folder, device_map):
    return KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device_map).eval()


@pytest.fixture(scope="module")
def on_one(folder):
    return load(folder, {"": 0})


@pytest.fixture(scope="module", params=MAPS)
def elsewhere(request, folder):
    return load(folder, MAPS[request.param])


def random_ids(batch, length):
    return torch.randint(0, 120, (batch, length), generator=torch.Generator().manual_seed(length))


def greedy(model, ids, **options):
    return model.generate(ids.to(model.device), do_sample=False, eos_token_id=119, **OPTIONS, **options).cpu()


@torch.no_grad()
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 70), (1, 1000)])
def test_logits(on_one, elsewhere, batch, length, monkeypatch):
    """fp32 to 1e-5 of the norm, in one piece and in segments, after a cache and before one."""
    monkeypatch.setattr(prompt_segments, "SEGMENT_TOKENS", 256)
    assert torch.cuda.current_device() == 0
    ids, caches = random_ids(batch, length + 3), [KimiLinearCache(model.config) for model in (on_one, elsewhere)]
    mask = torch.ones_like(ids)
    mask[0, 0] = int(batch == 1)
    for begin, end in ((0, length), (length, length + 3)):
        exact, logits = (
            model(
                ids[:, begin:end].to(model.device), attention_mask=mask[:, :end].to(model.device), past_key_values=cache
            ).logits.cpu()
            for model, cache in zip((on_one, elsewhere), caches)
        )
        seen = mask[:, begin:end].bool()
        assert float((logits - exact)[seen].norm() / exact[seen].norm()) < 1e-5


def test_greedy_text(on_one, elsewhere):
    ids = random_ids(2, 40)
    assert elsewhere.decode_path.startswith("captured steps")
    assert torch.equal(greedy(elsewhere, ids), greedy(on_one, ids))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    text = [greedy(model, ids, attention_mask=mask.to(model.device)) for model in (elsewhere, on_one)]
    assert torch.equal(*text)


def test_prompt_lookup(on_one, elsewhere):
    ids = random_ids(1, 12).repeat(1, 3)
    assert torch.equal(greedy(elsewhere, ids, prompt_lookup_num_tokens=4), greedy(on_one, ids))


def test_thousands_of_steps(on_one, elsewhere):
    """The text of one GPU, token by token, and no memory that grows; in two streams of each GPU in turn."""
    ids, steps = random_ids(3, 8), 2000
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": steps}
    wanted = on_one.generate(ids.to(on_one.device), **options).cpu()
    used = []
    for _ in range(3):
        assert torch.equal(elsewhere.generate(ids.to(elsewhere.device), **options).cpu(), wanted)
        used.append([torch.cuda.memory_allocated(device) for device in (0, 1)])
    assert used[1] == used[2]


def test_threads(on_one, elsewhere):
    """Each with a cache and streams of its own; steps are shared."""
    prompts = [random_ids(1, 20 + i) for i in range(4)]
    wanted, got = [greedy(on_one, ids) for ids in prompts], {}

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream(0)), torch.cuda.stream(torch.cuda.Stream(1)):
            for _ in range(3):
                got.setdefault(i, []).append(greedy(elsewhere, prompts[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(text, wanted[i]) for i in range(4) for text in got[i]) and len(got) == 4


def test_a_cache_saved_on_one_split_goes_on_on_another(on_one, elsewhere, tmp_path):
    ids = random_ids(1, 30)
    output = on_one.generate(ids.to(on_one.device), do_sample=False, return_dict_in_generate=True, **OPTIONS)
    output.past_key_values.save(tmp_path / "cache.safetensors")
    cache = KimiLinearCache.load(tmp_path / "cache.safetensors", elsewhere)
    wanted = greedy(on_one, output.sequences.cpu(), past_key_values=output.past_key_values)
    assert torch.equal(greedy(elsewhere, output.sequences.cpu(), past_key_values=cache), wanted)


def test_an_interruption_between_two_parts(on_one, elsewhere, monkeypatch):
    """The loop finishes the step that it divided."""
    ids, seen = random_ids(1, 30), []
    wanted = greedy(on_one, ids)
    cache = KimiLinearCache(elsewhere.config)
    run = StepPart.run

    def interrupted(part):
        seen.append(part)
        if len(seen) == 3 * len(elsewhere._decode.step(elsewhere, 1, 1).parts):  # before the last part of the third
            raise KeyboardInterrupt
        run(part)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StepPart, "run", interrupted)
        greedy(elsewhere, ids, past_key_values=cache)
    several = len(elsewhere._decode.step(elsewhere, 1, 1).parts) > 1
    assert cache.get_seq_length() == (33 if several else 32)
    text = wanted[:, :33]
    options = {**OPTIONS, "max_new_tokens": 17, "do_sample": False, "eos_token_id": 119}
    assert torch.equal(elsewhere.generate(text.to(elsewhere.device), past_key_values=cache, **options).cpu(), wanted)


def test_through_the_host(on_one, elsewhere, monkeypatch):
    """As between GPUs that can't reach each other's memory."""
    monkeypatch.setattr(hand_over, "_reaches", lambda source, target: source == target)
    elsewhere._decode._steps.clear()
    ids = random_ids(2, 50)
    assert torch.equal(greedy(elsewhere, ids), greedy(on_one, ids))
    elsewhere._decode._steps.clear()


def test_adapters(folder):
    """LoRA around linears of both GPUs; its factors are where their linear is."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["o_proj", "up_proj"], init_lora_weights=False, r=4)
    wrapped = [peft.get_peft_model(load(folder, places), config).eval() for places in ({"": 0}, MAPS["on both"])]
    factors = [{n: p for n, p in model.named_parameters() if "lora_" in n} for model in wrapped]
    with torch.no_grad():
        for name, factor in factors[1].items():
            factor.copy_(factors[0][name])
    assert {factor.device.index for factor in factors[1].values()} == {0, 1}
    ids = random_ids(2, 30)
    texts = [greedy(model, ids) for model in wrapped]
    assert torch.equal(*texts)
    with wrapped[1].disable_adapter():
        assert not torch.equal(greedy(wrapped[1], ids), texts[0])


def test_loading_takes_no_more_than_the_weights_and_a_layer(folder):
    """Straight to each device: the most that is allocated on a GPU is what it holds, and two stacks of experts."""
    for device in (0, 1):
        torch.cuda.reset_peak_memory_stats(device)
    before = [torch.cuda.memory_allocated(device) for device in (0, 1)]
    model = load(folder, MAPS["on both"])
    stacks = 2 * max(x.nbytes for x in model.parameters())
    for device in (0, 1):
        held = torch.cuda.memory_allocated(device) - before[device]
        assert 0 < held <= torch.cuda.max_memory_allocated(device) - before[device] <= held + stacks + 2**21


def test_batches_that_are_cut_by_rows(on_one, elsewhere, monkeypatch):
    """Rows in turn: while the last layers take some, the first take the next."""
    ids = random_ids(7, 30)
    wanted = greedy(on_one, ids)
    monkeypatch.setattr(decode_path, "MAX_STEP_TOKENS", 2)
    assert torch.equal(greedy(elsewhere, ids), wanted)


@torch.no_grad()
def test_tokens_taken_back(elsewhere):
    ids = random_ids(2, 60).to(elsewhere.device)
    cache, new = KimiLinearCache(elsewhere.config), random_ids(2, 6).to(elsewhere.device)
    cache.activate_past_recording()
    elsewhere(ids, past_key_values=cache)
    logits = [elsewhere(new[:, i : i + 1], past_key_values=cache).logits for i in range(6)]
    cache.crop(-4)
    again = [elsewhere(new[:, i : i + 1], past_key_values=cache).logits for i in range(2, 6)]
    assert all(torch.equal(x, y) for x, y in zip(again, logits[2:]))
    assert elsewhere(new, past_key_values=cache).logits.device == elsewhere.device  # where the inputs are
