#!/usr/bin/env python3
"""Label images with a graph that tf_retrain.py has written.

    python3 tf_test.py <path to image> trained_model/unoptimized_model.pb trained_model/labels.txt

prints every label of an image with its score, the best first. Several images, or a folder of them,
give one line each: path, best label and its score.

This file stands alone. What tf_retrain.py has too is the same there, word for word. "The original"
is retrain.py of TensorFlow's image_retraining example.
"""

import argparse
import contextlib
import dataclasses
import errno
import filecmp
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import platform
import re
import shutil
import signal
import stat
import struct
import sys
import tempfile
import unicodedata
import urllib.parse
import uuid
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

# Flags


def checked(convert: Callable, is_valid: Callable, rule: str) -> Callable:
    """Returns an argparse type: a value for which is_valid holds. `rule` describes such values.

    convert() raises ValueError or returns None for a text that it cannot convert.
    """

    def parse(text: str) -> object:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not is_valid(value):
            raise argparse.ArgumentTypeError(f'must be {rule}, not {text!r}')
        return value

    return parse


def decode_url(text: str) -> str:
    """Returns the path in a URL such as 'file:///my%20data'; any other text unchanged."""
    if not text.startswith('file://'):
        return text
    path = text.removeprefix('file://').removeprefix('localhost')
    if os.sep == '\\':
        path = path.lstrip('/')  # '/C:/data' becomes 'C:/data'
    return urllib.parse.unquote(path, errors='surrogateescape').replace('\0', '%00')


def to_path(text: str) -> str:
    """Returns the system's path for one that a user wrote: '~/data', or 'file:///my%20data'.

    For TensorFlow, link/../x is x. For the system, it is the x beside the target of the link. Such
    a path becomes an absolute one without links, which is the same for both.
    """
    path = os.path.expanduser(decode_url(text))
    if '..' in path and '://' not in path:
        bytes_path = path.encode(errors='surrogateescape')
        real_path = os.path.realpath(bytes_path)
        if real_path != os.path.realpath(os.path.normpath(bytes_path)):
            return real_path.decode(errors='surrogateescape')
    return path


def create_labeling_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    description, command = (__doc__ or '\n\n').split('\n\n')[:2]  # there is none with -OO
    parser = argparse.ArgumentParser(
        usage='python3 %(prog)s IMAGE [IMAGE ...] GRAPH LABELS [flags]',
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f'the usual command:\n{command}',
    )
    parser.add_argument(
        'images',
        metavar='IMAGE',
        nargs='+',
        type=to_path,
        help='an image file, a folder of them, or - to read paths from standard input',
    )
    parser.add_argument(
        'graph', metavar='GRAPH', type=to_path, help='the --output_graph of the training'
    )
    parser.add_argument(
        'labels', metavar='LABELS', type=to_path, help='the --output_labels of the training'
    )
    parser.add_argument(
        '--upright',
        action='store_true',
        help='turn images as their EXIF orientation says; use it if the training did',
    )
    add_label_flags(parser)
    name = checked(to_path, bool, 'a name')
    parser.add_argument(
        '--sort_into', metavar='DIR', type=name, help='link each image into DIR/<class folder>/'
    )
    parser.add_argument(
        '--heatmap',
        metavar='FILE',
        type=name,
        help='of one image: draw which pixels speak for the best label',
    )
    return parser


