"""The model card of an export: built from a template, and checked without the network."""

import ast
import importlib.metadata
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from packaging.requirements import Requirement

from ..configuration.configuration_kimi_linear import KimiLinearConfig

TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ["kimi-linear", "kimi-delta-attention", "linear-attention", "mixture-of-experts", "custom_code"]
RELEASED_MODELS = ("moonshotai/Kimi-Linear-48B-A3B-Instruct", "moonshotai/Kimi-Linear-48B-A3B-Base")

_PURPOSES = {
    "torch": "tensors, and every operation where no kernel package serves the device",
    "transformers": "model classes, loading, generation",
    "safetensors": "naming a damaged weight file (comes with transformers)",
    "triton": "our GPU kernels (comes with CUDA builds of torch)",
    "compressed_tensors": "reading checkpoints that it has quantised (`pip install compressed-tensors`)",
    "fla": "GPU kernels of flash-linear-attention (`pip install flash-linear-attention`)",
}
_LOAD = """\
model = AutoModelForCausalLM.from_pretrained(model_id, trust_remote_code=True, dtype="auto", device_map="auto")
"""
_USAGE = {
    "chat": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model_id = {repo_id}
tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=True)
"""
    + _LOAD
    + """
messages = [{{"role": "user", "content": "Explain linear attention in two sentences."}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))""",
    "text": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model_id = {repo_id}
tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=True)
"""
    + _LOAD
    + """
inputs = tokenizer("Linear attention is", return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0], skip_special_tokens=True))""",
    "ids": """\
import torch
from transformers import AutoModelForCausalLM

model_id = {repo_id}
"""
    + _LOAD
    + """
input_ids = torch.tensor([[1, 2, 3]], device=model.device)
output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=20)
print(output[0].tolist())""",
    "architecture": """\
import torch
from transformers import AutoConfig, AutoModelForCausalLM

model_id = {repo_id}
config = AutoConfig.from_pretrained(model_id, trust_remote_code=True)
with torch.device("meta"):  # shapes without storage
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
print(f"{{model.num_parameters():,}} parameters")""",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says of one export.

    Args:
        repo_id: what the usage loads: a Hub id, or the name of the folder.
        base_model: Hub id of the checkpoint the weights are from.
        licence: of the weights, as the Hub spells it.
        weights: "checkpoint", "random" or "none".
        tokenizer: "chat" (has a chat template), "text" or "none".
        packages: third-party packages of the code, and whether loading requires them.
        notes: Markdown about this checkpoint, shown before the usage.
        quantised: what was done to the weights since `base_model`, or "".
    """

    repo_id: str
    base_model: str | None
    licence: str
    weights: str
    tokenizer: str
    packages: Mapping[str, bool]
    notes: str = ""
    quantised: str = ""


def build_card(facts: CardFacts, config: KimiLinearConfig) -> ModelCard:
    """The card of an export.

    Raises:
        ValueError: metadata that the Hub would refuse.
    """
    kind = "architecture" if facts.weights == "none" else {"none": "ids"}.get(facts.tokenizer, facts.tokenizer)
    data = ModelCardData(
        license=facts.licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=facts.base_model,
        tags=[*TAGS, *(["compressed-tensors"] if facts.quantised else [])],
        **({"base_model_relation": "quantized"} if facts.quantised and facts.base_model else {}),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=facts.repo_id.rpartition("/")[2],
        summary=_summary(facts, config),
        notes=facts.notes.strip(),
        package_version=importlib.metadata.version("kimi-linear"),
        requirements=_requirements(kind, bool(facts.quantised)),
        usage=_USAGE[kind].format(repo_id=json.dumps(facts.repo_id, ensure_ascii=False)),
        usage_needs_accelerate=kind != "architecture",
        packages=[
            {
                "name": name,
                "needed": "always" if required else "no, used where installed",
                "purpose": _PURPOSES.get(name, ""),
            }
            for name, required in facts.packages.items()
        ],
        limits=_limits(facts),
    )
    check_card(card)
    return card


def check_card(card: ModelCard) -> None:
    """Check what the Hub checks of a card's metadata, and that its code parses, without asking the Hub.

    `ModelCard.validate` sends the card to huggingface.co, which an export must not do.

    Raises:
        ValueError: names the field and what it should be.
    """
    # Through the text, because that is what will be read.
    data = ModelCard(str(card)).data.to_dict()
    fixed = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    for field, wanted in fixed.items():
        if data.get(field) != wanted:
            raise ValueError(f"model card: {field} is {data.get(field)!r}, must be {wanted!r}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", str(data.get("license", ""))):
        raise ValueError(f"model card: license {data.get('license')!r} must be a Hub licence id such as 'mit'")
    base_model = data.get("base_model")
    if base_model is not None and not re.fullmatch(r"[\w.\-]+/[\w.\-]+", str(base_model)):
        raise ValueError(f"model card: base_model {base_model!r} must be a Hub id such as {RELEASED_MODELS[0]!r}")
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        raise ValueError(f"model card: tags {data['tags']!r} must be strings")
    for block in python_blocks(str(card)):
        try:
            ast.parse(block)
        except SyntaxError as error:
            raise ValueError(f"model card: a Python block does not parse ({error})") from error


def python_blocks(text: str) -> list[str]:
    """The Python code blocks of a card, in order."""
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def guess_base_model(folder: Path) -> str | None:
    """The Hub id that the path of a downloaded checkpoint tells: of a released model, or of a Hugging Face cache."""
    for part in reversed(folder.absolute().parts):
        if part.startswith("models--") and part.count("--") == 2:
            return "/".join(part.split("--")[1:])
        for released in RELEASED_MODELS:
            if released.rpartition("/")[2].lower() in part.lower():
                return released
    return None


def _summary(facts: CardFacts, config: KimiLinearConfig) -> str:
    kda = config.layer_types.count("linear_attention")
    experts = f", {config.num_experts} experts of which a token visits {config.num_experts_per_token}"
    shape = (
        f"{config.num_hidden_layers} layers ({kda} KDA, {config.num_hidden_layers - kda} MLA), "
        f"width {config.hidden_size}{experts if config.num_experts else ''}"
    )
    if facts.weights == "none":
        return f"Code and config without weights: {shape}."
    if facts.weights == "random":
        return f"**Random weights**, for testing only: {shape}."
    what = f"quantised ({facts.quantised})" if facts.quantised else "unchanged"
    origin = f" The weights are those of [{facts.base_model}](https://huggingface.co/{facts.base_model}), {what}."
    kind = "quantised Kimi Linear" if facts.quantised else "Kimi Linear"
    return f"A {kind} checkpoint: {shape}.{origin if facts.base_model else ''}"


def _requirements(kind: str, quantised: bool) -> str:
    """The version ranges of this package, for the packages that the usage needs."""
    wanted = {"torch", "transformers"} | (set() if kind == "architecture" else {"accelerate"})
    wanted |= {"compressed-tensors"} if quantised else set()  # transformers asks for it, whoever reads the weights
    found: dict[str, str] = {}
    for line in importlib.metadata.requires("kimi-linear") or []:
        requirement = Requirement(line)
        if requirement.name in wanted:
            found.setdefault(requirement.name, f'"{requirement.name}{requirement.specifier}"')
    return " ".join(found[name] for name in sorted(found))


def _limits(facts: CardFacts) -> list[str]:
    optional = " or ".join(f"`{name}`" for name, required in facts.packages.items() if not required)
    limits = [
        f"Without {optional or 'a GPU'}, or on a CPU, KDA runs in PyTorch: the same results, much slower.",
        "No multi-token prediction and no rotary variant: the released checkpoints have neither. Configs of the Kimi "
        "K3 text model, which names the same `model_type`, are refused.",
        "`transformers serve` looks the model class up in transformers itself and does not run this code, with "
        "`--trust-remote-code` neither; `python -m kimi_linear.hub_card serve` of the package kimi-linear does.",
        "Continuous batching (`generate_batch`) and the quantized cache are refused: neither can hold the KDA states.",
        "The model has no notion of positions; restarting `position_ids` mark packed sequences and do nothing else.",
    ]
    if facts.weights == "random":
        limits.append("The output is noise.")
    elif facts.weights == "checkpoint":
        limits.append(
            f"The {'tool' if facts.quantised else 'export'} measured neither quality nor bias nor safety of the weights"
            f"{' beyond the figures above' if facts.quantised else ''}; see where they are from."
        )
    if facts.weights != "none" and facts.tokenizer == "none":
        limits.append("There is no tokenizer in this folder; the model takes token ids.")
    return limits


__all__ = ["RELEASED_MODELS", "CardFacts", "build_card", "check_card", "guess_base_model", "python_blocks"]
