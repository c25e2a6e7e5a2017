"""The baselines: other methods, with LoFiT's data, training loop, validation and files.

    lora        (arXiv 2106.09685)  W x + B A x on q and v, of rank 8, as the paper compares
    lora_rank1  the same of rank 1: on few layers (--top) no more values than LoFiT trains
    red         (arXiv 2402.15179)  h <- scale * h + bias on what each feed-forward part returns
    bias        y <- y + b on what each o_proj returns: what offsets of all heads amount to
    post_block  h <- h + b on what each layer returns, a place that arXiv 2603.00425 prefers
    iti         (arXiv 2306.03341)  z <- z + alpha * sigma * theta on heads that tell right answers
    repe        (arXiv 2310.01405)  a reading vector added to what the middle layers return

The last two compute their vectors and learn nothing. A new baseline is a class, its line in METHODS
and its name in run/arguments.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lofit.compare.selection import contrast, last_z, probe_accuracy, read_texts
from lofit.errors import InputError
from lofit.heads import Edit, Head, attach_offsets, rank_heads, remove_edits
from lofit.llm.config import ModelConfig
from lofit.llm.model import Block, CausalLM
from lofit.recipes import count_heads, count_of
from lofit.run.setup import Run
from lofit.tasks import Example

TARGETS = ("q_proj", "v_proj")  # of LoRA


class Baseline(Edit):
    """A baseline's part in one layer. It stands in the layer's slot, where it lets z pass, and
    changes what other modules return only while it stands there. So `heads.edits_off` and another
    edit in the slot switch it off."""

    def __init__(self, block: Block, tensors: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().float().clone()))
        # A tuple, so that the layer does not count as a part of its own edit. Hooks are methods, so
        # that a copy of the model has a copy of them.
        self.of = (block,)
        for module, change in self.changes(block).items():
            module.register_forward_hook(partial(self.hook, change))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z

    def hook(self, change, module, args, y):
        """What a module returns instead of y: change(x, y), with x its input."""
        in_slot = self.of[0].self_attn.head_out is self
        return change(args[0], y).to(y.dtype) if in_slot else y


class LoRA(Baseline):
    """NAME_A: [r, D], NAME_B: [out, r] of q_proj and v_proj. alpha is r, so that alpha / r is 1."""

    rank = 8

    def changes(self, block: Block) -> dict:
        return {getattr(block.self_attn, name): partial(self.add, name) for name in TARGETS}

    def add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = getattr(self, f"{name}_A"), getattr(self, f"{name}_B")
        return y + x.float() @ a.T @ b.T

    @classmethod
    def start(cls, config: ModelConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A ~ U(-1/sqrt(D), 1/sqrt(D)) (Kaiming, as peft's), B = 0: no change at first."""
        heads = {"q_proj": config.num_attention_heads, "v_proj": config.num_key_value_heads}
        found = {}
        for name, n in heads.items():
            found[f"{name}_A"] = a = torch.zeros(cls.rank, config.hidden_size)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            found[f"{name}_B"] = torch.zeros(n * config.head_dim, cls.rank)
        return found


class LoRA1(LoRA):
    rank = 1


