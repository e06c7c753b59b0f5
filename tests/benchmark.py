#!/usr/bin/env python3
"""Measure tf_retrain.py, tf_test.py and a SavedModel beside the original's way of doing the same work.

    python tests/benchmark.py

prints a markdown table, row by row, in some 30 minutes. --quick takes a minute or two, and only shows that everything
runs; --only=cold,warm measures some rows; --help lists the rows and their sizes. Photographs, caches, and a model with
the size and structure of the Inception-v3 of 2015 but random weights are made in a temporary folder, and take 3 GB.

In a row, the original's way and ours take turns, --repeats times, in the same run. The ratio says how many times faster
ours was: the median and the range of the repeats. Memory is in units of 1,024.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import retrain_serving
import tf_retrain
import tf_test

tf = tf_retrain.tf
v1 = tf.compat.v1

# Each size: how much a row does, how much it does with --quick, and what that is.
SIZES = {
    'photographs': (256, 32, 'photographs of 500 x 375 for the rows cold and decoding'),
    'large_photographs': (64, 2, 'photographs of 12 megapixels for the row large'),
    'trained_images': (3670, 500, 'cached images for the row warm'),
    'steps': (4000, 200, 'training steps for the row warm'),
    'original_steps': (
        100,
        20,
        "of them, those done the original's way; the time of the others is extrapolated",
    ),
    'cached_images': (25000, 1000, 'cached images for the rows cache and memory_warm'),
    'distorted_images': (100, 8, 'images in the training step of the row distortions'),
    'computed_images': (1000, 20, 'images without a cache for the row memory_cold'),
    'listed_files': (200000, 5000, 'files for the row listing'),
    'growth_images': (100000, 500, 'cached images of 100 classes for the row growth'),
    'labeled_photographs': (300, 20, 'photographs for the row labeling'),
}
CLASSES = ('daisy', 'dandelion', 'roses', 'sunflowers', 'tulips')
DISTORTIONS = (
    '--flip_left_right',
    '--random_crop=10',
    '--random_scale=10',
    '--random_brightness=10',
)

# Runs a command, and prints its exit code, its seconds and its peak resident size. A process of its own does that, as
# Linux counts for a child what its parent held before the exec.
LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
seconds = time.perf_counter() - start
print(json.dumps([code, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""

# The original's tf_test.py, with the names that TensorFlow 2 has for what it calls.
PLAIN_LABELING = """
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
        print('%s (score = %.5f)' % (names[index], scores[index]))
"""

# Runs tf_retrain.py, and writes how long its parts took.
TIMED_PARTS = f"""
import json, sys, time
sys.path.insert(0, {str(ROOT)!r})
import tf_retrain
parts = {{}}

def timed(name, function):
    def call(*arguments):
        start = time.perf_counter()
        result = function(*arguments)
        parts[name] = parts.get(name, 0) + time.perf_counter() - start
        return result
    return call

for what, name in {{
    'listing': 'list_images', 'reading cache files': 'read_bottlenecks', 'near copies': 'find_near_copies',
    'steps': 'train',
}}.items():
    setattr(tf_retrain, name, timed(what, getattr(tf_retrain, name)))
