"""What a head does with its channels: channels of consecutive tokens in, a logit a token and one a response so far out.

A head's channels are linear in the activations, so a bank makes those of all heads with one matmul. The form is what
follows. It keeps no state but the channels of the last `window - 1` tokens, however long the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pilotfish.errors import SettingError

Kind = Literal["linear", "mlp", "attention", "multimax"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The token's logit says whether the property holds here; the response's, whether it has held lately.

    * `linear`: channel 0 is the token's logit; the response's is the mean of the last channel over the window (the
      sliding-window mean of Constitutional Classifiers++, arXiv 2601.04603, window 16). With one channel both are made
      of the same; two let each be trained on its own labels. The window of a text's first tokens is filled up with a
      prior, which they do not do: without it one odd token at the very beginning raises a flag by itself.
    * `mlp`: the channels are hidden units; after a ReLU one output layer gives both, the response's averaged as above.
    * `attention`: channel 0 as above; `width` queries and `width` values, each query a softmax over the window (rolling
      attention, arXiv 2601.11516, where the window is 10).
    * `multimax`: channel 0 as above; the sum of the maxima of `width` channels over the window (arXiv 2601.11516 takes
      them over the whole text; a window keeps the state bounded and lets an old peak be forgotten).
    """

    kind: Kind = "linear"
    width: int = 2
    """Channels (linear: 1 or 2), hidden units (mlp), or attention heads and maxima (attention, multimax)."""
    window: int = 16
    """Tokens that the response's logit looks back on, the current one included."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise SettingError(f"head form {self.kind!r} is unknown; use one of {', '.join(get_args(Kind))}")
        if self.width < 1 or (self.kind == "linear" and self.width > 2):
            raise SettingError(
                f"a head of form {self.kind} cannot have width {self.width}; give 1 or more, for linear 1 or 2"
            )
        if self.window < 1:
            raise SettingError(f"window {self.window} is too small; give 1 or more tokens")

    @property
    def num_channels(self) -> int:
        return {
            "linear": self.width,
            "mlp": self.width,
            "attention": 1 + 2 * self.width,
            "multimax": 1 + self.width,
        }[self.kind]

    @property
    def num_outputs(self) -> int:
        """Numbers that follow the channels: of an `mlp` two rows of weights and two biases, of it and a linear head the
        prior.
        """
        return {"linear": 1, "mlp": 2 * self.width + 3, "attention": 0, "multimax": 0}[self.kind]

    @property
    def shares(self) -> bool:
        """Whether token and response are read off the same numbers, so that neither can be rescaled alone."""
        return self.kind == "linear" and self.width == 1

    def tokens(
        self, channels: Float[Tensor, "token *head channel"], outputs: Float[Tensor, "*head output"]
    ) -> Float[Tensor, "token ..."]:
        """Each token's own logit."""
        return self._hidden(channels, outputs)[..., 0]

    def running(
        self, channels: Float[Tensor, "token *head channel"], outputs: Float[Tensor, "*head output"]
    ) -> Float[Tensor, "token ..."]:
        """The response's logit after each token."""

        def look_back(values: Tensor, fill: Tensor) -> Tensor:
            return _windows(values, self.window, fill)

        return self._response(self._hidden(channels, outputs), outputs, look_back)

    def at_end(
        self,
        windows: Float[Tensor, "row window *head channel"],
        is_known: Bool[Tensor, "row window"],
        outputs: Float[Tensor, "*head output"],
    ) -> Float[Tensor, "row ..."]:
        """The response's logit at the end of each window, oldest token first; a place that is not known lies before
        the beginning. All shapes are fixed, so that many sequences are read at once and a CUDA graph may hold it.
        """
        known = is_known[:, -self.window :]
        flat = self._hidden(windows[:, -self.window :].flatten(0, 1), outputs)
        hidden = flat.reshape(*known.shape, *flat.shape[1:])

        def look_back(values: Tensor, fill: Tensor) -> Tensor:
            return torch.where(known[(...,) + (None,) * (values.ndim - 2)], values, fill).movedim(1, -1)

        return self._response(hidden, outputs, look_back)

    def _response(self, hidden: Tensor, outputs: Tensor, look_back: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`look_back` gives the values of the window as the last axis, filled up where there are none."""
        match self.kind:
            case "linear" | "mlp":
                return look_back(hidden[..., -1], outputs[..., -1]).mean(-1)
            case "attention":
                queries, values = hidden[..., 1:].chunk(2, dim=-1)
                weights = look_back(queries, queries.new_full((), -torch.inf)).softmax(-1)
                return (weights * look_back(values, values.new_zeros(()))).sum(-1).sum(-1)
            case "multimax":
                maxima = look_back(hidden[..., 1:], hidden.new_full((), -torch.inf)).amax(-1)
                return maxima.sum(-1)

    def _hidden(
        self, channels: Float[Tensor, "token *head channel"], outputs: Float[Tensor, "*head output"]
    ) -> Float[Tensor, "token *head hidden"]:
        if self.kind != "mlp":
            return channels
        units, rows = channels.relu(), outputs[..., :-3].chunk(2, dim=-1)
        return torch.stack([(units * row).sum(-1) for row in rows], dim=-1) + outputs[..., -3:-1]

    def response_channels(self) -> slice:
        """Those whose values add up to the response's logit (not for `mlp`)."""
        if self.shares:
            return slice(0, 1)
        return slice(1 + self.width, None) if self.kind == "attention" else slice(1, None)


def _windows(values: Float[Tensor, "token ..."], size: int, fill: Tensor) -> Float[Tensor, "token ..."]:
    """The last `size` values up to each token as one more axis, oldest first, filled up at the beginning."""
    padding = fill.expand(size - 1, *values.shape[1:])
    return torch.cat([padding, values]).unfold(0, size, 1)
