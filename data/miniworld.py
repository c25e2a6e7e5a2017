"""Write the shipped task files of the synthetic world, in the paper's own file formats.

    python -m data.miniworld                   # -> data/mini/{MQuAKE,clutrr,truthfulqa}/

No edit (subject and relation), story or question of a split occurs in another one, and no edit
occurs in the text that the miniature models were pretrained on.
"""

import argparse
import csv
import io
import json
import random
from pathlib import Path

from data.tables import RELATIONS, question
from data.world import Edit, World
from lofit.files import write

CLUTRR_SIZES = {"train": 300, "val": 100, "test": 400}
TRUTHFULQA_HEADER = [
    "Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"
]  # fmt: skip
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


def clutrr_splits(world: World, seed: int = 0) -> dict[str, list[dict]]:
    """Two-step family stories, with the keys of CLUTRR's files that a story of this world has."""
    rng, seen = random.Random(f"clutrr {seed}"), set()
    splits: dict[str, list[dict]] = {split: [] for split in CLUTRR_SIZES}
    for split, size in CLUTRR_SIZES.items():
        while len(splits[split]) < size:
            story = world.story(rng)
            if story.text in seen:
                continue
            seen.add(story.text)
            a, _, b = story.names
            people = zip(story.names, story.genders, strict=True)
            splits[split].append(
                {
                    "id": f"{split}-{len(splits[split])}",
                    "story": story.text,
                    "query": str((a, b)),
                    "target_text": story.target,
                    "clean_story": story.text,
                    "f_comb": "-".join(story.edges),
                    "task_name": "task_1.2",
                    "edge_types": str(list(story.edges)),
                    "genders": ",".join(f"{name}:{gender}" for name, gender in people),
                    "task_split": split,
                }
            )
    return splits


def truthfulqa_folds(world: World, seed: int = 0) -> dict[str, list[list[str]]]:
    """File name -> rows of CSV. Each fold tests on the half that the other one learns from."""
    rows = [
        ["Adversarial", m.kind, m.question, m.truth, m.truth, "; ".join(m.myths), "the almanac"]
        for m in world.myths
    ]
    random.Random(f"truthfulqa {seed}").shuffle(rows)
    half, files = len(rows) // 2, {}
    for fold, (learnt, asked) in enumerate(
        ((rows[half:], rows[:half]), (rows[:half], rows[half:]))
    ):
        n_val = len(learnt) // 5
        parts = {"test": asked, "val": learnt[:n_val], "train": learnt[n_val:]}
        files |= {f"fold_{fold}_{split}_seed_42.csv": part for split, part in parts.items()}
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("data/mini"), help="where to (default: %(default)s)"
    )
    args = parser.parse_args()
    world = World()
    for split, cases in mquake_splits(world).items():
        path = args.out / "MQuAKE" / f"{split}.jsonl"
        write(path, "".join(json.dumps(case) + "\n" for case in cases))
        print(f"{path}: {len(cases)} cases")
    for split, stories in clutrr_splits(world).items():
        path = args.out / "clutrr" / f"{split}.json"
        write(path, "[" + ",\n".join(map(json.dumps, stories)) + "]\n")
        print(f"{path}: {len(stories)} stories")
    for name, rows in truthfulqa_folds(world).items():
        path, text = args.out / "truthfulqa" / name, io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([TRUTHFULQA_HEADER, *rows])
        write(path, text.getvalue())
        print(f"{path}: {len(rows)} questions")


if __name__ == "__main__":
    main()
