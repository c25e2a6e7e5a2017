"""The one script for a GPU: its clock, its limits, and a rehearsal of all of it on the CPU."""

import json
import sys
import time
from types import SimpleNamespace

import gpu
import gpu_scripts
import pytest
import timed_script
from conftest import MINI, REPO
from shapes import COMMON, SHAPES

from lofit import load_tokenizer
from lofit.inspect import memory
from lofit.llm.config import ModelConfig
from lofit.tasks import mquake


def test_each_second_counts_in_the_innermost_part(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(timed_script, "time", SimpleNamespace(time=lambda: now[0]))

    def wait(seconds, inner=None):
        now[0] += seconds
        return inner and inner() or "done"

    def epochs(n):
        for i in range(n):
            owner.wait(1)
            wait(8)
            yield i + 1

    owner, clock = SimpleNamespace(wait=wait, epochs=epochs), timed_script.Clock(97.0)
    clock.around(owner, "wait", "capture")
    clock.around_steps(owner, "epochs", "loop")
    with clock.part("rest"):
        for _ in owner.epochs(2):
            wait(0.5)
        with pytest.raises(TypeError):
            owner.wait(None)
        owner.wait(2, lambda: owner.wait(4))
    found = {name: s for name, s in clock.seconds.items() if s}
    assert found == {"start": 3, "loop": 16, "capture": 8, "rest": 1}


ENDLESS = "import os, time; os.fork(); print('begun', flush=True); time.sleep(600)"


def test_a_late_part_and_a_failing_one_stop_no_other(tmp_path, monkeypatch, capsys):
    commands = {
        "late": (1, ["-c", ENDLESS]),
        "same": (1, ["-c", "0"]),
        "failing": (30, ["-c", "import sys; print('why'); sys.exit(3)"]),
        "good": (30, ["-c", "print('found', 7)"]),
    }
    monkeypatch.setattr(gpu, "parts", lambda *_: commands)
    began = time.time()
    args = ["all", "--device", "cpu", "--shape", "tiny", "--out", str(tmp_path), "--patience", "3"]
    assert gpu.main(args) == 2 and time.time() - began < 60
    text = {path.stem: path.read_text() for path in tmp_path.iterdir()}
    assert text["late"].count("begun") == 2 and text["good"] == "found 7\n"
    assert text["same"] == "skipped: needs a GPU\n" and text["failing"] == "why\n"
    ends = [line.split(" s  ")[-1] for line in text["summary"].splitlines()[1:]]
    skipped = "skipped: needs a GPU"
    assert ends == ["late", skipped, "exit code 3", "exit code 0", "2 failed"]
    assert text["summary"] in capsys.readouterr().out


def test_without_a_gpu_it_says_what_to_do():
    with pytest.raises(SystemExit, match="--device cuda: there is no GPU; --device cpu"):
        gpu.main(["all"])


def test_every_part_is_a_command_that_parses(monkeypatch):
    """Also those that only a GPU runs."""
    benchmark = pytest.importorskip("benchmark", reason='needs pip install -e ".[test]"')
    for device in ("cuda", "cpu"):
        args = gpu.parse_args(["all", "--device", device])
        parts = gpu.parts(args, "folder")
        order = ("graphs", "same", "steps", "decoding", "benchmark", "whole", "shard", "compiled")
        assert [*parts] == [*order]
        assert sum(limit for limit, _ in parts.values()) <= 760
        for name, (_, command) in parts.items():
            if command[0].endswith("gpu.py"):
                assert gpu.parse_args(command[1:]).what == name.replace("compiled", "steps")
                assert gpu.parse_args(command[1:]).device == device
        monkeypatch.setattr(sys, "argv", parts["benchmark"][1])
        found = benchmark.parse_args()
        assert found.device == device and found.dtype == args.dtype
        assert found.dtype == ("bfloat16" if device == "cuda" else "float32")


def test_the_data_of_a_whole_run_are_as_many_and_as_long_as_the_papers(tmp_path):
    gpu_scripts.write_mquake(tmp_path, 1.0)
    tokenizer, lengths = load_tokenizer(MINI), []
    for split, n in {"train": 134, "val": 95, "test": 864}.items():
        examples = mquake.read(tmp_path, split)
        assert len(examples) == n
        lengths += [len(tokenizer.encode_pair(e.prompt, e.answer)[0]) for e in examples]
    # SmolLM2's tokens of the paper's: 24 to 63, on average 38
    assert 37 < sum(lengths) / len(lengths) < 40
    assert 20 < min(lengths) < 30 and 50 < max(lengths) < 70


def test_a_script_that_takes_too_long_says_where_it_is(tmp_path):
    flags = ["--model", str(MINI), "--run", str(tmp_path), "--heads", "random", "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        gpu_scripts.call(0, "train", flags, limit=1)
    assert "ended with 1" in str(end.value) and "most recent call first" in str(end.value)


@pytest.mark.slow
def test_the_page_has_the_memory_that_is_computed():
    """Of the shapes of the measurements."""
    found = {}
    for shape in ("7b", "8b", "13b"):
        config = ModelConfig(**SHAPES[shape], **COMMON)
        parts = memory.memory_plan(config, memory.parse_args([]))
        for name in ("weights", "training step", "all in training", "all in evaluation"):
            found.setdefault(name, []).append(f"{parts[name][0] / memory.GB:.1f}")
    rows = [line.split(" | ") for line in (REPO / "docs" / "gpu.md").read_text().splitlines()]
    page = {row[0].removeprefix("| "): [cell.strip(" |") for cell in row[1:]] for row in rows}
    page["training step"] = page.pop("a training step beside them")
    assert found == {name: page[name] for name in found}


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu(tmp_path):
    """As it will on a GPU, but for what needs one, and with few of everything. `graphs` are tests
    that run here anyway."""
    args = ["all", "--device", "cpu", "--shape", "tiny", "--out", str(tmp_path), "--patience", "5"]
    names = ["same", "steps", "decoding", "benchmark", "whole", "shard", "compiled"]
    assert gpu.main([*args, "--only", *names]) == 0
    text = {path.stem: path.read_text() for path in tmp_path.glob("*.txt")}
    assert text["same"] == text["compiled"] == "skipped: needs a GPU\n"
    assert text["steps"].count("padded beside eager") == 3
    assert text["decoding"].count("33 of 33 tokens") == 2
    assert "checked: losses within 0.0001" in text["benchmark"]
    assert "what a user waits for" in text["whole"]
    assert "torchrun, --shard, beside one process: same heads" in text["shard"]
    assert "random weights" not in text["shard"]  # whole's are still there
    assert text["summary"].count("exit code 0") == 5
    results = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert {r["side"] for r in results} == {"ours", "hf", "lora"}
