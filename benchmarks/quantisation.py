"""What quantising costs on the small checkpoint: our recipes beside the round to nearest of llm-compressor and torchao.

    python -m benchmarks.quantisation [--out result.json]

All quantise the same layers to the same format; what differs is how scales are chosen. Ours is `quantize` of the
command line, its folder loaded packed. llm-compressor's is its data-free QuantizationModifier, made here by the
functions of compressed-tensors that it calls, because it is pinned to other versions than this package
(docs/quantisation.md says how the two were compared). torchao's are `IntxWeightOnlyConfig(int4, PerGroup(32))` and
`Float8WeightOnlyConfig()`. These two are dequantised to bf16 and loaded dense: packed weights are dequantised to bf16,
too, when they are used.

Of each: root of the summed squares of the weights' errors by that of the weights; loss on the held-out text, in nats a
token; KL divergence from the unquantised model, in nats a token; the share of equal greedy tokens; the greedy text.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from benchmarks.record import default_path, write
from kimi_linear.hub_card.exporter import ExportRequest, export
from kimi_linear.hub_card.quantising.folder import QuantiseRequest, quantise
from kimi_linear.hub_card.quantising.measure import Reading, divergence, read
from kimi_linear.hub_card.quantising.recipes import RECIPES, quantization_config
from kimi_linear.kernels.weights.formats import WeightFormat
from kimi_linear.kernels.weights.handle import WeightHandle
from kimi_linear.modeling.checkpoint.schemes import Schemes
from kimi_linear.modeling.modeling_kimi_linear import KimiLinearForCausalLM

Rule = Callable[[torch.Tensor, WeightFormat], torch.Tensor]


def llm_compressor(weight: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    """Round to nearest as llm-compressor's observer and compressed-tensors do it, dequantised."""
    kind = {"type": "float", "num_bits": 8, "strategy": "channel"}
    if format.block is not None:
        kind = {"type": "int", "num_bits": format.bits, "strategy": "group", "group_size": format.block[1]}
    args = QuantizationArgs(**kind)
    groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    return dequantize(quantize(weight, scale, zero_point, args, dtype=args.pytorch_dtype()), scale, args=args)


def torchao(weight: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    """Round to nearest as torchao does it, dequantised."""
    from torchao.quantization import Float8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = Float8WeightOnlyConfig()
    if format.block is not None:
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(format.block[1]))
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    holder = nn.ModuleList([linear])
    quantize_(holder, config)
    return holder[0].weight.dequantize().to(weight.dtype)


def dense_folder(source: Path, recipe: str, rule: Rule, out: Path) -> Path:
    """A copy of `source` whose layers have been through a rule."""
    shutil.copytree(source, out)
    schemes = Schemes(quantization_config(RECIPES[recipe]))
    tensors = load_file(source / "model.safetensors")
    for name, weight in tensors.items():
        if is_quantised(name, weight, schemes):
            tensors[name] = rule(weight, schemes.format_of(name.removesuffix(".weight")))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def is_quantised(name: str, tensor: torch.Tensor, schemes: Schemes) -> bool:
    """Whether a tensor of the released layout is quantised by a recipe."""
    linear = (
        tensor.ndim == 2 and name.endswith(".weight") and not name.endswith(("embed_tokens.weight", ".gate.weight"))
    )
    return linear and schemes.format_of(name.removesuffix(".weight")) is not None


def weights_error(source: Path, folder: Path, recipe: str) -> float:
    """The relative error of all quantised weights of a folder, packed or dense."""
    schemes = Schemes(quantization_config(RECIPES[recipe]))
    before, after = (load_file(path / "model.safetensors") for path in (source, folder))
    error = energy = 0.0
    for name, weight in before.items():
        if not is_quantised(name, weight, schemes):
            continue
        layer, format = name.removesuffix(".weight"), schemes.format_of(name.removesuffix(".weight"))
        made = after.get(name)
        if f"{layer}.weight_scale" in after:
            parts = (after[f"{layer}.{format.disk_name(part)}"] for part in ("packed", "scale"))
            made = WeightHandle(format, tuple(weight.shape), *parts).dequantize()
        error += (weight.double() - made.double()).square().sum().item()
        energy += weight.double().square().sum().item()
    return (error / energy) ** 0.5


def measure(folder: Path, reference: Reading | None) -> tuple[Reading, dict[str, Any]]:
    """What a folder's model says of the text, and that compared with the reference."""
    reading = read(KimiLinearForCausalLM.from_pretrained(folder, dtype="auto"), AutoTokenizer.from_pretrained(folder))
    kl, agreement = (0.0, 1.0) if reference is None else divergence(reference, reading)
    return reading, {"loss": reading.loss, "kl": kl, "agreement": agreement, "text": " ".join(reading.text.split())}


def run(root: Path) -> list[dict[str, Any]]:
    """One row for the unquantised checkpoint, and one for each recipe and rule; prints them as they come."""
    source = root / "small"
    export(ExportRequest(source))
    reference, row = measure(source, None)
    rows = [{"recipe": "none", "scales": "", "weights": 0.0, **row}]
    print(json.dumps(rows[-1]), flush=True)
    for recipe in RECIPES:
        folders = {"least squares": root / recipe}
        quantise(QuantiseRequest(source, folders["least squares"], recipe))
        for name, rule in (("llm-compressor", llm_compressor), ("torchao", torchao)):
            folders[name] = dense_folder(source, recipe, rule, root / f"{recipe} {name}")
        for name, folder in folders.items():
            _, row = measure(folder, reference)
            rows.append({"recipe": recipe, "scales": name, "weights": weights_error(source, folder, recipe), **row})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=default_path("quantisation"), help="where to write the record")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        rows = run(Path(root))
    packages = {name: metadata.version(name) for name in ("compressed-tensors", "torchao")}
    write(arguments.out, "quantisation", packages=packages, rows=rows)


if __name__ == "__main__":
    main()
