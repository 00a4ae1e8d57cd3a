"""Torture: faults injected into every stage, file and input, and what comes of them (``python -m torture``)."""