tf_retrain.main(tf_retrain.parse_flags(tf_retrain.create_parser(), sys.argv[2:]))
json.dump(parts, open('parts.json', 'w'))
"""


# The model


class GraphBuilder:
    """Appends nodes to a GraphDef, and remembers how many channels each has. Its producer version stays 0."""

    def __init__(self) -> None:
        self.graph_def = v1.GraphDef()
        self.channels = {}
        self.rng = np.random.default_rng(0)

    def node(self, name: str, op: str, *inputs: str, **attributes) -> str:
        node = self.graph_def.node.add(name=name, op=op, input=inputs)
        for key, value in attributes.items():
            if isinstance(value, tf.DType):
                node.attr[key].type = value.as_datatype_enum
            elif isinstance(value, list):
                node.attr[key].list.i.extend(value)
            else:
                setattr(
                    node.attr[key],
                    {bool: 'b', int: 'i', float: 'f', bytes: 's'}[type(value)],
                    value,
                )
        return name

    def const(self, name: str, value) -> str:
        tensor = tf.make_tensor_proto(value)
        node = self.graph_def.node.add(name=name, op='Const')
        node.attr['dtype'].type = tensor.dtype
        node.attr['value'].tensor.CopyFrom(tensor)
        return name

    def normal(self, stddev: float, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape, np.float32) * np.float32(stddev)

    def conv(
        self,
        name: str,
        source: str,
        height: int,
        width: int,
        filters: int,
        stride=1,
        padding=b'SAME',
    ) -> str:
        """A convolution, its batch norm, the check of its numbers, and a Relu."""
        depth, norm = self.channels[source], f'{name}/batchnorm'
        weights = self.normal((2 / (height * width * depth)) ** 0.5, height, width, depth, filters)
        inputs = source, self.const(f'{name}/conv2d_params', weights)
        attributes = {
            'strides': [1, stride, stride, 1],
            'padding': padding,
            'use_cudnn_on_gpu': True,
        }
        self.node(f'{name}/Conv2D', 'Conv2D', *inputs, T=tf.float32, **attributes)
        inputs = (
            f'{name}/Conv2D',
            self.const(f'{norm}/moving_mean', self.normal(0.1, filters)),
            self.const(
                f'{norm}/moving_variance', np.abs(self.normal(0.2, filters)) + np.float32(0.8)
            ),
            self.const(f'{norm}/beta', self.normal(0.1, filters)),
            self.const(f'{norm}/gamma', np.ones(filters, np.float32)),
        )
        attributes = {'variance_epsilon': 0.001, 'scale_after_normalization': False}
        self.node(norm, 'BatchNormWithGlobalNormalization', *inputs, T=tf.float32, **attributes)
        self.node(
            f'{name}/CheckNumerics', 'CheckNumerics', norm, T=tf.float32, message=b'batchnorm'
        )
        self.node(
            f'{name}/control_dependency', 'Identity', norm, f'^{name}/CheckNumerics', T=tf.float32
        )
        self.channels[name] = filters
        return self.node(name, 'Relu', f'{name}/control_dependency', T=tf.float32)

    def pool(self, name: str, source: str, op: str, size=3, stride=2, padding=b'VALID') -> str:
        self.channels[name] = self.channels[source]
        window = {
            'ksize': [1, size, size, 1],
            'strides': [1, stride, stride, 1],
            'padding': padding,
        }
        return self.node(name, op, source, T=tf.float32, **window)

    def tower(self, scope: str, source: str, *convs: tuple) -> str:
        """Convolutions one after the other: conv, conv_1, conv_2 ..."""
        for index, conv in enumerate(convs):
            source = self.conv(f'{scope}/conv_{index}' if index else f'{scope}/conv', source, *conv)
        return source

    def pool_tower(self, scope: str, source: str, filters: int, op='AvgPool') -> str:
        return self.tower(
            scope, self.pool(f'{scope}/pool', source, op, 3, 1, b'SAME'), (1, 1, filters)
        )

    def join(self, scope: str, *sources: str) -> str:
        self.channels[f'{scope}/join'] = sum(self.channels[source] for source in sources)
        inputs = self.const(f'{scope}/join/concat_dim', np.int32(3)), *sources
        return self.node(f'{scope}/join', 'Concat', *inputs, T=tf.float32, N=len(sources))


def build_model() -> v1.GraphDef:
    """Returns a graph with the names, ops, wiring and version of the 2015 file and random weights: 994 nodes, 96 MB."""
    g = GraphBuilder()
    half, valid = (2, b'VALID'), (1, b'VALID')
    jpeg = {'channels': 3, 'ratio': 1, 'fancy_upscaling': True}
    jpeg |= {'try_recover_truncated': False, 'acceptable_fraction': 1.0}
    g.node('DecodeJpeg', 'DecodeJpeg', g.const('DecodeJpeg/contents', b''), **jpeg)
    g.node('Cast', 'Cast', 'DecodeJpeg', SrcT=tf.uint8, DstT=tf.float32)
    g.node('ExpandDims', 'ExpandDims', 'Cast', g.const('ExpandDims/dim', np.int32(0)), T=tf.float32)
    size = g.const('ResizeBilinear/size', np.array([299, 299], np.int32))
    g.node('ResizeBilinear', 'ResizeBilinear', 'ExpandDims', size, T=tf.float32)
    g.node('Sub', 'Sub', 'ResizeBilinear', g.const('Sub/y', np.float32(128)), T=tf.float32)
    x = g.node('Mul', 'Mul', 'Sub', g.const('Mul/y', np.float32(1 / 128)), T=tf.float32)
    g.channels[x] = 3

    x = g.conv('conv_1', g.conv('conv', x, 3, 3, 32, *half), 3, 3, 32, *valid)
    x = g.pool('pool', g.conv('conv_2', x, 3, 3, 64), 'MaxPool')
    x = g.conv('conv_4', g.conv('conv_3', x, 1, 1, 80, *valid), 3, 3, 192, *valid)
    x = g.pool('pool_1', x, 'MaxPool')
    for scope, pooled in (('mixed', 32), ('mixed_1', 64), ('mixed_2', 64)):
        conv = g.conv(f'{scope}/conv', x, 1, 1, 64)
        tower = g.tower(f'{scope}/tower', x, (1, 1, 48), (5, 5, 64))
        tower_1 = g.tower(f'{scope}/tower_1', x, (1, 1, 64), (3, 3, 96), (3, 3, 96))
        x = g.join(scope, conv, tower, tower_1, g.pool_tower(f'{scope}/tower_2', x, pooled))
    conv = g.conv('mixed_3/conv', x, 3, 3, 384, *half)
    tower = g.tower('mixed_3/tower', x, (1, 1, 64), (3, 3, 96), (3, 3, 96, *half))
    x = g.join('mixed_3', conv, tower, g.pool('mixed_3/pool', x, 'MaxPool'))
    for scope, wide in (('mixed_4', 128), ('mixed_5', 160), ('mixed_6', 160), ('mixed_7', 192)):
        conv = g.conv(f'{scope}/conv', x, 1, 1, 192)
        tower = g.tower(f'{scope}/tower', x, (1, 1, wide), (1, 7, wide), (7, 1, 192))
        convs = (1, 1, wide), (7, 1, wide), (1, 7, wide), (7, 1, wide), (1, 7, 192)
        tower_1 = g.tower(f'{scope}/tower_1', x, *convs)
        x = g.join(scope, conv, tower, tower_1, g.pool_tower(f'{scope}/tower_2', x, 192))
    tower = g.tower('mixed_8/tower', x, (1, 1, 192), (3, 3, 320, *half))
    tower_1 = g.tower(
        'mixed_8/tower_1', x, (1, 1, 192), (1, 7, 192), (7, 1, 192), (3, 3, 192, *half)
    )
    x = g.join('mixed_8', tower, tower_1, g.pool('mixed_8/pool', x, 'MaxPool'))
    for scope, op in (('mixed_9', 'AvgPool'), ('mixed_10', 'MaxPool')):
        sources = [g.conv(f'{scope}/conv', x, 1, 1, 320)]
        towers = {'tower': [(1, 1, 384)], 'tower_1': [(1, 1, 448), (3, 3, 384)]}
        for name, convs in towers.items():
            tower = g.tower(f'{scope}/{name}', x, *convs)
            sources.append(g.conv(f'{scope}/{name}/mixed/conv', tower, 1, 3, 384))
            sources.append(g.conv(f'{scope}/{name}/mixed/conv_1', tower, 3, 1, 384))
        x = g.join(scope, *sources, g.pool_tower(f'{scope}/tower_2', x, 192, op))

    shape = g.const('pool_3/_reshape/shape', np.array([1, 2048], np.int32))
    x = g.node(
        'pool_3/_reshape', 'Reshape', g.pool('pool_3', x, 'AvgPool', 8, 1), shape, T=tf.float32
    )
    inputs = x, g.const('softmax/weights', g.normal(0.03, 2048, 1008))
    x = g.node(
        'softmax/logits/MatMul',
        'MatMul',
        *inputs,
        T=tf.float32,
        transpose_a=False,
        transpose_b=False,
    )
    biases = g.const('softmax/biases', np.zeros(1008, np.float32))
    g.node(
        'softmax',
        'Softmax',
        g.node('softmax/logits', 'BiasAdd', x, biases, T=tf.float32),
        T=tf.float32,
    )
    return g.graph_def


# The original's way


class OriginalNetwork:
    """The graph as it was published in a v1 Session, which takes one image at a time."""

    def __init__(self, graph_def: v1.GraphDef) -> None:
        flags = tf_retrain.create_parser().parse_args(['--image_dir=unused', *DISTORTIONS])
        with tf.Graph().as_default() as graph:
            tf.import_graph_def(graph_def, name='')
            self.jpeg_data = v1.placeholder(tf.string)
            image = tf.expand_dims(
                tf.cast(tf.image.decode_jpeg(self.jpeg_data, channels=3), tf.float32), 0
            )
            scale = (1 + flags.random_crop / 100) * v1.random_uniform(
                [], 1, 1 + flags.random_scale / 100
            )
            image = v1.image.resize_bilinear(
                image, tf.cast(tf.stack([scale * 299, scale * 299]), tf.int32)
            )
            image = tf.image.random_flip_left_right(
                v1.random_crop(tf.squeeze(image, [0]), [299, 299, 3])
            )
            spread = flags.random_brightness / 100
            self.distorted = tf.expand_dims(
                image * v1.random_uniform([], 1 - spread, 1 + spread), 0
            )
        self.session = v1.Session(graph=graph)

    def compute_bottlenecks(self, paths: list) -> None:
        for path in paths:
            self.session.run(
                'pool_3/_reshape:0', {'DecodeJpeg/contents:0': pathlib.Path(path).read_bytes()}
            )

    def compute_distorted_bottlenecks(self, paths: list) -> None:
        for path in paths:
            image = self.session.run(
                self.distorted, {self.jpeg_data: pathlib.Path(path).read_bytes()}
            )
            self.session.run('pool_3/_reshape:0', {'ResizeBilinear:0': image})


def read_bottleneck(path: str) -> list:
    """Parses a cache file as the original does."""
    with open(path) as file:
        return [float(number) for number in file.read().split(',')]


def train_as_the_original(cache_paths: list, logs: pathlib.Path, steps: int) -> float:
    """Trains on the cache files of each class, from disk, with all summaries every step; returns seconds per step."""

    def draw():
        classes = [random.randrange(len(cache_paths)) for _ in range(100)]
        return {
            bottlenecks: [read_bottleneck(random.choice(cache_paths[index])) for index in classes],
            truth: np.eye(len(cache_paths), dtype=np.float32)[classes],
        }

    with tf.Graph().as_default() as graph, v1.Session() as session:
        bottlenecks, truth = (
            v1.placeholder(tf.float32, [None, 2048]),
            v1.placeholder(tf.float32, [None, len(CLASSES)]),
        )
        weights = v1.Variable(v1.truncated_normal([2048, len(CLASSES)], stddev=0.001))
        biases = v1.Variable(tf.zeros([len(CLASSES)]))
        for variable in (weights, biases):
            v1.summary.scalar('mean', mean := tf.reduce_mean(variable))
            v1.summary.scalar('stddev', tf.sqrt(tf.reduce_mean(tf.square(variable - mean))))
            v1.summary.scalar('max', tf.reduce_max(variable))
            v1.summary.scalar('min', tf.reduce_min(variable))
            v1.summary.histogram('histogram', variable)
        logits = tf.matmul(bottlenecks, weights) + biases
        v1.summary.histogram('pre_activations', logits)
        v1.summary.histogram('activations', tf.nn.softmax(logits))
        cross_entropy = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(truth, logits))
        accuracy = tf.reduce_mean(
            tf.cast(tf.equal(tf.argmax(logits, 1), tf.argmax(truth, 1)), tf.float32)
        )
        v1.summary.scalar('cross_entropy', cross_entropy)
        v1.summary.scalar('accuracy', accuracy)
        merged = v1.summary.merge_all()
        train_step = v1.train.GradientDescentOptimizer(0.01).minimize(cross_entropy)
        session.run(v1.global_variables_initializer())
        with (
            v1.summary.FileWriter(logs / 'train', graph) as train_log,
            v1.summary.FileWriter(logs / 'val') as val_log,
        ):
            start = time.perf_counter()
            for step in range(steps):
                batch = draw()
                train_log.add_summary(session.run([merged, train_step], batch)[0], step)
                if step % 10 == 0:
                    session.run([accuracy, cross_entropy], batch)
                    val_log.add_summary(session.run([merged, accuracy], draw())[0], step)
            return (time.perf_counter() - start) / steps


def list_as_the_original(image_dir: str) -> None:
    """Lists the images by a glob for each of the four endings, and splits them."""
    for folder, _, _ in tf.io.gfile.walk(image_dir):
        for extension in ('jpg', 'jpeg', 'JPG', 'JPEG'):
            for path in tf.io.gfile.glob(os.path.join(folder, f'*.{extension}')):
                tf_retrain.get_set(path, 10, 10)


# What the rows share


def run_process(*arguments, **options) -> tuple:
    """Runs Python with these arguments; returns the seconds and the peak resident bytes of that process."""
    command = [sys.executable, '-c', LAUNCHER, sys.executable, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=True, **options)
    code, duration, peak = json.loads(process.stdout)
    if code:
        sys.exit(f'{arguments[0]} ended with exit code {code}:\n{process.stderr}')
    return duration, peak * (1 if sys.platform == 'darwin' else 1024)


def import_tensorflow() -> float:
    """Returns the seconds of a process that does nothing but import TensorFlow."""
    return run_process('-c', 'import tensorflow')[0]


def compute_bottlenecks(paths: list, backbone: tf_retrain.Backbone) -> None:
    """Computes bottlenecks our way."""
    done = sum(len(rows) for rows, _ in tf_retrain.compute_bottlenecks(paths, backbone, None, None))
    assert done == len(paths)


def timed(work, *arguments):
    """Returns a function that does the call and returns its seconds."""

    def seconds():
        start = time.perf_counter()
        work(*arguments)
        return time.perf_counter() - start

    return seconds


def alternate(repeats: int, *ways) -> list:
    """Calls all ways in turn, `repeats` times; returns the list of what each returned."""
    return list(zip(*[[way() for way in ways] for _ in range(repeats)], strict=True))


def span(values: list, show) -> str:
    return f'{show(min(values))} to {show(max(values))}'


def row(
    what: str, original: list, ours: list, show='{:.2f} s'.format, show_ratio='{:.2f}'.format
) -> list:
    """Returns the cells of a row from the seconds of all repeats."""
    ratios = [a / b for a, b in zip(original, ours, strict=True)]
    cells = (show(statistics.median(original)), show(statistics.median(ours)))
    return [what, *cells, show_ratio(statistics.median(ratios)), span(ratios, show_ratio)]


def speed_row(what: str, original: list, ours: list, count: int, **options) -> list:
    """Returns the cells of a row that shows the seconds of `count` images as images per second."""
    return row(what, original, ours, lambda seconds: f'{count / seconds:.1f} images/s', **options)


class Workbench:
    """The sizes, and what more than one row needs: made in a temporary folder when first asked for."""

    def __init__(self, folder: pathlib.Path, flags: argparse.Namespace) -> None:
        self.folder, self.flags = folder, flags

    @functools.cached_property
    def graph(self) -> pathlib.Path:
        path = self.folder / 'inception' / tf_retrain.MODEL_GRAPH_NAME
        path.parent.mkdir()
        path.write_bytes(build_model().SerializeToString())
        return path

    @functools.cached_property
    def original(self) -> OriginalNetwork:
        network = OriginalNetwork(v1.GraphDef.FromString(self.graph.read_bytes()))
        network.compute_bottlenecks(self.photographs(2))  # the first run takes longer
        return network

    @functools.cached_property
    def backbone(self) -> tf_retrain.Backbone:
        return self.load_backbone()

    @functools.cached_property
    def bfloat16(self) -> tf_retrain.Backbone:
        return self.load_backbone('--precision=bfloat16')

    def load_backbone(self, *flags: str) -> tf_retrain.Backbone:
        arguments = ['--image_dir=unused', f'--model_dir={self.graph.parent}', *flags]
        backbone = tf_retrain.load_backbone(
            tf_retrain.parse_flags(tf_retrain.create_parser(), arguments)
        )
        compute_bottlenecks(
            self.photographs(len(backbone.networks) * tf_retrain.NETWORK_BATCH_SIZE), backbone
        )
        return backbone

    def photographs(self, count: int, width=500, height=375, different=32) -> list:
        """Returns paths of JPEG files of gradients and noise, of about the size that photographs have."""
        folder = self.folder / f'{width} x {height}'
        folder.mkdir(exist_ok=True)
        paths = [str(folder / f'{index}.jpg') for index in range(different)]
        for index, path in enumerate(paths):
            if not os.path.exists(path):
                rng = np.random.default_rng(index)
                colors = Image.fromarray(
                    rng.integers(0, 256, [height // 25, width // 25, 3], np.uint8)
                )
                gradients = np.asarray(colors.resize([width, height], Image.Resampling.BICUBIC))
                pixels = gradients + rng.normal(0, 4, [height, width, 1])
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        return list(itertools.islice(itertools.cycle(paths), count))

    def images(self, count: int, classes: tuple = CLASSES) -> pathlib.Path:
        """Returns a folder with `count` images in data/, and a cache of numbers that can be learned in bottlenecks/."""
        folder = self.folder / f'{count} images'
        rng = np.random.default_rng(0)
        for index, name in enumerate(classes if not folder.exists() else ()):
            (folder / 'data' / name).mkdir(parents=True)
            (folder / 'bottlenecks' / name).mkdir(parents=True)
            values = rng.exponential(0.3, [20, tf_retrain.BOTTLENECK[1]]).astype(np.float32)
            values[:, index :: len(classes)] *= np.float32(1.2)
            contents = [','.join(map(str, numbers)) for numbers in values]
            for image in range(index, count, len(classes)):
                os.link(self.photographs(32)[image % 32], folder / 'data' / name / f'{image}.jpg')
                (folder / 'bottlenecks' / name / f'{image}.jpg.txt').write_text(
                    contents[image % 20]
                )
        return folder

    def training(self, images: pathlib.Path, steps: int, bottlenecks='bottlenecks') -> list:
        """Returns the arguments for Python that run tf_retrain.py on a folder that images() has made."""
        flags = {
            'image_dir': images / 'data',
            'model_dir': self.graph.parent,
            'bottleneck_dir': images / bottlenecks,
        }
        flags |= {'output_graph': images / 'graph.pb', 'output_labels': images / 'labels.txt'}
        flags |= {'summaries_dir': images / 'logs', 'how_many_training_steps': steps}
        return [
            str(ROOT / 'tf_retrain.py'),
            *(f'--{name}={value}' for name, value in flags.items()),
        ]


# The rows


def cold(bench: Workbench) -> list:
    """Bottlenecks of ordinary photographs: a Session.run each, or batches through the folded graph."""
    return bottlenecks_row(bench, '500 x 375', bench.photographs(bench.flags.photographs))


def large(bench: Workbench) -> list:
    """Bottlenecks of photographs of 12 megapixels, where decoding takes longer than the network."""
    return bottlenecks_row(
        bench, '4000 x 3000', bench.photographs(bench.flags.large_photographs, 4000, 3000, 2)
    )


def bottlenecks_row(bench: Workbench, size: str, paths: list) -> list:
    original = timed(bench.original.compute_bottlenecks, paths)
    timings = alternate(
        bench.flags.repeats, original, timed(compute_bottlenecks, paths, bench.backbone)
    )
    return speed_row(f'bottlenecks of {len(paths)} photographs of {size}', *timings, len(paths))


def decoding(bench: Workbench) -> list:
    """What reading and decoding leave of the speed that our network has on batches decoded before."""
    size = tf_retrain.NETWORK_BATCH_SIZE
    count = max(1, bench.flags.photographs // size) * size
    photographs = [tf.io.decode_jpeg(tf.io.read_file(path), 3) for path in bench.photographs(size)]
    images = tf.stack(
        [
            tf_retrain.resize_bilinear(image[tf.newaxis], bench.backbone.pixels.size)[0]
            for image in photographs
        ]
    )
    batches = tf.data.Dataset.from_tensors((tf.range(size), images)).repeat(count // size)
    whole = timed(compute_bottlenecks, bench.photographs(count), bench.backbone)
    alone = timed(lambda: list(tf_retrain.run_networks(bench.backbone.networks, batches)))
    timings = alternate(bench.flags.repeats, alone, whole)
    what = f'decoding hidden: ours on decoded batches, and on {count} photographs of 500 x 375'
    return speed_row(what, *timings, count, show_ratio='{:.0%}'.format)


def warm(bench: Workbench) -> list:
    """A whole run of tf_retrain.py with everything cached. The original reads and parses the batch of each step."""
    count, steps, original_steps = (
        bench.flags.trained_images,
        bench.flags.steps,
        bench.flags.original_steps,
    )
    images = bench.images(count)
    cache_paths = [sorted((images / 'bottlenecks' / name).iterdir()) for name in CLASSES]
    original, ours, imports = alternate(
        bench.flags.repeats,
        lambda: (
            train_as_the_original(cache_paths, images / 'original_logs', original_steps) * steps
        ),
        lambda: run_process(*bench.training(images, steps))[0],
        import_tensorflow,
    )
    what = f'tf_retrain.py, {count:,} cached images, {steps:,} steps, whole process (import tensorflow alone: '
    what += f'{statistics.median(imports):.2f} s; the original is extrapolated from {original_steps} steps of '
    return row(what + f'{1000 * statistics.median(original) / steps:.1f} ms)', original, ours)


def cache(bench: Workbench) -> list:
    """Reading a whole cache into an array, parsed in Python or our way."""
    paths = sorted(
        map(str, (bench.images(bench.flags.cached_images) / 'bottlenecks').glob('*/*.txt'))
    )

    def parse_in_python():
        bottlenecks = np.empty([len(paths), tf_retrain.BOTTLENECK[1]], np.float32)
        for index, path in enumerate(paths):
            bottlenecks[index] = read_bottleneck(path)

    timings = alternate(
        bench.flags.repeats, timed(parse_in_python), timed(tf_retrain.read_bottlenecks, paths, 2048)
    )
    return row(f'reading the cache of {len(paths):,} images', *timings)


def distort(paths: list, backbone: tf_retrain.Backbone) -> None:
    """Computes the bottlenecks of a training step with all four distortions, our way."""
    files, rows = np.array(paths, object), np.arange(len(paths))
    images = tf_retrain.Images(
        '', ['all'], files, np.zeros(len(paths), int), np.full(len(paths), 'training')
    )
    distort = tf_retrain.create_distortion(
        (True, 10, 10, 10), backbone.pixels.size, np.array([1, 2], np.int32)
    )
    ((found, _),) = tf_retrain.compute_distorted(iter([rows]), images, backbone, distort)
    assert len(found) == len(rows)


def distortions(bench: Workbench) -> list:
    """The bottlenecks of a training step with all four distortions: two Session.runs per image, or batches."""
    paths = bench.photographs(bench.flags.distorted_images)
    original = timed(bench.original.compute_distorted_bottlenecks, paths)
    timings = alternate(bench.flags.repeats + 1, original, timed(distort, paths, bench.backbone))
    after_warm_up = (seconds[1:] for seconds in timings)
    return row(f'a training step with distortions, batch of {len(paths)}', *after_warm_up)


def bfloat16_row(bench: Workbench, what: str, work, paths: list) -> list:
    timings = alternate(
        bench.flags.repeats + 1,
        timed(work, paths, bench.backbone),
        timed(work, paths, bench.bfloat16),
    )
    return speed_row(
        f'float32, and bfloat16: {what}', *(seconds[1:] for seconds in timings), len(paths)
    )


def bfloat16(bench: Workbench) -> list:
    """Bottlenecks of ordinary photographs, ours in float32 and in bfloat16."""
    paths = bench.photographs(bench.flags.photographs)
    return bfloat16_row(
        bench, f'bottlenecks of {len(paths)} photographs of 500 x 375', compute_bottlenecks, paths
    )


def bfloat16_large(bench: Workbench) -> list:
    """Bottlenecks of photographs of 12 megapixels, ours in float32 and in bfloat16."""
    paths = bench.photographs(bench.flags.large_photographs, 4000, 3000, 2)
    return bfloat16_row(
        bench, f'bottlenecks of {len(paths)} photographs of 4000 x 3000', compute_bottlenecks, paths
    )


def bfloat16_distortions(bench: Workbench) -> list:
    """The bottlenecks of a training step with all four distortions, ours in float32 and in bfloat16."""
    paths = bench.photographs(bench.flags.distorted_images)
    return bfloat16_row(
        bench, f'a training step with distortions, batch of {len(paths)}', distort, paths
    )


def bfloat16_accuracy(bench: Workbench) -> list:
    """The accuracy on 60 % of the images after training on the others, in float32 and in bfloat16; needs --images."""
    if not bench.flags.images:
        return ['bfloat16_accuracy: skipped, as --images is not given', '', '', '', '']
    folder = bench.folder / 'accuracy'
    flags = {
        'image_dir': bench.flags.images,
        'model_dir': bench.flags.model_dir,
        'architecture': 'mobilenet_1.0_224',
    }
    flags |= {
        'bottleneck_dir': folder,
        'summaries_dir': folder / 'logs',
        'output_graph': folder / 'graph.pb',
    }
    flags |= {
        'output_labels': folder / 'labels.txt',
        'testing_percentage': 60,
        'how_many_training_steps': 500,
    }
    accuracies = {'float32': [], 'bfloat16': []}
    for seed, precision in itertools.product(range(5), accuracies):
        arguments = (
            f'--{name}={value}'
            for name, value in {**flags, 'precision': precision, 'random_seed': seed}.items()
        )
        run_process(ROOT / 'tf_retrain.py', *arguments)
        test = json.loads((folder / 'graph.pb.json').read_text())['test']
        accuracies[precision].append(test['accuracy'])
    means = (
        f'{statistics.mean(of):.1%} ({span(of, "{:.1%}".format)})' for of in accuracies.values()
    )
    what = f'float32, and bfloat16: accuracy on {test["images"]} images, {flags["architecture"]}, 5 seeds'
    return [what, *means, '', '']


def label(bench: Workbench) -> list:
    """A whole run of tf_test.py, or of a plain port of the original, for one photograph."""
    labels = bench.folder / 'labels.txt'
    labels.write_text(''.join(f'class {index}\n' for index in range(1008)))
    arguments = bench.photographs(1)[0], bench.graph, labels
    original, ours, imports = alternate(
        bench.flags.repeats,
        lambda: run_process('-c', PLAIN_LABELING, *arguments)[0],
        lambda: run_process(ROOT / 'tf_test.py', *arguments)[0],
        import_tensorflow,
    )
    what = f'tf_test.py, one photograph, model of {bench.graph.stat().st_size / 1e6:.0f} MB, whole process'
    return row(
        f'{what} (import tensorflow alone: {statistics.median(imports):.2f} s)', original, ours
    )


def labeling(bench: Workbench) -> list:
    """Labeling a folder with tf_test.py, beside our bottlenecks of the same photographs. Without the import."""
    paths = bench.photographs(bench.flags.labeled_photographs, different=300)
    layer = tf_retrain.FinalLayer(
        bench.backbone.bottleneck_size, len(CLASSES), 0.01, np.array([1, 2])
    )
    graph = tf_retrain.create_frozen_graph(bench.backbone, layer, 'final_result')
    alone = timed(compute_bottlenecks, paths, bench.backbone)
    timings = alternate(
        bench.flags.repeats, alone, timed(lambda: list(tf_test.score_images(graph, paths)))
    )
    what = f'tf_retrain.py computes bottlenecks, and tf_test.py labels, {len(paths)} photographs of 500 x 375'
    return speed_row(what, *timings, len(paths), show_ratio='{:.0%}'.format)


def cached_table(count: int) -> tuple:
    """Returns a table of images without files, and bottlenecks of them, no two alike."""
    rng = np.random.default_rng(0)
    classes = np.sort(rng.integers(len(CLASSES), size=count))
    files = np.array([f'{CLASSES[of]}/{i}.jpg' for i, of in enumerate(classes)], object)
    sets = rng.choice(['training', 'validation', 'testing'], count, p=[0.8, 0.1, 0.1])
    values = rng.exponential(0.3, [count, tf_retrain.BOTTLENECK[1]]).astype(np.float32)
    return tf_retrain.Images('', list(CLASSES), files, classes, sets), values


def near_copies(bench: Workbench) -> list:
    """The search for near copies among few and many images."""
    tables = [
        cached_table(count) for count in (bench.flags.trained_images, bench.flags.cached_images)
    ]
    timings = alternate(
        bench.flags.repeats, *(timed(tf_retrain.find_near_copies, *table) for table in tables)
    )
    counts = ' and '.join(f'{len(images.files):,}' for images, _ in tables)
    few, many = (f'{statistics.median(seconds):.2f} s' for seconds in timings)
    return [
        f'search for near copies among {counts} images',
        '',
        f'{few} and {many}',
        '',
        span(timings[1], '{:.2f} s'.format),
    ]


def suspects(bench: Workbench) -> list:
    """Which share of labels changed at random is found among as many suspects; needs --flowers."""
    if not bench.flags.flowers:
        return ['suspects: skipped, as --flowers is not given', '', '', '', '']
    paths = sorted(pathlib.Path(bench.flags.flowers).glob('*/*.txt'))
    labels = sorted({path.parent.name for path in paths})
    true = np.array([labels.index(path.parent.name) for path in paths])
    files = np.array([f'{path.parent.name}/{path.stem}' for path in paths], object)
    bottlenecks, _ = tf_retrain.read_bottlenecks(list(map(str, paths)), tf_retrain.BOTTLENECK[1])
    plain, confident = [], []
    for seed in range(5):
        rng = np.random.default_rng(100 + seed)
        changed = rng.choice(len(true), len(true) // 50, replace=False)
        classes = true.copy()
        classes[changed] = (classes[changed] + rng.integers(1, len(labels), len(changed))) % len(
            labels
        )
        images = tf_retrain.Images('', labels, files, classes, np.full(len(files), 'training'))
        arguments = [
            '--image_dir=unused',
            '--how_many_training_steps=2000',
            f'--random_seed={seed}',
        ]
        flags = tf_retrain.parse_flags(tf_retrain.create_parser(), arguments)
        scores = tf_retrain.cross_validate(images, bottlenecks, flags)
        own = scores[np.arange(len(scores)), classes]
        thresholds = np.array(
            [scores[classes == index, index].mean() for index in range(len(labels))]
        )
        above = np.where(scores >= thresholds, scores, 0)
        off_diagonal = above.any(axis=1) & (above.argmax(axis=1) != classes)
        for found, order in ((plain, own), (confident, np.where(off_diagonal, own, own + 1))):
            found.append(np.isin(np.argsort(order)[: len(changed)], changed).mean())
    ours, other = (f'{statistics.mean(shares):.0%}' for shares in (plain, confident))
    what = f'of labels of 2 % of {len(paths):,} flowers changed at random, those among as many suspects'
    what += ', by the off-diagonal of confident learning (left) and by the score of the own label (right)'
    return [what, other, ours, '', span(plain, '{:.0%}'.format)]


def growth(bench: Workbench) -> list:
    """A whole run on very many cached images of 100 classes, with the seconds of its parts."""
    count, steps = bench.flags.growth_images, bench.flags.steps
    folder = bench.images(count, tuple(f'class {index:02}' for index in range(100)))
    seconds, peak = run_process('-c', TIMED_PARTS, *bench.training(folder, steps), cwd=folder)
    parts = json.loads((folder / 'parts.json').read_text())
    listed = ', '.join(f'{name} {took:.1f} s' for name, took in parts.items())
    ours = f'{seconds:.1f} s ({listed}), {peak / 2**20:,.0f} MB'
    return [
        f'tf_retrain.py, {count:,} cached images, 100 classes, {steps:,} steps',
        '',
        ours,
        '',
        '',
    ]


def memory_warm(bench: Workbench) -> list:
    """The peak memory of tf_retrain.py with few and with many cached images."""
    few, many = 100, bench.flags.cached_images
    commands = [bench.training(bench.images(count), 50) for count in (few, many)]
    repeats = [
        [run_process(*command)[1] for command in commands] for _ in range(bench.flags.repeats)
    ]
    return memory_row(f'{few:,} and {many:,} images, all cached', many - few, repeats)


def memory_cold(bench: Workbench) -> list:
    """The peak memory of tf_retrain.py so far, when it has computed many bottlenecks and when fewer. Linux only."""
    many = bench.flags.computed_images
    few = many * 2 // 5  # by default 400, which fill the buffers ahead of the network
    images = bench.images(many)
    command = [sys.executable, '-u', *bench.training(images, 50, 'computed')]

    def peaks():
        shutil.rmtree(images / 'computed', ignore_errors=True)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            created = (
                line for line in process.stdout if line.startswith('Creating bottleneck at ')
            )
            for count, _ in enumerate(created, 1):
                if count in (few, many):
                    status = pathlib.Path(f'/proc/{process.pid}/status').read_text()
                    yield 1024 * int(re.search(r'VmHWM:\s+(\d+) kB', status)[1])

    repeats = [list(peaks()) for _ in range(bench.flags.repeats)]
    return memory_row(f'{few:,} and {many:,} images of a run, none cached', many - few, repeats)


def memory_row(what: str, difference: int, repeats: list) -> list:
    """Returns the cells of a row from the repeats' two peaks in bytes, of runs that differ by so many images."""
    each = [(many - few) / difference / 1024 for few, many in repeats]
    first, second = (
        f'{statistics.median(peaks) / 2**20:,.0f} MB' for peaks in zip(*repeats, strict=True)
    )
    ours = f'{first} and {second}: {statistics.median(each):.1f} KB per image'
    return [f'peak memory of tf_retrain.py, {what}', '', ours, '', span(each, '{:.1f} KB'.format)]


