"""Task families: sets of MDPs that share spaces and horizon."""
