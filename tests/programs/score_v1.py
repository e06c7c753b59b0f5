"""Prints scores and familiarity of images by TensorFlow 1.15, a line of JSON each.

score_v1.py GRAPH IMAGE ...
"""

import json
import sys

import tensorflow as tf


def read(path):
    with open(path, 'rb') as file:
        return file.read()


graph_def = tf.compat.v1.GraphDef.FromString(read(sys.argv[1]))
tf.import_graph_def(graph_def, name='')
with tf.compat.v1.Session() as session:
    for path in sys.argv[2:]:
        outputs = ['final_result:0', 'familiarity:0']
        scores, familiarity = session.run(outputs, {'DecodeJpeg/contents:0': read(path)})
        print(json.dumps([*scores[0].tolist(), float(familiarity[0])]))
