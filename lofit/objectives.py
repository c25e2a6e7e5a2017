"""What a step trains on: examples encoded once, the batch of any of them, and its loss.

An objective has
    lengths        tokens of each example, by which batches are drawn
    texts          the ids and labels of each text
    batch(rows)    the tensors of these examples, a list of their indices
    loss(batch)    what is minimised, a mean over them
    weight(batch)  of how many things it is a mean
Work that need not be done is left out by wrapping one objective in another (fast/hidden_cache.py;
on a GPU fast/graphs.py), and shared out so as well (`Accumulated`; under torchrun distributed.py).
A wrapper changes what a batch knows, or who computes it when, and never what the loss is.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lofit.heads import edits_off
from lofit.llm.batches import Batch, check_length, collate, encode_example
from lofit.llm.model import CausalLM
from lofit.llm.scoring import sum_by_text, target_losses
from lofit.llm.tokenizer import Tokenizer

BETA = 0.5  # of DPO (paper, appendix): the larger, the nearer the model stays to the base
REFERENCE_BATCH = 8
LIMIT_OF = "the limit of the task"


class CrossEntropy:
    """Cross-entropy on the answers (and eos): mean over their tokens."""

    def __init__(
        self, model: CausalLM, tokenizer: Tokenizer, texts: list[tuple[str, str]],
        max_length: int = 400, names: tuple[str, ...] = (),
    ):  # fmt: skip
        """texts: (prompt, answer); names: of the texts, for errors; max_length: of a text in
        tokens. InputError if one is longer."""
        self.model, self.device = model, model.lm_head.weight.device
        # Only tokens of the answer have labels: the prompt will always be given, so being able to
        # guess it is worth nothing, and its many tokens would drown the answer's few. The eos has a
        # label too, or the model would not learn where to stop.
        self.texts = [encode_example(tokenizer, prompt, answer) for prompt, answer in texts]
        self.lengths = [len(ids) for ids, _ in self.texts]
        check_length(self.lengths, max_length, names, LIMIT_OF)

    def batch(self, rows: list[int]) -> Batch:
        return collate([self.texts[i] for i in rows], self.device)

    def loss(self, batch: Batch) -> torch.Tensor:
        losses = target_losses(self.model, batch)
        if batch.weight is None:
            # a mean over tokens and not over examples, as in HF's Trainer, which the paper's code
            # uses: a long answer weighs more than a short one
            return losses.mean()
        return (losses * batch.weight).sum() / batch.weight.sum()

    def weight(self, batch: Batch) -> int:
        return len(batch.target) if batch.weight is None else int(batch.weight.sum())


class Preference:
    """DPO: prefer each chosen answer to its rejected one, by more than the base model does. The
    base model's log-probabilities never change, so they are computed once, here."""

    def __init__(
        self, model: CausalLM, tokenizer: Tokenizer, texts: list[tuple[str, str, str]],
        max_length: int = 512, names: tuple[str, ...] = (), plain: bool = False,
    ):  # fmt: skip
        """texts: (prompt, chosen, rejected); plain: every answer has a row of its own. Else the
        prompt of a pair is computed once (llm/tree.py)."""
        self.model, self.device = model, model.lm_head.weight.device
        self.pairs = [
            [encode_example(tokenizer, prompt, answer) for answer in (chosen, rejected)]
            for prompt, chosen, rejected in texts
        ]
        self.texts = [text for pair in self.pairs for text in pair]
        self.lengths = [len(chosen) + len(rejected) for (chosen, _), (rejected, _) in self.pairs]
        longest = [max(len(chosen), len(rejected)) for (chosen, _), (rejected, _) in self.pairs]
        check_length(longest, max_length, names, LIMIT_OF)
        self.plain = plain
        self.reference = self._reference()  # [2, pairs]

    @torch.no_grad()
    def _reference(self) -> torch.Tensor:
        rows = list(range(len(self.pairs)))
        parts = [rows[i : i + REFERENCE_BATCH] for i in range(0, len(rows), REFERENCE_BATCH)]
        # the reference is the model without edits, and some may be attached already; the paper's
        # code takes the reference after v's random start, which is nearly the same
        with edits_off(self.model):
            found = [
                self._log_probs(self._batch(part))
                for part in tqdm(parts, "reference", disable=None, leave=False)
            ]
        return torch.cat(found, dim=1)

    def batch(self, rows: list[int]) -> Batch:
        return replace(self._batch(rows), reference=self.reference[:, rows])

    def _batch(self, rows: list[int]) -> Batch:
        if self.plain:
            return collate([text for i in rows for text in self.pairs[i]], self.device)
        from lofit.llm.tree import pack

        return pack([self.pairs[i] for i in rows], self.device)

    def _log_probs(self, batch: Batch) -> torch.Tensor:
        """[2, pairs] of chosen and rejected answers, which take turns in a batch."""
        losses = target_losses(self.model, batch)
        losses = losses if batch.weight is None else losses * batch.weight
        # a sum over an answer's tokens and not a mean: the probability of the whole answer
        return sum_by_text(losses, batch).view(-1, 2).T

    def loss(self, batch: Batch) -> torch.Tensor:
        return dpo_loss(self._log_probs(batch), batch.reference, BETA)

    def weight(self, batch: Batch) -> int:
        return batch.n_texts // 2


