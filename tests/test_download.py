"""The download against a server on this machine that fails in every way a real one does."""

import hashlib
import http.server
import threading

import pytest
from conftest import SHARED

from data import download
from lofit.errors import InputError

CONTENT = bytes(range(256)) * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; `faults` are used up one a request: cut, 503, 404, changed, no ranges."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[str] = []
        self.asked: list[tuple[str, str | None]] = []  # path and Range of each request
        self.content = {"/file": CONTENT}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted))
        fault = server.faults.pop(0) if server.faults else ""
        if fault.isdigit() or self.path not in server.content:
            self.send_error(int(fault or 404))
            return
        body, start = server.content[self.path], 0
        if fault == "changed":
            body = b"<html>" + body[6:]
        if wanted and fault != "no ranges":
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        body = body[start:]
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


def fetch(server, tmp_path):
    path = tmp_path / "new" / "file"
    download.download(f"{server.url}/file", path, HASH)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    return [wanted for _, wanted in server.asked]


def test_a_file_in_one_piece(server, tmp_path):
    assert fetch(server, tmp_path) == [None]


def test_a_cut_connection_goes_on_where_it_stopped(server, tmp_path):
    server.faults = ["cut", "cut"]
    assert fetch(server, tmp_path) == [None, "bytes=128000-", "bytes=192000-"]


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.faults = ["cut", "no ranges"]
    assert fetch(server, tmp_path) == [None, "bytes=128000-"]


def test_a_passing_fault_is_tried_again(server, tmp_path):
    server.faults = ["503", "429"]
    assert fetch(server, tmp_path) == [None] * 3


def test_an_earlier_calls_partial_file_is_used(server, tmp_path):
    server.faults = ["cut"] * download.TRIES
    with pytest.raises(InputError, match=r"/file: cut off after 240,000 bytes; try again later"):
        fetch(server, tmp_path)
    assert not (tmp_path / "new" / "file").exists()
    assert fetch(server, tmp_path)[-1] == "bytes=240000-"


@pytest.mark.parametrize("rest", [b"", b"and more"])
def test_a_spoilt_partial_file_is_thrown_away(server, tmp_path, rest):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".file.partial").write_bytes(b"x" + CONTENT[1:] + rest)
    assert fetch(server, tmp_path)[-1] is None


def refused(server, tmp_path, message):
    with pytest.raises(InputError, match=message) as caught:
        fetch(server, tmp_path)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_of_another_hash_is_not_kept(server, tmp_path):
    server.faults = ["changed"] * 10
    refused(server, tmp_path, f"SHA-256 is not {HASH[:12]}")
    assert len(server.asked) == 1


def test_a_missing_file_is_not_tried_again(server, tmp_path):
    server.faults = ["404"]
    refused(server, tmp_path, "/file: HTTP 404; is the --mirror right")
    assert len(server.asked) == 1


def test_no_server_at_all(server, tmp_path):
    server.url = "http://127.0.0.1:9"
    refused(server, tmp_path, "refused.*try again later, or another --mirror")


def test_the_command(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "SHA256", {"mquake": {"MQuAKE/a": HASH, "MQuAKE/b": HASH}})
    server.content = {"/copy/MQuAKE/a": CONTENT, "/copy/MQuAKE/b": CONTENT}
    argv = ["all", "--mirror", f"{server.url}/copy/", "--out", str(tmp_path)]
    download.main(argv)
    printed = capsys.readouterr().out
    assert "MIT" in printed and printed.count("fetched, verified") == 2
    (tmp_path / "MQuAKE" / "b").write_bytes(b"spoilt")
    download.main(argv)
    printed = capsys.readouterr().out
    assert printed.count("there already, verified") == printed.count("fetched, verified") == 1
    assert (tmp_path / "MQuAKE" / "b").read_bytes() == CONTENT


def test_the_sums_are_those_of_the_real_splits():
    if not SHARED.is_dir():
        pytest.skip("the real splits are not on this machine")
    files = {name: sha for files in download.SHA256.values() for name, sha in files.items()}
    assert len(files) == 12
    for name, sha256 in files.items():
        assert download.digest(SHARED / "datasets" / name) == sha256
