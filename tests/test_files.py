"""Files are whole or absent, and errors name file and line."""

import math
import os

import pytest
import torch
from safetensors.torch import save_file

from lofit import files
from lofit.errors import InputError
from lofit.files import (
    open_tensors,
    read_csv,
    read_json,
    read_json_list,
    read_jsonl,
    read_tensors,
    write,
    write_json,
    write_tensors,
)

DEEP = "[" * 200_000 + "]" * 200_000


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.txt"
    write(path, "old")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_where_nothing_can_be_written(tmp_path):
    """A file stands where a folder is needed: refused for root too, unlike missing permission."""
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(InputError, match="runs/heads.json: cannot be written"):
        write_json(tmp_path / "runs" / "heads.json", {})


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WRITES", False)
    write_json(tmp_path / "a.json", {})
    files.append(tmp_path / "log.jsonl", {})
    assert not [*tmp_path.iterdir()]


def test_json_has_a_key_a_line_and_half_a_surrogate_pair_as_its_escape(tmp_path):
    value = {"heads": [[0, 1], [2, 3]], "inner": {"é": 1}, "empty": {}, "half": "\ud800"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    lines = (tmp_path / "a.json").read_text(encoding="utf-8").splitlines()
    assert lines[1] == '  "heads": [[0, 1], [2, 3]],' and len(lines) == 6


def test_lines_are_counted_as_an_editor_does(tmp_path):
    """Also where a text holds a character at which splitlines() would split."""
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n{"a": "\u2028"}\n', encoding="utf-8")
    found = [(f"{path}, line 1", {"a": 1}), (f"{path}, line 3", {"a": "\u2028"})]
    assert list(read_jsonl(path)) == found


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64
BAD = [  # reader, content, what the error says
    (read_json, b"{\n1", "a: not valid JSON .*line 2"),
    (read_json, b"[1]", "expected an object, found '.1.'"),
    (read_json, b"\xff\xfe", "not readable"), (read_json, POINTER, "git-LFS pointer.*git lfs pull"),
    (read_json, DEEP.encode(), "not valid JSON"),
    (read_json, b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (read_json_list, b"{}", "expected a list"), (read_json_list, b"[{}, 3]", "item 1: expected an"),
    (read_jsonl, b'{"a": 1}\n\n{"a": \n', "a, line 3: not valid JSON"),
    (read_jsonl, b"[]\n", "a, line 1: expected an object"), (read_jsonl, b"\xff\n", "not readable"),
    (read_csv, b'a,b\n"' + b"x" * 140_000 + b'",b\n', "not valid CSV"),
    (read_tensors, b"{}", "not readable .*is it whole"), (read_tensors, POINTER, "git lfs pull"),
]  # fmt: skip


@pytest.mark.parametrize(("read", "content", "message"), BAD)
def test_bad_files_are_named(tmp_path, read, content, message):
    path = tmp_path / "a"
    with pytest.raises(InputError, match="a: no such file"):
        next(iter(read(path)))
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read(path))
    assert str(caught.value).startswith(str(path))


def test_a_missing_split_says_what_data_means(tmp_path):
    with pytest.raises(InputError, match="no such file; --data names the folder above it"):
        list(read_jsonl(tmp_path / "MQuAKE" / "train.jsonl"))


def test_tensors_carry_their_information_and_have_a_new_files_permissions(tmp_path):
    info = {"task": "mquake", "seed": 42, "odd": math.inf}
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for path in paths:
        write_tensors(path, {"b": torch.arange(6).view(2, 3).T, "a": torch.zeros(2)}, info)
    tensors, read = read_tensors(paths[0])
    assert read == info and torch.equal(tensors["b"], torch.arange(6).view(2, 3).T)
    write(tmp_path / "other", "")
    assert {path.stat().st_mode for path in paths} == {(tmp_path / "other").stat().st_mode}
    assert len({path.read_bytes() for path in paths}) == 1  # equal contents, equal bytes
    save_file({"x": torch.ones(2)}, paths[0])
    with pytest.raises(InputError, match="not written by train.py"):
        read_tensors(paths[0])
    paths[0].write_bytes(paths[0].read_bytes()[:20])
    with pytest.raises(InputError, match="not readable .*is it whole"):
        open_tensors(paths[0])