Objective = CrossEntropy | Preference


def dpo_loss(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """Mean of -log sigmoid(beta * (margin of the policy - margin of the reference)).

    policy, reference: [2, pairs], log-probabilities of chosen and rejected answers (Rafailov et
    al., arXiv 2305.18290, equation 7).
    """
    # Only how far each answer has moved from the base model counts, not how probable it was there.
    # Before the first step next to nothing has moved, and the loss is about log 2.
    chosen, rejected = policy - reference
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


class KnownGradients(torch.autograd.Function):
    """A loss whose gradients were computed already: apply(loss, gradients, *trained). For wrappers
    that compute them elsewhere, in parts, or in other processes; `backward` hands them out."""

    @staticmethod
    def forward(ctx, loss: torch.Tensor, gradients: tuple[torch.Tensor], *trained: torch.Tensor):
        ctx.gradients = [g.view_as(p) for g, p in zip(gradients, trained, strict=True)]
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        return None, None, *(upstream * gradient for gradient in ctx.gradients)


def trained_parameters(model: CausalLM) -> list[torch.nn.Parameter]:
    """What a loss has gradients for; none where gradients are off."""
    return [p for p in model.parameters() if p.requires_grad] if torch.is_grad_enabled() else []


class Accumulated:
    """An objective whose batches are computed in parts, one after the other: as little memory as a
    smaller batch takes, and the gradient of the whole batch, so the recipe stays."""

    def __init__(self, objective: Objective, parts: int):
        self.objective, self.model, self.parts = objective, objective.model, parts
        self.lengths, self.texts = objective.lengths, objective.texts

    def batch(self, rows: list[int]) -> list[Batch]:
        size = -(-len(rows) // self.parts)
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [self.objective.batch(part) for part in parts]

    def weight(self, batch: list[Batch]) -> int:
        return sum(map(self.objective.weight, batch))

    def loss(self, batch: list[Batch]) -> torch.Tensor:
        trained, whole, losses, sums = trained_parameters(self.model), self.weight(batch), [], []
        for part in batch:
            # a mean over all of the batch is not the mean of its parts' means: they are weighted by
            # how many tokens (or pairs) they have
            loss = self.objective.loss(part) * (self.objective.weight(part) / whole)
            # the gradient of a part is taken at once, which frees what its pass had kept
            gradients = torch.autograd.grad(loss, trained) if trained else ()
            sums = [a + b for a, b in zip(sums, gradients, strict=True)] if sums else gradients
            losses.append(loss.detach())
        return KnownGradients.apply(torch.stack(losses).sum(), tuple(sums), *trained)


@torch.no_grad()
def mean_loss(objective: Objective, batch_size: int) -> float:
    """The loss over all examples, with the edits that are attached now."""
    # the last batch is smaller, and answers differ in length: batches count by what they hold
    n, total, weight = len(objective.lengths), 0.0, 0
    for start in range(0, n, batch_size):
        batch = objective.batch(list(range(start, min(start + batch_size, n))))
        total += objective.weight(batch) * objective.loss(batch).item()
        weight += objective.weight(batch)
    return total / weight
