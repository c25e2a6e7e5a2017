"""One of the three scripts in this process: its seconds by part. It imports what the script does
and no more, for its start is measured too.

LOFIT_MEASURE_BEGAN=$(date +%s.%N) python tests/measure/timed_script.py train --heads random
"""

import faulthandler
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# environment: when the process was started, seconds since 1970; after how many more it says where
# it is and ends
BEGAN, LIMIT = "LOFIT_MEASURE_BEGAN", "LOFIT_MEASURE_LIMIT"
PARTS = {  # part -> what it is, in the order of a script
    "start": "start of Python, imports",
    "open": "opening model and tokenizer",
    "texts": "reading and tokenising texts",
    "capture": "capturing CUDA graphs",
    "loop": "training loop",
    "validation": "validation",
    "evaluation": "evaluation, base and tuned",
    "write": "writing results",
    "rest": "all the rest",
    "end": "end of the process",
}


class Clock:
    """Seconds by part. Parts lie within one another; each second counts in the innermost."""

    def __init__(self, began: float):
        self.seconds, self.parts, self.mark = dict.fromkeys(PARTS, 0.0), ["start"], began

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.charge()
        self.parts.append(name)
        try:
            yield
        finally:
            self.charge()
            self.parts.pop()

    def charge(self) -> None:
        now = time.time()
        self.seconds[self.parts[-1]] += now - self.mark
        self.mark = now

    def around(self, owner: object, name: str, part: str) -> None:
        """Let each call of owner.name count in a part."""
        inner = getattr(owner, name)

        def timed(*args, **kwargs):
            with self.part(part):
                return inner(*args, **kwargs)

        setattr(owner, name, timed)

    def around_steps(self, module: object, name: str, part: str) -> None:
        """The same of a generator: what it does between two things that it yields."""
        inner = getattr(module, name)

        def timed(*args):
            steps = inner(*args)
            while True:
                with self.part(part):
                    step = next(steps, None)  # ends in numbers, so all of it has been computed
                if step is None:
                    return
                yield step

        setattr(module, name, timed)


def main(argv: list[str]) -> None:
    """argv: a script's name and its flags. The last line has its seconds by part and the GPU's peak
    in bytes."""
    script, flags = argv[0], argv[1:]
    faulthandler.dump_traceback_later(float(os.environ.get(LIMIT, 3600)), exit=True)
    clock = Clock(float(os.environ[BEGAN]))
    module = importlib.import_module(script)
    import torch
    from lofit.run.session import Session

    from lofit.fast.decoding import GraphedDecoding
    from lofit.fast.graphs import GraphedObjective

    clock.around(Session, "__init__", "open")
    clock.around(Session, "read", "texts")
    clock.around(Session, "objective", "texts")
    clock.around(GraphedObjective, "_captured", "capture")
    clock.around(GraphedDecoding, "_capture", "capture")
    if script == "eval":
        clock.around(module, "evaluate", "evaluation")
        clock.around(module.artefacts, "save_results", "write")
    else:
        clock.around_steps(module, "fit", "loop")
        clock.around(module, "save_heads" if script == "select_heads" else "save_offsets", "write")
    if script == "train":
        clock.around(module, "validate_epoch", "validation")
    with clock.part("rest"):
        module.main(flags)
    on_gpu = torch.cuda.is_initialized()
    peak = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if on_gpu else []
    sys.__stdout__.write(f"@{json.dumps({'seconds': clock.seconds, 'peak': peak})}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
