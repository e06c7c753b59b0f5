#!/usr/bin/env python3
"""Train an image classifier on your own photographs.

    python3 tf_retrain.py --image_dir=data/ --model_dir=inception/ --bottleneck_dir=bottlenecks/ \\
        --output_graph=trained_model/unoptimized_model.pb --output_labels=trained_model/labels.txt

--image_dir holds one folder of photographs per class. Each photograph goes once through
Inception-v3 (Szegedy et al., https://arxiv.org/abs/1512.00567) up to the layer before the last. The
2,048 numbers found there, the photograph's bottleneck, are cached on disk. A new last layer is then
trained on the bottlenecks, which takes seconds. main() names the steps of a run; the functions
before it stand in the same order.
"""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import json
import math
import multiprocessing.pool
import os
import re
import shlex
import signal
import socket
import sys
import tarfile
import time
import urllib.request
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

MOBILENET_WIDTHS = ('1.0', '0.75', '0.50', '0.25')
MOBILENET_SIDES = (224, 192, 160, 128)  # pixels
MOBILENET_SIZES = [f'{width}_{side}' for width in MOBILENET_WIDTHS for side in MOBILENET_SIDES]
ARCHITECTURES = ['inception_v3', *(f'mobilenet_{size}' for size in MOBILENET_SIZES)]
DEFAULT = ' (default: %(default)s)'


def checked(convert: Callable, is_valid: Callable, rule: str) -> Callable:
    """Returns an argparse type: a value for which is_valid holds. `rule` describes such values."""

    def parse(text: str) -> object:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not is_valid(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, not '{text}'")
        return value

    return parse


PERCENTAGE = checked(int, lambda value: 0 <= value <= 100, 'a whole number from 0 to 100')
COUNT = checked(int, lambda value: value >= 0, 'a whole number, 0 or more')
SIZE = checked(int, lambda value: value >= 1, 'a whole number, 1 or more')
SIZE_OR_ALL = checked(int, lambda value: value >= 1 or value == -1, '1 or more, or -1 for all')
RATE = checked(float, lambda value: 0 < value < math.inf, 'a number above 0, such as 0.05')
ADDRESS = checked(str, re.compile(r'grpc://.+:\d+').fullmatch, 'grpc://HOST:PORT')
# The pattern is that of tensorflow/core/framework/node_def_util.cc.
NODE_PATTERN = re.compile(r'[A-Za-z0-9.][A-Za-z0-9_.\\/-]*')
NODE_NAME = checked(str, NODE_PATTERN.fullmatch, 'of letters, digits, _ . - /')


def architecture(text: str) -> str:
    """The argparse type of --architecture."""
    if text in ARCHITECTURES:
        return text
    likely = difflib.get_close_matches(text, ARCHITECTURES) or ARCHITECTURES[:2]
    raise argparse.ArgumentTypeError(f"there is no '{text}'; did you mean {' or '.join(likely)}?")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('data')
    group.add_argument(
        '--image_dir',
        metavar='DIR',
        required=True,
        help='folder with one folder of images per class',
    )
    group.add_argument(
        '--testing_percentage',
        metavar='P',
        type=PERCENTAGE,
        default=10,
        help='percent of the images for the final test' + DEFAULT,
    )
    group.add_argument(
        '--validation_percentage',
        metavar='P',
        type=PERCENTAGE,
        default=10,
        help='percent of the images for validation' + DEFAULT,
    )
    group.add_argument(
        '--strict',
        action='store_true',
        help='stop at an image that cannot be read instead of leaving it out',
    )
    group.add_argument(
        '--print_duplicates',
        action='store_true',
        help='name all near copies among the images, not only ten pairs',
    )
    group.add_argument(
        '--find_suspects',
        metavar='N',
        type=COUNT,
        default=0,
        help='name the N images whose label is most doubtful' + DEFAULT,
    )
    group.add_argument(
        '--bottleneck_dir',
        metavar='DIR',
        default='/tmp/bottleneck',
        help='cache of the bottlenecks' + DEFAULT,
    )
    group.add_argument(
        '--data_service',
        metavar='grpc://HOST:PORT',
        type=ADDRESS,
        help='tf.data service that shares the work',
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('model')
    group.add_argument(
        '--model_dir',
        metavar='DIR',
        default='/tmp/imagenet',
        help='folder of the pretrained model' + DEFAULT,
    )
    group.add_argument(
        '--precision',
        choices=['float32', 'bfloat16'],
        default='float32',
        help='format of the numbers that the network computes with' + DEFAULT,
    )
    network = group.add_mutually_exclusive_group()
    network.add_argument(
        '--architecture',
        metavar='NAME',
        type=architecture,
        default='inception_v3',
        help='inception_v3, or mobilenet_<width>_<side> with a width of 1.0, 0.75, 0.50 or 0.25 '
        'and a side of 224, 192, 160 or 128 pixels' + DEFAULT,
    )
    network.add_argument(
        '--tfhub_module',
        metavar='HANDLE',
        help='URL or folder of an image feature vector of Keras, Kaggle or TensorFlow Hub',
    )


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('training')
    group.add_argument(
        '--how_many_training_steps',
        metavar='N',
        type=COUNT,
        default=4000,
        help='training steps' + DEFAULT,
    )
    group.add_argument(
        '--learning_rate',
        metavar='RATE',
        type=RATE,
        default=0.01,
        help='size of the steps' + DEFAULT,
    )
    group.add_argument(
        '--train_batch_size',
        metavar='N',
        type=SIZE,
        default=100,
        help='images per training step' + DEFAULT,
    )
    group.add_argument(
        '--validation_batch_size',
        metavar='N',
        type=SIZE_OR_ALL,
        default=100,
        help='images per validation; -1 uses all' + DEFAULT,
    )
    group.add_argument(
        '--test_batch_size',
        metavar='N',
        type=SIZE_OR_ALL,
        default=-1,
        help='images in the final test; -1 uses all' + DEFAULT,
    )
    group.add_argument(
        '--eval_step_interval',
        metavar='N',
        type=SIZE,
        default=10,
        help='steps between evaluations' + DEFAULT,
    )
    group.add_argument(
        '--random_seed',
        metavar='N',
        type=COUNT,
        help='with the same cache, runs with the same number give the same result',
    )
    group.add_argument(
        '--print_misclassified_test_images',
        action='store_true',
        help='list the misclassified test images',
    )


def add_distortion_flags(parser: argparse.ArgumentParser) -> None:
    title = 'distortions of the training images (training takes far longer)'
    group = parser.add_argument_group(title)
    group.add_argument(
        '--flip_left_right',
        action='store_true',
        help='mirror half of the images at random',
    )
    group.add_argument(
        '--random_crop',
        metavar='P',
        type=PERCENTAGE,
        default=0,
        help='enlarge by P percent, then crop at a random place' + DEFAULT,
    )
    group.add_argument(
        '--random_scale',
        metavar='P',
        type=PERCENTAGE,
        default=0,
        help='enlarge by a random amount of up to P percent, then crop' + DEFAULT,
    )
    group.add_argument(
        '--random_brightness',
        metavar='P',
        type=PERCENTAGE,
        default=0,
        help='multiply all pixels by a random factor, up to P percent more or less' + DEFAULT,
    )


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('output')
    group.add_argument(
        '--output_graph',
        metavar='FILE',
        default='/tmp/output_graph.pb',
        help='the trained graph; the record of the run is FILE.json' + DEFAULT,
    )
    group.add_argument(
        '--optimized_graph',
        metavar='FILE',
        help='also write the trained graph for other runtimes',
    )
    group.add_argument(
        '--output_labels',
        metavar='FILE',
        default='/tmp/output_labels.txt',
        help='the labels, one per line' + DEFAULT,
    )
    group.add_argument(
        '--summaries_dir',
        metavar='DIR',
        default='/tmp/retrain_logs',
        help='logs for TensorBoard' + DEFAULT,
    )
    group.add_argument(
        '--final_tensor_name',
        metavar='NAME',
        type=NODE_NAME,
        default='final_result',
        help="name of the graph's output" + DEFAULT,
    )


def create_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        usage='python3 %(prog)s --image_dir=DIR [flags]',
        description=__doc__.splitlines()[0],
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=36
        ),
        epilog='the usual command:\n' + __doc__.split('\n\n')[1],
    )
    add_data_flags(parser)
    add_model_flags(parser)
    add_training_flags(parser)
    add_distortion_flags(parser)
    add_output_flags(parser)
    return parser


def parse_flags(
    parser: argparse.ArgumentParser, arguments: list[str] | None = None
) -> argparse.Namespace:
    """Returns the flags. Wrong ones end the program with exit code 2."""
    flags = parser.parse_args(arguments)
    if flags.testing_percentage + flags.validation_percentage >= 100:
        parser.error(
            '--testing_percentage and --validation_percentage must leave images to train on: '
            'below 100 in sum'
        )
    return flags


if __name__ == '__main__':
    # Before TensorFlow, which takes seconds to import: help and wrong flags are answered at once,
    # and so is Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # In any locale, arguments are read as UTF-8.
    sys.argv = [os.fsencode(argument).decode(errors='surrogateescape') for argument in sys.argv]
    parsed_flags = parse_flags(create_parser())
    # Other files must not get the numbers of closed standard streams.
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass

# NumPy's products are small here: the threads of OpenBLAS would cost more time than they save.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont
from tqdm import tqdm

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# TensorFlow's libraries write to stderr while they are loaded, whatever the log level.
with open(os.devnull, 'w') as silence, os.fdopen(os.dup(2), 'w') as stderr:
    os.dup2(silence.fileno(), 2)
    try:
        import tensorflow as tf
    finally:
        os.dup2(stderr.fileno(), 2)

from google.protobuf.message import DecodeError
from tensorflow.compat.v1 import AttrValue, GraphDef, NodeDef, Summary
from tensorflow.compat.v1.graph_util import extract_sub_graph
from tensorflow.compat.v1.image import resize_bilinear
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow.io import gfile
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
from tensorflow.python.grappler import tf_optimizer

tf.get_logger().setLevel('ERROR')
np.seterr(all='ignore')  # no warnings: numbers that are too large show in the cross entropy
Image.MAX_IMAGE_PIXELS = None  # Pillow does not warn: MAX_PIXELS decides

# The model of 2015. The graphs of other networks get its nodes from DecodeJpeg/contents to Mul.
DATA_URL = 'http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz'
MODEL_GRAPH_NAME = 'classify_image_graph_def.pb'
JPEG_DATA_NODE = 'DecodeJpeg/contents'
RESIZED_INPUT_NODE = 'ResizeBilinear'  # float, 0..255
SCALED_INPUT_NODE = 'Mul'
BOTTLENECK = 'pool_3/_reshape', 2048  # node and size
MOBILENET_URL = 'http://download.tensorflow.org/models/mobilenet_v1_{}_frozen.tgz'
MOBILENET_GRAPH_NAME = 'mobilenet_v1_{}/frozen_graph.pb'
MOBILENET_BOTTLENECK = 'MobilenetV1/Predictions/Reshape', 1001

