"""Scoring examples with the model as it is now: generated answers, or given ones by probability."""

from contextlib import AbstractContextManager, nullcontext

from lofit.errors import warn
from lofit.llm.batches import check_length
from lofit.llm.generate import Decoding, generate_all
from lofit.llm.scoring import score_answers
from lofit.objectives import Objective, mean_loss
from lofit.run.setup import Run, uses_graphs
from lofit.tasks import Example

BATCH = 64


def validate(run: Run, val: list[Example], held_out: Objective) -> dict[str, float]:
    """{"loss", metrics...} on the validation split, with the edits as they are now."""
    batch_size = max(1, BATCH // run.parts)  # memory is as short here as in a step
    scored = evaluate(run, val, batch_size, "validation")
    means = {m: sum(each[m] for each in scored) / len(scored) for m in run.task.metrics}
    return {"loss": mean_loss(held_out, batch_size)} | means


def evaluate(
    run: Run, examples: list[Example], batch_size: int, description: str,
    decoding: Decoding | None = None,
) -> list[dict]:  # fmt: skip
    """The scores of each example, and what they are based on: a prediction, the log-probabilities
    of the given answers, or both. decoding: how tokens are generated."""
    decoding, packed = _faster(run, decoding)

    def work(own: list[Example]) -> list[dict]:
        found = [{} for _ in own]
        with packed:
            if own[0].generated:
                predictions = predict(run, own, batch_size, description, decoding)
                for each, example, prediction in zip(found, own, predictions, strict=True):
                    each |= {"prediction": prediction} | run.task.score(prediction, example)
            if own[0].right:
                asked = [(run.wrap(e.question), [*e.right, *e.wrong], e.ambiguous) for e in own]
                scores = score_answers(
                    run.model, run.tokenizer, asked, batch_size, description, run.plain
                )
                for each, example, given in zip(found, own, scores, strict=True):
                    n = len(example.right)
                    log_probs = {"right": given[:n], "wrong": given[n:]}
                    each |= {"log_probs": log_probs} | run.task.score_choices(**log_probs)
        return found

    if run.processes != "shared":  # where the weights are split, all processes do the same
        return work(examples)
    from lofit.distributed import spread

    return spread(work, examples)


def _faster(run: Run, decoding: Decoding | None) -> tuple[Decoding, AbstractContextManager]:
    """(how to decode, what to do it in): with CUDA graphs, or with weights laid out for the CPU.
    Neither with --plain, nor where a way to decode was named: compilers see into no packed product.
    """
    if run.plain or decoding:
        return decoding or Decoding(), nullcontext()
    if uses_graphs(run.model) and not run.processes:
        from lofit.fast.decoding import GraphedDecoding

        return GraphedDecoding(), nullcontext()
    from lofit.fast.packed import packed_weights

    return Decoding(), packed_weights(run.model)


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


def check_prompts(run: Run, examples: list[Example]) -> None:
    """InputError if a prompt, with the answer that is to follow, is longer than the model has
    positions: beyond them it was never trained, and answers without saying so."""
    n, encode = new_tokens(run, examples), run.tokenizer.encode

    def longest(e: Example) -> int:
        lengths = [len(encode(run.wrap(e.question) + answer)) for answer in (*e.right, *e.wrong)]
        lengths += [len(encode(run.wrap(e.prompt))) + n] if e.generated else []
        return max(lengths)

    check_length(
        [longest(e) for e in examples], run.model.config.max_position_embeddings,
        [e.where for e in examples], "the model has positions, answer included",
    )  # fmt: skip


def warn_of_answers(run: Run, examples: list[Example]) -> None:
    """Warn of answers that a model cannot be right with: generated as they stand they score 0."""
    metric = run.task.metrics[0]
    wrong = [
        e
        for e in examples
        if e.generated and not run.task.score(run.task.extract(e, e.answer), e)[metric]
    ]
    if wrong:
        answer = wrong[0].answer[:60]
        warn(f"the answer {answer!r} itself scores 0 ({metric})", [e.where for e in wrong])