def serving(bench: Workbench) -> list:
    """Batches of encoded photographs through the SavedModel, beside our bottlenecks of the same photographs."""
    size = 32
    paths = bench.photographs(max(1, bench.flags.photographs // size) * size)
    layer = tf_retrain.FinalLayer(
        bench.backbone.bottleneck_size, len(CLASSES), 0.01, np.array([1, 2])
    )
    folder = str(bench.folder / 'saved_models' / '1')
    classifier = retrain_serving.Classifier(bench.backbone, layer, CLASSES)
    predict = tf.saved_model.load(retrain_serving.write_saved_model(classifier, folder)).signatures[
        'serving_default'
    ]
    batches = [
        tf.stack(list(map(tf.io.read_file, batch))) for batch in np.reshape(paths, [-1, size])
    ]
    predict(image=batches[0])  # the first run takes longer
    alone = timed(compute_bottlenecks, paths, bench.backbone)
    timings = alternate(
        bench.flags.repeats, alone, timed(lambda: [predict(image=batch) for batch in batches])
    )
    what = f'SavedModel: tf_retrain.py computes bottlenecks, and the SavedModel scores, of {len(paths)} photographs'
    return speed_row(
        f'{what} in batches of {size}', *timings, len(paths), show_ratio='{:.0%}'.format
    )


def listing(bench: Workbench) -> list:
    """Listing the images of ten classes, and splitting them into sets."""
    folder, count = bench.folder / 'listed', bench.flags.listed_files
    for index in range(10):
        (folder / f'class {index}').mkdir(parents=True)
    for index in range(count):
        (folder / f'class {index % 10}' / f'{index}.jpg').touch()
    flags = tf_retrain.parse_flags(tf_retrain.create_parser(), [f'--image_dir={folder}'])
    ours = timed(tf_retrain.list_images, flags)
    timings = alternate(bench.flags.repeats, timed(list_as_the_original, str(folder)), ours)
    return row(f'listing and splitting {count:,} files', *timings)


ROWS = (
    cold,
    decoding,
    large,
    bfloat16,
    bfloat16_large,
    distortions,
    bfloat16_distortions,
    bfloat16_accuracy,
    warm,
    cache,
    growth,
    listing,
)
ROWS += (label, labeling, serving, memory_warm, memory_cold, near_copies, suspects)


def parse_flags() -> argparse.Namespace:
    """Parses the command line, and fills in the sizes that it does not give."""
    parser = argparse.ArgumentParser(
        description='Measure tf_retrain.py and tf_test.py beside the original.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='rows:\n'
        + '\n'.join(f'  {measure.__name__:12} {measure.__doc__}' for measure in ROWS),
    )
    names = [measure.__name__ for measure in ROWS]
    parser.add_argument(
        '--repeats',
        metavar='N',
        type=int,
        help='how often each row is measured (default: 3, quick: 1)',
    )
    parser.add_argument(
        '--quick', action='store_true', help='small sizes: shows that it runs, measures nothing'
    )
    parser.add_argument(
        '--flowers',
        metavar='DIR',
        help="bottlenecks of the tutorial's flowers, for the row suspects",
    )
    parser.add_argument(
        '--images',
        metavar='DIR',
        help='photographs in class folders, for the row bfloat16_accuracy',
    )
    parser.add_argument(
        '--model_dir', metavar='DIR', default='inception', help='its MobileNet (default: inception)'
    )
    parser.add_argument('--only', metavar='NAME,NAME', help='measure these rows only')
    for name, (full, quick, what) in SIZES.items():
        parser.add_argument(
            f'--{name}', metavar='N', type=int, help=f'{what} (default: {full}, quick: {quick})'
        )
    flags = parser.parse_args()
    flags.only = flags.only.split(',') if flags.only else names
    if unknown := set(flags.only) - set(names):
        parser.error(
            f'argument --only: no row {", ".join(sorted(unknown))}; there are {", ".join(names)}'
        )
    for name, (full, quick, *_) in {'repeats': (3, 1), **SIZES}.items():
        if getattr(flags, name) is None:
            setattr(flags, name, quick if flags.quick else full)
    return flags


def main(flags: argparse.Namespace) -> None:
    """Prints the table."""
    versions = f'TensorFlow {tf.__version__}, Python {platform.python_version()}'
    print(f'{os.cpu_count()} cores, {versions}, repeats: {flags.repeats}\n')
    print(
        "| what | original's way | ours | ratio (median) | spread |\n| --- | --- | --- | --- | --- |",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(pathlib.Path(folder), flags)
        for measure in tqdm(
            [measure for measure in ROWS if measure.__name__ in flags.only], disable=None
        ):
            tqdm.write(f'| {" | ".join(measure(bench))} |')
            sys.stdout.flush()


if __name__ == '__main__':
    main(parse_flags())