FEW_IMAGES = 20  # per class: with fewer, the original warns
SETS = ('training', 'validation', 'testing')
MAX_NUM_IMAGES_PER_CLASS = 2**27 - 1  # the hash of a file name is taken modulo this plus one
IMAGE_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.gif')  # what the op DecodeJpeg decodes
MAX_PIXELS = 200_000_000  # per image: a graph takes 15 bytes for each to decode, cast and resize
LARGE_CONSTANT = 1024  # bytes: a larger Const holds weights
HAS_GPU = bool(tf.config.list_physical_devices('GPU'))
# In images: more are not faster on a CPU, and need more memory.
NETWORK_BATCH_SIZE = 128 if HAS_GPU else 32
MAX_ARCHIVE_SIZE = 2**30  # bytes, packed or unpacked: the largest model has a tenth of it
DOWNLOAD_ATTEMPTS = 3
DOWNLOAD_TIMEOUT = 30  # seconds without a byte
DATA_SERVICE_TIMEOUT = 60  # seconds without a batch
DUPLICATE_SIMILARITY = 0.99  # cosine of two bottlenecks
MAX_COMPARED = 25_000  # images: all pairs of more would take longer than five seconds
FOLDS = 5  # of the cross-validation
SHOWN_IMAGES = 100  # misclassified images in TensorBoard, at most
# FarmHash, the same everywhere.
fingerprint = functools.partial(tf.strings.to_hash_bucket_fast, num_buckets=2**62)


class UserError(Exception):
    """A failure that the user can fix. Its text names the file or flag, and says what to do."""


def write_whole(path: str, contents: bytes) -> None:
    """Writes a file so that `path` holds all of `contents` or is left as it was, whenever the
    program is stopped.
    """
    temporary = os.path.join(os.path.dirname(path), f'.{uuid.uuid4().hex[:8]}.tmp')
    gfile.makedirs(os.path.dirname(path) or '.')
    try:
        with gfile.GFile(temporary, 'wb') as file:
            file.write(contents)
        gfile.rename(temporary, path, overwrite=True)
    except BaseException:
        with contextlib.suppress(tf.errors.OpError):
            gfile.remove(temporary)
        raise


def ensure_writable_dir(path: str, flag: str) -> None:
    """Creates a folder, and raises UserError if no file can be written there."""
    try:
        write_whole(probe := os.path.join(path, f'.{uuid.uuid4().hex[:8]}.tmp'), b'probe')
        gfile.remove(probe)
    except tf.errors.OpError as error:
        raise UserError(
            f"{flag}: nothing can be written in '{path or '.'}' ({error.message}). Name another "
            'folder.'
        )


def name_some(names: list[str]) -> str:
    """Returns the first ten of some names, and how many more there are, for a message."""
    return ', '.join(names[:10]) + (f' and {len(names) - 10} more' if len(names) > 10 else '')


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Turns a failure or Ctrl-C inside into a warning: only what is made there is lost."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        print(
            f'WARNING: {name} left out ({type(error).__name__}: {getattr(error, "message", error)})'
        )


def check_outputs(flags: argparse.Namespace) -> None:
    """Tries out what the end of the run needs, before anything is computed; raises UserError if
    something is wrong.
    """
    names = 'output_graph', 'output_labels', 'optimized_graph'
    outputs = {f'--{name}': path for name in names if (path := getattr(flags, name))}
    models = [MODEL_GRAPH_NAME, *map(MOBILENET_GRAPH_NAME.format, MOBILENET_SIZES)]
    taken = {os.path.realpath(os.path.join(flags.model_dir, name).encode()) for name in models}
    paths = {
        os.path.realpath(path.encode())
        for path in (*outputs.values(), f'{flags.output_graph}.json')
    }
    if len(paths) <= len(outputs):
        raise UserError(f'{", ".join(outputs)} must be different files. Name others.')
    for flag, path in outputs.items():
        if gfile.isdir(path) or not os.path.basename(path):
            raise UserError(f"{flag}: '{path}' is a folder. Name a file in it.")
        if os.path.realpath(path.encode()) in taken:
            raise UserError(f'{flag}: {path} is the pretrained model. Name another file.')
        ensure_writable_dir(os.path.dirname(path), flag)
    for name in ('train', 'validation', 'test'):
        ensure_writable_dir(os.path.join(flags.summaries_dir, name), '--summaries_dir')


@dataclasses.dataclass(frozen=True)
class Images:
    """The images: a row each, sorted by class and file. All other arrays share these rows."""

    folder: str  # --image_dir as typed
    labels: list[str]  # of the classes
    files: np.ndarray  # 'class folder/file' of each image
    classes: np.ndarray  # indices into labels
    sets: np.ndarray  # one of SETS for each image

    @functools.cached_property
    def paths(self) -> list[str]:
        return [os.path.join(self.folder, file) for file in self.files]

    @functools.cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """The rows of each set."""
        return {name: np.flatnonzero(self.sets == name) for name in SETS}

    @functools.cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """How many images of each class are in each set, int [classes]."""
        count = functools.partial(np.bincount, minlength=len(self.labels))
        return {name: count(self.classes[rows]) for name, rows in self.rows.items()}

    def keep(self, mask: np.ndarray) -> 'Images':
        """Returns a table of the rows for which a mask, bool [images], holds."""
        return dataclasses.replace(
            self,
            files=self.files[mask],
            classes=self.classes[mask],
            sets=self.sets[mask],
        )

    def draw(self, name: str, how_many: int, rng: np.random.Generator) -> np.ndarray:
        """Draws rows of a set, int [how_many]: a class uniformly, then one of its images uniformly.

        Returns all rows of the set if `how_many` is -1.
        """
        rows, counts = self.rows[name], self.counts[name]
        if how_many == -1 or not rows.size:
            return rows
        classes = rng.choice(np.flatnonzero(counts), how_many)
        # As rows are sorted by class, those of class c are rows[first[c]], rows[first[c] + 1], ...
        first = counts.cumsum() - counts
        return rows[first[classes] + rng.integers(counts[classes])]


def get_label(folder: str) -> str:
    """Returns the label of a class folder.

    It is in lower case, with one space for every run of characters other than a-z and 0-9. The
    original gave every folder without such characters the label ' '; here it keeps its name.
    """
    label = re.sub(r'[^a-z0-9]+', ' ', folder.lower())
    return label if label.strip() else ' '.join(folder.split())


def get_set(path: str, testing_percentage: int, validation_percentage: int) -> str:
    """Returns the set of an image: a hash of its path decides, so that it never changes.

    This looks a bit magical, but an image must stay in its set when others come or go, or images
    that were trained on yesterday would be tested with today. So the set depends on nothing but the
    path: its hash becomes a percentage, p. For 'data/cat/cat.0.jpg', p is 15.728: with 10 % for
    each, validation has p below 10, testing has p below 20, and training has the rest.
    """
    hash_name = re.sub(r'_nohash_.*$', '', path)  # variants of one photograph stay in one set
    digest = int(hashlib.sha1(hash_name.encode()).hexdigest(), 16)
    share = digest % (MAX_NUM_IMAGES_PER_CLASS + 1)
    percentage_hash = share * (100.0 / MAX_NUM_IMAGES_PER_CLASS)
    if percentage_hash < validation_percentage:
        return 'validation'
    if percentage_hash < testing_percentage + validation_percentage:
        return 'testing'
    return 'training'


def list_dir(path: str) -> list[str]:
    """Returns the names in a folder, sorted, if there is one; raises UserError if a name is not
    Unicode.
    """
    try:
        return sorted(name.rstrip('/') for name in gfile.listdir(path)) if gfile.isdir(path) else []
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}' has a file whose name is not UTF-8, {error.object!r}. Rename it."
        )


