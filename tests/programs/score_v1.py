"""Prints what TensorFlow 1.15 makes of images: a line of JSON each, as score_v1.py GRAPH IMAGE ...

It has the scores, the familiarity, and of a graph with the node `input`, which is that of a
MobileNet, the scores of the image's pixels.
"""

import json
import sys

import tensorflow as tf

INPUT = 'input:0'


def read(path):
    with open(path, 'rb') as file:
        return file.read()


def load(contents, side):
    """Does what the label_image.py of the codelab of 2017 does, with its own graph."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        image = tf.cast(tf.image.decode_jpeg(contents, channels=3), tf.float32)
        resized = tf.compat.v1.image.resize_bilinear(tf.expand_dims(image, 0), [side, side])
        return session.run(tf.divide(tf.subtract(resized, [127.5]), [127.5]))


graph_def = tf.compat.v1.GraphDef.FromString(read(sys.argv[1]))
tf.import_graph_def(graph_def, name='')
has_input = 'input' in [node.name for node in graph_def.node]
with tf.compat.v1.Session() as session:
    for path in sys.argv[2:]:
        outputs = ['final_result:0', 'familiarity:0']
        scores, familiarity = session.run(outputs, {'DecodeJpeg/contents:0': read(path)})
        result = [scores[0].tolist(), float(familiarity[0])]
        if has_input:
            side = session.graph.get_tensor_by_name(INPUT).shape[1]
            pixels = load(read(path), side)
            result.append(session.run('final_result:0', {INPUT: pixels})[0].tolist())
        print(json.dumps(result))
