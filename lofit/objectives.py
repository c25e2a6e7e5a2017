"""What a task trains on: its examples encoded once, and the loss of any of them."""

import torch
from tqdm import tqdm

from lofit.heads import edits_off
from lofit.losses import (
    Encoded,
    answer_cross_entropy,
    answer_log_probs,
    check_length,
    collate,
    dpo_loss,
    encode_example,
)
from lofit.model import CausalLM
from lofit.tasks import Example
from lofit.tokenizer import Tokenizer

BETA = 0.5  # of DPO (paper, appendix)
MAX_LENGTH = {"cross_entropy": 400, "dpo": 512}  # tokens of an example, as in the paper's code


class CrossEntropy:
    """Cross-entropy on the answers (and eos) of examples."""

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, examples: list[Example], where: str):
        """`where` names the examples in errors; InputError if one is too long for the model."""
        self.model, self.device = model, model.lm_head.weight.device
        self.rows = [encode_example(tokenizer, e.prompt, e.answer) for e in examples]
        _check(self.rows, model, MAX_LENGTH["cross_entropy"], where)

    def __len__(self) -> int:
        return len(self.rows)

    def loss(self, rows: list[int]) -> torch.Tensor:
        """Mean over the answer tokens of these examples."""
        return answer_cross_entropy(self.model, collate([self.rows[i] for i in rows], self.device))

    def weight(self, rows: list[int]) -> int:
        """What `loss` is a mean over: answer tokens."""
        return sum(label >= 0 for i in rows for label in self.rows[i][1])


class Preference:
    """DPO: prefer each example's answer to its rejected one. The reference is the model with its
    edits off; its log-probabilities are computed here, once."""

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, examples: list[Example], where: str):
        """`where` names the examples in errors; InputError if one is too long for the model."""
        self.model, self.device = model, model.lm_head.weight.device
        self.chosen = [encode_example(tokenizer, e.prompt, e.answer) for e in examples]
        self.rejected = [encode_example(tokenizer, e.prompt, e.rejected) for e in examples]
        _check(self.chosen + self.rejected, model, MAX_LENGTH["dpo"], where)
        with edits_off(model), torch.no_grad():
            batches = tqdm(range(0, len(self), 8), "reference", disable=None, leave=False)
            found = [self._log_probs(list(range(i, min(i + 8, len(self))))) for i in batches]
        self.reference = torch.cat(found, dim=1)  # [2, examples]

    def __len__(self) -> int:
        return len(self.chosen)

    def _log_probs(self, rows: list[int]) -> torch.Tensor:
        both = [self.chosen[i] for i in rows] + [self.rejected[i] for i in rows]
        return answer_log_probs(self.model, collate(both, self.device)).view(2, len(rows))

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
    total, n = 0.0, 0
    for start in range(0, len(objective), batch_size):
        rows = list(range(start, min(start + batch_size, len(objective))))
        weight = objective.weight(rows)
        total, n = total + weight * objective.loss(rows).item(), n + weight
    return total / n


def _check(rows: list[Encoded], model: CausalLM, longest: int, where: str) -> None:
    limit = min(longest, model.config.max_position_embeddings)
    check_length([len(ids) for ids, _ in rows], limit, where)