class RED(Baseline):
    """scale, bias: [D]; 1 and 0 at first."""

    def changes(self, block: Block) -> dict:
        return {block.mlp: self.change}

    def change(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.scale * y + self.bias

    @staticmethod
    def start(config: ModelConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"scale": torch.ones(config.hidden_size), "bias": torch.zeros(config.hidden_size)}


class Bias(Baseline):
    """bias: [D], 0 at first. W (z + v) = W z + W v, but in the hidden states' own coordinates."""

    name = "bias"

    def changes(self, block: Block) -> dict:
        return {block.self_attn.o_proj: self.change}

    def change(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.get_parameter(self.name)

    @classmethod
    def start(cls, config: ModelConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {cls.name: torch.zeros(config.hidden_size)}


class Shift(Bias):
    """shift: [D], 0 at first, or what repe computed."""

    name = "shift"

    def changes(self, block: Block) -> dict:
        return {block: self.change}


@dataclass(frozen=True)
class Method:
    """edit: what it puts into a layer, None for offsets; lr: a learning rate that is rarely far
    from the best of three on validation; strength, compute: of methods that learn nothing."""

    edit: type[Baseline] | None
    lr: float = 0.0
    strength: float = 0.0
    compute: Callable[[Run, list[Example], float, str | None], None] | None = None


def attach_method(
    run: Run, name: str, examples: list[Example], strength: float | None, top: str | None
) -> tuple[list[nn.Parameter], float, str]:
    """Attach a method's edits. Returns the parameters to train (none, if the method computes its
    edits), a learning rate and its origin."""
    method, origin = METHODS[name], f"default of {name}"
    run.info["settings"]["method"] = name
    if method.edit:
        run.info["method"] = name
    if method.compute:
        alpha = run.setting("strength", strength, method.strength, origin)
        method.compute(run, examples, alpha, top)
        return [], 0.0, origin
    config, generator = run.model.config, torch.Generator().manual_seed(run.seed)
    n = config.num_hidden_layers
    layers = range(n)
    if top:  # k layers, evenly spread: the middle one of each of k equal parts
        k = count_of(top, n, "layers")
        layers = run.info["settings"]["layers"] = [(2 * i + 1) * n // (2 * k) for i in range(k)]
    tensors = {
        f"layers.{layer}.{part}": tensor
        for layer in range(n)
        for part, tensor in method.edit.start(config, generator).items()
        if layer in layers
    }
    return attach_edits(run.model, name, tensors), method.lr, origin


def attach_edits(
    model: CausalLM, name: str, tensors: dict[str, torch.Tensor]
) -> list[nn.Parameter]:
    """Put a method's edits into the layers that `tensors` ("layers.3.NAME") name; returns their
    parameters. InputError for a layer, name or shape that this model does not have."""
    if name not in METHODS or not METHODS[name].edit:
        raise InputError(f"method {name!r}: expected one of {', '.join(METHODS)}")
    edit, blocks = METHODS[name].edit, model.model.layers
    shapes = {k: t.shape for k, t in edit.start(model.config, torch.Generator()).items()}
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.removeprefix("layers.").partition(".")
        by_layer.setdefault(layer, {})[part] = tensor.to(model.lm_head.weight.device)
    known = set(map(str, range(len(blocks))))
    for layer, own in by_layer.items():
        if layer not in known or {part: t.shape for part, t in own.items()} != shapes:
            expected = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
            raise InputError(
                f"layer {layer}: {', '.join(own)} do not fit; {name} has {expected} in some of this"
                f" model's {len(blocks)} layers"
            )
    remove_edits(model)
    for layer, own in by_layer.items():
        blocks[int(layer)].self_attn.head_out = edit(blocks[int(layer)], own)
    return [p for layer in by_layer for p in blocks[int(layer)].self_attn.head_out.parameters()]


def compute_iti(run: Run, examples: list[Example], alpha: float, top: str | None) -> None:
    """Attach shifts of the heads whose probes tell right answers from wrong ones best."""
    k = count_heads(run.setting("top", top, run.recipe.heads), run.model.config)
    z = last_z(run.model, contrast(run, examples))
    heads = run.info["heads"] = rank_heads(probe_accuracy(z, run.seed), k)
    attach_offsets(run.model, heads, mass_mean_shift(z, heads, alpha))


def compute_repe(run: Run, examples: list[Example], alpha: float, top: str | None) -> None:
    """Attach reading vectors of right and wrong answers to the middle third of the layers."""
    shift = reading_vectors(last_hidden(run.model, contrast(run, examples)), alpha)
    n = len(shift)
    middle = range(n // 3, max(n // 3 + 1, 2 * n // 3))
    attach_edits(run.model, "repe", {f"layers.{i}.shift": shift[i] for i in middle})


METHODS = {
    "lora": Method(LoRA, lr=5e-4),
    "lora_rank1": Method(LoRA1, lr=1e-2),
    "red": Method(RED, lr=5e-3),
    "bias": Method(Bias, lr=5e-3),
    "post_block": Method(Shift, lr=2e-2),
    "iti": Method(None, strength=15.0, compute=compute_iti),
    "repe": Method(Shift, strength=1.0, compute=compute_repe),
}


def mass_mean_shift(z: torch.Tensor, heads: list[Head], alpha: float) -> torch.Tensor:
    """ITI's alpha * sigma * theta of each head: [K, head_dim]. theta points from the mean of wrong
    to the mean of right answers, of length 1; sigma is the standard deviation of all along theta.

    z: [2 n, layer, head, head_dim] at the last token, right and wrong in turns.
    """
    layers, columns = zip(*heads, strict=True)
    z = z[:, layers, columns]  # [2 n, K, head_dim]
    theta = z[0::2].mean(0) - z[1::2].mean(0)
    theta = theta / theta.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    sigma = (z * theta).sum(-1).std(0, correction=0)
    return alpha * sigma[:, None] * theta


def last_hidden(model: CausalLM, texts: list[list[int]]) -> torch.Tensor:
    """What each layer returns at the last token of each text: [texts, layer, D] fp32 on CPU."""
    found: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, args, y: found.append(y[0, -1].float().cpu()))
        for block in model.model.layers
    ]
    read_texts(model, texts, hooks)
    return torch.stack(found).unflatten(0, (len(texts), -1))


def reading_vectors(hidden: torch.Tensor, alpha: float) -> torch.Tensor:
    """RepE's alpha * sigma * direction of each layer: [layer, D]. The direction is the first
    principal component of the differences right - wrong, pointing to right; sigma the standard
    deviation of all hidden states along it, so that one alpha means the same in every layer.

    hidden: [2 n, layer, D], right and wrong in turns.
    """
    difference = (hidden[0::2] - hidden[1::2]).transpose(0, 1)  # [layer, n, D]
    direction = torch.linalg.svd(difference, full_matrices=False).Vh[:, 0]
    toward = (difference.mean(1) * direction).sum(-1, keepdim=True)
    direction = direction * torch.where(toward < 0, -1.0, 1.0)
    sigma = torch.einsum("tld,ld->tl", hidden, direction).std(0)
    return alpha * sigma[:, None] * direction
