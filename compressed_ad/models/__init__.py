"""Models: ``MODEL[name](config)``. Importing this imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressed_ad.registry import Registry, makes

if TYPE_CHECKING:
    from compressed_ad.models.ad import AD

MODEL: Registry[type[AD]] = Registry(
    "model",
    {
        "AD": "compressed_ad.models.ad:AD",
        "CompressedAD": "compressed_ad.models.compressed_ad:CompressedAD",
        "CompressedADv2": "compressed_ad.models.compressed_ad:CompressedAD",
        "MarkedAttentionAD": "compressed_ad.models.compressed_ad:MarkedAttentionAD",
    },
    makes("AD", "embed", "loss", "prefill", "load_state_dict", functions=False),
)
