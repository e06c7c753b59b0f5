#!/usr/bin/env python3
"""Teach Inception-v3 new classes with your own photographs, and write a SavedModel for TensorFlow Serving.

    python3 retrain_serving.py --image_dir=data/ --model_dir=inception/ --bottleneck_dir=bottlenecks/ \\
        --output_graph=trained_model/unoptimized_model.pb --output_labels=trained_model/labels.txt \\
        --saved_model_dir=trained_model_serving/1

This is tf_retrain.py, function by function, with one more section, "SavedModel", and one more flag.
"""

import signal

if __name__ == '__main__':  # Ctrl-C while the imports below run ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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
import os
import platform
import queue
import re
import shlex
import socket
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import uuid
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator

# NumPy's products are small ones here: threads of OpenBLAS would cost a second more than they bring.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
import numpy as np
from PIL import Image, ImageDraw, ImageFont
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
from tensorflow.io import gfile
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

tf.get_logger().setLevel('ERROR')

# The model of 2015: its archive, and its graph.
DATA_URL = 'http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz'
MODEL_GRAPH_NAME = 'classify_image_graph_def.pb'
BOTTLENECK_TENSOR_NAME = 'pool_3/_reshape:0'
BOTTLENECK_TENSOR_SIZE = 2048
MODEL_INPUT_WIDTH = 299
MODEL_INPUT_HEIGHT = 299
MODEL_INPUT_DEPTH = 3
# Tensors that every graph here has, whatever the network, as the graph of 2015 has them.
JPEG_DATA_TENSOR_NAME = 'DecodeJpeg/contents:0'
RESIZED_INPUT_TENSOR_NAME = 'ResizeBilinear:0'  # float, 0..255
SCALED_INPUT_TENSOR_NAME = 'Mul:0'

MOBILENET_URL = 'http://download.tensorflow.org/models/mobilenet_v1_{}_frozen.tgz'
MOBILENET_GRAPH_NAME = 'mobilenet_v1_{}/frozen_graph.pb'
MOBILENET_SIZES = [f'{size}_{side}' for size in ('1.0', '0.75', '0.50', '0.25') for side in (224, 192, 160, 128)]
ARCHITECTURES = ['inception_v3', *(f'mobilenet_{size}' for size in MOBILENET_SIZES)]
TFHUB_IMAGE_SIZE = (224, 224)  # for a module that takes any

MAX_NUM_IMAGES_PER_CLASS = 2**27 - 1  # the hash of a file name is taken modulo one more than this
IMAGE_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.gif')  # what the op DecodeJpeg decodes
FILE_KINDS = {  # the first bytes of files that users take for images which DecodeJpeg can decode
    b'\0\5\x16\7': 'what macOS keeps beside a file, not an image',
    b'BM': 'a BMP image, not JPEG, PNG or still GIF',
    b'RIFF': 'a WebP image, not JPEG, PNG or still GIF',
    b'II*\0': 'a TIFF image, not JPEG, PNG or still GIF',
    b'MM\0*': 'a TIFF image, not JPEG, PNG or still GIF',
    b'\0\0\0': 'a HEIC or AVIF image, not JPEG, PNG or still GIF',
    b'<': 'a web page, not an image',
}
CATEGORIES = ('training', 'testing', 'validation')

TENSOR_NAME_PATTERN = r'[A-Za-z0-9.][A-Za-z0-9_.\\/-]*'  # tensorflow/core/framework/node_def_util.cc
LARGE_CONSTANT = 1024  # bytes: more than that is a weight
# Images to a device at once: more are no faster on a CPU, and need more memory.
NETWORK_BATCH_SIZE = 128 if tf.config.list_physical_devices('GPU') else 32
DOWNLOAD_ATTEMPTS = 3  # in a row that bring nothing new
DOWNLOAD_TIMEOUT = 30  # seconds without a byte
DATA_SERVICE_TIMEOUT = 60  # seconds without a batch

# The tested images in TensorBoard. No file there is called an image: --summaries_dir may be in --image_dir.
SHOWN_IMAGES = 100  # misclassified ones, at most, in TensorBoard
PROJECTED_IMAGES = 2000  # in TensorBoard's projector: more are slow in a browser
THUMBNAIL_SIDE = 64
Image.MAX_IMAGE_PIXELS = None  # no warning of images that TensorFlow has decoded before
PROJECTOR_CONFIG = f"""
embeddings {{
  tensor_name: "bottlenecks"
  tensor_path: "bottlenecks.tsv"
  metadata_path: "metadata.tsv"
  sprite {{ image_path: "thumbnails" single_image_dim: {THUMBNAIL_SIDE} single_image_dim: {THUMBNAIL_SIDE} }}
}}
"""


class UserError(Exception):
    """A failure that the user can mend. Its text names the file or flag, and says what to do."""


# Small tools


def write_whole(path: str, contents: bytes) -> None:
    """Writes a file so that `path` holds all of `contents` or is left as it was, whenever the program is stopped."""
    temporary = os.path.join(os.path.dirname(path), f'.{uuid.uuid4().hex}.tmp')
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
    probe = os.path.join(path, f'.{uuid.uuid4().hex}.tmp')
    try:
        gfile.makedirs(path or '.')
        with gfile.GFile(probe, 'wb') as file:
            file.write(b'probe')
        gfile.remove(probe)
    except tf.errors.OpError as error:
        raise UserError(f"{flag}: nothing can be written in '{path or '.'}' ({error.message}). Name another folder.")


def log(line: str) -> None:
    """Prints a line with the time before it, as the original does."""
    print(f'{datetime.datetime.now()}: {line}', flush=True)


# Model


def is_whole_archive(path: str) -> bool:
    """Tells whether a .tgz unpacks to its end; gzip's checksum finds a byte that is wrong or missing."""
    try:
        with gfile.GFile(path, 'rb') as file, gzip.open(file) as archive:
            while archive.read(1 << 20):
                pass
        return True
    except (OSError, EOFError, zlib.error):
        return False


def download(url: str, path: str) -> None:
    """Fetches an archive to `path`, which appears only when it is whole.

    What has arrived waits in `path`.part, from where a later attempt, of this run or another, goes on.
    Raises UserError when DOWNLOAD_ATTEMPTS in a row bring nothing new.
    """
    partial, failures = path + '.part', 0
    while failures < DOWNLOAD_ATTEMPTS:
        time.sleep(failures)
        start = done = gfile.stat(partial).length if gfile.exists(partial) else 0
        try:
            request = urllib.request.Request(url, headers={'Range': f'bytes={start}-'} if start else {})
            with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
                if response.status != 206:  # the server does not resume, and sends it all
                    start = done = 0
                total = start + int(response.headers.get('Content-Length', 0))
                with gfile.GFile(partial, 'ab' if start else 'wb') as file:
                    while block := response.read1(1 << 16):
                        file.write(block)
                        done += len(block)
                        share = f'{100 * done / total:.1f}%' if total > start else f'{done / 1e6:.1f} MB'
                        print(f'\r>> Downloading {os.path.basename(path)} {share}', end='', file=sys.stderr)
                print(file=sys.stderr)
            if done >= total and is_whole_archive(partial):
                return gfile.rename(partial, path, overwrite=True)
            broken = done >= total
            reason = f'its {done:,} bytes are no .tgz archive' if broken else f'{done:,} of {total:,} bytes came'
        except (OSError, http.client.HTTPException, ValueError) as error:
            broken = getattr(error, 'code', None) == 416  # HTTP: there is nothing beyond what the part has
            reason = f'{type(error).__name__}: {error}'.strip()
        if broken:
            gfile.remove(partial)
        failures = failures + 1 if broken or done == start else 0
    raise UserError(
        f'--model_dir: {url} could not be fetched ({reason}). Fetch it in another way, save it as {path}, and run the '
        'same command again.'
    )


def maybe_download_and_extract(model_dir: str, url: str, graph_name: str) -> str:
    """Returns the path of `graph_name` in `model_dir`, unpacking or downloading the archive at `url` if need be."""
    graph_path = os.path.join(model_dir, graph_name)
    if gfile.exists(graph_path):
        return graph_path
    ensure_writable_dir(os.path.dirname(graph_path), '--model_dir')
    archive = os.path.join(model_dir, url.rsplit('/', 1)[1])
    if gfile.exists(archive) and not is_whole_archive(archive):
        print(f'{archive} is broken: set aside as {archive}.broken, to be fetched again.')
        gfile.rename(archive, archive + '.broken', overwrite=True)
    if not gfile.exists(archive):
        download(url, archive)
    files = {}
    try:
        with gfile.GFile(archive, 'rb') as file, tarfile.open(fileobj=file, mode='r|gz') as tar:
            for member in tar:
                folder, name = os.path.split(os.path.normpath(member.name))
                if not (member.isfile() or member.isdir()) or folder.startswith(('/', '..')):
                    raise tarfile.TarError(f'{member.name} is a link or a device, or would lie outside')
                if member.isfile() and folder == os.path.dirname(graph_name):
                    files[name] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError) as error:
        raise UserError(f'{archive} cannot be unpacked ({error}). Delete it and run the same command again.')
    for name, contents in files.items():
        write_whole(os.path.join(os.path.dirname(graph_path), name), contents)
    if not gfile.exists(graph_path):
        raise UserError(f'{archive} has no {graph_name} in it. Delete it and run the same command again.')
    return graph_path


