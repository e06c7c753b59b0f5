#!/usr/bin/env python3
"""Label images with a graph that tf_retrain.py has written.

    python3 tf_test.py <path to image> trained_model/unoptimized_model.pb trained_model/labels.txt

prints every label of an image with its score, the best first. Several images, or a folder of them,
give one line each: path, best label and its score.
"""

import signal

if __name__ == '__main__':
    # Ctrl-C, or a pipe that nobody reads any longer, ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator


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
    images = (
        'a JPEG, PNG or still GIF file, a folder of them, or - to read paths from standard input'
    )
    parser.add_argument('images', metavar='IMAGE', nargs='+', help=images)
    parser.add_argument('graph', metavar='GRAPH', help='the --output_graph of the training')
    parser.add_argument('labels', metavar='LABELS', help='the --output_labels of the training')
    parser.add_argument(
        '--top', metavar='N', type=size, help='how many labels to print for each image'
    )
    parser.add_argument('--json', action='store_true', help='print one JSON object per image')
    parser.add_argument(
        '--min_score', metavar='S', type=score, default=0, help="below this, the label is 'unsure'"
    )
    parser.add_argument('--sort_into', metavar='DIR', help='link each image into DIR/<label>/')
    parser.add_argument(
        '--heatmap', metavar='FILE', help='of one image: draw which pixels speak for the best label'
    )
    return parser


if __name__ == '__main__':
    # Before TensorFlow, which takes seconds to import: help and wrong flags are answered at once.
    # In any locale, arguments are read as UTF-8.
    sys.argv = [os.fsencode(argument).decode(errors='surrogateescape') for argument in sys.argv]
    parsed_flags = create_labeling_parser().parse_intermixed_args()
    # Other files must not get the numbers of closed standard streams.
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass

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
from tensorflow.compat.v1 import AttrValue, GraphDef, NodeDef
from tensorflow.compat.v1.graph_util import extract_sub_graph
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig
from tensorflow.io import gfile

tf.get_logger().setLevel('ERROR')
Image.MAX_IMAGE_PIXELS = None  # Pillow does not warn: MAX_PIXELS decides

JPEG_DATA_NODE = 'DecodeJpeg/contents'
RESIZED_INPUT_NODE = 'ResizeBilinear'  # float, 0..255
IMAGE_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.gif')  # what the op DecodeJpeg decodes
MAX_PIXELS = 200_000_000  # per image: a graph takes 15 bytes for each to decode, cast and resize
LARGE_CONSTANT = 1024  # bytes: a larger Const holds weights
HAS_GPU = bool(tf.config.list_physical_devices('GPU'))
# In images: more are not faster on a CPU, and need more memory.
NETWORK_BATCH_SIZE = 128 if HAS_GPU else 32


class UserError(Exception):
    """A failure that the user can fix. Its text names the file or flag, and says what to do."""


# Files


def load_file(path: str, what: str) -> bytes:
    """Returns a file's contents; raises UserError if it cannot be read."""
    try:
        with gfile.GFile(path, 'rb') as file:
            return file.read()
    except (tf.errors.OpError, UnicodeError) as error:
        raise UserError(f"The {what} '{path}' cannot be read: {getattr(error, 'message', error)}")


def load_labels(path: str) -> list[str]:
    """Returns the labels, one per line of the file, in the order of the graph's classes."""
    try:
        return load_file(path, 'labels file').decode('utf-8-sig').rstrip('\r\n').splitlines()
    except UnicodeDecodeError:
        raise UserError(
            f"The labels file '{path}' is not text. Name the --output_labels of the training."
        )


def load_graph(path: str) -> GraphDef:
    """Returns the frozen graph up to its last softmax."""
    graph_def = GraphDef()
    try:
        graph_def.ParseFromString(load_file(path, 'graph'))
    except DecodeError:
        graph_def.Clear()
    if JPEG_DATA_NODE not in {node.name for node in graph_def.node}:
        raise UserError(
            f"'{path}' is not a graph with a node {JPEG_DATA_NODE}. Name the --output_graph of the "
            'training.'
        )
    if not (softmaxes := [node.name for node in graph_def.node if node.op == 'Softmax']):
        raise UserError(
            f"'{path}' has no Softmax, so no scores. Name the --output_graph of the training."
        )
    try:
        return extract_sub_graph(graph_def, softmaxes[-1:])
    except (AssertionError, LookupError) as error:
        raise UserError(f"'{path}' is damaged ({error}). Train again.")


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


