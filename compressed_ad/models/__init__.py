"""Models: ``MODEL[name](config)``, and rules of what leaves a context. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from compressed_ad.registry import Registry, makes, takes

if TYPE_CHECKING:
    from compressed_ad.models.ad import AD
    from compressed_ad.models.segments import SegmentEvents

MODEL: Registry[type[AD]] = Registry(
    "model",
    {
        "AD": "compressed_ad.models.ad:AD",
        "CompressedAD": "compressed_ad.models.compressed_ad:CompressedAD",
        "CompressedADv2": "compressed_ad.models.compressed_ad:CompressedAD",
        "GistAD": "compressed_ad.models.compressed_ad:GistAD",
        "MarkedAttentionAD": "compressed_ad.models.compressed_ad:MarkedAttentionAD",
        "RecurrentAD": "compressed_ad.models.recurrent:RecurrentAD",
    },
    makes("AD", "embed", "loss", "prefill", "load_state_dict", functions=False),
)

SEGMENTS: Registry[Callable[..., SegmentEvents]] = Registry(
    "segmentation",
    {
        name: f"compressed_ad.models.segments:{name}"
        for name in ("episode", "fruitless", "marks", "thin", "random")
    },
    takes("token", "every"),
)
"""Rules that say where segments of a context close; ``segments`` in a model's settings names one."""
