"""Configs of other depth or mixture of layers than the one at hand."""

from ...configuration.configuration_kimi_linear import KimiLinearConfig


def first_layers(config: KimiLinearConfig, count: int) -> KimiLinearConfig:
    """The same widths with only the first `count` layers.

    Raises:
        ValueError: if there are not so many.
    """
    if not 1 <= count <= config.num_hidden_layers:
        raise ValueError(f"--layers must be from 1 to {config.num_hidden_layers}, got {count}")
    pattern = dict(config.linear_attn_config)
    for name in ("kda_layers", "full_attn_layers"):
        pattern[name] = [number for number in pattern[name] if number <= count]
    return _changed(config, num_hidden_layers=count, linear_attn_config=pattern)


def with_mla_everywhere(config: KimiLinearConfig) -> KimiLinearConfig:
    """The same widths with MLA in every layer instead of KDA in most."""
    numbers = list(range(1, config.num_hidden_layers + 1))
    return _changed(config, linear_attn_config={**config.linear_attn_config, "kda_layers": [],
                                                "full_attn_layers": numbers})  # fmt: skip


def _changed(config: KimiLinearConfig, **fields: object) -> KimiLinearConfig:
    kept = {name: value for name, value in config.to_dict().items() if name not in ("layer_types", "mlp_layer_types")}
    return KimiLinearConfig.from_dict({**kept, **fields})


__all__ = ["first_layers", "with_mla_everywhere"]
