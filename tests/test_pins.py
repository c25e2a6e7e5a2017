"""What the miniatures gave before the main path was written anew (commit 3c8cf2d), kept as numbers:
heads, offsets and answers of each task after a few epochs on `small_data`. A CPU that rounds
otherwise may differ in the last digits, so they are compared with a tolerance."""

import json

import pytest
import torch
from conftest import GOLDEN, MINI, difference, slow_but
from safetensors.torch import load_file

import eval as eval_script
import select_heads
import train

PINS = json.loads((GOLDEN / "pins.json").read_text())
CLOSE = 1e-3  # of the largest value
EPOCHS = {"mquake": "3", "layer 4": "3"}  # of training; the others 2, as of every selection


@pytest.mark.parametrize("name", slow_but(["mquake"], PINS))
def test_heads_offsets_and_answers_are_those_that_were_recorded(name, small_data, tmp_path):
    pin, run, own = PINS[name], tmp_path / "run", tmp_path / "own.json"
    flags = ["--model", str(MINI), "--data", str(small_data), "--dtype", "float32"]
    flags += ["--run", str(run), "--task", "mquake" if name == "layer 4" else name]
    if "scores" in pin:  # "layer 4" has heads of our choice: its lowest layers run once
        select_heads.main([*flags, "--epochs", "2"])
        found = json.loads((run / "heads.json").read_text())
        scores = [found["scores"][layer][head] for layer, head in pin["heads"]]
        assert scores == pytest.approx(pin["scores"], abs=CLOSE * pin["scores"][0])
        for ours, theirs in zip(found["heads"], pin["heads"], strict=True):
            if ours != theirs:  # two heads that are nearly as good
                layer, head = ours
                rank = pin["heads"].index(theirs)
                at = pin["scores"][rank]
                assert found["scores"][layer][head] == pytest.approx(at, rel=CLOSE)

    # the recorded heads, so that a near tie above does not matter here
    own.write_text(json.dumps(pin["heads"]))
    train.main([*flags, "--epochs", EPOCHS.get(name, "2"), "--heads", str(own)])
    saved = load_file(run / "offsets.safetensors")
    rows = dict(zip(map(tuple, saved["heads"].tolist()), saved["offsets"], strict=True))
    ours = torch.stack([rows[tuple(head)][:3] for head in pin["heads"]])
    theirs = torch.tensor(pin["offsets"])
    assert difference(ours, theirs) <= CLOSE * theirs.abs().max()

    eval_script.main(flags)
    lines = [json.loads(line) for line in (run / "predictions.jsonl").open()]
    for who in ("base", "tuned"):
        for line, recorded in zip(lines, pin[who], strict=True):
            if isinstance(recorded, str):
                assert line[who]["prediction"] == recorded
            else:
                given = line[who]["log_probs"]
                assert [*given["right"], *given["wrong"]] == pytest.approx(recorded, rel=CLOSE)