def find_images(folder: str, left_out: str | None) -> Iterator[str]:
    """Yields the paths of the images in a folder and below it, sorted, without hidden ones and
    another folder.
    """
    for name in list_dir(folder):
        path = os.path.join(folder, name)
        if (
            name.startswith('.')
            or left_out
            and os.path.realpath(path) == os.path.realpath(left_out)
        ):
            continue
        if gfile.isdir(path):
            if not os.path.islink(path):  # it may lead back to this folder
                yield from find_images(path, left_out)
        elif os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS:
            yield path


def expand(images: Iterable[str], left_out: str | None) -> Iterator[str]:
    """Yields the paths that IMAGE arguments stand for."""
    for path in images:
        if path == '-':
            lines = (
                line.rstrip(b'\r\n').decode(errors='surrogateescape') for line in sys.stdin.buffer
            )
            yield from expand((line for line in lines if line not in ('', '-')), left_out)
        elif gfile.isdir(path):
            yield from find_images(path, left_out)
        else:
            yield path


def read_header(path: str) -> tuple[int, bool]:
    """Returns how many pixels an image has, and whether its EXIF orientation asks viewers to turn
    it.
    """
    # Pillow has many kinds of errors.
    with contextlib.suppress(Exception), gfile.GFile(path, 'rb') as file, Image.open(file) as image:
        return image.width * image.height, image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return 0, False