def load_graph_def(path: str, architecture: str, wanted: list) -> tuple:
    """Reads a GraphDef up to the last of the `wanted` nodes; raises UserError if it lacks one of them.

    Returns it, and a checksum of the file.
    """
    graph_def = tf.compat.v1.GraphDef()
    advice = f'Delete {path} and run the same command again to fetch the model anew.'
    try:
        with gfile.GFile(path, 'rb') as file:
            contents = file.read()
        graph_def.ParseFromString(contents)
    except DecodeError:
        raise UserError(f'{path} is not a TensorFlow graph. {advice}')
    names = {node.name for node in graph_def.node}
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UserError(f'{path} is not the graph of {architecture}: it lacks {", ".join(missing)}. {advice}')
    if {name.lstrip('^').split(':')[0] for node in graph_def.node for name in node.input} - names:
        raise UserError(f'{path} is a damaged graph. {advice}')
    return tf.compat.v1.graph_util.extract_sub_graph(graph_def, [wanted[-1]]), zlib.crc32(contents)


@dataclasses.dataclass
class Backbone:
    """A pretrained network up to its bottleneck: the one thing here that knows which network it is.

    `graph_def` loads in TensorFlow 1 too. It begins with the nodes DecodeJpeg/contents to Mul of the 2015 graph, and
    ends with the node `bottleneck`, which makes float [N, bottleneck_size] of another shape of the same numbers.
    """

    name: str  # what the user calls it
    graph_def: tf.compat.v1.GraphDef
    checksum: int  # changes with the graph
    bottleneck: str
    bottleneck_size: int
    image_size: tuple  # height and width of the image that ResizeBilinear gives to the network
    cache_suffix: str  # between an image's name and the '.txt' of its cache file
    use_gpus: bool = True

    @property
    def output(self) -> str:
        """The node before `bottleneck`, which takes batches of any size: the 2015 graph's bottleneck is one row."""
        return next(node.input[0] for node in self.graph_def.node if node.name == self.bottleneck)

    def fold(self) -> tf.compat.v1.GraphDef:
        """Returns the graph up to `output`, without the ops that TensorFlow 2 refuses."""
        return fold_batch_norms(self.graph_def, self.output)

    def create_network(self, structure: tf.compat.v1.GraphDef, weights: dict, device: str | None = None) -> Callable:
        """Returns a tf.function from resized images, float [N, *image_size, 3] in 0..255, to bottlenecks.

        It takes the folded graph as split_weights gives it, with the weights made tensors or variables.
        """

        @tf.function(input_signature=[tf.TensorSpec([None, *self.image_size, MODEL_INPUT_DEPTH])])
        def network(images: tf.Tensor) -> tf.Tensor:
            with tf.device(device):
                inputs = {name: tf.identity(tensor) for name, tensor in weights.items()}
                inputs[RESIZED_INPUT_TENSOR_NAME] = images
                (rows,) = tf.graph_util.import_graph_def(structure, inputs, [f'{self.output}:0'])
                return tf.reshape(rows, [-1, self.bottleneck_size])

        network.get_concrete_function()  # finds out now whether TensorFlow takes the graph
        return network

    @functools.cached_property
    def networks(self) -> list:
        """The network on each device that is to compute bottlenecks; raises UserError if the graph is damaged."""
        devices = [gpu.name for gpu in tf.config.list_logical_devices('GPU') if self.use_gpus] or ['/CPU:0']
        networks = []
        try:
            structure, weights = split_weights(self.fold())
            for device in devices:
                with tf.device(device):
                    tensors = {name: tf.constant(value) for name, value in weights.items()}
                networks.append(self.create_network(structure, tensors, device))
        except (LookupError, TypeError, ValueError, tf.errors.OpError) as error:
            raise UserError(f'The graph of {self.name} is damaged ({error}). Fetch the model anew.')
        return networks


def load_backbone(
    architecture: str, model_dir: str, tfhub_module: str | None = None, use_gpus: bool = True
) -> Backbone:
    """Returns the network that the flags of the same names ask for, fetching it if need be."""
    if tfhub_module:
        return load_tfhub_module(tfhub_module, use_gpus)
    size = architecture.removeprefix('mobilenet_')
    if size not in MOBILENET_SIZES:
        path = maybe_download_and_extract(model_dir, DATA_URL, MODEL_GRAPH_NAME)
        bottleneck = BOTTLENECK_TENSOR_NAME.split(':')[0]
        wanted = ['DecodeJpeg/contents', 'ResizeBilinear', 'Mul', 'pool_3', bottleneck]
        graph_def, checksum = load_graph_def(path, architecture, wanted)
        image_size = (MODEL_INPUT_HEIGHT, MODEL_INPUT_WIDTH)
        return Backbone(path, graph_def, checksum, bottleneck, BOTTLENECK_TENSOR_SIZE, image_size, '', use_gpus)
    path = maybe_download_and_extract(model_dir, MOBILENET_URL.format(size), MOBILENET_GRAPH_NAME.format(size))
    bottleneck = 'MobilenetV1/Predictions/Reshape'
    graph_def, checksum = load_graph_def(path, architecture, ['input', bottleneck])
    image_size = (int(size.split('_')[1]),) * 2
    graph_def = prepend_decoding(graph_def, 'input:0', image_size, 127.5, 127.5)
    return Backbone(path, graph_def, checksum, bottleneck, 1001, image_size, f'_{architecture}', use_gpus)


def prepend_decoding(
    graph_def: tf.compat.v1.GraphDef,
    input_name: str,
    image_size: tuple,
    mean: float,
    deviation: float,
    prefix: str = '',
) -> tf.compat.v1.GraphDef:
    """Returns a graph that feeds the input of another from the bytes of a JPEG file, as (pixel - mean) / deviation.

    The nodes that do it have the names of those in the 2015 graph; the others get a prefix. Attributes which have
    their default value are left out: TensorFlow 1 does not know the newer ones.
    """
    with tf.Graph().as_default():
        contents = tf.constant(b'', name=JPEG_DATA_TENSOR_NAME.split(':')[0])
        image = tf.cast(tf.io.decode_jpeg(contents, MODEL_INPUT_DEPTH, name='DecodeJpeg'), tf.float32, name='Cast')
        image = tf.expand_dims(image, 0, name='ExpandDims')
        image = tf.compat.v1.image.resize_bilinear(image, image_size, name=RESIZED_INPUT_TENSOR_NAME.split(':')[0])
        image = tf.subtract(image, mean, name='Sub')
        image = tf.multiply(image, 1 / deviation, name=SCALED_INPUT_TENSOR_NAME.split(':')[0])
        tf.graph_util.import_graph_def(graph_def, {input_name: image}, name=prefix)
        joined = tf.compat.v1.train.export_meta_graph(strip_default_attrs=True).graph_def
    for node in joined.node:
        node.attr.pop('_output_shapes', None)  # of one image, while a batch may be fed
    return joined


