"""A configured process of vLLM in; the same process, monitored, out."""

from __future__ import annotations

import functools
import logging
from typing import Any

from pilotfish.errors import SettingError
from pilotfish.vllm.compat import SHARED, V1, V2, check_symbols, check_version, wrapped
from pilotfish.vllm.plan import KEY, Plan, make_plan
from pilotfish.vllm.settings import read_settings

logger = logging.getLogger(__name__)
_done: list[bool] = []


def install() -> None:
    """Wraps what every process of vLLM may call: the configuration, the scheduler's class, the worker, the front end.

    Raises:
        SettingError: this vLLM cannot be monitored as asked; vLLM then does not start.
    """
    if _done:
        return
    import vllm
    from vllm.config.scheduler import SchedulerConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.gpu_worker import Worker

    from pilotfish.vllm import frontend, scheduler, serving, worker

    settings = read_settings()
    check_version(vllm.__version__)
    check_symbols(SHARED)

    def planned(create: Any) -> Any:
        @functools.wraps(create)
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            config = create(self, *args, **kwargs)
            check_symbols(V2 if config.use_v2_model_runner else V1)
            plan = make_plan(read_settings(), config)
            config.additional_config = {**_plain(config.additional_config), KEY: plan.as_dict()}
            logger.info("monitoring the %s with %s", plan.reader, ", ".join(plan.banks))
            return config

        return create_engine_config

    wrapped(EngineArgs, "create_engine_config", planned)
    wrapped(SchedulerConfig, "get_scheduler_cls", scheduler.monitored)
    wrapped(Worker, "load_model", worker.read_after_loading)
    frontend.install()
    serving.install(settings)
    _done.append(True)


def _plain(additional: Any) -> dict[str, Any]:
    if not isinstance(additional, dict):
        raise SettingError("vLLM's additional_config is no table here; leave it out, or give a table")
    return additional


__all__ = ["Plan", "install"]
