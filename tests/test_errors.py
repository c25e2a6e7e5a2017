"""How a script ends on bad input."""

import signal
import subprocess
import sys

import pytest

from lofit.errors import InputError, run


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [(InputError("a.json, line 3: no"), "error: a.json, line 3: no\n", 2),
     (InputError("a\nb\r\nc"), "error: a b c\n", 2),
     (InputError("x" * 10**6), f"error: {'x' * 247} ... {'x' * 247}\n", 2),
     (KeyboardInterrupt(), "\ninterrupted: nothing half-written was left behind\n", 130)],
)  # fmt: skip
def test_input_errors_and_ctrl_c_are_one_line(capsys, error, line, code):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == code
    assert capsys.readouterr() == ("", line)


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def script(body: str, **kwargs) -> subprocess.Popen:
    code = f"import sys, time\nfrom lofit import errors\ndef main():\n    {body}\nerrors.run(main)"
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, **kwargs
    )


@pytest.mark.parametrize(("by", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_one_line_and_its_exit_code(by, code):
    child = script("print('on', flush=True); time.sleep(60)", stdout=subprocess.PIPE)
    assert child.stdout.readline() == "on\n"
    child.send_signal(by)
    told = child.communicate()[1]
    assert (child.returncode, told.strip().count("\n")) == (code, 0)
    assert "interrupted" in told


def test_a_closed_pipe_is_one_line():
    child = script(
        "print('on', flush=True); sys.stdin.readline(); print('x' * 10**6)",
        stdout=subprocess.PIPE, stdin=subprocess.PIPE,
    )  # fmt: skip
    child.stdout.readline()
    child.stdout.close()
    child.stdin.write("go\n")
    child.stdin.close()
    assert child.stderr.read() == "error: standard output was closed; send it to a file instead\n"
    assert child.wait() == 2