def load_tfhub_module(handle: str, use_gpus: bool) -> Backbone:
    """Returns the network of a TF2 image feature-vector module, from images in 0..1 to [N, size] (the common signature
    of https://www.tensorflow.org/hub/common_signatures/images); raises UserError if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of its use of pkg_resources
            import tensorflow_hub
    except ImportError as error:
        raise UserError(f"--tfhub_module: {error}. Run pip install tensorflow-hub 'setuptools<81' first.")
    try:
        path = tensorflow_hub.resolve(handle)
        module = tf.saved_model.load(path)
    except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
        raise UserError(f"--tfhub_module: '{handle}' cannot be loaded ({str(error).strip()}). Name another module.")
    functions = module.__call__.concrete_functions if callable(module) else module.signatures.values()
    for function in functions:
        arguments = tf.nest.flatten(function.structured_input_signature)
        inputs = [argument.shape for argument in arguments if isinstance(argument, tf.TensorSpec)]
        outputs = [output.shape for output in tf.nest.flatten(function.structured_outputs)]
        # One of the functions may be for training, which a truth value among its arguments tells.
        if [len(shape) for shape in (*inputs, *outputs) if shape.rank] == [4, 2] and True not in arguments:
            break
    else:
        raise UserError(f"--tfhub_module: '{handle}' makes no feature vectors of images. Name one that does.")
    image_size = tuple(side or default for side, default in zip(inputs[0][1:3], TFHUB_IMAGE_SIZE, strict=True))
    size = outputs[0][1]

    @tf.function(input_signature=[tf.TensorSpec([None, *image_size, MODEL_INPUT_DEPTH], name='images')])
    def extract(images: tf.Tensor) -> tf.Tensor:
        (features,) = tf.nest.flatten(function(images))
        return tf.reshape(features, [-1, size], name='bottleneck')

    frozen = convert_variables_to_constants_v2(extract.get_concrete_function())
    checksum = 0
    for folder, _, names in sorted(gfile.walk(path)):
        for name in sorted(names):
            with gfile.GFile(os.path.join(folder, name), 'rb') as file:
                checksum = zlib.crc32(file.read(), checksum)
    graph_def = prepend_decoding(frozen.graph.as_graph_def(), frozen.inputs[0].name, image_size, 0, 255, 'module')
    graph_def = tf.compat.v1.graph_util.extract_sub_graph(graph_def, ['module/bottleneck'])
    suffix = '_' + re.sub(r'[:/]+', '~', handle.rstrip('/'))[-100:]  # as the retrain script of TensorFlow Hub has it
    return Backbone(handle, graph_def, checksum, 'module/bottleneck', size, image_size, suffix, use_gpus)


def add_node(
    graph_def: tf.compat.v1.GraphDef, name: str, op: str, *inputs: str, **attributes: tf.compat.v1.AttrValue | None
) -> str:
    """Appends a node with no other attributes than those given, which TensorFlow 1 knows; returns its name."""
    attributes = {'T': tf.compat.v1.AttrValue(type=tf.float32.as_datatype_enum)} | attributes
    graph_def.node.add(name=name, op=op, input=inputs, attr={k: v for k, v in attributes.items() if v is not None})
    return name


def add_constant(graph_def: tf.compat.v1.GraphDef, name: str, value: np.ndarray) -> str:
    """Appends a Const; returns its name."""
    tensor = tf.make_tensor_proto(value)
    dtype = tf.compat.v1.AttrValue(type=tensor.dtype)
    return add_node(graph_def, name, 'Const', T=None, dtype=dtype, value=tf.compat.v1.AttrValue(tensor=tensor))


def fold_batch_norms(graph_def: tf.compat.v1.GraphDef, output: str) -> tf.compat.v1.GraphDef:
    """Returns the graph up to `output` with its batch norms folded into its convolutions: TensorFlow 2 refuses the op.

    BatchNormWithGlobalNormalization is (x - mean) * s + beta, s = gamma / sqrt(variance + epsilon), where gamma counts
    only with scale_after_normalization (tensorflow/core/ops/nn_ops.cc). Behind a convolution with weights w, that is a
    convolution with w * s, and a bias of beta - mean * s. CheckNumerics goes too: it guards what cannot change.
    """
    nodes = {node.name: node for node in graph_def.node}

    def constant(name: str) -> np.ndarray:
        return tf.make_ndarray(nodes[name].attr['value'].tensor).astype(np.float64)

    folded = tf.compat.v1.GraphDef(library=graph_def.library)
    folded.versions.producer = tf.version.GRAPH_DEF_VERSION

    for node in graph_def.node:
        if node.op == 'CheckNumerics':
            continue
        if node.op != 'BatchNormWithGlobalNormalization':
            copy = folded.node.add()
            copy.CopyFrom(node)
            copy.attr.pop('_class', None)  # asks to be on one device with nodes that may go
            del copy.input[:]
            copy.input.extend(i for i in node.input if not (i[0] == '^' and nodes[i[1:]].op == 'CheckNumerics'))
            continue
        convolution, mean, variance, beta, gamma = node.input
        scale = 1 / np.sqrt(constant(variance) + node.attr['variance_epsilon'].f)
        if node.attr['scale_after_normalization'].b:
            scale *= constant(gamma)
        weights = (constant(nodes[convolution].input[1]) * scale).astype(np.float32)
        biases = (constant(beta) - constant(mean) * scale).astype(np.float32)
        copy = folded.node.add()
        copy.CopyFrom(nodes[convolution])
        copy.name = f'{node.name}/folded_convolution'
        copy.input[1] = add_constant(folded, f'{node.name}/folded_weights', weights)
        add_node(folded, node.name, 'BiasAdd', copy.name, add_constant(folded, f'{node.name}/folded_bias', biases))
    return tf.compat.v1.graph_util.extract_sub_graph(folded, [output])


def split_weights(graph_def: tf.compat.v1.GraphDef) -> tuple:
    """Returns a graph without its large constants, and these, as {tensor name: array}.

    TensorFlow takes five seconds longer, and twice the memory, to optimise a graph with 87 MB of constants in it.
    """
    structure, weights = tf.compat.v1.GraphDef(versions=graph_def.versions, library=graph_def.library), {}
    for node in graph_def.node:
        if node.op == 'Const' and node.ByteSize() > LARGE_CONSTANT:
            weights[f'{node.name}:0'] = tf.make_ndarray(node.attr['value'].tensor)
        else:
            structure.node.add().CopyFrom(node)
    return structure, weights


def run_networks(networks: list, batches: tf.data.Dataset) -> Iterator[tuple]:
    """Yields (tags, bottlenecks) of each (tags, images): the devices work at once, while the next batches are made."""
    batches = iter(batches.prefetch(2 * len(networks)))
    while group := list(itertools.islice(batches, len(networks))):
        results = [(tags, network(images)) for (tags, images), network in zip(group, networks, strict=False)]
        for tags, bottlenecks in results:
            yield tags.numpy(), bottlenecks.numpy()


def run_service(address: str, network: Callable, batches: tf.data.Dataset) -> Iterator[tuple]:
    """Yields (tags, bottlenecks) of each (tags, images), both made by the workers of a tf.data service.

    This gives up when DATA_SERVICE_TIMEOUT seconds bring nothing: the service would wait for a dead worker forever.
    """
    host, port = address.removeprefix('grpc://').rsplit(':', 1)
    try:
        socket.create_connection((host, int(port)), timeout=DATA_SERVICE_TIMEOUT).close()
    except OSError as error:
        raise UserError(
            f'--data_service: no dispatcher answers at {address} ({error}). Start it, or leave the flag out.'
        )
    policy = tf.data.experimental.service.ShardingPolicy.DYNAMIC
    batches = batches.map(lambda tags, images: (tags, network(images)))
    batches = batches.apply(tf.data.experimental.service.distribute(policy, address))
    arrived = queue.Queue(2)

    def fetch() -> None:
        for batch in itertools.chain(batches.as_numpy_iterator(), [None]):
            arrived.put(batch)

    threading.Thread(target=fetch, daemon=True).start()
    try:
        while batch := arrived.get(timeout=DATA_SERVICE_TIMEOUT):
            yield batch
    except queue.Empty:
        print(f'WARNING: {address} has sent nothing for {DATA_SERVICE_TIMEOUT} s. The rest is computed here.')


# Images and split


def get_label(dir_name: str) -> str:
    """Returns a class folder's label: lower case, every run of other characters than a-z and 0-9 one space.

    A name with none of those keeps its own characters: the original gave every such folder the label ' '.
    """
    label = re.sub(r'[^a-z0-9]+', ' ', dir_name.lower())
    return label if label.strip() else ' '.join(dir_name.split())


def get_category(path: str, testing_percentage: int, validation_percentage: int) -> str:
    """Returns the set that an image belongs to, by a hash of its path, so that it never changes sides.

    What follows `_nohash_` in a name is not hashed: variants of one photograph stay in one set.
    """
    hash_name = re.sub(r'_nohash_.*$', '', path)
    hashed = int(hashlib.sha1(hash_name.encode()).hexdigest(), 16) % (MAX_NUM_IMAGES_PER_CLASS + 1)
    percentage_hash = hashed * (100.0 / MAX_NUM_IMAGES_PER_CLASS)
    if percentage_hash < validation_percentage:
        return 'validation'
    if percentage_hash < testing_percentage + validation_percentage:
        return 'testing'
    return 'training'


def list_dir(path: str) -> list:
    """Returns the names in a folder, sorted; raises UserError if one of them is not Unicode."""
    try:
        return sorted(gfile.listdir(path))
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' has a file whose name is not UTF-8, {error.object!r}. Rename it.")


def create_image_lists(image_dir: str, testing_percentage: int, validation_percentage: int) -> dict:
    """Lists the images of each class folder of `image_dir`, split into three sets.

    Returns {label: {'dir': folder name, 'training': [file name, ...], 'testing': [...], 'validation': [...]}}, classes
    and files sorted by name. Raises UserError if that does not make two classes, each with a label of its own.
    """
    if not gfile.isdir(image_dir):
        raise UserError(f"--image_dir: there is no folder '{image_dir}'. Name the one that holds your class folders.")
    image_lists, loose = {}, 0
    for dir_name in (name.rstrip('/') for name in list_dir(image_dir) if not name.startswith('.')):
        folder = os.path.join(image_dir, dir_name)
        if not gfile.isdir(folder):
            loose += os.path.splitext(dir_name)[1].lower() in IMAGE_EXTENSIONS
            continue
        sets = {category: [] for category in CATEGORIES}
        passed_over = Counter()
        for name in list_dir(folder):
            path = os.path.join(folder, name)
            extension = os.path.splitext(name)[1].lower()
            if name.startswith('.'):
                passed_over['hidden'] += 1
            elif extension in IMAGE_EXTENSIONS:
                sets[get_category(path, testing_percentage, validation_percentage)].append(name)
            else:
                passed_over['folder' if gfile.isdir(path) else extension] += 1
        count = sum(map(len, sets.values()))
        if passed_over:
            kinds = ', '.join(f'{number} {kind or "without ending"}' for kind, number in sorted(passed_over.items()))
            print(f'{folder}: {count} images; passed over: {kinds}')
        if not count:
            print(f'WARNING: {folder} has no images, and is not taken for a class.')
            continue
        if count < 20:
            print(f'WARNING: Folder has less than 20 images, which may cause issues. ({folder}: {count})')
        label = get_label(dir_name)
        if not label:
            raise UserError(f'{folder!r}: this folder name makes a blank label. Rename the folder.')
        if label in image_lists:
            other = os.path.join(image_dir, image_lists[label]['dir'])
            raise UserError(f"{other} and {folder} have the same label '{label}'. Rename or merge the folders.")
        image_lists[label] = {'dir': dir_name, **sets}
    if loose:
        print(f'WARNING: {image_dir} has {loose} images beside the class folders, passed over. Put them into folders.')
    if len(image_lists) < 2:
        raise UserError(
            f"--image_dir: '{image_dir}' has {len(image_lists) or 'no'} class folder with images. Make two or more "
            f'folders there, one a class, and put the images of each class ({" ".join(IMAGE_EXTENSIONS)}) into its own.'
        )
    return image_lists


def list_images(image_lists: dict) -> list:
    """Returns (label, category, 'folder/file') of every image: the order of the rows in all arrays."""
    return [
        (label, category, os.path.join(sets['dir'], name))
        for label, sets in image_lists.items()
        for category in CATEGORIES
        for name in sets[category]
    ]


def get_rows(image_lists: dict, category: str) -> tuple:
    """Returns the rows of a set: the first of each class and how many it has there, both int [classes]."""
    sizes = np.array([[len(sets[c]) for c in CATEGORIES] for sets in image_lists.values()])
    first = sizes.cumsum().reshape(sizes.shape) - sizes
    column = CATEGORIES.index(category)
    return first[:, column], sizes[:, column]


def remove_images(image_lists: dict, files: set) -> None:
    """Removes images, given as 'folder/file'; raises UserError if a class is left with none."""
    for sets in image_lists.values():
        for category in CATEGORIES:
            sets[category] = [name for name in sets[category] if os.path.join(sets['dir'], name) not in files]
        if not any(sets[category] for category in CATEGORIES):
            raise UserError(
                f"No image in the class folder '{sets['dir']}' can be read. Add some, or remove the folder."
            )


def warn_of_empty_sets(image_lists: dict, percentages: dict) -> None:
    """Says in one line a set which classes have no image in it; raises UserError if there is nothing to train on."""
    for category, percentage in percentages.items():
        empty = [label for label, sets in image_lists.items() if not sets[category]]
        if empty and percentage:
            print(
                f'WARNING: no {category} image in {len(empty)} of {len(image_lists)} classes, left out of that set: '
                f'{", ".join(empty)}. Add images to them, or change --testing_percentage or --validation_percentage.'
            )
    if not any(sets['training'] for sets in image_lists.values()):
        raise UserError('--image_dir: no image fell into the training set. Add images, or lower --testing_percentage.')


# Bottlenecks


def read_bottlenecks(paths: list, size: int) -> tuple:
    """Reads cache files; TensorFlow parses them on all cores.

    Returns the bottlenecks, float32 [len(paths), size], fingerprints of the files, int64, and which of them hold
    `size` finite numbers, bool; the rows of the others are undefined.
    """

    def parse(row: tf.Tensor, path: tf.Tensor) -> tuple:
        text = tf.io.read_file(path)
        numbers = tf.strings.to_number(tf.strings.split(text, ','))
        numbers = tf.debugging.check_numerics(tf.ensure_shape(numbers, [size]), '')
        return row, numbers, fingerprint(text)

    files = tf.data.Dataset.from_tensor_slices((np.arange(len(paths)), paths))
    files = files.map(parse, tf.data.AUTOTUNE, deterministic=False).ignore_errors()
    bottlenecks = np.empty([len(paths), size], np.float32)
    fingerprints, valid = np.zeros(len(paths), np.int64), np.zeros(len(paths), bool)
    for rows, numbers, prints in files.batch(256).as_numpy_iterator():
        bottlenecks[rows], fingerprints[rows], valid[rows] = numbers, prints, True
    return bottlenecks, fingerprints, valid


def fingerprint(contents: tf.Tensor | list) -> tf.Tensor:
    """Returns FarmHash's 62-bit fingerprint of strings, which is the same on every machine: int64."""
    return tf.strings.to_hash_bucket_fast(contents, 2**62)