def add_label_flags(parser: argparse.ArgumentParser) -> None:
    count = checked(int, lambda value: value >= 1, 'a whole number, 1 or more')
    score = checked(float, lambda value: 0 <= value <= 1, 'from 0 to 1')
    percentage = checked(float, lambda value: 0 <= value < 100, 'from 0 to below 100')
    parser.add_argument(
        '--top',
        metavar='N',
        type=count,
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


# Process


def quit_at_once(number: int, frame: object) -> None:
    """Ends the program, with the exit code that a shell reports for a signal."""
    os._exit(128 + number)


# What Ctrl-C does if there is nothing to finish. The first process of a container needs a handler:
# for this process, Linux takes SIG_DFL as SIG_IGN.
QUIT = quit_at_once if os.getpid() == 1 else signal.SIG_DFL


def prepare_process() -> None:
    """Makes the program independent of what the shell has set up, before it opens any file.

    Ctrl-C ends it at once while TensorFlow is imported, which takes seconds. Arguments are read as
    UTF-8 in any locale. Standard streams that the shell has closed are opened again: otherwise the
    next files would get their numbers, and what TensorFlow's libraries print would end up there.
    They are made blocking: Node.js leaves pipes non-blocking, and print() then loses what does not
    fit into a full pipe.
    TensorFlow imports Keras, which would fail if the shell names a backend that is not installed.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, QUIT)
    os.environ['KERAS_BACKEND'] = 'tensorflow'
    sys.argv = [os.fsencode(argument).decode(errors='surrogateescape') for argument in sys.argv]
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass
    if sys.platform != 'win32':
        for stream in range(3):
            os.set_blocking(stream, True)


@contextlib.contextmanager
def silenced_libraries() -> Iterator[None]:
    """Hides what TensorFlow's libraries write to stderr while they load, whatever the log level.

    If they cannot be loaded, the hidden text is shown, as it may say why.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed, as in Windows programs without a console
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


def explain_import_error(error: Exception) -> str:
    """Returns what to do about a package that cannot be imported."""
    # It comes from tempfile.gettempdir(), which TensorFlow calls.
    if isinstance(error, FileNotFoundError) and 'temporary directory' in str(error):
        return f'{error.strerror}. Make space there, or set TMPDIR to a folder on another drive.'
    if not isinstance(error, ImportError):  # Keras' settings are damaged, or the memory is full
        settings = os.path.join(os.getenv('KERAS_HOME', '~/.keras'), 'keras.json')
        return f'TensorFlow cannot be imported ({error!r}). If there is a {settings}, delete it.'
    if not isinstance(error, ModuleNotFoundError):
        return f'{error}. See "Problems" in README.md.'
    activate = r'.venv\Scripts\activate' if os.sep == '\\' else '. .venv/bin/activate'
    return f'{error}. Run `{activate}` first, as README.md shows.'


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Keeps the garbage collector off the imported modules.

    TensorFlow's modules are hundreds of thousands of objects, and none of them is garbage. Scanning
    them takes 0.3 s during the import, and 0.4 s at the end of the program.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


if __name__ == '__main__':
    # Before TensorFlow is imported: help and wrong flags are answered at once.
    prepare_process()
    if hasattr(signal, 'SIGPIPE'):  # a pipe that nobody reads any longer ends the program
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # If stderr is closed, print() would write errors to stdout, among the results.
    sys.stderr = sys.stderr or open(os.devnull, 'w')
    parsed_flags = create_labeling_parser().parse_intermixed_args()

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
if platform.machine() in ('x86_64', 'AMD64'):
    # By default, TensorFlow uses oneDNN only where the processor has AVX-512 VNNI or the like.
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
try:
    ensure_avx()
    import numpy as np
    import PIL
    from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin
    from tqdm import tqdm

    with silenced_libraries(), paused_collector():
        import tensorflow as tf
except Exception as error:
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
# Photoshop's texts are longer than 1 MiB. Pillow would refuse the whole header for that.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
warnings.filterwarnings('ignore', module='PIL')  # a file that cannot be decoded is reported anyway

HAS_GPU = bool(tf.config.list_physical_devices('GPU'))
# Images per batch of the network: more are not faster on a CPU, and need more memory.
NETWORK_BATCH_SIZE = 128 if HAS_GPU else 32
JPEG_DATA_NODE = 'DecodeJpeg/contents'
RESIZED_INPUT_NODE = 'ResizeBilinear'  # float, 0..255
FUNCTION_SCOPE = 'module'  # of the nodes of modules and Keras' networks, and of no others
LABELS_NODE = 'final_training_ops/labels'
FAMILIARITY_NODE = 'familiarity'
SOFTWARE = 'tf_test.py --heatmap'  # what wrote a PNG, in its text
UNFAMILIAR = 0.02  # a familiarity, see Answer: at or below it, the scores mean little
# Extensions of the files that are taken for images. Their content decides how they are decoded.
IMAGE_EXTENSIONS = tuple(
    '.jpg .jpeg .jpe .jfif .png .gif .webp .avif .bmp .tif .tiff .jp2 .heic .heif'.split()
)
LARGE_CONSTANT = 1024  # bytes: a larger Const holds weights
MAX_LISTED = 4096  # paths that are listed before their images are labeled
TABLE_CLASSES = 30  # with at most this many classes, the table has them all
WORST_CLASSES = 20  # otherwise, it has this many: those with the most errors
# Folders that systems make beside photographs, for thumbnails and deleted files, in lower case.
SYSTEM_FOLDERS = ('@eadir', '#recycle', '$recycle.bin', '__macosx')
UNSURE = 'unsure'  # what tf_test.py prints in place of a label below --min_score
UNKNOWN = 'unknown'  # what tf_test.py prints in place of a label at or below --unknown
MAX_NUM_IMAGES_PER_CLASS = 2**27 - 1  # the hash of a file name is taken modulo this plus one


class UserError(Exception):
    """A failure that the user can fix. Its text names the file or flag, and says what to do."""


# Files


def to_bytes(path: str) -> bytes:
    """Returns a path in UTF-8, whatever the locale is, by which `os` encodes a str."""
    return path.encode(errors='surrogateescape')


# What the status of a path fails with if there is nothing, and if there can be no such name.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
REFUSED = (errno.ENAMETOOLONG, errno.EINVAL)


def exists(path: str) -> bool:
    """Tells whether there is something at a path.

    Raises UserError if the drive fails, where gfile.exists() is False, too. Without the right to
    look it up it is False: then nothing can be written there, either.
    """
    if '://' in path:
        return gfile.exists(path)
    try:
        os.stat(to_bytes(path))
    except PermissionError:
        return False
    except OSError as error:
        if error.errno in MISSING + REFUSED:
            return False
        raise UserError(f"'{path}' cannot be looked up: {error.strerror}. Check the drive.")
    return True


def is_special(path: str) -> bool:
    """Tells whether a path leads to what is neither a file nor a folder, such as a FIFO or device.

    Opening one may block forever, and replacing one may harm the system.
    """
    try:
        mode = os.stat(to_bytes(path)).st_mode
    except OSError:  # what is missing, or on gs:// and its like
        return False
    except ValueError:  # a NUL in the path
        return True
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def describe(error: BaseException) -> str:
    """Returns the message of an error, without the stack, op and node that TensorFlow adds."""
    message = getattr(error, 'message', '') or str(error)
    end = r'\n\s*\[\[.*|{{(function_)?node .*?}} *| \[Op:\w+\].*'
    message = re.sub(end, '', message, flags=re.DOTALL)
    start = r'\AGraph execution.*(unavailable>|\nNode: [^\n]*)\s*|\Ain user code:.*\n\s*\w+: '
    message = re.sub(start, '', message, flags=re.DOTALL)
    return message.lstrip().rstrip(' .\n') or type(error).__name__


def escape(text: str) -> str:
    """Returns a text in one line: characters such as a tab or a newline become \\t or \\n."""
    return re.sub(r'[\x00-\x1f\x7f]', lambda match: repr(match[0])[1:-1], text)


def name_some(names: list[str]) -> str:
    """Returns the first ten of some names, and how many more there are, for a message."""
    more = f' and {len(names) - 10} more' if len(names) > 10 else ''
    return escape(', '.join(names[:10])) + more


def load_file(path: str, what: str) -> bytes:
    """Returns a file's contents; raises UserError if it cannot be read."""
    if is_special(path):
        raise UserError(f"The {what} '{path}' cannot be read: it is not a plain file.")
    if what == 'image' and is_too_large(to_bytes(path)):
        raise UserError(
            f"The {what} '{path}' cannot be read: it has more than {MAX_FILE_SIZE:,} bytes."
        )
    if what == 'image' and is_folder(path):  # find_images() could not list it
        raise UserError(f"The folder '{path}' cannot be listed. Check its drive and its rights.")
    try:
        return tf.io.read_file(to_bytes(path)).numpy()
    except tf.errors.OpError as error:
        raise UserError(
            f"The {what} '{path}' cannot be read: {describe(error)}. Check its name and rights."
        )
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


class Training(NamedTuple):
    """What tf_test.py needs from the record of a training."""

    folders: list[str]  # class folders, in the order of the labels
    image_dir: str  # as to_path() of the trainer returns it: get_set() hashes it
    absolute_image_dir: str
    real_image_dir: str  # where it led then, if it is a link
    set_folders: dict[str, str]  # {folder: its set} of images that were split already
    percentages: tuple[int, int]  # --testing_percentage, --validation_percentage
    is_upright: bool

    def list_folders(self) -> list[str]:
        """Returns the paths of the class folders, relative to --image_dir."""
        parents = list(self.set_folders) or ['']  # the latter if they are not split
        return [os.path.join(parent, name) for parent in parents for name in self.folders]

    def list_gone(self) -> list[str]:
        """Returns the paths, relative to --image_dir, of folders of known images that are gone now.

        If the images are split, each class has a folder in train/, but not in each other set. A
        test folder does not matter: its images count as new anyway.
        """
        names = []
        for folder, set_name in (self.set_folders or {'': 'training'}).items():
            if set_name == 'training':
                names += [os.path.join(folder, name) for name in self.folders]
            elif set_name == 'validation':
                names.append(folder)
        return [
            name for name in names if not is_folder(os.path.join(self.absolute_image_dir, name))
        ]


# What a damaged record raises.
DAMAGED_RECORD = (
    UserError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def check_name(name: str) -> str:
    """Returns the name of a file; raises ValueError or AttributeError for what cannot be one."""
    if b'\0' in to_bytes(name):
        raise ValueError('embedded null character')
    return name


def get_record_path(graph: str) -> str:
    """Returns the path of the record of the run that wrote a graph."""
    return f'{graph}.json'


def load_training(path: str, contents: bytes) -> Training | None:
    """Returns what the record beside a graph says. `contents` are those of the graph's file.

    Returns None if there is no readable record, or, with a warning, if it is of another training.
    """
    record_path = get_record_path(path)
    try:
        record = json.loads(load_file(record_path, 'record'))
        flags = record['flags']
        training = Training(
            folders=[check_name(folder) for folder in record['folders']],
            image_dir=check_name(flags['image_dir']),
            absolute_image_dir=check_name(record['image_dir']),
            real_image_dir=check_name(record.get('real_image_dir', record['image_dir'])),
            set_folders={check_name(name): set_ for name, set_ in record['set_folders'].items()},
            percentages=(int(flags['testing_percentage']), int(flags['validation_percentage'])),
            is_upright=bool(flags['upright']),
        )
        is_own = record['graph_checksum'] == zlib.crc32(contents)
    except DAMAGED_RECORD:  # or one of an earlier version
        return None
    if is_own:
        return training
    print(f"WARNING: '{record_path}' is of another training than '{path}'.", file=sys.stderr)
    return None


class Graph(NamedTuple):
    """A frozen graph up to its outputs."""

    graph_def: GraphDef
    outputs: list[str]  # the nodes of an Answer's fields: scores, and familiarity if there is one
    labels: list[str]  # those in the graph; none in the graphs of other programs
    training: Training | None


def load_graph(path: str) -> Graph:
    """Returns a frozen graph up to its last softmax and the familiarity."""
    contents = load_file(path, 'graph')
    graph_def = GraphDef()
    try:
        graph_def.ParseFromString(contents)
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
    return Graph(graph_def, outputs, labels, load_training(path, contents))


def check_labels(labels: list[str], graph: Graph, flags: argparse.Namespace) -> None:
    """Raises UserError if the labels file has the labels of the graph in another order.

    That is so if a label of the graph is not on its own line of the file, but on another line. All
    other differences are only a warning, which names the first: people translate labels, and merge
    classes by giving them one label. It does nothing for more or fewer labels, of which rank()
    raises UserError, nor for a graph without labels.
    """
    trained = graph.labels
    if len(labels) != len(trained) or labels == trained:
        return
    displaced = {old for old, new in zip(trained, labels, strict=True) if old != new}
    for label in labels:
        if label in displaced:
            raise UserError(
                f"'{flags.labels}' has labels of '{flags.graph}' in another order, such as "
                f"'{label}'. Name files of one training."
            )
    for own, expected in zip(labels, trained, strict=True):
        if own != expected:
            print(
                f"WARNING: '{flags.labels}' says '{own}' where '{flags.graph}' says '{expected}'. "
                'Labels may be translated, but must keep their order.',
                file=sys.stderr,
            )
            break


def check_refusal_flags(classes: 'Classes', graph: Graph, flags: argparse.Namespace) -> None:
    """Raises UserError if --min_score or --unknown cannot be used with the classes or the graph."""
    words = (
        ('--min_score', flags.min_score > 0, UNSURE),
        ('--unknown', flags.unknown is not None, UNKNOWN),
    )
    for flag, is_given, word in words:
        if is_given and word in classes.labels:
            raise UserError(
                f"{flag}: one of the labels is '{word}', the word for images that get no label. "
                f"Rename the label in '{flags.labels}', or leave the flag out."
            )
        if is_given and flags.sort_into and word in classes.folders:
            raise UserError(
                f"{flag}: --sort_into puts images that get no label into '{word}', but that is a "
                'class folder of the training. Leave one of the flags out.'
            )
    if flags.unknown is not None and FAMILIARITY_NODE not in graph.outputs:
        raise UserError(
            f"--unknown: '{flags.graph}' does not say how familiar an image is. Train again."
        )


def is_hidden(name: str) -> bool:
    """Tells whether a file or folder is not the user's own: it is hidden, or made by the system."""
    return name.startswith('.') or name.lower() in SYSTEM_FOLDERS


def is_folder(path: str) -> bool:
    """Tells whether a path is a folder, also one such as gs://bucket/folder."""
    if os.path.isdir(to_bytes(path)):
        return True
    with contextlib.suppress(UnicodeError):  # a name that is not UTF-8
        return '://' in path and gfile.isdir(path)
    return False


def may_be_folder(path: str) -> bool:
    """Tells whether a path that was listed is a folder, or may be one on a drive that is gone.

    If it cannot be looked up, it may be one, unless it leads nowhere or to itself, as a link may
    do, and its name has an extension.
    """
    if '://' in path:
        return gfile.isdir(path)
    try:
        mode = os.stat(to_bytes(path)).st_mode  # once, as the next answer may be another one
    except OSError as error:
        leads_nowhere = error.errno in MISSING
        has_extension = bool(os.path.splitext(path)[1])
        return not (leads_nowhere and has_extension)
    return stat.S_ISDIR(mode)


def is_linked_folder(path: str) -> bool:
    """Tells whether a path is a symbolic link to a folder."""
    return os.path.islink(to_bytes(path)) and is_folder(path)


def list_names(folder: str) -> list[str]:
    """Returns the names in a folder, sorted."""
    if '://' in folder:
        return sorted(name.rstrip('/') for name in gfile.listdir(folder))
    # gfile.listdir() would take an error of the drive for the end of the folder.
    names = os.listdir(to_bytes(folder))
    return sorted(name.decode(errors='surrogateescape') for name in names)


def find_images(folder: str, sorted_dir: str | None) -> Iterator[str]:
    """Yields the paths of the images in a folder and below it, sorted.

    Hidden ones are skipped, and those in `sorted_dir`, where an earlier run with --sort_into has
    put images. Links are followed. Linked folders come last.
    """
    found = set()
    remaining = [folder]
    linked: list[str] = []
    while remaining or linked:
        # If two paths lead to a folder, the one without a link counts, as it names the class.
        path = remaining.pop() if remaining else linked.pop()
        if not is_folder(path):
            yield path
            continue
        real_path = os.path.realpath(to_bytes(path))
        if real_path in found:  # a link leads to it
            continue
        found.add(real_path)
        try:
            names = list_names(path)
        except (tf.errors.OpError, OSError):
            yield path  # fails as an image that cannot be read
            continue
        for name in reversed(names):
            inner = os.path.join(path, name)
            # A folder on a drive that is gone fails as an image that cannot be read.
            is_wanted = name.lower().endswith(IMAGE_EXTENSIONS) or may_be_folder(inner)
            is_sorted_dir = sorted_dir and is_same_path(inner, sorted_dir)
            if is_wanted and not is_hidden(name) and not is_sorted_dir:
                (linked if is_linked_folder(inner) else remaining).append(inner)


def to_file_name(text: str) -> str:
    """Returns a valid name of a file or folder for a text.

    The rules of Windows are in https://learn.microsoft.com/windows/win32/fileio/naming-a-file
    """
    name = re.sub(r'[/\0]', '_', text)
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
    """Yields the paths on standard input; raises UserError if it cannot be read."""
    try:
        for path in split_paths(sys.stdin.buffer):
            # Some editors begin a file with a byte order mark. `cat` leaves it in the middle.
            name = path.removeprefix(b'\xef\xbb\xbf')
            if name:
                yield to_path(name.decode(errors='surrogateescape'))
    except OSError as error:
        raise UserError(f'-: standard input cannot be read: {error.strerror}.')


def split_paths(stream: Any) -> Iterator[bytes]:
    """Yields the paths in a stream: one per line, or with NUL after each (find -print0)."""
    # Each test alone can miss the first NUL: peek() may return less than a path, and readline()
    # ends at a newline in a name.
    has_nul = b'\0' in stream.peek()
    first = stream.readline()
    if first.startswith((b'\xff\xfe', b'\xfe\xff')):
        raise UserError('-: standard input is UTF-16. Write the list of paths in UTF-8.')
    if has_nul or b'\0' in first:
        yield from (first + stream.read()).split(b'\0')
        return
    for line in itertools.chain([first], stream):
        yield line.rstrip(b'\r\n')


def expand_list(paths: Iterable[str], sorted_dir: str | None) -> Iterator[str]:
    """Yields the paths of the images that a list names.

    `find` lists a folder, and then what is in it: an image that came with a folder is passed over.
    """
    found = set()
    for path in paths:
        if is_folder(path):
            for image in find_images(path, sorted_dir):
                if image not in found:
                    found.add(image)
                    yield image
        elif path not in found:
            yield path


def expand(images: Iterable[str], sorted_dir: str | None) -> Iterator[str]:
    """Yields the paths of the images that IMAGE arguments name.

    Below a folder, those in --sort_into are skipped.
    """
    for path in images:
        if path == '-':
            yield from expand_list(read_paths(), sorted_dir)
        elif is_folder(path):
            yield from find_images(path, sorted_dir)
        else:
            yield path


def place(path: str, class_folder: str, target_dir: str) -> None:
    """Links an image into a class folder in a folder, or copies it where links are not possible.

    It gets a number if another image has its name. Raises UserError if the folder cannot be made or
    the image is on another computer, and OSError if the image cannot be placed there.
    """
    if '://' in path:
        raise UserError(f"--sort_into: '{path}' is not on this computer. Copy it here first.")
    # Labels may be anything: '', '.' and '..' are no names for a folder.
    folder_name = re.sub(r'^\.*$', '_', to_file_name(class_folder))
    folder = os.path.join(target_dir, folder_name)
    stem, extension = os.path.splitext(os.path.basename(path))
    source = os.path.realpath(to_bytes(path))
    try:
        os.makedirs(to_bytes(folder), exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--sort_into: '{folder}' cannot be made ({error.strerror}). Name another folder."
        )
    for number in itertools.count(1):
        name = f'{stem} {number}{extension}' if number > 1 else f'{stem}{extension}'
        target = to_bytes(os.path.join(folder, name))
        if not os.path.lexists(target):
            with contextlib.suppress(FileExistsError):  # another run was faster
                link_or_copy(source, target)
                return
        if os.path.isfile(target) and filecmp.cmp(source, target, shallow=False):
            return


def create_hidden_name() -> str:
    """Returns a name that no other file has, for a file that is renamed once it is whole."""
    return f'.{uuid.uuid4().hex[:8]}.tmp'


def try_to_place(path: str, class_folder: str, target_dir: str) -> bool:
    """Does what place() does; returns False, after a line on standard error, if that fails."""
    try:
        place(path, class_folder, target_dir)
    except OSError as error:
        target = os.fsdecode(error.filename2 or error.filename or '')
        problem = 'the path is too long for Windows' if is_too_long(target) else error.strerror
        reason = f"--sort_into: '{path}' cannot be placed in {target_dir} ({problem})."
        tqdm.write(f'ERROR: {escape(reason)} The others go on.', file=sys.stderr)
        return False
    return True


def link_or_copy(source: bytes, target: bytes) -> None:
    """Makes a hard link, or a copy that appears whole or not at all."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except (AttributeError, OSError):  # not all systems have links
        temporary = os.path.join(os.path.dirname(target), create_hidden_name().encode())
        try:
            shutil.copyfile(source, temporary)
            rename_to_new(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise


def rename_to_new(source: bytes, target: bytes) -> None:
    """Renames a file; raises FileExistsError if the target exists."""
    try:
        os.link(source, target)  # fails if another run has made the target a moment ago
    except FileExistsError:
        raise
    except (AttributeError, OSError):  # as on a USB stick: two runs at once are not told apart
        if os.path.lexists(target):
            raise FileExistsError
        os.replace(source, target)
    else:
        os.remove(source)


# Image files

# Per image. TensorFlow decodes no JPEG into 2^29 bytes or more, of 3 bytes per pixel
# (tensorflow/core/lib/jpeg/jpeg_mem.cc), and a graph needs 15 bytes of memory per pixel.
MAX_PIXELS = 2**29 // 3
MAX_FILE_SIZE = 2**30  # bytes: MAX_PIXELS of 3 x 16 bits
MAX_SIDE = 1_000_000  # pixels: libpng refuses more, and the graph takes other formats as PNG
# Formats that begin with these are decoded by decode_by_tensorflow(), others by decode_by_pillow().
JPEG, PNG, GIF = b'\xff\xd8', b'\x89P', b'GI'
# Regular expressions for what files of a format begin with. The first match counts: a CR2 file is
# a TIFF file too, some AVIF files begin like HEIC, and all `....ftyp` like a video.
SIGNATURES = {
    'JPEG': JPEG,
    'PNG': PNG,
    'GIF': rb'GIF8',
    'WebP': rb'RIFF....WEBP',
    'AVIF': rb'....ftyp(avi[fs]|mif1.{0,24}avif)',
    'HEIC': rb'....ftyp(he|mif1|msf1)',
    'BMP': rb'BM',
    'DIB': rb'\x28\0\0\0',
    'a raw photograph (CR2)': rb'II\*\0....CR',
    'TIFF': rb'II[*+]\0|MM\0[*+]',
    'JPEG 2000': rb'\0\0\0\x0cjP|\xff\x4f\xff\x51',
    'PPM': rb'P[1-6]\s',
    'JPEG XL': rb'\xff\x0a|\0\0\0\x0cJXL',
    'a raw photograph (CR3)': rb'....ftypcrx',
    'a video': rb'....ftyp|RIFF....AVI|\x1aE\xdf\xa3',
    'EPS': rb'%!PS|\xc5\xd0\xd3\xc6',
    'Photoshop (PSD)': rb'8BPS',
    'FITS': rb'SIMPLE',
    'PDF': rb'%PDF',
    'a web page (HTML)': rb'(?i:\s*(<\?xml[^>]*>\s*)?(<!doctype )?<?html)',
    'SVG': rb'\s*<svg|\s*<\?xml',
    'a ZIP archive': rb'PK',
}
# The formats that are read, and Pillow's names for them. Pillow knows thirty more: for some, it
# starts other programs.
FORMATS = {
    'JPEG': 'JPEG',
    'PNG': 'PNG',
    'GIF': 'GIF',
    'WebP': 'WEBP',
    'AVIF': 'AVIF',
    'HEIC': 'HEIF',
    'BMP': 'BMP',
    'DIB': 'DIB',
    'TIFF': 'TIFF',
    'JPEG 2000': 'JPEG2000',
    'PPM': 'PPM',
}


class ImageError(Exception):
    """Why an image cannot be decoded."""


def name_format(contents: bytes) -> str:
    """Returns the format of a file by what it begins with; '' if it is not in SIGNATURES."""
    for name, pattern in SIGNATURES.items():
        if re.match(pattern, contents, re.DOTALL):
            return name
    return ''


def count_pixels(contents: tf.Tensor) -> tf.Tensor:
    """Returns how many pixels an encoded JPEG, PNG or GIF has by its header, int64 [].

    A PNG has width and height in bytes 16 to 23, in its first chunk, IHDR
    (https://www.w3.org/TR/png-3/#11IHDR), a GIF in bytes 6 to 9
    (https://www.w3.org/Graphics/GIF/spec-gif89a.txt). Other contents are an error.
    """
    start = tf.strings.substr(contents, 0, 2)
    header = tf.strings.substr(contents, 0, 24) + 24 * b'\0'  # a short file has sides of 0
    # Clients show errors as UTF-8: other bytes become dots.
    text = tf.strings.unicode_transcode(
        header, 'UTF-8', 'UTF-8', replacement_char=ord('.'), replace_control_characters=True
    )
    message = ['The image is not JPEG, PNG or GIF. It starts with', text]
    # libpng allows other chunks before IHDR. Their contents would be taken for the sides.
    is_png = (start == PNG) & (tf.strings.substr(header, 12, 4) == b'IHDR')
    is_known = is_png | tf.reduce_any(start == [JPEG, GIF])
    png_sides = tf.io.decode_raw(tf.strings.substr(header, 16, 8), tf.int32, little_endian=False)
    gif_sides = tf.io.decode_raw(tf.strings.substr(header, 6, 4), tf.uint16)
    # The op itself, as tf.debugging.Assert() takes several times as long to build.
    with tf.control_dependencies([tf.raw_ops.Assert(condition=is_known, data=message)]):
        sides = tf.cond(
            start == JPEG,
            lambda: tf.image.extract_jpeg_shape(contents)[:2],
            lambda: tf.where(is_png, png_sides, tf.cast(gif_sides, tf.int32)),
        )
    return tf.reduce_prod(tf.cast(sides, tf.int64))


def decode_by_tensorflow(contents: tf.Tensor) -> tf.Tensor:
    """Returns a JPEG, PNG or GIF, uint8 [height, width, 3]: JPEG and PNG as the graph decodes them.

    Of an animated GIF, that is the first frame. Fails before it decodes an image whose header says
    that it has more than MAX_PIXELS pixels.
    """
    is_small = count_pixels(contents) <= MAX_PIXELS
    message = [f'The image has more than {MAX_PIXELS:,} pixels.']
    with tf.control_dependencies([tf.raw_ops.Assert(condition=is_small, data=message)]):
        contents = tf.identity(contents)
    image = tf.io.decode_image(contents, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])


# The size and the type of a box of a HEIC that names an item (ISO/IEC 14496-12, 4.2 and 8.11.6).
HEIC_ITEM = re.compile(b'(....)infe', re.DOTALL)


def find_heic_items(contents: bytes) -> Iterator[bytes]:
    """Yields what is in the boxes that name an item, behind their size and type.

    Raises ImageError if boxes overlap: to read them all could take hours.
    """
    unread = len(contents)
    for match in HEIC_ITEM.finditer(contents):
        size = int.from_bytes(match[1], 'big')
        start = match.end()
        if size == 1:  # it is behind the type, as a number of eight bytes
            size = int.from_bytes(contents[start : start + 8], 'big')
            start += 8
        end = match.start() + size if size else len(contents)
        if end > len(contents):  # no box: an image may have any bytes
            continue
        unread -= end - match.start()
        if unread < 0:
            raise ImageError('it is HEIC, and damaged')
        yield contents[start:end]


def check_heic(contents: bytes) -> None:
    """Raises ImageError for a HEIC in which the type or name of an item is not UTF-8.

    pi_heif would crash (tried with 1.4).
    """
    for item in find_heic_items(contents):
        version = item[:1]
        if version > b'\3':  # no box, either
            continue
        # Behind the version are three bytes of flags, an ID of two or four, and an index of two.
        text = item[10:] if version == b'\3' else item[8:]
        try:
            text.decode()
        except UnicodeDecodeError:
            raise ImageError('it is HEIC, and damaged')


def open_by_pillow(file: Any) -> Image.Image:
    """Opens an image of one of FORMATS; raises KeyError for others, ImportError without pi-heif.

    The file is open. Only its header is read, but all of a HEIC.
    """
    name = name_format(file.read(64))
    file.seek(0)
    if name == 'HEIC':
        import pi_heif

        pi_heif.register_heif_opener()
        check_heic(file.read())
        file.seek(0)
    return Image.open(file, formats=[FORMATS[name]])


def decode_by_pillow(contents: bytes) -> np.ndarray:
    """Returns the first frame of an image that is not JPEG, PNG or GIF: [height, width, 3].

    Gray samples with 16 bits are reduced to their upper byte, as TensorFlow does with PNG: Pillow
    would make all values from 255 on white.
    """
    with open_by_pillow(io.BytesIO(contents)) as image:
        check_size(image.width * image.height)
        if max(image.size) > MAX_SIDE:
            raise ImageError(f'it is more than {MAX_SIDE:,} pixels wide or high')
        if image.format == 'TIFF':  # a tile is decoded as a whole, and may be larger than the image
            tile_width = image.tag_v2.get(ExifTags.Base.TileWidth, 0)
            check_size(tile_width * image.tag_v2.get(ExifTags.Base.TileLength, 0))
        if image.format == 'WEBP':
            # TensorFlow takes a third of Pillow's time, but refuses alpha and animations.
            with contextlib.suppress(tf.errors.InvalidArgumentError):
                return tf.io.decode_webp(contents, channels=3).numpy()[0]
        is_gray_16 = image.mode.startswith('I;16') or (image.mode, image.format) == ('I', 'PPM')
        if is_gray_16:
            upper = np.uint8(np.asarray(image) >> 8)
            if image.format == 'TIFF':
                is_white_zero = image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0
                upper = 255 - upper if is_white_zero else upper
            return np.repeat(upper[:, :, np.newaxis], 3, axis=2)
        if image.mode in ('I', 'F'):
            raise ImageError('its samples are signed, or have 32 bits. Save it with 8 bits')
        return np.asarray(image if image.mode == 'RGB' else image.convert('RGB'))


def check_size(pixels: int) -> None:
    """Raises ImageError for an image of too many pixels."""
    if pixels > MAX_PIXELS:
        raise ImageError(f'it has {pixels:,} pixels, more than {MAX_PIXELS:,}')


def skip_blocks(contents: bytes, position: int) -> int:
    """Returns the end of the data blocks of a GIF from `position` on.

    Each has its length in its first byte. The last one has a length of 0.
    """
    while position < len(contents) and contents[position]:
        position += 1 + contents[position]
    return position + 1


def count_color_bytes(flags: int) -> int:
    """Returns the size of the table of colors that a GIF has according to its flags."""
    return 3 * 2 ** (flags % 8 + 1) if flags >= 128 else 0


def read_frames(contents: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields width, height and end of each frame of a GIF, up to where the file is damaged.

    Its blocks are those of https://www.w3.org/Graphics/GIF/spec-gif89a.txt.
    """
    screen = contents[6:13]
    if len(screen) < 7:
        return
    position = 13 + count_color_bytes(screen[4])
    while contents[position : position + 1] in (b'!', b','):
        if contents[position : position + 1] == b'!':  # an extension
            position = skip_blocks(contents, position + 2)
            continue
        descriptor = contents[position : position + 10]
        if len(descriptor) < 10:
            return
        _, _, width, height, flags = struct.unpack('<x4HB', descriptor)
        # The size of the codes, one byte, stands before their blocks.
        position = skip_blocks(contents, position + 10 + count_color_bytes(flags) + 1)
        yield width, height, position


def keep_first_frame(contents: bytes) -> bytes:
    """Returns a GIF without the frames that TensorFlow would decode in vain.

    TensorFlow decodes all frames, and returns the first one, on black if another one is larger
    (tensorflow/core/lib/gif/gif_io.cc). So the others are cut off if none is larger. Raises
    ImageError if too many pixels are left.
    """
    frames = read_frames(contents)
    first_width, first_height, end = next(frames, (0, 0, len(contents)))
    width = first_width
    height = first_height
    pixels = width * height
    for frame_width, frame_height, _ in frames:
        width = max(width, frame_width)
        height = max(height, frame_height)
        pixels += frame_width * frame_height
    check_size(width * height)
    if (width, height) == (first_width, first_height):
        return contents[:end] + b';'
    check_size(pixels)
    return contents


def decode(contents: bytes, is_upright: bool) -> np.ndarray:
    """Returns an image, uint8 [height, width, 3]; raises ImageError if it cannot be decoded.

    With `is_upright`, it is turned as its EXIF orientation says.
    """
    name = name_format(contents)
    if not contents:
        raise ImageError('it is empty')
    if not name:
        raise ImageError(f'its format is not known: it starts with {contents[:12]!r}')
    if name not in FORMATS:
        raise ImageError(f'it is {name}, which is not read')
    try:
        if contents[:2] in (JPEG, PNG, GIF):
            still = keep_first_frame(contents) if name == 'GIF' else contents
            check_size(int(count_pixels(still)))
            pixels = decode_by_tensorflow(still).numpy()
        else:
            pixels = decode_by_pillow(contents)
    except ImportError:
        raise ImageError('it is HEIC. To read it, run: pip install pi-heif')
    except ImageError:
        raise
    except (MemoryError, tf.errors.ResourceExhaustedError):
        raise  # a lack of memory says nothing about the image
    except PIL.UnidentifiedImageError:
        raise ImageError(f'it is {name}, and damaged, or of a kind that is not read')
    except Exception as error:  # Pillow has many kinds
        raise ImageError(f'it is {name}, and damaged ({describe(error)})')
    return turn(pixels, get_orientation(contents)) if is_upright else pixels


def decode_image(contents: tf.Tensor, is_upright: bool) -> tf.Tensor:
    """Does what decode() does, in a graph."""

    def decode_in_python() -> tf.Tensor:
        call = functools.partial(decode, is_upright=is_upright)
        return tf.ensure_shape(tf.numpy_function(call, [contents], tf.uint8), [None, None, 3])

    if is_upright:
        return decode_in_python()
    start = tf.strings.substr(contents, 0, 2)
    is_tensorflow = tf.reduce_any(start == [JPEG, PNG])
    return tf.cond(is_tensorflow, lambda: decode_by_tensorflow(contents), decode_in_python)


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns or mirrors an image, [height, width, 3], that was stored with an EXIF orientation.

    The values 1 to 8 are those of the tag Orientation in TIFF 6.0.
    """
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


class Header(NamedTuple):
    """What an image file says about its pixels."""

    orientation: int | None = None  # EXIF's, 1 to 8: from 2 on, viewers turn or mirror the image
    bits: int | None = None  # per sample


def read_header(file: Any) -> Header:
    """Returns the header of an image, an open file, as far as Pillow can read it.

    HEIC and TIFF have no orientation: Pillow turns them while it decodes them.
    """
    # Pillow has many kinds of errors.
    with contextlib.suppress(Exception), open_by_pillow(file) as image:
        # Samples of 16 bits have a mode such as 'I;16'. If Pillow reduces them to 8 bits, the raw
        # mode of its decoder shows them, such as 'RGB;16B'. In BMP, that is 16 bits per pixel.
        is_reduced = ';16' in str(image.tile) and image.format not in ('BMP', 'DIB')
        has_16_bits = image.mode.startswith('I') or is_reduced
        orientation = None
        if image.format not in ('HEIF', 'TIFF'):
            exif = Image.Image.getexif(image)  # image.getexif() of PNG would decode the image
            stored: Any = exif.get(ExifTags.Base.Orientation)
            if stored in range(1, 9):
                orientation = int(stored)  # some programs write 6.0 or 6/1
        return Header(orientation, 16 if has_16_bits else 8)
    return Header()


def get_orientation(contents: bytes) -> int:
    """Returns the EXIF orientation of an image, 1 if it has none."""
    return read_header(io.BytesIO(contents)).orientation or 1


def is_too_large(path: bytes) -> bool:
    """Tells whether a file on this computer is larger than any image that is read."""
    try:
        return os.path.getsize(path) > MAX_FILE_SIZE
    except (OSError, ValueError):  # there is none, or a NUL in the path
        return False


def load_files(keys: np.ndarray, paths: list[str], load: Callable) -> tf.data.Dataset:
    """Returns a dataset of load(key, contents) of the file of each key; skips files that fail.

    paths[i] is the file of keys[i], a number that tells the files apart, such as a row of a table.
    Files that are missing, too large or not plain are not opened.
    """

    @tf.autograph.experimental.do_not_convert  # it would take a quarter of a second
    def load_file_of(key: tf.Tensor, path: tf.Tensor) -> Any:
        return load(key, tf.io.read_file(path))

    names = np.array([to_bytes(path) for path in paths], object)
    # Only TensorFlow can look up gs:// and the like, but it takes 50 us to find a file missing.
    is_plain = np.array([b'://' in name or os.path.isfile(name) for name in names], bool)
    is_usable = is_plain & ~np.array([is_too_large(name) for name in names], bool)
    files = tf.data.Dataset.from_tensor_slices((keys[is_usable], names[is_usable]))
    return files.map(load_file_of, tf.data.AUTOTUNE).ignore_errors()


def load_image(path: str, is_upright: bool) -> tuple[bytes, int]:
    """Returns an image as the graph takes it, and its EXIF orientation.

    A JPEG or PNG stays as it is, unless it is to be turned. All others become PNG. Raises
    ImageError if it has too many pixels or cannot be decoded. Of a JPEG or PNG, only the header
    is read here: the graph finds out whether it is damaged.
    """
    contents = load_file(path, 'image')
    orientation = get_orientation(contents)
    is_turned = is_upright and orientation > 1
    if name_format(contents) in ('JPEG', 'PNG') and not is_turned:
        try:
            check_size(int(count_pixels(contents)))
        except tf.errors.OpError as error:
            raise ImageError(f'its size cannot be read ({describe(error)})')
        return contents, orientation
    png = io.BytesIO()
    Image.fromarray(decode(contents, is_upright)).save(png, 'PNG', compress_level=1)  # fast
    return png.getvalue(), orientation


def load_pixels(path: str, is_upright: bool) -> tuple[bytes, np.ndarray]:
    """Returns an image as the graph takes it, and its pixels, uint8 [height, width, 3].

    Raises UserError if it cannot be read or decoded.
    """
    try:
        contents, _ = load_image(path, is_upright)  # which turns it if need be
        return contents, decode(contents, is_upright=False)
    except ImageError as error:
        raise UserError(
            f"--heatmap: '{path}' cannot be drawn: {error}. If it has just changed, try again."
        )


def explain_failure(path: str) -> str:
    """Returns why an image cannot be labeled; '' if it can be."""
    try:
        decode(load_file(path, 'image'), is_upright=False)
    except UserError as error:
        return str(error)
    except ImageError as error:
        return (
            f"'{path}' cannot be labeled: {error}. Replace it, or save it as a JPEG or PNG of at "
            f'most {MAX_PIXELS:,} pixels.'
        )
    return ''


# Graph


def run_graph(graph_def: GraphDef, contents: bytes, nodes: list[str]) -> list[np.ndarray]:
    """Returns the output of some nodes of the graph for an encoded image.

    'node:1' stands for the second output of a node.
    """
    # Optimizing the graph takes longer than running it once without.
    options = tf.compat.v1.GraphOptions(rewrite_options=RewriterConfig(disable_meta_optimizer=True))
    with (
        tf.Graph().as_default(),
        tf.compat.v1.Session(config=tf.compat.v1.ConfigProto(graph_options=options)) as session,
    ):
        tf.import_graph_def(graph_def, name='')
        tensors = [node if ':' in node else f'{node}:0' for node in nodes]
        return session.run(tensors, {f'{JPEG_DATA_NODE}:0': contents})


def fold(graph_def: GraphDef, source: str, shape: list, *outputs: str) -> GraphDef:
    """Returns a graph for batches, without ops that TensorFlow has removed since 2015.

    It begins at the node `source`, which becomes a placeholder of a shape, and ends at `outputs`.
    The functions below edit nodes and constants of the copy in place. Batch norms become part of
    the convolutions before them. CheckNumerics, which is of use only in training, is removed. In
    the networks of 2015 and 2017, which take one image, a reshape to a single row becomes one to
    any number of rows.
    """
    folded = GraphDef()
    folded.CopyFrom(graph_def)
    folded.versions.producer = tf.version.GRAPH_DEF_VERSION
    nodes = {node.name: node for node in folded.node}
    constants = {node.name: node.attr['value'].tensor for node in folded.node if node.op == 'Const'}
    for node in folded.node:
        node.attr.pop('_class', None)  # ties it to the device of nodes that may be removed
        drop_checks(node, nodes)
        if node.op == 'BatchNormWithGlobalNormalization':
            fold_batch_norm(node, nodes, constants)
        elif node.op == 'PlaceholderWithDefault':  # other runtimes would take it for an input
            attributes = {'T': node.attr['dtype']}
            node.CopyFrom(NodeDef(name=node.name, op='Identity', input=node.input, attr=attributes))
        elif node.op == 'Reshape' and node.input[1] in constants and not is_in_function(node):
            allow_batches(constants[node.input[1]])
    float32 = AttrValue(type=tf.float32.as_datatype_enum)
    attributes = {'dtype': float32, 'shape': AttrValue(shape=tf.TensorShape(shape).as_proto())}
    nodes[source].CopyFrom(NodeDef(name=source, op='Placeholder', attr=attributes))
    return extract_sub_graph(folded, outputs)


def is_in_function(node: NodeDef) -> bool:
    """Tells whether a node is of a module or a network of Keras.

    These take batches already: in them, a constant shape of [1, n] is not that of a single image.
    """
    return node.name.startswith(f'{FUNCTION_SCOPE}/')


def drop_checks(node: NodeDef, nodes: dict[str, NodeDef]) -> None:
    """Removes the control inputs of a node, '^name', that are CheckNumerics."""
    kept = []
    for name in node.input:
        is_control = name.startswith('^')
        if not is_control or nodes[name[1:]].op != 'CheckNumerics':
            kept.append(name)
    node.input[:] = kept


def fold_batch_norm(node: NodeDef, nodes: dict[str, NodeDef], constants: dict) -> None:
    """Makes a BatchNormWithGlobalNormalization part of the convolution before it, and its bias.

    The op is (x - mean) * s + beta, s = gamma / sqrt(variance + epsilon), where gamma is used only
    with scale_after_normalization (tensorflow/core/ops/nn_ops.cc). After a convolution with weights
    w, that is a convolution with weights w * s, and a bias of beta - mean * s.
    """
    convolution, mean, variance, beta, gamma = node.input
    weights = nodes[convolution].input[1]
    names = (weights, mean, variance, beta, gamma)
    values = {name: np.float64(tf.make_ndarray(constants[name])) for name in names}
    scale = 1 / np.sqrt(values[variance] + node.attr['variance_epsilon'].f)
    if node.attr['scale_after_normalization'].b:
        scale = scale * values[gamma]
    new_weights = np.float32(values[weights] * scale)
    bias = np.float32(values[beta] - values[mean] * scale)
    constants[weights].CopyFrom(tf.make_tensor_proto(new_weights))
    constants[beta].CopyFrom(tf.make_tensor_proto(bias))
    bias_add = NodeDef(name=node.name, op='BiasAdd', input=[convolution, beta])
    bias_add.attr['T'].CopyFrom(node.attr['T'])
    node.CopyFrom(bias_add)


def allow_batches(shape: TensorProto) -> None:
    """Changes a constant shape of [1, n], which is that of a single image, to [-1, n]."""
    sides = tf.make_ndarray(shape)
    if len(sides) == 2 and sides[0] == 1:
        shape.CopyFrom(tf.make_tensor_proto(np.array([-1, sides[1]], sides.dtype)))


def is_large_constant(node: NodeDef) -> bool:
    """Tells whether a node is one of the weights of a network."""
    return node.op == 'Const' and node.ByteSize() > LARGE_CONSTANT


def hide_weights(graph_def: GraphDef) -> GraphDef:
    """Returns a graph with placeholders for its large constants.

    With 87 MB of constants in the graph, TensorFlow's optimizers take five seconds longer and twice
    the memory.
    """
    structure = GraphDef(versions=graph_def.versions, library=graph_def.library)
    for node in graph_def.node:
        if is_large_constant(node):
            shape = AttrValue(shape=node.attr['value'].tensor.tensor_shape)
            attributes = {'dtype': node.attr['dtype'], 'shape': shape}
            structure.node.add(name=node.name, op='Placeholder', attr=attributes)
        else:
            structure.node.add().CopyFrom(node)
    return structure


def get_weights(graph_def: GraphDef) -> dict[str, np.ndarray]:
    """Returns the large constants of a graph, {node name: array}."""
    return {
        node.name: tf.make_ndarray(node.attr['value'].tensor)
        for node in graph_def.node
        if is_large_constant(node)
    }


class Answer(NamedTuple):
    """The outputs of the graph for an image, and how the image is stored."""

    scores: np.ndarray  # float [classes]
    familiarity: np.ndarray | None  # float []: share of the user's images that are no more familiar
    orientation: int  # EXIF's, 1 to 8: from 2 on, viewers turn or mirror the image


def create_classifier(graph: Graph) -> tuple[Callable, np.ndarray]:
    """Returns a tf.function from images to the graph's outputs, and the (height, width) of images.

    Images are float [N, height, width, 3], in 0..255.
    """
    nodes = {node.name: node for node in graph.graph_def.node}
    size = tf.make_ndarray(nodes[nodes[RESIZED_INPUT_NODE].input[1]].attr['value'].tensor)
    shape = [None, *size, 3]
    folded = fold(graph.graph_def, RESIZED_INPUT_NODE, shape, *graph.outputs)
    structure = hide_weights(folded)
    constants = {f'{name}:0': tf.constant(value) for name, value in get_weights(folded).items()}

    @tf.function(input_signature=[tf.TensorSpec(shape)])
    def classify(images: tf.Tensor) -> list[tf.Tensor]:
        # import_graph_def() takes no tensors from outside of this function.
        feeds = {name: tf.identity(tensor) for name, tensor in constants.items()}
        feeds[f'{RESIZED_INPUT_NODE}:0'] = images
        tensors = [f'{output}:0' for output in graph.outputs]
        return tf.graph_util.import_graph_def(structure, feeds, tensors)

    return classify, size


def create_answer(outputs: Sequence[np.ndarray], orientation: int) -> Answer:
    """Returns the answer of the graph's outputs for one image: scores, and familiarity if any."""
    scores, *familiarity = outputs
    return Answer(scores, familiarity[0] if familiarity else None, orientation)


def score_images(
    graph: Graph, paths: Iterable[str], is_upright: bool
) -> Iterator[tuple[str, Answer | None]]:
    """Yields (path, answer) of images in their order; None for what cannot be decoded."""
    classify, size = create_classifier(graph)

    def load(row: tf.Tensor, contents: tf.Tensor) -> tuple[tf.Tensor, ...]:
        image = decode_image(contents, is_upright)
        orientation = tf.ensure_shape(tf.numpy_function(get_orientation, [contents], tf.int64), [])
        return row, orientation, resize_bilinear(image[tf.newaxis], size)[0]

    remaining = iter(paths)
    while names := list(itertools.islice(remaining, MAX_LISTED)):
        images = load_files(np.arange(len(names)), names, load)
        yield from zip(names, score_loaded(images, len(names), classify), strict=True)


def score_loaded(
    images: tf.data.Dataset, count: int, classify: Callable
) -> Iterator[Answer | None]:
    """Yields the answers for (row, orientation, image): one per row, or None for missing rows."""
    next_row = 0
    for rows, orientations, batch in images.batch(NETWORK_BATCH_SIZE).prefetch(2):
        arrays = [output.numpy() for output in classify(batch)]
        for position, row in enumerate(rows.numpy()):
            yield from [None] * (row - next_row)
            outputs = [array[position] for array in arrays]
            yield create_answer(outputs, int(orientations[position]))
            next_row = row + 1
    yield from [None] * (count - next_row)


def score_image(graph: Graph, path: str, is_upright: bool) -> Iterator[tuple[str, Answer | None]]:
    """Yields what score_images() would yield for one image, sooner: it builds no classifier."""
    try:
        contents, orientation = load_image(path, is_upright)
        outputs = run_graph(graph.graph_def, contents, graph.outputs)
        yield path, create_answer([output[0] for output in outputs], orientation)
    except (UserError, ImageError):
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
    """Returns the logit of a class at each position of the last feature map, without the bias.

    That is the class activation map (Zhou et al. 2016, https://arxiv.org/abs/1512.04150), float
    [rows, columns]. Only affine ops follow the mean over the positions. So each position has logits
    of its own, and their mean is the logits of the image. Raises UserError if that does not hold
    for a network.
    """
    mean, logits = find_mean(graph)
    nodes = [mean.input[0], mean.name, logits]
    features, pooled, expected = run_graph(graph.graph_def, contents, nodes)
    if features.ndim != 4 or pooled.shape[-1] != features.shape[-1]:
        raise UserError(NO_HEATMAP)
    positions = features.reshape([-1, *pooled.shape[1:]])
    position_logits = run_from(graph.graph_def, mean.name, positions, logits)
    (biases,) = run_from(graph.graph_def, mean.name, np.zeros_like(positions[:1]), logits)
    unbiased = position_logits - biases  # which belong to no position
    tolerance = 1e-3 * np.abs(unbiased).max()  # after few training steps, all of them are small
    if not np.allclose(unbiased.mean(axis=0), expected[0] - biases, rtol=0, atol=tolerance):
        raise UserError(NO_HEATMAP)
    return unbiased[:, index].reshape(features.shape[1:3])


def run_from(graph_def: GraphDef, node: str, values: np.ndarray, output: str) -> np.ndarray:
    """Returns the output of a graph in which a node has the given values.

    Raises UserError if another branch of the network leads to the output, too.
    """
    rest = fold(graph_def, node, [None, *values.shape[1:]], output)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(rest, name='')
        try:
            return session.run(f'{output}:0', {f'{node}:0': values})
        except tf.errors.InvalidArgumentError:  # the other branch has no image
            raise UserError(NO_HEATMAP)


def find_mean(graph: Graph) -> tuple[NodeDef, str]:
    """Returns the node of the last mean, and the name of the logits' node.

    Raises UserError if there is no mean.
    """
    nodes = {node.name: node for node in graph.graph_def.node}
    logits = nodes[graph.outputs[0]].input[0]
    node = nodes[logits]
    while node.op not in ('AvgPool', 'Mean'):
        # 'split:1' is the second output of 'split', and '^name' is a control input.
        names = [name.removeprefix('^').split(':')[0] for name in node.input]
        inputs = [nodes[name] for name in names if nodes[name].op != 'Const']
        if not inputs:
            raise UserError(NO_HEATMAP)
        node = inputs[0]
    return node, logits


def name_in_picture(label: str, number: int) -> str:
    """Returns what pictures call a class: its label, or its number, such as '#3' for the third.

    It is the number if the font lacks a character, as it has only those of ASCII and a few more.
    """
    font = ImageFont.load_default(16)
    box = bytes(font.getmask('\uffff'))  # which the font has in place of what it lacks
    is_drawable = all(bytes(font.getmask(character)) != box for character in label)
    return label if is_drawable else f'#{number}'


def draw_heatmap(pixels: np.ndarray, heatmap: np.ndarray, title: str) -> Image.Image:
    """Draws a photograph, uint8 [height, width, 3], in gray, redder where the heatmap is higher.

    A title stands above it, and a scale of the colors below it.
    """
    gray = Image.fromarray(pixels).convert('L').convert('RGB')
    shares = np.maximum(heatmap, 0) / max(heatmap.max(), 1e-12)
    paint_red(gray, shares)
    font_size = min(max(16, gray.width // 40), 400)
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
    """Writes a picture, whole, in the format that the extension of its file asks for.

    A symbolic link stays a link: the picture is written to where it leads. A PNG says by which
    program it was written, so that is_heatmap() knows it again.
    """
    if is_special(target) or is_folder(target):
        raise UserError(f"--heatmap: '{target}' is not a plain file. Name another one.")
    real_target = resolve(target)
    suffix = real_target.suffix or pathlib.PurePath(target).suffix
    text = PngImagePlugin.PngInfo()
    text.add_text('Software', SOFTWARE)
    temporary = to_bytes(str(real_target.with_name(create_hidden_name())))
    try:
        contents = io.BytesIO()
        image_format = Image.registered_extensions().get(suffix.lower())
        picture.save(contents, image_format, pnginfo=text)
        with open(temporary, 'wb') as file:
            file.write(contents.getvalue())
        os.replace(temporary, to_bytes(str(real_target)))
    except Exception as error:  # Pillow has many kinds
        with contextlib.suppress(OSError, ValueError):
            os.remove(temporary)
        reason = getattr(error, 'strerror', '') or describe(error)  # without the temporary name
        raise UserError(
            f"--heatmap: '{target}' cannot be written ({reason}). Name another file, such as "
            'heatmap.png.'
        )


# Classes


def get_absolute(path: str) -> pathlib.PurePath:
    """Returns an absolute path without `..`; links stay."""
    return pathlib.PurePath(os.path.abspath(to_bytes(path)).decode(errors='surrogateescape'))


def resolve(path: str) -> pathlib.PurePath:
    """Returns the absolute path to which links lead."""
    return pathlib.PurePath(os.path.realpath(to_bytes(path)).decode(errors='surrogateescape'))


def get_label(folder: str) -> str:
    """Returns the label of a class folder.

    That is its name in lower case. Each run of characters other than a-z and 0-9 becomes one space,
    or nothing at either end. If nothing is left, the original's label was ' ', and here it is the
    name, in which each run of white space becomes one space. Names that look the same have the same
    label: macOS stores letters such as 'ä' in another form, which becomes NFC.
    """
    name = unicodedata.normalize('NFC', folder)
    label = re.sub(r'[^a-z0-9]+', ' ', name.lower()).strip()
    return label or ' '.join(name.split())


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of the graph, in its order."""

    labels: list[str]  # those of the labels file
    folders: list[str]  # the class folders of the training, or the labels if they are not known
    roots: list[pathlib.PurePath]  # the folders among the IMAGE arguments

    @functools.cached_property
    def indices(self) -> dict[str, int]:
        """The class of each class folder, of each label, and of each label of the training.

        Labels differ from those of the training where people have translated the labels file.
        Classes with the same label count as one, the first: so do their folders.
        """
        of_labels = {label: self.labels.index(label) for label in self.labels}
        pairs = list(zip(self.folders, self.labels, strict=True))
        of_folders = {folder: of_labels[label] for folder, label in pairs}
        of_trained_labels = {get_label(folder): of_labels[label] for folder, label in pairs}
        # Translated labels have capitals, and so have those of names without a-z and 0-9: 'КОТ'.
        names = of_trained_labels | of_labels
        in_lower_case = {name.lower(): index for name, index in names.items()}
        # The same name may mean several classes: then the folder counts, and else the exact name.
        return in_lower_case | names | of_folders

    def find(self, path: str) -> int | None:
        """Returns the class of the nearest folder above an image that is named like a class.

        Its name is in `indices`, or its label is, such as 'red fox' of 'Red_Fox'. The image's own
        folder always counts. Folders above it count up to the one that is an IMAGE argument: a home
        folder such as /home/rose does not.
        """
        own_folder, *above = get_absolute(path).parents
        folders = [own_folder]
        folders += [
            folder for folder in above if any(folder.is_relative_to(root) for root in self.roots)
        ]
        for folder in folders:
            label = get_label(folder.name)
            for name in (folder.name, label, label.lower(), folder.name.lower()):
                if name in self.indices:
                    return self.indices[name]
        return None

    def get_folder(self, answer: Answer, label: str) -> str:
        """Returns the class folder of an answer. UNSURE and UNKNOWN are folders of their own."""
        best = answer.scores.argmax()
        return self.folders[best] if label == self.labels[best] else label


def create_classes(
    labels: list[str], training: Training | None, flags: argparse.Namespace
) -> Classes:
    """Returns the classes, with the folders of the training if they are known."""
    roots = [get_absolute(path) for path in flags.images if is_folder(path)]
    if training and len(training.folders) == len(labels):
        return Classes(labels, training.folders, roots)
    return Classes(labels, labels, roots)


@dataclasses.dataclass
class Tally:
    """Counts of the images: what became of them, and whether their labels are right."""

    classes: Classes
    training: Training | None
    images: int = 0
    failed: int = 0
    placed: Counter[str] = dataclasses.field(default_factory=Counter)  # by folder of --sort_into
    unfamiliar: int = 0  # images that are unlike those of the training, and did not get UNKNOWN
    sideways: int = 0
    not_new: int = 0  # images that the training used for more than its test
    refused: int = 0  # new images in class folders that got UNSURE or UNKNOWN
    other_folders: set[str] = dataclasses.field(default_factory=set)
    counted: set[pathlib.PurePath] = dataclasses.field(default_factory=set)  # real paths
    # One for each new image in a class folder, unless the image got UNSURE or UNKNOWN:
    true_classes: list[int] = dataclasses.field(default_factory=list)
    predictions: list[int] = dataclasses.field(default_factory=list)

    def add(self, path: str, answer: Answer, label: str) -> None:
        """Counts an image and its label."""
        self.sideways += answer.orientation > 1
        is_unfamiliar = answer.familiarity is not None and answer.familiarity <= UNFAMILIAR
        is_unknown = label == UNKNOWN and label not in self.classes.labels  # not a class
        self.unfamiliar += bool(is_unfamiliar and not is_unknown)
        if not self.classes.roots:  # the accuracy is only for folders
            return
        index = self.classes.find(path)
        if index is None:
            self.other_folders.add(os.path.dirname(path) or '.')
            return
        real_path = resolve(path)
        if real_path in self.counted:  # it was named twice
            return
        self.counted.add(real_path)
        if not self.is_new(path):
            self.not_new += 1
        elif label in self.classes.labels:
            self.true_classes.append(index)
            self.predictions.append(self.classes.labels.index(label))
        else:
            self.refused += 1

    @functools.cached_property
    def listed_folders(self) -> dict[pathlib.PurePath, str]:
        """The class folders of the training: {real path: path relative to --image_dir}."""
        training = self.training
        if training is None:
            return {}
        return {
            resolve(os.path.join(image_dir, name)): name
            for image_dir in (training.absolute_image_dir, training.real_image_dir)
            for name in training.list_folders()
        }

    def find_listed(self, path: str) -> str | None:
        """Returns an image as the training listed it, 'class folder/file', or None if it did not.

        An image was listed if its path, or the target if that is a link, lies directly in a class
        folder of the training.
        """
        for candidate in (path, str(resolve(path))):
            folder = self.listed_folders.get(resolve(os.path.dirname(candidate)))
            if folder is not None:
                return os.path.join(folder, os.path.basename(candidate))
        return None

    def is_new(self, path: str) -> bool:
        """Tells whether the training did not use an image, or only for its test."""
        training = self.training
        file = self.find_listed(path)
        if training is None or file is None:
            return True
        set_folders, percentages = training.set_folders, training.percentages
        name = get_set_of_file(training.image_dir, file, set_folders, percentages)
        return name == 'testing'


def get_stem(path: str) -> str:
    """Returns a path up to '_nohash_', behind which variants of one photograph differ."""
    return re.sub(r'_nohash_.*$', '', path)


def get_set(path: str, testing_percentage: int, validation_percentage: int) -> str:
    """Returns the set of an image: a hash of its path decides, so that it never changes.

    This looks a bit magical, but an image must stay in its set when others come or go, or images
    that were trained on yesterday would be tested with today. So the set depends on nothing but the
    path: its hash becomes a percentage, p. For 'data/cat/cat.0.jpg', p is 15.728: with 10 % for
    each, validation has p below 10, testing has p below 20, and training has the rest.

    On Windows, the original hashed 'data\\cat\\cat.0.jpg'. Here, a set is the same everywhere.
    """
    stem = get_stem(path.replace(os.sep, '/'))
    digest = int(hashlib.sha1(to_bytes(stem)).hexdigest(), 16)
    remainder = digest % (MAX_NUM_IMAGES_PER_CLASS + 1)
    percentage_hash = remainder * (100.0 / MAX_NUM_IMAGES_PER_CLASS)
    if percentage_hash < validation_percentage:
        return 'validation'
    if percentage_hash < testing_percentage + validation_percentage:
        return 'testing'
    return 'training'


def get_set_of_file(
    image_dir: str, file: str, set_folders: dict[str, str], percentages: tuple[int, int]
) -> str:
    """Returns the set of an image, 'class folder/file' or 'set folder/class folder/file'.

    If the images are split already, set_folders is {folder: set}. get_set() draws the sets that
    have no folder of their own.
    """
    set_of_folder = set_folders.get(pathlib.PurePath(file).parts[0], '')
    if set_of_folder in ('validation', 'testing'):
        return set_of_folder
    # The image is in a training folder, or the images are not split.
    testing, validation = percentages
    if 'testing' in set_folders.values():
        testing = 0
    if 'validation' in set_folders.values():
        validation = 0
    return get_set(os.path.join(image_dir, file), testing, validation)


def get_interval(right: float, count: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a share (Wilson 1927, https://doi.org/10.2307/2276774)."""
    z = 1.96
    share = right / count
    widening = 1 + z * z / count
    center = (share + z * z / (2 * count)) / widening
    variance = share * (1 - share) / count + z * z / (4 * count * count)
    half_width = z * math.sqrt(variance) / widening
    return max(0.0, center - half_width), min(1.0, center + half_width)


def print_table(classes: np.ndarray, predictions: np.ndarray, labels: list[str]) -> None:
    """Prints one line per class. The true and the predicted classes of N images are int [N].

    With more than TABLE_CLASSES classes, it prints only those with the most errors, and leaves out
    classes without images.
    """
    shown = present = list(range(len(labels)))
    if len(labels) > TABLE_CLASSES:
        errors = np.bincount(classes[predictions != classes], minlength=len(labels))
        worst = np.argsort(-errors, kind='stable')
        present = worst[np.isin(worst, classes)].tolist()
        shown = present[:WORST_CLASSES]
    width = min(max(len('class'), *(len(labels[index]) for index in shown)), 24)
    print(f'{"class":{width}}  images   right   wrong  precision  most confused with')
    for index in shown:
        numbers = describe_class(classes == index, predictions, index, labels)
        print(f'{labels[index]:{width}}  {numbers}')
    if len(shown) < len(present):
        print(f'These {len(shown)} of {len(labels):,} classes have the most errors.')


def describe_class(
    is_own: np.ndarray, predictions: np.ndarray, index: int, labels: list[str]
) -> str:
    """Returns the numbers of a class in the table; is_own, bool [N], tells which images it has."""
    is_predicted = predictions == index
    right = (is_own & is_predicted).sum()
    wrong = is_own.sum() - right
    precision = f'{"-":>9}'
    if is_predicted.any():
        precision = f'{100 * right / is_predicted.sum():8.1f}%'
    worst = ''
    if wrong:
        others = np.bincount(predictions[is_own & ~is_predicted])
        worst = f'  {labels[others.argmax()]} ({others.max()})'
    return f'{is_own.sum():6}  {right:6}  {wrong:6}  {precision}{worst}'


def report_accuracy(tally: Tally) -> None:
    """Prints the accuracy on images whose folder is a class, as a whole and per class."""
    labels = tally.classes.labels
    true_classes = np.array(tally.true_classes)
    predictions = np.array(tally.predictions)
    if tally.predictions:
        count = len(predictions)
        right = (predictions == true_classes).sum()
        low, high = get_interval(right, count)
        print(
            f'Accuracy on the {count} images whose folder is a class: {100 * right / count:.1f}% '
            f'(95% confidence interval: {100 * low:.1f} to {100 * high:.1f}%)'
        )
        print_table(true_classes, predictions, labels)
    if tally.refused:
        share = 100 * tally.refused / (len(predictions) + tally.refused)
        print(f'Without a label, as {UNSURE} or {UNKNOWN}: {tally.refused} more, {share:.1f}%')
    if not tally.training:
        print('Without the record of the training, its own images count as new ones.')
    elif not is_folder(tally.training.absolute_image_dir):
        folder = escape(tally.training.absolute_image_dir)
        print(f'The folder of the training, {folder}, is gone: its own images count as new ones.')
    elif gone := tally.training.list_gone():
        names = name_some(gone)
        print(f'Folders of the training are gone: {names}. Their images count as new ones.')
    if tally.not_new:
        print(f'In the training or validation set, and not counted: {tally.not_new} more.')
    if tally.other_folders:
        names = name_some(sorted(tally.other_folders))
        print(f'Folders that are not named like a class, and not counted: {names}')


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
        columns = [f'{escape(label)}\t{score:.5f}' for label, score in shown]
        print(escape(path), *columns, sep='\t', flush=True)


def print_json(
    path: str,
    ranking: list[tuple[str, float]],
    answer: Answer,
    folder_label: str | None,
    flags: argparse.Namespace,
) -> None:
    """Prints an image with its labels and scores, all or --top of them, as a JSON object."""
    labels, scores = zip(*ranking[: flags.top], strict=True)
    fields: dict[str, Any] = {'image': path, 'labels': labels, 'scores': scores}
    if answer.familiarity is not None:
        fields['familiarity'] = round(float(answer.familiarity), 7)
    if folder_label is not None:
        fields['folder_label'] = folder_label
    if answer.orientation > 1 and not flags.upright:
        fields['orientation'] = answer.orientation
    print(json.dumps(fields), flush=True)


def choose_label(best: tuple[str, float], answer: Answer, flags: argparse.Namespace) -> str:
    """Returns the label of an image: the best one, or that it is unknown or unsure."""
    label, score = best
    if flags.unknown is not None and answer.familiarity <= flags.unknown / 100:
        return UNKNOWN
    return label if score >= flags.min_score else UNSURE


def report_failure(path: str, flags: argparse.Namespace, is_single: bool) -> None:
    """Prints why an image could not be labeled.

    Raises UserError if it is the only one, unless JSON is printed.
    """
    reason = (
        explain_failure(path)
        or f"'{path}' changed while it was read, or the memory was full. Try again."
    )
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


def is_heatmap(path: str) -> bool:
    """Tells whether a file is a heatmap that save_picture() has written as PNG."""
    try:
        with Image.open(to_bytes(path)) as picture:
            return picture.info.get('Software') == SOFTWARE
    except Exception:  # Pillow has many kinds
        return False


def ensure_outside_images(training: Training | None, flags: argparse.Namespace) -> None:
    """Raises UserError if what is written would be trained on."""
    if training is None:
        return
    image_dir = training.absolute_image_dir
    if flags.heatmap and resolve(flags.heatmap).is_relative_to(resolve(image_dir)):
        raise UserError(
            f"--heatmap: '{flags.heatmap}' is in the --image_dir of the training. Name a file "
            'elsewhere.'
        )
    if not flags.sort_into:
        return
    parents = [os.path.join(image_dir, name) for name in ('', *training.set_folders)]
    target = resolve(flags.sort_into)
    is_read = target in map(resolve, parents)
    # Beside train/ and val/, a folder may become the test set.
    may_be_set = training.set_folders and target.parent == resolve(image_dir)
    if is_read or may_be_set:
        raise UserError(
            f"--sort_into: '{flags.sort_into}' is where the training looks for class folders, and "
            'would train on it. Name another folder.'
        )


def check_heatmap(path: str) -> None:
    """Raises UserError if a heatmap would replace something else."""
    if not exists(path) or is_special(path) or is_folder(path):
        return  # save_picture() refuses what is no file
    if not is_heatmap(path):
        raise UserError(
            f"--heatmap: '{path}' exists, and may be a photograph. Delete it, or name another "
            'file, such as heatmap.png.'
        )
    if not os.stat(to_bytes(path)).st_mode & stat.S_IWUSR:
        raise UserError(
            f"--heatmap: '{path}' is read-only. Make it writable, or name another file."
        )


def check_flags(flags: argparse.Namespace, is_single: bool) -> None:
    """Raises UserError if the flags do not fit together, or would overwrite what is read."""
    if flags.heatmap and not is_single:
        raise UserError('--heatmap: name one image.')
    for flag, path in (('--heatmap', flags.heatmap), ('--sort_into', flags.sort_into)):
        if path and '://' in path:
            raise UserError(f"{flag}: '{path}' is not on this computer. Name a path that is.")
    if flags.heatmap and not is_folder(os.path.dirname(flags.heatmap) or '.'):
        raise UserError(f"--heatmap: there is no folder for '{flags.heatmap}'. Make it first.")
    for path in (*flags.images, flags.graph, flags.labels, get_record_path(flags.graph)):
        if flags.heatmap and is_same_path(flags.heatmap, path):
            raise UserError(f"--heatmap: '{path}' is read. Name another file.")
        if flags.sort_into and is_same_path(flags.sort_into, path):
            raise UserError(f"--sort_into: '{path}' is read. Name another folder.")
    if '-' in flags.images and sys.stdin is None:
        raise UserError('-: standard input is closed. Name images or a folder.')


def draw(
    graph: Graph, path: str, answer: Answer, labels: list[str], flags: argparse.Namespace
) -> None:
    """Writes the heatmap of an image for its best label."""
    contents, pixels = load_pixels(path, flags.upright)
    index = int(answer.scores.argmax())
    name = name_in_picture(labels[index], index + 1)
    title = f'{name} {answer.scores[index]:.2f}'
    if answer.familiarity is not None:
        title += f', familiarity {answer.familiarity:.2f}'
    heatmap = compute_heatmap(graph, contents, index)
    save_picture(draw_heatmap(pixels, heatmap, title), flags.heatmap)
    if name != labels[index]:
        print(f"{flags.heatmap}: {name} is '{labels[index]}'.", file=sys.stderr)


def report_answer(
    path: str,
    answer: Answer,
    classes: Classes,
    flags: argparse.Namespace,
    is_single: bool,
) -> str:
    """Prints what the graph says of an image; returns the image's label."""
    ranking = rank(answer.scores, classes.labels, flags)
    label = choose_label(ranking[0], answer, flags)
    if flags.json:
        index = classes.find(path)
        folder_label = None if index is None else classes.labels[index]
        print_json(path, ranking, answer, folder_label, flags)
    else:
        print_ranking(path, [(label, ranking[0][1]), *ranking[1:]], flags, is_single)
    return label


def label_images(flags: argparse.Namespace) -> None:
    """Labels all images that can be labeled; then raises UserError if some could not be."""
    first = flags.images[0]
    is_single = len(flags.images) == 1 and first != '-' and not is_folder(first)
    check_flags(flags, is_single)
    labels = load_labels(flags.labels)
    graph = load_graph(flags.graph)
    check_labels(labels, graph, flags)
    classes = create_classes(labels, graph.training, flags)
    check_refusal_flags(classes, graph, flags)
    ensure_outside_images(graph.training, flags)
    if flags.heatmap:
        check_heatmap(flags.heatmap)
    tally = Tally(classes, graph.training)
    if is_single:
        answers = score_image(graph, first, flags.upright)
    else:
        answers = score_images(graph, expand(flags.images, flags.sort_into), flags.upright)
    for path, answer in tqdm(answers, unit='image', disable=is_single or not has_bar()):
        tally.images += 1
        if answer is None:
            tally.failed += 1
            report_failure(path, flags, is_single)
            continue
        label = report_answer(path, answer, classes, flags, is_single)
        tally.add(path, answer, label)
        if flags.sort_into:
            folder = classes.get_folder(answer, label)
            if try_to_place(path, folder, flags.sort_into):
                tally.placed[folder] += 1
            else:
                tally.failed += 1
    report_tally(tally, flags)
    if flags.heatmap:  # of the only image
        draw(graph, path, answer, labels, flags)


def report_unfamiliar(tally: Tally) -> None:
    """Warns of images that are less familiar than nearly all images of the training."""
    if tally.unfamiliar and tally.images == 1:
        print(
            'WARNING: this image is unlike nearly all images of the training, so the scores mean '
            'little.'
        )
    elif tally.unfamiliar:
        advice = f" --unknown 5 labels them '{UNKNOWN}'."
        if UNKNOWN in tally.classes.labels:  # --unknown is refused
            advice = ''
        print(
            f'WARNING: {tally.unfamiliar} of {tally.images} images are unlike nearly all images of '
            f'the training, so their scores mean little.{advice}'
        )


def report_tally(tally: Tally, flags: argparse.Namespace) -> None:
    """Prints a summary on standard error; raises UserError if some images have failed."""
    if not tally.images:
        raise UserError(
            f'There is no image in {", ".join(flags.images)}. Name a folder with '
            f'{" ".join(IMAGE_EXTENSIONS)}'
        )
    training = tally.training
    if training and training.is_upright != flags.upright:
        what = 'Add --upright' if training.is_upright else 'Leave out --upright'
        print(f'WARNING: {what}: that is how the graph was trained.', file=sys.stderr)
    elif tally.sideways and not flags.upright:
        print(
            'WARNING: images that the camera stored sideways, and that are labeled as stored: '
            f'{tally.sideways}. To turn them, train with --upright, and add it here.',
            file=sys.stderr,
        )
    with contextlib.redirect_stdout(sys.stderr):  # the lines on standard output are data
        report_unfamiliar(tally)
        if tally.predictions or tally.refused or tally.not_new:
            report_accuracy(tally)
        elif len(tally.other_folders) > 1 and not flags.sort_into:
            names = name_some(tally.classes.labels)
            print(f'There is no accuracy, as no folder has the name of a class: {names}')
        if tally.placed:
            counts = [f'{count} {folder}' for folder, count in sorted(tally.placed.items())]
            print(f'Sorted into {escape(flags.sort_into)}: {name_some(counts)}')
    if tally.failed:
        what = 'labeled and sorted' if flags.sort_into else 'labeled'
        raise UserError(f'{tally.failed} of {tally.images} images could not be {what}.')


def has_bar() -> bool:
    """Tells whether to show a progress bar: on a terminal, while the labels go elsewhere."""
    has_terminal = bool(sys.stderr and sys.stderr.isatty())
    has_labels = bool(sys.stdout and sys.stdout.isatty())
    return has_terminal and not has_labels


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
    except (MemoryError, tf.errors.ResourceExhaustedError) as error:
        reason = describe(error).splitlines()[0]
        sys.exit(
            f'ERROR: the memory of the GPU or computer is full ({reason}). Close other programs, '
            'or set CUDA_VISIBLE_DEVICES= to leave the GPU out.'
        )
    except (tf.errors.OpError, LookupError, TypeError, ValueError) as error:
        reason = describe(error).splitlines()[0]
        sys.exit(
            f"ERROR: '{parsed_flags.graph}' cannot be run: {reason}. Name the --output_graph of "
            'the training.'
        )
