"""A module and a site in; a hook that sees, or rewrites, the hidden states there out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pilotfish.core import Site


def hook(module: nn.Module, site: Site, visit: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Calls `visit` with the hidden states in each forward pass; what it returns, unless None, takes their place."""
    if site.stream == "resid_pre":

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
            written = visit(args[0] if args else kwargs["hidden_states"])
            if written is None:
                return None
            return ((written, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": written})

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> Any:
        written = visit(output[0] if isinstance(output, tuple) else output)
        return (written, *output[1:]) if isinstance(output, tuple) and written is not None else written

    return module.register_forward_hook(after)
