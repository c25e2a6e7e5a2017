"""Each study: on a tiny model its calls are the scripts' own and nothing is made twice; from the
recorded runs of docs/results its table prints without a checkpoint."""

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO

from lofit.errors import InputError
from lofit.studies import text_loss, verdicts
from lofit.studies.__main__ import main, parse_args
from lofit.studies.cells import training_flags
from lofit.studies.page import filled
from lofit.studies.records import Records, Run, other_offsets
from lofit.studies.tables import in_common, spearman

STEP = re.compile(r"\(test -e (\S+) \|\| python ([^)]*)\)")


@pytest.fixture
def study(tiny_folder, small_data, tmp_path, monkeypatch, capsys):
    """(study's name, flags) -> rows of its table as {column: text}, calls of the scripts. The lines
    of --missing run in this process, which spares many starts of torch."""
    monkeypatch.chdir(tmp_path)

    def call(words: list[str]) -> list[str]:
        name, *args = words[1:] if words[0] == "-m" else words
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(name.removesuffix(".py")).main(args)
        return [name.removeprefix("lofit.studies."), *args]

    def run(name, *flags, tasks=("mquake",), seeds=("1",)):
        common = ["--model", str(tiny_folder), "--data", str(small_data), "--task", *tasks]
        common += ["--seeds", *seeds, "--records", str(run.records)]
        common += ["--train-flags=--epochs 1", "--select-flags=--epochs 1", *flags]
        calls = []
        while lines := missing(name, *common):
            for line in lines:
                steps = [
                    shlex.split(c) for file, c in STEP.findall(line) if not Path(file).exists()
                ]
                calls += map(call, steps)
                call(shlex.split(line.rsplit(" && ")[-1])[1:])
        main([name, *common])
        return table_of(capsys.readouterr().out), calls

    def missing(*argv):
        capsys.readouterr()
        main([*argv, "--missing"])
        return capsys.readouterr().out.splitlines()

    run.records = tmp_path / "records"
    return run


