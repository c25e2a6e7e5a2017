"""Each study: on a tiny model its calls are the scripts' own and nothing is made twice; from the
recorded runs of docs/results its table prints without a checkpoint."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import REPO

from lofit.errors import InputError
from lofit.studies import text_loss
from lofit.studies.__main__ import main, parse_args
from lofit.studies.page import filled
from lofit.studies.records import Records
from lofit.studies.rows import agreement
from lofit.studies.runner import WORK, other_offsets


@pytest.fixture
def study(tiny_folder, small_data, tmp_path, in_process, capsys):
    """(study's name, flags) -> rows of its table as {column: text}, calls of the scripts."""

    def run(name, *flags, tasks=("mquake",), seeds=("1",)):
        common = ["--model", str(tiny_folder), "--data", str(small_data), "--task", *tasks]
        common += ["--seeds", *seeds, "--records", str(run.records), "--device", "cpu"]
        before = len(in_process)
        main([name, *common, "--train-flags=--epochs 1", "--select-flags=--epochs 1", *flags])
        return table_of(capsys.readouterr().out), in_process[before:]

    run.records = tmp_path / "records"
    return run


def table_of(printed: str) -> list[dict]:
    lines = [x[2:-2].split(" | ") for x in printed.splitlines() if x.startswith("|")]
    assert lines[1] == ["---"] * len(lines[0])
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def recorded(printed_by, capsys) -> list[dict]:
    main([*printed_by.split(), "--jobs", "0", "--records", str(REPO / "docs" / "results")])
    return table_of(capsys.readouterr().out)


def scripts(calls) -> list[str]:
    return [script for script, *_ in calls]


@pytest.mark.slow
def test_sweep_prints_what_the_scripts_measured(study, tmp_path):
    flags = ("--heads", "5", "2", "all")
    rows, calls = study("sweep", *flags, seeds=("1", "2"))
    assert [(row["heads"], row["values"]) for row in rows] == [
        ("5", "40"), ("2", "16"), ("12", "96"),
    ]  # fmt: skip
    files = [json.loads(path.read_text()) for path in tmp_path.glob("work/**/results.json")]
    for row in rows:
        mine = [f for f in files if "tuned" in f and len(f["heads"]) == int(row["heads"])]
        drawn = [f for f in mine if f["settings"]["heads"] == "random"]
        for column, part in (
            ("LoFiT", [f for f in mine if f not in drawn]),
            ("random heads", drawn),
        ):
            each = [100 * f["tuned"]["em_stripped"] for f in sorted(part, key=lambda f: f["seed"])]
            if part:
                text = " ".join(f"{x:.1f}" for x in each)
                assert row[column].endswith(f": {text}") and len(each) == 2
                assert row[column].startswith(f"{sum(each) / 2:.1f}%")
        assert row["base"] == f"{mine[0]['base']['em_stripped']:.1%}"
    # one selection a seed serves both numbers of heads; the base model is asked once
    assert scripts(calls).count("select_heads.py") == 2 and scripts(calls).count("train.py") == 10
    asked = [call for call in calls if "--base-only" in call]
    assert len(asked) == 1 and scripts(calls).count("eval.py") == 11
    assert study("sweep", *flags, seeds=("1", "2")) == (rows, [])


@pytest.mark.slow
def test_a_task_in_folds_has_one_line_a_run(study):
    rows, calls = study("sweep", "--heads", "2", tasks=("truthfulqa",))
    (row,) = rows
    assert row["heads"] == "2" and row["task"] == "truthfulqa (mc1)"
    (path,) = study.records.glob("*.jsonl")
    lines = [json.loads(line) for line in path.open()]
    assert sorted(line["kind"] for line in lines) == ["base", "select", "train", "train"]
    tuned = next(line for line in lines if line.get("by") == "scales" and line["kind"] == "train")
    assert [len(heads) for heads in tuned["heads"]] == [2, 2] and tuned["n"] == [8, 8]
    assert len(tuned["val"]) == 2 and set(tuned["hits"]["mc1"]) <= {"0", "1"}
    assert tuned["settings"]["epochs"] == 1 and len(tuned["hits"]["mc2"]) == 16


@pytest.mark.slow
def test_tasks_has_a_row_a_metric_and_the_always_one_answer_score(study, tmp_path):
    line = {"prompt": "Q: Is it? A:", "choices": [" city", " country"]}
    for split in ("train", "val", "test"):
        lines = [line | {"answer": a} for a in (" city", *[" country"] * 3)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{split}.jsonl").write_text(text)
    rows, calls = study("tasks", "--heads", "2", tasks=(str(tmp_path), "mquake"))
    assert [row["task"] for row in rows] == [
        f"{tmp_path} (em)", f"{tmp_path} (accuracy)", "mquake (em_stripped)",
    ]  # fmt: skip
    assert [row["one answer"] for row in rows[:2]] == ["75.0", "75.0"]
    (path,) = study.records.glob("*.jsonl")
    lines = [x for x in map(json.loads, path.open()) if x["task"] == str(tmp_path)]
    lora = next(x for x in lines if x.get("method") == "lora")
    assert rows[1]["LoRA"] == f"{100 * lora['tuned']['accuracy']:.1f}"
    assert rows[1]["base"] == f"{100 * lora['base']['accuracy']:.1f}"
    drawn = next(x for x in lines if x.get("by") == "random")
    assert rows[0]["random heads"] == f"{100 * drawn['tuned']['em']:.1f}"
    assert set(drawn["given"]) == {"base", "tuned"} and drawn["always"]["answer"] == "country"
    assert scripts(calls).count("train.py") == 6 and scripts(calls).count("eval.py") == 8
    # each row is of its own metric
    lora["hits"] |= {"em": "1111", "accuracy": "0000"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, _ = study("tasks", "--heads", "2", "--jobs", "0", tasks=(str(tmp_path),))
    assert [row["LoRA"] for row in rows] == ["100.0", "0.0"]
    assert rows[0]["less LoRA"].startswith("-") and not rows[1]["less LoRA"].startswith("-")


@pytest.mark.slow
def test_heads_takes_the_best_lr_on_validation_for_all_draws(study):
    flags = (
        "--heads",
        "2",
        "--by",
        "gradient",
        "random",
        "--draws",
        "2",
        "--lr-factors",
        "1",
        "30",
    )
    rows, calls = study("heads", *flags)
    assert [row["chosen by"] for row in rows] == ["gradient", "random"]
    assert rows[1]["less random"] == "–" != rows[0]["less random"]
    # each way tries two rates with its first seed; the second draw takes the first one's choice
    assert scripts(calls).count("train.py") == 2 + 3 and scripts(calls).count("eval.py") == 4
    (path,) = study.records.glob("*.jsonl")
    lines = [json.loads(line) for line in path.open()]
    for way in ("gradient", "random"):
        tried = [x for x in lines if x.get("by") == way and "val" in x and x["seed"] == 1]
        best = max(tried, key=lambda line: line["val"]["em_stripped"])
        (tested,) = [line for line in tried if "tuned" in line]
        assert len(tried) == 2 and tested["val"] == best["val"]
    again, calls = study("heads", *flags, "--jobs", "0")
    assert (again, calls) == (rows, [])


@pytest.mark.slow
def test_methods_and_data_set_baselines_beside_lofit(study):
    flags = ("--heads", "2", "all", "--methods", "bias", "iti", "--lr-factors", "1")
    rows, calls = study("methods", *flags)
    assert [row["method"] for row in rows] == ["lofit 2", "lofit all", "bias", "iti"]
    assert [row["values"] for row in rows] == ["16", "96", "96", "8"]
    assert [row["less LoFiT"] == "–" for row in rows] == [True, False, False, False]
    assert rows[2]["chosen"].startswith("lr") and rows[3]["chosen"].startswith("alpha")
    flags = ("--examples", "5", "all", "--methods", "lofit 2", "bias", "--lr-factors", "1")
    rows, calls = study("data", *flags)
    assert [(row["examples"], row["method"]) for row in rows] == [
        ("5", "lofit 2"), ("5", "bias"), ("all", "lofit 2"), ("all", "bias"),
    ]  # fmt: skip
    made = [c for c in calls if c[0] != "eval.py"]  # with all examples `methods` made them
    assert scripts(made).count("select_heads.py") == 1 and scripts(made).count("train.py") == 4
    assert all(call[call.index("--n-train") + 1] == "5" for call in made)


def test_a_method_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        parse_args(["data", "--methods", "nonsense"])
    assert 'nonsense: expected "lofit K", lora' in capsys.readouterr().err


@pytest.mark.slow
def test_transfer_and_forgets_use_the_same_runs(study):
    flags = ("--heads", "2", "--lr-factors", "1", "--tested", "mquake")
    rows, calls = study("transfer", *flags, tasks=("mquake", "truthfulqa"))
    assert [(row["tested on"].split()[0], row["what"], row["from"]) for row in rows] == [
        ("mquake", "heads", "mquake"), ("mquake", "heads", "truthfulqa"),
        ("mquake", "offsets", "truthfulqa"), ("truthfulqa", "heads", "truthfulqa"),
    ]  # fmt: skip
    (asked,) = [call for call in calls if "--offsets" in call]
    assert asked[asked.index("--offsets") + 1].endswith("/fold0")
    taken = [c for c in calls if c[0] == "train.py" and c[c.index("--heads") + 1].endswith("fold0")]
    assert len(taken) == 1 and taken[0][taken[0].index("--task") + 1] == "mquake"
    flags = ("--methods", "lofit 2", "--lr-factors", "1", "--tuned", "mquake")
    rows, calls = study("forgets", *flags, tasks=("mquake", "truthfulqa"))
    assert scripts(calls) == ["eval.py", "text_loss"]
    assert [row["asked"] for row in rows] == ["truthfulqa (mc1)"] and " → " in rows[0][
        "loss of text"
    ]


def test_layers_counts_where_heads_sit(study):
    rows, calls = study("layers", "--heads", "2", seeds=("1", "2"))
    assert len(rows) == 1 and scripts(calls) == 2 * ["select_heads.py"]
    assert float(rows[0]["shared"]) in (0, 0.5, 1) and "to" in rows[0]["layers"]
    scores = torch.arange(12.0).view(3, 4)
    assert agreement(scores, scores, 3) == (1.0, pytest.approx(1.0))
    assert agreement(scores, -scores, 3) == (0.0, pytest.approx(-1.0))


@pytest.mark.slow
def test_files_that_a_clone_lacks_are_made_again_and_the_records_stay(study, tmp_path):
    study("sweep", "--heads", "2")
    before = {path.name: path.read_bytes() for path in study.records.iterdir()}
    (tmp_path / "work").rename(tmp_path / "elsewhere")
    assert study("sweep", "--heads", "2")[1] == []
    _, calls = study("sweep", "--heads", "3")
    # three heads need the selection and the base model's answers, not the runs of two heads
    assert sorted(scripts(calls)) == sorted(
        ["select_heads.py", "eval.py", *2 * ["train.py", "eval.py"]]
    )
    (path,) = study.records.glob("*.jsonl")
    assert path.read_bytes().startswith(before[path.name])


def test_a_call_that_fails_is_named_with_its_reason(study, tmp_path, capsys):
    flags = ("--heads", "2", "--data", str(tmp_path / "nowhere"), "--lr-factors", "1")
    with pytest.raises(InputError, match="calls that failed: 6"):
        study("sweep", *flags)
    lines = capsys.readouterr().err.splitlines()
    assert any("select_heads.py" in line and "no such file" in line for line in lines)
    assert sum("what it needs failed" in line for line in lines) == 3


def test_recorded_tables_print_without_a_checkpoint(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no weights lie
    real = "--model weights/smollm2-135m-instruct --data data/real --task mquake"
    rows = recorded(f"methods {real} --methods lora repe --heads 10% 3%", capsys)
    assert [row["chosen"].split()[0] for row in rows] == ["lr0.03", "recipe", "lr5e-4", "alpha0.5"]
    assert rows[0]["score"].startswith("43.9% (+43.7 [") and rows[0]["score"].endswith(
        "]): 44.7 43.8 43.3"
    )
    assert (rows[0]["seconds"], rows[2]["values"]) == ("212", "460,800")
    flags = "--methods red iti --heads 10% --chosen-on mquake --seeds 42 --lr-factors 1"
    rows = recorded(f"methods {real.replace('mquake', 'truthfulqa')} {flags}", capsys)
    assert [row["chosen"] for row in rows] == ["recipe", "lr5e-3 (of mquake)", "alpha5"]
    assert rows[1]["score"].endswith(": 36.1")
    rows = recorded(f"forgets {real} truthfulqa --tuned mquake --methods lora", capsys)
    assert rows[0]["loss of text"].startswith("4.194 → 4.476 [+0.")
    assert rows[0]["change"].startswith("-1.0 [")
    rows = recorded(f"layers {real}", capsys)
    assert list(rows[0].values())[4:] == ["11.2", "1 to 24", "0.95", "0.99"]


def test_runs_with_options_that_are_gone_still_print(capsys):
    """Offsets in units of sigma, and heads chosen by offsets: the code has neither any more."""
    flags = "--model weights/gemma-3-270m --data data/real --task mquake --heads 3%".split()
    records = ["--records", str(REPO / "docs" / "results"), "--jobs", "0"]
    main(["sweep", *flags, *records, "--train-flags=--unit sigma --lr 0.3 --epochs 5"])
    (row,) = table_of(capsys.readouterr().out)
    assert row["LoFiT"].endswith(": 47.2 45.4 46.1")
    (row,) = recorded(
        "heads --model weights/mini-llama --task mquake --heads 3% --by offsets --lr-factors 1",
        capsys,
    )
    assert row["score"].endswith(": 51.2 54.0 72.8") and row["± runs"] == "11.7"


@pytest.mark.slow
def test_the_tables_of_the_page_are_what_its_commands_print(monkeypatch):
    monkeypatch.chdir(REPO)
    text = (REPO / "docs" / "results.md").read_text()
    wrong = text.replace("43.8 45.7 45.6", "43.8 45.7 45.9").replace("| 27 | 1,728 |", "| 28 |")
    assert wrong != text == filled(wrong)


def test_every_recorded_run_is_whole():
    for path in sorted((REPO / "docs" / "results").glob("*.jsonl")):
        for number, line in enumerate(map(json.loads, path.open()), 1):
            where = f"{path.name}, line {number}"
            assert line["seconds"] and line["fingerprint"], where
            if "hits" in line:
                who = line.get("tuned", line["base"])
                n = sum(line["n"]) if isinstance(line["n"], list) else line["n"]
                for metric, hits in line["hits"].items():
                    assert len(hits) == n, where
                    mean = sum(map(float, hits)) / n
                    assert mean == pytest.approx(who[metric], abs=1e-4), where


def test_recorded_tests_are_of_the_recorded_offsets():
    """But for six runs that were trained again on another machine, as docs/results.md says."""
    records, other = Records(REPO / "docs" / "results"), []
    for path in sorted(records.folder.glob("*.jsonl")):
        for run, found in records.of_model(path.stem).items():
            if run.kind == "asked":
                trained = records.of(replace(run, kind="train", tested=""))
                other += [(run.method, run.tested)] * other_offsets(trained, found)
    assert sorted(other) == [*3 * [("lofit", "truthfulqa")], *3 * [("lora", "truthfulqa")]]


def test_an_empty_text_is_refused(tiny_folder, small_data, tmp_path):
    (tmp_path / "text").write_text("\n")
    flags = ["--model", str(tiny_folder), "--data", str(small_data), "--run", str(tmp_path / "run")]
    with pytest.raises(InputError, match="text: no text of two tokens or more"):
        text_loss.main([*flags, "--offsets", "none", "--text", str(tmp_path / "text")])


def test_work_is_not_in_git():
    assert str(WORK) == "runs/studies" and "runs/" in (REPO / ".gitignore").read_text().split()
    assert Records(REPO / "docs" / "results").folder.is_dir()


def test_a_seed_that_comes_twice_is_one_run():
    assert parse_args(["sweep", "--seeds", "42", "43", "42"]).seeds == [42, 43]


@pytest.mark.parametrize("flags", [("sweep", "--jobs", "-1"), ("heads", "--draws", "0")])
def test_numbers_that_make_no_sense(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_args(list(flags))
    assert "expected" in capsys.readouterr().err
