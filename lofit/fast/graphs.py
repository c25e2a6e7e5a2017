"""Training steps on a GPU as CUDA graphs: forward and backward of a batch replayed as one.

A step of LoFiT has few tokens and thousands of kernels, so a GPU mostly waits for Python. A graph
has fixed shapes: a batch is padded to a multiple of 16 positions and of 16 targets, whose weight is
0. Every new shape is captured once, replayed, and compared with the same work done eagerly.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
import torch.nn.functional as F

from lofit.llm.batches import Batch
from lofit.objectives import KnownGradients, Objective, trained_parameters

MULTIPLE = 16  # of positions and of targets
WARM_UP = 3  # steps before a capture, as torch's documentation wants
FAR = 0.05  # relative difference from eager that no rounding explains


@dataclass
class Graph:
    """A captured step: what it reads, and what a replay leaves."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    loss: torch.Tensor
    gradients: list[torch.Tensor]


class GraphedObjective:
    """An objective whose loss has the gradients of the edits already, so `backward` only hands them
    out. Without gradients it is the other's loss. capture: False runs the same padded steps without
    graphs, on any device."""

    def __init__(self, objective: Objective, capture: bool = True):
        self.objective, self.model, self.capture = objective, objective.model, capture
        self.lengths, self.texts = objective.lengths, objective.texts
        self.graphs: dict[tuple, Graph] = {}
        self.pool = torch.cuda.graph_pool_handle() if capture else None

    def batch(self, rows: list[int]) -> Batch:
        return padded(self.objective.batch(rows))

    def weight(self, batch: Batch) -> int:
        return self.objective.weight(batch)

    def loss(self, batch: Batch) -> torch.Tensor:
        trained = trained_parameters(self.model)
        if not trained:
            return self.objective.loss(batch)
        if not self.capture:
            loss, *gradients = self._step(batch, trained)
            return KnownGradients.apply(loss, tuple(gradients), *trained)
        tensors = tensors_of(batch)
        key = (batch.layer, *(tuple(t.shape) for t in tensors), *(p.data_ptr() for p in trained))
        if key not in self.graphs:
            try:
                self.graphs[key] = self._captured(batch, trained)
            except RuntimeError as error:  # torch.AcceleratorError too
                reason = str(error).splitlines()[0]
                print(f"no CUDA graphs, steps run eagerly: {reason}", file=sys.stderr)
                self.capture = False
                return self.loss(batch)
        graph = self.graphs[key]
        for ours, new in zip(tensors_of(graph.batch), tensors, strict=True):
            ours.copy_(new)
        graph.graph.replay()
        gradients = tuple(gradient.clone() for gradient in graph.gradients)
        return KnownGradients.apply(graph.loss.clone(), gradients, *trained)

    def _step(self, batch: Batch, trained: list) -> list[torch.Tensor]:
        loss = self.objective.loss(batch)
        return [loss.detach(), *torch.autograd.grad(loss, trained)]

    def _captured(self, batch: Batch, trained: list) -> Graph:
        graph, (loss, *gradients) = captured(lambda: self._step(batch, trained), self.pool)
        return Graph(graph, batch, loss, gradients)


def captured(
    work: Callable[[], list[torch.Tensor]], pool: tuple[int, int] | None = None
) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A CUDA graph of some work, and the tensors that a replay fills: those that the work returns.
    It was replayed once. pool: memory that it may share. RuntimeError if it cannot be captured, or
    if the replay differs from the work done eagerly."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            eager = work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        filled = work()
    graph.replay()
    for ours, theirs in zip(filled, eager, strict=True):
        if not (ours - theirs).norm() <= FAR * theirs.norm() + 1e-6:
            raise RuntimeError("a replay differs from the same work done eagerly")
    return graph, filled


def padded(batch: Batch) -> Batch:
    """The same with more padding, of weight 0."""
    T, N = (-n % MULTIPLE for n in (batch.ids.shape[1], len(batch.target)))

    def wide(t: torch.Tensor) -> torch.Tensor:  # [B, T, ...]
        return F.pad(t, (0, 0) * (t.dim() - 2) + (0, T))

    tree, hidden = batch.tree, batch.hidden
    return replace(
        batch,
        ids=wide(batch.ids),
        source=tuple(F.pad(index, (0, N)) for index in batch.source),
        target=F.pad(batch.target, (0, N)),
        text=F.pad(batch.text, (0, N)),
        weight=F.pad(torch.ones(len(batch.target), device=batch.ids.device), (0, N)),
        tree=tree and replace(tree, positions=wide(tree.positions), branch=wide(tree.branch)),
        hidden=hidden if hidden is None else wide(hidden),
    )


def tensors_of(value: object) -> list[torch.Tensor]:
    """All tensors in a batch, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if is_dataclass(value):
        value = tuple(getattr(value, field.name) for field in fields(value))
    return [t for part in value for t in tensors_of(part)] if isinstance(value, tuple) else []
