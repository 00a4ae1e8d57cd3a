"""Every figure, as a matplotlib ``Figure``."""

from compressed_ad.errors import UsageError, users_code

with users_code("matplotlib cannot be used", UsageError, advice="; is the variable MPLBACKEND right?"):
    import matplotlib  # noqa: F401  here, before all other imports of it