class Provenance:
    """Knows which image and model each cache file was made of, and which images could not be read.

    Each run appends lines [file, fingerprint of its cache file or why it is unreadable, source] to a JSON Lines file of
    its own in the bottleneck folder, so that runs at the same time do not meet; a line that a kill cut short counts for
    nothing. A cache file of which there is no line, as the original wrote it, is believed as it stands.
    """

    def __init__(self, bottleneck_dir: str, model: int) -> None:
        self.model, self.known = model, {}
        self.path = os.path.join(bottleneck_dir, f'.provenance-{uuid.uuid4().hex}.jsonl')
        self.journal = None
        for path in gfile.glob(os.path.join(bottleneck_dir, '.provenance-*.jsonl')):
            with gfile.GFile(path, 'rb') as file:
                for line in file.read().splitlines():
                    with contextlib.suppress(ValueError, TypeError):
                        name, made, source = json.loads(line)
                        self.known.setdefault(name, {})[made] = tuple(source)

    def source(self, path: str) -> tuple:
        """Returns what a bottleneck depends on: size and time (ns) of the image, and the model's checksum."""
        try:
            status = gfile.stat(path)
            return status.length, status.mtime_nsec, self.model
        except tf.errors.OpError:
            return -1, -1, self.model

    def is_current(self, file: str, fingerprint: int, source: tuple) -> bool:
        """Tells whether a cache file may be used: no line speaks against it."""
        lines = self.known[file]
        return lines[fingerprint] == source if fingerprint in lines else source not in lines.values()

    def why_unreadable(self, file: str, source: tuple) -> str | None:
        """Returns why an image could not be read when it was as it is now."""
        reasons = (made for made, old in self.known.get(file, {}).items() if old == source and isinstance(made, str))
        return next(reasons, None)

    def add(self, file: str, made: int | str, source: tuple) -> None:
        """Appends a line; flush() makes it last."""
        if not self.journal:
            self.journal = gfile.GFile(self.path, 'w')
        self.known.setdefault(file, {})[made] = source
        self.journal.write(json.dumps([file, made, source]) + '\n')


def decode_image(path: tf.Tensor) -> tf.Tensor:
    """Reads and decodes an image file with the graph's own op: uint8 [height, width, 3]."""
    return tf.io.decode_jpeg(tf.io.read_file(path), channels=MODEL_INPUT_DEPTH)


def resize_image(image: tf.Tensor, size: tuple | tf.Tensor) -> tf.Tensor:
    """Resizes to (height, width) with the graph's own op, which tf.image.resize does not use: float [*size, 3]."""
    return tf.compat.v1.image.resize_bilinear(image[tf.newaxis], size)[0]


def compute_bottlenecks(paths: list, backbone: Backbone, data_service: str | None = None) -> Iterator[tuple]:
    """Yields (indices of paths, their bottlenecks) in batches, and leaves out the images that cannot be read.

    The workers of a data service do all of it, each image on one of them; what one of them loses is computed here.
    """
    left = np.ones(len(paths), bool)
    for service in [data_service, None] if data_service else [None]:
        if not left.any():
            return
        images = tf.data.Dataset.from_tensor_slices((np.flatnonzero(left), np.array(paths)[left]))
        images = images.map(
            lambda row, path: (row, resize_image(decode_image(path), backbone.image_size)), tf.data.AUTOTUNE
        )
        images = images.ignore_errors().batch(NETWORK_BATCH_SIZE)
        networks = backbone.networks
        batches = run_service(service, networks[0], images) if service else run_networks(networks, images)
        for rows, bottlenecks in batches:
            left[rows] = False
            yield rows, bottlenecks


def why_unreadable(path: str) -> str:
    """Returns the reason why an image cannot be decoded."""
    try:
        contents = tf.io.read_file(path).numpy()
        if not contents:
            return 'it is empty'
        for start, kind in FILE_KINDS.items():
            if contents.startswith(start):
                return f'it is {kind}'
        resize_image(decode_image(path), (1, 1))
        return 'it changed while it was read'
    except tf.errors.OpError as error:
        return re.sub(r'{{.*?}} *| \[Op:.*', '', error.message, flags=re.DOTALL)


def get_bottleneck_path(file: str, flags: argparse.Namespace, backbone: Backbone) -> str:
    """Returns the path of the cache file of an image, given as 'folder/file'."""
    return os.path.join(flags.bottleneck_dir, f'{file}{backbone.cache_suffix}.txt')


def cache_bottlenecks(image_lists: dict, flags: argparse.Namespace, backbone: Backbone) -> np.ndarray:
    """Returns all images' bottlenecks, float32 [images, bottleneck size] in the order of list_images, from the cache.

    Those that the cache lacks are first computed and written. An image that cannot be decoded is named, and removed
    from `image_lists`; with --strict, it is a UserError.
    """
    while True:
        provenance = Provenance(flags.bottleneck_dir, backbone.checksum)
        files = [file for _, _, file in list_images(image_lists)]
        cache_paths = [get_bottleneck_path(file, flags, backbone) for file in files]
        bottlenecks, *read = read_bottlenecks(cache_paths, backbone.bottleneck_size)
        missing, unreadable = {}, {}
        for file, cache_path, mark, valid in zip(files, cache_paths, *read, strict=True):
            if valid and file not in provenance.known:
                continue
            source = provenance.source(os.path.join(flags.image_dir, file))
            if valid and provenance.is_current(file, int(mark), source):
                continue
            if reason := provenance.why_unreadable(file, source):
                unreadable[file] = reason
                continue
            missing[file] = source
            if valid:
                print(f'The image or the model changed, recreating bottleneck {cache_path}')
            elif gfile.exists(cache_path):
                print(f'Invalid float found, recreating bottleneck {cache_path}')
        if not missing and not unreadable:
            return bottlenecks
        del bottlenecks  # all are read again later: memory holds the network or the bottlenecks, not both
        if missing:
            unreadable |= create_bottlenecks(missing, provenance, flags, backbone)
        for file, reason in sorted(unreadable.items()):
            line = f'{os.path.join(flags.image_dir, file)!r} is left out: {reason}'
            if flags.strict:
                raise UserError(f'--strict: {line}. Replace or delete it.')
            print(f'WARNING: {line}')
        if unreadable:
            print(f'WARNING: {len(unreadable)} of {len(files)} images are left out. Replace or delete them.')
        remove_images(image_lists, set(unreadable))


def create_bottlenecks(sources: dict, provenance: Provenance, flags: argparse.Namespace, backbone: Backbone) -> dict:
    """Computes and writes the bottlenecks of {file: source}; returns {file: reason} of those that cannot be read."""
    files = list(sources)
    for folder in {os.path.dirname(file) for file in files}:
        gfile.makedirs(os.path.join(flags.bottleneck_dir, folder))
    paths = [os.path.join(flags.image_dir, file) for file in files]
    left = set(files)
    on_screen = sys.stderr.isatty()
    with tqdm(total=len(files), desc='Bottlenecks', unit='image', mininterval=0.1 if on_screen else 10) as bar:
        say = bar.write if on_screen else print  # the bar stays below the lines where both are on one screen
        for indices, batch in compute_bottlenecks(paths, backbone, flags.data_service):
            if not np.isfinite(batch).all():
                raise UserError(
                    f'The graph of {backbone.name} gives numbers that are not finite. Fetch the model anew.'
                )
            texts = {files[i]: ','.join(map(str, values)) for i, values in zip(indices, batch, strict=True)}
            for file, mark in zip(texts, fingerprint(list(texts.values())).numpy(), strict=True):
                provenance.add(file, int(mark), sources[file])
            provenance.journal.flush()
            for file, text in texts.items():
                cache_path = get_bottleneck_path(file, flags, backbone)
                write_whole(cache_path, text.encode())
                left.remove(file)
                say(f'Creating bottleneck at {cache_path}')
                if (len(files) - len(left)) % 100 == 0:
                    say(f'{len(files) - len(left)} bottleneck files created.')
            bar.update(len(batch))
    unreadable = {file: why_unreadable(os.path.join(flags.image_dir, file)) for file in left}
    for file, reason in unreadable.items():
        provenance.add(file, reason, sources[file])
    if unreadable:
        provenance.journal.flush()
    return unreadable


