"""What CI cannot run: the model on a CUDA device. `python -m pytest -m gpu`; recorded in benchmarks/results/."""

import pytest
import torch
from tiny_checkpoints import tiny_config, write_checkpoint

from kimi_linear.kernels.kda.dispatch import kda, resolve_kda_backend
from kimi_linear.kernels.kda.reference import recurrent_kda_reference
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, tiny_config())
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return KimiLinearForCausalLM.from_pretrained(folder, device_map={"": "cuda"})


def kda_inputs(length: int, heads: int = 4, dim: int = 64, dtype: torch.dtype = torch.bfloat16):
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to("cuda", dtype)

    tensors = [draw(2, length, heads, dim) for _ in range(4)] + [draw(2, length, heads)]
    gates = {"A_log": torch.rand(heads, generator=generator).cuda() * 4, "dt_bias": torch.zeros(heads * dim).cuda()}
    return tensors, gates


@pytest.mark.parametrize("backend", ["torch", "triton", "fla"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
def test_backends_follow_the_oracle_with_padding(backend, length):
    if backend == "fla":
        pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    (q, k, v, g, beta), gates = kda_inputs(length)
    if length > 1:  # padding after the first row, as the layer marks it
        g[0, length // 2 :] = float("-inf")
        beta[0, length // 2 :] = float("-inf")
    state = torch.randn(2, 4, 64, 64, device="cuda")
    o, final = kda(q, k, v, g, beta, **gates, initial_state=state, output_final_state=True, backend=backend)
    expected_o, expected = recurrent_kda_reference(q, k, v, g, beta, **gates, initial_state=state)
    # Inputs are shared with the oracle, so the error is that of bf16 products inside (fla stores q and k normalised in
    # bf16): 2^-8 relative, over sums that are not longer than a few hundred terms of random sign.
    for ours, wanted in ((o, expected_o), (final, expected)):
        error = (ours.double() - wanted).norm() / wanted.norm()
        assert error < 2**-7


def test_automatic_backend_is_a_gpu_kernel():
    x = torch.zeros(1, 1, 1, 128, device="cuda", dtype=torch.bfloat16)
    assert resolve_kda_backend("auto", x, 128) == "triton"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_greedy_text_equals_the_cpu(folder, backend):
    on_cpu = KimiLinearForCausalLM.from_pretrained(folder)
    on_gpu = KimiLinearForCausalLM.from_pretrained(folder, kda_backend=backend, device_map={"": "cuda"})
    prompt = torch.randint(0, 120, (2, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}
    expected = on_cpu.generate(prompt, attention_mask=mask, **options)
    assert torch.equal(on_gpu.generate(prompt.cuda(), attention_mask=mask.cuda(), **options).cpu(), expected)


def test_compiled_static_cache_equals_dynamic(model):
    prompt = torch.randint(0, 120, (2, 17), generator=torch.Generator().manual_seed(1)).cuda()
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    dynamic = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **options), dynamic)


def test_token_outside_the_vocabulary_leaves_the_device_usable(model):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model(torch.tensor([[5, 9999]], device="cuda"))
    assert torch.isfinite(model(torch.tensor([[5, 6]], device="cuda")).logits).all()


def test_gradients_are_finite_in_bf16(folder):
    model = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cuda"}).train()
    tokens = torch.randint(0, 120, (2, 200), device="cuda")
    model(tokens, labels=tokens).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
