"""A Llama and Gemma transformer in plain PyTorch, with one slot per attention layer for LoFiT.

Shapes:  B batch · T position · D hidden_size · V vocab_size
         n_heads query heads · n_kv_heads key/value heads · head_dim

Module attributes carry HF's parameter names, so `CausalLM.state_dict()` *is* an HF checkpoint.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from lofit.llm import rope
from lofit.llm.config import ModelConfig
from lofit.llm.context import Context, KVCache, Tree, make_context

TokenIndex = tuple[torch.Tensor, torch.Tensor]  # rows, columns of N tokens, [N] each
ACTIVATION: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the division in fp32 as in HF: in bf16 the mean of squares is off.

    Gemma stores weight - 1 and multiplies before the cast, Llama after it.
    """

    def __init__(self, dim: int, config: ModelConfig):
        super().__init__()
        self.eps, self.adds_one = config.rms_norm_eps, config.norm_adds_one
        self.weight = nn.Parameter(torch.zeros(dim) if self.adds_one else torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        if self.adds_one:
            return (x32 * (1 + self.weight.float())).to(x.dtype)
        return self.weight * x32.to(x.dtype)


def soft_cap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Gemma 2's bound on scores and logits: cap * tanh(x / cap)."""
    return x if cap is None else cap * torch.tanh(x / cap)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    cap: float | None = None,
) -> torch.Tensor:
    """Attention over q: [B, n_heads, T, head_dim] and k, v: [B, n_kv_heads, S, head_dim].

    mask: bool [B or 1, 1, T, S], True where a query may look; None = causal (S = T), which keeps
    the fused kernels. cap: see `soft_cap`; no fused kernel has it. Returns
    [B, n_heads, T, head_dim].
    """
    grouped = k.shape[1] != q.shape[1]  # each key/value head serves a group of queries
    if grouped and (cap is not None or not _takes_groups(q, k, v)):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        grouped = False
    if cap is not None:
        return plain_attention(q, k, v, mask, scale, cap)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _takes_groups(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the fused kernel takes fewer key/value heads than queries as well as repeated ones.

    On a CPU it does, with the same bits and 3 to 12 times as fast when it decodes; but its
    gradients of k and v have up to twice the rounding error in bfloat16, and are no faster. On a
    GPU the kernels for masks and for fp32 do not take them.
    """
    with_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return q.device.type == "cpu" and not with_gradient


def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    cap: float | None = None,
) -> torch.Tensor:
    """The formula that the fused kernels compute, with as many key/value heads as queries have;
    arguments as in `attend`.

    Soft caps take this one; tests/measure/attention.py compares the two.
    """
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = soft_cap((q * scale) @ k.transpose(-1, -2), cap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(v.dtype) @ v


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.layer_type = config.layer_type(layer)
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.cap = config.attn_logit_softcapping
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=bias)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(config.head_dim, config) if config.qk_norms else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config) if config.qk_norms else nn.Identity()
        self.head_out = nn.Identity()  # the slot: heads.py puts a HeadScale or HeadOffset here

    def forward(
        self, x: torch.Tensor, context: Context, at: TokenIndex | None = None
    ) -> torch.Tensor:
        """x: [B, T, D] -> [B, T, D], or [N, D] of the tokens `at`."""

        def split(y: torch.Tensor) -> torch.Tensor:  # [B, T, heads*head_dim] -> [B, heads, T, ..]
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        cos_sin, mask = context.cos_sin[self.layer_type], context.mask[self.layer_type]
        q, k = rope.rotate(self.q_norm(q), *cos_sin), rope.rotate(self.k_norm(k), *cos_sin)
        if context.cache is not None:
            whole = context.cache.write(self.layer, context.positions, k, v)
            k, v = whole if context.decoding else (k, v)
        if context.prefix is not None:
            k, v = context.prefix.before(self.layer, k, v)
        z = attend(q, k, v, mask, self.scale, self.cap)
        z = z.transpose(1, 2)  # [B, T, n_heads, head_dim]
        z = self.head_out(z)  # LoFiT acts here and nowhere else (paper, section 3)
        z = z if at is None else z[at]
        return self.o_proj(z.flatten(-2))


class MLP(nn.Module):
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
        attended = self.self_attn(self.input_layernorm(x), context, at)
        x = x if at is None else x[at]
        # HF's names say where a norm stands, not what it norms
        x = x + (self.post_attention_layernorm(attended) if self.sandwich else attended)
        if self.sandwich:
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # on meta without initial values: drawing them there would import torch's compiler, slowly
        empty = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(*empty.shape, _weight=empty if empty.is_meta else None)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: KVCache | None = None,
        tree: Tree | None = None,
        at: TokenIndex | None = None,
    ) -> torch.Tensor:
        """input_ids: [B, T] int64 -> final hidden states [B, T, D].

        Without `positions`, rows start at position 0 and attention is causal within them: training
        and the prompt. Right padding needs no mask, for no real token looks to its right. With
        `positions` [B, T] (and a cache), each token attends to every cached position up to its own.
        With a `tree`, each token attends to its own text. With `at`, rows and columns of N tokens,
        the result is [N, D].
        """
        context = make_context(self.config, input_ids, positions, cache, tree)
        return self.run(self.embed(input_ids), context, at=at)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> the hidden states that enter layer 0."""
        x = self.embed_tokens(input_ids)
        if self.config.scale_embeddings:  # the factor is rounded to the weights' dtype, as in HF
            x = x * x.new_full((), self.config.hidden_size**0.5)
        return x

    def run(
        self, x: torch.Tensor, context: Context, first: int = 0, at: TokenIndex | None = None
    ) -> torch.Tensor:
        """Hidden states that enter layer `first` -> final ones, of the tokens `at` or of all."""
        for layer in self.layers[first:-1]:
            x = layer(x, context)
        return self.norm(self.layers[-1](x, context, at))

    def before(self, layer: int, input_ids: torch.Tensor, context: Context) -> torch.Tensor:
        """The hidden states that enter a layer."""
        x = self.embed(input_ids)
        for block in self.layers[:layer]:
            x = block(x, context)
        return x


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
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final hidden states [..., D] -> logits [..., V]."""
        return soft_cap(self.lm_head(hidden), self.config.final_logit_softcapping)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """input_ids: [B, T] -> logits [B, T, V]. See `Transformer.forward`."""
        return self.logits(self.model(input_ids, positions, cache))
