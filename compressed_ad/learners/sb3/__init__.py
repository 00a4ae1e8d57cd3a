"""Stable-Baselines3 as source learners, and a callback that records its runs."""
