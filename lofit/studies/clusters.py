"""Write which test items of MQuAKE share an edit into the base model's recorded line.

    python -m lofit.studies.clusters --model weights/smollm2-135m-instruct --data data/real

Such items are right or wrong together: the largest group of the paper's 864 has 49. `clusters`
holds a number for each item, in the order of the data; tables then count edits, not items.
"""

import argparse
from pathlib import Path

from lofit import errors
from lofit.errors import InputError
from lofit.files import read_jsonl
from lofit.studies.records import Records
from lofit.tasks import mquake


def edits_of(data: Path) -> list[int]:
    """For each test item the number of its edit, counted from 0."""
    numbers: dict[tuple, int] = {}
    found = []
    for _, case in read_jsonl(mquake.path(data, "test")):
        rewrite = case["requested_rewrite"][0]
        edit = (rewrite["prompt"], rewrite["subject"], rewrite["target_new"]["str"])
        found.append(numbers.setdefault(edit, len(numbers)))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["weights/mini-llama", "weights/mini-gemma"])
    parser.add_argument("--data", default="data/mini")
    parser.add_argument("--records", type=Path, default=Path("docs/results"))
    args = parser.parse_args(argv)
    clusters = edits_of(Path(args.data))
    records = Records(args.records)
    for model in args.model:
        for run, found in records.of_model(model).items():
            if (run.kind, run.model, run.task, run.data) != ("base", model, "mquake", args.data):
                continue
            if found["n"] != len(clusters):
                raise InputError(f"{args.data}: {len(clusters)} items, recorded are {found['n']}")
            same = {key: found.get(key, {}) for key in ("seconds", "device")}
            records.add(run, same | {"clusters": clusters})
            print(f"{run.title}: {len(clusters)} items of {max(clusters) + 1} edits")


if __name__ == "__main__":
    errors.run(main)
