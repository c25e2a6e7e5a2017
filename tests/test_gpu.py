"""The measuring scripts, by their smallest cases on the CPU."""

import http.server
import json
import threading
import time

import gpu
import pytest
import serving
from conftest import HAS_GPU, REPO
from shapes import SHAPES, config_of

from lofit.errors import InputError
from lofit.files import write_json
from lofit.inspect import memory
from lofit.llm.save import hf_config


@pytest.mark.slow
def test_a_late_part_and_a_failing_one_stop_no_other(tmp_path, monkeypatch, capsys):
    endless = "import os, time; os.fork(); print('begun', flush=True); time.sleep(600)"
    commands = {
        "late": (1, ["-c", endless]),
        "same": (1, ["-c", "0"]),
        "failing": (30, ["-c", "import sys; print('why'); sys.exit(3)"]),
        "good": (30, ["-c", "print('found', 7)"]),
    }
    monkeypatch.setattr(gpu, "parts", lambda _: commands)
    began, args = time.time(), ["all", "--device", "cpu", "--out", str(tmp_path)]
    assert gpu.main([*args, "--patience", "3"]) == 2 and time.time() - began < 60
    text = {path.stem: path.read_text() for path in tmp_path.iterdir()}
    assert text["late"].count("begun") == 2 and text["good"] == "found 7\n"
    assert text["same"] == "skipped: needs a GPU\n" and text["failing"] == "why\n"
    ends = [line.split(" s  ")[-1] for line in text["summary"].splitlines()]
    assert ends == ["exit code late", "exit code 3", "exit code 0", "2 failed"]


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do():
    with pytest.raises(SystemExit, match="--device cuda: there is no GPU; --device cpu"):
        gpu.main(["all"])


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu(tmp_path):
    """As it will on a GPU, but with few of everything. `graphs` are tests that run here anyway."""
    pytest.importorskip("peft", reason='needs pip install -e ".[test]"')
    args = ["all", "--device", "cpu", "--shape", "tiny", "--out", str(tmp_path), "--patience", "4"]
    names = ["same", "benchmark", "whole", "shard"]
    assert gpu.main([*args, "--only", *names]) == 0
    text = {path.stem: path.read_text() for path in tmp_path.glob("*.txt")}
    assert "checked: losses and scores within 0.0001" in text["benchmark"]
    assert "test items" in text["whole"]
    assert "--shard:" in text["shard"] and text["shard"].count("same heads") == 3
    results = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert {r["side"] for r in results} == {"ours", "hf", "lora"}


def test_a_server_is_asked_what_eval_py_asked(tmp_path, capsys):
    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(told)
            body = json.dumps({"choices": [{"text": f"answer to {told['prompt'][-4]}\nmore"}]})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    asked, lines = [], []
    for i in range(3):
        told = {"prediction": "answer to 0" if i == 0 else f"answer to {i % 2}"}
        lines.append({"prompt": f"Q: {i} A:", "answer": "x", "tuned": told})
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
    (tmp_path / "results.json").write_text('{"task": "mquake"}')
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        serving.main([str(tmp_path), f"http://127.0.0.1:{server.server_port}"])
        server.shutdown()
    assert "2 of 3 answers as eval.py's of the tuned model" in capsys.readouterr().out
    assert all(told["temperature"] == 0 and told["max_tokens"] == 16 for told in asked)
    with pytest.raises(InputError, match="does the server run there"):
        serving.main([str(tmp_path), "http://127.0.0.1:9"])


@pytest.mark.slow
def test_the_page_has_the_memory_that_its_command_prints(tmp_path, capsys):
    found = {}
    for shape in ("7b", "8b", "13b"):
        write_json(tmp_path / "config.json", hf_config(config_of(SHAPES[shape])))
        memory.main(["--model", str(tmp_path), "--length", "128"])
        _, _, table = capsys.readouterr().out.partition("computed\n")
        for line in table.splitlines()[:-1]:
            found.setdefault(line[:28].strip(), []).append(f"{float(line[28:]):.1f}")
    rows = [line.split(" | ") for line in (REPO / "docs" / "gpu.md").read_text().splitlines()]
    page = {row[0].removeprefix("| "): [cell.strip(" |") for cell in row[1:]] for row in rows}
    assert len(found) == 6 and found == {name: page[name] for name in found}