def is_image(name: str) -> bool:
    """Tells whether a file is taken for an image: by its extension, if it is not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith('.')


def list_class_folder(path: str) -> list[str]:
    """Returns the images in a class folder, and names what is passed over."""
    names = list_dir(path)
    images = [name for name in names if is_image(name)]
    others = [name for name in names if not is_image(name)]
    if others:
        print(f'{path}: {len(images)} images; passed over: {name_some(others)}')
    if not images:
        print(f'WARNING: {path} has no images. It is not used as a class.')
    elif len(images) < FEW_IMAGES:
        print(
            f'WARNING: Folder has less than {FEW_IMAGES} images, which may cause issues. '
            f'({path}: {len(images)})'
        )
    return images


def list_class_folders(image_dir: str) -> dict[str, list[str]]:
    """Returns {class folder: its images}, both sorted."""
    folders = {}
    loose_images = 0
    for name in list_dir(image_dir):
        path = os.path.join(image_dir, name)
        if name.startswith('.') or not gfile.isdir(path):
            loose_images += is_image(name)
        elif images := list_class_folder(path):
            folders[name] = images
    if loose_images:
        print(
            f'WARNING: {image_dir} has {loose_images} images outside of class folders. '
            'They are not used.'
        )
    return folders


def get_labels(image_dir: str, folders: list[str]) -> list[str]:
    """Returns the labels of class folders; raises UserError if two are equal, or one is blank."""
    paths: dict[str, str] = {}
    for folder in folders:
        path = os.path.join(image_dir, folder)
        label = get_label(folder)
        if not label:
            raise UserError(f'{path!r}: the label of this folder would be blank. Rename it.')
        if label in paths:
            raise UserError(
                f"{paths[label]} and {path} have the same label '{label}'. Rename or merge them."
            )
        paths[label] = path
    return list(paths)


def list_images(flags: argparse.Namespace) -> Images:
    """Returns the images of the class folders; raises UserError for fewer than two classes."""
    image_dir = flags.image_dir
    if not gfile.isdir(image_dir):
        raise UserError(
            f"--image_dir: there is no folder '{image_dir}'. Name the one with your class folders."
        )
    folders = list_class_folders(image_dir)
    labels = get_labels(image_dir, list(folders))
    if len(labels) < 2:
        raise UserError(
            f"--image_dir: '{image_dir}' has {len(labels) or 'no'} class folder with images. "
            'Two or more are needed: put the images of each class into a folder of its own.'
        )
    files = [os.path.join(folder, name) for folder, names in folders.items() for name in names]
    sizes = [len(names) for names in folders.values()]
    percentages = flags.testing_percentage, flags.validation_percentage
    sets = [get_set(os.path.join(image_dir, file), *percentages) for file in files]
    return Images(
        folder=image_dir,
        labels=labels,
        files=np.array(files, object),
        classes=np.repeat(np.arange(len(labels)), sizes),
        sets=np.array(sets),
    )


def check_sets(images: Images, flags: argparse.Namespace) -> None:
    """Warns of classes that a set has no image of; raises UserError without training images."""
    percentages = {
        'testing': flags.testing_percentage,
        'validation': flags.validation_percentage,
        'training': 100,
    }
    for name, percentage in percentages.items():
        counts = images.counts[name]
        empty = [label for label, count in zip(images.labels, counts, strict=True) if not count]
        if percentage and empty:
            print(
                f'WARNING: no {name} image in {len(empty)} of {len(images.labels)} classes: '
                f'{name_some(empty)}. Add images, or change --testing_percentage or '
                '--validation_percentage.'
            )
    if not images.rows['training'].size:
        raise UserError(
            '--image_dir: no image fell into the training set. Add images, or lower '
            '--testing_percentage.'
        )


def extract(archive: bytes, name: str) -> bytes:
    """Returns a file of a .tgz; b'' if it is missing or the archive is corrupt."""
    try:
        # The archive may be untrusted: a small one can unpack to terabytes.
        unpacked = gzip.open(io.BytesIO(archive)).read(MAX_ARCHIVE_SIZE)
        if len(unpacked) == MAX_ARCHIVE_SIZE:
            return b''
        with tarfile.open(fileobj=io.BytesIO(unpacked)) as tar:
            for member in tar:
                if member.isfile() and os.path.normpath(member.name) == name:
                    file = tar.extractfile(member)
                    return file.read() if file else b''
    except (EOFError, OSError, zlib.error, tarfile.TarError):
        pass
    return b''


def fetch(url: str, name: str) -> bytes:
    """Downloads a file whole, and shows the progress under a name; raises OSError if it cannot."""
    contents = bytearray()
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
        total = int(response.headers.get('Content-Length', 0))
        while block := response.read1(1 << 16):
            contents += block
            done = len(contents)
            if done > MAX_ARCHIVE_SIZE:
                raise OSError(f'more than {MAX_ARCHIVE_SIZE:,} bytes came')
            progress = f'{100 * done / total:.1f}%' if total else f'{done / 1e6:.1f} MB'
            print(f'\r>> Downloading {name} {progress}', end='', file=sys.stderr)
    print(file=sys.stderr)
    if len(contents) < total:
        raise OSError(f'{len(contents):,} of {total:,} bytes came')
    return bytes(contents)


def download(url: str, path: str, name: str) -> bytes:
    """Downloads a .tgz to `path`, and returns the named file in it.

    Raises UserError if that fails DOWNLOAD_ATTEMPTS times: then `path` is as it was.
    """
    for attempt in range(DOWNLOAD_ATTEMPTS):
        time.sleep(attempt)
        try:
            archive = fetch(url, os.path.basename(path))
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f'{type(error).__name__}: {error}'.strip()
            continue
        if contents := extract(archive, name):
            write_whole(path, archive)
            return contents
        reason = f'{len(archive):,} bytes came, and are not a .tgz with {name}'
    raise UserError(
        f'{url} could not be downloaded ({reason}). Run the same command again, or save it as '
        f'{path}.{name_local_network(os.path.dirname(path))}'
    )


def name_local_network(model_dir: str) -> str:
    """Returns a sentence about a network that is in the folder already; '' if there is none."""
    for size in MOBILENET_SIZES:
        if gfile.exists(os.path.join(model_dir, MOBILENET_GRAPH_NAME.format(size))):
            flag = f'--architecture=mobilenet_{size}'
            return f' Or add {flag}, whose network is in {model_dir or "."} already.'
    return ''


def maybe_download_and_extract(model_dir: str, url: str, graph_name: str) -> str:
    """Returns the path of `graph_name` in `model_dir`.

    If it is missing, it is taken out of the archive at `url`, which is downloaded if need be.
    """
    graph_path = os.path.join(model_dir, graph_name)
    if gfile.exists(graph_path):
        return graph_path
    ensure_writable_dir(os.path.dirname(graph_path), '--model_dir')
    archive_path = os.path.join(model_dir, os.path.basename(url))
    graph = b''
    if gfile.exists(archive_path):
        graph = extract(gfile.GFile(archive_path, 'rb').read(), graph_name)
        if not graph:
            broken = f'{archive_path}.broken'
            print(f'{archive_path} is damaged, or has no {graph_name} in it: renamed to {broken}.')
            gfile.rename(archive_path, broken, overwrite=True)
    write_whole(graph_path, graph or download(url, archive_path, graph_name))
    return graph_path


def load_graph_def(
    model_dir: str, url: str, graph_name: str, needed: list[str]
) -> tuple[str, GraphDef, int]:
    """Returns path, graph up to the needed nodes, and CRC-32 of a model's file.

    Raises UserError if it is damaged.
    """
    path = maybe_download_and_extract(model_dir, url, graph_name)
    contents = gfile.GFile(path, 'rb').read()
    try:
        graph_def = extract_sub_graph(GraphDef.FromString(contents), needed)
    except (DecodeError, AssertionError, KeyError) as error:  # the last two: a node is missing
        raise UserError(
            f'{path} is damaged or another graph ({error}). Delete it and run again to download '
            f'{url}.'
        )
    return path, graph_def, zlib.crc32(contents)


class Pixels(NamedTuple):
    """How a network wants its images: their size, and values of (pixel - mean) / deviation."""

    size: tuple[int, int]
    mean: float
    deviation: float


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A pretrained network up to its bottleneck: all that depends on the kind of network."""

    source: str  # path or handle of the model
    graph_def: GraphDef  # from DecodeJpeg/contents to the bottleneck, for TensorFlow 1 too
    checksum: int  # differs between models
    bottleneck: str  # the node of the bottlenecks, float [N, bottleneck_size]
    bottleneck_size: int
    pixels: Pixels
    cache_suffix: str = ''  # between the name of an image and the '.txt' of its cache file
    optimizer: str = ''  # of TensorFlow's, which makes bottlenecks faster and less precise

    def create_network(
        self, structure: GraphDef, weights: dict, device: str | None = None
    ) -> Callable:
        """Returns a tf.function from images in 0..255, float [N, *size, 3], to bottlenecks.

        The weights, {node name: tensor}, are on the device.
        """

        @tf.function(input_signature=[tf.TensorSpec([None, *self.pixels.size, 3])])
        def network(images: tf.Tensor) -> tf.Tensor:
            with tf.device(device):
                inputs = {f'{name}:0': tf.identity(tensor) for name, tensor in weights.items()}
                scaled = (images - self.pixels.mean) * (1 / self.pixels.deviation)
                inputs[f'{SCALED_INPUT_NODE}:0'] = scaled
                outputs = [f'{self.bottleneck}:0']
                return tf.graph_util.import_graph_def(structure, inputs, outputs)[0]

        network.get_concrete_function()  # finds out now whether TensorFlow accepts the graph
        return network

    @functools.cached_property
    def networks(self) -> list[Callable]:
        """The network on each device that computes; raises UserError if the graph is damaged."""
        shape = [None, *self.pixels.size, 3]
        devices = [gpu.name for gpu in tf.config.list_logical_devices('GPU')] or ['/CPU:0']
        networks = []
        try:
            folded = fold(self.graph_def, SCALED_INPUT_NODE, shape, self.bottleneck)
            structure, weights = split_weights(folded)
            if self.optimizer:
                structure = optimize(structure, self.bottleneck, self.optimizer)
            for device in devices:
                with tf.device(device):
                    tensors = {name: tf.constant(value) for name, value in weights.items()}
                networks.append(self.create_network(structure, tensors, device))
        except (LookupError, TypeError, ValueError, tf.errors.OpError) as error:
            raise UserError(
                f'The graph of {self.source} is damaged ({error}). Download the model again.'
            )
        return networks


def load_backbone(flags: argparse.Namespace) -> Backbone:
    """Returns the network that the flags ask for, which is downloaded if need be.

    Raises UserError if it cannot be used.
    """
    if flags.data_service:
        tf.config.set_visible_devices([], 'GPU')  # the network runs on the CPUs of the workers
    if flags.tfhub_module:
        backbone = load_tfhub_module(flags.tfhub_module)
    elif flags.architecture == 'inception_v3':
        backbone = load_inception(flags.model_dir)
    else:
        backbone = load_mobilenet(flags.model_dir, flags.architecture)
    check_final_tensor_name(flags.final_tensor_name, backbone)
    if flags.precision == 'bfloat16':
        return use_bfloat16(backbone)
    return backbone


def load_inception(model_dir: str) -> Backbone:
    """Returns Inception-v3 as published in 2015."""
    needed = [JPEG_DATA_NODE, RESIZED_INPUT_NODE, SCALED_INPUT_NODE, 'pool_3', BOTTLENECK[0]]
    path, graph_def, checksum = load_graph_def(model_dir, DATA_URL, MODEL_GRAPH_NAME, needed)
    return Backbone(path, graph_def, checksum, *BOTTLENECK, Pixels((299, 299), 128, 128))


def load_mobilenet(model_dir: str, architecture: str) -> Backbone:
    """Returns a MobileNet v1 as published in 2017, such as mobilenet_1.0_224."""
    size = architecture.removeprefix('mobilenet_')
    side = int(size.split('_')[1])
    pixels = Pixels((side, side), 127.5, 127.5)
    path, graph_def, checksum = load_graph_def(
        model_dir,
        MOBILENET_URL.format(size),
        MOBILENET_GRAPH_NAME.format(size),
        ['input', MOBILENET_BOTTLENECK[0]],
    )
    graph_def = prepend_decoding(graph_def, 'input:0', pixels)
    suffix = f'_{architecture}'
    return Backbone(path, graph_def, checksum, *MOBILENET_BOTTLENECK, pixels, suffix)


def load_tfhub_module(handle: str) -> Backbone:
    """Returns the network of a TF2 image feature vector; raises UserError if it is none."""
    path, module = open_tfhub_module(handle)
    function, pixels, size = find_feature_vector(module, handle)

    @tf.function(input_signature=[tf.TensorSpec([None, *pixels.size, 3])])
    def extract_features(images: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tf.nest.flatten(function(images))[0], [-1, size], name='bottleneck')

    frozen = convert_variables_to_constants_v2(extract_features.get_concrete_function())
    # Functions become plain ops, which TensorFlow 1 has too.
    plain = optimize(frozen.graph.as_graph_def(), 'bottleneck', 'function')
    graph_def = prepend_decoding(plain, frozen.inputs[0].name, pixels, 'module')
    graph_def = extract_sub_graph(graph_def, ['module/bottleneck'])
    # The suffix is that of the retrain script of TensorFlow Hub.
    suffix = '_' + re.sub(r'[:/]+', '~', handle.rstrip('/'))[-100:]
    checksum = get_folder_checksum(path)
    return Backbone(handle, graph_def, checksum, 'module/bottleneck', size, pixels, suffix)


