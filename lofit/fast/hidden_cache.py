"""The hidden states below the lowest edit, computed in the first epoch and kept for the others.

Nothing below that layer is trained and the examples stay the same, so all epochs would compute the
same. With the heads that LoFiT chooses this is often half of the model.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from lofit.heads import get_edits
from lofit.llm.batches import Batch
from lofit.llm.model import CausalLM
from lofit.objectives import Objective

MAX_BYTES = 4 * 2**30  # of RAM; what is beyond is computed each time


class HiddenCache:
    """An objective whose batches know what enters the lowest edited layer."""

    def __init__(self, objective: Objective, max_bytes: int = MAX_BYTES):
        self.objective, self.model, self.lengths = objective, objective.model, objective.lengths
        self.texts, self.loss, self.weight = objective.texts, objective.loss, objective.weight
        self.kept: dict[int, torch.Tensor] = {}  # example -> [its length, D]
        self.layer, self.left = 0, max_bytes

    def batch(self, rows: list[int]) -> Batch:
        batch, layer = self.objective.batch(rows), lowest_edit(self.model)
        if layer != self.layer:  # other heads are edited now
            self.left += sum(states.nbytes for states in self.kept.values())
            self.layer, self.kept = layer, {}
        if layer == 0:
            return batch
        if all(i in self.kept for i in rows):
            hidden = pad_sequence([self.kept[i] for i in rows], batch_first=True)
            return replace(batch, layer=layer, hidden=hidden.to(batch.ids.device))
        with torch.no_grad():
            hidden = self.model.model.lower(layer, batch.ids, batch.context(self.model.config))
        for i, row, length in zip(rows, hidden.cpu(), batch.lengths, strict=True):
            if i not in self.kept and row[:length].nbytes <= self.left:
                self.kept[i] = row[:length].clone()
                self.left -= self.kept[i].nbytes
        return replace(batch, layer=layer, hidden=hidden)


def lowest_edit(model: CausalLM) -> int:
    """The first layer with an edit, or the last layer."""
    edits = get_edits(model)
    edited = (i for i, edit in enumerate(edits) if not isinstance(edit, nn.Identity))
    return next(edited, len(edits) - 1)
