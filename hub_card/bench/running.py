"""Runs the cases: times each, names what ran out of memory, keeps what was measured when it is interrupted."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from tqdm import tqdm

from ...modeling.prompt import segments
from ..measure.counts import step_bytes
from ..measure.machine import Machine
from ..measure.random_models import native_cache, random_cache
from ..measure.timing import WAYS, generate_seconds, layer_by_layer, wait_for_gpus
from .cases import MOST_TOKENS, Case, Expected, expect
from .models import Source, make_model

Row = dict[str, Any]
_FEW, _LEAST = 4, 4
_SECONDS_A_RUN = 1.0
_GIB = 2**30


def run_cases(cases: list[Case], source: Source, machine: Machine, repeats: int, keep: Callable[[Row], None]) -> None:
    """Measure `cases`, one model at a time; `keep` takes each row as soon as it is there.

    Args:
        cases: in the order to run; those of one model stand together.
        source: of the models.
        machine: that they run on.
        repeats: timed runs of each.
        keep: called with each row.
    """
    expected = {case: _expect(case, source, machine, repeats) for case in cases}
    seconds = sum(one.seconds for one in expected.values())
    layout = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed} of about {total_time}"

    class Bar(tqdm):
        @property
        def format_dict(self) -> dict[str, Any]:
            values = super().format_dict
            done, spent = values["n"], values["elapsed"]
            total = spent / done * values["total"] if done and spent > 5 else values["total"]
            return {**values, "total_time": tqdm.format_interval(total)}

    with Bar(total=seconds, bar_format=layout, file=sys.stderr, desc="loading") as bar:
        for name in dict.fromkeys(case.model for case in cases):
            mine = [case for case in cases if case.model == name]
            model, problem = _try_to_make(source, name, machine)
            for case in mine:
                bar.set_description_str(f"{case}", refresh=True)
                row = (
                    _row_without(case, problem)
                    if model is None
                    else measure(case, model, expected[case], machine, repeats)
                )
                keep(row)
                bar.update(expected[case].seconds)
            del model
            _give_back()


def _expect(case: Case, source: Source, machine: Machine, repeats: int) -> Expected:
    return expect(case, source.config_of(case.model), source.weights_of(case.model), machine, repeats)


def _try_to_make(source: Source, name: str, machine: Machine) -> tuple[Any, Row | None]:
    reason = source.why_not(name)
    if reason is not None:
        return None, {"status": "not measured", "why": reason}
    try:
        return make_model(source, name, machine), None
    except (MemoryError, RuntimeError, ValueError) as error:
        return None, _problem(error)


def _row_without(case: Case, problem: Row | None) -> Row:
    return {**vars(case), **(problem or {})}


def measure(case: Case, model: Any, expected: Expected, machine: Machine, repeats: int) -> Row:
    """The row of one case: its times, or what prevented it."""
    row: Row = {**vars(case), "limit_ms": expected.limit_ms}
    _give_back()
    if machine.kind == "cpu" and (needed := expected.nbytes) > machine.memory[0]:
        # The system would end the process.
        why = f"needs about {needed / _GIB:.1f} GiB, {machine.memory[0] / _GIB:.1f} were free"
        return row | {"status": "out of memory", "why": why}
    if case.path == "captured" and not model.decode_path.startswith("captured steps"):
        return row | {"status": "not measured", "why": f"the model decodes {model.decode_path}"}
    _reset_peak()
    try:
        with torch.no_grad():
            found = (
                decode_ms(model, case, machine, repeats) if case.what == "decode" else prompt_ms(model, case, repeats)
            )
    except (MemoryError, RuntimeError, ValueError) as error:
        return row | _problem(error)
    times = found.pop("all_ms")
    if min(times) <= 0:
        return row | {
            "status": "not measured",
            "why": "a longer run took less time than a short one: the machine is busy",
        }
    rate = case.batch * (1 if case.what == "decode" else case.context) / statistics.median(times) * 1e3
    return row | found | {
        "status": "measured", "ms": statistics.median(times), "all_ms": times, "tokens_a_second": rate,
        "peak_gib": _peak(),
    }  # fmt: skip


def decode_ms(model: Any, case: Case, machine: Machine, repeats: int) -> Row:
    """Milliseconds of a token of every row inside greedy `generate()`, over a cache with random contents."""
    is_native = case.model == "native"

    def cache() -> Any:
        if is_native:
            return native_cache(model, case.batch, case.context)
        return random_cache(model, case.batch, case.context, room=2 * MOST_TOKENS)

    def seconds(held: Any, count: int) -> float:
        return generate_seconds(model, held, case.batch, count, **WAYS["greedy"])

    way = layer_by_layer(model) if case.path == "layers" else nullcontext()
    limit = {} if is_native else {
        "limit_ms": step_bytes(model, case.batch, case.context) / machine.read_rate * 1e3
    }  # fmt: skip
    with way:
        first = cache()
        seconds(first, 2)  # captures, compiles
        rough = seconds(first, _FEW) / _FEW
        del first
        many = max(_LEAST, min(int(_SECONDS_A_RUN / rough), MOST_TOKENS // repeats))
        times = []
        for _ in range(repeats):
            held = cache()
            few = seconds(held, _FEW)
            times.append((seconds(held, _FEW + many) - few) / many * 1e3)
            del held
    return {"all_ms": times, "new_tokens": many, **limit}


def prompt_ms(model: Any, case: Case, repeats: int) -> Row:
    """Milliseconds of a forward over a prompt of random tokens, which fills a cache, as `generate()` does it."""
    ids = torch.randint(0, model.config.vocab_size, (case.batch, case.context), device=model.device)
    times, finite = [], True
    with _segments_of(case.segment):
        for run in range(repeats + 1):
            wait_for_gpus()
            begin = time.perf_counter()
            output = model(ids, logits_to_keep=1, use_cache=True)
            finite = bool(torch.isfinite(output.logits).all())  # waits for the GPU
            if run:  # the first compiles
                times.append((time.perf_counter() - begin) * 1e3)
            del output
    if not finite:
        raise ValueError("the logits are not finite")
    return {"all_ms": times}


@contextmanager
def _segments_of(tokens: int) -> Iterator[None]:
    """Inside, prompts are cut into segments of so many tokens; 0 leaves them as they are."""
    usual = segments.SEGMENT_TOKENS
    segments.SEGMENT_TOKENS = tokens or usual
    try:
        yield
    finally:
        segments.SEGMENT_TOKENS = usual


def _problem(error: Exception) -> Row:
    """What an exception means for the case; its traceback, which holds tensors, is not kept."""
    text = " ".join(str(error).split())
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return {"status": "out of memory", "why": text[:200]}
    return {"status": "failed", "why": f"{type(error).__name__}: {text[:300]}"}


def _give_back() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _reset_peak() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def _peak() -> list[float] | None:
    """GiB allocated at most on each GPU since `_reset_peak`, weights included; None without GPUs."""
    count = torch.cuda.device_count()
    return [torch.cuda.max_memory_allocated(index) / _GIB for index in range(count)] or None


__all__ = ["Row", "decode_ms", "measure", "prompt_ms", "run_cases"]
