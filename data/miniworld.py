"""Write the shipped task files of the synthetic world, in the paper's own file formats.

    python -m data.miniworld                   # -> data/mini/MQuAKE/{train,val,test}.jsonl

No edit (subject and relation) and no question of a split occurs in another one, and none of their
edits occurs in the text that the miniature models were pretrained on.
"""

import argparse
import json
import random
from pathlib import Path

from data.tables import RELATIONS, question
from data.world import Edit, World
from lofit.files import write_text

MQUAKE_SIZES = {"train": 134, "val": 95, "test": 400}  # train and val as in the paper


def mquake_case(world: World, edit: Edit, case_id: int) -> dict:
    """One edit as a line of MQuAKE-CF; entity names serve as ids."""
    middle = world.lookup(edit.subject, edit.chain[0])
    override = {(edit.edited, edit.relation.label): edit.target}
    new_middle = world.lookup(edit.subject, edit.chain[0], edit=override)

    def hops(between: str, answer: str) -> list[dict]:
        steps = zip(edit.chain, (edit.subject, between), (between, answer), strict=True)
        return [
            {
                "answer": obj,
                "answer_alias": [],
                "cloze": RELATIONS[label].cloze.format(subject),
                "question": RELATIONS[label].question.format(subject),
            }
            for label, subject, obj in steps
        ]

    true_object = world.facts[edit.edited, edit.relation.label]
    return {
        "case_id": case_id,
        "requested_rewrite": [
            {
                "prompt": edit.relation.cloze,
                "question": edit.relation.question.format(edit.edited),
                "relation_id": edit.relation.id,
                "subject": edit.edited,
                "target_new": {"id": edit.target, "str": edit.target},
                "target_true": {"id": true_object, "str": true_object},
            }
        ],
        "questions": [question(edit.chain, edit.subject, wording) for wording in range(3)],
        "answer": edit.old,
        "answer_alias": [],
        "new_answer": edit.new,
        "new_answer_alias": [],
        "single_hops": hops(middle, edit.old),
        "new_single_hops": hops(new_middle, edit.new),
    }


def mquake_splits(world: World, seed: int = 0) -> dict[str, list[dict]]:
    """Draw the splits, test first; a question belongs to the split that first asks it."""
    owner: dict[str, str] = {}  # question -> split
    splits: dict[str, list[dict]] = {}
    for split in ("test", "val", "train"):
        rng = random.Random(f"mquake {split} {seed}")
        seen: set[tuple[str, str]] = set()
        cases: list[dict] = []
        while len(cases) < MQUAKE_SIZES[split]:
            edit = world.edit(rng, split)
            asked = question(edit.chain, edit.subject)
            if owner.setdefault(asked, split) != split or (edit.statement, asked) in seen:
                continue
            seen.add((edit.statement, asked))
            cases.append(mquake_case(world, edit, len(cases)))
        splits[split] = cases
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/mini"))
    args = parser.parse_args()
    for split, cases in mquake_splits(World()).items():
        path = args.out / "MQuAKE" / f"{split}.jsonl"
        write_text(path, "".join(json.dumps(case) + "\n" for case in cases))
        print(f"{path}: {len(cases)} cases")


if __name__ == "__main__":
    main()
