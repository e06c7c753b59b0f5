#!/usr/bin/env python3
"""Measure tf_retrain.py, tf_test.py and a SavedModel beside the original's way of doing the same.

    python tests/benchmark.py

prints a markdown table, row by row, in some 30 minutes. --quick takes a minute or two, and only
shows that everything runs; --only=cold,warm measures some rows; --help lists the rows. Photographs,
caches, and a model with the size and structure of the Inception-v3 of 2015 but random weights are
made in a temporary folder, and take 3 GB.

In a row, the original's way and ours take turns, three times, in the same run. The ratio says how
many times faster ours was: the median and the range of the repeats. Memory is in units of 1,024.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import platform
import random
import subprocess
import sys
import tempfile
import time
from statistics import mean, median
from typing import NamedTuple

os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')  # as in the scripts, before NumPy is imported

import numpy as np
import orjson
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import networks

import retrain_serving
import tf_retrain
import tf_test

tf = tf_retrain.tf
v1 = tf.compat.v1


class Sizes(NamedTuple):
    """How much the rows do."""

    repeats: int = 3
    photographs: int = 256  # of 500 x 375
    large_photographs: int = 64  # of 12 megapixels
    labeled_photographs: int = 300
    distorted_images: int = 100  # in a training step
    trained_images: int = 3670  # cached
    steps: int = 4000
    original_steps: int = 100  # of them, done the original's way; the rest is extrapolated
    cached_images: int = 25_000
    computed_images: int = 1000  # without a cache
    listed_files: int = 200_000
    growth_images: int = 100_000  # cached, of 100 classes
    some_classes: int = 1000
    many_classes: int = 10_000


QUICK = Sizes(
    repeats=1,
    photographs=32,
    large_photographs=2,
    labeled_photographs=20,
    distorted_images=8,
    trained_images=500,
    steps=200,
    original_steps=20,
    cached_images=1000,
    computed_images=20,
    listed_files=5000,
    growth_images=600,
    some_classes=10,
    many_classes=60,
)
PROGRAMS = ROOT / 'tests/programs'
TRAINING = ROOT / 'tf_retrain.py'
CLASSES = ('daisy', 'dandelion', 'roses', 'sunflowers', 'tulips')
BOTTLENECK, BOTTLENECK_SIZE = 'pool_3/_reshape:0', 2048
SIDE = 299  # of the image that the network takes
DISTORTION = 10  # per cent, of each kind


# The original's way


def distort_as_the_original(jpeg_data):
    """Returns the tensor of a distorted image."""
    image = tf.cast(tf.image.decode_jpeg(jpeg_data, channels=3), tf.float32)
    margin = 1 + DISTORTION / 100
    scale = margin * v1.random_uniform([], 1, margin)
    side = tf.cast(scale * SIDE, tf.int32)
    image = v1.image.resize_bilinear(image[tf.newaxis], tf.stack([side, side]))
    image = v1.random_crop(image[0], [SIDE, SIDE, 3])
    image = tf.image.random_flip_left_right(image)
    brightness = v1.random_uniform([], 2 - margin, margin)
    return (image * brightness)[tf.newaxis]


class OriginalNetwork:
    """The graph as it was published in a v1 Session, which takes one image at a time."""

    def __init__(self, graph_def):
        with tf.Graph().as_default() as graph:
            tf.import_graph_def(graph_def, name='')
            self.jpeg_data = v1.placeholder(tf.string)
            self.distorted = distort_as_the_original(self.jpeg_data)
        self.session = v1.Session(graph=graph)

    def compute_bottlenecks(self, paths):
        for path in paths:
            jpeg_data = pathlib.Path(path).read_bytes()
            self.session.run(BOTTLENECK, {'DecodeJpeg/contents:0': jpeg_data})

    def compute_distorted_bottlenecks(self, paths):
        for path in paths:
            jpeg_data = pathlib.Path(path).read_bytes()
            image = self.session.run(self.distorted, {self.jpeg_data: jpeg_data})
            self.session.run(BOTTLENECK, {'ResizeBilinear:0': image})


class OriginalLayer:
    """The final layer in a v1 graph, with all summaries."""

    def __init__(self):
        self.bottlenecks = v1.placeholder(tf.float32, [None, BOTTLENECK_SIZE])
        self.classes = v1.placeholder(tf.int64, [None])
        weights = v1.truncated_normal([BOTTLENECK_SIZE, len(CLASSES)], stddev=0.001)
        weights = v1.Variable(weights)
        biases = v1.Variable(tf.zeros([len(CLASSES)]))
        logits = tf.matmul(self.bottlenecks, weights) + biases
        truth = tf.one_hot(self.classes, len(CLASSES))
        losses = tf.nn.softmax_cross_entropy_with_logits(truth, logits)
        self.cross_entropy = tf.reduce_mean(losses)
        is_right = tf.equal(tf.argmax(logits, 1), self.classes)
        self.accuracy = tf.reduce_mean(tf.cast(is_right, tf.float32))
        self.summarize_variable(weights)
        self.summarize_variable(biases)
        v1.summary.histogram('pre_activations', logits)
        v1.summary.histogram('activations', tf.nn.softmax(logits))
        v1.summary.scalar('cross_entropy', self.cross_entropy)
        v1.summary.scalar('accuracy', self.accuracy)
        self.summaries = v1.summary.merge_all()
        self.train_step = v1.train.GradientDescentOptimizer(0.01).minimize(self.cross_entropy)

    def summarize_variable(self, variable):
        mean, variance = tf.nn.moments(tf.reshape(variable, [-1]), 0)
        v1.summary.scalar('mean', mean)
        v1.summary.scalar('stddev', tf.sqrt(variance))
        v1.summary.scalar('max', tf.reduce_max(variable))
        v1.summary.scalar('min', tf.reduce_min(variable))
        v1.summary.histogram('histogram', variable)

    def draw(self, cache_paths):
        """Reads a batch of the cache files of each class."""
        classes = random.choices(range(len(CLASSES)), k=100)
        bottlenecks = [read_bottleneck(random.choice(cache_paths[index])) for index in classes]
        return {self.bottlenecks: bottlenecks, self.classes: classes}


def read_bottleneck(path):
    """Parses a cache file as the original does."""
    with open(path) as file:
        return [float(number) for number in file.read().split(',')]


def train_as_the_original(cache_paths, logs, steps):
    """Trains on cache files, from disk, with all summaries every step; returns seconds per step."""
    with tf.Graph().as_default() as graph, v1.Session() as session:
        layer = OriginalLayer()
        session.run(v1.global_variables_initializer())
        train_log = v1.summary.FileWriter(logs / 'train', graph)
        val_log = v1.summary.FileWriter(logs / 'val')
        start = time.perf_counter()
        for step in range(steps):
            batch = layer.draw(cache_paths)
            summaries, _ = session.run([layer.summaries, layer.train_step], batch)
            train_log.add_summary(summaries, step)
            if step % 10 == 0:
                session.run([layer.accuracy, layer.cross_entropy], batch)
                batch = layer.draw(cache_paths)
                summaries, _ = session.run([layer.summaries, layer.accuracy], batch)
                val_log.add_summary(summaries, step)
        return (time.perf_counter() - start) / steps


def list_as_the_original(image_dir):
    """Lists the images by a glob for each of the four endings, and splits them."""
    for folder, _, _ in tf.io.gfile.walk(image_dir):
        for extension in ('jpg', 'jpeg', 'JPG', 'JPEG'):
            for path in tf.io.gfile.glob(os.path.join(folder, f'*.{extension}')):
                tf_retrain.get_set(path, 10, 10)


# Our way


def parse(*arguments):
    return tf_retrain.parse_flags(tf_retrain.create_parser(), list(arguments))


def compute_bottlenecks(paths, backbone):
    batches = tf_retrain.compute_bottlenecks(np.arange(len(paths)), paths, backbone)
    assert sum(len(rows) for rows, *_ in batches) == len(paths)


def create_images(files, classes, labels, sets='training'):
    sets = np.broadcast_to(sets, len(files))
    return tf_retrain.Images('', list(labels), np.array(files, object), classes, sets)


def distort(paths, backbone):
    """Computes the bottlenecks of a training step with all four distortions."""
    flags = ['--image_dir=unused', '--how_many_training_steps=1', '--flip_left_right']
    flags += [f'--random_{name}={DISTORTION}' for name in ('crop', 'scale', 'brightness')]
    flags = parse(*flags, f'--train_batch_size={len(paths)}')
    images = create_images(paths, np.zeros(len(paths), int), ['all'])
    ((rows, _),) = tf_retrain.draw_batches(images, None, backbone, flags)
    assert len(rows) == len(paths)


def create_head(backbone):
    layer = tf_retrain.FinalLayer(backbone.bottleneck_size, len(CLASSES), 0.01, [1, 2])
    return tf_retrain.Head(layer, CLASSES)


def read_cache(paths):
    return tf_retrain.read_bottlenecks(list(map(str, paths)), BOTTLENECK_SIZE)[0]


# What the rows share


class Row(NamedTuple):
    """The cells of a row of the table."""

    what: str
    original: str = ''
    ours: str = ''
    ratio: str = ''
    spread: str = ''


class Finished(NamedTuple):
    """What a process took."""

    code: int
    seconds: float
    peak: int  # of its resident bytes


def run_process(*arguments, **options):
    """Runs Python with these arguments; returns what that took."""
    command = [sys.executable, PROGRAMS / 'launch.py', sys.executable, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=True, **options)
    finished = Finished(*json.loads(process.stdout))
    if finished.code:
        sys.exit(f'{arguments[0]} ended with exit code {finished.code}:\n{process.stderr}')
    return finished


def time_process(*arguments):
    return run_process(*arguments).seconds


def timed(work, *arguments):
    """Returns a function that does the call and returns its seconds."""

    def seconds():
        start = time.perf_counter()
        work(*arguments)
        return time.perf_counter() - start

    return seconds


show_seconds = '{:.2f} s'.format
show_share = '{:.0%}'.format


def show_megabytes(size):
    return f'{size / 2**20:,.0f} MB'


def span(values, show):
    return f'{show(min(values))} to {show(max(values))}'


def compare(what, original, ours, show=show_seconds, show_ratio='{:.2f}'.format):
    """Returns a row from the seconds of all repeats."""
    ratios = np.divide(original, ours)
    medians = show(median(original)), show(median(ours))
    return Row(what, *medians, show_ratio(median(ratios)), span(ratios, show_ratio))


def compare_speed(what, timings, count, **options):
    """Returns a row that shows the seconds of `count` images as images per second."""
    return compare(what, *timings, lambda seconds: f'{count / seconds:.1f} images/s', **options)


def write_photograph(path, seed, width, height):
    """Writes gradients and noise, a JPEG file of about the size that photographs have."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 256, [height // 25, width // 25, 3], np.uint8)
    gradients = Image.fromarray(colors).resize([width, height], Image.Resampling.BICUBIC)
    pixels = gradients + rng.normal(0, 4, [height, width, 1])
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


