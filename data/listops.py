"""Write ListOps as a task: nested lists of digits and operations, and the digit they come to.

    python -m data.listops                        # -> data/real/listops/
    python select_heads.py --task listops --data data/real --model MODEL

The grammar is the published one (Nangia and Bowman, 2018): MIN, MAX, MED (the median, rounded down)
and SM (the sum modulo 10) of 2 to 5 arguments; an argument is an operation with probability 0.25,
else a digit, and always a digit below --depth operations. The published files hold 100,000
different expressions, which uses up the short ones. So do we: --pool of them are drawn, and the
items are sampled from those of at most --symbols (an operation with its bracket, a digit, a closing
bracket). The round brackets of the published files, which change nothing, are left out.

A line has its outer operation as its group, so eval.py also reports the scores of each, and the
answer of a cheap rule: MIN or MAX of the outer list's own digits, else the most frequent value of
the operation in train.jsonl. The tokenizers of the miniatures that this repository ships know no
digits: this task is for real models.
"""

import argparse
import random
import statistics
from collections import Counter
from pathlib import Path

from data.sources import write_splits
from lofit import errors
from lofit.errors import InputError
from lofit.run.arguments import natural

OPERATIONS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
NESTED, MAX_ARGUMENTS = 0.25, 5
TRIES = 1000  # draws without a new expression, after which there hardly are more
PROMPT = (
    "Compute MIN, MAX, MED (median, rounded down) and SM (sum modulo 10) of the lists.\n"
    "Expression: {}\nValue:"
)


def draw(rng: random.Random, depth: int, nested: float = 1.0) -> list[str]:
    """The symbols of one expression of at most this depth: an operation with probability `nested`,
    else a digit."""
    if depth == 0 or rng.random() >= nested:
        return [str(rng.randrange(10))]
    symbols = [rng.choice(list(OPERATIONS))]
    for _ in range(rng.randint(2, MAX_ARGUMENTS)):
        symbols += draw(rng, depth - 1, NESTED)
    return [*symbols, "]"]


def evaluate(expression: str) -> tuple[int, int]:
    """(value, depth) of an expression; round brackets are skipped. A digit has depth 0. Raises
    ValueError if it is malformed."""
    lists: list[tuple] = [(None, [], [])]  # of each open bracket: operation, values, their depths
    for symbol in expression.replace("(", " ").replace(")", " ").split():
        if symbol in OPERATIONS:
            lists.append((OPERATIONS[symbol], [], []))
            continue
        value, depth = symbol, 0
        if symbol == "]":
            operation, values, depths = lists.pop()
            if operation is None or not values:
                raise ValueError(f"{expression!r}: a list is empty, or closed but not opened")
            value, depth = operation(values), 1 + max(depths)
        elif len(symbol) != 1 or not symbol.isdecimal():
            raise ValueError(f"{expression!r}: {symbol!r} is no operation and no digit")
        lists[-1][1].append(int(value))
        lists[-1][2].append(depth)
    if len(lists) != 1 or len(lists[0][1]) != 1:
        raise ValueError(f"{expression!r}: expected one whole expression")
    return lists[0][1][0], lists[0][2][0]


def make(n: int, seed: int, depth: int, symbols: int, pool: int) -> list[dict]:
    """n lines of different expressions, in no order. Raises InputError if too few are short."""
    rng, drawn, since = random.Random(seed), {}, 0
    while len(drawn) < pool and since < TRIES:
        expression = draw(rng, depth)
        since = 0 if (text := " ".join(expression)) not in drawn else since + 1
        drawn[text] = len(expression)
    short = [text for text, length in drawn.items() if length <= symbols]
    if len(short) < n:
        raise InputError(
            f"--symbols {symbols}: {len(short)} of {len(drawn)} different expressions of --depth"
            f" {depth} are as short; expected {n}"
        )
    lines = []
    for text in rng.sample(short, n):
        value, _ = evaluate(text)
        operation = text.split()[0]
        lines.append({"prompt": PROMPT.format(text), "answer": f" {value}", "group": operation[1:]})
    return lines


def outer_digits(prompt: str) -> list[int]:
    """The digits that are arguments of the outer operation."""
    level, found = 0, []
    for symbol in prompt.partition("Expression: ")[2].removesuffix("\nValue:").split():
        level += (symbol in OPERATIONS) - (symbol == "]")
        found += [int(symbol)] if level == 1 and symbol.isdecimal() else []
    return found


def add_rule(splits: dict[str, list[dict]]) -> None:
    """Give each line the answer of a cheap rule, which looks at the outer list alone."""
    values: dict[str, Counter] = {}
    for line in splits["train"]:
        values.setdefault(line["group"], Counter())[line["answer"]] += 1
    for line in (line for lines in splits.values() for line in lines):
        operation, digits = line["group"], outer_digits(line["prompt"])
        if operation in ("MIN", "MAX") and digits:
            line["rule"] = f" {OPERATIONS['[' + operation](digits)}"
        elif operation in values:
            line["rule"] = values[operation].most_common(1)[0][0]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg, shown = parser.add_argument, "(default: %(default)s)"
    arg("--out", type=Path, default=Path("data/real/listops"), help=f"where to {shown}")
    arg("--seed", type=int, default=42, help=f"of the draw {shown}")
    arg("--depth", type=natural, default=20, help=f"operations inside each other, at most {shown}")
    arg("--symbols", type=int, default=30, help=f"symbols of an expression, at most {shown}")
    arg("--pool", type=natural, default=100_000,
        help=f"different expressions to sample from {shown}")  # fmt: skip
    for split, n in (("train", 300), ("val", 100), ("test", 500)):
        arg(f"--{split}", type=natural, default=n, help=f"items of this split {shown}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    sizes = {split: getattr(args, split) for split in ("train", "val", "test")}
    lines = make(sum(sizes.values()), args.seed, args.depth, args.symbols, args.pool)
    splits = {split: [lines.pop() for _ in range(n)] for split, n in sizes.items()}
    add_rule(splits)
    write_splits(args.out, splits)
    print(f"{args.out}/: {', '.join(f'{split} {n}' for split, n in sizes.items())} expressions")


if __name__ == "__main__":
    errors.run(main)
