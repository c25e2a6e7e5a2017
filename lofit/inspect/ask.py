"""Ask a tuned model, and its base model beside it.

    python -m lofit.inspect.ask runs/mini-llama/mquake "Q: What is the capital of Braviland? A:"
    python -m lofit.inspect.ask runs/mini-llama/mquake --task \\
        "Imagine that The capital of Braviland is Vuzaport. What is the capital of Braviland?"

RUN is a run folder, an adapter or a hub id. Without a QUESTION the program waits for one after the
other; Ctrl-D ends it. Both models get a question as it stands, or in the chat template if the run
was trained with --chat; with --task they get it in the prompt of the run's task.
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
from lofit.tasks import Example, find_tasks


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lofit.inspect.ask",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arg = parser.add_argument
    arg("run", metavar="RUN", help="a run folder, an adapter folder or a hub id")
    arg("question", metavar="QUESTION", nargs="?", help="what to ask (default: read from stdin)")
    arg("--task", action="store_true", help="ask in the prompt of the run's task (default: as it"
        " stands)")  # fmt: skip
    arg("--model", help="where the base model is now (default: where the run had it)")
    arg("--max-new-tokens", type=natural, default=32, help="tokens of an answer, at most"
        " (default: %(default)s)")  # fmt: skip
    arg("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto, a GPU"
        " where there is one)")  # fmt: skip
    arg("--dtype", choices=DTYPES, help="of the base model's weights (default: the run's)")
    return parser.parse_intermixed_args(argv)  # RUN --task QUESTION


def asker(args: argparse.Namespace) -> Callable[[str], None]:
    """Returns what prints both models' answers to a question, and raises InputError if the question
    is too long. InputError if the run cannot be opened, or --task and its task has no prompt."""
    tuned, task = open_tuned(args.run, args.model, args.dtype, pick_device(args.device)), None
    if args.task:
        name = str(tuned.info.get("task"))
        with suppress(InputError):  # a folder of the user's own may be gone
            (task,) = find_tasks(name)
        if not task or not task.ask:
            raise InputError(f"--task: the run's task ({name}) has no prompt; leave --task out")
    wrap, end = load_chat_template(tuned.base) if tuned.info.get("chat") else (str, None)
    tokenizer, model = load_tokenizer(tuned.base, end), tuned.model
    positions = model.config.max_position_embeddings

    def answer(prompt: str) -> str:
        ids = tokenizer.encode(wrap(prompt))
        if len(ids) + args.max_new_tokens > positions:
            raise InputError(
                f"the question has {len(ids)} tokens, and the model {positions} positions; ask a"
                " shorter one, or take a smaller --max-new-tokens"
            )
        (new,) = generate(model, [ids], args.max_new_tokens, tokenizer.eos_ids)
        # decoded together: SentencePiece drops the space in front of a first word
        text = tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :]
        return task.extract(Example(prompt, ""), text) if task and task.extract else text

    def ask(question: str) -> None:
        prompt = task.ask(question) if task else question
        with edits_off(model):
            base = answer(prompt)
        for who, text in (("base", base), ("tuned", answer(prompt))):
            # further lines of an answer stand below its first
            print(f"{who:5}  {text.strip().replace(chr(10), chr(10) + ' ' * 7)}", flush=True)

    return ask


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    ask = asker(args)
    if args.question is not None:
        return ask(args.question)
    with suppress(EOFError):  # Ctrl-D
        while True:
            question = input("> " if sys.stdin.isatty() else "")
            try:
                if question.strip():
                    ask(question)
            except InputError as error:  # the next one may be better
                print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
