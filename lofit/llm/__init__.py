"""A Llama and a Gemma in plain PyTorch that know nothing of LoFiT but for the slot in model.py."""
