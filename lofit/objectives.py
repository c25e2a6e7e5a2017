"""What a step trains on: examples encoded once, and the loss of any of them.

An objective has lengths (tokens of each example), loss(rows) for a list of example indices,
weight(rows) and texts(). With `plain`, every text has its own row and every layer is computed at
every step, as in the paper's code. Without it, the work that need not be done is left out
(fast/hidden_cache.py, and one row for the two answers of a pair); the loss is the same.
"""

from functools import cached_property

import torch
from tqdm import tqdm

from lofit.heads import edits_off
from lofit.llm.batches import check_length, collate, encode_example, pack
from lofit.llm.model import CausalLM
from lofit.llm.scoring import sum_by_text, target_losses
from lofit.llm.tokenizer import Tokenizer
from lofit.losses import dpo_loss

BETA = 0.5  # of DPO (paper, appendix)
MAX_LENGTH = {"cross_entropy": 400, "dpo": 512}  # tokens of an example, as in the paper's code
LIMIT_OF = "the paper's for its tasks; shorten the text, or raise it by --max-length"


class CrossEntropy:
    """Cross-entropy on the answers (and eos)."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        texts: list[tuple[str, str]],
        where: str,
        plain: bool = False,
        max_length: int = MAX_LENGTH["cross_entropy"],
    ):
        """texts: (prompt, answer); `where` names them in errors; max_length: tokens of an example.
        InputError if one is longer, or longer than the model's positions."""
        self.model, self.device = model, model.lm_head.weight.device
        self.rows = [encode_example(tokenizer, prompt, answer) for prompt, answer in texts]
        self.lengths = [len(ids) for ids, _ in self.rows]
        _check(self.lengths, model, max_length, where)
        self.cache = None if plain else _hidden_cache(model)

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self) -> list[list[int]]:
        """The ids of every example."""
        return [ids for ids, _ in self.rows]

    def loss(self, rows: list[int]) -> torch.Tensor:
        """Mean over the answer tokens of these examples."""
        return target_losses(self.model, *self.inputs(rows)).mean()

    def inputs(self, rows: list[int]) -> tuple:
        """The batch of these examples; with a cache also the first layer to compute, and the hidden
        states that enter it."""
        batch = collate([self.rows[i] for i in rows], self.device)
        return batch, *(self.cache(rows, batch) if self.cache else ())

    def fill_cache(self, rows: list[int]) -> None:
        """Compute the hidden states of these examples into the cache, without a loss."""
        self.inputs(rows)

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
        max_length: int = MAX_LENGTH["dpo"],
    ):
        """texts: (prompt, chosen, rejected); `where` names them in errors; max_length: as in
        `CrossEntropy`. InputError if one is too long."""
        self.model, self.device = model, model.lm_head.weight.device
        self.chosen = [encode_example(tokenizer, prompt, chosen) for prompt, chosen, _ in texts]
        self.rejected = [encode_example(tokenizer, prompt, bad) for prompt, _, bad in texts]
        pairs = list(zip(self.chosen, self.rejected, strict=True))
        self.lengths = [len(c) + len(r) for (c, _), (r, _) in pairs]
        _check([max(len(c), len(r)) for (c, _), (r, _) in pairs], model, max_length, where)
        self.plain, self.cache = plain, None if plain else _hidden_cache(model)

    @cached_property
    def reference(self) -> torch.Tensor:
        """The reference's log-probabilities of all examples: [2, examples]."""
        return self.reference_log_probs(list(range(len(self))))

    def reference_log_probs(self, rows: list[int]) -> torch.Tensor:
        """The reference's log-probabilities of these examples: [2, rows]."""
        batches = tqdm(range(0, len(rows), 8), "reference", disable=None, leave=False)
        with edits_off(self.model), torch.no_grad():
            parts = [self._log_probs(rows[i : i + 8], use_cache=False) for i in batches]
            return torch.cat(parts, dim=1)

    def __len__(self) -> int:
        return len(self.chosen)

    def _log_probs(self, rows: list[int], use_cache: bool = True) -> torch.Tensor:
        """[2, rows], of chosen and rejected answers. The prompt of a pair is computed once."""
        if self.plain:
            texts = [self.chosen[i] for i in rows] + [self.rejected[i] for i in rows]
            batch = collate(texts, self.device)
            return sum_by_text(target_losses(self.model, batch), batch).view(2, -1)
        batch, *known = self.inputs(rows, use_cache)
        return sum_by_text(target_losses(self.model, batch, *known), batch).view(-1, 2).T

    def inputs(self, rows: list[int], use_cache: bool = True) -> tuple:
        """The batch of these pairs, and of the cache what `CrossEntropy.inputs` gives."""
        batch = pack([[self.chosen[i], self.rejected[i]] for i in rows], self.device)
        return batch, *(self.cache(rows, batch) if use_cache and self.cache else ())

    def fill_cache(self, rows: list[int]) -> None:
        """Compute the hidden states of these pairs into the cache, without a loss."""
        self.inputs(rows)

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
    check_length(lengths, model.config.max_position_embeddings, where)
    check_length(lengths, longest, where, LIMIT_OF)


def _hidden_cache(model: CausalLM):
    from lofit.fast.hidden_cache import HiddenCache  # only where no flag asks for plain work

    return HiddenCache(model)
