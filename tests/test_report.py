"""The page of a run: what is on it, all text escaped, and what it does without its parts."""

import csv
import json
import re
import shutil
import subprocess

import pytest
from conftest import REPO, make_run

import eval as eval_script
import select_heads
import train
from lofit.errors import InputError
from lofit.inspect import explain, report
from lofit.run.files import as_line
from lofit.run.summary import paired_bootstrap
from lofit.tasks import Example

WICKED = '<script>alert(1)</script> & "quotes"'


@pytest.fixture
def run(tiny_folder, small_data, tmp_path):
    """A trained and evaluated run, one question of whose test split has a script in it."""
    path = small_data / "MQuAKE" / "test.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    case = json.loads(first)
    case["questions"][0] = WICKED
    path.write_text(json.dumps(case) + "\n" + "".join(others))
    folder = tmp_path / "run"
    flags = ["--model", str(tiny_folder), "--data", str(small_data), "--run", str(folder)]
    select_heads.main([*flags, "--heads", "4", "--epochs", "1"])
    train.main([*flags, "--epochs", "2", "--lr", "0.3"])
    eval_script.main(flags)
    return folder


def test_the_page_has_results_curves_answers_and_what_offsets_say(run, capsys, monkeypatch):
    report.main([str(run)])
    text = (run / "report.html").read_text()
    assert f"-> {run / 'report.html'}" in capsys.readouterr().out
    monkeypatch.chdir(run)
    report.main(["."])
    assert (run / "report.html").read_text().count("<polyline") == text.count("<polyline")
    results = json.loads((run / "results.json").read_text())
    score = f"{100 * results['scores']['tuned']['em_stripped']:.1f} %"
    assert re.search(rf"<b>{score}</b><span class=.soft.>em_stripped of the tuned model", text)
    assert "offsets of 4 heads, 32 trained values, seed 42" in text
    heads = json.loads((run / "heads.json").read_text())["heads"]
    chosen = re.findall(r'class="chosen"><title>layer (\d), head (\d)', text)
    assert text.count("<rect") == 3 * 4
    assert sorted(map(list, chosen)) == sorted([str(i), str(j)] for i, j in heads)
    assert text.count("<polyline") == 2 + 3  # losses, scores
    dashes = re.findall(r'stroke-dasharray="(.*?)"', text)  # of equal curves all are seen
    assert len(set(dashes[2:])) == 3
    assert text.count("<article") == 2 and text.count("gold answer") == 2
    layers = [layer for layer, _ in heads]
    several = {layer for layer in layers if layers.count(layer) > 1}
    assert text.count("<code>") == 10 * (4 + len(several))
    # one file, no network, no script
    assert not re.search(r"<script|<link|@import|src=|url\(", text)


