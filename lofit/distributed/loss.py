"""A loss that several processes compute together, each a share of its rows: see parallel.py."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from lofit.distributed.group import gather, gather_bytes, several, spread

Around = Callable[[], AbstractContextManager]


def shared(objective, around_loss: Around, around_passes: Around):
    """An objective whose loss is computed by all processes; as it is, where there is one.

    What is entered while a loss and its gradients are computed by all, and while each process runs
    the model as often as it has to.
    """
    return SharedObjective(objective, around_loss, around_passes) if several() else objective


class SharedObjective:
    """What `objectives.Objective` is, for one of several processes. Each must ask for the same
    losses in the same order.

    whole: the objective of one process; sent: bytes that this process gave so far, to the sums of
    losses and gradients and for hidden states to be kept.
    """

    def __init__(self, whole, around_loss: Around, around_passes: Around):
        self.whole, self.around, self.model = whole, around_loss, whole.model
        self.lengths, self.texts, self.weight = whole.lengths, whole.texts, whole.weight
        self.sent = {"sums": 0, "kept": 0}
        if hasattr(whole, "refer"):  # DPO's reference

            def refer(rows: list[int]) -> list[list[float]]:
                with around_passes():
                    return whole.refer(rows).T.tolist() if rows else []

            found = spread(range(len(whole)), refer)
            whole.reference = torch.tensor(found, device=whole.device).T
        if whole.frozen and sum(self.lengths) * self._bytes_of_token() > whole.frozen.left:
            whole.frozen.left = 0  # all are kept or none, so that all processes do the same

    def __len__(self) -> int:
        return len(self.whole)

    def loss(self, rows: list[int]) -> torch.Tensor:
        """The loss over all these rows. Its gradients are computed and summed here, and `backward`
        hands them out: who adds a penalty and clips sees the whole gradient."""
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
        self.sent["sums"] += total.nbytes
        if total[1] > 0:
            self._exchange(new)
        sums = total[2:].split([p.numel() for p in trained])
        return _Summed.apply(total[0], sums, *trained)

    def remember(self, rows: list[int]) -> None:
        """See `resume.Progress`."""
        own, _ = self._share(rows)
        before = self._kept(own)
        self.whole.remember(own)
        if self.whole.frozen:
            self._exchange(self._new(own, before))

    def _share(self, rows: list[int]) -> tuple[list[int], float]:
        """This process's rows, and their share of the loss. None stands aside, for the layers of a
        split model are gathered by all: without a row of its own it takes the first, for nothing.
        """
        own = rows[dist.get_rank() :: dist.get_world_size()]
        return own or rows[:1], self.weight(own) / self.weight(rows) if own else 0.0

    def _kept(self, rows: list[int]) -> list[torch.Tensor | None]:
        kept = self.whole.frozen.kept if self.whole.frozen else {}
        return [kept.get(i) for i in rows]

    def _new(self, rows: list[int], before: list[torch.Tensor | None]) -> list[int]:
        now = zip(rows, self._kept(rows), before, strict=True)
        return [i for i, states, old in now if states is not old]

    def _exchange(self, new: list[int]) -> None:
        """Keep what the others computed below the lowest edit, as they do: in the next epoch other
        batches are drawn, and who has an example then had another one now."""
        frozen, dtype = self.whole.frozen, self.model.lm_head.weight.dtype
        tensors = [frozen.kept[i] for i in new]
        shapes = gather([[i, len(t)] for i, t in zip(new, tensors, strict=True)])
        data = b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors)
        self.sent["kept"] += len(data)
        for shape, part in zip(shapes, gather_bytes(data), strict=True):
            hidden = part.view(dtype).view(-1, self.model.config.hidden_size)
            parts = hidden.split([length for _, length in shape])
            for (i, _), states in zip(shape, parts, strict=True):
                if i not in frozen.kept:
                    frozen.kept[i] = states.clone()
                    frozen.left -= states.nbytes

    def _bytes_of_token(self) -> int:
        return self.model.config.hidden_size * self.model.lm_head.weight.dtype.itemsize


class _Summed(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx, total: torch.Tensor, gradients: tuple[torch.Tensor], *trained: torch.Tensor):
        ctx.gradients = [g.view_as(p) for g, p in zip(gradients, trained, strict=True)]
        return total.clone()

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        return None, None, *(upstream * gradient for gradient in ctx.gradients)
