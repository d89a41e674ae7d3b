"""A plan as text."""

from collections.abc import Sequence
from typing import Any

from ..bench.report import number

_GIB, _MIB = 2**30, 2**20


def show(found: dict[str, Any]) -> str:
    """What `--json` has, for people."""
    model, devices = found["model"], found["devices"]
    lines = [
        f"{model['layers']} layers: {model['kda']} KDA, {model['mla']} MLA. Cache: "
        f"{model['cache_bytes_a_token']:,} bytes a token and {model['cache_bytes_a_row'] / _MIB:.1f} MiB a row; a step "
        f"reads and writes {model['state_bytes_moved_a_row'] / 1e6:.0f} MB of states a row.",
        *_device_lines(devices),
        "",
        *_weights_table(found["weights"], len(devices)),
    ]
    for row in found["weights"]:
        if row["fits"]:
            lines += ["", *_cases(row)]
    if not any(row["fits"] for row in found["weights"]):
        lines += ["", "nothing fits: more GPUs, or --cpu-memory for the processor's side of it"]
    return "\n".join(lines)


def _device_lines(devices: Sequence[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(device["name"] for device in devices)
    lines = []
    for name in names:
        same = [device for device in devices if device["name"] == name]
        one = same[0]
        origin = "measured" if one["measured"] else "not measured"
        count = f"{len(same)} x " if len(same) > 1 else ""
        lines.append(
            f"{count}{name}: {one['usable_bytes'] / _GIB:.1f} of {one['gib']:.4g} GiB for the model, reads "
            f"{one['read_gb_s']:,.0f} GB/s ({origin})."
        )
    return lines


def _weights_table(rows: Sequence[dict[str, Any]], devices: int) -> list[str]:
    reasons = dict.fromkeys(row["decode_path"].partition(": ")[2] for row in rows)
    reasons.pop("", None)
    lines = [["weights", "GiB", "GB read a token", "fits", "longest row", "decodes by"]]
    for row in rows:
        where = "yes" if row["fits"] else f"no, needs {row['needs_devices'] or 'more than 64'}"
        if row["fits"] and devices > 1:
            where = f"yes, {' + '.join(map(str, row['layers_by_device']))} layers"
        longest = f"{row['longest_context']:,}" if row["fits"] else "-"
        read = f"{row['read_a_token_bytes'] / 1e9:.1f}"
        way, _, why = row["decode_path"].partition(": ")
        if why:
            way += f" [{list(reasons).index(why) + 1}]"
        lines.append([row["format"], f"{row['bytes'] / _GIB:.1f}", read, where, longest, way])
    return [*_aligned(lines, left=(0, 5)), *(f"[{i}] {why}" for i, why in enumerate(reasons, 1))]


def _cases(row: dict[str, Any]) -> list[str]:
    lines = [["context x rows", "cache GiB", "needed GiB", "limit ms a token", "expected", "tokens/s", "prompt s"]]
    for case in row["cases"]:
        name = f"{case['context']:,} x {case['batch']}"
        sizes = [f"{case[key] / _GIB:.2f}" for key in ("cache_bytes", "needed_bytes")]
        if not case["fits"]:
            lines.append([name, *sizes, "does not fit", "", "", ""])
            continue
        keys = ("limit_ms_a_token", "expected_ms_a_token", "expected_tokens_a_second", "expected_prompt_s")
        lines.append([name, *sizes, *("not known" if case[key] is None else number(case[key]) for key in keys)])
    most = ", ".join(f"{batch} of {context:,}" for context, batch in row["largest_batch"].items())
    return [row["format"], *_aligned(lines, left=(0,)), f"most rows (up to 512) at a context: {most}"]


def _aligned(lines: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]


__all__ = ["show"]
