"""The demo as people run it: a command, its output, its time."""

import os
import re
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def output() -> str:
    command = [sys.executable, "-m", "kimi_linear.hub_card.demo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert process.returncode == 0, process.stderr[-4000:]
    assert time.monotonic() - start < 180
    return process.stdout


def test_sections_in_order(output):
    headings = re.findall(r"^== ([\w ]+)", output, flags=re.MULTILINE)
    assert headings == ["Loaded with trust_remote_code", "Completion", "Chat turn through pipeline", "Report"]


def test_folder_ran_without_our_package(output):
    assert "modeling_kimi_linear.KimiLinearForCausalLM, torch.bfloat16" in output
    assert "kimi_linear importable here: no" in output


def test_texts_are_printed(output):
    assert re.search(r'^The "try" statement\s\S.{40,}', output, flags=re.MULTILINE | re.DOTALL)
    assert re.search(r"^user: Explain .*\nassistant: [A-Z].{20,}", output, flags=re.MULTILINE)


def test_cache_table(output):
    rows = {
        name: (int(short.replace(",", "")), int(long.replace(",", "")))
        for name, short, long in re.findall(r"^  (\w.*?)  +([\d,]+) +([\d,]+)$", output, flags=re.MULTILINE)
    }
    ours, mla, every = rows["this cache"], rows["expanded K/V in MLA layers"], rows["expanded K/V in every layer"]
    # 4 layers, 4 heads, 48 + 32 channels, bf16.
    assert every == (4 * 1024 * 4 * 80 * 2, 4 * 8192 * 4 * 80 * 2)
    # One MLA layer holds 64 + 16 channels a token here and 4 x 80 there; the KDA states are the same in both.
    for length, small, large in zip((1024, 8192), ours, mla):
        assert large - small == length * (4 * 80 - 80) * 2


def test_both_speeds_are_reported(output):
    speeds = re.findall(r"^  (prompt|decode): +([\d,]+) tokens/s", output, flags=re.MULTILINE)
    assert [name for name, _ in speeds] == ["prompt", "decode"]
