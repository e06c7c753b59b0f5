"""Runs tf_retrain.py, and writes to parts.json how many seconds its parts took.

time_parts.py FLAGS...
"""

import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))

import tf_retrain

PARTS = {
    'listing': 'list_images',
    'reading cache files': 'read_bottlenecks',
    'near copies': 'find_near_copies',
    'steps': 'train',
}
seconds = dict.fromkeys(PARTS, 0.0)


def timed(part, function):
    def call(*arguments):
        start = time.perf_counter()
        result = function(*arguments)
        seconds[part] += time.perf_counter() - start
        return result

    return call


for part, name in PARTS.items():
    function = getattr(tf_retrain, name)
    setattr(tf_retrain, name, timed(part, function))
tf_retrain.main(tf_retrain.parse_flags(tf_retrain.create_parser()))
pathlib.Path('parts.json').write_text(json.dumps(seconds))