class Workbench:
    """The sizes, and what more than one row needs: made in a folder when first asked for."""

    def __init__(self, folder, flags):
        self.folder = folder
        self.flags = flags
        self.sizes = QUICK if flags.quick else Sizes()

    @functools.cached_property
    def graph(self):
        path = self.folder / 'inception' / tf_retrain.MODEL_GRAPH_NAME
        path.parent.mkdir()
        path.write_bytes(networks.build_inception().SerializeToString())
        return path

    @functools.cached_property
    def original(self):
        network = OriginalNetwork(v1.GraphDef.FromString(self.graph.read_bytes()))
        network.compute_bottlenecks(self.photographs(2))  # the first run takes longer
        return network

    @functools.cached_property
    def backbone(self):
        return self.load_backbone('float32')

    @functools.cached_property
    def bfloat16(self):
        return self.load_backbone('bfloat16')

    def load_backbone(self, precision):
        flags = f'--model_dir={self.graph.parent}', f'--precision={precision}'
        backbone = tf_retrain.load_backbone(parse('--image_dir=unused', *flags))
        paths = self.photographs(len(backbone.networks) * tf_retrain.NETWORK_BATCH_SIZE)
        compute_bottlenecks(paths, backbone)  # the first run takes longer
        return backbone

    def alternate(self, *ways, warm_up=0):
        """Calls all ways in turn, again and again; returns what each of them returned."""
        repeats = [[way() for way in ways] for _ in range(warm_up + self.sizes.repeats)]
        return list(zip(*repeats[warm_up:], strict=True))

    def photographs(self, count, width=500, height=375, different=32):
        """Returns paths of JPEG files, of which so many are different."""
        folder = self.folder / f'{width} x {height}'
        folder.mkdir(exist_ok=True)
        paths = [folder / f'{seed}.jpg' for seed in range(different)]
        for seed, path in enumerate(paths):
            if not path.exists():
                write_photograph(path, seed, width, height)
        return [str(paths[i % different]) for i in range(count)]

    def whole_batches(self, size):
        """Returns paths of photographs, as many as fill batches of a size."""
        return self.photographs(max(1, self.sizes.photographs // size) * size)

    def images(self, count, classes=CLASSES):
        """Returns a folder with images in data/, and a cache to learn from in bottlenecks/."""
        folder = self.folder / f'{count} images'
        if folder.exists():
            return folder
        photographs = self.photographs(32)
        rng = np.random.default_rng(0)
        each = min(20, math.ceil(count / len(classes)))
        for index, name in enumerate(classes):
            data, cache = folder / 'data' / name, folder / 'bottlenecks' / name
            data.mkdir(parents=True)
            cache.mkdir(parents=True)
            values = rng.exponential(0.3, [each, BOTTLENECK_SIZE]).astype(np.float32)
            contents = [orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) for row in values]
            for image in range(index, count, len(classes)):
                os.link(photographs[image % 32], data / f'{image}.jpg')
                (cache / f'{image}.jpg.txt').write_bytes(contents[image % each].strip(b'[]'))
        return folder

    def training(self, images, steps, bottlenecks='bottlenecks'):
        """Returns the flags of tf_retrain.py for a folder that images() has made."""
        flags = {
            'image_dir': images / 'data',
            'model_dir': self.graph.parent,
            'bottleneck_dir': images / bottlenecks,
            'output_graph': images / 'graph.pb',
            'output_labels': images / 'labels.txt',
            'summaries_dir': images / 'logs',
            'how_many_training_steps': steps,
        }
        return [f'--{name}={value}' for name, value in flags.items()]


# The rows


def ordinary_photographs(bench):
    paths = bench.photographs(bench.sizes.photographs)
    return f'bottlenecks of {len(paths)} photographs of 500 x 375', paths


def large_photographs(bench):
    paths = bench.photographs(bench.sizes.large_photographs, 4000, 3000, 2)
    return f'bottlenecks of {len(paths)} photographs of 4000 x 3000', paths


def distorted_photographs(bench):
    paths = bench.photographs(bench.sizes.distorted_images)
    return f'a training step with distortions, batch of {len(paths)}', paths


def compare_bottlenecks(bench, what, paths):
    original = timed(bench.original.compute_bottlenecks, paths)
    timings = bench.alternate(original, timed(compute_bottlenecks, paths, bench.backbone))
    return compare_speed(what, timings, len(paths))


def compare_precisions(bench, what, paths, work=compute_bottlenecks):
    ways = [timed(work, paths, backbone) for backbone in (bench.backbone, bench.bfloat16)]
    timings = bench.alternate(*ways, warm_up=1)
    return compare_speed(f'float32, and bfloat16: {what}', timings, len(paths))


def compare_with_bottlenecks(bench, what, paths, work):
    """Returns which share of the speed of our bottlenecks another work on the same images has."""
    timings = bench.alternate(timed(compute_bottlenecks, paths, bench.backbone), timed(work))
    return compare_speed(what, timings, len(paths), show_ratio=show_share)


def compare_memory(bench, what, counts, measure):
    """Returns a row from the peaks, in bytes, with few and with many images."""
    few, many = counts
    peaks = bench.alternate(*(functools.partial(measure, count) for count in counts))
    each = np.subtract(peaks[1], peaks[0]) / 1024 / (many - few)
    what = f'peak memory of tf_retrain.py, {few:,} and {many:,} images, {what}'
    medians = ' and '.join(show_megabytes(median(of)) for of in peaks)
    ours = f'{medians}: {median(each):.1f} KB per image'
    return Row(what, ours=ours, spread=span(each, '{:.1f} KB'.format))


def cold(bench):
    """Bottlenecks of ordinary photographs: a Session.run each, or batches and a folded graph."""
    return compare_bottlenecks(bench, *ordinary_photographs(bench))


def large(bench):
    """Bottlenecks of photographs of 12 megapixels: decoding takes longer than the network."""
    return compare_bottlenecks(bench, *large_photographs(bench))


def bfloat16(bench):
    """Bottlenecks of ordinary photographs, ours in float32 and in bfloat16."""
    return compare_precisions(bench, *ordinary_photographs(bench))


def bfloat16_large(bench):
    """Bottlenecks of photographs of 12 megapixels, ours in float32 and in bfloat16."""
    return compare_precisions(bench, *large_photographs(bench))


def distortions(bench):
    """A training step with all four distortions: two Session.runs per image, or batches."""
    what, paths = distorted_photographs(bench)
    original = timed(bench.original.compute_distorted_bottlenecks, paths)
    timings = bench.alternate(original, timed(distort, paths, bench.backbone), warm_up=1)
    return compare(what, *timings)


def bfloat16_distortions(bench):
    """A training step with all four distortions, ours in float32 and in bfloat16."""
    return compare_precisions(bench, *distorted_photographs(bench), distort)


def decoding(bench):
    """What reading and decoding leave of the network's speed on batches decoded before."""
    size = tf_retrain.NETWORK_BATCH_SIZE
    paths = bench.whole_batches(size)
    images = tf.random.uniform([size, SIDE, SIDE, 3], 0, 255)
    batch = tf.data.Dataset.from_tensors((tf.range(size), tf.range(size), images))
    batches = batch.repeat(len(paths) // size)
    alone = timed(lambda: list(tf_retrain.run_networks(bench.backbone.networks, batches)))
    timings = bench.alternate(alone, timed(compute_bottlenecks, paths, bench.backbone))
    what = f'decoding hidden: ours on decoded batches, and on {len(paths)} photographs of 500 x 375'
    return compare_speed(what, timings, len(paths), show_ratio=show_share)


def import_alone():
    return time_process('-c', 'import tensorflow')


def warm(bench):
    """A whole run of tf_retrain.py, all cached. The original reads the batch of each step."""
    sizes = bench.sizes
    images = bench.images(sizes.trained_images)
    cache_paths = [sorted((images / 'bottlenecks' / name).iterdir()) for name in CLASSES]
    flags = bench.training(images, sizes.steps)
    step, ours, imports = bench.alternate(
        lambda: train_as_the_original(cache_paths, images / 'original_logs', sizes.original_steps),
        lambda: time_process(TRAINING, *flags),
        import_alone,
    )
    what = (
        f'tf_retrain.py, {sizes.trained_images:,} cached images, {sizes.steps:,} steps, whole '
        f'process (import tensorflow alone: {show_seconds(median(imports))}; the original is '
        f'extrapolated from {sizes.original_steps} steps of {1000 * median(step):.1f} ms)'
    )
    return compare(what, np.multiply(step, sizes.steps), ours)


def parse_cache(paths):
    """Reads a cache in Python, as the original does."""
    return np.array([read_bottleneck(path) for path in paths], np.float32)


def cache(bench):
    """Reading a whole cache into an array, parsed in Python or our way."""
    folder = bench.images(bench.sizes.cached_images) / 'bottlenecks'
    paths = sorted(folder.glob('*/*.txt'))
    timings = bench.alternate(timed(parse_cache, paths), timed(read_cache, paths))
    return compare(f'reading the cache of {len(paths):,} images', *timings)


def bfloat16_accuracy(bench):
    """The accuracy on 60 % of the images, in float32 and in bfloat16; needs --images."""
    if not bench.flags.images:
        return Row('bfloat16_accuracy: skipped, as --images is not given')
    folder = bench.folder / 'accuracy'
    flags = bench.training(folder, 500)
    flags += [f'--image_dir={bench.flags.images}', f'--model_dir={bench.flags.model_dir}']
    flags += ['--architecture=mobilenet_1.0_224', '--testing_percentage=60']
    cells = []
    for precision in ('float32', 'bfloat16'):
        accuracies = []
        for seed in range(5):
            variant = f'--precision={precision}', f'--random_seed={seed}'
            run_process(TRAINING, *flags, *variant)
            test = json.loads((folder / 'graph.pb.json').read_text())['test']
            accuracies.append(test['accuracy'])
        cells.append(f'{mean(accuracies):.1%} ({span(accuracies, "{:.1%}".format)})')
    what = f'accuracy on {test["images"]} images, mobilenet_1.0_224, 5 seeds'
    return Row(f'float32, and bfloat16: {what}', *cells)


def label(bench):
    """A whole run of tf_test.py, or of a plain port of the original, for one photograph."""
    labels = bench.folder / 'labels.txt'
    labels.write_text(''.join(f'class {index}\n' for index in range(1008)))
    arguments = bench.photographs(1)[0], bench.graph, labels
    original, ours, imports = bench.alternate(
        lambda: time_process(PROGRAMS / 'label_as_the_original.py', *arguments),
        lambda: time_process(ROOT / 'tf_test.py', *arguments),
        import_alone,
    )
    what = (
        f'tf_test.py, one photograph, model of {bench.graph.stat().st_size / 1e6:.0f} MB, whole '
        f'process (import tensorflow alone: {show_seconds(median(imports))})'
    )
    return compare(what, original, ours)


def labeling(bench):
    """Labeling a folder with tf_test.py, beside our bottlenecks of the same; without the import."""
    paths = bench.photographs(bench.sizes.labeled_photographs, different=300)
    head = create_head(bench.backbone)
    graph_def = tf_retrain.create_frozen_graph(bench.backbone, head, 'final_result')
    graph = tf_test.Graph(graph_def, ['final_result'], [])
    what = 'tf_retrain.py computes bottlenecks, and tf_test.py labels'
    what += f', {len(paths)} photographs of 500 x 375'
    return compare_with_bottlenecks(
        bench, what, paths, lambda: list(tf_test.score_images(graph, paths))
    )


def cached_table(count):
    """Returns a table of images without files, and bottlenecks of them, no two alike."""
    rng = np.random.default_rng(0)
    classes = np.sort(rng.integers(len(CLASSES), size=count))
    files = [f'{index}.jpg' for index in range(count)]
    sets = rng.choice(tf_retrain.SETS, count, p=[0.8, 0.1, 0.1])
    values = rng.exponential(0.3, [count, BOTTLENECK_SIZE]).astype(np.float32)
    return create_images(files, classes, CLASSES, sets), values


def near_copies(bench):
    """The search for near copies among few and many images."""
    counts = bench.sizes.trained_images, bench.sizes.cached_images
    ways = [timed(tf_retrain.find_near_copies, *cached_table(count)) for count in counts]
    timings = bench.alternate(*ways)
    what = 'search for near copies among {:,} and {:,} images'.format(*counts)
    ours = ' and '.join(show_seconds(median(seconds)) for seconds in timings)
    return Row(what, ours=ours, spread=span(timings[1], show_seconds))


def rank_by_own_score(scores, classes):
    """Returns the score of each image for its own label: the lowest first are suspects."""
    return scores[np.arange(len(scores)), classes]


def rank_by_confident_learning(scores, classes):
    """Returns the same, but those first that are off the diagonal of confident learning."""
    means = [scores[classes == index, index].mean() for index in range(scores.shape[1])]
    above = np.where(scores >= means, scores, 0)
    is_off_diagonal = above.any(axis=1) & (above.argmax(axis=1) != classes)
    return rank_by_own_score(scores, classes) + ~is_off_diagonal


def read_flowers(folder):
    """Returns a table of cached flowers, all for training, and their bottlenecks."""
    paths = sorted(pathlib.Path(folder).glob('*/*.txt'))
    labels, classes = np.unique([path.parent.name for path in paths], return_inverse=True)
    return create_images([path.stem for path in paths], classes, labels), read_cache(paths)


def find_changed(images, bottlenecks, seed):
    """Changes 2 % of the labels at random; returns which share each way of ranking finds."""
    rng = np.random.default_rng(100 + seed)
    count = len(images.files)
    changed = rng.choice(count, count // 50, replace=False)
    classes = images.classes.copy()
    classes[changed] += rng.integers(1, len(images.labels), len(changed))
    classes %= len(images.labels)
    flags = '--image_dir=unused', '--how_many_training_steps=2000', f'--random_seed={seed}'
    images = dataclasses.replace(images, classes=classes)
    scores = np.zeros([count, len(images.labels)], np.float32)
    for rows, found in tf_retrain.cross_validate(images, bottlenecks, parse(*flags)):
        scores[rows] = found
    shares = []
    for rank in (rank_by_confident_learning, rank_by_own_score):
        first = np.argsort(rank(scores, classes))[: len(changed)]
        shares.append(np.isin(first, changed).mean())
    return shares


def suspects(bench):
    """Which share of labels changed at random is among as many suspects; needs --flowers."""
    if not bench.flags.flowers:
        return Row('suspects: skipped, as --flowers is not given')
    images, bottlenecks = read_flowers(bench.flags.flowers)
    shares = np.array([find_changed(images, bottlenecks, seed) for seed in range(5)])
    what = (
        f'of labels of 2 % of {len(images.files):,} flowers changed at random, those among as many '
        'suspects, by the off-diagonal of confident learning (left) and by the score of the own '
        'label (right)'
    )
    return Row(what, *map(show_share, shares.mean(axis=0)), '', span(shares[:, 1], show_share))


def embed_folder(bench, folder):
    """Returns a table of the images in class folders, and their bottlenecks by a MobileNet."""
    flags = [f'--image_dir={folder}', f'--model_dir={bench.flags.model_dir}']
    flags += ['--architecture=mobilenet_1.0_224', f'--bottleneck_dir={bench.folder}/embedded']
    flags = parse(*flags)
    images = tf_retrain.list_images(flags)
    backbone = tf_retrain.load_backbone(flags)
    return tf_retrain.cache_bottlenecks(images, backbone, flags)[:2]


def accept(images, bottlenecks, foreign, seed):
    """Returns which share of foreign and of new own images `--unknown 5` accepts.

    A fifth of the own images, at random, is kept out of the training: these are the new ones.
    """
    is_new = np.random.default_rng(seed).uniform(size=len(images.files)) < 0.2
    flags = parse('--image_dir=unused', f'--random_seed={seed}')
    kept = dataclasses.replace(images.keep(~is_new), sets=np.full(sum(~is_new), 'training'))
    familiarity = tf_retrain.find_familiarity(kept, bottlenecks[~is_new], flags)
    return [
        (tf_retrain.compute_familiarity(tf.constant(rows), familiarity).numpy() > 0.05).mean()
        for rows in (foreign, bottlenecks[is_new])
    ]


def familiarity(bench):
    """Foreign and own images that --unknown 5 accepts; needs --images and --foreign."""
    if not (bench.flags.images and bench.flags.foreign):
        return Row('familiarity: skipped, as --images or --foreign is not given')
    images, own = embed_folder(bench, bench.flags.images)
    _, foreign = embed_folder(bench, bench.flags.foreign)
    shares = np.array([accept(images, own, foreign, seed) for seed in range(10)])
    what = (
        f'with --unknown 5, of {len(foreign)} foreign images (left) and of new ones of '
        f'{len(own)} own (right), those that are accepted; mobilenet_1.0_224, 10 draws'
    )
    return Row(what, *map(show_share, shares.mean(axis=0)), '', span(shares[:, 0], show_share))


def run_in_parts(bench, count, classes, steps):
    """Does a whole run on cached images; returns what it did, and what that took, in words."""
    folder = bench.images(count, [f'class {index:05}' for index in range(classes)])
    flags = bench.training(folder, steps)
    took = run_process(PROGRAMS / 'time_parts.py', *flags, cwd=folder)
    parts = json.loads((folder / 'parts.json').read_text())
    listed = ', '.join(f'{name} {seconds:.1f} s' for name, seconds in parts.items())
    what = f'tf_retrain.py, {count:,} cached images, {classes:,} classes, {steps:,} steps'
    return what, f'{took.seconds:.1f} s ({listed}), {show_megabytes(took.peak)}'


def growth(bench):
    """A whole run on very many cached images of 100 classes, with the seconds of its parts."""
    what, took = run_in_parts(bench, bench.sizes.growth_images, 100, bench.sizes.steps)
    return Row(what, ours=took)


def compare_layers(bench, classes):
    """Returns a row on training steps of both kinds of layers, and on a whole run."""
    steps = 20
    rng = np.random.default_rng(0)
    batch = rng.exponential(0.3, [100, BOTTLENECK_SIZE]).astype(np.float32)
    truth = rng.integers(classes, size=100)

    def train(layer):
        for _ in range(steps):
            layer.train(batch, truth)

    kinds = tf_retrain.FinalLayer, tf_retrain.WideLayer
    layers = [kind(BOTTLENECK_SIZE, classes, 0.01, [1, 2]) for kind in kinds]
    timings = bench.alternate(*(timed(train, layer) for layer in layers), warm_up=1)
    run, took = run_in_parts(bench, 3 * classes, classes, 200)
    what = f'a training step with {classes:,} classes, in NumPy and in TensorFlow ({run}: {took})'
    return compare(what, *timings, lambda seconds: f'{1000 * seconds / steps:.1f} ms')


def some_classes(bench):
    """A training step with a thousand classes, and a whole run with its memory."""
    return compare_layers(bench, bench.sizes.some_classes)


def many_classes(bench):
    """The same with ten thousand."""
    return compare_layers(bench, bench.sizes.many_classes)


def memory_warm(bench):
    """The peak memory of tf_retrain.py with few and with many cached images."""

    def measure(count):
        return run_process(TRAINING, *bench.training(bench.images(count), 50)).peak

    return compare_memory(bench, 'all cached', [100, bench.sizes.cached_images], measure)


def memory_cold(bench):
    """The same, none cached: by default 400 fill the buffers ahead of the network."""
    many = bench.sizes.computed_images

    def measure(count):
        empty = tempfile.mkdtemp(dir=bench.folder)
        return run_process(TRAINING, *bench.training(bench.images(count), 50, empty)).peak

    return compare_memory(bench, 'none cached', [many * 2 // 5, many], measure)


def serving(bench):
    """Batches of encoded photographs through the SavedModel, beside our bottlenecks of the same."""
    size = 32
    paths = bench.whole_batches(size)
    classifier = retrain_serving.Classifier(bench.backbone, create_head(bench.backbone))
    folder = str(bench.folder / 'saved_models' / '1')
    model = tf.saved_model.load(retrain_serving.write_saved_model(classifier, folder))
    predict = model.signatures['serving_default']
    images = list(map(tf.io.read_file, paths))
    batches = [tf.stack(images[start : start + size]) for start in range(0, len(paths), size)]
    predict(image=batches[0])  # the first run takes longer
    what = 'SavedModel: tf_retrain.py computes bottlenecks, and the SavedModel scores'
    what += f', of {len(paths)} photographs in batches of {size}'
    return compare_with_bottlenecks(
        bench, what, paths, lambda: [predict(image=batch) for batch in batches]
    )


def listing(bench):
    """Listing the images of ten classes, and splitting them into sets."""
    folder, count = bench.folder / 'listed', bench.sizes.listed_files
    for index in range(10):
        (folder / str(index)).mkdir(parents=True)
    for index in range(count):
        (folder / str(index % 10) / f'{index}.jpg').touch()
    ours = timed(tf_retrain.list_images, parse(f'--image_dir={folder}'))
    timings = bench.alternate(timed(list_as_the_original, str(folder)), ours)
    return compare(f'listing and splitting {count:,} files', *timings)


BOTTLENECK_ROWS = cold, decoding, large, bfloat16, bfloat16_large
TRAINING_ROWS = distortions, bfloat16_distortions, bfloat16_accuracy, warm, cache, growth, listing
CLASSES_ROWS = some_classes, many_classes
OTHER_ROWS = label, labeling, serving, memory_warm, memory_cold, near_copies, suspects, familiarity
ROWS = {row.__name__: row for row in (*BOTTLENECK_ROWS, *TRAINING_ROWS, *CLASSES_ROWS, *OTHER_ROWS)}


def parse_flags():
    rows = '\n'.join(f'  {name:20} {row.__doc__}' for name, row in ROWS.items())
    parser = argparse.ArgumentParser(
        description='Measure tf_retrain.py and tf_test.py beside the original.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f'rows:\n{rows}',
    )
    add = parser.add_argument
    add('--quick', action='store_true', help='small sizes: shows that it runs, measures nothing')
    add('--only', metavar='NAME,NAME', default=','.join(ROWS), help='measure these rows only')
    add('--flowers', metavar='DIR', help="bottlenecks of the tutorial's flowers, for suspects")
    add(
        '--images', metavar='DIR', help='photographs in class folders, for accuracy and familiarity'
    )
    add('--foreign', metavar='DIR', help='photographs of other things, for familiarity')
    add('--model_dir', metavar='DIR', default='inception', help='the MobileNet for them')
    flags = parser.parse_args()
    flags.only = flags.only.split(',')
    for name in set(flags.only) - set(ROWS):
        parser.error(f'argument --only: no row {name}; there are {", ".join(ROWS)}')
    return flags


def main(flags):
    """Prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(pathlib.Path(folder), flags)
        versions = f'TensorFlow {tf.__version__}, Python {platform.python_version()}'
        print(f'{os.cpu_count()} cores, {versions}, repeats: {bench.sizes.repeats}\n')
        print("| what | original's way | ours | ratio (median) | spread |")
        print('| --- | --- | --- | --- | --- |', flush=True)
        for name, row in ROWS.items():
            if name in flags.only:
                print(f'| {" | ".join(row(bench))} |', flush=True)


if __name__ == '__main__':
    main(parse_flags())
