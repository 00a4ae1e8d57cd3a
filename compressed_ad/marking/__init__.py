"""Markers: pure functions from action probabilities to masks, and what applies, checks and counts them."""