def get_random_cached_bottlenecks(rng: np.random.Generator, rows: tuple, how_many: int) -> tuple:
    """Draws from a set, as get_rows gives it: each time a class uniformly at random, and an image of it likewise.

    Returns rows and class indices, int of shape `how_many`; every image once if that is -1. A class without an image
    in the set is never drawn.
    """
    first, count = rows
    if how_many == -1:
        all_rows = [start + np.arange(number) for start, number in zip(first, count, strict=True)]
        return np.concatenate(all_rows), np.repeat(np.arange(len(count)), count)
    classes = rng.choice(np.flatnonzero(count), how_many)
    return first[classes] + rng.integers(count[classes]), classes


# Distortions


def should_distort_images(flags: argparse.Namespace) -> bool:
    """Tells whether a distortion is asked for, so that every training step needs bottlenecks of its own."""
    return bool(flags.flip_left_right or flags.random_crop or flags.random_scale or flags.random_brightness)


def distort_image(image: tf.Tensor, seed: tf.Tensor, image_size: tuple, flags: argparse.Namespace) -> tf.Tensor:
    """Crops, scales, mirrors and brightens an image at random, as the flags say: float [*image_size, 3].

    It is resized to image_size * (1 + random_crop / 100) * U(1, 1 + random_scale / 100), image_size of that is kept,
    mirrored half the time, and multiplied by U(1 - b / 100, 1 + b / 100) for a random_brightness of b.
    """
    scale_seed, crop_seed, flip_seed, brightness_seed = tf.unstack(tf.random.split(seed, 4))
    margin_scale = 1.0 + flags.random_crop / 100.0
    resize_scale = tf.random.stateless_uniform([], scale_seed, 1.0, 1.0 + flags.random_scale / 100.0)
    precrop_shape = tf.cast(margin_scale * resize_scale * image_size, tf.int32)
    size = [*image_size, MODEL_INPUT_DEPTH]
    image = tf.image.stateless_random_crop(resize_image(image, precrop_shape), size, crop_seed)
    if flags.flip_left_right:
        image = tf.image.stateless_random_flip_left_right(image, flip_seed)
    spread = flags.random_brightness / 100.0
    return image * tf.random.stateless_uniform([], brightness_seed, 1.0 - spread, 1.0 + spread)


def get_random_distorted_bottlenecks(
    paths: list, draw: Callable, how_many: int, seed: np.ndarray, backbone: Backbone, flags: argparse.Namespace
) -> Iterator[tuple]:
    """Calls draw() for rows and class indices, both int [N], `how_many` times.

    Yields (bottleneck, class index) of every drawn row, its image distorted afresh.
    """
    paths = tf.constant(paths)

    def distort(index: tf.Tensor, drawn: tuple) -> tuple:
        row, class_index = drawn
        image_seed = tf.random.fold_in(seed, index)
        return class_index, distort_image(decode_image(paths[row]), image_seed, backbone.image_size, flags)

    draws = tf.data.Dataset.from_generator(
        lambda: (draw() for _ in range(how_many)), output_signature=(tf.TensorSpec([None], tf.int64),) * 2
    )
    images = draws.unbatch().enumerate().map(distort, tf.data.AUTOTUNE).ignore_errors().batch(NETWORK_BATCH_SIZE)
    for batch_classes, bottlenecks in run_networks(backbone.networks, images):
        yield from zip(bottlenecks, batch_classes, strict=True)


# Final layer


class FinalLayer:
    """The new last layer: softmax(bottlenecks @ weights + biases), with weights [bottleneck size, classes].

    Weights start from a truncated normal of stddev 0.001, biases from 0. The loss is the softmax cross entropy, mean
    over the batch; every step is one of plain gradient descent. In NumPy, as a step is two small products of matrices,
    which take a third of the time that a call into TensorFlow does.
    """

    def __init__(self, bottleneck_size: int, class_count: int, learning_rate: float, seed: np.ndarray) -> None:
        self.weights = tf.random.stateless_truncated_normal([bottleneck_size, class_count], seed, stddev=0.001).numpy()
        self.biases = np.zeros(class_count, np.float32)
        self.learning_rate = np.float32(learning_rate)

    def evaluate(self, bottlenecks: np.ndarray, classes: np.ndarray) -> tuple:
        """Returns logits and activations [N, classes] of bottlenecks [N, size], and, for classes, int [N], the means of
        cross entropy and accuracy."""
        logits = bottlenecks @ self.weights + self.biases
        shifted = logits - logits.max(axis=1, keepdims=True)  # exp() of the logits themselves may overflow
        exponentials = np.exp(shifted)
        sums = exponentials.sum(axis=1, keepdims=True)
        cross_entropy = (np.log(sums[:, 0]) - shifted[np.arange(len(classes)), classes]).mean()
        return logits, exponentials / sums, cross_entropy, (logits.argmax(axis=1) == classes).mean()

    def train(self, bottlenecks: np.ndarray, classes: np.ndarray) -> tuple:
        """Takes a step; returns the batch's cross entropy and accuracy from before it."""
        _, gradient, cross_entropy, accuracy = self.evaluate(bottlenecks, classes)
        gradient[np.arange(len(classes)), classes] -= 1  # of the cross entropy, by the logits, times N
        gradient *= self.learning_rate / len(classes)
        self.weights -= bottlenecks.T @ gradient
        self.biases -= gradient.sum(axis=0)
        return cross_entropy, accuracy


# Summaries


def variable_summaries(scope: str, values: np.ndarray) -> dict:
    """Returns the original's five summaries of a variable."""
    statistics = {'mean_1': values.mean(), 'stddev_1': values.std(), 'max_1': values.max(), 'min_1': values.min()}
    return {f'{scope}/summaries/{name}': value for name, value in (statistics | {'histogram': values}).items()}


def layer_summaries(layer: FinalLayer) -> dict:
    """Returns the original's summaries of the final layer."""
    weights = variable_summaries('final_training_ops/weights', layer.weights)
    return weights | variable_summaries('final_training_ops/biases', layer.biases)


def activation_summaries(logits: np.ndarray, activations: np.ndarray) -> dict:
    """Returns the original's summaries of what the layer makes of a batch."""
    return {'final_training_ops/Wx_plus_b/pre_activations': logits, 'activations': activations}


def histogram(values: np.ndarray) -> tf.compat.v1.HistogramProto:
    """Returns the distribution of some values, in 30 buckets of equal width."""
    values = values.ravel().astype(np.float64)
    bucket, edges = np.histogram(values, 30)
    moments = dict(num=values.size, sum=values.sum(), sum_squares=np.square(values).sum())
    return tf.compat.v1.HistogramProto(min=edges[0], max=edges[-1], **moments, bucket_limit=edges[1:], bucket=bucket)


class SummaryWriter:
    """Writes what TensorBoard reads: a TFRecord file of Event protos (tensorflow/core/util/events_writer.cc).

    All that is known of a step goes into one event, as tf.summary takes 0.3 to 5 ms for each tag.
    """

    def __init__(self, folder: str) -> None:
        for name in ('events.out.tfevents.*', 'projector_config.pbtxt'):  # of an earlier run
            for path in gfile.glob(os.path.join(folder, name)):
                gfile.remove(path)
        self.folder = folder
        name = f'events.out.tfevents.{time.time():.0f}.{platform.node()}.{os.getpid()}'
        self.file = tf.io.TFRecordWriter(os.path.join(folder, name))
        self.write(file_version='brain.Event:2')

    def write(self, values: dict | None = None, **event: object) -> None:
        """Writes an event: {tag: number, picture, or array to show as a histogram}, and fields of the Event."""
        event = tf.compat.v1.Event(wall_time=time.time(), **event)
        for tag, value in (values or {}).items():
            if isinstance(value, Image.Image):
                size = {'width': value.width, 'height': value.height, 'colorspace': MODEL_INPUT_DEPTH}
                shown = {'image': {**size, 'encoded_image_string': encode_png(value)}}
            else:
                shown = {'histo': histogram(value)} if np.ndim(value) else {'simple_value': value}
            event.summary.value.add(tag=tag, **shown)
        self.file.write(event.SerializeToString())


def strip_weights(graph_def: tf.compat.v1.GraphDef) -> tf.compat.v1.GraphDef:
    """Returns a copy with no more than type and shape of the large constants, which is what TensorBoard shows."""
    stripped = tf.compat.v1.GraphDef()
    for node in graph_def.node:
        copy = stripped.node.add(name=node.name, op=node.op)
        if node.ByteSize() <= LARGE_CONSTANT:
            copy.CopyFrom(node)
        else:
            tensor = node.attr['value'].tensor
            copy.attr['dtype'].type = tensor.dtype
            copy.attr['value'].tensor.dtype = tensor.dtype
            copy.attr['value'].tensor.tensor_shape.CopyFrom(tensor.tensor_shape)
    return stripped


# Export


