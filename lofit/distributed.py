"""Several processes under torchrun: each computes its share, the first one prints and writes.

    torchrun --standalone --nproc-per-node 2 -- train.py

Every process runs the same script on the same batches, and computes the loss of its own rows of
each batch. The gradients of the edits, a few thousand values, are summed over the processes. With
--shard the layers' weights are split over the processes as well, by torch's FSDP2.
"""

import os
import signal
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from lofit import errors, files
from lofit.errors import InputError
from lofit.llm.batches import Batch
from lofit.llm.checkpoint import Whole
from lofit.llm.model import CausalLM
from lofit.objectives import KnownGradients, Objective, trained_parameters


def join(device: str) -> str:
    """Meet the other processes. All but the first write and print nothing from here on. Returns
    this process's own device. InputError if it has none."""
    # a process that waits for another handles no signal before that one answers: end it at once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not dist.is_initialized():
        gpus = torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        store = dist.distributed_c10d._get_default_store()

        def is_first_to_fail() -> bool:
            sys.stderr = sys.__stderr__
            return store.add("errors", 1) == 1

        errors.speaks = is_first_to_fail  # one line for an error that all of them meet
    if dist.get_rank() > 0:
        files.WRITES = False
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if device == "cpu" or not torch.cuda.is_available():
        return device
    own, n = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device not in ("auto", "cuda") or own >= n:
        raise InputError(
            f"--device {device}: each process needs a GPU of its own, and {n} are visible; start"
            f" {n} processes with --device cuda, or take --device cpu"
        )
    torch.cuda.set_device(own)
    return f"cuda:{own}"


def wait() -> None:
    """Return when all processes have called this."""
    dist.barrier()


def spread(work: Callable[[list], list], items: list) -> list:
    """work(items), with a share of the items in each process. Returns the results of all, in the
    items' order."""
    rank, n = dist.get_rank(), dist.get_world_size()
    own, parts = items[rank::n], [None] * n
    dist.all_gather_object(parts, work(own) if own else [])
    return [parts[i % n][i // n] for i in range(len(items))]


class SharedObjective:
    """An objective whose loss all processes compute together, each for some of the rows. They must
    ask for the same losses in the same order."""

    def __init__(self, objective: Objective):
        self.objective, self.model = objective, objective.model
        self.lengths, self.texts = objective.lengths, objective.texts

    def batch(self, rows: list[int]) -> tuple[Batch, float, int]:
        """This process's rows, their share of the loss, and the weight of all rows."""
        # A process without a row of its own computes the first one, with weight 0: every layer of
        # split weights needs all processes.
        own = rows[dist.get_rank() :: dist.get_world_size()]
        batch = self.objective.batch(own or rows[:1])
        weights = torch.tensor([float(self.objective.weight(batch)) if own else 0.0])
        mine = weights.item()
        dist.all_reduce(weights)
        return batch, mine / weights.item(), int(weights)

    def weight(self, batch: tuple[Batch, float, int]) -> int:
        return batch[2]

    def loss(self, batch: tuple[Batch, float, int]) -> torch.Tensor:
        """The mean over the rows of all processes. Gradients are summed here, so that the penalty
        and clipping see the whole gradient, and every process takes the same step."""
        own, share, _ = batch
        trained = trained_parameters(self.model)
        loss = self.objective.loss(own) * share
        gradients = torch.autograd.grad(loss, trained) if trained else ()
        sums = torch.cat([loss.detach().view(1), *(g.flatten() for g in gradients)])
        dist.all_reduce(sums)
        loss, *gradients = sums.split([1, *(p.numel() for p in trained)])
        return KnownGradients.apply(loss[0], tuple(gradients), *trained)


class Sharded(Whole):
    """Each process keeps its rows of every layer's tensors, as FSDP2 gives them. Embedding, last
    norm and lm_head stay whole."""

    def keep(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.startswith("model.layers."):
            size = -(-len(tensor) // dist.get_world_size())  # less for the last processes
            tensor = tensor[dist.get_rank() * size :][:size].clone()
        return super().keep(name, tensor)

    def prepare(self, model: CausalLM, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Split the model; a layer is gathered when it runs, and freed after it."""
        # imported here: they take a second
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        mesh = init_device_mesh(torch.device(self.device).type, (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        for name, p in model.state_dict().items():
            if isinstance(p, DTensor):
                whole = {"shape": p.shape, "stride": p.stride()}
                kept[name] = DTensor.from_local(kept[name], mesh, p.placements, **whole)
        return kept
