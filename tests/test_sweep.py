"""The sweep over seeds and numbers of heads: what it calls, and that its table is the runs'."""

import json

import pytest
import torch

from lofit.errors import InputError
from lofit.heads import rank_heads
from lofit.run.summary import paired_bootstrap
from lofit.studies import sweep


def test_the_table_is_what_the_runs_wrote(tiny_folder, small_data, tmp_path, in_process, capsys):
    flags = ["--model", str(tiny_folder), "--data", str(small_data), "--out", str(tmp_path / "out")]
    flags += ["--task", "mquake", "truthfulqa", "--seeds", "1", "2", "--heads", "5", "2", "all"]
    flags += ["--select-flags", "--epochs 2", "--train-flags", "--lr 0.1 --epochs 2"]
    sweep.main(flags)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    rows = lines[2:]
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]
    expected = [(t, k) for t in ("mquake (em_stripped)", "truthfulqa (mc1)") for k in (5, 2, 12)]
    (out,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    for row, numbers, (task, k) in zip(rows, table, expected, strict=True):
        name, title, base, heads, values, *choices, less = (c.strip() for c in row[1:-1].split("|"))
        metric = task.split("(")[1].strip(")")
        assert (name, title, heads, values) == (tiny_folder.name, task, str(k), f"{8 * k}")
        tuned = {}
        for choice, cell in zip(("scales", "random"), choices, strict=True):
            if k == 12 and choice == "random":
                assert (cell, less, numbers["random"]) == ("–", "–", None)
                continue
            label = "all" if k == 12 else f"{choice}-{k}"
            runs = [out / task.split()[0] / f"seed{seed}" / label / "recipe" for seed in (1, 2)]
            results = [json.loads((run / "results.json").read_text()) for run in runs]
            assert [r["seed"] for r in results] == [1, 2]
            folds = [r["heads"] if metric == "mc1" else [r["heads"]] for r in results]
            assert all(len(heads) == k for both in folds for heads in both)
            one, two = (r["tuned"][metric] for r in results)
            was = results[0]["base"][metric]
            assert base == f"{was:.1%}"
            files = [sorted(run.glob("**/predictions.jsonl")) for run in runs]
            read = [[json.loads(x) for f in each for x in f.open()] for each in files]
            tuned[choice] = [
                (a["tuned"][metric] + b["tuned"][metric]) / 2 for a, b in zip(*read, strict=True)
            ]
            low, high = paired_bootstrap([line["base"][metric] for line in read[0]], tuned[choice])
            points = 100 * ((one + two) / 2 - was)
            assert cell == (
                f"{(one + two) / 2:.1%} ({points:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]):"
                f" {100 * one:.1f} {100 * two:.1f}"
            )
            found = numbers["random" if choice == "random" else "lofit"]
            assert found["scores"] == pytest.approx([one, two])
        if k != 12:
            low, high = paired_bootstrap(tuned["random"], tuned["scales"])
            assert less.endswith(f"[{100 * low:+.1f}, {100 * high:+.1f}]")
    runs = out / "mquake" / "seed1"
    scores = json.loads((runs / "by-scales" / "heads.json").read_text())["scores"]
    few = json.loads((runs / "scales-2" / "recipe" / "results.json").read_text())
    assert few["heads"] == [list(head) for head in rank_heads(torch.tensor(scores), 2)]
    assert few["settings"]["lr"] == 0.1
    # one selection a task and seed serves both numbers of heads, and nothing runs twice
    called = [script for script, *_ in in_process]
    assert called.count("select_heads.py") == 4
    asked = [call for call in in_process if "--base-only" in call]
    assert len(asked) == 2 and all(
        "--base-from" in c for c in in_process if c[0] == "eval.py" and c not in asked
    )
    sweep.main(flags)
    again = capsys.readouterr().out
    assert len(in_process) == len(called)
    assert [line for line in again.splitlines() if line.startswith("|")] == lines
    assert "\n".join(lines) in (tmp_path / "out" / "sweep.md").read_text()
    tiny_folder.rename(
        tmp_path / "elsewhere"
    )  # who has the cells needs no checkpoint for the table
    sweep.main([*flags, "--jobs", "0"])
    assert [x for x in capsys.readouterr().out.splitlines() if x.startswith("|")] == lines


def test_a_run_that_fails_is_named_with_its_reason(tiny_folder, tmp_path, in_process, capsys):
    flags = ["--model", str(tiny_folder), "--task", "mquake", "--seeds", "1", "--heads", "all"]
    data = tmp_path / "nowhere"
    with pytest.raises(InputError, match="3 cells failed"):
        sweep.main([*flags, "--data", str(data), "--out", str(tmp_path)])
    told = capsys.readouterr().err
    assert f"mquake base: {data}" in told
    assert "mquake seed 1 all recipe: " in told
    assert "mquake seed 1 all evaluated: what it needs failed" in told


def test_seeds_of_a_job_array_share_the_base_models_answers(
    tiny_folder, small_data, tmp_path, in_process
):
    flags = ["--model", str(tiny_folder), "--data", str(small_data), "--out", str(tmp_path)]
    flags += ["--task", "mquake", "--heads", "all", "--train-flags", "--epochs 1"]
    for seed in ("1", "2"):
        sweep.main([*flags, "--seeds", seed])
    assert [call[0] for call in in_process].count("eval.py") == 3