def add_final_training_ops(backbone: Backbone, layer: FinalLayer, final_tensor_name: str) -> tf.compat.v1.GraphDef:
    """Returns the frozen graph: the backbone's nodes as they are, and the new layer behind them.

    `versions` stays as the model has it: with a producer of 9 or more, no TensorFlow would load the 2015 graph for its
    batch norms.
    """
    frozen = tf.compat.v1.GraphDef()
    frozen.CopyFrom(backbone.graph_def)
    add = functools.partial(add_node, frozen)
    dtype = tf.compat.v1.AttrValue(type=tf.float32.as_datatype_enum)
    shape = tf.compat.v1.AttrValue(shape=tf.TensorShape([None, backbone.bottleneck_size]).as_proto())
    no = tf.compat.v1.AttrValue(b=False)
    name = 'input/BottleneckInputPlaceholder'
    fed = add(name, 'PlaceholderWithDefault', backbone.bottleneck, T=None, dtype=dtype, shape=shape)
    weights = add_constant(frozen, 'final_training_ops/weights/final_weights', layer.weights)
    biases = add_constant(frozen, 'final_training_ops/biases/final_biases', layer.biases)
    weights, biases = (add(f'{name}/read', 'Identity', name) for name in (weights, biases))
    scope = 'final_training_ops/Wx_plus_b'
    product = add(f'{scope}/MatMul', 'MatMul', fed, weights, transpose_a=no, transpose_b=no)
    add(final_tensor_name, 'Softmax', add(f'{scope}/add', 'AddV2', product, biases))
    return frozen


def create_optimized_graph(backbone: Backbone, layer: FinalLayer, final_tensor_name: str) -> tf.compat.v1.GraphDef:
    """Returns the folded graph for other runtimes: scaled images, float [N, height, width, 3], at Mul:0 to scores."""
    folded = backbone.fold()
    name = SCALED_INPUT_TENSOR_NAME.split(':')[0]
    (scaled,) = (node for node in folded.node if node.name == name)
    scaled.CopyFrom(tf.compat.v1.NodeDef(name=name, op='Placeholder'))
    scaled.attr['dtype'].type = tf.float32.as_datatype_enum
    scaled.attr['shape'].shape.CopyFrom(tf.TensorShape([None, *backbone.image_size, MODEL_INPUT_DEPTH]).as_proto())
    optimized = tf.compat.v1.graph_util.extract_sub_graph(folded, [backbone.output])
    add, constant = functools.partial(add_node, optimized), functools.partial(add_constant, optimized)
    scope = 'final_training_ops'
    rows = constant(f'{backbone.bottleneck}/rows', np.array([-1, backbone.bottleneck_size], np.int32))
    rows = add(backbone.bottleneck, 'Reshape', backbone.output, rows)
    product = add(f'{scope}/MatMul', 'MatMul', rows, constant(f'{scope}/weights', layer.weights))
    logits = add(f'{scope}/BiasAdd', 'BiasAdd', product, constant(f'{scope}/biases', layer.biases))
    add(final_tensor_name, 'Softmax', logits)
    return optimized


def write_outputs(outputs: dict) -> None:
    """Writes {path: contents}; if that fails, writes all of it elsewhere, and raises UserError to say where."""
    try:
        for path, contents in outputs.items():
            write_whole(path, contents)
    except tf.errors.OpError as error:
        for parent in (tempfile.gettempdir(), os.path.expanduser('~'), '.'):
            with contextlib.suppress(OSError, tf.errors.OpError):
                spare = tempfile.mkdtemp(prefix='trained_model_', dir=parent)
                for path, contents in outputs.items():
                    write_whole(os.path.join(spare, os.path.basename(path)), contents)
                raise UserError(f'{path}: {error.message}. The trained graph and its labels are in {spare}: move them.')
        raise


# Pictures for TensorBoard


def encode_png(picture: Image.Image) -> bytes:
    """Returns a picture as the contents of a PNG file."""
    with io.BytesIO() as file:
        picture.save(file, 'PNG')
        return file.getvalue()


def load_thumbnail(path: str, side: int) -> Image.Image:
    """Returns an image, at most `side` pixels wide and high; a grey square if Pillow cannot read it."""
    try:
        with gfile.GFile(path, 'rb') as file, Image.open(file) as image:
            image.draft('RGB', (side, side))  # decodes a JPEG no larger than need be
            image = image.convert('RGB')
            image.thumbnail((side, side))
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, tf.errors.OpError):
        return Image.new('RGB', (side, side), 'grey')


def draw_confusion_matrix(confusion: np.ndarray, labels: list) -> Image.Image:
    """Draws counts, int [true class, predicted class]: the darker a cell, the larger its share of the true class."""
    count, corner = len(labels), 'true / predicted'
    cell = max(2, min(48, 1200 // count))
    font = ImageFont.load_default(min(16, cell))
    names = [f'{label[:23]}…' if len(label) > 24 else label for label in labels] if cell >= 8 else [''] * count
    margin = 16 + int(max(map(font.getlength, [*names, corner])))
    picture = Image.new('RGB', (margin + cell * count + 10,) * 2, 'white')

    def draw_names(anchor: str, x: int) -> Image.Image:
        strip = Image.new('RGB', (margin, cell * count), 'white')
        draw = ImageDraw.Draw(strip)
        for i, name in enumerate(names):
            draw.text((x, cell * (i + 0.5)), name, 'black', font, anchor)
        return strip

    picture.paste(draw_names('rm', margin - 6), (0, margin))
    picture.paste(draw_names('lm', 6).transpose(Image.Transpose.ROTATE_90), (margin, 0))
    draw = ImageDraw.Draw(picture)
    draw.text((margin - 6, margin - 6), corner, 'grey', font, 'rs')
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    for row, column in np.ndindex(count, count):
        x, y, share = margin + cell * column, margin + cell * row, shares[row, column]
        colour = tuple(int(255 - share * (255 - full)) for full in (8, 48, 107))
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), colour, 'lightgrey' if cell > 8 else None)
        if confusion[row, column] and cell >= 16:
            middle = (x + cell / 2, y + cell / 2)
            draw.text(middle, str(confusion[row, column]), 'white' if share > 0.5 else 'black', font, 'mm')
    return picture


