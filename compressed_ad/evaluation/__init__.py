"""Trained models played and looked into; statistics of what comes of it."""
