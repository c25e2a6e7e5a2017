"""Fetch the original files of tasks, check them by hash, and write them in our own forms.

    python -m data.download                        # the paper's first three tasks -> data/real/
    python -m data.download arc_challenge boolq    # others by name, or `all`
    python -m data.download siqa --source FOLDER   # from files that are already there

The files of mquake, clutrr and truthfulqa are used as they are. Those of other tasks go to
data/real/tasks/, and data/real/<task>/ gets train.jsonl, val.jsonl and test.jsonl. A file that is
there and has the right hash is not fetched again. A --source folder has the files under the names
in data/SHA256SUMS (MQuAKE/train.jsonl, tasks/boolq/val.jsonl, ...), as another machine's data/real
does.
"""

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

import pooch
import requests

from data.sources import SOURCES, SUMS, convert, place_of, write_splits
from lofit import errors
from lofit.errors import InputError
from lofit.files import write
from lofit.run.arguments import natural

ORIGIN = "https://raw.githubusercontent.com/"
RETRIES = 3  # after a server's error or a transfer that was cut


def is_file_of(content: bytes, sha: str) -> bool:
    """Whether a content has this sha256, or this hash of a git blob, which has 40 digits."""
    if len(sha) == 40:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == sha
    return hashlib.sha256(content).hexdigest() == sha


def fetch(url: str) -> bytes:
    """Fetch a URL, with a progress bar on a terminal. InputError if it cannot be fetched whole."""
    pooch.get_logger().setLevel("ERROR")
    with tempfile.TemporaryDirectory() as folder:
        # no hash: pooch would fetch another file three times more, and it knows no git blobs
        cache = pooch.create(folder, "", registry={"file": None}, retry_if_failed=RETRIES)
        cache.urls["file"] = url
        try:
            return Path(cache.fetch("file", progressbar=sys.stderr.isatty())).read_bytes()
        except (requests.RequestException, OSError, ValueError) as error:
            response = getattr(error, "response", None)
            # the cause stands last in requests' long messages
            last = str(error).rpartition(": ")[2].strip("\"'()")
            problem = last if response is None else f"HTTP {response.status_code}"
    raise InputError(
        f"{url}: cannot be fetched ({problem}); try again later, or give a folder that has"
        " the file by --source, or a copy by --mirror"
    )


def bring(name: str, args: argparse.Namespace) -> bool:
    """Bring one file of SUMS to its place below --out; False if the --source lacks it. InputError
    if it cannot be had or is not the file of its hash, and then nothing is written."""
    path, sha = args.out / name, SUMS[name]
    if path.is_file() and is_file_of(path.read_bytes(), sha):
        print(f"  {path}: there already, verified")
        return True
    origin = f"{args.mirror.rstrip('/')}/{name}" if args.mirror else ORIGIN + place_of(name)
    if args.source:
        origin = args.source / name
        if not origin.is_file():
            return False
    content = origin.read_bytes() if args.source else fetch(origin)
    if not is_file_of(content, sha):
        raise InputError(f"{origin}: expected hash {sha[:12]}..., this is another file; not used")
    write(path, content)
    print(f"  {path}: {'copied' if args.source else 'fetched'}, verified")
    return True


def prepare(task: str, args: argparse.Namespace) -> None:
    """Bring a task's files and write its splits. InputError if one is missing; the train file
    alone may be, in a --source that has the test file."""
    source = SOURCES[task]
    print(f"{task}. {source.licence}")
    missing = [name for name in source.files.values() if not bring(name, args)]
    cut = missing == [source.files.get("train")] and "test" in source.files
    if missing and not cut:
        raise InputError(f"{args.source / missing[0]}: no such file; --source has another layout?")
    if source.line is None:
        return
    if cut:
        print(f"  {args.source / missing[0]}: no such file: train and val are cut from test")
    splits = convert(task, args.out, missing, args.test)
    write_splits(args.out / task, splits)
    counts = ", ".join(f"{split} {len(lines)}" for split, lines in splits.items())
    print(f"  {args.out / task}/: {counts}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    first = ["mquake", "clutrr", "truthfulqa"]
    parser.add_argument(
        "tasks",
        nargs="*",
        default=first,
        metavar="TASK",
        help=f"{', '.join(SOURCES)}, or all (default: {' '.join(first)})",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/real"), help="where to (default: %(default)s)"
    )
    parser.add_argument(
        "--test", type=natural, metavar="N", help="draw N items for the test split (default: all)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--source",
        type=Path,
        metavar="FOLDER",
        help="copy the files from a folder (default: fetch them from raw.githubusercontent.com)",
    )
    where.add_argument("--mirror", metavar="URL", help="fetch them from a copy of such a folder")
    args = parser.parse_args(argv)
    if "all" in args.tasks:
        args.tasks = list(SOURCES)
    if unknown := [name for name in args.tasks if name not in SOURCES]:
        parser.error(f"{unknown[0]}: expected {', '.join(SOURCES)}, or all")
    if args.test and (whole := [name for name in args.tasks if not SOURCES[name].line]):
        parser.error(f"--test: the files of {whole[0]} stay as they are; name other tasks")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for task in args.tasks:
        prepare(task, args)


if __name__ == "__main__":
    errors.run(main)
