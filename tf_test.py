#!/usr/bin/env python3
"""Label an image with a graph that tf_retrain.py has written.

    python3 tf_test.py <path to image> trained_model/unoptimized_model.pb trained_model/labels.txt

prints every label with its score, the best first.
"""

import signal

if __name__ == '__main__':  # Ctrl-C ends the program without a traceback, while the imports below run too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import sys

import numpy as np

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# TensorFlow's libraries write to stderr while they are loaded, whatever the log level.
with open(os.devnull, 'w') as silence, os.fdopen(os.dup(2), 'w') as stderr:
    os.dup2(silence.fileno(), 2)
    try:
        import tensorflow as tf
    finally:
        os.dup2(stderr.fileno(), 2)

from google.protobuf.message import DecodeError
from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig
from tensorflow.io import gfile

tf.get_logger().setLevel('ERROR')

JPEG_DATA_TENSOR_NAME = 'DecodeJpeg/contents:0'


class UserError(Exception):
    """A failure that the user can mend. Its text names the file or flag, and says what to do."""


def load_file(path: str, what: str) -> bytes:
    """Returns a file's contents; raises UserError if it cannot be read."""
    try:
        with gfile.GFile(path, 'rb') as file:
            return file.read()
    except (tf.errors.OpError, UnicodeError) as error:
        raise UserError(f"The {what} '{path}' cannot be read: {getattr(error, 'message', error)}")


def load_labels(path: str) -> list:
    """Returns the labels, one a line of the file, in the order of the graph's classes."""
    try:
        return load_file(path, 'labels file').decode().splitlines()
    except UnicodeDecodeError:
        raise UserError(f"The labels file '{path}' is not text. Name the --output_labels of the training.")


def load_graph(path: str) -> tf.compat.v1.GraphDef:
    """Returns the frozen graph."""
    try:
        graph_def = tf.compat.v1.GraphDef.FromString(load_file(path, 'graph'))
    except DecodeError:
        graph_def = tf.compat.v1.GraphDef()
    if JPEG_DATA_TENSOR_NAME.split(':')[0] not in {node.name for node in graph_def.node}:
        raise UserError(
            f"'{path}' is not a graph with an input {JPEG_DATA_TENSOR_NAME}. Name the --output_graph of the training."
        )
    return graph_def


def run_graph(graph_def: tf.compat.v1.GraphDef, image_data: bytes) -> np.ndarray:
    """Returns the scores of an encoded image, float [classes], from the softmax that ends the graph.

    Raises InvalidArgumentError if the graph cannot decode the image.
    """
    softmaxes = [node.name for node in graph_def.node if node.op == 'Softmax']
    if not softmaxes:
        raise UserError('The graph has no Softmax, so no scores. Name the --output_graph of the training.')
    # Optimising the graph takes longer than running it once without.
    options = tf.compat.v1.GraphOptions(rewrite_options=RewriterConfig(disable_meta_optimizer=True))
    with (
        tf.Graph().as_default(),
        tf.compat.v1.Session(config=tf.compat.v1.ConfigProto(graph_options=options)) as session,
    ):
        tf.import_graph_def(graph_def, name='')
        return session.run(f'{softmaxes[-1]}:0', {JPEG_DATA_TENSOR_NAME: image_data})[0]


def label_image(image: str, graph: str, labels: str) -> None:
    """Prints the labels and scores of an image; raises UserError for what the user can mend."""
    image_data = load_file(image, 'image')
    names = load_labels(labels)
    graph_def = load_graph(graph)
    try:
        scores = run_graph(graph_def, image_data)
    except tf.errors.InvalidArgumentError:
        raise UserError(f"'{image}' is not an image that the graph decodes. Save it as JPEG, PNG or still GIF.")
    except (tf.errors.OpError, ValueError) as error:
        raise UserError(f"'{graph}' cannot be run: {str(error).splitlines()[0]}")
    if len(names) != len(scores):
        raise UserError(
            f"'{labels}' has {len(names)} labels, but '{graph}' has {len(scores)} classes. Name files of one training."
        )
    for index in np.argsort(-scores):
        print(f'{names[index]} (score = {scores[index]:.5f})')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description='Label an image with a graph that tf_retrain.py has written.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='the usual command:\n' + __doc__.split('\n\n')[1],
    )
    parser.add_argument('image', metavar='IMAGE', help='a JPEG, PNG or still GIF file')
    parser.add_argument('graph', metavar='GRAPH', help='the --output_graph of the training')
    parser.add_argument('labels', metavar='LABELS', help='the --output_labels of the training')
    arguments = parser.parse_args()
    try:
        label_image(**vars(arguments))
    except UserError as error:
        sys.exit('ERROR: ' + str(error).replace('\n', ' '))
