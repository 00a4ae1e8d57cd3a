"""Configurations, run directories, and the stages from histories to a report."""
