"""Source algorithms, whose learning is recorded."""