def write_pictures(
    writer: SummaryWriter,
    image_paths: list,
    cache_paths: list,
    labels: list,
    classes: np.ndarray,
    predictions: np.ndarray,
    confusion: np.ndarray,
) -> None:
    """Writes what TensorBoard shows of the tested images: the confusion matrix, the mistaken images, and, for its
    projector, all of them by their bottlenecks, with thumbnails (tensorboard/plugins/projector).

    Both lists have N paths; classes and predictions are int [N].
    """
    pictures = {'confusion_matrix': draw_confusion_matrix(confusion, labels)}
    for i in np.flatnonzero(classes != predictions)[:SHOWN_IMAGES]:
        names = f'{labels[classes[i]]} taken for {labels[predictions[i]]}'
        pictures[f'misclassified/{names}/{os.path.basename(image_paths[i])}'] = load_thumbnail(image_paths[i], 299)
    writer.write(pictures)
    writer.file.close()
    columns = math.ceil(math.sqrt(len(image_paths)))
    sprite = Image.new('RGB', (columns * THUMBNAIL_SIDE, columns * THUMBNAIL_SIDE), 'white')
    for i, path in enumerate(image_paths):
        corner = (i % columns * THUMBNAIL_SIDE, i // columns * THUMBNAIL_SIDE)
        sprite.paste(load_thumbnail(path, THUMBNAIL_SIDE), corner)
    rows = zip(classes, predictions, image_paths, strict=True)
    rows = [
        (labels[true], labels[predicted], re.sub(r'\s', ' ', os.path.basename(path))) for true, predicted, path in rows
    ]
    bottlenecks = []
    for path in cache_paths:
        with gfile.GFile(path) as file:
            bottlenecks.append(file.read().replace(',', '\t'))
    files = {
        'bottlenecks.tsv': '\n'.join(bottlenecks).encode(),
        'metadata.tsv': ''.join('\t'.join(row) + '\n' for row in [('label', 'predicted', 'image'), *rows]).encode(),
        'thumbnails': encode_png(sprite),
        'projector_config.pbtxt': PROJECTOR_CONFIG.encode(),
    }
    for name, contents in files.items():
        write_whole(os.path.join(writer.folder, name), contents)


# Main


@contextlib.contextmanager
def ctrl_c_stops_training() -> Iterator[list]:
    """Within, the first Ctrl-C only fills the list that this yields; the second is a KeyboardInterrupt again."""
    stopped = []

    def handle(signum: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print('\nCtrl-C: what was learned so far will be tested and written. Ctrl-C again quits.', flush=True)
        stopped.append(signum)

    signal.signal(signal.SIGINT, handle)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def train_final_layer(
    flags: argparse.Namespace, image_lists: dict, bottlenecks: np.ndarray, layer: FinalLayer, backbone: Backbone
) -> None:
    """Trains the layer; logs accuracy and cross entropy every --eval_step_interval steps and at the last one."""
    seeds = np.random.SeedSequence(flags.random_seed).spawn(3)
    training_rng, validation_rng = np.random.default_rng(seeds[0]), np.random.default_rng(seeds[1])
    training_rows, validation_rows = get_rows(image_lists, 'training'), get_rows(image_lists, 'validation')
    steps, batch_size, interval = flags.how_many_training_steps, flags.train_batch_size, flags.eval_step_interval
    validation_size, distort = flags.validation_batch_size, should_distort_images(flags)
    if distort:
        paths = [os.path.join(flags.image_dir, file) for _, _, file in list_images(image_lists)]
        draw = functools.partial(get_random_cached_bottlenecks, training_rng, training_rows, batch_size)
        seed = seeds[2].generate_state(2)
        distorted = get_random_distorted_bottlenecks(paths, draw, steps, seed, backbone, flags)
    train_writer = SummaryWriter(os.path.join(flags.summaries_dir, 'train'))
    validation_writer = SummaryWriter(os.path.join(flags.summaries_dir, 'validation'))
    # Stripped first, as a copy would take 90 MB beside the bottlenecks, and again of the new weights.
    stripped = dataclasses.replace(backbone, graph_def=strip_weights(backbone.graph_def))
    untrained = strip_weights(add_final_training_ops(stripped, layer, flags.final_tensor_name))
    train_writer.write(graph_def=untrained.SerializeToString())
    with ctrl_c_stops_training() as stopped:
        for step in range(steps):
            if distort:
                drawn = list(itertools.islice(distorted, batch_size))
                if not drawn:
                    raise UserError('--image_dir: the images can no longer be read. Put them back, and start again.')
                batch, classes = (np.array(column) for column in zip(*drawn, strict=True))
            else:
                rows, classes = get_random_cached_bottlenecks(training_rng, training_rows, batch_size)
                batch = bottlenecks[rows]
            cross_entropy, accuracy = layer.train(batch, classes)
            train_writer.write({'cross_entropy_1': cross_entropy, 'accuracy_1': accuracy}, step=step)
            if step % interval and step + 1 < steps and not stopped:
                continue
            summaries = layer_summaries(layer)
            logits, activations, cross_entropy, accuracy = layer.evaluate(batch, classes)
            train_writer.write(summaries | activation_summaries(logits, activations), step=step)
            log(f'Step {step}: Train accuracy = {100 * accuracy:.1f}%')
            log(f'Step {step}: Cross entropy = {cross_entropy:f}')
            if validation_rows[1].any():
                rows, classes = get_random_cached_bottlenecks(validation_rng, validation_rows, validation_size)
                logits, activations, cross_entropy, accuracy = layer.evaluate(bottlenecks[rows], classes)
                summaries |= activation_summaries(logits, activations)
                losses = {'cross_entropy_1': cross_entropy, 'accuracy_1': accuracy}
                validation_writer.write(summaries | losses, step=step)
                log(f'Step {step}: Validation accuracy = {100 * accuracy:.1f}% (N={len(rows)})')
            train_writer.file.flush()
            validation_writer.file.flush()
            if stopped:
                break


def test_final_layer(
    flags: argparse.Namespace, image_lists: dict, bottlenecks: np.ndarray, layer: FinalLayer
) -> tuple | None:
    """Prints the accuracy on the test set, as a whole and for each class; if asked for, which images are mistaken.

    Returns the rows of the tested images, their classes and predictions, all int [N], and the confusion matrix, int
    [true class, predicted class]; None if there are none.
    """
    testing_rows = get_rows(image_lists, 'testing')
    if not testing_rows[1].any():
        print('Final test accuracy: unknown, as the test set is empty. Add images, or raise --testing_percentage.')
        return None
    rng = np.random.default_rng(flags.random_seed)
    rows, classes = get_random_cached_bottlenecks(rng, testing_rows, flags.test_batch_size)
    logits, *_, accuracy = layer.evaluate(bottlenecks[rows], classes)
    print(f'Final test accuracy = {100 * accuracy:.1f}% (N={len(rows)})')
    predictions, labels = np.argmax(logits, axis=1), list(image_lists)
    confusion = np.zeros((len(labels), len(labels)), int)
    np.add.at(confusion, (classes, predictions), 1)
    width = max(map(len, [*labels, 'class']))
    print(f'{"class":{width}}  images   right   wrong  most confused with')
    for i, (label, counts) in enumerate(zip(labels, confusion, strict=True)):
        others = np.where(np.arange(len(labels)) == i, 0, counts)
        worst = f'  {labels[others.argmax()]} ({others.max()})' if others.any() else ''
        print(f'{label:{width}}  {counts.sum():6}  {counts[i]:6}  {others.sum():6}{worst}')
    if flags.print_misclassified_test_images:
        print('=== MISCLASSIFIED TEST IMAGES ===')
        images = list_images(image_lists)
        for row, prediction in zip(rows[predictions != classes], predictions[predictions != classes], strict=True):
            print(f'{os.path.join(flags.image_dir, images[row][2]):>70}  {labels[prediction]}')
    return rows, classes, predictions, confusion


def main(flags: argparse.Namespace) -> tuple:
    """Does the whole job; raises UserError for what the user can mend. Returns the backbone, the layer, the labels."""
    image_lists = create_image_lists(flags.image_dir, flags.testing_percentage, flags.validation_percentage)
    # What the end of the run needs is tried out before anything is computed.
    outputs = {name: getattr(flags, name) for name in ('output_graph', 'output_labels', 'optimized_graph')}
    outputs = {f'--{name}': path for name, path in outputs.items() if path}
    if len({os.path.realpath(path) for path in outputs.values()}) < len(outputs):
        raise UserError(f'{", ".join(outputs)} must be different files. Name others.')
    for flag, path in outputs.items():
        if gfile.isdir(path) or not os.path.basename(path):
            raise UserError(f"{flag}: '{path}' is a folder. Name a file in it.")
        ensure_writable_dir(os.path.dirname(path), flag)
    ensure_writable_dir(flags.bottleneck_dir, '--bottleneck_dir')
    for name in ('train', 'validation', 'test'):
        ensure_writable_dir(os.path.join(flags.summaries_dir, name), '--summaries_dir')

    backbone = load_backbone(flags.architecture, flags.model_dir, flags.tfhub_module, not flags.data_service)
    for flag, path in outputs.items():
        if os.path.realpath(path) == os.path.realpath(backbone.name):
            raise UserError(f'{flag}: {path} is the pretrained model. Name another file.')
    name = flags.final_tensor_name
    if name in {node.name for node in backbone.graph_def.node} or name.startswith(('final_training_ops/', 'input/')):
        raise UserError(f'--final_tensor_name: the graph has another {name}. Choose another name.')

    bottlenecks = cache_bottlenecks(image_lists, flags, backbone)
    percentages = {'testing': flags.testing_percentage, 'validation': flags.validation_percentage, 'training': 100}
    warn_of_empty_sets(image_lists, percentages)

    layer_seed = np.random.SeedSequence(flags.random_seed).generate_state(2)
    layer = FinalLayer(backbone.bottleneck_size, len(image_lists), flags.learning_rate, layer_seed)
    train_final_layer(flags, image_lists, bottlenecks, layer, backbone)
    test_writer = SummaryWriter(os.path.join(flags.summaries_dir, 'test'))
    tested = test_final_layer(flags, image_lists, bottlenecks, layer)
    del bottlenecks  # writing the graph takes memory too

    labels = list(image_lists)
    contents = {
        flags.output_graph: add_final_training_ops(backbone, layer, name).SerializeToString(deterministic=True),
        flags.output_labels: ''.join(f'{label}\n' for label in labels).encode(),
    }
    if flags.optimized_graph:
        optimized = create_optimized_graph(backbone, layer, name)
        contents[flags.optimized_graph] = optimized.SerializeToString(deterministic=True)
    write_outputs(contents)
    if tested:
        rows, classes, predictions, confusion = tested
        shown = np.unique(rows, return_index=True)[1][:PROJECTED_IMAGES]
        images = list_images(image_lists)
        files = [images[row][2] for row in rows[shown]]
        image_paths = [os.path.join(flags.image_dir, file) for file in files]
        cache_paths = [get_bottleneck_path(file, flags, backbone) for file in files]
        write_pictures(test_writer, image_paths, cache_paths, labels, classes[shown], predictions[shown], confusion)
    graph, label_file = shlex.quote(flags.output_graph), shlex.quote(flags.output_labels)
    print(f'Wrote the graph {graph} and the labels {label_file}. To label an image with them:')
    print(f'python3 tf_test.py <path to image> {graph} {label_file}')
    return backbone, layer, labels


# SavedModel


def find_free_version(saved_model_dir: str) -> str:
    """Returns the folder beside `saved_model_dir` that has the next free version number for a name."""
    parent = os.path.dirname(saved_model_dir.rstrip('/'))
    names = [name.rstrip('/') for name in gfile.listdir(parent or '.')]
    return os.path.join(parent, str(max((int(name) for name in names if name.isdecimal()), default=0) + 1))


def check_saved_model_dir(saved_model_dir: str) -> None:
    """Raises UserError if the SavedModel could not be written there, or would take the place of another."""
    flag = '--saved_model_dir'
    if not saved_model_dir.strip('/'):
        raise UserError(f'{flag}: name a folder, such as trained_model_serving/1.')
    if gfile.exists(saved_model_dir):
        if not gfile.isdir(saved_model_dir):
            raise UserError(f"{flag}: '{saved_model_dir}' is a file. Name a folder, such as trained_model_serving/1.")
        if gfile.listdir(saved_model_dir):
            raise UserError(
                f"{flag}: '{saved_model_dir}' has something in it, perhaps a model that is being served. "
                f'The next free version is {flag}={find_free_version(saved_model_dir)}'
            )
    ensure_writable_dir(os.path.dirname(saved_model_dir.rstrip('/')), flag)
    if not os.path.basename(saved_model_dir.rstrip('/')).isdecimal():
        print(f'WARNING: TensorFlow Serving serves only folders whose name is a number, unlike {saved_model_dir}')


class Classifier(tf.Module):
    """What the SavedModel has: the folded network, the variables of the final layer, and the labels."""

    def __init__(self, backbone: Backbone, layer: FinalLayer, labels: list) -> None:
        super().__init__()
        structure, weights = split_weights(backbone.fold())
        self.network_weights = {name: tf.Variable(value, trainable=False) for name, value in weights.items()}
        self.network = backbone.create_network(structure, self.network_weights)
        self.image_size = backbone.image_size
        self.weights = tf.Variable(layer.weights, name='final_weights')
        self.biases = tf.Variable(layer.biases, name='final_biases')
        self.labels = tf.constant(labels)

    def score(self, contents: tf.Tensor) -> tf.Tensor:
        """Returns the scores of encoded images, string [N], as one batch: float [N, classes]."""

        def decode(image_data: tf.Tensor) -> tf.Tensor:
            # What DecodeJpeg makes of WebP has four dimensions.
            is_webp = tf.strings.substr(image_data, 0, 4) == b'RIFF'
            check = tf.debugging.Assert(~is_webp, ['The image is not JPEG, PNG or still GIF, but WebP.'])
            with tf.control_dependencies([check]):
                return resize_image(tf.io.decode_jpeg(image_data, MODEL_INPUT_DEPTH), self.image_size)

        spec = tf.TensorSpec([*self.image_size, MODEL_INPUT_DEPTH])
        images = tf.map_fn(decode, contents, fn_output_signature=spec)
        return tf.nn.softmax(self.network(images) @ self.weights + self.biases)

    @tf.function(input_signature=[tf.TensorSpec(None, tf.string, name='image')])
    def predict(self, image: tf.Tensor) -> dict:
        """The original's signature, for an encoded image, string [], and for a batch of them, string [N]."""
        return {'prediction': self.score(tf.reshape(image, [-1])), 'classes': self.labels}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name='image')])
    def predict_rows(self, image: tf.Tensor) -> dict:
        """For REST in row format, where each output has a row an image: its best label, and all, the best first."""
        scores = self.score(image)
        order = tf.argsort(scores, direction='DESCENDING')
        labels, scores = tf.gather(self.labels, order), tf.gather(scores, order, batch_dims=1)
        return {'label': labels[:, 0], 'score': scores[:, 0], 'labels': labels, 'scores': scores}


