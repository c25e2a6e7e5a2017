"""RepE (arXiv 2310.01405): a reading vector, found without training, added to layers' outputs."""

import torch

from lofit.llm.model import CausalLM


@torch.no_grad()
def last_hidden(model: CausalLM, texts: list[list[int]]) -> torch.Tensor:
    """What each layer returns at the last token of each text: [texts, layer, D] fp32 on CPU."""
    found: list[torch.Tensor] = []
    # the last layer returns the positions that are asked for, here all of them
    hooks = [
        block.register_forward_hook(lambda _, args, y: found.append(y[0, -1].float().cpu()))
        for block in model.model.layers
    ]
    try:
        for ids in texts:
            model.model(torch.tensor([ids], device=model.lm_head.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).unflatten(0, (len(texts), -1))


def reading_vectors(hidden: torch.Tensor, alpha: float) -> torch.Tensor:
    """alpha * sigma * direction of each layer: [layer, D]. The direction is the first principal
    component of the differences right - wrong, pointing to right; sigma the standard deviation of
    all hidden states along it, so that one alpha means the same in every layer and model.

    hidden: [2 n, layer, D], right and wrong in turns.
    """
    difference = (hidden[0::2] - hidden[1::2]).transpose(0, 1)  # [layer, n, D]
    direction = torch.linalg.svd(difference, full_matrices=False).Vh[:, 0]
    toward = (difference.mean(1) * direction).sum(-1, keepdim=True)
    direction = direction * torch.where(toward < 0, -1.0, 1.0)
    sigma = torch.einsum("tld,ld->tl", hidden, direction).std(0)
    return alpha * sigma[:, None] * direction


def middle(n_layers: int) -> range:
    """The layers that are steered: the middle third."""
    return range(n_layers // 3, max(n_layers // 3 + 1, 2 * n_layers // 3))
