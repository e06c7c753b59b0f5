#!/usr/bin/env python3
"""Label images with a graph that tf_retrain.py has written.

    python3 tf_test.py <path to image> trained_model/unoptimized_model.pb trained_model/labels.txt

prints every label of an image with its score, the best first. Several images, or a folder of them,
give one line each: path, best label and its score.

This file stands alone. What tf_retrain.py has too is the same there, word for word.
"""

import argparse
import contextlib
import filecmp
import io
import itertools
import json
import os
import platform
import re
import shutil
import signal
import stat
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

# Flags


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


def create_labeling_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        usage='python3 %(prog)s IMAGE [IMAGE ...] GRAPH LABELS [flags]',
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='the usual command:\n' + __doc__.split('\n\n')[1],
    )
    size = checked(int, lambda value: value >= 1, '1 or more')
    score = checked(float, lambda value: 0 <= value <= 1, 'from 0 to 1')
    percentage = checked(float, lambda value: 0 <= value < 100, 'from 0 to below 100')
    images = (
        'a JPEG, PNG or still GIF file, a folder of them, or - to read paths from standard input'
    )
    parser.add_argument('images', metavar='IMAGE', nargs='+', help=images)
    parser.add_argument('graph', metavar='GRAPH', help='the --output_graph of the training')
    parser.add_argument('labels', metavar='LABELS', help='the --output_labels of the training')
    parser.add_argument(
        '--top',
        metavar='N',
        type=size,
        help='how many labels per image (default: all for one image or with --json, else 1)',
    )
    parser.add_argument('--json', action='store_true', help='print one JSON object per image')
    parser.add_argument(
        '--min_score', metavar='S', type=score, default=0, help="below this, the label is 'unsure'"
    )
    parser.add_argument(
        '--unknown',
        metavar='P',
        type=percentage,
        help="the label is 'unknown' if at most P percent of your images are less familiar",
    )
    parser.add_argument('--sort_into', metavar='DIR', help='link each image into DIR/<label>/')
    parser.add_argument(
        '--heatmap', metavar='FILE', help='of one image: draw which pixels speak for the best label'
    )
    return parser


# Process


def prepare_process() -> None:
    """Makes the program independent of what the shell has set up, before it opens any file.

    Ctrl-C ends it at once while TensorFlow is imported, which takes seconds. Arguments are read as
    UTF-8 in any locale. Standard streams that the shell has closed are opened again: otherwise the
    next files would get their numbers, and what TensorFlow's libraries print would end up there.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.argv = [os.fsencode(argument).decode(errors='surrogateescape') for argument in sys.argv]
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass


@contextlib.contextmanager
def silenced_libraries() -> Iterator[None]:
    """Hides what TensorFlow's libraries write to stderr while they load, whatever the log level.

    If they cannot be loaded, it is shown, as it may say why.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed, as in programs of Windows that have no console
        yield
        return
    try:
        hidden: Any = tempfile.TemporaryFile()
    except OSError:  # there is no folder for it
        hidden = open(os.devnull, 'rb+', buffering=0)
    os.dup2(hidden.fileno(), 2)
    try:
        yield
    except Exception:
        hidden.seek(0)
        os.write(stderr, hidden.read())
        raise
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        hidden.close()


def ensure_avx() -> None:
    """Raises ImportError on a processor without AVX: TensorFlow would abort the whole process."""
    try:
        with open('/proc/cpuinfo') as file:
            found = re.search(r'^flags\s*:(.*)', file.read(), re.MULTILINE)
    except OSError:  # not Linux
        return
    if found and 'avx' not in found[1].split():  # ARM processors have no flags
        raise ImportError('this processor has no AVX instructions, which TensorFlow needs')


def explain_import_error(error: ImportError) -> str:
    """Returns what to do about a package that cannot be imported."""
    if not isinstance(error, ModuleNotFoundError):
        return f'{error}. See "Problems" in README.md.'
    activate = r'.venv\Scripts\activate' if os.sep == '\\' else '. .venv/bin/activate'
    return f'{error}. Run `{activate}` first, as README.md shows.'


if __name__ == '__main__':
    # Before TensorFlow is imported: help and wrong flags are answered at once.
    prepare_process()
    if hasattr(signal, 'SIGPIPE'):  # a pipe that nobody reads any longer ends the program
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # With a closed stderr, print() would write errors among the results.
    sys.stderr = sys.stderr or open(os.devnull, 'w')
    parsed_flags = create_labeling_parser().parse_intermixed_args()

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
if platform.machine() in ('x86_64', 'AMD64'):
    # By default, TensorFlow uses oneDNN only where the processor has AVX-512 VNNI or the like.
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
try:
    ensure_avx()
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
    from tqdm import tqdm

    with silenced_libraries():
        import tensorflow as tf
