"""LoFiT: localized fine-tuning of attention heads (arXiv 2406.01563), from scratch."""

import sys
from pathlib import Path

_main = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve().parent
if sys.argv[:1] == ["-m"] or _main == Path(__file__).resolve().parent.parent:
    from lofit import early  # noqa: F401  a command (python -m lofit.report, python train.py) began

__all__ = ["load_model", "load_tokenizer"]


def __getattr__(name: str):
    """Imported when asked for: a script takes Ctrl-C before the seconds that torch needs."""
    if name not in __all__:
        raise AttributeError(f"module 'lofit' has no attribute {name!r}")
    from lofit import llm

    return getattr(llm, name)
