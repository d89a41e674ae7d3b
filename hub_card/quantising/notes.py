"""What the card of a quantised folder says: what was done to which layers, and the error that was measured."""

from typing import Any

from .recipes import Recipe


def card_notes(
    recipe: Recipe,
    config: dict[str, Any],
    errors: dict[str, tuple[float, float]],
    checked: dict[str, Any] | None,
    sizes: tuple[int, int],
) -> str:
    """Markdown for the card.

    Args:
        recipe: that was followed.
        config: the `quantization_config`.
        errors: relative errors of the weights by kind of layer: ours, round to nearest.
        checked: of `measure.check`, or None.
        sizes: bytes of the weights before and after.
    """
    before, after = sizes
    lines = [
        "## Quantisation",
        "",
        f"Recipe `{recipe.name}`: {recipe.summary}. Embeddings, `lm_head`, the router, convolutions, norms, the gates' "
        "and the latent's projections (`f_*`, `g_*`, `b_proj`, `kv_a`, `kv_b`) stay as they were. "
        f"{_gigabytes(before)} became {_gigabytes(after)}. "
        "Scales were chosen by least squares, without calibration data; the layout is that of compressed-tensors "
        f"{config['version']}, with the released names.",
        "",
        "| layers | relative error of the weights | round to nearest |",
        "|---|---|---|",
        *(f"| {kind} | {ours:.4f} | {nearest:.4f} |" for kind, (ours, nearest) in errors.items()),
        "",
        "Error: root of the summed squares of the differences, by that of the weights. Round to nearest takes the "
        "scale from the largest number of each group or row.",
    ]
    if _quantises_activations(config):
        lines += [
            "",
            "Engines that follow the config (vLLM) also round activations to FP8, token by token; this folder's code "
            "keeps them as they are.",
        ]
    return "\n".join([*lines, *(_checked(checked) if checked else _unchecked())])


def _quantises_activations(config: dict[str, Any]) -> bool:
    return any(group.get("input_activations") for group in config["config_groups"].values())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _unchecked() -> list[str]:
    return ["", "The quantised model was not run; `--check` of the tool that made it measures its loss."]


def _checked(checked: dict[str, Any]) -> list[str]:
    before, after = checked["losses"]
    source, quantised = (_quoted(text) for text in checked["texts"])
    return [
        "",
        f"On {checked['tokens']:,} tokens of the Python manual, through this folder's code: loss {after:.4f} nats a "
        f"token (unquantised {before:.4f}), KL divergence from the unquantised model {checked['kl']:.4f} nats a token, "
        f"{checked['agreement']:.1%} of the greedy tokens equal.",
        "",
        f"Greedy text after `{checked['prompt']}`:",
        "",
        "| | |",
        "|---|---|",
        f"| unquantised | {source} |",
        f"| quantised | {quantised} |",
    ]


def _quoted(text: str) -> str:
    """Text in a cell of a table, on one line, with nothing that Markdown would read."""
    plain = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`` {plain} ``" if plain else ""


__all__ = ["card_notes"]
