"""Each study on a tiny model: its runs are the scripts' own, its table theirs, nothing twice."""

import json

import pytest
import torch

from lofit.errors import InputError
from lofit.studies import data, forgets, heads, layers, methods, transfer
from lofit.studies.layers import agreement
from lofit.studies.plan import validation
from lofit.studies.tables import lines_of, picture


@pytest.fixture
def study(tiny_folder, small_data, tmp_path, in_process, capsys):
    """(study, flags) -> rows of its JSON, its table's lines, calls of the scripts."""

    def run(module, *flags, tasks=("mquake",), seeds=("1",)):
        out = tmp_path / "out"
        common = ["--model", str(tiny_folder), "--data", str(small_data), "--out", str(out)]
        common += ["--task", *tasks, "--seeds", *seeds, "--train-flags", "--epochs 1"]
        before = len(in_process)
        module.main([*common, "--select-flags", "--epochs 1", *flags])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
        name = module.__name__.rpartition(".")[2]
        rows = json.loads((out / f"{name}.json").read_text())["rows"]
        assert len(rows) == len(lines)
        text = (out / f"{name}.md").read_text()
        assert "\n".join(lines) in text and f"python -m lofit.studies.{name} --model" in text
        return rows, lines, in_process[before:]

    run.out = tmp_path / "out"
    return run


def test_heads_takes_the_best_lr_on_validation_and_compares_with_random_draws(study):
    flags = ("--heads", "2", "--by", "scales", "gradient", "random", "--draws", "2")
    rows, lines, calls = study(heads, *flags, "--lr-factors", "1", "30")
    assert [row["by"] for row in rows] == ["scales", "gradient", "random"]
    assert [len(row["score"]["scores"]) for row in rows] == [1, 1, 2]
    assert rows[2]["less_random"] is None and rows[0]["less_random"] is not None
    scripts = [script for script, *_ in calls]
    # two selections; each way's first run is one of two tried, the second draw takes its choice
    assert (scripts.count("select_heads.py"), scripts.count("train.py")) == (2, 7)
    assert scripts.count("eval.py") == 5  # with the base model's
    (top,) = study.out.glob("*/mquake/seed1/scales-2")
    tried = {run.name: validation(run, "em_stripped") for run in top.iterdir()}
    (evaluated,) = [run.name for run in top.iterdir() if (run / "results.json").exists()]
    assert len(tried) == 2 and tried[evaluated] == max(tried.values())
    assert rows[0]["lrs"] == [evaluated] and "recipe" in tried
    drawn = [[run.name for run in study.out.glob(f"*/mquake/seed{n}/random-2/*")] for n in (1, 2)]
    assert len(drawn[0]) == 2 and rows[2]["lrs"] == 2 * drawn[1]
    again, same, none = study(heads, *flags, "--lr-factors", "1", "30")
    assert (again, same, none) == (rows, lines, [])
    for path in study.out.rglob("predictions.jsonl"):  # cells as they are published
        path.unlink()
    again, _, calls = study(heads, *flags, "--lr-factors", "1", "30", "--jobs", "0")
    assert (again, calls) == (rows, [])
    again, _, calls = study(heads, *flags, "--lr-factors", "1", "30")
    assert again == rows and [(call[0], "--base-only" in call) for call in calls] == [
        ("eval.py", True)
    ]


def test_methods_sets_baselines_beside_lofit(study):
    flags = ("--heads", "2", "all", "--methods", "bias", "iti", "--lr-factors", "1")
    rows, _, calls = study(methods, *flags)
    assert [row["method"] for row in rows] == ["lofit 2", "lofit all", "bias", "iti"]
    assert [row["values"] for row in rows] == [16, 96, 96, 8]
    assert rows[0]["less_lofit"] is None and all(row["less_lofit"] for row in rows[1:])
    assert all(row["seconds"][0] >= 0 for row in rows)
    tried = [call for call in calls if call[0] == "train.py"]
    assert len(tried) == 2 + 2 * 3
    assert study(methods, *flags)[2] == []


