"""Trains up to the COUNT-th call of a function of tf_retrain.py, and waits there for a signal.

pause.py FUNCTION COUNT FLAGS...
"""

import itertools
import operator
import sys
import time
from unittest import mock

import tf_retrain

name, count = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
function = operator.attrgetter(name)(tf_retrain)
calls = itertools.count(1)


def pause(*arguments, **options):
    if next(calls) == count:
        print('Paused.')
        while True:
            time.sleep(0.1)
    return function(*arguments, **options)


with mock.patch(f'tf_retrain.{name}', pause):
    tf_retrain.run(tf_retrain.main, tf_retrain.parse_flags(tf_retrain.create_parser()))
