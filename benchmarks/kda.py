"""
Tables of the KDA kernels: `python -m benchmarks.kda` (forward and decode step), on one GPU.

Each case is timed in two gate regimes, as called and as a CUDA graph, and compared with a float64 recurrence; fla,
where it is installed, does the same work (gate, l2norm, sigmoid in its kernels, final state) in the same run. The first
call of a process with an empty compile cache is timed too. Results go to a JSON file with device, versions and date;
`python -m benchmarks.plot_kda` draws them.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from triton.testing import do_bench

from benchmarks.record import default_path, write
from kimi_linear.kernels.kda import configs as kda_configs
from kimi_linear.kernels.kda import operators as kda_operators
from kimi_linear.kernels.kda.operators import chunk_kda, kda_step

try:
    from fla.ops.kda import chunk_kda as fla_chunk_kda
except ImportError:
    fla_chunk_kda = None

COPY_BANDWIDTH = 4.3e12  # bytes/s, read + write, measured on the H200 (shared/anchors.md)
REGIMES = ("tame", "released")


def gates(regime: str, B: int, T: int, H: int, K: int, device: str = "cuda") -> tuple[torch.Tensor, ...]:
    """Gate logits [B, T, H, K] fp32, A_log [H], dt_bias [H * K].

    tame: fla's initialisation (A uniform in 1..16, softplus(dt_bias) log-uniform in 1e-3..1e-1, logits N(0, 1)).
    released: what the released weights show: exp(A_log) log-normal of mean 8.3 reaching 201; most steps near 0; 2% of
    the channels and 1% of the tokens with |g| up to thousands.
    """
    dt = torch.exp(torch.rand(H * K, device=device) * math.log(100.0) + math.log(1e-3))
    dt_bias = dt + torch.log(-torch.expm1(-dt))
    logits = torch.randn(B, T, H, K, device=device)
    if regime == "tame":
        return logits, torch.log(torch.rand(H, device=device) * 15 + 1), dt_bias
    A_log = 1.2 + 1.35 * torch.randn(H, device=device)
    A_log[0] = math.log(201.0)
    A_log.clamp_(max=math.log(201.0))
    wild = (torch.rand(1, 1, H, K, device=device) < 0.02) & (torch.rand(B, T, H, 1, device=device) < 0.3)
    wild |= torch.rand(B, T, 1, 1, device=device) < 0.01
    return torch.where(wild, logits.abs() * 6 + 3, logits - 1), A_log, dt_bias


def inputs(
    regime: str, B: int, T: int, H: int, K: int = 128, V: int = 128, dtype: torch.dtype = torch.bfloat16
) -> dict:
    """Arguments of chunk_kda; q, k, v are views of one packed tensor, as a layer's projection leaves them."""
    torch.manual_seed(1234)
    logits, A_log, dt_bias = gates(regime, B, T, H, K)
    qkv = torch.nn.functional.silu(torch.randn(B, T, 3, H, K, device="cuda")).to(dtype)
    beta = torch.randn(B, T, H, device="cuda").to(dtype)
    return {"q": qkv[:, :, 0], "k": qkv[:, :, 1], "v": qkv[:, :, 2, :, :V], "g": logits.to(dtype), "beta": beta,
            "A_log": A_log, "dt_bias": dt_bias}  # fmt: skip


