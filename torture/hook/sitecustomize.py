"""Python imports this at its start where this folder is on the path: arms the fault in worker processes."""

import os

from torture.faults import VARIABLE, arm

arm(os.environ.get(VARIABLE, ""))
