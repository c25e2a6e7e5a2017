"""The base model's accuracy on choices beside lm-evaluation-harness's, in the harness's prompts.

python tests/measure/likelihood.py --model weights/smollm2-135m-instruct

Needs `pip install "lm_eval[hf]"`, and ARC's and BoolQ's originals in data/real/tasks (`python -m
data.download arc_challenge boolq_passage`). Both take the same items, drawn by a seed. The harness
uses its own definition of arc_challenge and boolq with our file for its data; ours is a task of own
data in the form of prompt, choices and label.
"""

import argparse
import json
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for eval.py

from lofit.llm.files import read_json

import eval as evaluate
from lofit.files import read_jsonl


def arc_item(item: dict) -> dict:
    """An original as the harness's data set has it."""
    choices = item["question"]["choices"]
    columns = {key: [choice[key] for choice in choices] for key in ("text", "label")}
    return {
        "question": item["question"]["stem"],
        "choices": columns,
        "answerKey": item["answerKey"],
    }


def arc_line(item: dict) -> dict:
    """The same as a line of own data."""
    return {
        "prompt": f"Question: {item['question']}\nAnswer:",
        "choices": [f" {text}" for text in item["choices"]["text"]],
        "label": item["choices"]["label"].index(item["answerKey"]),
    }


def boolq_item(item: dict) -> dict:
    return {"passage": item["passage"], "question": item["question"],
            "label": int(item["label"] == "true")}  # fmt: skip


def boolq_line(item: dict) -> dict:
    prompt = f"{item['passage']}\nQuestion: {item['question']}?\nAnswer:"
    return {"prompt": prompt, "choices": [" no", " yes"], "label": item["label"]}


# task of the harness -> (file of the originals, its definition, item, line)
TASKS = {
    "arc_challenge": ("arc/ARC-Challenge-Test.jsonl", "arc/arc_challenge.yaml", arc_item, arc_line),
    "boolq": ("boolq/val.jsonl", "super_glue/boolq/default.yaml", boolq_item, boolq_line),
}


def by_harness(name: str, model: str, items: list[dict], folder: Path) -> list[float]:
    """Each item's acc."""
    import lm_eval  # here, so that --help works without it
    import yaml

    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / TASKS[name][1]),
        "task": f"{name}_here",
    }
    task |= {"dataset_path": "json", "dataset_name": None, "training_split": None}
    task |= {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    task |= {"validation_split": None, "test_split": "test"}
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": model, "dtype": "float32"}, device="cpu",
        tasks=[task["task"]], log_samples=True,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder)),
    )  # fmt: skip
    samples = sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    return [sample["acc"] for sample in samples]


def by_us(name: str, model: str, items: list[dict], folder: Path) -> list[float]:
    """Each item's accuracy, by eval.py on own data."""
    text = "".join(json.dumps(TASKS[name][3](item)) + "\n" for item in items)
    for split in ("train", "val", "test"):
        (folder / f"{split}.jsonl").write_text(text)
    run = folder / "run"
    flags = ["--model", model, "--task", str(folder), "--run", str(run), "--base-only"]
    evaluate.main([*flags, "--split", "test", "--dtype", "float32", "--device", "cpu"])
    share = read_json(run / "results-base.json")["base"]["accuracy"]
    lines = [line for _, line in read_jsonl(run / "predictions-base.jsonl")]
    found = [line["base"]["accuracy"] for line in lines]
    assert abs(share - sum(found) / len(found)) < 1e-6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, default=Path("data/real/tasks"))
    parser.add_argument("-n", type=int, default=200, help="items (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    args = parser.parse_args()
    for name in args.tasks:
        file, _, as_item, _ = TASKS[name]
        every = [as_item(item) for _, item in read_jsonl(args.data / file)]
        items = random.Random(42).sample(every, min(args.n, len(every)))
        with tempfile.TemporaryDirectory() as folder:
            ours = by_us(name, args.model, items, Path(folder))
        with tempfile.TemporaryDirectory() as folder:
            theirs = by_harness(name, args.model, items, Path(folder))
        other = sum(a != b for a, b in zip(ours, theirs, strict=True))
        print(
            f"{name}, {len(items)} items: eval.py {sum(ours) / len(ours):.1%}, lm_eval"
            f" {version('lm_eval')} {sum(theirs) / len(theirs):.1%}; {other} items differ",
            flush=True,
        )


if __name__ == "__main__":
    main()
