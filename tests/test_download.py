"""The download against a server on this machine that fails as real ones do."""

import hashlib
import http.server
import threading

import pooch
import pytest
from conftest import SHARED

from data import download
from data.sources import PLACES, SOURCES, SUMS, place_of
from lofit.errors import InputError

CONTENT = bytes(range(256)) * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()
NAMES = ("MQuAKE/train.jsonl", "MQuAKE/val.jsonl", "MQuAKE/test.jsonl")


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT below /copy/; the server's faults, of which the last one stays: an HTTP code,
    `cut` or `changed`."""

    def do_GET(self):
        self.server.asked.append(self.path)
        faults = self.server.faults
        fault = faults.pop(0) if faults[1:] else faults[0]
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
        monkeypatch.setitem(SUMS, name, HASH)
    monkeypatch.setitem(PLACES, "MQuAKE/", "copy/MQuAKE/")
    monkeypatch.setattr(pooch.core.time, "sleep", lambda seconds: None)  # before it tries again
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.faults, server.asked = [""], []
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


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_it_tries_again_at_a_mirror_too(server, tmp_path, fault):
    server.faults = [fault, ""]
    mirror = download.ORIGIN + "copy/"
    download.ORIGIN = "http://127.0.0.1:9/"  # the fixture puts it back
    download.main(["mquake", "--mirror", mirror, "--out", str(tmp_path)])
    assert [server.asked.count(f"/copy/{name}") for name in NAMES] == [2, 1, 1]
    assert all((tmp_path / name).read_bytes() == CONTENT for name in NAMES)


@pytest.mark.parametrize(
    ("fault", "tries", "message"),
    [
        ("404", 4, r"copy/MQuAKE/train.jsonl: cannot be fetched \(HTTP 404\); try again later"),
        ("503", 4, r"cannot be fetched \(HTTP 503\)"),
        ("cut", 4, "cannot be fetched .*IncompleteRead"),
        ("changed", 1, f"copy/MQuAKE/train.jsonl: expected hash {HASH[:12]}"),
    ],
)
def test_a_fault_is_named_and_leaves_nothing(server, tmp_path, fault, tries, message):
    server.faults = [fault]
    with pytest.raises(InputError, match=message):
        download.main(["mquake", "--out", str(tmp_path)])
    assert len(server.asked) == tries
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("mirror", ["http://127.0.0.1:9/", "shared/datasets"])
def test_no_network_and_no_mirror(server, tmp_path, mirror):
    with pytest.raises(InputError, match="cannot be fetched .*by --source"):
        download.main(["mquake", "--mirror", mirror, "--out", str(tmp_path)])
    (tmp_path / "MQuAKE").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="train.jsonl: cannot be written"):
        download.main(["mquake", "--out", str(tmp_path)])


def test_a_source(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "MQuAKE").mkdir(parents=True)
    for name in NAMES:
        monkeypatch.setitem(SUMS, name, HASH)
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


def test_all_and_unknown_names(capsys):
    assert download.parse_args(["all"]).tasks == list(SOURCES)
    assert download.parse_args([]).tasks == ["mquake", "clutrr", "truthfulqa"]
    with pytest.raises(SystemExit):
        download.parse_args(["mquake", "squad"])
    assert "squad: expected mquake, clutrr," in capsys.readouterr().err
    with pytest.raises(SystemExit):
        download.parse_args(["boolq", "mquake", "--test", "5"])
    assert "--test: the files of mquake stay as they are" in capsys.readouterr().err


def test_the_hash_of_a_file_is_its_sha256_or_gits_of_a_blob():
    assert download.is_file_of(b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a")
    assert download.is_file_of(CONTENT, HASH)
    assert not download.is_file_of(b"hello", "ce013625030ba8dba906f756967f9e9ca394464a")
    assert not download.is_file_of(CONTENT[1:], HASH)


def test_every_file_has_a_hash_and_a_fixed_commit_and_no_path_leaves_its_folder():
    used = {name for source in SOURCES.values() for name in source.files.values()}
    assert used == set(SUMS) and len({place_of(name) for name in SUMS}) == len(SUMS)
    for name, sha in SUMS.items():
        _, _, commit, *path = place_of(name).split("/")
        assert len(sha) in (40, 64) and len(commit) == 40 and int(sha, 16) and int(commit, 16)
        assert ".." not in [*path, *name.split("/")] and not name.startswith("/")


def test_the_hashes_are_those_of_the_real_files():
    if not SHARED.is_dir():
        pytest.skip("the real files are not on this machine")
    paths = {name: SHARED / "datasets" / name for name in SUMS}
    checked = [name for name, path in paths.items() if path.is_file()]
    assert len(checked) == 23
    assert all(download.is_file_of(paths[name].read_bytes(), SUMS[name]) for name in checked)
