"""LoFiT: localized fine-tuning of attention heads (arXiv 2406.01563), from scratch."""

from lofit.checkpoint import load_model
from lofit.tokenizer import load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
