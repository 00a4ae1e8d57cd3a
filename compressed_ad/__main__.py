"""``python -m compressed_ad``: the same as ``cad``."""

import sys

from compressed_ad.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