def open_tfhub_module(handle: str) -> tuple[str, Any]:
    """Returns the folder of a module, and the module; raises UserError if it cannot be loaded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # tensorflow_hub's use of pkg_resources
            import tensorflow_hub
        path = tensorflow_hub.resolve(handle)
        return path, tf.saved_model.load(path)
    except ImportError as error:
        raise UserError(
            f"--tfhub_module: {error}. Run pip install tensorflow-hub 'setuptools<81' first."
        )
    except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
        raise UserError(
            f"--tfhub_module: '{handle}' cannot be loaded ({str(error).strip()}). Download it into "
            'a folder, as inception/README.md shows, and name that.'
        )


def find_feature_vector(module: Any, handle: str) -> tuple[Callable, Pixels, int]:
    """Returns the function of a module from images to features, how it wants images, and its size.

    It takes images in 0..1, float [N, height, width, 3], and returns features, float [N, size]: the
    common signature of https://www.tensorflow.org/hub/common_signatures/images.
    """
    if callable(module):
        functions = module.__call__.concrete_functions
    else:
        functions = module.signatures.values()
    for function in functions:
        arguments = tf.nest.flatten(function.structured_input_signature)
        inputs = [argument.shape for argument in arguments if isinstance(argument, tf.TensorSpec)]
        outputs = [output.shape for output in tf.nest.flatten(function.structured_outputs)]
        ranks = [len(shape) for shape in (*inputs, *outputs) if shape.rank]
        is_for_training = True in arguments
        if ranks == [4, 2] and not is_for_training:
            sides = inputs[0][1:3]
            height, width = (side or 224 for side in sides)
            if None in sides:
                print(
                    '--tfhub_module: it takes images of any size, and gets '
                    f'{height} x {width} pixels.'
                )
            return function, Pixels((height, width), 0, 255), outputs[0][1]
    raise UserError(
        f"--tfhub_module: '{handle}' does not compute feature vectors of images. Name one that "
        'does.'
    )


def get_folder_checksum(folder: str) -> int:
    """Returns the CRC-32 of all files in a folder and below it, in the order of their paths."""
    walk = gfile.walk(folder)
    paths = sorted(os.path.join(parent, name) for parent, _, names in walk for name in names)
    checksum = 0
    for path in paths:
        checksum = zlib.crc32(gfile.GFile(path, 'rb').read(), checksum)
    return checksum


def check_final_tensor_name(name: str, backbone: Backbone) -> None:
    """Raises UserError if a node of the graph has this name already."""
    names = {node.name for node in backbone.graph_def.node}
    if name in names or name.startswith(('final_training_ops/', 'input/')):
        raise UserError(
            f'--final_tensor_name: the graph already has a node named {name}. Choose another name.'
        )


def use_bfloat16(backbone: Backbone) -> Backbone:
    """Returns a network that computes in bfloat16, with cache files of its own.

    Without instructions for it, the network stays as it is.
    """
    if HAS_GPU:
        optimizer = 'auto_mixed_precision'
    elif has_bfloat16():
        optimizer = 'auto_mixed_precision_onednn_bfloat16'
    else:
        print(
            '--precision: this processor has no bfloat16 instructions (or oneDNN is off). '
            'float32 is used.'
        )
        return backbone
    return dataclasses.replace(
        backbone,
        optimizer=optimizer,
        cache_suffix=f'{backbone.cache_suffix}_bfloat16',
        checksum=zlib.crc32(optimizer.encode(), backbone.checksum),
    )


def has_bfloat16() -> bool:
    """Tells whether the processor has instructions for bfloat16, and oneDNN may use them."""
    if os.getenv('TF_ENABLE_ONEDNN_OPTS') == '0':
        return False
    try:
        with open('/proc/cpuinfo') as file:
            return bool(re.search(r'\b(avx512_bf16|amx_bf16|bf16)\b', file.read()))
    except OSError:  # not Linux
        return False


def export_graph(graph: tf.Graph) -> GraphDef:
    """Returns a graph without attributes that have their default value.

    TensorFlow 1 does not know the newer ones.
    """
    with graph.as_default():
        meta_graph = tf.compat.v1.train.export_meta_graph(strip_default_attrs=True)
    for node in meta_graph.graph_def.node:
        node.attr.pop('_output_shapes', None)
    return meta_graph.graph_def


def prepend_decoding(
    graph_def: GraphDef, tensor: str, pixels: Pixels, prefix: str = ''
) -> GraphDef:
    """Returns a graph, under a prefix, whose `tensor` comes from the decoding nodes of 2015."""
    with tf.Graph().as_default() as graph:
        contents = tf.constant(b'', name=JPEG_DATA_NODE)
        decoded = tf.io.decode_jpeg(contents, 3, name='DecodeJpeg')
        image = tf.expand_dims(tf.cast(decoded, tf.float32, name='Cast'), 0, name='ExpandDims')
        image = resize_bilinear(image, pixels.size, name=RESIZED_INPUT_NODE)
        image = tf.subtract(image, pixels.mean, name='Sub')
        image = tf.multiply(image, 1 / pixels.deviation, name=SCALED_INPUT_NODE)
        tf.graph_util.import_graph_def(graph_def, {tensor: image}, name=prefix)
    return export_graph(graph)


def optimize(graph_def: GraphDef, output: str, optimizer: str) -> GraphDef:
    """Returns a graph up to a node after an optimizer of tensorflow/core/grappler/optimizers."""
    meta_graph = tf.compat.v1.MetaGraphDef(graph_def=graph_def)
    meta_graph.collection_def['train_op'].node_list.value.append(output)  # what it must keep
    functions = meta_graph.graph_def.library.function
    nodes = itertools.chain(meta_graph.graph_def.node, *(item.node_def for item in functions))
    for owner in itertools.chain(nodes, functions):
        for name in ('_gradient_op_type', '_XlaMustCompile', '_noinline'):  # no inlining with them
            owner.attr.pop(name, None)
    config = tf.compat.v1.ConfigProto()
    config.graph_options.rewrite_options.optimizers.append(optimizer)
    return tf_optimizer.OptimizeGraph(config, meta_graph)


def fold(graph_def: GraphDef, source: str, shape: list, output: str) -> GraphDef:
    """Returns a graph for batches, without ops that TensorFlow has removed since 2015.

    It begins at the node `source`, which becomes a placeholder of a shape, and ends at `output`.
    Batch norms become part of the convolutions before them. CheckNumerics goes, which is of use
    only in training. A reshape to a single row becomes one to any number of rows.
    """
    folded = GraphDef()
    folded.CopyFrom(graph_def)
    folded.versions.producer = tf.version.GRAPH_DEF_VERSION
    nodes = {node.name: node for node in folded.node}
    constants = {node.name: node.attr['value'].tensor for node in folded.node if node.op == 'Const'}
    float32 = AttrValue(type=tf.float32.as_datatype_enum)
    for node in folded.node:
        node.attr.pop('_class', None)  # asks to be on one device with nodes that may go
        drop_checks(node, nodes)
        if node.op == 'BatchNormWithGlobalNormalization':
            fold_batch_norm(node, nodes, constants)
        elif node.op == 'PlaceholderWithDefault':  # other runtimes would take it for an input
            attributes = {'T': float32}
            node.CopyFrom(NodeDef(name=node.name, op='Identity', input=node.input, attr=attributes))
        elif node.op == 'Reshape' and node.input[1] in constants:
            allow_batches(constants[node.input[1]])
    attributes = {'dtype': float32, 'shape': AttrValue(shape=tf.TensorShape(shape).as_proto())}
    nodes[source].CopyFrom(NodeDef(name=source, op='Placeholder', attr=attributes))
    return extract_sub_graph(folded, [output])


def drop_checks(node: NodeDef, nodes: dict[str, NodeDef]) -> None:
    """Removes the control inputs of a node, '^name', that are CheckNumerics."""
    kept = []
    for name in node.input:
        is_control = name.startswith('^')
        if not is_control or nodes[name[1:]].op != 'CheckNumerics':
            kept.append(name)
    node.input[:] = kept


def fold_batch_norm(node: NodeDef, nodes: dict[str, NodeDef], constants: dict) -> None:
    """Makes a BatchNormWithGlobalNormalization the bias of the convolution before it.

    The op is (x - mean) * s + beta, s = gamma / sqrt(variance + epsilon), where gamma counts only
    with scale_after_normalization (tensorflow/core/ops/nn_ops.cc). After a convolution with weights
    w, that is a convolution with weights w * s, and a bias of beta - mean * s.
    """
    convolution, *names = node.input
    weights_tensor = constants[nodes[convolution].input[1]]
    beta_tensor = constants[names[2]]
    weights = np.float64(tf.make_ndarray(weights_tensor))
    mean, variance, beta, gamma = (np.float64(tf.make_ndarray(constants[name])) for name in names)
    scale = 1 / np.sqrt(variance + node.attr['variance_epsilon'].f)
    if node.attr['scale_after_normalization'].b:
        scale = scale * gamma
    weights_tensor.CopyFrom(tf.make_tensor_proto(np.float32(weights * scale)))
    beta_tensor.CopyFrom(tf.make_tensor_proto(np.float32(beta - mean * scale)))
    inputs = [convolution, names[2]]
    attributes = {'T': node.attr['T']}
    node.CopyFrom(NodeDef(name=node.name, op='BiasAdd', input=inputs, attr=attributes))


def allow_batches(shape: TensorProto) -> None:
    """Changes a constant shape of [1, n], which is that of a single image, to [-1, n]."""
    sides = tf.make_ndarray(shape)
    if len(sides) == 2 and sides[0] == 1:
        shape.CopyFrom(tf.make_tensor_proto(np.array([-1, sides[1]], sides.dtype)))


def split_weights(graph_def: GraphDef) -> tuple[GraphDef, dict[str, np.ndarray]]:
    """Returns a graph with placeholders for its large constants, and these, {node name: array}.

    To optimize a graph with 87 MB of constants, TensorFlow takes five seconds longer and twice the
    memory.
    """
    structure = GraphDef(versions=graph_def.versions, library=graph_def.library)
    weights = {}
    for node in graph_def.node:
        if node.op == 'Const' and node.ByteSize() > LARGE_CONSTANT:
            tensor = node.attr['value'].tensor
            weights[node.name] = tf.make_ndarray(tensor)
            attributes = {
                'dtype': node.attr['dtype'],
                'shape': AttrValue(shape=tensor.tensor_shape),
            }
            structure.node.add(name=node.name, op='Placeholder', attr=attributes)
        else:
            structure.node.add().CopyFrom(node)
    return structure, weights


def run_networks(networks: list[Callable], batches: tf.data.Dataset) -> Iterator:
    """Yields (tags, bottlenecks) of each (tags, images): the devices work at once, while the next
    batches are made.
    """
    iterator = iter(batches.prefetch(2 * len(networks)))
    while group := list(itertools.islice(iterator, len(networks))):
        results = [
            (tags, network(images))
            for (tags, images), network in zip(group, networks, strict=False)
        ]
        yield from ((tags.numpy(), bottlenecks.numpy()) for tags, bottlenecks in results)


def run_service(address: str, network: Callable, batches: tf.data.Dataset) -> Iterator:
    """Yields (tags, bottlenecks) of each (tags, images), both made by a tf.data service, until it
    is done or fails.
    """
    host, port = address.removeprefix('grpc://').rsplit(':', 1)
    try:
        socket.create_connection((host, int(port)), timeout=DATA_SERVICE_TIMEOUT).close()
    except OSError as error:
        raise UserError(
            f'--data_service: {address} does not answer ({error}). Start it, or leave the flag out.'
        )
    policy = tf.data.experimental.service.ShardingPolicy.DYNAMIC
    distribute = tf.data.experimental.service.distribute(policy, address)
    computed = batches.map(lambda tags, images: (tags, network(images)))
    try:
        with multiprocessing.pool.ThreadPool(1) as thread:
            # Each of these may wait forever, for a dispatcher that hangs or a worker that died.
            results = thread.apply_async(computed.apply, [distribute]).get(DATA_SERVICE_TIMEOUT)
            iterator = thread.apply_async(results.as_numpy_iterator).get(DATA_SERVICE_TIMEOUT)
            while batch := thread.apply_async(next, [iterator, None]).get(DATA_SERVICE_TIMEOUT):
                yield batch
    except (tf.errors.OpError, multiprocessing.TimeoutError) as error:
        reason = getattr(error, 'message', f'nothing came for {DATA_SERVICE_TIMEOUT} s')
        print(f'WARNING: {address} failed ({reason}).')


def load_files(paths: list[str], load: Callable) -> tf.data.Dataset:
    """Returns a dataset of load(index, contents) of each file, without those where it fails."""
    files = tf.data.Dataset.from_tensor_slices((np.arange(len(paths)), np.array(paths, object)))
    files = files.map(lambda index, path: load(index, tf.io.read_file(path)), tf.data.AUTOTUNE)
    return files.ignore_errors()


def compute_bottlenecks(
    paths: list, backbone: Backbone, distort: Callable | None, service: str | None
) -> Iterator:
    """Yields (tags, bottlenecks) in batches, without the images that cannot be decoded.

    Tags are int64 [N, 2]: the index of a path, and the fingerprint of the file's contents. Images
    are resized, or are what distort(image, index) makes of them. With a tf.data service, its
    workers do all this.
    """

    def load(index: tf.Tensor, contents: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image = tf.io.decode_jpeg(contents, channels=3)
        image = (
            distort(image, index)
            if distort
            else resize_bilinear(image[tf.newaxis], backbone.pixels.size)[0]
        )
        return tf.stack([index, fingerprint(contents)]), image

    batches, networks = load_files(paths, load).batch(NETWORK_BATCH_SIZE), backbone.networks
    return (
        run_service(service, networks[0], batches) if service else run_networks(networks, batches)
    )


def read_bottlenecks(paths: list[str], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns bottlenecks in cache files, float32 [N, size], and fingerprints, int64 [N]: -1 if
    missing or damaged.
    """

    def parse(row: tf.Tensor, text: tf.Tensor) -> tuple[tf.Tensor, ...]:
        numbers = tf.ensure_shape(tf.strings.to_number(tf.strings.split(text, ',')), [size])
        return row, tf.debugging.check_numerics(numbers, ''), fingerprint(text)

    bottlenecks, fingerprints = np.empty([len(paths), size], np.float32), np.full(len(paths), -1)
    for rows, numbers, found in load_files(paths, parse).batch(256).as_numpy_iterator():
        bottlenecks[rows], fingerprints[rows] = numbers, found
    return bottlenecks, fingerprints


