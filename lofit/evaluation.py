"""Scoring examples with the model as it is now: generated answers, or given ones by probability."""

import sys
from contextlib import nullcontext

from lofit.llm.batches import check_length
from lofit.llm.generate import Decoding, decode_step, generate_all
from lofit.llm.scoring import score_answers
from lofit.objectives import Objective, mean_loss
from lofit.run.setup import Run, uses_graphs
from lofit.tasks import Example

BATCH = 64


def validate(run: Run, val: list[Example], held_out: Objective) -> dict[str, float]:
    """{"loss", metrics...} on the validation split, with the edits as they are now."""
    scored = evaluate(run, val, BATCH, "validation")
    means = {m: sum(each[m] for each in scored) / len(scored) for m in run.task.metrics}
    return {"loss": mean_loss(held_out, BATCH)} | means


def evaluate(
    run: Run, examples: list[Example], batch_size: int, description: str,
    decoding: Decoding | None = None,
) -> list[dict]:  # fmt: skip
    """The scores of each example, and what they are based on: a prediction, the log-probabilities
    of the given answers, or both. decoding: how tokens are generated."""
    decoding = decoding or _decoding(run)

    def work(own: list[Example]) -> list[dict]:
        found = [{} for _ in own]
        # a compiler does not see into packed products
        with _packed(run) if decoding.step is decode_step else nullcontext():
            if own[0].generated:
                predictions = predict(run, own, batch_size, description, decoding)
                for each, example, prediction in zip(found, own, predictions, strict=True):
                    each |= {"prediction": prediction} | run.task.score(prediction, example)
            if own[0].right:
                scores = score_given(run, own, batch_size, description)
                for each, log_probs in zip(found, scores, strict=True):
                    each |= {"log_probs": log_probs} | run.task.score_choices(**log_probs)
        return found

    return run.spread(work, examples)


def _packed(run: Run):
    """The same products, with weights laid out for the CPU; not with --plain."""
    if run.plain:
        return nullcontext()
    from lofit.fast.packed import packed_weights

    return packed_weights(run.model)


def _decoding(run: Run) -> Decoding:
    if run.plain or run.processes or not uses_graphs(run.model):
        return Decoding()
    from lofit.fast.decoding import GraphedDecoding

    return GraphedDecoding()


def predict(
    run: Run, examples: list[Example], batch_size: int, description: str, decoding: Decoding
) -> list[str]:
    """The answer generated to each example."""
    tokenizer, task = run.tokenizer, run.task
    prompts = [tokenizer.encode(run.wrap(e.prompt)) for e in examples]
    # what follows would be cut away by `extract`: why decode it
    stop = frozenset() if run.plain or not task.stop else tokenizer.ids_with(task.stop)
    new = generate_all(
        run.model, prompts, new_tokens(run, examples), tokenizer.eos_ids, batch_size, description,
        stop, decoding,
    )  # fmt: skip
    predictions = []
    for example, prompt, tokens in zip(examples, prompts, new, strict=True):
        # decoded together: SentencePiece drops the space in front of a first word
        whole, before = tokenizer.decode(prompt + tokens), tokenizer.decode(prompt)
        predictions.append(task.extract(example, whole[len(before) :]))
    return predictions


def new_tokens(run: Run, examples: list[Example]) -> int:
    """How many tokens an answer may have: the task's number; of own data at least as many as the
    longest reference needs, or it could never be met."""
    if run.task.max_length:  # the paper's tasks
        return run.task.max_new_tokens
    needed = [
        len(ids) - n_prompt + 1
        for example in examples
        for text in example.references
        for ids, n_prompt in [run.tokenizer.encode_pair(run.wrap(example.prompt), text)]
    ]
    return max(run.task.max_new_tokens, *needed, 0)


def score_given(
    run: Run, examples: list[Example], batch_size: int, description: str
) -> list[dict[str, list[float]]]:
    """{"right", "wrong"}: the log-probabilities of the given answers of each example."""
    asked = [(run.wrap(e.question), [*e.right, *e.wrong], e.ambiguous) for e in examples]
    scores = score_answers(run.model, run.tokenizer, asked, batch_size, description, run.plain)
    n_right = [len(e.right) for e in examples]
    return [{"right": each[:n], "wrong": each[n:]} for each, n in zip(scores, n_right, strict=True)]


def check_prompts(run: Run, split: str) -> None:
    """InputError if a prompt of a split, with the answer that is to follow, is longer than the
    model has positions; before anything is trained. A split without a file is not asked for."""
    if not run.task.file(run.data, split).exists():
        return
    examples, limit = run.read(split), run.model.config.max_position_embeddings
    names = [e.where for e in examples]
    if examples[0].generated:
        n = new_tokens(run, examples)
        lengths = [len(run.tokenizer.encode(run.wrap(e.prompt))) + n for e in examples]
        check_length(lengths, limit, names, f"the model has positions, with {n} of the answer,")
    if examples[0].right:
        lengths = [
            max(len(run.tokenizer.encode(run.wrap(e.question) + a)) for a in (*e.right, *e.wrong))
            for e in examples
        ]
        check_length(lengths, limit, names)


def check_answers(run: Run, examples: list[Example]) -> None:
    """Warn of answers that a model cannot be right with: generated as they stand they score 0."""
    metric = run.task.metrics[0]
    wrong = [
        e
        for e in examples
        if e.generated and not run.task.score(run.task.extract(e, e.answer), e)[metric]
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        print(
            f"warning: {wrong[0].where}{more}: the answer {wrong[0].answer[:60]!r} itself scores 0"
            f" ({metric})",
            file=sys.stderr,
        )