def load_image(path: str, decode: bool = False) -> bytes:
    """Returns the contents of an image file; raises UserError if it cannot be used: found by its
    header, or decoded.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"The image '{path}' cannot be read: only plain files are.")
    pixels, _ = read_header(path)
    if pixels > MAX_PIXELS:
        raise UserError(
            f"'{path}' has {pixels:,} pixels. Make it smaller: at most {MAX_PIXELS:,} are read."
        )
    contents = load_file(path, 'image')
    try:
        if decode:
            tf.io.decode_jpeg(contents, channels=3)
    except tf.errors.InvalidArgumentError:
        raise UserError(
            f"'{path}' is not an image that the graph decodes. Save it as JPEG, PNG or still GIF."
        )
    return contents


def place(path: str, label: str, folder: str) -> None:
    """Links an image into a label's folder, or copies it where links are not possible.

    It gets a number if another file has its name; raises UserError if nothing can be written there.
    """
    # A label is a line of a file that anybody may have written: not every line can be the name of a
    # folder.
    folder = os.path.join(folder, re.sub(r'^\.*$', '_', label.replace('/', '_')))
    stem, extension = os.path.splitext(os.path.basename(path))
    try:
        os.makedirs(folder, exist_ok=True)
        for number in itertools.count(1):
            target = os.path.join(
                folder, f'{stem} {number}{extension}' if number > 1 else stem + extension
            )
            if not os.path.lexists(target):
                break
            if os.path.exists(target) and os.path.samefile(path, target):
                return
        try:
            os.link(os.path.realpath(path), target)
        except OSError:
            with open(path, 'rb') as source, open(target, 'xb') as copy:
                shutil.copyfileobj(source, copy)
    except OSError as error:
        raise UserError(f'--sort_into: {error}. Fix this, or name another folder.')


# Graph


def run_graph(graph_def: GraphDef, contents: bytes, tensor: str) -> np.ndarray:
    """Returns a tensor of the graph for an encoded image."""
    # Optimizing the graph takes longer than running it once without.
    options = tf.compat.v1.GraphOptions(rewrite_options=RewriterConfig(disable_meta_optimizer=True))
    with (
        tf.Graph().as_default(),
        tf.compat.v1.Session(config=tf.compat.v1.ConfigProto(graph_options=options)) as session,
    ):
        tf.import_graph_def(graph_def, name='')
        return session.run(f'{tensor}:0', {f'{JPEG_DATA_NODE}:0': contents})


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


def create_classifier(graph_def: GraphDef) -> tuple[Callable, np.ndarray]:
    """Returns a tf.function from images in 0..255, float [N, height, width, 3], to scores, and
    (height, width).
    """
    scores = graph_def.node[-1].name
    nodes = {node.name: node for node in graph_def.node}
    size = tf.make_ndarray(nodes[nodes[RESIZED_INPUT_NODE].input[1]].attr['value'].tensor)
    structure, weights = split_weights(
        fold(graph_def, RESIZED_INPUT_NODE, [None, *size, 3], scores)
    )
    inputs = {f'{name}:0': tf.constant(value) for name, value in weights.items()}

    @tf.function(input_signature=[tf.TensorSpec([None, *size, 3])])
    def classify(images: tf.Tensor) -> tf.Tensor:
        feeds = {name: tf.identity(tensor) for name, tensor in inputs.items()} | {
            f'{RESIZED_INPUT_NODE}:0': images
        }
        return tf.graph_util.import_graph_def(structure, feeds, [f'{scores}:0'])[0]

    return classify, size


def score_images(
    graph_def: GraphDef, paths: Iterable[str]
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yields (path, scores) of images in their order; the scores of those that cannot be decoded
    are None.
    """
    classify, size = create_classifier(graph_def)
    failures = []

    def list_paths() -> Iterator[tuple[bytes, bool]]:
        try:
            for path in paths:
                is_usable = os.path.isfile(path) or not os.path.exists(path)
                yield (
                    path.encode(errors='surrogateescape'),
                    is_usable and read_header(path)[0] <= MAX_PIXELS,
                )
        except UserError as error:
            failures.append(error)

    def load(path: tf.Tensor, is_usable: tf.Tensor) -> tuple[tf.Tensor, ...]:
        with tf.control_dependencies([tf.debugging.Assert(is_usable, [path])]):
            image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        return path, tf.compat.v1.image.resize_bilinear(image[tf.newaxis], size)[0], True

    def load_or_replace(path: tf.Tensor, is_usable: tf.Tensor) -> tf.data.Dataset:
        image = tf.data.Dataset.from_tensors((path, is_usable))
        gray = tf.data.Dataset.from_tensors((path, tf.zeros([*size, 3]), False))
        return image.map(load).ignore_errors().concatenate(gray).take(1)

    signature = tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.bool)
    dataset = tf.data.Dataset.from_generator(list_paths, output_signature=signature)
    dataset = dataset.interleave(
        load_or_replace, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    for batch, images, are_decoded in dataset.batch(NETWORK_BATCH_SIZE).prefetch(2):
        scores = classify(images).numpy()
        for path, row, is_decoded in zip(batch.numpy(), scores, are_decoded.numpy(), strict=True):
            yield path.decode(errors='surrogateescape'), row if is_decoded else None
    if failures:
        raise failures[0]


# Heatmap


def compute_heatmap(graph_def: GraphDef, contents: bytes, index: int) -> np.ndarray:
    """Returns what each position of the last map adds to the logit of a class, float [rows,
    columns].

    That is the class activation map (Zhou et al. 2016, https://arxiv.org/abs/1512.04150): as only
    affine ops follow the mean over the positions, each position has logits of its own, whose mean
    are the logits of the image. Raises UserError for a network where that is not so.
    """
    nodes = {node.name: node for node in graph_def.node}
    logits = graph_def.node[-1].input[0]
    mean = nodes[logits]
    while mean.op not in ('AvgPool', 'Mean') and mean.input:
        mean = nodes[mean.input[0]]
    features = run_graph(graph_def, contents, mean.input[0] if mean.input else mean.name)
    shape = run_graph(graph_def, contents, mean.name).shape
    problem = (
        '--heatmap: this network has no class activation map. Use Inception-v3, or leave the '
        'flag out.'
    )
    if features.ndim != 4 or shape[-1] != features.shape[-1]:
        raise UserError(problem)
    rest = fold(graph_def, mean.name, [None, *shape[1:]], logits)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(rest, name='')
        of_positions, of_nothing = (
            session.run(f'{logits}:0', {f'{mean.name}:0': values.reshape([-1, *shape[1:]])})
            for values in (features, np.zeros_like(features[:, :1, :1]))
        )
    if not np.allclose(
        of_positions.mean(axis=0), run_graph(graph_def, contents, logits)[0], rtol=1e-3, atol=1e-3
    ):
        raise UserError(problem)
    return (of_positions - of_nothing)[:, index].reshape(features.shape[1:3])


def draw_heatmap(path: str, heatmap: np.ndarray, title: str) -> Image.Image:
    """Draws a photograph in gray, redder where the heatmap is higher, with a title above it."""
    with gfile.GFile(path, 'rb') as file, Image.open(file) as photograph:
        gray = photograph.convert('RGB').convert('L').convert('RGB')
    shares = np.maximum(heatmap, 0) / max(heatmap.max(), 1e-12)
    mask = Image.fromarray(np.uint8(160 * shares)).resize(gray.size, Image.Resampling.BILINEAR)
    gray.paste((255, 0, 0), (0, 0), mask)
    font = ImageFont.load_default(16)
    picture = Image.new(
        'RGB', (max(gray.width, 8 + int(font.getlength(title))), gray.height + 24), 'white'
    )
    picture.paste(gray, (0, 24))
    ImageDraw.Draw(picture).text((4, 12), title, 'black', font, 'lm')
    return picture


# Main


def score_image(graph_def: GraphDef, path: str) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yields what score_images would yield of one image, sooner."""
    try:
        yield path, run_graph(graph_def, load_image(path), graph_def.node[-1].name)[0]
    except UserError:
        yield path, None
    except tf.errors.InvalidArgumentError:
        if not explain_failure(path):
            raise
        yield path, None


def explain_failure(path: str) -> str:
    """Returns why an image cannot be labeled; nothing if it can be."""
    try:
        load_image(path, decode=True)
    except UserError as error:
        return str(error)
    return ''


def print_ranking(
    path: str, ranking: list[tuple[str, float]], flags: argparse.Namespace, is_single: bool
) -> None:
    """Prints labels of an image with their scores: one per line if it is the only image."""
    if flags.json:
        labels, scores = zip(*ranking, strict=True)
        print(json.dumps({'image': path, 'labels': labels, 'scores': scores}), flush=True)
    elif is_single:
        for label, score in ranking:
            print(f'{label} (score = {score:.5f})')
    else:
        print(path, *(f'{label}\t{score:.5f}' for label, score in ranking), sep='\t', flush=True)


def rank(
    scores: np.ndarray, labels: list[str], flags: argparse.Namespace
) -> list[tuple[str, float]]:
    """Returns (label, score), the best first."""
    if len(labels) != len(scores):
        raise UserError(
            f"'{flags.labels}' has {len(labels)} labels, but '{flags.graph}' has {len(scores)} "
            'classes. '
            'Name files of one training.'
        )
    if not np.isfinite(scores).all():
        raise UserError(
            f"'{flags.graph}' is damaged: its scores are not finite. Train again, or get another "
            'copy.'
        )
    return [(labels[index], round(float(scores[index]), 7)) for index in np.argsort(-scores)]


def save_picture(picture: Image.Image, target: str) -> None:
    """Writes a picture in the format that the extension of its file asks for."""
    try:
        picture.save(target)
    except (OSError, ValueError) as error:
        raise UserError(f'--heatmap: {error}. Name a file such as heatmap.png.')


def label_images(flags: argparse.Namespace) -> None:
    """Labels images; raises UserError for what the user can fix, after all images that can be
    labeled.
    """
    is_single = (
        len(flags.images) == 1 and flags.images[0] != '-' and not gfile.isdir(flags.images[0])
    )
    if flags.heatmap and not is_single:
        raise UserError('--heatmap: name one image.')
    labels, graph_def, count, failed = load_labels(flags.labels), load_graph(flags.graph), 0, 0
    paths = expand(flags.images, flags.sort_into)
    scored = (
        score_image(graph_def, flags.images[0]) if is_single else score_images(graph_def, paths)
    )
    is_shown = sys.stderr and sys.stderr.isatty() and sys.stdout and not sys.stdout.isatty()
    for path, scores in tqdm(scored, unit='image', disable=is_single or not is_shown):
        count += 1
        if scores is None:
            failed, reason = failed + 1, explain_failure(path)
            if flags.json:
                print(json.dumps({'image': path, 'error': reason}), flush=True)
            elif is_single:
                raise UserError(reason)
            else:
                tqdm.write(f'ERROR: {reason}'.replace('\n', ' '), file=sys.stderr)
            continue
        ranking = rank(scores, labels, flags)
        label = ranking[0][0] if ranking[0][1] >= flags.min_score else 'unsure'
        shown = ranking if flags.json else [(label, ranking[0][1]), *ranking[1:]]
        print_ranking(
            path,
            shown[: flags.top or (len(labels) if is_single or flags.json else 1)],
            flags,
            is_single,
        )
        if flags.sort_into:
            place(path, label, flags.sort_into)
        if flags.heatmap:
            index = scores.argmax()
            heatmap = compute_heatmap(graph_def, load_image(path), index)
            save_picture(
                draw_heatmap(path, heatmap, f'{labels[index]} {scores[index]:.2f}'), flags.heatmap
            )
    if not count:
        raise UserError(
            f'There is no image in {", ".join(flags.images)}. Name a folder with '
            f'{" ".join(IMAGE_EXTENSIONS)}'
        )
    if failed:
        raise UserError(f'{failed} of {count} images could not be labeled.')


if __name__ == '__main__':
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='replace')
    try:
        label_images(parsed_flags)
    except UserError as error:
        sys.exit('ERROR: ' + str(error).replace('\n', ' '))
    except (tf.errors.OpError, LookupError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(
            f"ERROR: '{parsed_flags.graph}' cannot be run: {reason}. Name the --output_graph of "
            'the training.'
        )
