"""Decoding on a GPU as a CUDA graph: the step of a whole batch, replayed token by token.

A step has few tokens and hundreds of kernels, so a GPU mostly waits for Python. A graph has fixed
shapes and addresses: the cache stays from batch to batch, its length is rounded up, and rows that
no prompt needs are computed and not looked at.
"""

import sys

import torch

from lofit.fast.graphs import captured
from lofit.llm.generate import DecodeStep, Decoding, decode_step
from lofit.llm.model import CausalLM, KVCache

ROWS, LENGTH = 8, 64  # sizes are rounded up to a multiple of these; a single row stays one


class StaticCache(KVCache):
    """A cache that stays where it is in memory."""

    def keep_rows(self, rows: list[int]) -> None:
        """Move these rows to the front."""
        for tensor in (self.k, self.v):
            tensor[:, : len(rows)] = tensor[:, rows]


def compiled_step() -> DecodeStep:
    """`decode_step`, compiled. On a GPU it is a CUDA graph: launching its many small kernels one by
    one takes longer than running them. Each shape of the cache is compiled separately."""
    compiled = torch.compile(decode_step, mode="reduce-overhead")

    def step(
        model: CausalLM, token: torch.Tensor, position: torch.Tensor, cache: KVCache
    ) -> torch.Tensor:
        for tensor in (cache.k, cache.v):  # written in place, which a graph else refuses
            torch._dynamo.mark_static_address(tensor)
        return compiled(model, token, position, cache)

    return step


class GraphedDecoding(Decoding):
    """For one model with the edits that it has now.

    capture: False runs the same padded steps without a graph, on any device.
    """

    def __init__(self, capture: bool = True):
        self.capture = capture
        self.cache: StaticCache | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def new_cache(self, model: CausalLM, rows: int, length: int) -> KVCache:
        """The last batch's cache if it is large enough. What it holds beyond a row's own position
        is never looked at."""
        if self.cache is None or self.cache.k.shape[1] < rows or self.cache.k.shape[3] < length:
            self.cache = self.graph = None  # frees the memory of the smaller ones first
            rows = rows if rows == 1 else -(-rows // ROWS) * ROWS
            length = -(-length // LENGTH) * LENGTH
            self.cache, device = StaticCache(model, rows, length), model.lm_head.weight.device
            self.token, self.position = torch.zeros(2, rows, dtype=torch.long, device=device)
        return self.cache

    def step(
        self, model: CausalLM, token: torch.Tensor, position: torch.Tensor, cache: KVCache
    ) -> torch.Tensor:
        """As `decode_step`; the logits hold until the next step."""
        n = len(token)
        self.token[:n], self.position[:n] = token, position
        if self.capture and self.graph is None:
            try:
                self._capture(model)
            except RuntimeError as error:  # torch.AcceleratorError too
                reason = str(error).splitlines()[0]
                print(f"no CUDA graph, decoding runs eagerly: {reason}", file=sys.stderr)
                self.capture, self.graph = False, None
        if self.graph is None:
            return decode_step(model, self.token, self.position, self.cache)[:n]
        self.graph.replay()
        return self.logits[:n]

    def _capture(self, model: CausalLM) -> None:
        """A step writes the same keys and values each time, so that repeating it does no harm."""
        self.graph, (self.logits,) = captured(
            lambda: [decode_step(model, self.token, self.position, self.cache)]
        )
