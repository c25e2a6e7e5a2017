"""What attention with a sliding window or a soft cap costs, by the ways there are to compute it.

python tests/measure/attention.py              # on a GPU if there is one, else on CPU

Interleaved, medians, as ratios to plain causal attention on the fused kernel. Outputs are compared
before anything is timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lofit.llm.model import plain_attention, soft_cap

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ways(T: int, window: int, cap: float, device: str) -> dict[str, tuple[str, Way]]:
    """name -> (what it computes, function of q, k, v)."""
    position = torch.arange(T, device=device)
    distance = position[:, None] - position
    band = ((distance >= 0) & (distance < window))[None, None]

    def in_band(b, h, q, k):
        return (q >= k) & (q - k < window)

    def causal(b, h, q, k):
        return q >= k

    blocks = {f: create_block_mask(f, None, None, T, T, device=device) for f in (in_band, causal)}
    flex = torch.compile(flex_attention, dynamic=False)
    sdpa = F.scaled_dot_product_attention
    return {
        "fused, causal": ("causal", lambda q, k, v: sdpa(q, k, v, is_causal=True)),
        "plain, causal": ("causal", lambda q, k, v: plain_attention(q, k, v, None, scale(q))),
        "fused with a mask, window": ("window", lambda q, k, v: sdpa(q, k, v, attn_mask=band)),
        "plain, window": ("window", lambda q, k, v: plain_attention(q, k, v, band, scale(q))),
        "flex, window": ("window", lambda q, k, v: flex(q, k, v, block_mask=blocks[in_band])),
        "plain, cap": ("cap", lambda q, k, v: plain_attention(q, k, v, None, scale(q), cap)),
        "flex, cap": (
            "cap",
            lambda q, k, v: flex(
                q, k, v, block_mask=blocks[causal],
                score_mod=lambda score, b, h, i, j: soft_cap(score, cap),
            ),
        ),
    }  # fmt: skip


def scale(q: torch.Tensor) -> float:
    return q.shape[-1] ** -0.5


def seconds(step: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def forward(way: Way, inputs: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return way(*(x.detach() for x in inputs))


def forward_backward(way: Way, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(way(*inputs).sum(), inputs)


def measure(shape: tuple[int, ...], rounds: int, device: str, dtype: torch.dtype) -> None:
    """Check that ways to the same result agree, time them in turn, print ratios of medians."""
    T = shape[2]
    inputs = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    found, want, times = ways(T, T // 4, 50.0, device), {}, {}
    for name, (kind, way) in found.items():
        got = forward(way, inputs)
        error = (got - want.setdefault(kind, got)).abs().max().item()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-4), f"{name}: {error}"
        passes = (forward, forward_backward)
        if device == "cpu" and name.startswith("flex"):  # has no backward pass there
            passes = (forward,)
        times |= {(one, name): [] for one in passes}
    for one, name in [key for _ in range(rounds + 1) for key in times]:
        way = found[name][1]
        times[one, name].append(seconds(partial(one, way, inputs), device))
    for (one, name), each in times.items():
        base = statistics.median(times[one, "fused, causal"][1:])  # the first round warms up
        ratios = [t / base for t in each[1:]]
        print(
            f"  {name:26}{one.__name__:18}{statistics.median(ratios):7.2f}"
            f"   ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for T in args.lengths:
        shape = (args.batch, args.heads, T, args.head_dim)
        print(f"T {T}, window {T // 4}, batch x heads x T x head_dim {shape}, {dtype} on {device}")
        measure(shape, args.rounds, device, dtype)


if __name__ == "__main__":
    main()
