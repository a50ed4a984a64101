"""Standardised features in, the channels of several candidates of one head out; trainable."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pilotfish.heads.form import Form


class Readout(nn.Module):
    """Candidates side by side in one matmul.

    Features stay as they are: each pass divides the weights by the standard deviations instead, which is the same and
    saves a pass over the activations. A linear form starts at 0, as a convex problem allows; the others start at
    random, since their channels would stay alike.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(
        self,
        form: Form,
        mean: Float[Tensor, " feature"],
        inverse_std: Float[Tensor, " feature"],
        num_candidates: int,
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("mean", mean)
        self.register_buffer("inverse_std", inverse_std)
        size, size_of_outputs = (0.0, 0.0) if form.kind == "linear" else (len(mean) ** -0.5, form.width**-0.5)
        first = size * torch.randn(form.num_channels, len(mean), generator=generator)
        outputs = size_of_outputs * torch.randn(form.num_outputs, generator=generator)
        self.weight = nn.Parameter(first.repeat(num_candidates, 1, 1))
        self.bias = nn.Parameter(torch.zeros(num_candidates, form.num_channels))
        self.outputs = nn.Parameter(outputs.repeat(num_candidates, 1))

    def forward(self, features: Float[Tensor, "token feature"]) -> Float[Tensor, "token candidate channel"]:
        weight = self.weight * self.inverse_std
        bias = self.bias - weight @ self.mean
        flat: Tensor = nn.functional.linear(features, weight.flatten(0, 1), bias.flatten())
        return flat.reshape(len(features), *self.bias.shape)

    def folded(self, candidate: int) -> list[Tensor]:
        """One candidate's weight, bias and outputs for features as they are, copied."""
        with torch.no_grad():
            weight = self.weight[candidate] * self.inverse_std
            return [weight, self.bias[candidate] - weight @ self.mean, self.outputs[candidate].clone()]
