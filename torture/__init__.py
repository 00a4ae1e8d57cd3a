"""Injects faults into every stage, file and input, and says what comes of them: ``python -m torture``."""
