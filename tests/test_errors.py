"""How a script ends on bad input."""

import io
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import REPO

from lofit import errors
from lofit.errors import LONGEST, InputError, run


@pytest.fixture(autouse=True)
def handlers():
    """Those of pytest, back behind each test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class OutOfMemoryError(RuntimeError):
    """Of the name that torch's has."""


FULL = f"error: {errors.MEMORY}\n"
AGAIN = "\ninterrupted; the same command continues after the last whole epoch\n"


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [(InputError("a.json, line 3: no"), "error: a.json, line 3: no\n", 2),
     (InputError("a\nb\r\nc"), "error: a b c\n", 2),
     (InputError("\x1b[2J\x00\ud800"), "error: \ufffd[2J\ufffd\ufffd\n", 2),
     (InputError("x" * 10**6), f"error: {'x' * 247} ... {'x' * 247}\n", 2),
     (MemoryError(), FULL, 2), (OutOfMemoryError("CUDA out of memory. Tried ..."), FULL, 2),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), FULL, 2),
     (KeyboardInterrupt(), AGAIN, 130)],
)  # fmt: skip
def test_input_errors_and_ctrl_c_are_one_line(capsys, error, line, code):
    def main():
        raise error

    assert len(str(error)) <= LONGEST  # cut when it is made: a notebook shows it too
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == code
    assert capsys.readouterr() == ("", line)


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="size"):
        run(lambda: torch.ones(2) + torch.ones(3))


def test_torch_says_that_memory_is_full(capsys):
    with pytest.raises(SystemExit):
        run(lambda: torch.empty(2**60, dtype=torch.uint8))
    assert capsys.readouterr().err == FULL
    assert torch.OutOfMemoryError.__name__ == OutOfMemoryError.__name__


def script(body: str, **kwargs) -> subprocess.Popen:
    code = f"import sys, time\nfrom lofit import errors\ndef main():\n    {body}\nerrors.run(main)"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line(by):
    child = script("print('on', flush=True); time.sleep(60)")
    assert child.stdout.readline() == "on\n"
    child.send_signal(by)
    assert child.communicate()[1] == AGAIN and child.returncode == 130


def test_a_signal_is_a_library_users_own(tmp_path):
    lines = "import os, signal, sys, lofit; assert 'torch' not in sys.modules\n"
    lines += "try: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: print('mine')"
    (tmp_path / "train.py").write_text(lines)
    done = subprocess.run(
        [sys.executable, tmp_path / "train.py"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )  # fmt: skip
    assert done.stdout == "mine\n"


def test_a_closed_pipe_is_one_line():
    child = script(
        "print('on', flush=True); sys.stdin.readline(); print('x' * 10**6)", stdin=subprocess.PIPE
    )
    child.stdout.readline()
    child.stdout.close()
    child.stdin.write("go\n")
    child.stdin.close()
    assert child.stderr.read() == "error: standard output was closed; send it to a file instead\n"
    assert child.wait() == 2


def test_a_terminal_that_cannot_show_a_character_shows_another():
    body = "print('D\\u00f6hler \\ud800'); raise errors.InputError('\\u6771')"
    child = script(body, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert child.communicate() == ("D?hler ?\n", "error: ?\n") and child.returncode == 2


def test_a_stream_that_is_no_terminal(monkeypatch, capsys):
    """A notebook's has no encoding to change."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    run(lambda: print("shown"))
    assert sys.stdout.getvalue() == "shown\n"
