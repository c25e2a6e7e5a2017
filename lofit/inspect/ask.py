"""Ask a tuned model, and its base model beside it.

    python -m lofit.inspect.ask runs/mini-llama/mquake "Q: What is the capital of Braviland? A:"
    python -m lofit.inspect.ask runs/mini-llama/mquake --task "What is the capital of Braviland?"

RUN is what `eval.py --offsets` takes. Without a question it waits for one after the other; Ctrl-D
ends it. The models get a question as it stands (a run trained with --chat: in the chat template);
with --task they get it in the prompt of the run's task.
"""

import argparse
import sys
from collections.abc import Callable, Iterator

from lofit import errors
from lofit.errors import InputError
from lofit.heads import edits_off
from lofit.llm.chat import load_chat_template
from lofit.llm.checkpoint import DTYPES
from lofit.llm.device import pick_device
from lofit.llm.generate import generate_all
from lofit.llm.tokenizer import load_tokenizer
from lofit.run.adapters import Adapter, open_adapter, open_tuned
from lofit.run.arguments import TASKS, int_at_least


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
    arg("--max-new-tokens", type=int_at_least(1), default=32, help="default: %(default)s")
    arg("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    arg("--dtype", choices=DTYPES, help="of the base model's weights (default: as in the run)")
    return parser.parse_intermixed_args(argv)  # RUN --task QUESTION


def open_both(args: argparse.Namespace) -> Callable[[str], dict[str, str]]:
    """What answers a question: text -> {"base": answer, "tuned": answer}. InputError."""
    adapter = open_adapter(args.run)
    info, task = adapter.info, _task(adapter) if args.task else None
    dtype = DTYPES.get(args.dtype)
    model = open_tuned(adapter, args.run, args.model, dtype, pick_device(args.device))
    source, chat = model.source, bool(info.get("chat"))
    tokenizer = load_tokenizer(source.name, source.revision, not chat)
    wrap = load_chat_template(source.name, source.revision) if chat else str

    def answer(prompt: str) -> str:
        ids = tokenizer.encode_pair(wrap(prompt), "")[0]
        new = generate_all(model, [ids], args.max_new_tokens, tokenizer.eos_ids, 1, "")[0]
        # decoded together: SentencePiece drops the space in front of a first word
        text = tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :]
        return task.extract(prompt, text) if hasattr(task, "extract") else text

    def both(question: str) -> dict[str, str]:
        try:
            question.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError("the question is not valid UTF-8; set the terminal to it") from None
        prompt = task.ask(question) if task else question
        with edits_off(model):
            base = answer(prompt)
        return {"base": base, "tuned": answer(prompt)}

    return both


def _task(adapter: Adapter):
    name = str(adapter.info.get("task"))
    if name not in TASKS:
        raise InputError(
            f"--task: the run's task ({name}) is none of {', '.join(TASKS)}: its prompts are texts"
            " as they stand; leave --task out"
        )
    return TASKS[name]


def questions() -> Iterator[str]:
    """What is typed, line by line, up to Ctrl-D."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


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
    for question in questions():
        try:
            show(both(question))
        except InputError as error:  # the next one may be better
            print(f"error: {errors.one_line(str(error))}", file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
