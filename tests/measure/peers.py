"""What the benchmark compares with: stock transformers with a trainable hook, and with peft's LoRA.

Both share the tensors of one of our models, so that weights count once and losses must agree.
"""

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model

from lofit.heads import Head
from lofit.llm.model import CausalLM
from lofit.llm.save import hf_config


def hf_twin(model: CausalLM) -> transformers.LlamaForCausalLM:
    """Stock transformers around the very tensors of a model of ours, frozen: no weight is drawn or
    copied."""
    config = transformers.LlamaConfig(**hf_config(model.config))
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        twin = transformers.LlamaForCausalLM(config)
    twin.load_state_dict(model.state_dict(), assign=True)
    with torch.device(model.lm_head.weight.device):  # the RoPE table is no part of the state
        twin.model.rotary_emb = type(twin.model.rotary_emb)(config)
    return twin.eval().requires_grad_(False)


def hook_scales(twin: transformers.LlamaForCausalLM, scales: torch.Tensor) -> list[torch.Tensor]:
    """LoFiT's first step as a hook in front of each o_proj; returns the parameters."""
    parameters = [torch.nn.Parameter(s.clone().to(twin.device)) for s in scales]
    for layer, scale in zip(twin.model.layers, parameters, strict=True):
        _hook(layer.self_attn.o_proj, lambda z, scale=scale: z * (1 + scale), scale.shape)
    return parameters


def hook_offsets(
    twin: transformers.LlamaForCausalLM, heads: list[Head], offsets: torch.Tensor
) -> list[torch.Tensor]:
    """LoFiT's second step the same way; returns the parameters, one tensor an edited layer."""
    n_heads, head_dim = twin.config.num_attention_heads, offsets.shape[1]
    parameters = []
    for i, layer in enumerate(twin.model.layers):
        rows = [row for row, (in_layer, _) in enumerate(heads) if in_layer == i]
        if not rows:
            continue
        v = torch.nn.Parameter(offsets[rows].clone().to(twin.device))
        inside = torch.tensor([heads[row][1] for row in rows], device=twin.device)

        def add(z: torch.Tensor, v: torch.Tensor = v, inside: torch.Tensor = inside):
            return z + v.new_zeros(n_heads, head_dim).index_copy(0, inside, v)

        _hook(layer.self_attn.o_proj, add, (n_heads, head_dim))
        parameters.append(v)
    return parameters


def unhook(twin: transformers.LlamaForCausalLM) -> None:
    for layer in twin.model.layers:
        layer.self_attn.o_proj._forward_pre_hooks.clear()


def _hook(o_proj: torch.nn.Module, edit, shape: tuple[int, int]) -> None:
    def before(module, args):
        z = args[0].unflatten(-1, tuple(shape))
        return (edit(z).to(z.dtype).flatten(-2),)

    o_proj.register_forward_pre_hook(before)


def lora(twin: transformers.LlamaForCausalLM) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """(peft model with LoRA of rank 8 on q and v, its parameters)."""
    model = get_peft_model(twin, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    return model, [p for p in model.parameters() if p.requires_grad]


def hf_batch(texts: list[tuple[list[int], list[int]]], device: str) -> dict[str, torch.Tensor]:
    """Right-padded input_ids, attention_mask and labels."""
    width = max(len(ids) for ids, _ in texts)

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)

    return {
        "input_ids": padded([ids for ids, _ in texts], 0),
        "attention_mask": padded([[1] * len(ids) for ids, _ in texts], 0),
        "labels": padded([labels for _, labels in texts], -100),
    }


def hf_generate(
    twin: transformers.LlamaForCausalLM, prompts: list[list[int]], n: int
) -> list[list[int]]:
    """n greedy tokens after each prompt of a batch, left-padded; an end of text ends nothing."""
    twin.generation_config.eos_token_id = None
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=twin.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=twin.device
    )
    out = twin.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=n,
        pad_token_id=0,
    )  # fmt: skip
    return out[:, width:].tolist()


@torch.no_grad()
def hf_score(twin: transformers.LlamaForCausalLM, prefix: list[int], answer: list[int]) -> float:
    """log p(answer | prefix) by one forward pass over both, as the paper's code does it."""
    logits = twin(torch.tensor([prefix + answer], device=twin.device)).logits[0]
    log_p = F.log_softmax(logits[len(prefix) - 1 : -1].float(), dim=-1)
    return log_p.gather(1, torch.tensor(answer, device=twin.device)[:, None]).sum().item()
