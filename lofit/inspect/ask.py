"""Ask a tuned model, and its base model beside it.

    python -m lofit.inspect.ask runs/mini-llama/mquake "Q: What is the capital of Braviland? A:"
    python -m lofit.inspect.ask runs/mini-llama/mquake --task "What is the capital of Braviland?"

RUN is what `eval.py --offsets` takes. Without a question it waits for one after the other; Ctrl-D
ends it. The models get a question as it stands (a run trained with --chat: in the chat template);
with --task they get it in the prompt of the run's task.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress

from lofit import errors
from lofit.errors import InputError
from lofit.heads import edits_off
from lofit.llm.chat import load_chat_template
from lofit.llm.checkpoint import DTYPES
from lofit.llm.generate import generate
from lofit.llm.tokenizer import load_tokenizer
from lofit.run.arguments import natural
from lofit.run.setup import pick_device
from lofit.run.tuned import open_tuned
from lofit.tasks import Example, Task, find_tasks


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lofit.inspect.ask",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arg = parser.add_argument
    arg("run", metavar="RUN")
    arg("question", metavar="QUESTION", nargs="?")
    arg("--task", action="store_true", help="ask in the prompt of the run's task")
    arg("--model", help="where the base model is (default: where the run had it)")
    arg("--max-new-tokens", type=natural, default=32, help="(default: %(default)s)")
    arg("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    arg("--dtype", choices=DTYPES, help="of the base model's weights (default: as in the run)")
    return parser.parse_intermixed_args(argv)  # RUN --task QUESTION


def open_both(args: argparse.Namespace) -> Callable[[str], dict[str, str]]:
    """What answers a question: text -> {"base": answer, "tuned": answer}. InputError."""
    tuned = open_tuned(args.run, args.model, args.dtype, pick_device(args.device))
    task = find_task(str(tuned.info.get("task"))) if args.task else None
    chat = bool(tuned.info.get("chat"))
    wrap, end_of_turn = load_chat_template(tuned.base) if chat else (str, None)
    tokenizer = load_tokenizer(tuned.base, end_of_turn)
    positions = tuned.model.config.max_position_embeddings

    def answer(prompt: str) -> str:
        ids = tokenizer.encode(wrap(prompt))
        if len(ids) + args.max_new_tokens > positions:
            raise InputError(
                f"the question has {len(ids)} tokens, and the model {positions} positions; ask a"
                " shorter one, or take a smaller --max-new-tokens"
            )
        (new,) = generate(tuned.model, [ids], args.max_new_tokens, tokenizer.eos_ids)
        # decoded together: SentencePiece drops the space in front of a first word
        text = tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :]
        return task.extract(Example(prompt, ""), text) if task and task.extract else text

    def both(question: str) -> dict[str, str]:
        prompt = task.ask(question) if task else question
        with edits_off(tuned.model):
            base = answer(prompt)
        return {"base": base, "tuned": answer(prompt)}

    return both


def find_task(name: str) -> Task:
    """The task of this name, whose `ask` makes a prompt of a question. InputError if it has none,
    as tasks of one's own folders."""
    with suppress(InputError):
        (task,) = find_tasks(name)
        if task.ask:
            return task
    raise InputError(
        f"--task: the run's task ({name}) asks its prompts as they stand; leave --task out"
    )


def show(answers: dict[str, str]) -> None:
    """Both answers, one below the other; further lines stand below their first."""
    for who, text in answers.items():
        print(f"{who:5}  {text.strip().replace(chr(10), chr(10) + ' ' * 7)}", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    both = open_both(args)
    if args.question is not None:
        show(both(args.question))
        return
    with suppress(EOFError):  # Ctrl-D
        while True:
            question = input("> " if sys.stdin.isatty() else "")
            try:
                if question.strip():
                    show(both(question))
            except InputError as error:  # the next one may be better
                print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
