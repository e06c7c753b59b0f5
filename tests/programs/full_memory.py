"""Runs tf_test.py with its arguments, on a machine whose memory is full once the graph runs."""

import pathlib
import runpy
import sys

import tensorflow as tf


def fail(*arguments, **options):
    raise tf.errors.ResourceExhaustedError(None, None, 'OOM when allocating')


tf.compat.v1.Session.run = fail
tf.graph_util.import_graph_def = fail
script = pathlib.Path(__file__).parents[2] / 'tf_test.py'
sys.path.insert(0, str(script.parent))
runpy.run_path(str(script), run_name='__main__')
