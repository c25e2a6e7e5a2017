"""Going on where a training was stopped: after its last whole epoch, with the same command, to the
same bits (on a CPU). One file, SCRIPT.unfinished in the run folder, which goes when the run is
whole."""

import io
import json
from pathlib import Path

import torch

from lofit.files import write
from lofit.objectives import Objective
from lofit.run.setup import Run


def state_file(run: Run) -> Path:
    return run.folder / f"{run.script}.unfinished"


def save_epoch(run: Run, epoch: int, optimizer: torch.optim.Optimizer, best=None) -> None:
    """epoch: how many are done; best: what the script keeps beside the parameters."""
    (group,) = optimizer.param_groups
    values = [parameter.detach() for parameter in group["params"]]
    state = {"info": json.dumps(run.info), "epoch": epoch, "values": values, "best": best}
    data = io.BytesIO()
    torch.save(state | {"optimizer": optimizer.state_dict()}, data)
    write(state_file(run), data.getvalue())


def restore(
    run: Run, optimizer: torch.optim.Optimizer, objective: Objective, first: list[list[int]]
) -> tuple[int, object]:
    """Put a stopped run's state into the parameters and their optimizer; returns how many epochs
    are done, and what was kept beside them. first: the batches of the first epoch.

    The state must be of this run: same model, data, heads and settings, all of which `info` has.
    """
    path = state_file(run)
    if not path.exists():
        return 0, None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["info"] != json.dumps(run.info):
            raise ValueError("it is of other settings, data or heads")
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            (group,) = optimizer.param_groups
            for parameter, value in zip(group["params"], state["values"], strict=True):
                parameter.copy_(value)
    except Exception as e:  # damaged bytes can fail in any way
        # torch's own message advises to unpickle whatever the file holds: it is not shown
        why = e if type(e) is ValueError else "it is damaged"
        print(f"starting from the beginning, not from {path}: {why}")
        return 0, None
    # Cached hidden states were computed in the batches of the first epoch, and how a matrix product
    # rounds depends on how many rows it has: in other batches the last bits would be others.
    for rows in first:
        objective.batch(rows)
    print(f"continuing after epoch {state['epoch']}, where this run was stopped ({path})")
    return state["epoch"], state["best"]
