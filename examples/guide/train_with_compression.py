"""Step 2 of the guide: a transformer is trained on the marked histories that step 1 has left.

python examples/guide/train_with_compression.py [any option of cad train]

It leaves ``runs/CompressedAD-darkroom-seed0/best_model.pt`` in the folder in which you are. Stop it at any
time: the same command continues. The settings are those of ``config/model/ad_dr.yaml``; ``--model mine.yaml``
takes another file, and ``--model.model AD`` trains the baseline.
"""

import sys

from compressed_ad import cad

config = {}
# config['lr'] = 0.001  # and so on: every setting of a model file

if __name__ == "__main__":
    settings = [f"--model.{key}={value}" for key, value in config.items()]
    sys.exit(cad("train", "--resume", *settings, *sys.argv[1:]))
