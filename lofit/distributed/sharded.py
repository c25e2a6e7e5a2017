"""A frozen model whose weights are split over the processes by FSDP2.

Each process keeps its rows of every tensor, and reads no others from disk. A layer is gathered when
it runs and freed after it, the embedding too; lm_head and the last norm as `gather_ends` says.
All processes must therefore run the same layers in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from lofit.distributed.group import gather
from lofit.llm.model import CausalLM


class Shards:
    """This process's part of every tensor: the rows that FSDP2 and DTensor give it."""

    def __init__(self, device: str):
        self.device, self.rank, self.n = device, dist.get_rank(), dist.get_world_size()

    def rows(self, n: int) -> slice:
        """Of n rows of a tensor: a part of equal size for each process, less for the last ones."""
        size = -(-n // self.n)
        return slice(min(n, self.rank * size), min(n, (self.rank + 1) * size))

    def merge(self, samples: dict[str, list[float]]) -> dict[str, list[float]]:
        """What each process sampled of its rows, by tensor, put together."""
        found = gather(samples)
        return {name: sum((part[name] for part in found), []) for name in samples}

    def split(self, model: CausalLM, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Split a model on the meta device; returns the weights that it takes, made of the rows
        that this process has."""
        # imported here: it takes a second
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        mesh = init_device_mesh(torch.device(self.device).type, (self.n,))
        tied = model.config.tie_word_embeddings
        for part in [*model.model.layers, *([] if tied else [model.model.embed_tokens])]:
            fully_shard(part, mesh=mesh)
            if mesh.device_type == "cpu":
                # none ahead in the backward pass: gloo would do it through a third copy, and first
                part.set_modules_to_backward_prefetch([part])
        # what is left: lm_head (with a tied embedding) and the last norm
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        gather_ends(model)
        return {
            name: DTensor.from_local(
                own[name], mesh, p.placements, shape=p.shape, stride=p.stride()
            )
            for name, p in model.state_dict().items()
        }

    def begin(self, model: CausalLM) -> None:
        """To be called once the model has its weights."""
        with gathered(model), torch.no_grad():
            # FSDP2 takes the first module that is called for the root of all
            model(torch.zeros(1, 1, dtype=torch.int64, device=self.device))


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "unshard")


def gather_ends(model: CausalLM) -> None:
    """Let each pass gather lm_head and the last norm of a split model when it comes to that norm.
    They stay until the gradient is back there, `gathered` ends or the next pass begins: the layers
    run without them. But a tied embedding, which a pass needs at both ends, stays from its
    beginning.

    lm_head itself gathers nothing: a loss calls it for each of its parts, and of those one process
    has more than another.
    """

    def whole(*_) -> None:
        model.unshard()

    def parted(*_) -> None:
        model.reshard()

    table, norm, tied = model.model.embed_tokens, model.model.norm, model.config.tie_word_embeddings
    table.register_forward_pre_hook(whole if tied else parted, prepend=True)
    norm.register_forward_pre_hook(whole)
    norm.register_full_backward_hook(parted)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A pass with what needs its lm_head, the loss and its gradients; after it, a split model is
    split in all its parts."""
    try:
        yield
    finally:
        if is_sharded(model):
            model.reshard()


@contextmanager
def in_step(model: CausalLM) -> Iterator[None]:
    """Inside, each process may run a split model as often as it likes, without gradients. Before
    each pass it tells the others, and whoever is through runs along until all are. A pass is one of
    `model.model`: to call the model as a whole gathers lm_head before the others are told."""
    if not is_sharded(model):
        yield
        return
    device = model.lm_head.weight.device

    def someone_runs(one: int) -> bool:
        running = torch.tensor(one)
        dist.all_reduce(running)
        return running.item() > 0

    def tell(*_) -> None:
        someone_runs(1)

    with gathered(model), torch.no_grad():
        hook = model.model.embed_tokens.register_forward_pre_hook(tell, prepend=True)
        try:
            yield
        finally:
            hook.remove()
        while someone_runs(0):
            model.model(torch.zeros(1, 1, dtype=torch.int64, device=device))
