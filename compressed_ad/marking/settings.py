"""Which marker, and its call."""

from __future__ import annotations

from pydantic import Field

from compressed_ad.settings import Count, Fraction, FreeParameters, Settings


class MarkerSettings(Settings):
    """How steps of the histories are marked."""

    marker: str = Field("threshold", description="marker (cad list markers), or module:attribute")
    on_policy_threshold: Fraction | None = Field(
        None, description="minimum probability of a marked action; default: the marker's (threshold: 0.7)"
    )
    compression_window: Count | None = Field(
        None, description="minimum length of a marked segment in steps; default: the marker's (threshold: 10)"
    )
    params: FreeParameters = Field(default_factory=dict, description="other parameters of the marker")
