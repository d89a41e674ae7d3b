"""Prompts on a CUDA device: fused kernels against PyTorch's operators, segments against one piece. `pytest -m gpu`."""

import pytest
import torch
import torch.nn.functional as F
from tiny_checkpoints import tiny_config, write_checkpoint

from kimi_linear.configuration.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.kernels.gpu import availability as gpu_availability
from kimi_linear.kernels.prompt.attention_lse import attention_with_lse, merge_attention
from kimi_linear.kernels.prompt.short_convolution import causal_short_conv
from kimi_linear.modeling.generate import mixin as generate_mixin
from kimi_linear.modeling.layers import masks as layers_masks
from kimi_linear.modeling.layers import mla_attention
from kimi_linear.modeling.layers.moe import KimiMLP, KimiSparseMoeBlock
from kimi_linear.modeling.layers.norms import KimiRMSNorm, KimiRMSNormGated
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM
from kimi_linear.modeling.prompt import segments as prompt_segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def no_packed_prompts(monkeypatch):
    """The layers' own passes, which models with hooks run; tests/gpu/test_packed_prompts_gpu.py has the packed ones."""
    monkeypatch.setattr(generate_mixin, "may_serve", lambda *args: False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, tiny_config(), dtype=torch.bfloat16)
    return KimiLinearForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": "cuda"}).eval()


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """The same weights in fp32 on PyTorch's operators."""
    folder = tmp_path_factory.mktemp("tiny32")
    write_checkpoint(folder, tiny_config(), dtype=torch.bfloat16)
    return KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def plain(patch):
    patch.setattr(gpu_availability, "device_serves", lambda device: False)


def relative(x, y):
    return float((x.double() - y.double()).norm() / y.double().norm())


