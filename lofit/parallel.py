"""Several processes, started by torchrun: each computes its share, the first prints and writes.

    torchrun --standalone --nproc-per-node 2 train.py

Every process runs the same script on the same batches. Of a batch each computes the losses of its
rows; what is summed over the processes are the edits' gradients and two numbers. Without torchrun
nothing here does anything.
"""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.distributed as dist

from lofit import errors
from lofit.errors import InputError


def several() -> bool:
    """Whether this process is one of a group."""
    return dist.is_initialized()


def is_first() -> bool:
    """Whether this process prints and writes."""
    return not several() or dist.get_rank() == 0


def run(main: Callable[[], None]) -> None:
    """`errors.run`, under torchrun as one of a group: what ends one process ends all, by one line
    of the one that met it first."""
    errors.run(partial(_in_group, main) if dist.is_torchelastic_launched() else main)


def _in_group(main: Callable[[], None]) -> None:
    # a process that waits for another hears no signal until that one answers: let it end at once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rank, at = os.environ["RANK"], f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (dist.DistError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"process {rank}: the processes do not meet at {at} ({why})") from None
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        agree("the arguments", shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]))
        main()
    except InputError as error:
        _end(error)
    except RuntimeError as error:
        sys.stderr = sys.__stderr__
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        _end(InputError("another process ended before its work was done, and so did this one"))
    except Exception:
        sys.stderr = sys.__stderr__  # a traceback is seen, whoever it is of
        raise
    dist.destroy_process_group()


def _end(error: InputError) -> None:
    """Raise the error where it is the first of the group, else end without a word."""
    try:
        first = dist.distributed_c10d._get_default_store().add("errors", 1) == 1
    except RuntimeError:  # the store went with its process
        first = True
    if not first:
        sys.exit(2)
    sys.stderr = sys.__stderr__
    raise error


def device(name: str) -> str:
    """auto, cuda, cpu -> this process's own. InputError where there are too few."""
    if not several() or name == "cpu" or not torch.cuda.is_available():
        return name
    own, n = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if name not in ("auto", "cuda") or own >= n:
        raise InputError(
            f"--device {name}: each process takes a GPU of its own, and {n} are visible; start as"
            " many processes with --device cuda (CUDA_VISIBLE_DEVICES chooses), or --device cpu"
        )
    torch.cuda.set_device(own)
    return f"cuda:{own}"


def gather(value: object) -> list:
    """What each process has, in their order; anything that is JSON."""
    return [
        json.loads(data.numpy().tobytes()) for data in _gather_bytes(json.dumps(value).encode())
    ]


def _gather_bytes(data: bytes) -> list[torch.Tensor]:
    """Each process's bytes as uint8 on CPU, of any number."""
    own = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    room = [own.new_zeros(max(1, int(max(sizes)))) for _ in sizes]
    dist.all_gather(room, torch.cat((own, own.new_zeros(len(room[0]) - len(own)))))
    return [filled[: int(size)] for filled, size in zip(room, sizes, strict=True)]


def agree(what: str, value: object) -> None:
    """InputError unless all processes have the same value."""
    found = gather(value) if several() else []
    for rank, other in enumerate(found):
        if other != found[0]:
            raise InputError(
                f"{what} of process {rank} differ: {other!r}, but {found[0]!r} of process 0; start"
                " all processes alike"
            )


def spread(items: Iterable, work: Callable[[list], list]) -> list:
    """work(items), a share in each process: what it gives for each, in the order of items."""
    items = list(items)
    if not several():
        return work(items)
    rank, n = dist.get_rank(), dist.get_world_size()
    try:
        parts = gather(work(items[rank::n]))
    except InputError as error:
        raise InputError(f"{error} (process {rank} has items {rank}, {rank + n}, ...)") from None
    return [parts[i % n][i // n] for i in range(len(items))]


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
        for shape, part in zip(shapes, _gather_bytes(data), strict=True):
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
