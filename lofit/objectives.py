"""What a step trains on: texts encoded once, and the loss of any of them.

With `plain`, every text has its own row and every layer is computed at every step, as in the
paper's code. Without, the work that need not be done is left out; the loss is the same.
"""

from functools import cached_property

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lofit.heads import edits_off, lowest_edit
from lofit.llm.batches import Batch, check_length, collate, encode_example, pack
from lofit.llm.model import CausalLM
from lofit.llm.scoring import sum_by_text, target_losses
from lofit.llm.step import make_step
from lofit.llm.tokenizer import Tokenizer
from lofit.losses import dpo_loss

BETA = 0.5  # of DPO (paper, appendix)
MAX_LENGTH = {"cross_entropy": 400, "dpo": 512}  # tokens of an example, as in the paper's code
MAX_BYTES = 4 * 2**30  # of hidden states that are kept


class FrozenLayers:
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
            step = make_step(self.model.config, batch.ids, tree=batch.tree)
            hidden = self.model.model.before(layer, batch.ids, step)
        for i, row, length in zip(examples, hidden.cpu(), batch.lengths, strict=True):
            if i not in self.kept and (kept := row[:length].clone()).nbytes <= self.left:
                self.kept[i] = kept
                self.left -= kept.nbytes
        return layer, hidden


class CrossEntropy:
    """Cross-entropy on the answers (and eos)."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        texts: list[tuple[str, str]],
        where: str,
        plain: bool = False,
    ):
        """texts: (prompt, answer); `where` names them in errors. InputError if one is too long."""
        self.model, self.device = model, model.lm_head.weight.device
        self.rows = [encode_example(tokenizer, prompt, answer) for prompt, answer in texts]
        self.lengths = [len(ids) for ids, _ in self.rows]
        _check(self.lengths, model, MAX_LENGTH["cross_entropy"], where)
        self.frozen = None if plain else FrozenLayers(model)

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self) -> list[list[int]]:
        """The ids of every example."""
        return [ids for ids, _ in self.rows]

    def loss(self, rows: list[int]) -> torch.Tensor:
        """Mean over the answer tokens of these examples."""
        return target_losses(self.model, *self.remember(rows)).mean()

    def remember(self, rows: list[int]) -> tuple:
        """The batch of these examples, and what is kept of it from epoch to epoch."""
        batch = collate([self.rows[i] for i in rows], self.device)
        return batch, *(self.frozen(rows, batch) if self.frozen else ())

    def weight(self, rows: list[int]) -> int:
        """What `loss` is a mean over: answer tokens."""
        return sum(label >= 0 for i in rows for label in self.rows[i][1])


class Preference:
    """DPO: prefer each chosen answer to its rejected one. The reference is the model with its
    edits off; its log-probabilities are computed once, for the first loss."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        texts: list[tuple[str, str, str]],
        where: str,
        plain: bool = False,
    ):
        """texts: (prompt, chosen, rejected); `where` names them in errors. InputError if one is too
        long."""
        self.model, self.device = model, model.lm_head.weight.device
        self.chosen = [encode_example(tokenizer, prompt, chosen) for prompt, chosen, _ in texts]
        self.rejected = [encode_example(tokenizer, prompt, bad) for prompt, _, bad in texts]
        pairs = list(zip(self.chosen, self.rejected, strict=True))
        self.lengths = [len(c) + len(r) for (c, _), (r, _) in pairs]
        _check([max(len(c), len(r)) for (c, _), (r, _) in pairs], model, MAX_LENGTH["dpo"], where)
        self.plain, self.frozen = plain, FrozenLayers(model)

    @cached_property
    def reference(self) -> torch.Tensor:
        """The reference's log-probabilities of all examples: [2, examples]."""
        return self.refer(list(range(len(self))))

    def refer(self, rows: list[int]) -> torch.Tensor:
        """The reference's log-probabilities of these examples: [2, rows]."""
        batches = tqdm(range(0, len(rows), 8), "reference", disable=None, leave=False)
        with edits_off(self.model), torch.no_grad():
            return torch.cat([self._log_probs(rows[i : i + 8], keep=False) for i in batches], dim=1)

    def __len__(self) -> int:
        return len(self.chosen)

    def _log_probs(self, rows: list[int], keep: bool = True) -> torch.Tensor:
        """[2, rows], of chosen and rejected answers. The prompt of a pair is computed once."""
        if self.plain:
            texts = [self.chosen[i] for i in rows] + [self.rejected[i] for i in rows]
            batch = collate(texts, self.device)
            return sum_by_text(target_losses(self.model, batch), batch).view(2, -1)
        batch, *known = self.remember(rows, keep)
        return sum_by_text(target_losses(self.model, batch, *known), batch).view(-1, 2).T

    def remember(self, rows: list[int], keep: bool = True) -> tuple:
        """The batch of these pairs, and what is kept of it from epoch to epoch."""
        batch = pack([[self.chosen[i], self.rejected[i]] for i in rows], self.device)
        return batch, *(self.frozen(rows, batch) if keep and not self.plain else ())

    def texts(self) -> list[list[int]]:
        """The ids of every prompt with its chosen answer."""
        return [ids for ids, _ in self.chosen]

    def loss(self, rows: list[int]) -> torch.Tensor:
        """Mean over these pairs."""
        return dpo_loss(self._log_probs(rows), self.reference[:, rows], BETA)

    def weight(self, rows: list[int]) -> int:
        """What `loss` is a mean over: pairs."""
        return len(rows)


Objective = CrossEntropy | Preference


@torch.no_grad()
def mean_loss(objective: Objective, batch_size: int) -> float:
    """The loss over all examples, computed in batches."""
    total = 0.0
    for start in range(0, len(objective), batch_size):
        rows = list(range(start, min(start + batch_size, len(objective))))
        total += objective.weight(rows) * objective.loss(rows).item()
    return total / objective.weight(list(range(len(objective))))


def _check(lengths: list[int], model: CausalLM, longest: int, where: str) -> None:
    check_length(lengths, min(longest, model.config.max_position_embeddings), where)
