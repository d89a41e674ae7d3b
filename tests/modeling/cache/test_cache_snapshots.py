"""Copies of a cache, in memory and in files: decoding goes on from them bit for bit, and not from what doesn't fit."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_checkpoints import tiny_config, write_checkpoint

from kimi_linear.modeling.cache.kimi_linear_cache import KDACacheLayer, KimiLinearCache
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

CONFIGS = ["hybrid", "all_kda", "all_mla"]


def tensors_of(cache: KimiLinearCache) -> list[torch.Tensor]:
    """Everything the cache holds, in order."""
    held = []
    for layer in cache.layers:
        held += [layer.state, layer.window] if isinstance(layer, KDACacheLayer) else [layer.keys, layer.values]
    return held


def assert_same_bits(a: KimiLinearCache, b: KimiLinearCache) -> None:
    assert a.get_seq_length() == b.get_seq_length()
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))


@torch.no_grad()
def run(model, *parts: torch.Tensor, cache: KimiLinearCache | None = None) -> KimiLinearCache:
    """`cache`, or a new one, behind the calls."""
    cache = KimiLinearCache(model.config) if cache is None else cache
    for part in parts:
        model(part, past_key_values=cache)
    return cache


# In memory


@pytest.mark.parametrize("name", CONFIGS)
def test_a_snapshot_can_be_restored_again_and_again(name, shared_tiny, random_ids):
    model, ids = shared_tiny(name), random_ids(2, 20)
    cache, expected = run(model, ids), run(model, ids)
    snapshot = cache.snapshot()
    assert snapshot.nbytes == cache.nbytes
    for seed in range(3):
        run(model, random_ids(2, 1 + 10 * seed, seed), cache=cache)
        cache.restore(snapshot)
        assert_same_bits(cache, expected)
    assert_same_bits(run(model, ids[:, :4], cache=cache), run(model, ids[:, :4], cache=expected))
    fresh = KimiLinearCache(model.config)
    fresh.restore(snapshot)
    run(model, ids[:, :4], cache=fresh)
    assert_same_bits(fresh, expected)


def test_an_empty_snapshot_and_other_batch_sizes(model, random_ids):
    cache = KimiLinearCache(model.config)
    empty = cache.snapshot()
    three = run(model, random_ids(3, 9)).snapshot()
    for rows in (1, 2):
        cache.restore(empty)
        assert (cache.get_seq_length(), cache.batch_size) == (0, -1)
        run(model, random_ids(rows, 5), cache=cache)
        cache.restore(three)
        assert (cache.get_seq_length(), cache.batch_size) == (9, 3)


def test_restoring_while_recording_starts_the_recording_anew(model, random_ids):
    ids = random_ids(2, 20)
    cache = KimiLinearCache(model.config)
    cache.activate_past_recording()
    run(model, ids, cache=cache)
    snapshot, expected = cache.snapshot(), cache.fork(1)[0]
    run(model, ids[:, :3], cache=cache)
    cache.restore(snapshot)
    with pytest.raises(ValueError, match="only the last 0"):
        cache.crop(-1)
    run(model, ids[:, :3], cache=cache)
    cache.crop(-3)
    assert_same_bits(cache, expected)


def test_forks_go_separate_ways(model, random_ids):
    ids = random_ids(1, 20)
    cache = KimiLinearCache(model.config)
    cache.activate_past_recording()
    run(model, ids, cache=cache)
    before, forks = [x.clone() for x in tensors_of(cache)], cache.fork(3)
    for i, fork in enumerate(forks):
        run(model, random_ids(1, 4, seed=i), cache=fork)
        fork.crop(24 - i)
        assert fork.get_seq_length() == 24 - i
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(cache), before, strict=True))
    forks[2].crop(20)
    assert_same_bits(forks[2], cache)
    with pytest.raises(ValueError, match="at least one"):
        cache.fork(0)


def test_best_of_n_from_one_prompt(model, random_ids):
    ids, n = random_ids(1, 9), 3
    cache, more = run(model, ids), random_ids(n, 4)
    forks = cache.fork(n)
    cache.batch_repeat_interleave(n)
    run(model, more, cache=cache)
    for row, fork in enumerate(forks):
        run(model, more[row : row + 1], cache=fork)
        for held, alone in zip(tensors_of(cache), tensors_of(fork), strict=True):
            torch.testing.assert_close(held[row], alone[0], atol=1e-5, rtol=1e-5)


def test_snapshots_of_other_models_are_refused(load_tiny, shared_tiny, random_ids):
    model, ids = shared_tiny("hybrid"), random_ids(1, 9)
    cache, expected = run(model, ids), run(model, ids)
    with pytest.raises(ValueError, match="made by another model: num_hidden_layers is 3 there and 4 here"):
        cache.restore(run(shared_tiny("all_kda"), ids).snapshot())
    with pytest.raises(ValueError, match="another model: layer 0 was filled by other weights"):
        cache.restore(run(load_tiny("hybrid"), ids).snapshot())
    with pytest.raises(ValueError, match=r"takes what snapshot\(\) returned, got KimiLinearCache"):
        cache.restore(expected)
    assert_same_bits(cache, expected)


# In files


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_prompt_goes_on_bit_for_bit(name, dtype, load_tiny, random_ids, tmp_path):
    model, ids, more = load_tiny(name, dtype=dtype), random_ids(2, 20), random_ids(2, 5, seed=1)
    cache = run(model, ids)
    cache.save(tmp_path / "prompt.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["prompt.safetensors"]
    loaded = KimiLinearCache.load(tmp_path / "prompt.safetensors", load_tiny(name, dtype=dtype))
    assert_same_bits(loaded, cache)
    loaded = KimiLinearCache.load(tmp_path / "prompt.safetensors", model)
    assert_same_bits(run(model, more, cache=loaded), run(model, more, cache=cache))


@pytest.mark.processes
def test_a_saved_prompt_in_another_process(tiny_folder, load_tiny, random_ids, tmp_path):
    model, ids = load_tiny("hybrid"), random_ids(1, 20)
    run(model, ids[:, :16]).save(tmp_path / "prompt.safetensors")
    program = f"""
