"""How a script ends on bad input."""

import pytest

from lofit.errors import InputError, run


@pytest.mark.parametrize(
    ("error", "line"),
    [(InputError("a.json, line 3: no"), "error: a.json, line 3: no\n"),
     (KeyboardInterrupt(), "\ninterrupted: nothing half-written was left behind\n")],
)  # fmt: skip
def test_input_errors_and_ctrl_c_are_one_line_and_exit_code_2(capsys, error, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", line)


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
