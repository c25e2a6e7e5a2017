"""Scoring examples with the model as it is now: generated answers, or given ones by probability."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lofit.llm.generate import Memo, decode_step, generate_all, no_memo
from lofit.llm.scoring import score_answers
from lofit.objectives import Objective, mean_loss
from lofit.run.session import Session
from lofit.tasks import Example
from lofit.tasks.own import OwnTask

EVAL_BATCH = 64


def evaluate(
    run: Session, examples: list[Example], batch_size: int, description: str, memo: Memo = no_memo
) -> list[dict]:
    """The scores of each example with the model's present edits, and what they are based on: a
    prediction, the log-probabilities of the given answers, or both. memo: of scored batches."""
    ways = [predict] if examples[0].generated else []
    ways += [score_given] if examples[0].right else []
    with saving_time(run):
        if not dist.is_initialized():
            parts = [
                way(run, examples, batch_size, description, _apart(memo, i))
                for i, way in enumerate(ways)
            ]
            return _merge(parts)
        from lofit.distributed.group import spread
        from lofit.distributed.sharded import in_step

        def own_share(own: list[Example]) -> list[dict]:
            parts = []
            for way in ways:
                with in_step(run.model):
                    parts.append(way(run, own, batch_size, description, no_memo) if own else [])
            return _merge(parts)

        # each process has batches of its own, so the memo holds what all of them found
        return memo(lambda _: spread(examples, own_share), [])


def validate(run: Session, examples: list[Example]) -> dict[str, float]:
    """The mean of each metric over these examples."""
    scored = evaluate(run, examples, EVAL_BATCH, "validation")
    return {m: sum(s[m] for s in scored) / len(scored) for m in run.task.METRICS}


def validate_epoch(
    run: Session, epoch: int, loss: float, held_out: Objective, val: list[Example]
) -> tuple[dict[str, float], str]:
    """The metrics on the validation split after an epoch, logged, and their part of the epoch's
    line. loss: the mean training loss of the epoch; held_out: the objective of the same split."""
    val_loss, metrics = mean_loss(held_out, EVAL_BATCH), validate(run, val)
    run.log({"epoch": epoch, "train_loss": loss, "val_loss": val_loss, "val": metrics})
    name = run.task.MAIN_METRIC
    return metrics, f"  val loss {val_loss:.4f}  val {name} {metrics[name]:.1%}"


@contextmanager
def saving_time(run: Session) -> Iterator[None]:
    """Inside, offsets are biases and weights are laid out for the CPU; not with --plain, and not
    where the weights are split over processes."""
    if run.plain or run.sharded:
        yield
        return
    from lofit.fast.folded import folded_offsets
    from lofit.fast.packed import packed_weights

    with folded_offsets(run.model):
        if run.decode_step is not decode_step:  # a compiler does not see into the packed products
            yield
            return
        with packed_weights(run.model):
            yield


def predict(
    run: Session, examples: list[Example], batch_size: int, description: str, memo: Memo
) -> list[dict]:
    """{"prediction": the answer generated, metrics...} of each example."""
    prompts = [run.tokenizer.encode_pair(run.wrap(e.prompt), "")[0] for e in examples]
    stop = frozenset() if run.plain else run.stop_ids
    new = generate_all(
        run.model, prompts, new_tokens(run, examples), run.tokenizer.eos_ids, batch_size,
        description, stop, run.decoding(), memo,
    )  # fmt: skip
    found = []
    for example, prompt, tokens in zip(examples, prompts, new, strict=True):
        # decoded together: SentencePiece drops the space in front of a first word
        whole, before = (run.tokenizer.decode(ids) for ids in (prompt + tokens, prompt))
        prediction = run.task.extract(example.prompt, whole[len(before) :])
        found.append({"prediction": prediction} | run.task.score(prediction, example))
    return found


def new_tokens(run: Session, examples: list[Example]) -> int:
    """How many tokens an answer may have: --max-new-tokens, or the task's number; of own data at
    least as many as the longest reference needs, or it could never be met."""
    flag = getattr(run.args, "max_new_tokens", None)
    if flag or not isinstance(run.task, OwnTask):
        return flag or run.task.MAX_NEW_TOKENS
    needed = [
        len(ids) - n_prompt + 1
        for example in examples
        for text in example.references
        for ids, n_prompt in [run.tokenizer.encode_pair(run.wrap(example.prompt), text)]
    ]
    return max(run.task.MAX_NEW_TOKENS, *needed, 0)


def score_given(
    run: Session, examples: list[Example], batch_size: int, description: str, memo: Memo
) -> list[dict]:
    """{"log_probs": of the right and the wrong answers, metrics...} of each example."""
    asked = [(run.wrap(e.question), [*e.right, *e.wrong]) for e in examples]
    scores = score_answers(
        run.model, run.tokenizer, asked, batch_size, description, run.plain, memo
    )
    found = []
    for example, each in zip(examples, scores, strict=True):
        right, wrong = each[: len(example.right)], each[len(example.right) :]
        metrics = run.task.score_choices(right, wrong)
        found.append({"log_probs": {"right": right, "wrong": wrong}} | metrics)
    return found


def _apart(memo: Memo, i: int) -> Memo:
    """memo for the i-th of several ways to score: the same rows of two ways are not the same."""
    return (lambda compute, rows: memo(lambda _: compute(rows), [-i, *rows])) if i else memo


def _merge(parts: list[list[dict]]) -> list[dict]:
    """The scores of several ways, one dict an example."""
    return [
        {key: value for part in row for key, value in part.items()}
        for row in zip(*parts, strict=True)
    ]