def test_data_trains_on_fewer_examples(study):
    flags = ("--examples", "5", "all", "--methods", "lofit 2", "red", "--lr-factors", "1")
    rows, _, calls = study(data, *flags)
    assert [(row["examples"], row["method"]) for row in rows] == [
        ("5", "lofit 2"), ("5", "red"), ("all", "lofit 2"), ("all", "red"),
    ]  # fmt: skip
    few = [call for call in calls if "--n-train" in call]
    assert [call[0] for call in few].count("select_heads.py") == 1
    assert all(call[call.index("--n-train") + 1] == "5" for call in few)
    with pytest.raises(InputError, match="--methods nonsense: expected"):
        data.parse_args(["--methods", "nonsense"])


def test_transfer_takes_heads_and_offsets_of_the_other_task(study):
    rows, _, calls = study(
        transfer, "--heads", "2", "--lr-factors", "1", tasks=("mquake", "clutrr")
    )
    found = {(row["task"], row["what"], row["from"]) for row in rows}
    both = [("mquake", "clutrr"), ("clutrr", "mquake")]
    assert found == {(t, "heads", t) for t, _ in both} | {
        (t, what, s) for t, s in both for what in ("heads", "offsets")
    }
    taken = [call for call in calls if any(str(flag).startswith("task:") for flag in call)]
    assert len(taken) == 2
    asked = [call for call in calls if "--offsets" in call]
    assert len(asked) == 2 and all(call[0] == "eval.py" for call in asked)


def test_transfer_to_one_task_alone(study):
    flags = ("--heads", "2", "--lr-factors", "1", "--tested", "mquake")
    rows, _, calls = study(transfer, *flags, tasks=("mquake", "clutrr"))
    assert [(row["task"], row["what"], row["from"]) for row in rows] == [
        ("mquake", "heads", "mquake"), ("mquake", "heads", "clutrr"),
        ("mquake", "offsets", "clutrr"), ("clutrr", "heads", "clutrr"),
    ]  # fmt: skip
    trained = [call for call in calls if call[0] == "train.py"]
    assert ["mquake", "mquake", "clutrr"] == [c[c.index("--task") + 1] for c in trained]


def test_forgets_asks_the_other_task_and_plain_text(study):
    flags = ("--methods", "lofit 2", "bias", "--lr-factors", "30")
    rows, _, _ = study(forgets, *flags, tasks=("mquake", "clutrr"))
    assert [(row["tuned_on"], row["method"], row["task"]) for row in rows] == [
        ("mquake", "lofit 2", "clutrr"), ("mquake", "bias", "clutrr"),
        ("clutrr", "lofit 2", "mquake"), ("clutrr", "bias", "mquake"),
    ]  # fmt: skip
    for row in rows:
        assert row["text"]["tuned"] != row["text"]["base"] > 0
    again, _, calls = study(forgets, *flags, "--tuned", "clutrr", tasks=("mquake", "clutrr"))
    assert again == rows[2:] and not calls


def test_layers_counts_where_heads_sit(study):
    rows, _, calls = study(layers, "--heads", "2", tasks=("mquake", "clutrr"), seeds=("1", "2"))
    assert len(rows) == 4 and {call[0] for call in calls} == {"select_heads.py"}
    for row in rows:
        assert sum(row["layers"].values()) == 4 and row["pairs"] == (
            1 if row["task"] == row["beside"] else 4
        )


def test_agreement_of_two_choices():
    scores = torch.arange(12.0).view(3, 4)
    assert agreement(scores, scores, 3) == (1.0, pytest.approx(1.0))
    assert agreement(scores, -scores, 3) == (0.0, pytest.approx(-1.0))


def test_picture_has_a_line_for_each_label(tmp_path):
    pytest.importorskip("matplotlib", reason='needs pip install -e ".[plot]"')
    score = {"base": 0.1, "mean": 0.4, "ci95": (0.2, 0.4)}
    rows = [{"model": "m", "task": "t", "k": k, "by": "scales", "score": score} for k in (1, 2)]
    lines = lines_of(rows, x="k", line="by")
    interval = (pytest.approx(0.3), pytest.approx(0.5))
    assert lines == {"m, t": {"scales": [("1", 0.4, *interval), ("2", 0.4, *interval)]}}
    assert picture(tmp_path / "a.png", lines, "heads", "score")
    assert picture(tmp_path / "points.png", lines, "method", "score", joined=False)
    line, points = ((tmp_path / f"{name}.png").read_bytes() for name in ("a", "points"))
    assert line.startswith(b"\x89PNG") and points.startswith(b"\x89PNG") and line != points
    assert not picture(tmp_path / "b.png", {}, "heads", "score")
