"""What a script imports before all else: Ctrl-C and SIGTERM while the other imports run (seconds,
for torch) end it by one line. From `errors.run` on they are told to the script instead."""

import os
import signal


def _leave(number: int, _) -> None:
    os.write(2, b"\ninterrupted: nothing had begun\n")
    os._exit(128 + number)


for _number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(_number, _leave)
