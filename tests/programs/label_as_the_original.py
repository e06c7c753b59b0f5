"""The original's tf_test.py, with the names that TensorFlow 2 has for what it calls.

label_as_the_original.py IMAGE GRAPH LABELS
"""

import sys

import tensorflow as tf

image, graph, labels = sys.argv[1:]
tf.compat.v1.disable_eager_execution()
image_data = tf.io.gfile.GFile(image, 'rb').read()
names = [line.rstrip() for line in tf.io.gfile.GFile(labels)]
with tf.io.gfile.GFile(graph, 'rb') as file:
    graph_def = tf.compat.v1.GraphDef()
    graph_def.ParseFromString(file.read())
    tf.import_graph_def(graph_def, name='')
with tf.compat.v1.Session() as session:
    scores = session.run('softmax:0', {'DecodeJpeg/contents:0': image_data})[0]
    for index in scores.argsort()[::-1]:
        print(f'{names[index]} (score = {scores[index]:.5f})')
