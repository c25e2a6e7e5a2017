"""ITI (arXiv 2306.03341, section 3.2): z <- z + alpha * sigma * theta on the K heads whose probes
tell right answers from wrong ones best. Nothing is trained; what comes out is a set of offsets."""

import torch

from lofit.heads import Head


def mass_mean_shift(z: torch.Tensor, heads: list[Head], alpha: float) -> torch.Tensor:
    """alpha * sigma * theta of each head: [K, head_dim]. theta points from the mean of wrong to
    the mean of right answers, of length 1; sigma is the standard deviation of all along theta.

    z: [2 n, layer, head, head_dim] at the last token, right and wrong in turns.
    """
    layers, columns = zip(*heads, strict=True)
    z = z[:, layers, columns]  # [2 n, K, head_dim]
    theta = z[0::2].mean(0) - z[1::2].mean(0)
    theta = theta / theta.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    sigma = (z * theta).sum(-1).std(0, correction=0)
    return alpha * sigma[:, None] * theta
