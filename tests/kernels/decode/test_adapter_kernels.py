"""The kernels of adapters in the decode step, compiled for the GPU classes they claim at the released shape."""

import itertools

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("peft")

import peft
from offline_compile import SHARED_LIMIT, TARGETS, compiling, resources
from test_decode_kernels import KERNELS, model  # noqa: F401

from kimi_linear.kernels.decode import adapters, expert_adapters
from kimi_linear.modeling.decode.step import DecodeStep

ADAPTERS = [
    adapters.decode_adapter_down_kernel,
    adapters.decode_adapter_down_rows_kernel,
    adapters.decode_adapter_up_kernel,
    expert_adapters.decode_expert_adapter_kernel,
    expert_adapters.decode_grouped_adapter_kernel,
]


@pytest.mark.parametrize(
    ("gpu", "batch", "dtype"), [*itertools.product(TARGETS, [1, 64], [torch.float32]), ("sm_90", 1, torch.bfloat16)]
)
def test_adapters_compile_and_fit(gpu, batch, dtype, model, monkeypatch):  # noqa: F811
    config = peft.LoraConfig(
        r=16, target_modules=["q_proj", "k_proj", "o_proj"], target_parameters=["experts.gate_up_proj"]
    )
    with torch.device("meta"):
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    try:
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        step = DecodeStep(model, batch, 1)
        step.plan._gpu, step.plan._pdl = gpu, gpu in ("sm_90", "sm_100")
        with compiling([*KERNELS, *ADAPTERS], TARGETS[gpu], monkeypatch) as compiled:
            step.plan.launch()
    finally:
        wrapped.unload()
    names = {name for name, _ in compiled}
    one = {"decode_adapter_down_kernel", "decode_expert_adapter_kernel"}
    several = {"decode_adapter_down_rows_kernel", "decode_grouped_adapter_kernel"}
    assert (one if batch == 1 else several) | {"decode_adapter_up_kernel"} <= names
    for name, kernel in {kernel.hash: (name, kernel) for name, kernel in compiled}.values():
        registers, spilled = resources(kernel, TARGETS[gpu].backend)
        print(f"{gpu:7} batch {batch:2} {name:32} registers {registers:3} spilled {spilled:4} {kernel.metadata.shared}")
        assert kernel.metadata.shared <= (99 << 10 if gpu == "sm_80" else SHARED_LIMIT[gpu]), name
        assert gpu != "sm_90" or spilled <= 128, (name, spilled)
