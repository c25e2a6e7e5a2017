"""LoFiT: localized fine-tuning of attention heads (arXiv 2406.01563), from scratch."""

_HOME = {
    "load_model": "lofit.llm.checkpoint",
    "load_tokenizer": "lofit.llm.tokenizer",
    "attach_scales": "lofit.heads",
    "attach_offsets": "lofit.heads",
    "head_scores": "lofit.heads",
    "rank_heads": "lofit.heads",
    "edits_off": "lofit.heads",
    "load_offsets": "lofit.run.files",
    "save_offsets": "lofit.run.files",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    """Import a name when it is asked for: `import lofit` alone must not take torch's seconds."""
    if name not in _HOME:
        raise AttributeError(f"module 'lofit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
