"""From history files to trained weights: sequences, transforms, windows, checkpoints, the loop."""
