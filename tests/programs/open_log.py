"""Opens a log file, whose name is an argument and the number of this process, and keeps it open."""

import os
import sys

with open(f'{sys.argv[1]}{os.getpid()}', 'w') as file:
    print(file.name, flush=True)
    sys.stdin.read()
