"""Files are whole or absent, and errors name file and line."""

import json

import pytest
import torch
from lofit.llm.files import open_tensors, read_json

from lofit.errors import InputError
from lofit.files import (
    read_jsonl,
    read_tensors,
    write_atomic,
    write_json,
    write_splits,
    write_tensors,
    write_text,
)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "old")

    def half(temporary):
        temporary.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, half)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_where_nothing_can_be_written(tmp_path):
    """A file stands where a folder is needed: refused for root too, unlike missing permission."""
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(InputError, match="runs/heads.json: cannot be written"):
        write_json(tmp_path / "runs" / "heads.json", {})


def test_json_keeps_lists_on_one_line(tmp_path):
    value = {"heads": [[0, 1], [2, 3]], "inner": {"é": 1}, "empty": {}}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a.json") == value
    assert '  "heads": [[0, 1], [2, 3]],\n' in text and '    "é": 1\n' in text


@pytest.mark.parametrize(
    ("content", "message"),
    [("{\n1", "a.json, line 2: not valid JSON"), ("[1]", "expected a JSON object, found a list"),
     (b"\xff\xfe", "not readable")],
)  # fmt: skip
def test_bad_json(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        read_json(path)


def test_jsonl_counts_lines_as_an_editor_does(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_jsonl(path)) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 3", {"a": 2})]


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"a": 1}\n\n{"a": \n', "a.jsonl, line 3: not valid JSON"), ("[]\n", "line 1: expected"),
     ("", "the split is empty"), ("\n \n", "the split is empty"), (b"\xff\n", "not readable")],
)  # fmt: skip
def test_bad_jsonl(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        list(read_jsonl(path))


def test_a_missing_split_says_what_data_means(tmp_path):
    with pytest.raises(InputError, match="no such file; --data names the folder above it"):
        list(read_jsonl(tmp_path / "MQuAKE" / "train.jsonl"))


def test_tensors_carry_their_information(tmp_path):
    path, info = tmp_path / "a.safetensors", {"task": "mquake", "seed": 42}
    write_tensors(path, {"x": torch.arange(3)}, info)
    tensors, read = read_tensors(path)
    assert read == info and torch.equal(tensors["x"], torch.arange(3))


def test_tensors_that_are_not_ours(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match="no such file"):
        open_tensors(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(InputError, match="not written by train.py"):
        read_tensors(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_tensors(path)
    path.write_text(json.dumps({}))
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_tensors(path)


def test_tensors_have_a_new_files_permissions_and_equal_contents_equal_bytes(tmp_path):
    tensors, info = {"b": torch.ones(3), "a": torch.zeros(2)}, {"seed": 1, "model": "m"}
    paths = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for path in paths:
        write_tensors(path, tensors, info)
    write_text(tmp_path / "other", "")
    assert {path.stat().st_mode for path in paths} == {(tmp_path / "other").stat().st_mode}
    assert len({path.read_bytes() for path in paths}) == 1


def test_splits_are_written_all_or_none(tmp_path):
    """A stop between two splits would leave a train and a test split that overlap."""
    splits = {split: [{"prompt": split}] for split in ("train", "val", "test")}
    write_splits(tmp_path / "task", splits)
    assert json.loads((tmp_path / "task" / "val.jsonl").read_text()) == {"prompt": "val"}
    with pytest.raises(TypeError):
        write_splits(tmp_path / "task", splits | {"test": [{"prompt": set()}]})
    (tmp_path / "task" / "val.jsonl").unlink()
    (tmp_path / "task" / "val.jsonl").mkdir()  # which no file can take the place of
    with pytest.raises(InputError, match="cannot be written"):
        write_splits(tmp_path / "task", splits)
    assert not (tmp_path / "task" / "test.jsonl").exists()
