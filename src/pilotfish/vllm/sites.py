"""A model as vLLM builds it in; the activations of a bank's sites, row by row of a pass, out.

`final` is what the outermost module returns. Inner sites are copied into a buffer by an operation of our own inside the
block's forward, so that torch.compile and CUDA graphs keep it; the next pass overwrites the buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt16
from torch import Tensor, nn

from pilotfish.core import Site
from pilotfish.errors import BankMismatch, UnknownFamily
from pilotfish.models import FAMILIES, family_named


def _copy(hidden: Tensor, residual: Tensor | None, buffer: Tensor) -> None:
    """Copies `hidden` (with `residual`, where vLLM has not yet added it) into the first rows of the buffer."""
    into = buffer[: len(hidden)]
    if len(into) < len(hidden):
        hidden, residual = hidden[: len(into)], residual if residual is None else residual[: len(into)]
    if residual is None:
        into.copy_(hidden)
    else:
        torch.add(hidden, residual, out=into)


_SCHEMA = "(Tensor hidden, Tensor? residual, Tensor(a!) buffer) -> ()"
keep = torch.library.custom_op("pilotfish::keep", _copy, mutates_args=("buffer",), schema=_SCHEMA)
"""For the compiler, which sees one opaque operation that writes the buffer."""
keep.register_fake(lambda hidden, residual, buffer: None)


class Sites:
    """The buffers of one model's sites, in the order in which the bank reads them."""

    def __init__(self, model: nn.Module, model_type: str, sites: tuple[Site, ...], num_rows: int) -> None:
        """Raises `BankMismatch` when the model has no such site, as far as this plugin knows it."""
        weight = next(model.parameters())
        self._sites = sites
        self.are_wanted = True
        """Whether the coming pass will be read. A compiled or captured pass writes its buffers all the same."""
        self._buffers: dict[Site, Tensor] = {}
        self._bits: dict[Site, UInt16[np.ndarray, "row hidden"]] = {}
        """Of the buffers, of the same memory."""
        for site in sites:
            if site.stream == "final":
                continue
            module = _module_of(model, model_type, site)
            width = int(getattr(model, "config").hidden_size)  # noqa: B009  # a module's attributes are tensors to mypy
            buffer = torch.zeros(num_rows, width, dtype=weight.dtype, device=weight.device)
            self._buffers[site] = buffer
            if _has_bits(buffer):
                self._bits[site] = _bits(buffer)
            module.forward = self._keeping(module.forward, site, buffer)

    def features(self, final: Float[Tensor, "some hidden"], num_rows: int) -> Float[Tensor, "row feature"]:
        """Of the first rows of the last pass; `final` is what the model returned."""
        if not self._buffers:
            return final[:num_rows]
        return torch.cat([self._buffers.get(site, final)[:num_rows] for site in self._sites], dim=-1)

    def bits(self, final: Float[Tensor, "some hidden"]) -> tuple[UInt16[np.ndarray, "any hidden"], ...] | None:
        """Of each site the last pass's rows, and behind them whatever an earlier pass left, without a copy.

        Returns:
            None where states are not kept in bfloat16 on a CPU.
        """
        if not _has_bits(final) or len(self._bits) < len(self._buffers):
            return None
        last = _bits(final)
        return tuple(self._bits.get(site, last) for site in self._sites)

    def _keeping(self, forward: Callable[..., Any], site: Site, buffer: Tensor) -> Callable[..., Any]:
        def before(*args: Any, **kwargs: Any) -> Any:
            self._write(*_block_inputs(args, kwargs), buffer)
            return forward(*args, **kwargs)

        def after(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            hidden, residual = output if isinstance(output, tuple) else (output, None)
            self._write(hidden, residual, buffer)
            return output

        return before if site.stream == "resid_pre" else after

    def _write(self, hidden: Tensor, residual: Tensor | None, buffer: Tensor) -> None:
        if torch.compiler.is_compiling():
            torch.ops.pilotfish.keep(hidden, residual, buffer)
        elif self.are_wanted:
            _copy(hidden, residual, buffer)  # past the dispatcher, which costs 20 us a call


def _has_bits(states: Tensor) -> bool:
    return states.dtype == torch.bfloat16 and states.device.type == "cpu"


def _bits(states: Tensor) -> UInt16[np.ndarray, "row hidden"]:
    return states.contiguous().view(torch.uint16).numpy()


def _module_of(model: nn.Module, model_type: str, site: Site) -> nn.Module:
    try:
        family = family_named(model_type)
        path = {"attn_out": family.attn_out, "mlp_out": family.mlp_out}.get(site.stream)
        return model.get_submodule(".".join(filter(None, [family.blocks, str(site.layer), path])))
    except (AttributeError, UnknownFamily) as error:
        raise BankMismatch(
            f"the bank reads site {site}, which is not known in vLLM's {type(model).__name__}; known are models of the "
            f"families {', '.join(FAMILIES)} whose modules vLLM names alike. Fit a bank on the site `final` alone"
        ) from error


def _block_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """A block is called with positions, hidden states and residual, in this order or by name."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[1]
    residual = kwargs["residual"] if "residual" in kwargs else args[2] if len(args) > 2 else None
    return hidden, residual