def test_an_answer_with_a_script_stays_text(run):
    line = json.loads((run / "predictions.jsonl").open().readline())
    line["base"]["prediction"], line["tuned"]["prediction"] = WICKED, f"{WICKED} more"
    (run / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    _, text = report.page([str(run)])
    assert "<script" not in text and text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3


def line_of(before: float, after: float, **more) -> dict:
    rows = {
        "base": {"prediction": "old", "em": before},
        "tuned": {"prediction": "new", "em": after},
    }
    return {"prompt": " Who? ", "answer": " gold"} | more | rows


def test_each_answer_is_right_or_wrong_beside_the_gold_one():
    lines = [line_of(0.0, 1.0, references=["Gold", "Au"]), line_of(1.0, 0.0), line_of(0.0, 0.0)]
    found = report.pick_answers([*lines, *[line_of(0.0, 0.0)] * 9], "em")
    better, worse, same, _ = found
    assert better["question"] == "Who?"
    assert [item["gold"] for item in found[:3]] == ["Gold", "gold", "gold"]
    assert better["answers"] == [("base", "old", False), ("tuned", "new", True)]
    assert worse["answers"] == [("base", "old", True), ("tuned", "new", False)]
    assert [right for *_, right in same["answers"]] == [False, False]
    assert report.gold_of({"answer": "It is 4, so 12", "value": 12.0}) == "12"
    assert report.gold_of({"answer": "yes", "right": [" yes.", " aye."]}) == "yes."


def test_given_answers_are_read_as_the_most_probable_one():
    line = {"right": [" yes."], "wrong": [" no.", " maybe."]}
    line["base"] = {"log_probs": {"right": [-3.0], "wrong": [-4.0, -1.0]}}
    assert report.answer_of(line, "base") == "maybe."


def test_the_curves_are_those_of_the_last_training():
    def epoch(n, loss, em):
        val = {"loss": loss / 2, "em": em}
        return {"script": "train", "epoch": n, "train_loss": loss, "val": val}

    older = [epoch(1, 9.0, 0.125), epoch(2, 8.0, 0.125)]
    step = {"script": "train", "epoch": 1, "step": 1, "task_loss": 7.0}
    # continued after a kill in its second epoch
    log = [{"script": "select_heads", "epoch": 1}, *older, step, epoch(1, 2.0, 0.25)]
    log += [epoch(2, 1.5, 0.25), epoch(2, 1.0, 0.5)]
    assert report.read_curves(log) == {
        "training loss": [(1, 2.0), (2, 1.0)],
        "validation loss": [(1, 1.0), (2, 0.5)],
        "em": [(1, 25.0), (2, 50.0)],
    }


def test_losses_and_scores_are_drawn_apart_and_runs_beside_each_other():
    """Of a box of 100 x 100 with the first epoch's end in its middle and 0 at its bottom."""
    one = {"training loss": [(1, 3.0), (2, 1.0)], "validation loss": [(1, 2.0)]}
    one |= {"mc1": [(1, 20.0), (2, 65.0)]}
    loss, scores = report.plots([{"name": "a", "curves": one}, {"name": "b", "curves": one}])
    assert (loss["end"], loss["top"], scores["end"], scores["top"]) == (2, 3, 2, 70)
    assert list(loss["curves"]) == [
        f"{n} {kind} loss" for n in "ab" for kind in ("training", "validation")
    ]
    assert list(scores["curves"]) == ["a mc1", "b mc1"]
    assert loss["curves"]["a training loss"] == "50.00,0.00 100.00,66.67"
    assert scores["curves"]["b mc1"] == "50.00,71.43 100.00,7.14"
    assert report.plots([{"name": "", "curves": {}}]) == []


@pytest.fixture
def folds(tiny_folder, small_data, tmp_path):
    """Two trained and evaluated runs, TruthfulQA's folds."""
    flags = ["--model", str(tiny_folder), "--data", str(small_data), "--run", str(tmp_path / "f")]
    flags += ["--task", "truthfulqa"]
    train.main([*flags, "--heads", "all", "--epochs", "1", "--lr", "0.3"])
    eval_script.main(flags)
    return [tmp_path / "f" / name for name in ("truthfulqa-0", "truthfulqa-1")]


def test_several_runs_are_one_page_and_two_folds_are_also_scored_together(folds, capsys):
    report.main([str(fold) for fold in folds])
    assert f"-> {folds[0] / 'report.html'}" in capsys.readouterr().out
    text = (folds[0] / "report.html").read_text()
    assert "offsets of 12 heads, 96 trained values in each of 2 runs" in text
    scores, counts = [], []
    for fold in folds:
        results = json.loads((fold / "results.json").read_text())
        rows = text.split(f"<td>{fold.name}</td><td>mc1</td>")[1]
        assert f"{100 * results['scores']['tuned']['mc1']:.1f} %" in rows.split("</tr>")[0]
        scores, counts = [*scores, results["scores"]["tuned"]["mc1"]], [*counts, results["n"]]
        lines = (fold / "predictions.jsonl").read_text().splitlines()
        assert any(json.loads(line)["prompt"] in text for line in lines)
    whole = sum(s * n for s, n in zip(scores, counts, strict=True)) / sum(counts)
    row = text.split("<td>both folds</td><td>mc1</td>")[1].split("</tr>")[0]
    assert f"{100 * whole:.1f} %" in row and f"both folds: {sum(counts)} items" in text
    # a category has questions in both folds, and is drawn with all of them
    paths = [fold / "predictions.jsonl" for fold in folds]
    lines = [json.loads(line) for path in paths for line in path.open()]
    sources = [path.open(newline="") for path in (REPO / "data/mini/truthfulqa").glob("*test*")]
    categories = {r["Question"]: r["Category"] for file in sources for r in csv.DictReader(file)}
    units = [categories[line["prompt"][3:-3]] for line in lines]
    assert [line["unit"] for line in lines] == units and 1 < len(set(units)) < len(units)
    base, tuned = ([line[who]["mc2"] for line in lines] for who in ("base", "tuned"))
    low, high = paired_bootstrap(base, tuned, units)
    assert (low, high) != paired_bootstrap(base, tuned)
    row = text.split("<td>both folds</td>")[1].split("<td>mc2</td>")[1].split("</tr>")[0]
    assert f"[{100 * low:+.1f}, {100 * high:+.1f}]" in row
    assert text.count("<figure>") == 2  # both folds in each
    assert text.count("<h3>truthfulqa-") == 2 and text.count("<code>") == 2 * (12 + 3) * 10
    alone = report.page([str(folds[1])])[1]
    assert "on truthfulqa-1</h1>" in alone and "truthfulqa-0" not in alone and "<h3>" not in alone


def test_offsets_that_were_not_evaluated(tiny_folder, tmp_path, run):
    bare = tmp_path / "bare"
    make_run(bare, tiny_folder)
    assert "Not evaluated" in report.page([str(bare)])[1]
    (bare / "results.json").write_text((run / "results.json").read_text())
    assert "Not evaluated" in report.page([str(bare)])[1]  # those are of other heads
    with pytest.raises(InputError, match="a model without offsets"):
        report.main([str(tiny_folder)])


def test_a_baseline_has_a_page_without_offsets(run, tiny_folder, small_data, tmp_path):
    flags = ["--model", str(tiny_folder), "--data", str(small_data), "--run", str(tmp_path / "red")]
    train.main([*flags, "--method", "red", "--epochs", "1"])
    eval_script.main(flags)
    text = report.page([str(tmp_path / "red")])[1]
    assert "red: 192 trained values" in text and "Tokens that the offsets" not in text
    assert text.count("<article") == 2
    with pytest.raises(InputError, match="edits of red are no offsets"):
        explain.main([str(tmp_path / "red")])


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_it_without_complaint(run, tmp_path, width):
    """No console message, and nothing wider than the window."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    report.main([str(run)])
    probe = "<script>document.title = document.documentElement.scrollWidth + ' wide'</script>"
    page = tmp_path / "probe.html"
    page.write_text((run / "report.html").read_text().replace("</body>", f"{probe}</body>"))
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
            "--hide-scrollbars", f"--window-size={width},2000", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert int(re.search(r"<title>(\d+) wide", done.stdout)[1]) <= max(width, 500)


@pytest.mark.parametrize(("value", "gold"), [(0.0, "0"), (1234567.0, "1234567"), (0.5, "0.5")])
def test_a_number_is_shown_as_it_is(value, gold):
    """0 was taken for no number, and the whole text shown; millions lost their last digits."""
    line = as_line(Example("Q:", "so it is that", value=value), {})
    assert report.gold_of(line) == gold
