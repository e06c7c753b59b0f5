"""Runs two scripts in one interpreter, so that TensorFlow is imported only once.

both.py SCRIPT ARGUMENTS... -- SCRIPT ARGUMENTS...
"""

import runpy
import sys

middle = sys.argv.index('--')
for command in (sys.argv[1:middle], sys.argv[middle + 1 :]):
    sys.argv = command
    runpy.run_path(command[0], run_name='__main__')
