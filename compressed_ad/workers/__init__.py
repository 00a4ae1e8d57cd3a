"""Work in several processes, here or on a Ray cluster: one progress, a polite stop, a retry after a death."""

from __future__ import annotations

from compressed_ad.workers.local import WorkerPool
from compressed_ad.workers.on_ray import RayPool
from compressed_ad.workers.pool import (
    THREAD_VARIABLES,
    Parts,
    Pool,
    Report,
    ShouldStop,
    TimedParts,
    never,
    silent,
)

__all__ = [
    "THREAD_VARIABLES",
    "Parts",
    "Pool",
    "RayPool",
    "Report",
    "ShouldStop",
    "TimedParts",
    "WorkerPool",
    "never",
    "open_pool",
    "silent",
]


def open_pool(ray_address: str | None, n_process: int, memory_limit: int | None = None) -> Pool:
    """Workers on this machine, or on the Ray cluster at ``ray_address``, for work within ``memory_limit``."""
    pool = WorkerPool(n_process) if ray_address is None else RayPool(ray_address, n_process)
    pool.memory_limit = memory_limit
    return pool