except ImportError as error:
    if __name__ != '__main__':
        raise
    sys.exit(f'ERROR: {explain_import_error(error)}')

from google.protobuf.message import DecodeError
from tensorflow.compat.v1 import AttrValue, GraphDef, NodeDef
from tensorflow.compat.v1.graph_util import extract_sub_graph
from tensorflow.compat.v1.image import resize_bilinear
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig
from tensorflow.io import gfile

tf.get_logger().setLevel('ERROR')
Image.MAX_IMAGE_PIXELS = None  # Pillow does not warn: MAX_PIXELS decides

HAS_GPU = bool(tf.config.list_physical_devices('GPU'))
# Images per batch of the network: more are not faster on a CPU, and need more memory.
NETWORK_BATCH_SIZE = 128 if HAS_GPU else 32
JPEG_DATA_NODE = 'DecodeJpeg/contents'
RESIZED_INPUT_NODE = 'ResizeBilinear'  # float, 0..255
LABELS_NODE = 'final_training_ops/labels'
FAMILIARITY_NODE = 'familiarity'
UNFAMILIAR = 0.02  # share of one's own images: at or below it, the scores mean little
IMAGE_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.gif')  # what the op DecodeJpeg decodes
MAX_PIXELS = 200_000_000  # per image: a graph takes 15 bytes for each to decode, cast and resize
LARGE_CONSTANT = 1024  # bytes: a larger Const holds weights
MAX_LISTED = 4096  # paths that are listed before their images are labeled
UNSURE = 'unsure'  # printed in place of a label below --min_score
UNKNOWN = 'unknown'  # printed in place of a label at or below --unknown


class UserError(Exception):
    """A failure that the user can fix. Its text names the file or flag, and says what to do."""


# Files


def to_bytes(path: str) -> bytes:
    """Returns a path in UTF-8: the functions of `os` would encode a text by the locale."""
    return path.encode(errors='surrogateescape')


def is_special(path: str) -> bool:
    """Tells whether a path leads to what is neither a file nor a folder, such as a FIFO or device.

    To open one may wait forever, and to replace one may harm the system.
    """
    try:
        mode = os.stat(to_bytes(path)).st_mode
    except OSError:  # what is missing, or on gs:// and its like
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def describe(error: BaseException) -> str:
    """Returns the message of an error: the text of TensorFlow's has its op and node, too."""
    message = getattr(error, 'message', '') or str(error)
    message = re.sub(r'{{.*?}} *| \[Op:.*', '', message, flags=re.DOTALL)
    return message.strip(' .\n') or type(error).__name__


def escape(text: str) -> str:
    """Returns a text in one line: characters such as a tab or a newline become \\t or \\n."""
    return re.sub(r'[\x00-\x1f\x7f]', lambda match: repr(match[0])[1:-1], text)


def load_file(path: str, what: str) -> bytes:
    """Returns a file's contents; raises UserError if it cannot be read."""
    if is_special(path):
        raise UserError(f"The {what} '{path}' cannot be read: it is not a plain file.")
    try:
        return tf.io.read_file(to_bytes(path)).numpy()
    except tf.errors.OpError as error:
        raise UserError(f"The {what} '{path}' cannot be read: {describe(error)}. Check its name.")
    except UnicodeDecodeError:  # TensorFlow's message has the path
        raise UserError(f"The {what} '{path}' cannot be read: its name is not UTF-8.")


def load_labels(path: str) -> list[str]:
    """Returns the labels, one per line of the file, in the order of the graph's classes."""
    try:
        return load_file(path, 'labels file').decode('utf-8-sig').rstrip('\r\n').splitlines()
    except UnicodeDecodeError:
        raise UserError(
            f"The labels file '{path}' is not text. The order is IMAGE GRAPH LABELS, the last two "
            'as --output_graph and --output_labels of the training.'
        )


class Graph(NamedTuple):
    """A frozen graph up to its outputs."""

    graph_def: GraphDef
    outputs: list[str]  # the nodes of an Answer's fields: scores, and familiarity if there is one
    labels: list[str]  # those in the graph; none in the graphs of other programs


