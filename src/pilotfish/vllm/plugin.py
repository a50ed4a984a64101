"""What vLLM calls in each of its processes. Nothing is imported, and nothing changed, unless it is configured.

vLLM logs an import that fails and goes on without the plugin, but it ends when `register` raises. So all that may fail
happens in there: asked to monitor, it monitors or does not start.
"""

from __future__ import annotations

from pilotfish.vllm.settings import is_configured


def register() -> None:
    """The entry point of the group `vllm.general_plugins`; may be called more than once."""
    if is_configured():
        from pilotfish.vllm.install import install

        install()
