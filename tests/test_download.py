"""The download against a server on this machine that fails as real ones do."""

import hashlib
import http.server
import threading

import pytest
from conftest import SHARED

from data import download
from data.sources import FILES, SOURCES
from lofit.errors import InputError

CONTENT = bytes(range(256)) * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()
NAMES = ("MQuAKE/train.jsonl", "MQuAKE/val.jsonl", "MQuAKE/test.jsonl")


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT below /copy/; the server's fault: an HTTP code, `cut` or `changed`."""

    def do_GET(self):
        self.server.asked.append(self.path)
        fault = self.server.fault
        if fault.isdigit() or not self.path.startswith("/copy/"):
            self.send_error(int(fault or 404))
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        body = b"<html>" + CONTENT[6:] if fault == "changed" else CONTENT
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in NAMES:
        monkeypatch.setitem(FILES, name, (f"copy/{name}", HASH))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.fault, server.asked = "", []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(download, "ORIGIN", f"http://127.0.0.1:{server.server_port}/")
        yield server
        server.shutdown()


def test_the_command(server, tmp_path, capsys):
    argv = ["mquake", "--out", str(tmp_path)]
    download.main(argv)
    printed = capsys.readouterr().out
    assert "MIT" in printed and printed.count("fetched, verified") == 3
    (tmp_path / NAMES[1]).write_bytes(b"spoilt")
    download.main(argv)
    printed = capsys.readouterr().out
    assert printed.count("there already, verified") == 2
    assert printed.count("fetched, verified") == 1
    assert server.asked == [f"/copy/{name}" for name in (*NAMES, NAMES[1])]
    assert (tmp_path / NAMES[1]).read_bytes() == CONTENT


def test_a_mirror(server, tmp_path):
    mirror = download.ORIGIN + "copy/"
    download.ORIGIN = "http://127.0.0.1:9/"  # the fixture puts it back
    download.main(["mquake", "--mirror", mirror, "--out", str(tmp_path)])
    assert server.asked == [f"/copy/{name}" for name in NAMES]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", r"copy/MQuAKE/train.jsonl: cannot be fetched \(HTTP 404\)"),
        ("503", r"cannot be fetched \(HTTP 503\); try again later"),
        ("cut", r"cannot be fetched \(IncompleteRead"),
        ("changed", f"copy/MQuAKE/train.jsonl: expected hash {HASH[:12]}"),
    ],
)
def test_a_fault_is_one_line_and_leaves_nothing(server, tmp_path, fault, message):
    server.fault = fault
    with pytest.raises(InputError, match=message) as caught:
        download.main(["mquake", "--out", str(tmp_path)])
    assert "\n" not in str(caught.value) and len(server.asked) == 1
    assert not list(tmp_path.rglob("*.*"))


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ORIGIN", "http://127.0.0.1:9/")
    with pytest.raises(InputError, match=r"cannot be fetched \(.*refused.*; try .* by --source"):
        download.main(["mquake", "--out", str(tmp_path)])


def test_a_folder_is_no_mirror(tmp_path):
    with pytest.raises(InputError, match="cannot be fetched .*; .* by --source"):
        download.main(["mquake", "--mirror", "shared/datasets", "--out", str(tmp_path)])


def test_a_source(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "MQuAKE").mkdir(parents=True)
    for name in NAMES:
        monkeypatch.setitem(FILES, name, ("nowhere", HASH))
        (source / name).write_bytes(CONTENT)
    argv = ["mquake", "--source", str(source), "--out", str(out)]
    download.main(argv)
    assert capsys.readouterr().out.count("copied, verified") == 3
    assert (out / NAMES[0]).read_bytes() == CONTENT
    (source / NAMES[0]).write_bytes(b"other")
    download.main(argv)  # what is there and right is enough
    (out / NAMES[0]).unlink()
    with pytest.raises(InputError, match=f"train.jsonl: expected hash {HASH[:12]}..., this is an"):
        download.main(argv)
    (source / NAMES[0]).unlink()
    with pytest.raises(InputError, match="source/MQuAKE/train.jsonl: no such file; --source has"):
        download.main(argv)


def test_an_output_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "MQuAKE").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="train.jsonl: cannot be written"):
        download.main(["mquake", "--out", str(tmp_path)])


def test_all_and_unknown_names(capsys):
    assert download.parse_args(["all"]).tasks == list(SOURCES)
    assert download.parse_args([]).tasks == ["mquake", "clutrr", "truthfulqa"]
    with pytest.raises(SystemExit):
        download.parse_args(["mquake", "squad"])
    assert "squad: expected mquake, clutrr," in capsys.readouterr().err
    with pytest.raises(SystemExit):
        download.parse_args(["boolq", "mquake", "--test", "5"])
    assert "--test: the files of mquake stay as they are" in capsys.readouterr().err


def test_gits_hash_of_a_blob():
    assert (
        download.hash_of_bytes(b"hello\n", "0" * 40) == "ce013625030ba8dba906f756967f9e9ca394464a"
    )
    assert download.hash_of_bytes(CONTENT, "0" * 64) == HASH


def test_every_file_has_a_hash_and_a_fixed_commit_and_no_path_leaves_its_folder():
    used = {name for source in SOURCES.values() for name in source.files.values()}
    assert used == set(FILES)
    for name, (place, sha) in FILES.items():
        _, _, commit, *path = place.split("/")
        assert len(sha) in (40, 64) and len(commit) == 40 and int(sha, 16) and int(commit, 16)
        assert ".." not in [*path, *name.split("/")] and not name.startswith("/")


def test_the_hashes_are_those_of_the_real_files():
    if not SHARED.is_dir():
        pytest.skip("the real files are not on this machine")
    checked = [name for name in FILES if (SHARED / "datasets" / name).is_file()]
    assert len(checked) == 23
    for name in checked:
        sha = FILES[name][1]
        assert download.hash_of_bytes((SHARED / "datasets" / name).read_bytes(), sha) == sha