def load_graph(path: str) -> Graph:
    """Returns a frozen graph up to its last softmax and the familiarity."""
    graph_def = GraphDef()
    try:
        graph_def.ParseFromString(load_file(path, 'graph'))
    except DecodeError:
        graph_def.Clear()
    nodes = {node.name: node for node in graph_def.node}
    if JPEG_DATA_NODE not in nodes:
        raise UserError(
            f"'{path}' is not a graph with a node {JPEG_DATA_NODE}. Name the --output_graph of the "
            'training.'
        )
    outputs = [node.name for node in graph_def.node if node.op == 'Softmax'][-1:]
    if not outputs:
        raise UserError(
            f"'{path}' has no Softmax, so no scores. Name the --output_graph of the training."
        )
    if FAMILIARITY_NODE in nodes:
        outputs.append(FAMILIARITY_NODE)
    labels = []
    try:
        if LABELS_NODE in nodes:
            array = tf.make_ndarray(nodes[LABELS_NODE].attr['value'].tensor)
            labels = [label.decode() for label in array.tolist()]
        graph_def = extract_sub_graph(graph_def, outputs)
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' is damaged ({error}). Train again.")
    return Graph(graph_def, outputs, labels)


def check_labels(labels: list[str], graph: Graph, flags: argparse.Namespace) -> None:
    """Raises UserError if the labels file is of another training than the graph.

    Other words are a warning, as people translate them.
    """
    words = (
        ('--min_score', flags.min_score > 0, UNSURE),
        ('--unknown', flags.unknown is not None, UNKNOWN),
    )
    for flag, is_given, word in words:
        if is_given and word in labels:
            raise UserError(
                f"{flag}: one of the labels is '{word}', the word for images that get no label. "
                f"Rename the label in '{flags.labels}', or leave the flag out."
            )
    if flags.unknown is not None and FAMILIARITY_NODE not in graph.outputs:
        raise UserError(
            f"--unknown: '{flags.graph}' does not say how familiar an image is. Train again."
        )
    trained = graph.labels
    if not trained or labels == trained:
        return
    if sorted(labels) == sorted(trained):
        raise UserError(
            f"'{flags.labels}' has the labels of '{flags.graph}' in another order. Name files of "
            'one training.'
        )
    for own, expected in zip(labels, trained, strict=False):
        if own != expected:
            print(
                f"WARNING: '{flags.labels}' says '{own}' where '{flags.graph}' says '{expected}'.",
                file=sys.stderr,
            )
            break


def is_folder(path: str) -> bool:
    """Tells whether a path is a folder, also one such as gs://bucket/folder."""
    return os.path.isdir(to_bytes(path)) or ('://' in path and gfile.isdir(path))


def list_names(folder: str) -> list[str]:
    """Returns the names in a folder, sorted."""
    try:
        names = gfile.listdir(folder)
    except UnicodeError:  # a name is not UTF-8
        names = [name.decode(errors='surrogateescape') for name in os.listdir(to_bytes(folder))]
    return sorted(name.rstrip('/') for name in names)


def find_images(folder: str, left_out: str | None) -> Iterator[str]:
    """Yields the paths of the images in a folder and below it, sorted.

    Hidden ones, and those in the folder `left_out`, are passed over.
    """
    try:
        names = list_names(folder)
    except (tf.errors.OpError, OSError):
        yield folder  # fails as an image that cannot be read
        return
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith('.') or (left_out and is_same_path(path, left_out)):
            continue
        if is_folder(path):
            if not os.path.islink(to_bytes(path)):  # it may lead back to this folder
                yield from find_images(path, left_out)
        elif name.lower().endswith(IMAGE_EXTENSIONS):
            yield path


def to_file_name(text: str) -> str:
    """Returns a text as the name of a file or folder. Windows forbids more names than others do.

    Its rules are in https://learn.microsoft.com/windows/win32/fileio/naming-a-file
    """
    name = text.replace('/', '_')
    if os.sep == '\\':
        name = re.sub(r'[<>:"|?*\\\x00-\x1f]', '_', name)
        name = re.sub(r'[. ]$', '_', name)
        devices = r'(con|prn|aux|nul|(com|lpt)[0-9¹²³]) *(\.|$)'
        if re.match(devices, name, re.IGNORECASE):
            name = f'_{name}'
    return name


def is_too_long(path: str) -> bool:
    """Tells whether Windows, by its default settings, refuses a path for its length."""
    return os.sep == '\\' and len(os.path.abspath(path)) >= 260


