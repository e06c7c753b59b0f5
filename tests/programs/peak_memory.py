"""Runs a script, and then prints how much memory it took at most: peak_memory.py SCRIPT ..."""

import resource
import runpy
import sys

sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name='__main__')
finally:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak if sys.platform == 'darwin' else peak * 1024, 'bytes', file=sys.stderr)
