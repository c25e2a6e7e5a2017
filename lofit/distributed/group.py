"""Several processes, started by torchrun: each computes its share, the first prints and writes.

    torchrun --standalone --nproc-per-node 2 -- train.py

Every process runs the same script on the same batches. Each computes the losses of its rows of a
batch; the edits' gradients and two numbers are summed over the processes.
"""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist

from lofit import errors
from lofit.errors import InputError
from lofit.files import is_first


def run(main: Callable[[], None]) -> None:
    """`errors.run` as one process of a group: what ends one process ends all, with one line from
    the process that met it first."""
    errors.run(partial(_in_group, main))


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
    if name == "cpu" or not torch.cuda.is_available():
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
    return [json.loads(data.numpy().tobytes()) for data in gather_bytes(json.dumps(value).encode())]


def gather_bytes(data: bytes) -> list[torch.Tensor]:
    """Each process's bytes as uint8 on CPU, of any number."""
    own = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    room = [own.new_zeros(max(1, int(max(sizes)))) for _ in sizes]
    dist.all_gather(room, torch.cat((own, own.new_zeros(len(room[0]) - len(own)))))
    return [filled[: int(size)] for filled, size in zip(room, sizes, strict=True)]


def agree(what: str, value: object) -> None:
    """InputError unless all processes have the same value."""
    found = gather(value)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise InputError(
                f"{what} of process {rank} differ: {other!r}, but {found[0]!r} of process 0; start"
                " all processes alike"
            )


def spread(items: Iterable, work: Callable[[list], list]) -> list:
    """work(items), a share in each process: what it gives for each, in the order of items."""
    items = list(items)
    rank, n = dist.get_rank(), dist.get_world_size()
    try:
        parts = gather(work(items[rank::n]))
    except InputError as error:
        raise InputError(f"{error} (process {rank} has items {rank}, {rank + n}, ...)") from None
    return [parts[i % n][i // n] for i in range(len(items))]