def is_same_path(first: str, second: str) -> bool:
    """Tells whether two paths lead to the same place."""
    return os.path.realpath(to_bytes(first)) == os.path.realpath(to_bytes(second))


def read_paths() -> Iterator[str]:
    """Yields the paths on standard input: one per line, or with NUL after each (find -print0)."""
    stream: Any = sys.stdin.buffer
    lines = stream.read().split(b'\0') if b'\0' in stream.peek() else stream
    for line in lines:
        path = line.removeprefix(b'\xef\xbb\xbf').rstrip(b'\r\n')
        if path:
            yield path.decode(errors='surrogateescape')


def expand(images: Iterable[str], left_out: str | None) -> Iterator[str]:
    """Yields the paths that IMAGE arguments stand for."""
    for path in images:
        if path == '-':
            yield from expand((line for line in read_paths() if line != '-'), left_out)
        elif is_folder(path):
            yield from find_images(path, left_out)
        else:
            yield path


def place(path: str, label: str, folder: str) -> None:
    """Links an image into a label's folder, or copies it where links are not possible.

    It gets a number if another image has its name. Raises UserError if there can be no such folder,
    and OSError if the image cannot be placed there.
    """
    # A label is a line of a file that anybody may have written: not every line can be the name of a
    # folder.
    folder = os.path.join(folder, re.sub(r'^\.*$', '_', to_file_name(label)))
    stem, extension = os.path.splitext(os.path.basename(path))
    source = os.path.realpath(to_bytes(path))
    try:
        os.makedirs(to_bytes(folder), exist_ok=True)
    except OSError as error:
        raise UserError(f'--sort_into: {error}. Fix this, or name another folder.')
    for number in itertools.count(1):
        name = f'{stem} {number}{extension}' if number > 1 else f'{stem}{extension}'
        target = to_bytes(os.path.join(folder, name))
        if not os.path.lexists(target):
            return link_or_copy(source, target)
        if os.path.isfile(target) and filecmp.cmp(source, target, shallow=False):
            return None


def try_to_place(path: str, label: str, folder: str) -> bool:
    """Does what place() does; returns False, after a line on standard error, if that fails."""
    try:
        place(path, label, folder)
    except OSError as error:
        target = os.fsdecode(error.filename2 or error.filename or '')
        problem = 'the path is too long for Windows' if is_too_long(target) else error.strerror
        reason = f"--sort_into: '{path}' cannot be placed in {folder} ({problem})."
        tqdm.write(f'ERROR: {escape(reason)} The others go on.', file=sys.stderr)
        return False
    return True


