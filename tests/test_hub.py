"""Models by hub id: from the cache, and what the hub's refusals say to do."""

import fnmatch
import http.server
import os
import shutil
import subprocess
import sys
import threading

import huggingface_hub
import pytest
from conftest import REPO

from lofit.llm.checkpoint import find_folder, load_model


def test_a_model_in_the_hubs_cache_loads_offline_and_records_its_commit(
    tiny, tiny_folder, tmp_path, monkeypatch
):
    commit, cache = "0123456789" * 4, tmp_path / "cache"
    repo = cache / "models--owner--tiny"
    shutil.copytree(tiny_folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    model = load_model("owner/tiny")
    assert (model.source.name, model.source.revision) == ("owner/tiny", commit)
    assert model.source.fingerprint == tiny.source.fingerprint
    assert load_model("owner/tiny", revision=commit).source.revision == commit
    assert load_model(tiny_folder, revision="mine").source.revision == "mine"


@pytest.mark.parametrize(
    "name",
    ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja",
     "README.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md"],
)  # fmt: skip
def test_what_is_read_and_copied_is_fetched(monkeypatch, tmp_path, name):
    def snapshot(repo, revision, allow_patterns):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
        return tmp_path

    monkeypatch.setattr("lofit.llm.checkpoint.snapshot_download", snapshot)
    assert find_folder("owner/name") == tmp_path


REFUSALS = {
    "owner/gated": (403, "GatedRepo"),
    "owner/missing": (401, "RepoNotFound"),
    "owner/revision": (404, "RevisionNotFound"),
}


@pytest.fixture
def hub():
    """A hub on this machine that refuses in three ways; yields (address, what it was asked)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            status, code = next(
                (v for name, v in REFUSALS.items() if f"/{name}/" in self.path), (500, "")
            )
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


@pytest.mark.parametrize(
    ("name", "offline", "message"),
    [
        ("owner/gated", "0", "gated; accept its licence on huggingface.co, then set HF_TOKEN"),
        ("owner/missing", "0", "no such repository on the hub; check the name, or set HF_TOKEN"),
        ("owner/revision", "0", "no such revision; check --revision"),
        ("owner/gated", "1", "outgoing traffic has been disabled"),
    ],
)
def test_the_hubs_refusals_say_what_to_do(hub, tmp_path, name, offline, message):
    address, asked = hub
    env = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_mine", "HF_HUB_OFFLINE": offline}
    env |= {"HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "eval.py", "--model", name, "--run", str(tmp_path / "run")],
        env=os.environ | env, cwd=REPO, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {name}: ") and message in done.stderr
    wanted = (f"/api/models/{name}/revision/main", "Bearer hf_mine")
    assert (wanted in asked) == (offline == "0")
    assert not (tmp_path / "run").exists()