def get_status(path: str) -> tuple[int, int]:
    """Returns size in bytes and modification time in ns of a file; -1 and -1 if there is none."""
    with contextlib.suppress(OSError):
        return (
            status := os.stat(path.encode())
        ).st_size, status.st_mtime_ns  # bytes, as LANG may be of ASCII alone
    # gs:// and its like. Of local files, gfile knows the times in seconds only.
    with contextlib.suppress(tf.errors.OpError):
        return (status := gfile.stat(path)).length, status.mtime_nsec
    return -1, -1


def read_header(path: str) -> tuple[int, bool]:
    """Returns how many pixels an image has, and whether its EXIF orientation asks viewers to turn
    it.
    """
    # Pillow has many kinds of errors.
    with contextlib.suppress(Exception), gfile.GFile(path, 'rb') as file, Image.open(file) as image:
        return image.width * image.height, image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return 0, False


def explain_unreadable(path: str) -> tuple[str, int | None]:
    """Returns why an image could not be used, and, if that is due to its contents, their
    fingerprint.
    """
    mark = None
    try:
        contents = tf.io.read_file(path)
        mark, start = int(fingerprint(contents)), tf.strings.substr(contents, 0, 12).numpy()
        if (pixels := read_header(path)[0]) > MAX_PIXELS:
            return f'it has {pixels:,} pixels, more than {MAX_PIXELS:,}', mark
        if start and start[:2] not in (b'\xff\xd8', b'\x89P', b'GI'):
            return f'it is not JPEG, PNG or still GIF: it starts with {start!r}', mark
        tf.io.decode_jpeg(contents, channels=3)
        return 'it changed while it was read', None
    except tf.errors.OpError as error:
        return re.sub(r'{{.*?}} *| \[Op:.*', '', error.message, flags=re.DOTALL), mark


class BottleneckCache:
    """The cache files of some images and one network, and their bottlenecks, float32 [images,
    bottleneck size].

    Each cache file has a record, .records/<folder>/<file>.rec: a JSON list of facts [outcome, size,
    time, model, contents]. The outcome is the fingerprint of the cache file, or the reason why the
    image cannot be decoded; contents is the fingerprint of the image, if it was read. A record is
    written before its cache file, and keeps what it had: whenever a run is killed, the cache file
    that is there is in its record.
    """

    def __init__(self, images: Images, backbone: Backbone, folder: str) -> None:
        self.images, self.backbone, self.written = images, backbone, 0
        names = [f'{file}{backbone.cache_suffix}' for file in images.files]
        self.paths = [os.path.join(folder, f'{name}.txt') for name in names]
        self.bottlenecks, self.fingerprints = read_bottlenecks(self.paths, backbone.bottleneck_size)
        # After the cache files: another run first records what a cache file is made of, and then
        # writes it.
        self.records = [os.path.join(folder, '.records', f'{name}.rec') for name in names]
        self.facts: list[list] = [[] for _ in names]
        for rows, texts in (
            load_files(self.records, lambda *file: file).batch(256).as_numpy_iterator()
        ):
            for row, text in zip(rows, texts, strict=True):
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    facts = json.loads(text)
                    self.facts[row] = [
                        fact for fact in facts if len(fact) == 5 and isinstance(fact[0], int | str)
                    ]
        self.statuses = list(map(get_status, images.paths))

    def record(self, row: int, outcome: int | str, contents: int | None) -> None:
        """Adds to a record what an image is now. If it cannot be written, the next run may have to
        compute again.
        """
        others = [fact for fact in self.facts[row] if fact[0] != outcome]
        self.facts[row] = [
            *others,
            (outcome, *self.statuses[row], self.backbone.checksum, contents),
        ]
        with contextlib.suppress(tf.errors.OpError):
            write_whole(self.records[row], json.dumps(self.facts[row]).encode())

    def find(self, row: int, contents: int | None = None) -> int | str | None:
        """Returns the fingerprint of a cache file that is current, or why its image cannot be
        decoded; else None.
        """
        for outcome, size, changed, model, found in self.facts[row]:
            if isinstance(outcome, str) or (outcome, model) == (
                self.fingerprints[row],
                self.backbone.checksum,
            ):
                # Contents count, whatever the time of the file says.
                is_same = contents is not None and found in (contents, None)
                if (size, changed) == self.statuses[row] or (
                    is_same and size == self.statuses[row][0]
                ):
                    return outcome
        return None

    def compare(self) -> np.ndarray:
        """Returns the rows to compute, and keeps the known reasons of others; reads images only if
        need be.
        """
        for row, cached in enumerate(self.fingerprints.tolist()):
            if cached >= 0 and not self.facts[row]:  # a cache file of the original is trusted
                self.record(row, cached, None)
        known = [self.find(row) for row in range(len(self.paths))]
        unsure = [row for row, outcome in enumerate(known) if outcome is None and self.facts[row]]
        images = load_files(
            [self.images.paths[row] for row in unsure],
            lambda index, text: (index, fingerprint(text)),
        )
        for index, mark in images.as_numpy_iterator():
            if (outcome := self.find(row := unsure[index], int(mark))) is not None:
                known[row] = outcome
                self.record(row, outcome, int(mark))
        self.reasons = {
            row: outcome for row, outcome in enumerate(known) if isinstance(outcome, str)
        }
        return np.flatnonzero([outcome is None for outcome in known])

    def write(self, rows: np.ndarray, bottlenecks: np.ndarray, contents: np.ndarray) -> None:
        """Writes bottlenecks, and records of the file contents (fingerprints) that they are made
        of.
        """
        if not np.isfinite(bottlenecks).all():
            raise UserError(
                f'{self.backbone.source} gives numbers that are not finite. Download the model '
                'again.'
            )
        self.bottlenecks[rows] = bottlenecks
        texts = [','.join(map(str, values)) for values in bottlenecks]
        for row, text, cached, mark in zip(
            rows, texts, fingerprint(texts).numpy(), contents, strict=True
        ):
            tqdm.write(f'Creating bottleneck at {self.paths[row]}')
            self.record(row, int(cached), int(mark))
            try:
                write_whole(self.paths[row], text.encode())
            except tf.errors.InvalidArgumentError as error:  # the name is too long
                tqdm.write(f'WARNING: {error.message}. Each run computes this bottleneck.')
            self.written += 1
            if self.written % 100 == 0:
                tqdm.write(f'{self.written} bottleneck files created.')

    def compute(self, rows: np.ndarray, data_service: str | None) -> None:
        """Computes and writes the bottlenecks of some rows; keeps the reasons why others cannot be
        used.
        """
        paths, left = self.images.paths, set(rows)
        headers = {row: read_header(paths[row]) for row in rows}
        with tqdm(total=len(left), desc='Bottlenecks', unit='image', disable=None) as bar:
            # What a service does not bring is computed here.
            for service in dict.fromkeys([data_service, None]):
                todo = np.array([row for row in sorted(left) if headers[row][0] <= MAX_PIXELS], int)
                for tags, found in compute_bottlenecks(
                    [paths[row] for row in todo], self.backbone, None, service
                ):
                    self.write(todo[tags[:, 0]], found, tags[:, 1])
                    left.difference_update(todo[tags[:, 0]])
                    bar.update(len(found))
                if service and left:
                    tqdm.write(
                        f'WARNING: {service} left out {len(left)} of {len(rows)} images. They are '
                        'tried here.'
                    )
        if turned := sum(is_turned for _, is_turned in headers.values()):
            advice = 'See data/README.md on how to rotate them.'
            print(
                'WARNING: images that the camera stored sideways, and that are used as stored: '
                f'{turned}. {advice}'
            )
        for row in sorted(left):
            self.reasons[row], contents = explain_unreadable(paths[row])
            if contents is not None:
                self.record(row, self.reasons[row], contents)


