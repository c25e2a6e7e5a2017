"""The hidden states below the lowest edit, computed in the first epoch and kept for the others."""

import torch
from torch.nn.utils.rnn import pad_sequence

from lofit.heads import lowest_edit
from lofit.llm.batches import Batch
from lofit.llm.context import make_context
from lofit.llm.model import CausalLM

MAX_BYTES = 4 * 2**30  # of hidden states that are kept


class HiddenCache:
    """The hidden states that enter the lowest edited layer, computed once per row of examples.

    Nothing below that layer is trained and the examples stay the same, so all epochs would compute
    the same. They are kept in RAM up to `max_bytes`; what is beyond is computed each time.
    """

    def __init__(self, model: CausalLM, max_bytes: int = MAX_BYTES):
        self.model, self.left, self.layer = model, max_bytes, 0
        self.kept: dict[int, torch.Tensor] = {}  # example -> [its length, D]

    def __call__(self, examples: list[int], batch: Batch) -> tuple[int, torch.Tensor | None]:
        """(lowest edited layer, or the last, what enters it: [B, T, D]); None for the embedding."""
        layer = min(lowest_edit(self.model), self.model.config.num_hidden_layers - 1)
        if layer != self.layer:  # other heads are edited now
            self.left += sum(x.nbytes for x in self.kept.values())
            self.layer, self.kept = layer, {}
        if layer == 0:
            return 0, None
        if all(i in self.kept for i in examples):
            rows = [self.kept[i] for i in examples]
            return layer, pad_sequence(rows, batch_first=True).to(batch.ids.device)
        with torch.no_grad():
            context = make_context(self.model.config, batch.ids, tree=batch.tree)
            hidden = self.model.model.before(layer, batch.ids, context)
        for i, row, length in zip(examples, hidden.cpu(), batch.lengths, strict=True):
            if i not in self.kept and (kept := row[:length].clone()).nbytes <= self.left:
                self.kept[i] = kept
                self.left -= kept.nbytes
        return layer, hidden
