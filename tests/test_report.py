"""The page of a run: what is on it, all text escaped, and what it does without its parts."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import make_run

import eval as eval_script
import train
from lofit.errors import InputError
from lofit.inspect import report

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
    train.main([*flags, "--heads", "all", "--epochs", "2", "--lr", "0.3"])
    eval_script.main(flags)
    return folder


def test_the_page_has_results_curves_answers_and_what_offsets_say(run, capsys):
    pytest.importorskip("matplotlib", reason='needs pip install -e ".[plot]"')
    report.main([str(run)])
    text = (run / "report.html").read_text()
    assert f"-> {run / 'report.html'}" in capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert f"{100 * results['tuned']['em']:.1f} %" in text and "12 offsets, 96 trained" in text
    assert text.count("data:image/svg+xml;base64,") == 2  # loss, validation; no selection here
    assert text.count("<article") >= 3 and text.count("<code>") == 12 * 10
    # one file, no network, no script
    assert not re.search(r"<script|<link|@import|src=\"(?!data:)|url\(", text)


def test_an_answer_with_a_script_stays_text(run):
    line = json.loads((run / "predictions.jsonl").open().readline())
    line["base"]["prediction"], line["tuned"]["prediction"] = WICKED, f"{WICKED} more"
    (run / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    text = report.page(run)
    assert "<script" not in text and text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3
    assert "<ins> more</ins>" in text


def test_only_the_words_that_differ_are_marked():
    both = report.marked("the old <b> answer", "the new <b> answer")
    assert both["was"] == "the <del>old</del> &lt;b&gt; answer"
    assert both["now"] == "the <ins>new</ins> &lt;b&gt; answer"


def test_given_answers_are_read_as_the_most_probable_one():
    line = {"right": [" yes."], "wrong": [" no.", " maybe."]}
    line["base"] = {"log_probs": {"right": [-3.0], "wrong": [-4.0, -1.0]}}
    assert report.said(line, "base") == "maybe."


def test_the_curves_are_those_of_the_last_training():
    def step(script, n, loss, epoch=1):
        return {"script": script, "epoch": epoch, "step": n, "task_loss": loss}

    validated = {"script": "train", "epoch": 1, "val_loss": 0.5, "val": {"em": 0.25}}
    log = [step("select_heads", 1, 9.0), step("train", 1, 8.0), step("train", 1, 2.0)]
    found = report.curves([*log, step("train", 2, 1.0), validated])
    assert found["training loss"] == [(0.5, 2.0), (1.0, 1.0)]
    assert found["validation loss"] == [(1, 0.5)] and found["validation em"] == [(1, 0.25)]


def test_without_matplotlib_a_line_says_so(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = report.page(run)
    assert "matplotlib is not installed" in text and "data:image" not in text


def test_offsets_that_were_not_evaluated(tiny_folder, tmp_path, run):
    make_run(tmp_path / "bare", tiny_folder)
    assert "Not evaluated" in report.page(tmp_path / "bare")
    (tmp_path / "bare" / "results.json").write_text((run / "results.json").read_text())
    assert "Not evaluated" in report.page(tmp_path / "bare")  # those are of other heads
    with pytest.raises(InputError, match="no offsets.safetensors in it"):
        report.main([str(tiny_folder)])


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
