"""Results as pandas data frames in long form. pandas is an extra, imported when it is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compressed_ad.errors import MissingExtraError

if TYPE_CHECKING:
    from pandas import DataFrame


def long_frame(axes: Mapping[str, Sequence[Any]], values: Mapping[str, Any]) -> DataFrame:
    """One row for each element of the arrays ``values``, with its place along the named ``axes``.

    The arrays have one dimension for each of ``axes``, in order, as long as its labels.
    """
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise MissingExtraError("to_pandas()", "pandas") from error
    places = np.meshgrid(*(np.arange(len(labels)) for labels in axes.values()), indexing="ij")
    columns = {
        name: np.asarray(labels)[place.ravel()]
        for (name, labels), place in zip(axes.items(), places, strict=True)
    }
    return DataFrame(columns | {name: np.asarray(array).ravel() for name, array in values.items()})
