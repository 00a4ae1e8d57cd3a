"""The command line ``cad``."""