def cache_bottlenecks(
    images: Images, backbone: Backbone, flags: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """Returns bottlenecks, float32 [images, size], and which exist, bool [images]; UserError if a
    class has none.
    """
    # What is computed stays in memory while it is written: float32 written as text and read again
    # is the same number.
    cache = BottleneckCache(images, backbone, flags.bottleneck_dir)
    missing = cache.compare()
    if missing.size:
        ensure_writable_dir(flags.bottleneck_dir, '--bottleneck_dir')
        for row in missing:
            if cache.fingerprints[row] >= 0:
                print(f'The image or the model changed, recreating bottleneck {cache.paths[row]}')
            elif gfile.exists(cache.paths[row]):
                print(f'Invalid float found, recreating bottleneck {cache.paths[row]}')
        cache.compute(missing, flags.data_service)
    readable = np.ones(len(images.files), bool)
    for row, reason in sorted(cache.reasons.items()):
        line, readable[row] = f'{images.paths[row]!r} is left out: {reason}', False
        if flags.strict:
            raise UserError(f'--strict: {line}. Replace or delete it.')
        print(f'WARNING: {line}')
    if cache.reasons:
        print(
            f'WARNING: {len(cache.reasons)} of {len(images.files)} images are left out. Replace or '
            'delete them.'
        )
    for index in np.setdiff1d(images.classes, images.classes[readable]):
        folder = os.path.dirname(images.files[images.classes == index][0])
        raise UserError(
            f"No image in the class folder '{folder}' can be read. Add some, or remove the folder."
        )
    return cache.bottlenecks, readable


def find_near_copies(images: Images, bottlenecks: np.ndarray) -> tuple[list[tuple[int, int]], int]:
    """Pairs images whose bottlenecks have a cosine similarity of DUPLICATE_SIMILARITY, each with at
    most one.

    That is one of another label, if there is any, then a training image for one that is none, then
    one of the same set, unless the two are variants by `_nohash_`. Of more than MAX_COMPARED
    images, those for training are not compared. Returns pairs of rows, the worst first, and how
    many images for validation or test are like a training image.
    """
    classes, is_training, leaked = images.classes, images.sets == 'training', 0
    stems = np.array([file.split('_nohash_')[0] for file in images.files], object)
    # The product of two vectors is at most that of the norms of their groups of eight numbers
    # (Cauchy-Schwarz), so that few pairs need the former. A bottleneck of equal numbers is like no
    # other: its scale is 0.
    groups, blocks = (
        np.arange(0, bottlenecks.shape[1], 8),
        np.array_split(bottlenecks, 1 + len(bottlenecks) // 1024),
    )
    squares = np.concatenate(
        [np.add.reduceat(np.square(block), groups, axis=1) for block in blocks]
    )
    scale = np.where(np.ptp(bottlenecks, axis=1) > 0, 1 / np.sqrt(squares.sum(axis=1)), 0)[:, None]
    short = tf.constant(np.sqrt(squares) * scale)
    best, partner = np.zeros(len(classes)), np.zeros(len(classes), int)
    compared = (
        np.arange(len(classes)) if len(classes) <= MAX_COMPARED else np.flatnonzero(~is_training)
    )
    for rows in np.split(compared, range(512, len(compared), 512)):
        is_near = (
            tf.matmul(tf.gather(short, rows), short, transpose_b=True) > DUPLICATE_SIMILARITY - 1e-4
        ).numpy()
        is_near[np.arange(len(rows)), rows] = False
        rows, others = rows[is_near.any(axis=1)], np.flatnonzero(is_near.any(axis=0))
        if not rows.size:
            continue
        units, other_units = (bottlenecks[of] * scale[of] for of in (rows, others))
        similarity = tf.matmul(
            units, other_units, transpose_b=True
        ).numpy()  # on all cores, unlike NumPy here
        differs, leaks = (
            classes[rows, None] != classes[others],
            is_training[others] & ~is_training[rows, None],
        )
        is_alike = (similarity >= DUPLICATE_SIMILARITY) & (
            differs | leaks | (stems[rows, None] != stems[others])
        )
        leaked += (is_alike & leaks).any(axis=1).sum()
        badness = np.where(is_alike, 2 * differs + leaks + similarity, 0)
        best[rows], partner[rows] = badness.max(axis=1), others[badness.argmax(axis=1)]
    order = np.argsort(-best, kind='stable')
    pairs = dict.fromkeys(
        (min(row, partner[row]), max(row, partner[row])) for row in order if best[row]
    )
    return list(pairs), int(leaked)


def report_near_copies(
    images: Images, pairs: list[tuple[int, int]], leaked: int, print_all: bool
) -> None:
    """Prints how many near copies of images there are, and names ten pairs or all of them."""
    if mislabeled := sum(images.classes[row] != images.classes[other] for row, other in pairs):
        print(
            f'WARNING: pairs of near copies with different labels: {mislabeled}. Delete what is in '
            'the wrong folder.'
        )
    if leaked:
        advice = 'They make the accuracy look better than it is: delete one of each pair.'
        print(
            f'WARNING: validation or test images with near copies in the training set: {leaked}. '
            f'{advice}'
        )
    for row, other in pairs if print_all else pairs[:10]:
        print(
            f'  {images.paths[row]} ({images.sets[row]}), {images.paths[other]} '
            f'({images.sets[other]})'
        )
    if len(pairs) > 10 and not print_all:
        print(f'  and {len(pairs) - 10} more pairs of near copies, which --print_duplicates names')
    if len(images.files) > MAX_COMPARED:
        print(
            'Training images were not compared with each other for near copies: there are too many.'
        )


class Evaluation(NamedTuple):
    """What the final layer makes of N bottlenecks."""

    logits: np.ndarray  # float [N, classes]
    scores: np.ndarray  # their softmax
    cross_entropy: float  # mean over the N
    accuracy: float  # share of the N whose best score is that of their class


class FinalLayer:
    """The new last layer: softmax(bottlenecks @ weights + biases), with weights [bottleneck size,
    classes].

    Weights start from a truncated normal of stddev 0.001, biases from 0. The loss is the softmax
    cross entropy, mean over the batch; every step is one of plain gradient descent. In NumPy, as a
    step is two small products of matrices, which take a third of the time of a call into
    TensorFlow.
    """

    def __init__(
        self, bottleneck_size: int, class_count: int, learning_rate: float, seed: np.ndarray
    ) -> None:
        self.weights = tf.random.stateless_truncated_normal(
            [bottleneck_size, class_count], seed, stddev=0.001
        ).numpy()
        self.biases = np.zeros(class_count, np.float32)
        self.learning_rate, self.steps = np.float32(learning_rate), 0

    def evaluate(self, bottlenecks: np.ndarray, classes: np.ndarray) -> Evaluation:
        """Evaluates bottlenecks, float [N, size], of classes, int [N]; raises UserError if training
        has diverged.
        """
        logits = bottlenecks @ self.weights + self.biases
        # exp() of the logits themselves may overflow.
        shifted = logits - logits.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)
        sums = exponentials.sum(axis=1, keepdims=True)
        cross_entropy = (np.log(sums[:, 0]) - shifted[np.arange(len(classes)), classes]).mean()
        if not np.isfinite(cross_entropy):
            raise UserError(
                f'--learning_rate: the cross entropy is not finite after {self.steps} steps. Lower '
                'it.'
            )
        return Evaluation(
            logits, exponentials / sums, cross_entropy, (logits.argmax(axis=1) == classes).mean()
        )

    def train(self, bottlenecks: np.ndarray, classes: np.ndarray) -> Evaluation:
        """Takes one step, and returns the evaluation of the batch before it."""
        before = self.evaluate(bottlenecks, classes)
        gradient = before.scores.copy()
        gradient[np.arange(len(classes)), classes] -= (
            1  # of the cross entropy, by the logits, times N
        )
        gradient *= self.learning_rate / len(classes)
        self.weights -= bottlenecks.T @ gradient
        self.biases -= gradient.sum(axis=0)
        self.steps += 1
        return before


def summarize(evaluation: Evaluation, layer: FinalLayer | None = None) -> dict[str, Any]:
    """Returns the original's summaries of a batch, and of the layer if it is given: {tag: number or
    array}.
    """
    tags: dict[str, Any] = {
        'cross_entropy_1': evaluation.cross_entropy,
        'accuracy_1': evaluation.accuracy,
    }
    if layer:
        tags |= {
            'final_training_ops/Wx_plus_b/pre_activations': evaluation.logits,
            'activations': evaluation.scores,
        }
        for name, values in (('weights', layer.weights), ('biases', layer.biases)):
            scope = f'final_training_ops/{name}/summaries'
            tags |= {f'{scope}/mean_1': values.mean(), f'{scope}/stddev_1': values.std()}
            tags |= {
                f'{scope}/max_1': values.max(),
                f'{scope}/min_1': values.min(),
                f'{scope}/histogram': values,
            }
    return tags


def create_value(tag: str, value: Any) -> Summary.Value:
    """Returns a summary of a number, of a picture, or of an array, whose distribution is shown in
    30 buckets.
    """
    if isinstance(value, Image.Image):
        value.save(png := io.BytesIO(), 'PNG')
        image = {
            'width': value.width,
            'height': value.height,
            'encoded_image_string': png.getvalue(),
        }
        return Summary.Value(tag=tag, image=image)
    if not np.ndim(value):
        return Summary.Value(tag=tag, simple_value=value)
    values = np.ravel(value).astype(np.float64)
    counts, edges = np.histogram(values, 30)
    moments = {'num': values.size, 'sum': values.sum(), 'sum_squares': np.square(values).sum()}
    buckets = {'min': edges[0], 'max': edges[-1], 'bucket_limit': edges[1:], 'bucket': counts}
    return Summary.Value(tag=tag, histo=moments | buckets)


class SummaryWriter:
    """Writes what TensorBoard reads: a TFRecord file of Event protos
    (tensorflow/core/util/events_writer.cc).
    """

    # Not by tf.summary, which takes 0.3 to 5 ms for each tag.
    def __init__(self, folder: str) -> None:
        gfile.makedirs(folder)
        for name in gfile.listdir(folder):
            if name.startswith('events.out.tfevents.'):  # of an earlier run
                gfile.remove(os.path.join(folder, name))
        name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}'
        self.file = tf.io.TFRecordWriter(os.path.join(folder, name))
        self.write(file_version='brain.Event:2')

    def write(self, values: Mapping[str, Any] | None = None, **fields: object) -> None:
        """Writes an Event of {tag: number, picture or array}, and with other fields."""
        if self.file:
            try:
                summary = (
                    Summary(value=itertools.starmap(create_value, values.items()))
                    if values
                    else None
                )
                event = tf.compat.v1.Event(wall_time=time.time(), summary=summary, **fields)
                self.file.write(event.SerializeToString())
                self.file.flush()
            except (tf.errors.OpError, ValueError) as error:
                self.file = None
                reason = getattr(error, 'message', error)
                print(f'WARNING: --summaries_dir: {reason}. The training goes on without logs.')


