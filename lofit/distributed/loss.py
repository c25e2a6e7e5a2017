"""A loss that several processes compute together, each a share of its rows: see group.py."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from lofit.distributed.group import gather, gather_bytes, spread
from lofit.losses import KnownGradients

Around = Callable[[], AbstractContextManager]


class DistributedObjective:
    """An objective (see objectives.py) whose loss is computed by all processes of a group. Each
    must ask for the same losses in the same order.

    whole: the objective of one process. around_loss: context manager entered for each joint loss.
    around_passes: context manager entered while ranks run different numbers of forward passes.
    bytes_sent: by this process so far, for the sums of losses and gradients, and for cached states.
    """

    def __init__(self, whole, around_loss: Around, around_passes: Around):
        self.whole, self.around, self.model = whole, around_loss, whole.model
        self.lengths, self.texts, self.weight = whole.lengths, whole.texts, whole.weight
        self.hash = whole.hash
        self.bytes_sent = {"sums": 0, "cache": 0}
        if hasattr(whole, "reference_log_probs"):  # DPO's reference

            def reference(rows: list[int]) -> list[list[float]]:
                with around_passes():
                    return whole.reference_log_probs(rows).T.tolist() if rows else []

            found = spread(range(len(whole)), reference)
            whole.reference = torch.tensor(found, device=whole.device).T
        if whole.cache and sum(self.lengths) * self._bytes_of_token() > whole.cache.left:
            whole.cache.left = 0  # all are cached or none, so that all processes do the same

    def __len__(self) -> int:
        return len(self.whole)

    def loss(self, rows: list[int]) -> torch.Tensor:
        """The loss over all these rows. Its gradients are computed and summed here, and `backward`
        hands them out: a penalty and clipping see the whole gradient."""
        own, share = self._share(rows)
        before = self._kept(own)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        trained = trained if torch.is_grad_enabled() else []
        with self.around():
            loss = self.whole.loss(own) * share
            gradients = torch.autograd.grad(loss, trained) if trained else ()
        new = self._new(own, before)
        numbers = loss.new_tensor([loss.item(), len(new)])
        total = torch.cat([numbers, *(g.flatten() for g in gradients)])
        dist.all_reduce(total)
        self.bytes_sent["sums"] += total.nbytes
        if total[1] > 0:
            self._exchange(new)
        sums = total[2:].split([p.numel() for p in trained])
        return KnownGradients.apply(total[0], sums, *trained)

    def fill_cache(self, rows: list[int]) -> None:
        """Compute the hidden states of these examples into the cache of all, without a loss."""
        own, _ = self._share(rows)
        before = self._kept(own)
        self.whole.fill_cache(own)
        if self.whole.cache:
            self._exchange(self._new(own, before))

    def _share(self, rows: list[int]) -> tuple[list[int], float]:
        """This process's rows, and their share of the loss. None stands aside, for the layers of a
        split model are gathered by all: without a row of its own it takes the first, for nothing.
        """
        own = rows[dist.get_rank() :: dist.get_world_size()]
        return own or rows[:1], self.weight(own) / self.weight(rows) if own else 0.0

    def _kept(self, rows: list[int]) -> list[torch.Tensor | None]:
        kept = self.whole.cache.kept if self.whole.cache else {}
        return [kept.get(i) for i in rows]

    def _new(self, rows: list[int], before: list[torch.Tensor | None]) -> list[int]:
        now = zip(rows, self._kept(rows), before, strict=True)
        return [i for i, states, old in now if states is not old]

    def _exchange(self, new: list[int]) -> None:
        """All-gather the cached hidden states: next epoch an example may land on another rank."""
        cache, dtype = self.whole.cache, self.model.lm_head.weight.dtype
        tensors = [cache.kept[i] for i in new]
        shapes = gather([[i, len(t)] for i, t in zip(new, tensors, strict=True)])
        data = b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors)
        self.bytes_sent["cache"] += len(data)
        for shape, part in zip(shapes, gather_bytes(data), strict=True):
            hidden = part.view(dtype).view(-1, self.model.config.hidden_size)
            parts = hidden.split([length for _, length in shape])
            for (i, _), states in zip(shape, parts, strict=True):
                if i not in cache.kept:
                    cache.kept[i] = states.clone()
                    cache.left -= states.nbytes

    def _bytes_of_token(self) -> int:
        return self.model.config.hidden_size * self.model.lm_head.weight.dtype.itemsize