import torch
from kimi_linear.modeling.cache.kimi_linear_cache import KimiLinearCache
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM
model = KimiLinearForCausalLM.from_pretrained({str(tiny_folder("hybrid"))!r}).eval()
cache = KimiLinearCache.load({str(tmp_path / "prompt.safetensors")!r}, model)
tokens = model.generate(torch.tensor({ids.tolist()}), past_key_values=cache, max_new_tokens=8, do_sample=False,
                        eos_token_id=None)
print("tokens", tokens.tolist())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert f"tokens {expected.tolist()}" in result.stdout, result.stderr[-2000:]


@pytest.fixture
def saved(model, random_ids, tmp_path):
    """A file with a cache of the shared model, to be damaged."""
    path = tmp_path / "prompt.safetensors"
    run(model, random_ids(1, 20)).save(path)
    return path


def rewrite(path, change_metadata=lambda metadata: None, change_tensors=lambda tensors: None) -> None:
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change_metadata(metadata)
    change_tensors(tensors)
    save_file(tensors, path, metadata=metadata)


def test_damaged_files_are_refused(model, saved):
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            KimiLinearCache.load(saved, model)
        assert str(saved) in str(error.value)

    content = saved.read_bytes()
    saved.write_bytes(content[: len(content) // 2])
    refused("no safetensors file or a damaged one")
    saved.write_bytes(b"no tensors at all")
    refused("no safetensors file or a damaged one")
    position = len(content) - 40
    saved.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    refused("is damaged: its tensors are not those that were saved")
    saved.write_bytes(content)
    rewrite(saved, change_tensors=lambda tensors: tensors.pop("layers.1.state"))
    refused("is damaged")
    saved.write_bytes(content)
    rewrite(saved, lambda metadata: metadata.update(version="2"))
    refused("format version '2' and this code reads '1'")
    saved.write_bytes(content)
    rewrite(saved, lambda metadata: metadata.pop("format"))
    refused(r"no cache that KimiLinearCache\.save wrote")
    saved.write_bytes(content)
    assert KimiLinearCache.load(saved, model).get_seq_length() == 20


def test_a_missing_file_is_reported_as_such(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        KimiLinearCache.load(tmp_path / "nothing", model)


def test_files_of_other_models_are_refused(saved, load_tiny, shared_tiny, tmp_path):
    with pytest.raises(ValueError, match="another model: num_hidden_layers is 4 there and 3 here"):
        KimiLinearCache.load(saved, shared_tiny("all_kda"))
    write_checkpoint(tmp_path / "other", tiny_config(), seed=1)
    other = KimiLinearForCausalLM.from_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"another model of the same shape: the decay rates \(A_log\) differ"):
        KimiLinearCache.load(saved, other)
    with pytest.raises(ValueError, match=r"made in torch\.float32 and the model is in torch\.bfloat16"):
        KimiLinearCache.load(saved, load_tiny("hybrid", dtype=torch.bfloat16))


def test_an_empty_cache_is_not_saved(model, tmp_path):
    with pytest.raises(ValueError, match="empty cache"):
        KimiLinearCache(model.config).save(tmp_path / "prompt.safetensors")
    assert not list(tmp_path.iterdir())