def table_of(printed: str) -> list[dict]:
    lines = [x[2:-2].split(" | ") for x in printed.splitlines() if x.startswith("|")]
    assert lines[1] == ["---"] * len(lines[0])
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def recorded(printed_by, capsys) -> list[dict]:
    main([*printed_by.split(), "--records", str(REPO / "docs" / "results")])
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
    files = [json.loads(p.read_text()) for p in tmp_path.glob("runs/**/results.json")]
    for row in rows:
        mine = [f for f in files if len(f["adapters"]["tuned"]["heads"]) == int(row["heads"])]
        drawn = [f for f in mine if "_random_" in f["adapters"]["tuned"]["offsets"]]
        for column, part in (
            ("LoFiT", [f for f in mine if f not in drawn]),
            ("random heads", drawn),
        ):
            part = sorted(part, key=lambda f: f["seed"])
            each = [100 * f["scores"]["tuned"]["em_stripped"] for f in part]
            if part:
                text = " ".join(f"{x:.1f}" for x in each)
                assert row[column].endswith(f": {text}") and len(each) == 2
                assert row[column].startswith(f"{sum(each) / 2:.1f}%")
        assert row["base"] == f"{mine[0]['scores']['base']['em_stripped']:.1%}"
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
    # a cheap rule's items and the others
    lines = [x for x in map(json.loads, path.open()) if x["task"] == "mquake"]
    (rule,) = next(x for x in lines if x["kind"] == "base")["rule_scores"].values()
    hits = next(x for x in lines if x.get("by") == "random")["hits"]["em_stripped"]
    (row,), calls = study("rules", "--methods", "random 2", tasks=("mquake",))
    for column, digit in (("rule right", "1"), ("rule wrong", "0")):
        mine = [int(hit) for hit, r in zip(hits, rule, strict=True) if r == digit]
        assert row[column] == f"{100 * sum(mine) / len(mine):.1f} ({len(mine)} items)"
    assert not calls
    lines = [x for x in map(json.loads, path.open()) if x["task"] == str(tmp_path)]
    # each row is of its own metric
    lora = next(x for x in lines if x.get("method") == "lora")
    lora["hits"] |= {"em": "1111", "accuracy": "0000"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, _ = study("tasks", "--heads", "2", tasks=(str(tmp_path),))
    assert [row["LoRA"] for row in rows] == ["100.0", "0.0"]
    assert [row["LoFiT − LoRA"][0] for row in rows] == ["-", "+"]


@pytest.mark.slow
def test_heads_takes_the_best_lr_on_validation_for_all_draws(study):
    flags = "--heads 2 --by gradient random --draws 2 --lr-factors 1 30".split()
    rows, calls = study("heads", *flags)
    assert [row["chosen by"] for row in rows] == ["gradient", "random"]
    assert rows[1]["− random"] == "–" != rows[0]["− random"]
    # each way tries two rates with its first seed; the second draw takes the first one's choice
    assert scripts(calls).count("train.py") == 2 + 3 and scripts(calls).count("eval.py") == 4
    (path,) = study.records.glob("*.jsonl")
    lines = [json.loads(line) for line in path.open()]
    for way in ("gradient", "random"):
        tried = [x for x in lines if x.get("by") == way and "val" in x and x["seed"] == 1]
        best = max(tried, key=lambda line: line["val"]["em_stripped"])
        (tested,) = [line for line in tried if "tuned" in line]
        assert len(tried) == 2 and tested["val"] == best["val"]
    again, calls = study("heads", *flags)
    assert (again, calls) == (rows, [])


@pytest.mark.slow
def test_methods_and_data_set_baselines_beside_lofit(study):
    flags = ("--heads", "2", "all", "--methods", "bias", "iti", "--lr-factors", "1")
    rows, calls = study("methods", *flags)
    assert [row["method"] for row in rows] == ["lofit 2", "lofit all", "bias", "iti"]
    assert [row["values"] for row in rows] == ["16", "96", "96", "8"]
    assert [row["LoFiT − it"] == "–" for row in rows] == [True, False, False, False]
    assert rows[2]["chosen"].startswith("lr") and rows[3]["chosen"].startswith("alpha")
    flags = ("--examples", "5", "all", "--methods", "lofit 2", "bias", "--lr-factors", "1")
    rows, calls = study("data", *flags)
    assert [(row["examples"], row["method"]) for row in rows] == [
        ("5", "lofit 2"), ("5", "bias"), ("all", "lofit 2"), ("all", "bias"),
    ]  # fmt: skip
    made = [c for c in calls if c[0] != "eval.py"]  # with all examples `methods` made them
    assert scripts(made).count("select_heads.py") == 1 and scripts(made).count("train.py") == 4
    assert all(call[call.index("--n-train") + 1] == "5" for call in made)


@pytest.mark.slow
def test_transfer_and_forgets_use_the_same_runs(study):
    flags = ("--heads", "2", "--lr-factors", "1", "--tested", "mquake")
    rows, calls = study("transfer", *flags, tasks=("mquake", "truthfulqa"))
    assert [(row["tested on"].split()[0], row["what"], row["from"]) for row in rows] == [
        ("mquake", "heads", "mquake"), ("mquake", "heads", "truthfulqa"),
        ("mquake", "offsets", "truthfulqa"), ("truthfulqa", "heads", "truthfulqa"),
    ]  # fmt: skip
    (asked,) = [call for call in calls if "--offsets" in call]
    assert asked[asked.index("--offsets") + 1].endswith("/truthfulqa-0")
    trained = [call for call in calls if call[0] == "train.py"]
    taken = [c for c in trained if c[c.index("--heads") + 1].endswith("truthfulqa-0")]
    assert {c[c.index("--task") + 1] for c in taken} == {"mquake", "truthfulqa-0"}
    flags = ("--methods", "lofit 2", "--lr-factors", "1", "--tuned", "mquake")
    rows, calls = study("forgets", *flags, tasks=("mquake", "truthfulqa"))
    assert scripts(calls) == ["eval.py", "eval.py", "text_loss"]  # two folds with the same prompts
    assert rows[0]["asked"] == "truthfulqa (mc1)" and " → " in rows[0]["loss of text"]


def test_layers_counts_where_heads_sit(study):
    rows, calls = study("layers", "--heads", "2", seeds=("1", "2"))
    assert len(rows) == 1 and scripts(calls) == 2 * ["select_heads.py"]
    assert float(rows[0]["shared"]) in (0, 0.5, 1) and "to" in rows[0]["layers"]
    scores = torch.arange(12.0).view(3, 4)
    assert in_common(scores, scores, 3) == 1 and in_common(scores, -scores, 3) == 0
    assert [spearman(scores, sign * scores) for sign in (1, -1)] == pytest.approx([1, -1])


@pytest.mark.slow
def test_files_that_a_clone_lacks_are_made_again_and_the_records_stay(study, tmp_path):
    study("sweep", "--heads", "2")
    before = {p.name: p.read_bytes() for p in study.records.glob("*.jsonl")}
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert study("sweep", "--heads", "2")[1] == []
    _, calls = study("sweep", "--heads", "3")
    # three heads need the selection, not the runs of two heads
    assert sorted(scripts(calls)) == sorted(["select_heads.py", *2 * ["train.py", "eval.py"]])
    (path,) = study.records.glob("*.jsonl")
    assert path.read_bytes().startswith(before[path.name])


@pytest.mark.slow
def test_lines_run_by_sh_and_repeat_and_lose_no_record(tiny_folder, small_data, tmp_path):
    """Two at once, after one was killed in its training, as xargs and a job array run them."""
    for script in ("select_heads.py", "train.py", "eval.py"):
        (tmp_path / script).symlink_to(REPO / script)
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    more = {"cwd": tmp_path, "env": env, "text": True}
    command = [sys.executable, "-m", "lofit.studies", "sweep", "--model", str(tiny_folder)]
    command += ["--data", str(small_data), "--task", "mquake", "--seeds", "1", "--heads", "2"]
    command += ["--train-flags=--epochs 1", "--select-flags=--epochs 1", "--records", "records"]
    found = subprocess.run([*command, "--missing"], capture_output=True, check=True, **more)
    lines = found.stdout.splitlines()
    assert len(lines) == 3  # the base model, chosen heads, random ones
    assert not any(c in found.stdout for c in "'\"\\")  # which xargs takes for itself
    chosen = lines[1].split(" && ")
    assert subprocess.run(["sh", "-c", " && ".join([chosen[0], "exit 9"])], **more).returncode == 9
    xargs = ["xargs", "-P", "2", "-I{}", "sh", "-c", "{}"]
    done = subprocess.run(xargs, input=found.stdout, capture_output=True, **more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("learning a scale for every head") == 0  # it was there
    recorded = [json.loads(line) for line in (tmp_path / "records" / "tiny.jsonl").open()]
    kinds = sorted((x["kind"], x.get("by", "")) for x in recorded)
    assert kinds == [("base", ""), ("select", "scales"), ("train", "random"), ("train", "scales")]
    for line in recorded:
        assert line["data_hash"] and set(line["device"].values()) == {"cpu"}
        assert all(0 < seconds < 600 for seconds in line["seconds"].values())
    assert subprocess.run([*command, "--missing"], capture_output=True, **more).stdout == ""
    before = (tmp_path / "records" / "tiny.jsonl").read_bytes()
    assert subprocess.run(["sh", "-c", lines[2]], capture_output=True, **more).returncode == 0
    assert (tmp_path / "records" / "tiny.jsonl").read_bytes() == before
    table = subprocess.run(command, capture_output=True, check=True, **more).stdout
    assert table_of(table)[0]["random heads"] != "–"


def test_ways_that_are_gone_are_left_out(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--task", "mquake", "--heads", "3%", "--lr-factors", "1", "--records", "none"]
    main(["heads", "--model", "m/tiny", *flags, "--by", "gates", "gradient", "--missing"])
    lines = capsys.readouterr().out.splitlines()
    # the base model, and for each seed a selection with its training
    assert len(lines) == 4 and sum("--by gradient" in line for line in lines) == 3


def test_a_base_in_4_bits_is_told_to_every_script(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--task", "mquake", "--seeds", "1", "--methods", "lofit 2", "--records", "none"]
    main(["quantized", "--model", "m/tiny", *flags, "--missing"])
    *whole, asked, tuned = capsys.readouterr().out.splitlines()
    assert len(whole) == 2 and not any("nf4" in line for line in whole)
    scripts = re.findall(r"python (\w+)\.py [^)]* --quantize nf4 [^)]*\)", f"{asked} {tuned}")
    assert scripts == ["eval", "select_heads", "train", "eval"]
    run = Run("train", "m/tiny", "mquake", "d", 1, "float32", "lofit", "scales", quantize="nf4")
    assert run.base.quantize == run.selection.quantize == "nf4"


def test_a_step_that_fails_ends_its_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--task", "mquake", "--heads", "2", "--seeds", "1", "--records", "none", "--missing"]
    main(["sweep", "--model", "m/tiny", *flags])
    line = capsys.readouterr().out.splitlines()[1]
    (tmp_path / "python").write_text("#!/bin/sh\necho $1 >> calls\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run(["sh", "-c", line], env=env).returncode == 3
    assert (tmp_path / "calls").read_text() == "select_heads.py\n"


def test_flags_of_older_records_are_printed_as_they_are_now():
    run = Run("train", "m", "mquake", "d", 1, "float32", "iti", train="--top 3 --alpha 15")
    assert training_flags(run, "") == ["--method", "iti", "--top", "3", "--strength", "15"]


def test_recorded_tables_print_without_a_checkpoint(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no weights lie
    real = "--model weights/smollm2-135m-instruct --data data/real --task mquake"
    rows = recorded(f"methods {real} --methods lora repe --heads 10% 3%", capsys)
    assert [row["chosen"].split()[0] for row in rows] == ["lr0.03", "lr0.1", "lr5e-4", "alpha0.5"]
    assert re.fullmatch(r"43\.9% \(\+43\.7 \[.*\]\): 44\.7 43\.8 43\.3", rows[0]["score"])
    assert rows[2]["values"] == "460,800"
    flags = ["--methods", "lora --lr 1e-3", "--heads", "10%", "--lr-factors", "1"]
    main(["methods", *real.split(), *flags, "--records", str(REPO / "docs" / "results")])
    (_, row) = table_of(capsys.readouterr().out)
    assert row["chosen"] == "lr1e-3 lr1e-3 lr1e-3" and row["score"].endswith(": 47.6 47.6 47.8")
    flags = "--methods red iti --heads 10% --chosen-on mquake --seeds 42 --lr-factors 1"
    rows = recorded(f"methods {real.replace('mquake', 'truthfulqa')} {flags}", capsys)
    assert [row["chosen"] for row in rows] == ["lr0.03", "lr5e-3 (of mquake)", "alpha5"]
    assert rows[1]["score"].endswith(": 36.1")
    rows = recorded(f"forgets {real} truthfulqa --tuned mquake --methods lora", capsys)
    assert rows[0]["loss of text"].startswith("4.194 → 4.476 [+0.")
    assert rows[0]["change"].startswith("-1.0 [")
    rows = recorded(f"layers {real}", capsys)
    assert list(rows[0].values())[4:] == ["11.2", "1 to 24", "0.95", "0.99"]


def test_runs_on_few_examples_lend_no_spread():
    """With all heads and 25 examples runs vary by 8 points, others by less than 2."""
    spread = verdicts.spread_of_runs(Records(REPO / "docs" / "results"), ("scales", "all"))
    assert 0.01 < spread.variance**0.5 < 0.025


def test_a_test_set_counts_once_in_claim_2_whatever_its_numbers_of_heads(tmp_path):
    """More numbers of heads on the same items are no new evidence."""
    once = []
    for name in (verdicts.SMOL, verdicts.GEMMA):
        lines = (REPO / "docs" / "results" / f"{name}.jsonl").read_text().splitlines()
        once.append([line for line in map(json.loads, lines) if line.get("k", "10%") == "10%"])
    found = []
    for copies in ([], ["11%", "12%"]):
        for name, kept in zip((verdicts.SMOL, verdicts.GEMMA), once, strict=True):
            more = [line | {"k": k} for k in copies for line in kept if "k" in line]
            text = "".join(json.dumps(line) + "\n" for line in kept + more)
            (tmp_path / f"{name}.jsonl").write_text(text)
        found.append(list(verdicts.Comparisons(Records(tmp_path)).rows())[-1])
    assert found[0] == found[1]
    assert found[0][2:4] == ["5 test sets pooled", "7 or more chosen heads"]


def test_runs_with_options_that_are_gone_still_print(capsys):
    """Offsets in units of sigma, and heads chosen by offsets: the code has neither any more."""
    flags = "--model weights/gemma-3-270m --data data/real --task mquake --heads 3%".split()
    records = ["--records", str(REPO / "docs" / "results")]
    main(["sweep", *flags, *records, "--train-flags=--unit sigma --lr 0.3 --epochs 5"])
    (row,) = table_of(capsys.readouterr().out)
    assert row["LoFiT"].endswith(": 47.2 45.4 46.1")
    flags = "--model weights/mini-llama --task mquake --heads 3% --by offsets --lr-factors 1"
    (row,) = recorded(f"heads {flags}", capsys)
    assert row["score"].endswith(": 51.2 54.0 72.8") and row["± runs"] == "11.7"


@pytest.mark.slow
def test_the_tables_of_the_page_are_what_its_commands_print(monkeypatch):
    monkeypatch.chdir(REPO)
    text = (REPO / "docs" / "tables.md").read_text()
    wrong = text
    for right in ("43.8 45.7 45.6", "| 27 | 1,728 |", "| 0 | 16 | 54.1 |"):  # the last of a map
        assert right in wrong
        wrong = wrong.replace(right, right.replace("1", "2").replace("6", "7"))
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
    records, other = Records(REPO / "docs" / "results"), []
    for path in sorted(records.folder.glob("*.jsonl")):
        for run, found in records.of_model(path.stem).items():
            if run.kind == "asked":
                differ = other_offsets(records.of(run.training), {"eval.py": found})
                other += [run.title] * differ
    assert not other


def test_an_empty_text_is_refused(tiny_folder, small_data, tmp_path):
    (tmp_path / "text").write_text("\n")
    flags = ["--model", str(tiny_folder), "--data", str(small_data), "--run", str(tmp_path / "run")]
    with pytest.raises(InputError, match="text: no text of two tokens or more"):
        text_loss.main([*flags, "--offsets", "none", "--text", str(tmp_path / "text")])


def test_a_seed_that_comes_twice_is_one_run():
    assert parse_args(["sweep", "--seeds", "42", "43", "42"]).seeds == [42, 43]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("heads --draws 0", "expected"),
        ("data --methods x", 'x: expected "lofit K", "random K", lora'),
    ],
)
def test_flags_that_make_no_sense(flags, expected, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_args(flags.split())
    assert expected in capsys.readouterr().err
