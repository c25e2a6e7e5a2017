"""The README's first example prints what the README shows, and docs/api.md goes on from there."""

import re

import pytest
from conftest import REPO

import eval as evaluate
import select_heads
import train


def chosen(lines: list[str]) -> set[tuple[str, int]]:
    """Where a map of heads has its marks: (layer, column)."""
    rows = [line for line in lines if line.startswith("layer")]
    return {(row[:9], i) for row in rows for i, mark in enumerate(row) if mark == "#"}


@pytest.mark.slow
def test_the_first_example_prints_its_block(tmp_path, monkeypatch, capsys):
    """Line by line; another CPU rounds otherwise, so one head and a point of a score may differ."""
    text = (REPO / "README.md").read_text()
    blocks = [block.splitlines() for block in re.findall(r"```\n(.*?)```", text, re.S)]
    shown = next(block for block in blocks if block[0].startswith("layer"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    same = ["--dtype", "float32"]
    select_heads.main(same)
    train.main(same)
    train.main([*same, "--heads", "random"])
    runs = [f"runs/mini-llama/{name}" for name in ("mquake", "mquake-random")]
    evaluate.main([*same, "--offsets", *runs])
    printed = capsys.readouterr().out.splitlines()
    assert len(chosen(shown)) == 13
    assert len(chosen(shown) & chosen(printed)) >= 12
    for line in (line.rstrip() for line in shown if line.strip()):
        if line.startswith("layer"):
            continue
        if line.startswith("em_stripped"):
            (ours,) = [each for each in printed if each.startswith("em_stripped")]
            numbers = [list(map(float, re.findall(r"[+-]?\d+\.\d", each))) for each in (line, ours)]
            assert numbers[1] == pytest.approx(numbers[0], abs=1.5)
        else:
            assert line in printed
    (example,) = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "api.md").read_text(), re.S)
    exec(example, names := {})  # the page of the API, on this run
    assert not names["torch"].equal(names["tuned"], names["logits"])
