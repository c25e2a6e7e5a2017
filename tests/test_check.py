"""--check: an export that answers as its base model is not written."""

import json
import sys

import pytest
from conftest import MINI, REPO, make_run, run_export, slow_but

from lofit.errors import InputError
from lofit.export import check, formats
from lofit.tasks import mquake

pytest.importorskip("transformers", reason='needs pip install -e ".[test]"')


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Offsets of the miniature that change what it says, and the prompts that eval.py leaves."""
    monkeypatch.setattr(check, "N", 6)
    make_run(tmp_path / "run", MINI, scale=4.0, n=13)
    examples = mquake.read(REPO / "data" / "mini" / "MQuAKE" / "test.jsonl", "test", 42)[:8]
    lines = [json.dumps({"prompt": example.prompt}) for example in examples]
    (tmp_path / "run" / "predictions.jsonl").write_text("\n".join(lines))
    return tmp_path / "run"


@pytest.mark.parametrize("form", slow_but(["hf"], ["hf", "peft"]))
def test_it_says_whose_answers_they_are(run, form, tmp_path, capsys):
    if form == "peft":
        pytest.importorskip("peft", reason='needs pip install -e ".[test]"')
    if form == "hf":  # eval.py --offsets leaves its prompts beside the runs
        (tmp_path / "mquake-offsets").mkdir()
        (run / "predictions.jsonl").rename(tmp_path / "mquake-offsets" / "predictions.jsonl")
    out = run_export(run, form, tmp_path / "out", "--check")
    found = "on this export: 6 of 6 answers equal the tuned model's, 0 the base model's"
    assert found in capsys.readouterr().out
    assert found in (out / "README.md").read_text()


def test_an_export_without_its_offsets_is_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "fold", lambda model: model)  # nothing is folded in
    with pytest.raises(InputError, match="0 of 6 .* the tuned model's, 6 the base .* at least 90%"):
        run_export(run, "hf", tmp_path / "out", "--check")
    assert not (tmp_path / "out").exists()


def test_offsets_that_change_nothing_are_named(run, tmp_path, capsys):
    make_run(run, MINI, scale=1e-6, n=1)
    run_export(run, "hf", tmp_path / "out", "--check")
    assert (
        "6 the base model's (both answer alike: the check shows nothing" in capsys.readouterr().out
    )


def test_what_it_needs_is_seen_before_any_work(run, tmp_path):
    with pytest.raises(InputError, match="reads --format hf and peft alone"):
        run_export(run, "gguf", tmp_path / "out", "--check")
    (run / "predictions.jsonl").unlink()
    with pytest.raises(InputError, match="no such file; run eval.py first"):
        run_export(run, "hf", tmp_path / "out", "--check")


def test_without_transformers_it_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="--check: transformers is not installed; pip install"):
        run_export(run, "hf", tmp_path / "out", "--check")
