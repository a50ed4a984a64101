"""Servers that are processes of their own: what the tests of them share."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from pathlib import Path

START_S = 600


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a server answers; raises with the end of its log when it does not."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
        except OSError:
            time.sleep(1.0)
        else:
            return
    raise AssertionError(log.read_text()[-4000:])