@torch.no_grad()
def oracle(x: dict, cuts: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and final states of the recurrence in float64, token by token."""
    q, k, v, g, beta, A_log, dt_bias = (x[n].double() for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias"))
    B, T, H, K = q.shape
    q = q * torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6) * K**-0.5
    k = k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    decay = torch.exp(-A_log.exp()[:, None] * torch.nn.functional.softplus(g + dt_bias.view(H, K), threshold=40.0))
    beta = beta.sigmoid()
    o = torch.empty_like(v)
    S = q.new_zeros(B, H, K, v.shape[-1])
    states = []
    ends = set(cuts[1:]) if cuts else {T}
    for t in range(T):
        S = S * decay[:, t, :, :, None]
        delta = beta[:, t, :, None] * (v[:, t] - torch.matmul(k[:, t, :, None, :], S)[..., 0, :])
        S = torch.addcmul(S, k[:, t, :, :, None], delta[:, :, None, :])
        o[:, t] = torch.matmul(q[:, t, :, None, :], S)[..., 0, :]
        if t + 1 in ends:
            states.append(S)
            S = torch.zeros_like(S)
    return o, torch.cat(states)


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """|x - exact| / |exact|; NaN never passes."""
    return float((x.double() - exact).norm() / exact.norm())


def run_fla(x: dict, cu_seqlens: torch.Tensor | None = None):
    """fla on the same inputs (it wants contiguous tensors; the copies are made before timing)."""
    return fla_chunk_kda(
        **x,
        cu_seqlens=cu_seqlens,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
    )


def median(fn, rep: int = 60) -> list[float]:
    """Median, p20, p80 in ms."""
    return [round(x, 5) for x in do_bench(fn, warmup=15, rep=rep, quantiles=[0.5, 0.2, 0.8])]


# B, T, H, packed sequences (0: dense), goal in ms (shared/anchors.md)
FORWARD = [
    (1, 8192, 32, 0, 0.40),
    (1, 32768, 32, 0, 1.5),
    (1, 131072, 32, 0, 6.0),
    (8, 1024, 32, 0, 0.30),
    (1, 8192, 64, 0, 0.75),
    (1, 8192, 32, 64, None),
]
STEP = [(1, 0.012), (8, 0.018), (64, 0.075), (256, 0.29)]


def forward_counts(B: int, T: int, H: int, K: int = 128, V: int = 128, C: int = 32) -> tuple[float, float]:
    """Bytes that must move (q, k, g, v, o in bf16, beta; once each) and FLOPs of the two stages' products."""
    tokens, levels = B * T * H, C.bit_length() - 2
    products = 2 * 2 * C * K + levels * 2 * 2 * C * C  # A and L; inverse: two C^3 products a level
    products += 2 * 2 * K * V + 3 * 2 * C * V + 2 * K * V  # xk S, xq S; M V, M R, A U; xg^T U
    return tokens * 2.0 * (3 * K + 2 * V + 1), tokens * float(products)


def ragged(T: int, N: int) -> torch.Tensor:
    """Boundaries of N sequences of very different lengths, some empty, T tokens in all."""
    gen = torch.Generator().manual_seed(7)
    cuts = (torch.rand(N - 1, generator=gen) ** 2 * T).long().sort().values
    return torch.cat([torch.zeros(1), cuts, torch.full((1,), T)]).int().cuda()


def forward_rows(peers: bool, errors: bool, only: list[str]) -> Iterator[dict]:
    for regime in REGIMES:
        for B, T, H, N, goal in FORWARD:
            case = f"{B}x{T}x{H}" + (f" packed {N}" if N else "")
            if only and case not in only:
                continue
            x = inputs(regime, B, T, H)
            cu = ragged(T, N) if N else None
            row = {"case": case, "regime": regime, "goal_ms": goal}
            run = lambda x=x, cu=cu: chunk_kda(**x, cu_seqlens=cu, output_final_state=True)  # noqa: E731
            row["ms"] = median(run)
            row["graph_ms"] = graph_ms([run])
            size, flops = forward_counts(B, T, H)
            row["GB/s"] = round(size / row["ms"][0] / 1e6)
            row["TFLOP/s"] = round(flops / row["ms"][0] / 1e9, 1)
            row["of_floor"] = round(size / COPY_BANDWIDTH * 1e3 / row["ms"][0], 3)
            if peers:
                fla = {n: t.contiguous() for n, t in x.items()}
                row["fla_ms"] = median(lambda fla=fla, cu=cu: run_fla(fla, cu))
                row["of_fla"] = round(row["ms"][0] / row["fla_ms"][0], 3)
            if errors and B * T * H <= 8192 * 32 and (N == 0 or B * T <= 8192):
                with_cuts = cu.unique().tolist() if N else None
                exact, exact_state = oracle(x, with_cuts)
                o, state = chunk_kda(**x, cu_seqlens=cu, output_final_state=True)
                again = chunk_kda(**x, cu_seqlens=cu, output_final_state=True)
                row["bit_identical"] = torch.equal(o, again[0]) and torch.equal(state, again[1])
                row["error"] = [error(o, exact), error(state, exact_state) if not N else None]
                if peers:
                    o, state = run_fla(fla, cu)
                    row["fla_error"] = [error(o, exact), error(state, exact_state) if not N else None]
            yield row


def step_inputs(B: int, H: int = 32, K: int = 128, V: int = 128) -> dict:
    sizes = (H * K, H * K, H * V)
    q, k, v = torch.randn(B, 1, sum(sizes), device="cuda").bfloat16().split(sizes, -1)
    f, beta, gate = (torch.randn(B, 1, n, device="cuda").bfloat16() for n in (H * K, H, H * V))
    return {
        "q": q, "k": k, "v": v, "f": f, "beta": beta, "gate": gate,
        "conv_weights": tuple(torch.randn(n, 4, device="cuda").bfloat16() for n in sizes),
        "windows": tuple(torch.randn(B, n, 3, device="cuda").bfloat16() for n in sizes),
        "A_log": torch.rand(H, device="cuda"), "dt_bias": torch.randn(H * K, device="cuda"),
        "norm_weight": torch.rand(V, device="cuda").bfloat16(), "norm_eps": 1e-5,
        "state": torch.randn(B, H, K, V, device="cuda"),
    }  # fmt: skip


def graph_ms(launches: list, rep: int = 60) -> list[float]:
    """
    Median, p20, p80 of one launch: `launches` (over different buffers, or a small state would stay in the cache) in a
    graph.
    """
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return [round(x / len(launches), 5) for x in do_bench(graph.replay, warmup=15, rep=rep, quantiles=[0.5, 0.2, 0.8])]


def step_rows() -> Iterator[dict]:
    """
    One token of the layer, projections to gated norm, under a CUDA graph over the states of 20 layers (4 from batch
    64).
    """
    for B, goal in STEP:
        layers = [step_inputs(B) for _ in range(20 if B < 64 else 4)]
        row = {"batch": B, "goal_ms": goal, "ms": graph_ms([lambda x=x: kda_step(**x) for x in layers])}
        size = 2 * layers[0]["state"].numel() * 4
        row["GB/s"] = round(size / row["ms"][0] / 1e6)
        row["of_floor"] = round(size / COPY_BANDWIDTH * 1e3 / row["ms"][0], 3)
        yield row


def tune() -> dict:
    """Time the candidates of each stage on one case and take the best ones for the rest of the run."""
    c = kda_configs
    x = inputs("released", 1, 8192, 32)
    intra, inter = c.intra_config("sm_90", 128, "bfloat16"), c.inter_config("sm_90", 128, 128, "bfloat16")
    step = c.step_config(128, 128)
    found = {}

    def choose(name: str, configs: list, measure) -> None:
        times = {}
        for config in configs:
            setattr(kda_operators, name, lambda *args, config=config: config)
            times[config] = measure()
            print(name, config, times[config], flush=True)
        best = min(times, key=times.get)
        setattr(kda_operators, name, lambda *args: best)
        found[name] = {str(k): v for k, v in times.items()}

    forward = lambda: median(lambda: chunk_kda(**x), rep=25)[0]  # noqa: E731
    wide = intra._replace(NG=2 * intra.NG, num_warps=2 * intra.num_warps)
    choose("intra_config", [intra, wide, wide._replace(maxnreg=168)], forward)
    choose("inter_config", [inter, inter._replace(num_stages=4), inter._replace(BV=128, num_warps=8)], forward)
    token = [step_inputs(64) for _ in range(4)]
    steps = [step._replace(num_warps=w, maxnreg=m) for w, m in ((4, None), (8, None), (8, 128), (16, None))]
    choose("step_config", steps, lambda: graph_ms([lambda x=x: kda_step(**x) for x in token], rep=25)[0])
    return found


def cold_start(in_model: bool) -> float:
    """
    Seconds of the first forward call in a new process with an empty compile cache, start of CUDA left out.

    in_model: after what importing the model and the first other kernel of it have done by then: torch._dynamo is
    imported, and Triton has started.
    """
    code = "import time, torch; from benchmarks.kda import chunk_kda, inputs; x = inputs('tame', 1, 8192, 32);"
    if in_model:
        code += (
            "import torch._dynamo; from kimi_linear.kernels.kda.index import kda_index_fwd;"
            "kda_index_fwd(torch.zeros(2, dtype=torch.int32, device='cuda'), 0, 32);"
        )
    code += "torch.cuda.synchronize(); t = time.time(); chunk_kda(**x); torch.cuda.synchronize();print(time.time() - t)"
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return round(float(run.stdout), 2)


def small() -> None:
    """Small launches of every kernel for compute-sanitizer."""
    for regime in REGIMES:
        x = inputs(regime, 1, 200, 2)
        chunk_kda(**x, output_final_state=True)
        chunk_kda(**x, cu_seqlens=torch.tensor([0, 0, 70, 200], dtype=torch.int32, device="cuda"))
    kda_step(**step_inputs(2, H=2))
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-peers", action="store_true", help="leave fla out (its first calls autotune for a minute)")
    parser.add_argument("--no-errors", action="store_true", help="leave the float64 recurrence out")
    parser.add_argument("--tune", action="store_true", help="time the candidate configurations first and use the best")
    parser.add_argument("--only", nargs="+", default=[], help="nothing but these forward cases, such as 1x8192x32")
    parser.add_argument("--small", action="store_true", help="only launch small cases (for compute-sanitizer)")
    parser.add_argument("--out", type=Path, help="the record (default: benchmarks/results/, with device and date)")
    args = parser.parse_args()
    if args.small:
        small()
        return
    out, peers = args.out or default_path("kda"), fla_chunk_kda is not None and not args.no_peers
    found = {"copy_bandwidth": COPY_BANDWIDTH, "cold_start_s": {}, "step": [], "forward": []}
    if args.tune:
        found["tune"] = tune()
    rows = {"forward": forward_rows(peers, not args.no_errors, args.only)}
    if not args.only:
        rows = {"step": step_rows(), **rows}
        for where, in_model in (("new process", False), ("the model's process", True)):
            found["cold_start_s"][where] = cold_start(in_model)
            print(f"first call in {where}, compiled from nothing: {found['cold_start_s'][where]} s", flush=True)
    for part in rows:
        for row in rows[part]:
            print(row, flush=True)
            found[part].append(row)
            write(out, "kda", **found)  # at once: what comes next may fail


if __name__ == "__main__":
    main()
