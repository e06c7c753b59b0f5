"""Runs a command, and prints its exit code, its seconds and its peak resident size.

launch.py COMMAND ...

A process of its own does that, as Linux counts for a child what its parent held before the exec.
"""

import json
import resource
import subprocess
import sys
import time

start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([code, seconds, peak if sys.platform == 'darwin' else peak * 1024]))
