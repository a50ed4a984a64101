"""A tensor of the device in, the same on the host out, copied beside whatever the device does next."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor


class HostCopy:
    """One copy under way. On a CPU there is nothing to wait for."""

    def __init__(self, table: Float32[Tensor, "row column"], stream: Any = None) -> None:
        """`stream`: the one to copy on; None waits for the copy at once."""
        self._event: Any = None
        if table.device.type == "cpu" or stream is None:
            self._host = table.cpu()
            return
        self._device = table  # not to be used again before the copy is done
        stream.wait_stream(torch.cuda.current_stream(table.device))
        with torch.cuda.stream(stream):
            self._host = table.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            self._event.record()

    def wait(self) -> Float32[np.ndarray, "row column"]:
        if self._event is not None:
            self._event.synchronize()
            del self._device
            self._event = None
        return self._host.numpy()
