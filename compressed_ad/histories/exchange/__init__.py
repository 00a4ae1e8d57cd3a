"""Histories of other programs, read and written."""
