"""Every figure, as a matplotlib ``Figure``."""
