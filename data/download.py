"""Fetch the original files of tasks, check them by hash, and write them in our own forms.

    python -m data.download                        # the paper's first three tasks -> data/real/
    python -m data.download arc_challenge boolq    # others by name, or `all`
    python -m data.download siqa --source FOLDER   # from files that are already there

The files of mquake, clutrr and truthfulqa stay as they are. Those of other tasks go to
data/real/tasks/, and data/real/<task>/ gets train.jsonl, val.jsonl and test.jsonl. What is there
and right is not fetched again. A --source has the files by the same names (MQuAKE/train.jsonl,
tasks/boolq/val.jsonl, ..., all in data/sources.py), as data/real of another machine has.
"""

import argparse
import hashlib
import http.client
import random
import urllib.error
import urllib.request
from pathlib import Path

from data.sources import FILES, SEED, SOURCES, convert
from lofit import errors
from lofit.errors import InputError
from lofit.files import write_atomic, write_splits

ORIGIN = "https://raw.githubusercontent.com/"
TIMEOUT_S = 30


def hash_of_bytes(content: bytes, like: str) -> str:
    """SHA-256 in hexadecimal, or git's hash of a blob where `like` is one of these (40 digits)."""
    if len(like) == 40:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()


def fetch(url: str) -> bytes:
    """What is at a URL. InputError if it cannot be fetched whole."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            return response.read()
    except urllib.error.HTTPError as error:
        problem = f"HTTP {error.code}"
    except (http.client.HTTPException, OSError, ValueError) as error:
        problem = getattr(error, "reason", None) or repr(error)
    raise InputError(
        f"{url}: cannot be fetched ({problem}); try again later, or give a folder that has the file"
        " by --source, or a copy by --mirror"
    )


def obtain(name: str, args: argparse.Namespace) -> bool:
    """Bring one file of FILES to its place below --out; False if the --source lacks it. InputError
    if it cannot be had or is not the file of its hash."""
    path, (place, sha) = args.out / name, FILES[name]
    if path.is_file() and hash_of_bytes(path.read_bytes(), sha) == sha:
        print(f"  {path}: there already, verified")
        return True
    origin = f"{args.mirror.rstrip('/')}/{name}" if args.mirror else ORIGIN + place
    if args.source:
        origin = args.source / name
        if not origin.is_file():
            return False
    content = origin.read_bytes() if args.source else fetch(origin)
    if hash_of_bytes(content, sha) != sha:
        raise InputError(f"{origin}: expected hash {sha[:12]}..., this is another file; not used")
    write_atomic(path, lambda partial: partial.write_bytes(content))
    print(f"  {path}: {'copied' if args.source else 'fetched'}, verified")
    return True


def prepare(task: str, args: argparse.Namespace) -> None:
    """Obtain a task's files and write its splits. InputError if one is missing; the train file
    alone may be, in a --source that has the test file."""
    source = SOURCES[task]
    print(f"{task}. {source.licence}")
    missing = [name for name in source.files.values() if not obtain(name, args)]
    cut = missing == [source.files.get("train")] and "test" in source.files
    if missing and not cut:
        raise InputError(f"{args.source / missing[0]}: no such file; --source has another layout?")
    if source.line is None:
        return
    if cut:
        print(f"  {args.source / missing[0]}: no such file: train and val are cut from test")
    splits = convert(task, args.out, missing)
    splits["test"] = some_of(splits["test"], args.test)
    write_splits(args.out / task, splits)
    counts = ", ".join(f"{split} {len(lines)}" for split, lines in splits.items())
    print(f"  {args.out / task}/: {counts}")


def some_of(lines: list[dict], n: int | None) -> list[dict]:
    """n lines drawn by SEED, in their order; all of them if n is None or larger."""
    if n is None or n >= len(lines):
        return lines
    return [lines[i] for i in sorted(random.Random(SEED).sample(range(len(lines)), n))]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    first = ["mquake", "clutrr", "truthfulqa"]
    parser.add_argument(
        "tasks", nargs="*", default=first, metavar="TASK", help=f"{', '.join(SOURCES)}, or all"
    )
    parser.add_argument("--out", type=Path, default=Path("data/real"))
    parser.add_argument("--test", type=int, metavar="N", help="draw N test items (default: all)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--source", type=Path, metavar="FOLDER", help="take the files from a folder")
    where.add_argument("--mirror", metavar="URL", help="a copy of such a folder")
    args = parser.parse_args(argv)
    if "all" in args.tasks:
        args.tasks = list(SOURCES)
    if unknown := [name for name in args.tasks if name not in SOURCES]:
        parser.error(f"{unknown[0]}: expected {', '.join(SOURCES)}, or all")
    if args.test is not None and args.test < 1:
        parser.error("--test: expected a number from 1")
    if args.test and (whole := [name for name in args.tasks if not SOURCES[name].line]):
        parser.error(f"--test: the files of {whole[0]} stay as they are; name other tasks")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for task in args.tasks:
        prepare(task, args)


if __name__ == "__main__":
    errors.run(main)
