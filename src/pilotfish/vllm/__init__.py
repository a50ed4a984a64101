"""vLLM's forward passes in; every token scored, judged and reported by vLLM itself out.

A plugin that is inert unless `PILOTFISH_VLLM` names a settings file. What comes first needs no vLLM and is tested
without it: `align` (rows of a pass), `cache` (channels by KV slot), `track` (a request's scores and its policy), `wire`
(between processes), `record` (an answer as the client is told of it). The rest touches vLLM: `plugin`, `compat`,
`worker`, `tap_v1`, `tap_v2`, `scheduler`, `frontend`.
"""

from pilotfish.vllm.settings import VllmSettings, read_settings

__all__ = ["VllmSettings", "read_settings"]
