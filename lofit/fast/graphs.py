"""Training steps on a GPU as CUDA graphs: forward and backward of a batch replayed as one.

A step of LoFiT has few tokens and thousands of kernels, so a GPU mostly waits for Python. A graph
has fixed shapes: a batch is padded to a multiple of 16 positions and of 16 targets, whose weight is
0. Every new shape is captured once, replayed, and compared with the same work done eagerly.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lofit.llm.batches import Batch
from lofit.llm.context import Tree
from lofit.llm.model import CausalLM
from lofit.llm.scoring import sum_by_text, target_losses
from lofit.losses import KnownGradients, dpo_loss
from lofit.objectives import BETA, Objective, Preference

MULTIPLE = 16  # of positions and of targets
WARM_UP = 3  # steps before a capture, as torch's documentation wants
FAR = 0.05  # relative difference from eager that no rounding explains


@dataclass
class Graph:
    """A captured step: what it reads, and what a replay leaves."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    loss: torch.Tensor
    gradients: tuple[torch.Tensor, ...]


class GraphedObjective:
    """An objective (see objectives.py) around another one. Its loss has the gradients of the edits
    already, so `backward` only hands them out. Without gradients it is the other's loss.

    capture: False runs the same padded steps without graphs, on any device. compile: the layers are
    compiled, each shape before its capture, which takes seconds: for long runs.
    """

    def __init__(self, objective: Objective, capture: bool = True, compile: bool = False):
        self.objective, self.capture = objective, capture
        self.layers = compiled_layers if compile else nullcontext
        self.graphs: dict[tuple, Graph] = {}
        self.pool = torch.cuda.graph_pool_handle() if capture else None

    def __getattr__(self, name: str):
        return getattr(self.objective, name)

    def __len__(self) -> int:
        return len(self.objective)

    def loss(self, rows: list[int]) -> torch.Tensor:
        """The other's loss of these examples."""
        trained = [p for p in self.objective.model.parameters() if p.requires_grad]
        if not trained or not torch.is_grad_enabled():
            return self.objective.loss(rows)
        first, tensors = padded_inputs(self.objective, rows)
        if not self.capture:
            loss, gradients = self._eager(first, tensors, trained)
            return KnownGradients.apply(loss, gradients, *trained)
        key = (first, *(tuple(t.shape) for t in tensors.values()), *(p.data_ptr() for p in trained))
        try:
            if key not in self.graphs:
                self.graphs[key] = self._captured(first, tensors, trained)
        except RuntimeError as error:  # torch.AcceleratorError too
            print(
                f"no CUDA graphs, steps run eagerly: {str(error).splitlines()[0]}", file=sys.stderr
            )
            self.loss = self.objective.loss
            return self.objective.loss(rows)
        graph = self.graphs[key]
        for name, tensor in tensors.items():
            graph.inputs[name].copy_(tensor)
        graph.graph.replay()
        gradients = tuple(gradient.clone() for gradient in graph.gradients)
        return KnownGradients.apply(graph.loss.clone(), gradients, *trained)

    def _eager(self, first: int, tensors: dict, trained: list) -> tuple:
        with self.layers(self.objective.model):
            loss = padded_loss(self.objective, first, tensors)
            return loss.detach(), torch.autograd.grad(loss, trained)

    def _captured(self, first: int, tensors: dict, trained: list) -> Graph:
        inputs = {name: tensor.clone() for name, tensor in tensors.items()}

        def step() -> list[torch.Tensor]:
            loss, gradients = self._eager(first, inputs, trained)
            return [loss, *gradients]

        graph, (loss, *gradients) = captured(step, self.pool)
        return Graph(graph, inputs, loss, tuple(gradients))


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


@contextmanager
def compiled_layers(model: CausalLM) -> Iterator[None]:
    """Inside, the model's layers are compiled; layers of a kind share what was compiled."""
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    try:
        yield
    finally:
        for layer in model.model.layers:
            del layer.forward  # the class's own comes back


def padded_inputs(objective: Objective, rows: list[int]) -> tuple[int, dict[str, torch.Tensor]]:
    """(first layer to compute, tensors by name) of these examples, padded. weight: [N], 0 for
    targets that are padding."""
    batch, *known = objective.inputs(rows)
    first, hidden = known or (0, None)
    T, N = (-(-n // MULTIPLE) * MULTIPLE for n in (batch.ids.shape[1], len(batch.target)))
    targets = {"row": batch.source[0], "column": batch.source[1]}
    targets |= {"target": batch.target, "text": batch.text}
    targets["weight"] = torch.ones(len(batch.target), device=batch.ids.device)
    places = {"ids": batch.ids}
    if batch.tree is not None:
        places |= {"positions": batch.tree.positions, "branch": batch.tree.branch}
    tensors = {name: F.pad(t, (0, N - len(t))) for name, t in targets.items()}
    tensors |= {name: F.pad(t, (0, T - t.shape[1])) for name, t in places.items()}
    if hidden is not None:
        tensors["hidden"] = F.pad(hidden, (0, 0, 0, T - hidden.shape[1]))
    if isinstance(objective, Preference):
        tensors["reference"] = objective.reference[:, rows]
    return first, tensors


def padded_loss(objective: Objective, first: int, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The objective's loss of what `padded_inputs` made."""
    tree = Tree(tensors["positions"], tensors["branch"]) if "branch" in tensors else None
    ids, source = tensors["ids"], (tensors["row"], tensors["column"])
    n_texts = len(ids) * (2 if isinstance(objective, Preference) else 1)
    batch = Batch(ids, [], source, tensors["target"], tensors["text"], n_texts, tree)
    losses = target_losses(objective.model, batch, first, tensors.get("hidden")) * tensors["weight"]
    if isinstance(objective, Preference):
        return dpo_loss(sum_by_text(losses, batch).view(-1, 2).T, tensors["reference"], BETA)
    return losses.sum() / tensors["weight"].sum()
