"""Models: ``MODEL[name](config)``."""

from compressed_ad.models.ad import AD, MODEL
from compressed_ad.models.compressed_ad import CompressedAD, MarkedAttentionAD

__all__ = ["AD", "MODEL", "CompressedAD", "MarkedAttentionAD"]
