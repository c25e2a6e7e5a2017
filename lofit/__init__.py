"""LoFiT: localized fine-tuning of attention heads (arXiv 2406.01563), from scratch."""

from lofit import early  # noqa: F401

__all__ = ["load_model", "load_tokenizer"]


def __getattr__(name: str):
    """Imported when asked for: a script takes Ctrl-C before the seconds that torch needs."""
    if name not in __all__:
        raise AttributeError(f"module 'lofit' has no attribute {name!r}")
    from lofit import llm

    return getattr(llm, name)