def write_saved_model(classifier: Classifier, saved_model_dir: str) -> str:
    """Writes a SavedModel that appears whole or not at all, as a server may be watching; returns its folder.

    That is another free version, if something has come to be in `saved_model_dir` since it was checked.
    """
    saved_model_dir = saved_model_dir.rstrip('/')
    parent = os.path.dirname(saved_model_dir)
    temporary = os.path.join(parent, f'.{uuid.uuid4().hex}.tmp')
    signatures = {'serving_default': classifier.predict, 'predict_rows': classifier.predict_rows}
    try:
        tf.saved_model.save(classifier, temporary, signatures)
        if gfile.exists(saved_model_dir):
            if not gfile.isdir(saved_model_dir) or gfile.listdir(saved_model_dir):
                saved_model_dir = find_free_version(saved_model_dir)
            else:
                gfile.rmtree(saved_model_dir)
        gfile.rename(temporary, saved_model_dir)
    except BaseException:
        with contextlib.suppress(tf.errors.OpError):
            gfile.rmtree(temporary)
        raise
    return saved_model_dir


def main_serving(flags: argparse.Namespace) -> None:
    """Does the whole job of main, and writes the SavedModel; raises UserError for what the user can mend."""
    check_saved_model_dir(flags.saved_model_dir)
    saved_model_dir = write_saved_model(Classifier(*main(flags)), flags.saved_model_dir)
    folder = shlex.quote(os.path.abspath(os.path.dirname(saved_model_dir)))
    print(f'Wrote the SavedModel {shlex.quote(saved_model_dir)}. To serve it at http://localhost:8501 with Docker:')
    print(f'docker run -p 8501:8501 -v {folder}:/models/retrained -e MODEL_NAME=retrained tensorflow/serving')


# Flags


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that there are, and leaves the line breaks of the command at the end alone."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, '') or action.const else super()._get_help_string(action)


class FlagParser(argparse.ArgumentParser):
    """Parses the flags of a training; a wrong one ends the program with exit code 2."""

    def parse_args(self, args: list | None = None, namespace: None = None) -> argparse.Namespace:
        """Returns the flags, after the checks that take more than one of them."""
        flags, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split('=')[0]
            nearest = difflib.get_close_matches(name, re.findall(r'--\w+', self.format_help()), 1)
            self.error(f'there is no flag {name}.' + (f' Did you mean {nearest[0]}?' if nearest else ' See --help.'))
        if not flags.image_dir:
            self.error('argument --image_dir: name the folder that holds one folder of images a class')
        if flags.testing_percentage + flags.validation_percentage >= 100:
            self.error(
                '--testing_percentage and --validation_percentage together must leave images to train on: below 100'
            )
        if flags.data_service and not re.fullmatch(r'grpc://.+:\d+', flags.data_service):
            self.error(f"argument --data_service: '{flags.data_service}' is not of the form grpc://HOST:PORT")
        if not re.fullmatch(TENSOR_NAME_PATTERN, flags.final_tensor_name):
            self.error(
                f"argument --final_tensor_name: '{flags.final_tensor_name}' may have only letters, digits, _ . - /"
            )
        if flags.tfhub_module and flags.architecture != self.get_default('architecture'):
            self.error('--architecture and --tfhub_module both name a network: leave one of them out')
        return flags


def number(convert: type, is_valid: Callable, bounds: str) -> Callable:
    """Returns an argparse type: a number for which is_valid holds, which `bounds` puts in words."""

    def parse(text: str) -> float:
        value = convert(text)
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f'{text} is not {bounds}')
        return value

    parse.__name__ = convert.__name__  # what argparse calls a text that is no number
    return parse


def create_parser() -> FlagParser:
    """Returns the parser of the command line."""
    parser = FlagParser(
        usage='python3 %(prog)s --image_dir=DIR [flags]',
        description=__doc__.splitlines()[0],
        formatter_class=HelpFormatter,
        epilog='the usual command:\n' + __doc__.split('\n\n')[1],
    )
    percentage = number(int, lambda value: 0 <= value <= 100, 'a percentage from 0 to 100')
    count = number(int, lambda value: value >= 0, '0 or more')
    size = number(int, lambda value: value >= 1, '1 or more')
    size_or_all = number(int, lambda value: value >= 1 or value == -1, '1 or more, nor -1 for all images')
    rate = number(float, lambda value: 0 < value < math.inf, 'above 0')

    add = parser.add_argument_group('data').add_argument
    add('--image_dir', metavar='DIR', help='folder with a folder of images for each class')
    add('--testing_percentage', metavar='P', type=percentage, default=10, help='percent of the images to test with')
    add('--validation_percentage', metavar='P', type=percentage, default=10, help='percent to validate with')
    add('--strict', action='store_true', help='stop at an image that cannot be read, rather than leave it out')
    add('--bottleneck_dir', metavar='DIR', default='/tmp/bottleneck', help='where bottlenecks are kept for later runs')
    add('--data_service', metavar='grpc://HOST:PORT', help='tf.data service to share the work')

    add = parser.add_argument_group('model').add_argument
    add('--model_dir', metavar='DIR', default='/tmp/imagenet', help='where the pretrained model is, or is fetched to')
    names = 'network to use: inception_v3, or mobilenet_<1.0|0.75|0.50|0.25>_<224|192|160|128>'
    add('--architecture', metavar='NAME', choices=ARCHITECTURES, default=ARCHITECTURES[0], help=names)
    add('--tfhub_module', metavar='HANDLE', help='image feature vector of TensorFlow Hub to use: a URL or a folder')

    add = parser.add_argument_group('training').add_argument
    add('--how_many_training_steps', metavar='N', type=count, default=4000, help='how many steps to train')
    add('--learning_rate', metavar='RATE', type=rate, default=0.01, help='how far each step goes')
    add('--train_batch_size', metavar='N', type=size, default=100, help='images in a training step')
    add('--validation_batch_size', metavar='N', type=size_or_all, default=100, help='images to validate with; -1: all')
    add('--test_batch_size', metavar='N', type=size_or_all, default=-1, help='images in the final test; -1: all')
    add('--eval_step_interval', metavar='N', type=size, default=10, help='steps from one evaluation to the next')
    add('--random_seed', metavar='N', type=count, help='makes runs with the same number alike')
    add('--print_misclassified_test_images', action='store_true', help='list the test images that are mistaken')

    add = parser.add_argument_group('distortions of the training images (training takes far longer)').add_argument
    add('--flip_left_right', action='store_true', help='mirror every second one, at random')
    add('--random_crop', metavar='P', type=percentage, default=0, help='crop at random, this margin in percent')
    add('--random_scale', metavar='P', type=percentage, default=0, help='enlarge at random, by so many percent at most')
    add('--random_brightness', metavar='P', type=percentage, default=0, help='brighten or darken, by so many percent')

    add = parser.add_argument_group('output').add_argument
    add('--output_graph', metavar='FILE', default='/tmp/output_graph.pb', help='the trained graph')
    add('--optimized_graph', metavar='FILE', help='also write the trained graph for other runtimes')
    add('--output_labels', metavar='FILE', default='/tmp/output_labels.txt', help='the labels, one a line')
    add('--summaries_dir', metavar='DIR', default='/tmp/retrain_logs', help='logs for TensorBoard')
    add('--final_tensor_name', metavar='NAME', default='final_result', help="the name of the graph's result")

    return parser


def run(job: Callable, flags: argparse.Namespace) -> None:
    """Calls job(flags), and ends the program with a line and an exit code if that fails."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        job(flags)
    except UserError as error:
        sys.exit('ERROR: ' + str(error).replace('\n', ' '))
    except (tf.errors.OpError, OSError) as error:
        reason = getattr(error, 'message', str(error)).replace('\n', ' ')
        sys.exit(f'ERROR: {reason}. What was computed so far is kept: mend this, and run the same command again.')
    except KeyboardInterrupt:
        print(
            '\nStopped. All bottlenecks computed so far are kept: the same command goes on from there.', file=sys.stderr
        )
        sys.exit(130)


if __name__ == '__main__':
    parser = create_parser()
    add_flag = parser.add_argument_group('serving').add_argument
    add_flag(
        '--saved_model_dir', metavar='DIR', default='/tmp/saved_models/1/', help='the SavedModel, a version a folder'
    )
    run(main_serving, parser.parse_args())
