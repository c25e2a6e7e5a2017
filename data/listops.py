"""Write ListOps as a task: nested lists of digits and operations, and the digit they come to.

    python -m data.listops                        # -> data/real/listops/
    python select_heads.py --task listops --data data/real --model MODEL

The grammar is the published one (Nangia and Bowman, 2018): MIN, MAX, MED (the median, rounded down)
and SM (the sum modulo 10) of 2 to 5 arguments; an argument is an operation with probability 0.25,
else a digit, and always a digit below --depth operations. Expressions that are longer than
--symbols (an operation with its bracket, a digit, a closing bracket) are drawn again; a digit alone
is no expression. No expression comes twice. The round brackets of the published files, which change
nothing, are left out. A line has its depth as its group, so eval.py also reports the scores of each
depth. The tokenizers of the miniatures that this repository ships know no digits: this task is for
real models.
"""

import argparse
import random
import statistics
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
TRIES = 1000  # draws without a new expression, after which the limits leave too few
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


def make(n: int, seed: int, depth: int, symbols: int) -> list[dict]:
    """n lines of different expressions. Raises InputError if the limits leave too few of them."""
    rng, lines, since = random.Random(seed), {}, 0
    while len(lines) < n:
        drawn = draw(rng, depth)
        expression, since = " ".join(drawn), since + 1
        if len(drawn) <= symbols and expression not in lines:
            value, deep = evaluate(expression)
            prompt, since = PROMPT.format(expression), 0
            lines[expression] = {"prompt": prompt, "answer": f" {value}", "group": f"depth {deep}"}
        if since == TRIES:
            raise InputError(
                f"--depth {depth} --symbols {symbols}: "
                f"{TRIES} draws gave no new expression after {len(lines)} of {n}"
            )
    found = list(lines.values())
    rng.shuffle(found)  # what is drawn late is longer: the short ones had been drawn before
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg, shown = parser.add_argument, "(default: %(default)s)"
    arg("--out", type=Path, default=Path("data/real/listops"), help=f"where to {shown}")
    arg("--seed", type=int, default=42, help=f"of the draw {shown}")
    arg("--depth", type=natural, default=20, help=f"operations inside each other, at most {shown}")
    arg("--symbols", type=int, default=30, help=f"symbols of an expression, at most {shown}")
    for split, n in (("train", 300), ("val", 100), ("test", 500)):
        arg(f"--{split}", type=natural, default=n, help=f"items of this split {shown}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    sizes = {split: getattr(args, split) for split in ("train", "val", "test")}
    lines = make(sum(sizes.values()), args.seed, args.depth, args.symbols)
    write_splits(args.out, {s: [lines.pop() for _ in range(n)] for s, n in sizes.items()})
    print(f"{args.out}/: {', '.join(f'{split} {n}' for split, n in sizes.items())} expressions")


if __name__ == "__main__":
    errors.run(main)