def load_thumbnail(path: str, side: int) -> Image.Image:
    """Returns an image, at most `side` pixels wide and high; a gray square if Pillow cannot read
    it.
    """
    with contextlib.suppress(Exception), gfile.GFile(path, 'rb') as file, Image.open(file) as image:
        image.draft('RGB', (side, side))  # decodes a JPEG no larger than needed
        thumbnail = image.convert('RGB')
        thumbnail.thumbnail((side, side))
        return thumbnail
    return Image.new('RGB', (side, side), 'gray')


def cross_validate(
    images: Images, bottlenecks: np.ndarray, flags: argparse.Namespace
) -> np.ndarray:
    """Returns the scores of each image from a layer trained on the other folds, float [images,
    classes].
    """
    count, steps = len(images.files), flags.how_many_training_steps
    # train() uses the first three.
    rng = np.random.default_rng(np.random.SeedSequence(flags.random_seed).spawn(4)[3])
    folds = np.arange(count) % FOLDS  # each class in all of them, as the rows are sorted by class
    scores = np.zeros([count, len(images.labels)], np.float32)
    with tqdm(
        total=FOLDS * steps, desc='Cross-validation', unit='step', delay=1, disable=None
    ) as bar:
        for fold in range(FOLDS):
            split = dataclasses.replace(images, sets=np.where(folds == fold, 'testing', 'training'))
            layer = FinalLayer(
                bottlenecks.shape[1],
                scores.shape[1],
                flags.learning_rate,
                rng.integers(2**31, size=2),
            )
            for _ in range(steps):
                rows = split.draw('training', flags.train_batch_size, rng)
                layer.train(bottlenecks[rows], images.classes[rows])
                bar.update()
            if (rows := split.rows['testing']).size:
                scores[rows] = layer.evaluate(bottlenecks[rows], images.classes[rows]).scores
    return scores


def report_suspects(images: Images, scores: np.ndarray, flags: argparse.Namespace) -> None:
    """Names the images whose own label has the lowest score, and shows them in TensorBoard."""
    # Of wrong labels put on 2 % of the 3,670 tutorial flowers, 76 % are among as many suspects. By
    # the off-diagonal of confident learning (Northcutt et al. 2021,
    # https://arxiv.org/abs/1911.00068), it is 70 % (tests/benchmark.py).
    print('=== SUSPECT IMAGES ===')
    own, pictures = scores[np.arange(len(scores)), images.classes], {}
    for row in np.argsort(own, kind='stable')[: flags.find_suspects]:
        best = scores[row].argmax()
        label = images.labels[images.classes[row]]
        words = f'{label} {own[row]:.2f}  {images.labels[best]} {scores[row, best]:.2f}'
        print(f'{images.paths[row]:>70}  {words}')
        pictures[f'{words}/{images.files[row]}'] = load_thumbnail(images.paths[row], 299)
    print(
        'Look at these images, here or in TensorBoard. Move those in a wrong folder, and run the '
        'same command again.'
    )
    SummaryWriter(os.path.join(flags.summaries_dir, 'suspects')).write(pictures)


def create_distortion(strengths: tuple, size: tuple[int, int], seed: np.ndarray) -> Callable:
    """Returns a function that distorts image number `first` + `index` as the original does, to
    float [*size, 3].
    """
    flip_left_right, random_crop, random_scale, random_brightness = strengths

    def distort(image: tf.Tensor, index: tf.Tensor, first: int) -> tf.Tensor:
        seeds = tf.unstack(tf.random.split(tf.random.fold_in(seed, first + index), 4))
        resize_scale = tf.random.stateless_uniform([], seeds[0], 1.0, 1.0 + random_scale / 100.0)
        precrop_size = tf.cast((1.0 + random_crop / 100.0) * resize_scale * size, tf.int32)
        image = resize_bilinear(image[tf.newaxis], precrop_size)[0]
        image = tf.image.stateless_random_crop(image, [*size, 3], seeds[1])
        if flip_left_right:
            image = tf.image.stateless_random_flip_left_right(image, seeds[2])
        spread = random_brightness / 100.0
        return image * tf.random.stateless_uniform([], seeds[3], 1.0 - spread, 1.0 + spread)

    return distort


def compute_distorted(
    draws: Iterator, images: Images, backbone: Backbone, distort: Callable
) -> Iterator:
    """Yields (rows, bottlenecks) of distorted images for each draw of rows, without those that
    became unreadable.
    """
    vanished: set[str] = set()
    try:
        for step, drawn in enumerate(draws):
            paths, is_found = [images.paths[row] for row in drawn], np.zeros(drawn.size, bool)
            bottlenecks = np.zeros([drawn.size, backbone.bottleneck_size], np.float32)
            distort_drawn = functools.partial(distort, first=step * drawn.size)
            for tags, found in compute_bottlenecks(paths, backbone, distort_drawn, None):
                is_found[tags[:, 0]], bottlenecks[tags[:, 0]] = True, found
            vanished.update(itertools.compress(paths, ~is_found))
            yield drawn[is_found], bottlenecks[is_found]
    finally:
        if vanished:
            names = name_some(sorted(vanished))
            print(
                f'WARNING: {len(vanished)} images could no longer be read, and were not trained '
                f'on: {names}'
            )


def create_frozen_graph(backbone: Backbone, layer: FinalLayer, final_tensor_name: str) -> GraphDef:
    """Returns the frozen graph: the backbone's nodes as they are, and the new layer behind them."""
    with tf.Graph().as_default() as graph:
        source = tf.compat.v1.placeholder(tf.float32, name=backbone.bottleneck)
        shape = [None, backbone.bottleneck_size]
        fed = tf.compat.v1.placeholder_with_default(
            source, shape, 'input/BottleneckInputPlaceholder'
        )
        scope = 'final_training_ops'
        weights = tf.constant(layer.weights, name=f'{scope}/weights/final_weights')
        biases = tf.constant(layer.biases, name=f'{scope}/biases/final_biases')
        weights, biases = (
            tf.identity(value, f'{value.op.name}/read') for value in (weights, biases)
        )
        product = tf.matmul(fed, weights, name=f'{scope}/Wx_plus_b/MatMul')
        tf.nn.softmax(tf.add(product, biases, f'{scope}/Wx_plus_b/add'), name=final_tensor_name)
    frozen = GraphDef()
    # `versions` too: from producer 9 on, TensorFlow refuses the batch norms of 2015.
    frozen.CopyFrom(backbone.graph_def)
    frozen.node.extend(
        node for node in export_graph(graph).node if node.name != backbone.bottleneck
    )
    return frozen


def train(
    images: Images, bottlenecks: np.ndarray, backbone: Backbone, flags: argparse.Namespace
) -> FinalLayer:
    """Trains the final layer; logs accuracy and cross entropy every --eval_step_interval steps and
    at the last one.
    """
    root = np.random.SeedSequence(flags.random_seed)
    layer = FinalLayer(
        backbone.bottleneck_size, len(images.labels), flags.learning_rate, root.generate_state(2)
    )
    training_rng, validation_rng, distortion_rng = map(np.random.default_rng, root.spawn(3))
    steps, interval = flags.how_many_training_steps, flags.eval_step_interval
    draws = (images.draw('training', flags.train_batch_size, training_rng) for _ in range(steps))
    strengths = (
        flags.flip_left_right,
        flags.random_crop,
        flags.random_scale,
        flags.random_brightness,
    )
    if any(strengths):
        distort = create_distortion(
            strengths, backbone.pixels.size, distortion_rng.integers(2**31, size=2)
        )
        batches = compute_distorted(draws, images, backbone, distort)
    else:
        batches = ((rows, bottlenecks[rows]) for rows in draws)
    folders = (os.path.join(flags.summaries_dir, name) for name in ('train', 'validation'))
    train_writer, validation_writer = map(SummaryWriter, folders)
    untrained, _ = split_weights(create_frozen_graph(backbone, layer, flags.final_tensor_name))
    train_writer.write(graph_def=untrained.SerializeToString())
    try:
        for step, (rows, batch) in enumerate(batches):
            is_evaluated = step % interval == 0 or step == steps - 1
            stamp = f'{datetime.datetime.now()}: Step {step}:'
            if rows.size:
                before = layer.train(batch, images.classes[rows])
                if is_evaluated:
                    evaluation = layer.evaluate(batch, images.classes[rows])
                    print(stamp, f'Train accuracy = {100 * evaluation.accuracy:.1f}%')
                    print(stamp, f'Cross entropy = {evaluation.cross_entropy:f}')
                train_writer.write(summarize(before, layer if is_evaluated else None), step=step)
            if (
                is_evaluated
                and (
                    rows := images.draw('validation', flags.validation_batch_size, validation_rng)
                ).size
            ):
                evaluation = layer.evaluate(bottlenecks[rows], images.classes[rows])
                validation_writer.write(summarize(evaluation, layer), step=step)
                print(
                    stamp, f'Validation accuracy = {100 * evaluation.accuracy:.1f}% (N={len(rows)})'
                )
    except KeyboardInterrupt:
        print('\nCtrl-C: what was learned so far will be tested and written. Ctrl-C again quits.')
    return layer