def link_or_copy(source: bytes, target: bytes) -> None:
    """Makes a hard link, or a copy that appears whole or not at all."""
    try:
        os.link(source, target)
    except (AttributeError, OSError):  # not all systems have links
        temporary = os.path.join(os.path.dirname(target), f'.{uuid.uuid4().hex[:8]}.tmp'.encode())
        try:
            shutil.copyfile(source, temporary)
            os.rename(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise


# Images


def load_files(rows: np.ndarray, paths: list[str], load: Callable) -> tf.data.Dataset:
    """Returns a dataset of load(row, contents) of the file of each row; skips files that fail.

    paths[i] is the file of rows[i]. What is not a plain file is not opened.
    """
    is_plain = np.array([not is_special(path) for path in paths], bool)
    names = np.array([to_bytes(path) for path in paths], object)
    files = tf.data.Dataset.from_tensor_slices((rows[is_plain], names[is_plain]))
    loaded = files.map(lambda row, path: load(row, tf.io.read_file(path)), tf.data.AUTOTUNE)
    return loaded.ignore_errors()


def count_pixels(contents: tf.Tensor) -> tf.Tensor:
    """Returns how many pixels an encoded JPEG, PNG or GIF has by its header, int64 [].

    A PNG has width and height in bytes 16 to 23 (https://www.w3.org/TR/png-3/#11IHDR), a GIF in
    bytes 6 to 9 (https://www.w3.org/Graphics/GIF/spec-gif89a.txt). Other contents are an error.
    """
    start = tf.strings.substr(contents, 0, 2)
    header = tf.strings.substr(contents, 0, 24) + 24 * b'\0'  # a short file has sides of 0

    def read_jpeg() -> tf.Tensor:
        return tf.image.extract_jpeg_shape(contents)[:2]

    def read_png() -> tf.Tensor:
        sides = tf.strings.substr(header, 16, 8)
        return tf.io.decode_raw(sides, tf.int32, little_endian=False)

    def read_gif() -> tf.Tensor:
        sides = tf.strings.substr(header, 6, 4)
        return tf.cast(tf.io.decode_raw(sides, tf.uint16), tf.int32)

    def fail() -> tf.Tensor:
        refusal = tf.debugging.Assert(False, ['The image is not JPEG, PNG or still GIF.'])
        with tf.control_dependencies([refusal]):
            return tf.zeros([2], tf.int32)

    readers = [
        (start == b'\xff\xd8', read_jpeg),
        (start == b'\x89P', read_png),
        (start == b'GI', read_gif),
    ]
    return tf.reduce_prod(tf.cast(tf.case(readers, fail), tf.int64))


def decode_image(contents: tf.Tensor) -> tf.Tensor:
    """Returns an image as the graph decodes it, uint8 [height, width, 3].

    Fails before decoding if the header names more than MAX_PIXELS pixels.
    """
    pixels = count_pixels(contents)
    message = f'The image has more than {MAX_PIXELS:,} pixels.'
    limit = tf.constant(MAX_PIXELS, tf.int64)
    with tf.control_dependencies([tf.debugging.assert_less_equal(pixels, limit, message)]):
        return tf.io.decode_jpeg(contents, channels=3)


def load_image(path: str) -> bytes:
    """Returns the contents of an image file.

    Raises UserError if its header shows no image, or one of too many pixels.
    """
    contents = load_file(path, 'image')
    try:
        pixels = int(count_pixels(contents))
    except tf.errors.InvalidArgumentError:
        raise UserError(
            f"'{path}' is not an image that the graph decodes. Save it as JPEG, PNG or still GIF."
        )
    if pixels > MAX_PIXELS:
        raise UserError(
            f"'{path}' has {pixels:,} pixels. Make it smaller: at most {MAX_PIXELS:,} are read."
        )
    return contents


def explain_failure(path: str) -> str:
    """Returns why an image cannot be labeled; '' if it can be."""
    try:
        decode_image(load_image(path))
    except UserError as error:
        return str(error)
    except tf.errors.OpError:
        return (
            f"'{path}' is not an image that the graph decodes. Save it as JPEG, PNG or still GIF."
        )
    return ''


# Graph


def run_graph(graph_def: GraphDef, contents: bytes, nodes: list[str]) -> list[np.ndarray]:
    """Returns the output of some nodes of the graph for an encoded image."""
    # Optimizing the graph takes longer than running it once without.
    options = tf.compat.v1.GraphOptions(rewrite_options=RewriterConfig(disable_meta_optimizer=True))
    with (
        tf.Graph().as_default(),
        tf.compat.v1.Session(config=tf.compat.v1.ConfigProto(graph_options=options)) as session,
    ):
        tf.import_graph_def(graph_def, name='')
        tensors = [f'{node}:0' for node in nodes]
        return session.run(tensors, {f'{JPEG_DATA_NODE}:0': contents})


def fold(graph_def: GraphDef, source: str, shape: list, *outputs: str) -> GraphDef:
    """Returns a graph for batches, without ops that TensorFlow has removed since 2015.

    It begins at the node `source`, which becomes a placeholder of a shape, and ends at `outputs`.
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
            attributes = {'T': node.attr['dtype']}
            node.CopyFrom(NodeDef(name=node.name, op='Identity', input=node.input, attr=attributes))
        elif node.op == 'Reshape' and node.input[1] in constants:
            allow_batches(constants[node.input[1]])
    attributes = {'dtype': float32, 'shape': AttrValue(shape=tf.TensorShape(shape).as_proto())}
    nodes[source].CopyFrom(NodeDef(name=source, op='Placeholder', attr=attributes))
    return extract_sub_graph(folded, outputs)


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


class Answer(NamedTuple):
    """What the graph says of an image."""

    scores: np.ndarray  # float [classes]
    familiarity: float | None = None  # share of the user's images that are as familiar or less


def create_classifier(graph: Graph) -> tuple[Callable, np.ndarray]:
    """Returns a tf.function from images to the graph's outputs, and the (height, width) of images.

    Images are float [N, height, width, 3], in 0..255.
    """
    nodes = {node.name: node for node in graph.graph_def.node}
    size = tf.make_ndarray(nodes[nodes[RESIZED_INPUT_NODE].input[1]].attr['value'].tensor)
    shape = [None, *size, 3]
    folded = fold(graph.graph_def, RESIZED_INPUT_NODE, shape, *graph.outputs)
    structure, weights = split_weights(folded)
    constants = {f'{name}:0': tf.constant(value) for name, value in weights.items()}

    @tf.function(input_signature=[tf.TensorSpec(shape)])
    def classify(images: tf.Tensor) -> list[tf.Tensor]:
        feeds = {name: tf.identity(tensor) for name, tensor in constants.items()}
        feeds[f'{RESIZED_INPUT_NODE}:0'] = images
        tensors = [f'{output}:0' for output in graph.outputs]
        return tf.graph_util.import_graph_def(structure, feeds, tensors)

    return classify, size


def score_images(graph: Graph, paths: Iterable[str]) -> Iterator[tuple[str, Answer | None]]:
    """Yields (path, answer) of images in their order; None for what cannot be decoded."""
    classify, size = create_classifier(graph)

    def load(row: tf.Tensor, contents: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return row, resize_bilinear(decode_image(contents)[tf.newaxis], size)[0]

    remaining = iter(paths)
    while names := list(itertools.islice(remaining, MAX_LISTED)):
        images = load_files(np.arange(len(names)), names, load)
        next_row = 0
        for rows, batch in images.batch(NETWORK_BATCH_SIZE).prefetch(2):
            answers = zip(*[output.numpy() for output in classify(batch)], strict=True)
            for row, outputs in zip(rows.numpy(), answers, strict=True):
                # Rows that are missing in the batches could not be decoded.
                for missing in range(next_row, row):
                    yield names[missing], None
                yield names[row], Answer(*outputs)
                next_row = row + 1
        for missing in range(next_row, len(names)):
            yield names[missing], None


def score_image(graph: Graph, path: str) -> Iterator[tuple[str, Answer | None]]:
    """Yields what score_images would yield of one image, sooner."""
    try:
        outputs = run_graph(graph.graph_def, load_image(path), graph.outputs)
        yield path, Answer(*[output[0] for output in outputs])
    except UserError:
        yield path, None
    except tf.errors.InvalidArgumentError:
        if not explain_failure(path):
            raise
        yield path, None


# Heatmap

NO_HEATMAP = (
    '--heatmap: this network has no class activation map. Use Inception-v3, or leave the flag out.'
)


def compute_heatmap(graph: Graph, contents: bytes, index: int) -> np.ndarray:
    """Returns what each position of the last map adds to the logit of a class.

    That is the class activation map (Zhou et al. 2016, https://arxiv.org/abs/1512.04150), float
    [rows, columns]: as only affine ops follow the mean over the positions, each position has logits
    of its own, whose mean are the logits of the image. Raises UserError for a network where that is
    not so.
    """
    mean, logits = find_mean(graph)
    source = mean.input[0] if mean.input else mean.name
    features, pooled, expected = run_graph(graph.graph_def, contents, [source, mean.name, logits])
    shape = pooled.shape
    if features.ndim != 4 or shape[-1] != features.shape[-1]:
        raise UserError(NO_HEATMAP)
    positions = features.reshape([-1, *shape[1:]])
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        rest = fold(graph.graph_def, mean.name, [None, *shape[1:]], logits)
        tf.import_graph_def(rest, name='')
        position_logits = session.run(f'{logits}:0', {f'{mean.name}:0': positions})
        zero_logits = session.run(f'{logits}:0', {f'{mean.name}:0': np.zeros_like(positions[:1])})
    if not np.allclose(position_logits.mean(axis=0), expected[0], rtol=1e-3, atol=1e-3):
        raise UserError(NO_HEATMAP)
    return (position_logits - zero_logits)[:, index].reshape(features.shape[1:3])


def find_mean(graph: Graph) -> tuple[NodeDef, str]:
    """Returns the last mean over the positions (or what is there instead), and the logits' node."""
    nodes = {node.name: node for node in graph.graph_def.node}
    logits = nodes[graph.outputs[0]].input[0]
    node = nodes[logits]
    while node.op not in ('AvgPool', 'Mean') and node.input:
        node = nodes[node.input[0]]
    return node, logits


def draw_heatmap(contents: bytes, heatmap: np.ndarray, title: str) -> Image.Image:
    """Draws a photograph in gray, redder where the heatmap is higher.

    A title stands above it, and a scale of the colors below it.
    """
    with Image.open(io.BytesIO(contents)) as photograph:
        gray = photograph.convert('RGB').convert('L').convert('RGB')
    shares = np.maximum(heatmap, 0) / max(heatmap.max(), 1e-12)
    paint_red(gray, shares)
    font_size = max(16, gray.width // 40)
    font = ImageFont.load_default(font_size)
    line = font_size * 3 // 2
    width = max(gray.width, 8 + int(font.getlength(title)))
    picture = Image.new('RGB', (width, gray.height + 2 * line), 'white')
    picture.paste(gray, (0, line))
    scale = Image.new('RGB', (max(1, gray.width // 2), font_size), 'gray')
    paint_red(scale, np.linspace(0, 1, 256)[np.newaxis])
    bottom = line + gray.height + line // 2
    picture.paste(scale, ((width - scale.width) // 2, bottom - font_size // 2))
    draw = ImageDraw.Draw(picture)
    draw.text((4, line // 2), title, 'black', font, 'lm')
    draw.text((4, bottom), 'nothing', 'black', font, 'lm')
    draw.text((width - 4, bottom), 'most', 'black', font, 'rm')
    return picture


def paint_red(picture: Image.Image, shares: np.ndarray) -> None:
    """Paints a picture red where shares, float [rows, columns] in 0..1, are high."""
    mask = Image.fromarray(np.uint8(160 * shares))
    mask = mask.resize(picture.size, Image.Resampling.BILINEAR)
    picture.paste((255, 0, 0), (0, 0), mask)


def save_picture(picture: Image.Image, target: str) -> None:
    """Writes a picture, whole, in the format that the extension of its file asks for."""
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f'.{uuid.uuid4().hex[:8]}{os.path.splitext(name)[1]}')
    try:
        picture.save(temporary)
        os.replace(temporary, target)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise UserError(f'--heatmap: {error}. Name a file such as heatmap.png.')


# Main


def print_ranking(
    path: str, ranking: list[tuple[str, float]], flags: argparse.Namespace, is_single: bool
) -> None:
    """Prints labels of an image with their scores: one per line if it is the only image.

    --top says how many; without it, all are printed, or only the best of several images.
    """
    shown = ranking[: flags.top or (len(ranking) if is_single else 1)]
    if is_single:
        for label, score in shown:
            print(f'{label} (score = {score:.5f})')
    else:
        columns = [f'{label}\t{score:.5f}' for label, score in shown]
        print(escape(path), *columns, sep='\t', flush=True)


def print_json(
    path: str,
    ranking: list[tuple[str, float]],
    answer: Answer,
    flags: argparse.Namespace,
) -> None:
    """Prints an image with its labels and scores, all or --top of them, as a JSON object."""
    labels, scores = zip(*ranking[: flags.top], strict=True)
    fields: dict[str, Any] = {'image': path, 'labels': labels, 'scores': scores}
    if answer.familiarity is not None:
        fields['familiarity'] = round(float(answer.familiarity), 7)
    print(json.dumps(fields), flush=True)


def choose_label(best: tuple[str, float], answer: Answer, flags: argparse.Namespace) -> str:
    """Returns the label of an image: the best one, or that it is unknown or unsure."""
    label, score = best
    if flags.unknown is not None and answer.familiarity <= flags.unknown / 100:
        return UNKNOWN
    return label if score >= flags.min_score else UNSURE


def warn_of_unfamiliar(answer: Answer) -> None:
    """Warns if nearly all images of the training are more familiar than this one."""
    if answer.familiarity is not None and answer.familiarity <= UNFAMILIAR:
        print(
            'WARNING: this image is unlike nearly all images of the training, so the scores mean '
            'little.',
            file=sys.stderr,
        )


def report_failure(path: str, flags: argparse.Namespace, is_single: bool) -> None:
    """Prints why an image could not be labeled.

    Raises UserError if it is the only one, unless JSON is printed.
    """
    reason = explain_failure(path) or f"'{path}' changed while it was read. Try again."
    if flags.json:
        print(json.dumps({'image': path, 'error': reason}), flush=True)
    elif is_single:
        raise UserError(reason)
    else:
        tqdm.write(f'ERROR: {escape(reason)}', file=sys.stderr)


def rank(
    scores: np.ndarray, labels: list[str], flags: argparse.Namespace
) -> list[tuple[str, float]]:
    """Returns (label, score), the best first."""
    if len(labels) != len(scores):
        raise UserError(
            f"'{flags.labels}' has {len(labels)} labels, but '{flags.graph}' has {len(scores)} "
            'classes. Name files of one training.'
        )
    if not np.isfinite(scores).all():
        raise UserError(
            f"'{flags.graph}' is damaged: its scores are not finite. Train again, or get another "
            'copy.'
        )
    order = np.argsort(-scores, kind='stable')  # of equal ones the first, as argmax() does
    return [(labels[index], round(float(scores[index]), 7)) for index in order]


def check_flags(flags: argparse.Namespace, is_single: bool) -> None:
    """Raises UserError if the flags do not fit together, or would overwrite what is read."""
    if flags.heatmap and not is_single:
        raise UserError('--heatmap: name one image.')
    for path in (*flags.images, flags.graph, flags.labels):
        if flags.heatmap and is_same_path(flags.heatmap, path):
            raise UserError(f"--heatmap: '{path}' is read. Name another file.")
        if flags.sort_into and is_same_path(flags.sort_into, path):
            raise UserError(f"--sort_into: '{path}' is read. Name another folder.")
    if '-' in flags.images and sys.stdin is None:
        raise UserError('-: standard input is closed. Name images or a folder.')


def draw(graph: Graph, path: str, answer: Answer, labels: list[str], target: str) -> None:
    """Writes the heatmap of an image for its best label."""
    contents = load_image(path)
    heatmap = compute_heatmap(graph, contents, int(answer.scores.argmax()))
    try:
        picture = draw_heatmap(contents, heatmap, describe_best(answer, labels))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, which refuses more than the op
        raise UserError(f"--heatmap: '{path}' cannot be drawn ({error}). Save it again as PNG.")
    save_picture(picture, target)


def report_answer(
    path: str,
    answer: Answer,
    labels: list[str],
    flags: argparse.Namespace,
    is_single: bool,
) -> str:
    """Prints what the graph says of an image; returns the image's label."""
    ranking = rank(answer.scores, labels, flags)
    label = choose_label(ranking[0], answer, flags)
    if flags.json:
        print_json(path, ranking, answer, flags)
    else:
        print_ranking(path, [(label, ranking[0][1]), *ranking[1:]], flags, is_single)
    if is_single:
        warn_of_unfamiliar(answer)
    return label


def describe_best(answer: Answer, labels: list[str]) -> str:
    """Returns the title of a heatmap."""
    index = answer.scores.argmax()
    title = f'{labels[index]} {answer.scores[index]:.2f}'
    if answer.familiarity is not None:
        title += f', familiarity {answer.familiarity:.2f}'
    return title


def label_images(flags: argparse.Namespace) -> None:
    """Labels all images that can be labeled; then raises UserError if some could not be."""
    first = flags.images[0]
    is_single = len(flags.images) == 1 and first != '-' and not is_folder(first)
    check_flags(flags, is_single)
    labels = load_labels(flags.labels)
    graph = load_graph(flags.graph)
    check_labels(labels, graph, flags)
    paths = expand(flags.images, flags.sort_into)
    answers = score_image(graph, first) if is_single else score_images(graph, paths)
    count = 0
    failed = 0
    for path, answer in tqdm(answers, unit='image', disable=is_single or not has_bar()):
        count += 1
        if answer is None:
            failed += 1
            report_failure(path, flags, is_single)
            continue
        label = report_answer(path, answer, labels, flags, is_single)
        if flags.sort_into:
            failed += not try_to_place(path, label, flags.sort_into)
        if flags.heatmap:
            draw(graph, path, answer, labels, flags.heatmap)
    if not count:
        raise UserError(
            f'There is no image in {", ".join(flags.images)}. Name a folder with '
            f'{" ".join(IMAGE_EXTENSIONS)}'
        )
    if failed:
        what = 'labeled and sorted' if flags.sort_into else 'labeled'
        raise UserError(f'{failed} of {count} images could not be {what}.')


def has_bar() -> bool:
    """Tells whether to show a progress bar: on a terminal, while the labels go elsewhere."""
    is_terminal = [bool(stream and stream.isatty()) for stream in (sys.stdout, sys.stderr)]
    return is_terminal == [False, True]


if __name__ == '__main__':
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='replace')
    try:
        label_images(parsed_flags)
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        sys.exit('ERROR: ' + escape(str(error).replace('\n', ' ')))
    except OSError as error:  # such as a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still wants to write
        sys.exit(f'ERROR: standard output cannot be written: {error.strerror}.')
    except (tf.errors.OpError, LookupError, TypeError, ValueError) as error:
        reason = describe(error).splitlines()[0]
        sys.exit(
            f"ERROR: '{parsed_flags.graph}' cannot be run: {reason}. Name the --output_graph of "
            'the training.'
        )