def draw(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to("cuda", dtype)


def both(module, *args, **kwargs):
    """Outputs on the fused path and on PyTorch's operators."""
    with torch.no_grad():
        fused = module(*args, **kwargs)
        with pytest.MonkeyPatch.context() as patch:
            plain(patch)
            return fused, module(*args, **kwargs)


@pytest.mark.parametrize("size", [128, 512, 2304])
def test_norms(size):
    x, other = draw(2, 65, size), draw(2, 65, size, seed=1)
    norm, gated = (cls(size, 1e-5).to("cuda", torch.bfloat16) for cls in (KimiRMSNorm, KimiRMSNormGated))
    norm.weight.data = gated.weight.data = draw(size, seed=2)
    pairs = [both(norm, x), both(gated, x, other), *zip(*both(norm, x, other))]
    for ours, want in pairs:
        # fp32 inside in another order: a rounding boundary is met here and there.
        assert (ours != want).float().mean() < 0.01
        assert relative(ours, want) < 2**-11


@pytest.mark.parametrize("T", [1, 3, 64, 1000])
def test_short_convolution(T):
    x, weight, window = draw(2, T, 2 * 512)[..., 512:], draw(512, 1, 4), draw(2, 512, 3)
    lengths = torch.tensor([T, T // 2], device="cuda")
    ends = torch.tensor([0, T // 3, T // 3, T], device="cuda", dtype=torch.int32)
    cases = [
        ({}, x),
        ({"window": window}, x),
        ({"window": window, "lengths": lengths}, x),
        ({"cu_seqlens": ends}, x[:1]),
    ]
    for options, inputs in cases:
        (y, after), (want, want_after) = both(causal_short_conv, inputs, weight, **options)
        assert torch.equal(after, want_after)
        if "lengths" in options:
            y, want = y[:, : T // 2], want[:, : T // 2]
        assert y.numel() == 0 or relative(y, want) < 2**-11


def test_experts_and_mlp():
    config = KimiLinearConfig.from_dict(
        tiny_config(num_experts=16, hidden_size=256, moe_intermediate_size=64, head_dim=64)
    )
    config._experts_implementation = "grouped_mm"
    block = KimiSparseMoeBlock(config).to("cuda", torch.bfloat16).eval()
    for i, parameter in enumerate(block.parameters()):
        parameter.data = draw(*parameter.shape, seed=i) * parameter.shape[-1] ** -0.5
    with torch.no_grad():
        assert block._takes_grouped(draw(3, 256))
    for tokens in (1, 65, 1000):
        x = draw(1, tokens, 256)
        ours, want = both(block, x)
        # Up to five roundings to bf16 in either, at other places.
        assert relative(ours, want) < 2**-8
        ours, want = both(block.gate, x[0])
        assert relative(ours[0], want[0]) < 1e-6
        assert torch.equal(ours[2].sort(1).values, want[2].sort(1).values)
        torch.testing.assert_close(ours[1].sort(1).values, want[1].sort(1).values, rtol=1e-4, atol=1e-6)
    mlp = KimiMLP(256, 512).to("cuda", torch.bfloat16)
    ours, want = both(mlp, draw(3, 50, 256))
    assert relative(ours, want) < 2**-9


@pytest.mark.parametrize("sizes", [(192, 128), (24, 16)])
@pytest.mark.parametrize(("T", "L", "causal"), [(300, 300, True), (300, 1000, False), (17, 64, False)])
def test_library_attention_and_its_normaliser(T, L, causal, sizes):
    query, key = draw(2, T, 4, sizes[0]).transpose(1, 2), draw(2, L, 4, sizes[0], seed=1).transpose(1, 2)
    value = draw(2, L, 4, 2 * sizes[1], seed=2)[..., sizes[1] :].transpose(1, 2)
    scale = sizes[0] ** -0.5
    scores = query.double() @ key.double().transpose(2, 3) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(T, L, dtype=torch.bool, device="cuda").triu(1), float("-inf"))
    output, lse = attention_with_lse(query, key, value, causal=causal, scale=scale)
    assert relative(output, scores.softmax(-1) @ value.double()) < 2**-7
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=2e-3)


def test_merged_blocks():
    query, key, value = (draw(2, n, 4, d, seed=n).transpose(1, 2) for n, d in ((100, 192), (900, 192), (900, 128)))
    whole = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    total, lse = attention_with_lse(query, key[:, :, :500], value[:, :, :500], causal=False, scale=192**-0.5)
    total, lse = total.transpose(1, 2).float().contiguous(), lse.contiguous()
    for block in (slice(500, 501), slice(501, 900)):
        part, part_lse = attention_with_lse(query, key[:, :, block], value[:, :, block], causal=False, scale=192**-0.5)
        merge_attention(total, lse, part.transpose(1, 2), part_lse)
    assert relative(total.transpose(1, 2), whole) < 2**-7


def errors(model, exact, ids, **options):
    """Relative errors of the logits against fp32, on the fused path and on PyTorch's operators."""
    with torch.no_grad():
        want = exact(ids, **options).logits
        on_gpu = {name: value.cuda() for name, value in options.items()}
        fused, ordinary = both(model, ids.cuda(), **on_gpu)
    keep = options.get("attention_mask", torch.ones_like(ids)).bool()
    return [relative(x.logits.cpu()[keep], want[keep]) for x in (fused, ordinary)]


@pytest.mark.parametrize("case", ["whole", "left", "right", "packed"])
def test_model_is_as_near_to_fp32_as_on_the_ordinary_path(case, model, exact):
    ids = torch.randint(0, 120, (2, 150), generator=torch.Generator().manual_seed(0))
    options = {}
    if case in ("left", "right"):
        mask = torch.ones_like(ids)
        mask[0, slice(0, 40) if case == "left" else slice(90, None)] = 0
        options["attention_mask"] = mask
    if case == "packed":
        ids = ids[:1]
        options["position_ids"] = torch.cat([torch.arange(60), torch.arange(90)])[None]
    fused, ordinary = errors(model, exact, ids, **options)
    print(f"{case}: fused {fused:.4f} ordinary {ordinary:.4f}")
    assert fused < 1.25 * ordinary + 2**-9


@pytest.mark.parametrize("large_mask", [0, 1 << 28])
@pytest.mark.parametrize("padded", [False, True])
def test_segments_are_as_near_to_fp32_as_one_piece(padded, large_mask, model, exact, monkeypatch):
    """With padding once with masks and once without. In a model this small one other choice of an expert moves a token
    by percents, so that neither can be asked to equal the other."""
    ids = torch.randint(0, 120, (2, 500), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :100] = 1 - padded
    monkeypatch.setattr(layers_masks, "_LARGE_MASK", large_mask)
    with torch.no_grad():
        want = exact(ids, attention_mask=mask)
        whole = model(ids.cuda(), attention_mask=mask.cuda())
        monkeypatch.setattr(prompt_segments, "SEGMENT_TOKENS", 256)
        monkeypatch.setattr(mla_attention, "_EXPANDED_ROWS", 200)
        cut = model(ids.cuda(), attention_mask=mask.cuda())
    keep = mask.bool()
    of_cut, of_whole, apart = (
        relative(a.logits.cpu()[keep], b.logits.cpu()[keep]) for a, b in ((cut, want), (whole, want), (cut, whole))
    )
    print(f"padded {padded}: cut {of_cut:.4f} whole {of_whole:.4f} apart {apart:.4f}")
    assert of_cut < 1.25 * of_whole + 2**-9
    for a, b, c in zip(cut.past_key_values.layers, whole.past_key_values.layers, want.past_key_values.layers):
        if hasattr(a, "state"):
            assert relative(a.state.cpu(), c.state) < 1.25 * relative(b.state.cpu(), c.state) + 2**-9


@torch.no_grad()
def test_layers_wait_for_nothing(model):
    """No value is read back from the GPU inside the layers of a prompt."""
    cache, x = None, model.model.embed_tokens(torch.randint(0, 120, (1, 300), device="cuda"))
    cache = model(inputs_embeds=x).past_key_values  # compiles
    for past in (None, cache):
        mask = mla_attention.CausalOverCache()
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            hidden_states = x
            for layer in model.model.layers:
                hidden_states = layer(hidden_states, attention_mask=mask, past_key_values=past)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(hidden_states).all()