class Tested(NamedTuple):
    """The result of the test of N images."""

    rows: np.ndarray  # int [N]
    predictions: np.ndarray  # indices into labels, int [N]
    confusion: np.ndarray  # counts, int [true class, predicted class]
    misclassified: list[tuple[int, int]]  # rows and predictions


def test(
    images: Images, bottlenecks: np.ndarray, layer: FinalLayer, flags: argparse.Namespace
) -> Tested | None:
    """Tests the layer on images that it was not trained on; returns None if there are none."""
    rows = images.draw('testing', flags.test_batch_size, np.random.default_rng(flags.random_seed))
    if not rows.size:
        return None
    classes = images.classes[rows]
    predictions = layer.evaluate(bottlenecks[rows], classes).logits.argmax(axis=1)
    wrong = predictions != classes
    confusion = tf.math.confusion_matrix(classes, predictions, len(images.labels)).numpy()
    return Tested(
        rows, predictions, confusion, list(zip(rows[wrong], predictions[wrong], strict=True))
    )


def get_interval(right: int, count: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a share (Wilson 1927, https://doi.org/10.2307/2276774)."""
    z, share = 1.96, right / count
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half_width = (
        z
        / (1 + z * z / count)
        * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    )
    return max(0.0, center - half_width), min(1.0, center + half_width)


def report_test(images: Images, tested: Tested | None, flags: argparse.Namespace) -> None:
    """Prints the accuracy on the test set, as a whole and per class, and on demand the
    misclassified images.
    """
    if not tested:
        print(
            'Final test accuracy: unknown, as the test set is empty. Add images, or raise '
            '--testing_percentage.'
        )
        return
    right, count = np.trace(tested.confusion), len(tested.rows)
    print(f'Final test accuracy = {100 * right / count:.1f}% (N={count})')
    low, high = get_interval(right, count)
    advice = f' About {4 * count} test images would halve it.' if high - low > 0.1 else ''
    print(f'95% confidence interval: {100 * low:.1f} to {100 * high:.1f}%.{advice}')
    width = min(max(map(len, [*images.labels, 'class'])), 24)
    print(f'{"class":{width}}  images   right   wrong  precision  most confused with')
    for i, (label, counts) in enumerate(zip(images.labels, tested.confusion, strict=True)):
        others, called = (
            np.where(np.arange(len(counts)) == i, 0, counts),
            tested.confusion[:, i].sum(),
        )
        precision = f'{100 * counts[i] / called:8.1f}%' if called else f'{"-":>9}'
        worst = f'  {images.labels[others.argmax()]} ({others.max()})' if others.any() else ''
        print(
            f'{label:{width}}  {counts.sum():6}  {counts[i]:6}  {others.sum():6}  '
            f'{precision}{worst}'
        )
    if flags.print_misclassified_test_images:
        print('=== MISCLASSIFIED TEST IMAGES ===')
        for row, predicted in tested.misclassified:
            print(f'{images.paths[row]:>70}  {images.labels[predicted]}')


def write_outputs(
    labels: list[str], backbone: Backbone, layer: FinalLayer, flags: argparse.Namespace
) -> None:
    """Writes graph and labels; raises UserError if one of them cannot be written."""
    graph = create_frozen_graph(backbone, layer, flags.final_tensor_name)
    outputs = {flags.output_graph: graph.SerializeToString(deterministic=True)}
    outputs[flags.output_labels] = ''.join(f'{label}\n' for label in labels).encode()
    if flags.optimized_graph:
        graph = fold(
            graph, SCALED_INPUT_NODE, [None, *backbone.pixels.size, 3], flags.final_tensor_name
        )
        outputs[flags.optimized_graph] = graph.SerializeToString(deterministic=True)
    for path, contents in outputs.items():
        try:
            write_whole(path, contents)
        except tf.errors.OpError as error:
            raise UserError(
                f'{path} cannot be written ({error.message}). Fix this, and run the same command '
                'again.'
            )


def create_record(
    images: Images, backbone: Backbone, tested: Tested | None, flags: argparse.Namespace
) -> dict:
    """Returns what the run did, in the order of trained_model/README.md."""
    pixels = backbone.pixels._asdict() | {
        'tensor': f'{JPEG_DATA_NODE}:0',
        'optimized_tensor': f'{SCALED_INPUT_NODE}:0',
    }
    counts = {
        name: dict(zip(images.labels, of.tolist(), strict=True))
        for name, of in images.counts.items()
    }
    record: dict[str, Any] = {
        'command': sys.argv,
        'flags': vars(flags),
        'versions': {
            'python': sys.version.split()[0],
            'tensorflow': tf.__version__,
            'numpy': np.__version__,
        },
        'network': {'source': backbone.source, 'checksum': backbone.checksum, 'input': pixels},
        'labels': images.labels,
        'images': counts,
    }
    if tested:
        right, count = int(np.trace(tested.confusion)), len(tested.rows)
        record['test'] = {
            'images': count,
            'accuracy': right / count,
            'interval': get_interval(right, count),
        }
        record['test']['confusion'] = tested.confusion.tolist()
    return record


def draw_confusion_matrix(confusion: np.ndarray, labels: list[str]) -> Image.Image:
    """Draws counts, int [true class, predicted class]: the darker a cell, the larger its share of
    the true class.
    """
    count, cell = len(labels), max(4, min(48, 1200 // len(labels)))
    font = ImageFont.load_default(height := min(16, cell))
    upwards = ImageFont.TransposedFont(font, Image.Transpose.ROTATE_90)
    names = [f'{label[:23]}…' if len(label) > 24 else label for label in labels]
    margin = 12 + int(max(map(font.getlength, names)))
    picture = Image.new('L', (margin + cell * count, margin + cell * count), 'white')
    draw = ImageDraw.Draw(picture)
    for i, name in enumerate(names):
        middle = margin + cell * (i + 0.5)
        draw.text((margin - 6, middle), name, 'black', font, 'rm')
        draw.text((middle - height / 2, margin - 6 - font.getlength(name)), name, 'black', upwards)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    cells = Image.fromarray(np.uint8(255 - 255 * shares)).resize(
        (cell * count,) * 2, Image.Resampling.NEAREST
    )
    picture.paste(cells, (margin, margin))
    for row, column in np.argwhere(confusion) if cell >= 16 else ():
        center = margin + cell * (column + 0.5), margin + cell * (row + 0.5)
        draw.text(
            center,
            str(confusion[row, column]),
            'white' if shares[row, column] > 0.5 else 'black',
            font,
            'mm',
        )
    return picture


def write_pictures(images: Images, tested: Tested | None, folder: str) -> None:
    """Writes pictures of the tested images in place of those of an earlier run."""
    writer = SummaryWriter(folder)
    if not tested:
        return
    pictures = {'confusion_matrix': draw_confusion_matrix(tested.confusion, images.labels)}
    for row, predicted in tested.misclassified[:SHOWN_IMAGES]:
        path = images.paths[row]
        label = images.labels[images.classes[row]]
        name = f'{label} classified as {images.labels[predicted]}'
        pictures[f'misclassified/{name}/{os.path.basename(path)}'] = load_thumbnail(path, 299)
    writer.write(pictures)


def main(flags: argparse.Namespace, export: Callable = lambda *trained: None) -> None:
    """Does the whole job. export(backbone, layer, labels) writes what is worth most, and so comes
    first.
    """
    started = datetime.datetime.now()
    check_outputs(flags)
    images = list_images(flags)
    backbone = load_backbone(flags)
    devices = ', '.join(device.name for device in tf.config.list_logical_devices('GPU')) or 'CPU'
    print(
        f'TensorFlow {tf.__version__}, Python {sys.version.split()[0]}, {devices}, network '
        f'{backbone.source}'
    )
    counts = ', '.join(f'{len(rows)} {name}' for name, rows in images.rows.items())
    print(f'{len(images.labels)} classes, {len(images.files)} images: {counts}')
    bottlenecks, readable = cache_bottlenecks(images, backbone, flags)
    if not readable.all():
        images, bottlenecks = images.keep(readable), bottlenecks[readable]
    check_sets(images, flags)
    pairs: list[tuple[int, int]] = []
    with extra('the search for duplicates'):
        pairs, leaked = find_near_copies(images, bottlenecks)
        report_near_copies(images, pairs, leaked, flags.print_duplicates)
    if flags.find_suspects:
        with extra('the search for suspects'):
            report_suspects(images, cross_validate(images, bottlenecks, flags), flags)
    layer = train(images, bottlenecks, backbone, flags)
    tested = test(images, bottlenecks, layer, flags)
    report_test(images, tested, flags)
    try:
        export(backbone, layer, images.labels)
    finally:
        write_outputs(images.labels, backbone, layer, flags)
    with extra('the record of the run'):
        record = create_record(images, backbone, tested, flags)
        record |= {
            'unreadable': int((~readable).sum()),
            'duplicates': len(pairs),
            'started': str(started),
        }
        record['seconds'] = (datetime.datetime.now() - started).total_seconds()
        write_whole(f'{flags.output_graph}.json', (json.dumps(record, indent=2) + '\n').encode())
    with extra('the pictures for TensorBoard'):
        write_pictures(images, tested, os.path.join(flags.summaries_dir, 'test'))
    graph, labels = shlex.quote(flags.output_graph), shlex.quote(flags.output_labels)
    print(f'To look at the training: tensorboard --logdir {shlex.quote(flags.summaries_dir)}')
    print(f'Wrote the graph {graph} and the labels {labels}. To label an image with them:')
    print(f'python3 tf_test.py <path to image> {graph} {labels}')


class Screen(io.TextIOWrapper):
    """A standard stream that nobody needs to read: if it cannot be written, what is printed is lost
    without a word.
    """

    def write(self, text: str) -> int:
        """Writes a text as print() does."""
        try:
            return super().write(text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(text)


def run(job: Callable, flags: argparse.Namespace) -> None:
    """Calls job(flags), and ends the program with a line and an exit code if that fails."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name) or open(os.devnull, 'w')
        setattr(sys, name, Screen(stream.detach(), stream.encoding, 'replace', line_buffering=True))
    try:
        job(flags)
    except UserError as error:
        sys.exit('ERROR: ' + str(error).replace('\n', ' '))
    except (tf.errors.OpError, OSError, UnicodeError) as error:
        reason = getattr(error, 'message', str(error)).replace('\n', ' ')
        sys.exit(
            f'ERROR: {reason}. What was computed so far is kept: fix this, and run the same '
            'command again.'
        )
    except KeyboardInterrupt:
        print(
            '\nStopped. All bottlenecks computed so far are kept: the same command goes on.',
            file=sys.stderr,
        )
        sys.exit(130)


if __name__ == '__main__':
    run(main, parsed_flags)
