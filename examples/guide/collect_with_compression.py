"""Step 1 of the guide: PPO learns the tasks of Darkroom, and its learning histories are kept and marked.

python examples/guide/collect_with_compression.py [any option of cad collect]

It leaves ``datasets/history_darkroom_PPO_alg-seed0_compressed.hdf5`` in the folder in which you are.
Stop it at any time: the same command continues. With another threshold or window, it only marks the file
again.
"""

import sys

from compressed_ad import cad

config = {}
# fmt: off
config['on_policy_threshold'] = 0.7   # Probability threshold
config['compression_window'] = 10      # Minimum consecutive steps
# config['n_process'] = 8  # Parallel workers; all cores unless you say how many
# fmt: on

SECTION = {"on_policy_threshold": "marker", "compression_window": "marker", "n_process": "algorithm"}

if __name__ == "__main__":  # which worker processes are not
    settings = [f"--{SECTION[key]}.{key}={value}" for key, value in config.items()]
    sys.exit(cad("collect", "--resume", *settings, *sys.argv[1:]))
