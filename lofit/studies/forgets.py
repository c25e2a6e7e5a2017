"""What does it cost elsewhere? Models tuned on one task, on the other tasks and on plain text.

    python -m lofit.studies.forgets --model weights/mini-llama --task mquake clutrr

Every task, or each of --tuned, is the tuned one once; the others are what it may forget. Plain
text: the other tasks' prompts, or --text FILE, one a line.
"""

import argparse
import itertools
from pathlib import Path

from lofit import errors
from lofit.llm.files import read_json
from lofit.run.arguments import find_task
from lofit.run.summary import mean, paired_bootstrap
from lofit.studies.cells import Cell, Setting, Step, finish, run_cells
from lofit.studies.methods import known_methods, methods_arg, run_of
from lofit.studies.plan import Plan, Trials, study_parser
from lofit.studies.tables import lines_of, markdown, picture, points, summary, write_table
from lofit.studies.transfer import with_offsets_of

ABOUT = (
    "{split} split, seeds {seeds}: what was tuned on one task changes on another, in points [95 %"
    " interval over the items], and the loss of a token of text (the other task's prompts{text})"
    " before and after [interval of the difference]"
)
HEADER = ["model", "tuned on", "by", "asked", "base", "change", "loss of text"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser(__doc__)
    methods_arg(parser, ["lofit 3%", "lofit 10%", "lofit all", "lora", "red"])
    parser.add_argument("--tuned", nargs="+", help="the tasks to tune on (default: all)")
    parser.add_argument("--text", type=Path, help="plain text instead of prompts, one text a line")
    return known_methods(parser.parse_args(argv))


def text_cell(plan: Plan, other: Setting, trained: Trials) -> Path:
    """The folder with text_loss.json, of the other task's prompts under the run's offsets."""
    name = plan.args.text.stem if plan.args.text else find_task(other.task)[0]
    folder = trained.folder / f"text-{name}"

    def steps() -> list[Step]:
        best = trained.results()
        best = best / "fold0" if (best / "fold0").is_dir() else best
        args = ["--model", other.model, "--task", other.task, "--data", other.data]
        args += ["--dtype", other.dtype, "--run", str(folder), "--offsets", str(best)]
        args += ["--text", str(plan.args.text)] if plan.args.text else []
        return [Step("-m lofit.studies.text_loss", tuple(args), folder, ("text_loss.json",))]

    plan.cells.append(Cell(f"{trained.folder} text of {name}", steps, (trained.evaluated,)))
    return folder


def text_loss(folders: list[Path]) -> dict | None:
    """Mean losses over texts, each text's being the mean over the runs."""
    files = [f / "text_loss.json" for f in folders if (f / "text_loss.json").exists()]
    if not files:
        return None
    found = [read_json(file) for file in files]
    base = found[0]["base"]
    tuned = [mean(list(each)) for each in zip(*(f["tuned"] for f in found), strict=True)]
    return {"base": mean(base), "tuned": mean(tuned), "ci95": paired_bootstrap(base, tuned)}


def as_text(row: dict) -> list[str]:
    text, score = row["text"], row["score"]
    loss = "–"
    if text:
        low, high = text["ci95"]
        loss = f"{text['base']:.3f} → {text['tuned']:.3f} [{low:+.3f}, {high:+.3f}]"
    return [
        row["model"], row["tuned_on"], row["method"], f"{row['task']} ({row['metric']})",
        f"{score['base']:.1%}", points(score["gain"], score["ci95"]), loss,
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    plan, runs = Plan(args), []
    of = {(each[0].model, each[0].task): each for each in plan.settings()}
    for (model, task), method in itertools.product(of, args.methods):
        if task not in (args.tuned or args.task):
            continue
        trained = [(setting, run_of(plan, setting, method)) for setting in of[model, task]]
        for other in args.task:
            if other == task:
                continue
            asked, texts = [], []
            for (setting, trials), target in zip(trained, of[model, other], strict=True):
                asked.append(with_offsets_of(plan, target, setting, trials))
                texts.append(text_cell(plan, target, trials))
            runs.append((model, task, method, other, asked, texts))
    failed = run_cells(plan.cells, args.jobs, args.device)
    rows = []
    for model, task, method, other, asked, texts in runs:
        metric = find_task(other)[1].MAIN_METRIC
        if found := summary(asked, metric):
            row = {"model": Path(model).name, "tuned_on": task, "method": method, "task": other}
            rows.append(row | {"metric": metric, "score": found, "text": text_loss(texts)})
    seeds, text = " ".join(map(str, args.seeds)), f": {args.text.name}" if args.text else ""
    about = ABOUT.format(split=args.split, seeds=seeds, text=text)
    write_table(args.out, "forgets", about, markdown(HEADER, map(as_text, rows)), rows, argv)
    lines = lines_of(rows, x="method", line="tuned_on")
    picture(args.out / "forgets.png", lines, "tuned by", "score on another task", joined=False)
    finish(failed)


if __name__ == "__main__":
    errors.run(main)
