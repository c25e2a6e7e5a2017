"""A Llama and Gemma transformer in plain PyTorch, with one slot per attention layer for LoFiT.

Shapes:  B batch · T position · D hidden_size · V vocab_size
         n_heads query heads · n_kv_heads key/value heads · head_dim

Module attributes carry HF's parameter names, so `CausalLM.state_dict()` *is* an HF checkpoint.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lofit.llm import rope
from lofit.llm.config import SLIDING, ModelConfig

TokenIndex = tuple[torch.Tensor, torch.Tensor]  # rows, columns of N tokens, [N] each
ACTIVATION = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class KVCache:
    """Keys and values of every layer, allocated once and written at given positions."""

    # A token looks only backwards, so what comes later never changes its key and value: each is
    # computed once, and a new token costs one position instead of all of them.

    def __init__(self, model: "CausalLM", batch: int, length: int):
        """length: prompt plus new tokens."""
        config, like = model.config, model.model.norm.weight
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length)
        self.k = torch.zeros(*shape, config.head_dim, dtype=like.dtype, device=like.device)
        self.v = torch.zeros_like(self.k)

    def keep_rows(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]

    def before(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Keys and values of a cache of one row, put in front of those of any number of rows."""
        rows = (k.shape[0], -1, -1, -1)
        one = (self.k[layer].expand(rows), self.v[layer].expand(rows))
        return torch.cat((one[0], k), dim=2), torch.cat((one[1], v), dim=2)

    def write(self, layer: int, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        """Store k, v: [B, n_kv_heads, T, head_dim] at positions: [B, T]; return all of the layer's
        keys and values: [B, n_kv_heads, length, head_dim]."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        # advanced indices around a slice put [B, T] in front: hence the transposes
        self.k[layer][rows, :, positions] = k.transpose(1, 2)
        self.v[layer][rows, :, positions] = v.transpose(1, 2)
        return self.k[layer], self.v[layer]


@dataclass
class Context:
    """What every layer needs beside the hidden states, computed once per forward pass."""

    positions: torch.Tensor  # [B or 1, T]
    cos_sin: dict[str, tuple[torch.Tensor, torch.Tensor]]  # by layer type
    # by layer type: bool [B or 1, 1, T, S], True where a query may look; None = causal
    mask: dict[str, torch.Tensor | None]
    cache: KVCache | None = None
    decoding: bool = False  # True: attend to the whole cache; False: to the T positions of the pass
    prefix: KVCache | None = None  # of one row, in front of every row of the pass (tree.py)


def make_context(
    config: ModelConfig,
    ids: torch.Tensor,
    positions: torch.Tensor | None = None,
    cache: KVCache | None = None,
) -> Context:
    """Without `positions`, rows start at position 0 and attention is causal within them: training
    and the prompt. Right padding needs no mask, for no real token looks to its right. With
    `positions` [B, T] and a cache, each token attends to every cached position up to its own."""
    decoding = positions is not None
    reach = torch.arange(cache.k.shape[3] if decoding else ids.shape[1], device=ids.device)
    positions = positions if decoding else reach[None]
    kinds = config.rope_parameters
    cos_sin = {kind: rope.cos_sin(config, kind, positions) for kind in kinds}
    mask = {kind: _mask(config, kind, positions, reach, decoding) for kind in kinds}
    return Context(positions, cos_sin, mask, cache, decoding)


def _mask(config, kind, positions, reach, decoding: bool) -> torch.Tensor | None:
    """None where causality is all of it: that keeps the fused kernels."""
    window = config.sliding_window if kind == SLIDING else None
    narrow = window is not None and len(reach) > window
    if not (decoding or narrow):
        return None
    # how far back each key stands from each query: what is still to come is not looked at, nor what
    # is out of the window
    distance = positions[:, None, :, None] - reach
    return (distance >= 0) & (distance < window) if narrow else distance >= 0


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the division in fp32 as in HF: in bf16 the mean of squares is off.

    Gemma stores weight - 1 and multiplies before the cast, Llama after it.
    """

    def __init__(self, dim: int, config: ModelConfig):
        super().__init__()
        self.eps, self.adds_one = config.rms_norm_eps, config.norm_adds_one
        self.weight = nn.Parameter(torch.zeros(dim) if self.adds_one else torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # unlike LayerNorm it subtracts no mean and has no bias: only the length of x is set
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        if self.adds_one:
            return (x32 * (1 + self.weight.float())).to(x.dtype)
        return self.weight * x32.to(x.dtype)


def soft_cap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Gemma 2's bound on scores and logits: cap * tanh(x / cap)."""
    return x if cap is None else cap * torch.tanh(x / cap)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    mask: torch.Tensor | None, scale: float, cap: float | None,
) -> torch.Tensor:  # fmt: skip
    """Attention over q: [B, n_heads, T, head_dim] and k, v: [B, n_kv_heads, S, head_dim]. mask: as
    in Context. Returns [B, n_heads, T, head_dim]."""
    if k.shape[1] != q.shape[1]:
        # Grouped queries: each key/value head serves several query heads, which keeps the cache
        # small. These look where their own queries take them, so to LoFiT each is a head. On a CPU
        # the fused kernel takes groups as they are, which saves copying the cache at every token;
        # but its gradients of k and v are less exact in bfloat16. GPU kernels for masks and fp32 do
        # not take groups at all.
        learning = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        if cap is None and q.device.type == "cpu" and not learning:
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    # Gemma 2 bounds its scores, which no fused kernel does: the formula itself
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    # softmax makes exactly 0 of -inf: a masked position has no part in the mean
    scores = soft_cap((q * scale) @ k.transpose(-1, -2), cap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(v.dtype) @ v


class Attention(nn.Module):
    """Attention of one layer, with the slot `head_out` between its heads and o_proj."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.layer_type = config.layer_type(layer)
        # a sum of head_dim products is about the root of head_dim in size: divided by it, scores
        # are as sharp in wide heads as in narrow ones
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.cap = config.attn_logit_softcapping
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=bias)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config) if config.qk_norms else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config) if config.qk_norms else nn.Identity()
        self.head_out = nn.Identity()  # the slot: heads.py puts a HeadScale or HeadOffset here

    def forward(
        self, x: torch.Tensor, context: Context, at: TokenIndex | None = None
    ) -> torch.Tensor:
        """x: [B, T, D] -> [B, T, D], or [N, D] of the tokens `at`."""
        # each head works on its own head_dim numbers: [B, T, heads * head_dim] -> [B, heads, T, ..]
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos_sin, mask = context.cos_sin[self.layer_type], context.mask[self.layer_type]
        # RoPE turns q and k by their positions, so that q . k depends on how far apart they are.
        # A pair that turns together is (i, i + head_dim / 2), as HF's checkpoints want it; Meta's
        # own files pair neighbours. Gemma 3 and Qwen 3 norm each head before.
        q, k = rope.rotate(self.q_norm(q), *cos_sin), rope.rotate(self.k_norm(k), *cos_sin)
        if context.cache is not None:
            whole = context.cache.write(self.layer, context.positions, k, v)
            # a prompt has nothing in front of it, and looks at itself alone
            k, v = whole if context.decoding else (k, v)
        if context.prefix is not None:  # what all rows begin with, computed once for one row
            k, v = context.prefix.before(self.layer, k, v)
        # A head's output is a mean of values, weighted by where it looks. This is the last place
        # where heads are apart: o_proj is one matrix over all of them, and sums what each one adds.
        # So an offset v of head h adds a constant to it: o_proj's columns for h, times v.
        z = attend(q, k, v, mask, self.scale, self.cap)
        z = z.transpose(1, 2)  # [B, T, n_heads, head_dim]
        z = self.head_out(z)  # LoFiT acts here and nowhere else (paper, section 3)
        z = z if at is None else z[at]  # in the last layer most positions are done with here
        return self.o_proj(z.flatten(-2))


class MLP(nn.Module):
    """down(act(gate x) * up x): one half decides how much of the other half passes."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)
        self.act = ACTIVATION[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A layer: x + attention(norm x), then x + mlp(norm x); Gemma 2 and 3 norm both results too."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D = config.hidden_size
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(D, config)
        self.post_attention_layernorm = RMSNorm(D, config)
        self.sandwich = config.sandwich_norms
        if self.sandwich:
            self.pre_feedforward_layernorm = RMSNorm(D, config)
            self.post_feedforward_layernorm = RMSNorm(D, config)

    def forward(
        self, x: torch.Tensor, context: Context, at: TokenIndex | None = None
    ) -> torch.Tensor:
        """x: [B, T, D] -> [B, T, D], or [N, D] of the tokens `at`: the others are looked at by
        attention and need no more."""
        # Pre-norm: x itself, the residual stream, is only ever added to. So what an offset adds in
        # this layer reaches every later layer, and the logits, directly as well.
        attended = self.self_attn(self.input_layernorm(x), context, at)
        x = x if at is None else x[at]
        # HF's names say where a norm stands, not what it norms
        x = x + (self.post_attention_layernorm(attended) if self.sandwich else attended)
        if self.sandwich:
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Embedding, layers and last norm. `lower` and `upper` split it where a layer begins: what lies
    below the lowest edit gives the same for a text in every epoch (fast/hidden_cache.py)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # no initial values on meta: drawing them there would import torch's compiler, slowly
        empty = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(*empty.shape, _weight=empty if empty.is_meta else None)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)

    def forward(
        self, ids: torch.Tensor, context: Context | None = None, at: TokenIndex | None = None
    ) -> torch.Tensor:
        """ids: [B, T] -> final hidden states [B, T, D], or [N, D] of the tokens `at`."""
        context = context or make_context(self.config, ids)
        return self.upper(0, self.lower(0, ids, context), context, at)

    def lower(self, n: int, ids: torch.Tensor, context: Context) -> torch.Tensor:
        """Embedding and the first n layers: [B, T] -> [B, T, D]."""
        x = self.embed_tokens(ids)
        if self.config.scale_embeddings:  # the factor is rounded to the weights' dtype, as in HF
            x = x * x.new_full((), self.config.hidden_size**0.5)
        for layer in self.layers[:n]:
            x = layer(x, context)
        return x

    def upper(
        self, n: int, x: torch.Tensor, context: Context, at: TokenIndex | None = None
    ) -> torch.Tensor:
        """The layers from the n-th on and the last norm; `at`: see `forward`."""
        for layer in self.layers[n:-1]:
            x = layer(x, context)
        return self.norm(self.layers[-1](x, context, at))


class CausalLM(nn.Module):
    """The language model. `.model` gives hidden states, `.logits` makes logits of them; both are
    called apart where logits are needed at a few positions only."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the embedding matrix with `lm_head` where the config says so."""
        # A token is then read and written by one vector: in a small model with a large vocabulary a
        # second matrix would be a good part of all weights.
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final hidden states [..., D] -> logits [..., V]."""
        return soft_cap(self.lm_head(hidden), self.config.final_logit_softcapping)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [B, T] -> logits [B, T, V]."""
        return self.logits(self.model(ids))
