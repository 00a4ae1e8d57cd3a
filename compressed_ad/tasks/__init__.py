"""Task families and environments: built in, adapted, and the protocols that any other one satisfies."""
