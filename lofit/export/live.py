"""Add a run's offsets to a live transformers model, without an export.

from transformers import AutoModelForCausalLM
from lofit.export.live import add_offsets

model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B-Instruct")
hooks = add_offsets(model, "runs/meta-llama--Llama-3.1-8B-Instruct/mydata")
for hook in hooks:
    hook.remove()  # the base model again
"""

from pathlib import Path

import torch

from lofit.errors import InputError
from lofit.files import read_tensors, reading
from lofit.run.files import find_edits


def add_offsets(model, name: str | Path) -> list:
    """Add the offsets of a run folder, an adapter or a hub id in front of o_proj.

    The model must be the base that the offsets were trained on: this is not checked, for stock
    classes have no fingerprint. Returns the hooks, one for each edited layer. Raises InputError if
    the model has other heads, or if the run is a baseline's.
    """
    path = find_edits(name)
    tensors, info = read_tensors(path)
    if "method" in info:
        raise InputError(f"{path}: made by --method {info['method']}; expected offsets of heads")
    layers, hooks = model.get_decoder().layers, []
    n_heads = model.config.get_text_config().num_attention_heads
    with reading(path):
        (at_layer, at_head), offsets = tensors["heads"].T, tensors["offsets"]
        v = torch.zeros(len(layers), n_heads, offsets.shape[1])
        known = at_layer.max() < len(layers) and at_head.max() < n_heads
        if not known or v[0].numel() != layers[0].self_attn.o_proj.in_features:
            raise InputError(
                f"{path}: made for a model with other heads; load the run's base model instead of"
                f" this {type(model).__name__}"
            )
        v[at_layer, at_head] = offsets
    for layer in at_layer.unique().tolist():
        o_proj = layers[layer].self_attn.o_proj
        shift = v[layer].flatten().to(o_proj.weight.device)
        hooks.append(
            o_proj.register_forward_pre_hook(
                lambda _, args, shift=shift: ((args[0] + shift).to(args[0].dtype), *args[1:])
            )
        )
    return hooks
