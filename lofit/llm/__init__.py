"""A Llama and a Gemma in plain PyTorch. Nothing here has heard of LoFiT, but for the slot that
model.py leaves open; tests/test_rooms.py keeps it so."""

from lofit.llm.checkpoint import load_model
from lofit.llm.tokenizer import load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
