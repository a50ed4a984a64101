"""A model and sites in; the activations of its last forward pass out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from pilotfish.core import Site
from pilotfish.errors import SettingError
from pilotfish.models import site_module
from pilotfish.taps.hook import hook


class Taps(Mapping[Site, Float[Tensor, "batch token hidden"]]):
    """What the last forward pass had at each site: detached, not copied, in the model's own dtype."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = tuple(sites)
        self._values: dict[Site, Tensor] = {}

    def __getitem__(self, site: Site) -> Float[Tensor, "batch token hidden"]:
        return self._values[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def clear(self) -> None:
        """Lets go of the activations, so that a later look cannot mistake them for a new pass's."""
        self._values.clear()

    def _keep(self, site: Site, value: Tensor) -> None:
        self._values[site] = value.detach()


@contextmanager
def tapped(model: nn.Module, sites: Sequence[Site]) -> Iterator[Taps]:
    """Reads activations at `sites` in every forward pass inside the block; however it ends, no hook outlives it.

    Under a KV cache a pass holds the new tokens only; padding stays where the caller put it.

    Raises:
        SettingError: a site is named twice, or the model has no such layer.
        UnknownFamily: the model has no row in the family table.
    """
    if len(set(sites)) != len(sites):
        raise SettingError(f"a site is named twice in {', '.join(map(str, sites))}; name each once")
    modules = [(site, site_module(model, site)) for site in sites]
    taps = Taps(sites)
    with ExitStack() as hooks:
        for site, module in modules:
            hooks.callback(hook(module, site, partial(taps._keep, site)).remove)
        yield taps
