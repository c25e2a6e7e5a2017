"""LoFiT: localized fine-tuning of attention heads (arXiv 2406.01563), from scratch."""

from lofit.llm import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
