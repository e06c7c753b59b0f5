#!/usr/bin/env python3
"""Train an image classifier on your own photographs, and write a SavedModel.

    python3 retrain_serving.py --image_dir=data/ --model_dir=inception/ \\
        --bottleneck_dir=bottlenecks/ --output_graph=trained_model/unoptimized_model.pb \\
        --output_labels=trained_model/labels.txt --saved_model_dir=trained_model_serving/1

This is tf_retrain.py, function by function, with one more flag, and one more section: SavedModel.
"The original" is retrain.py of TensorFlow's image_retraining example.
"""

import argparse
import atexit
import concurrent.futures
import contextlib
import dataclasses
import datetime
import difflib
import errno
import functools
import gc
import gzip
import hashlib
import http.client
import importlib.metadata
import io
import itertools
import json
import math
import os
import pathlib
import platform
import posixpath
import re
import shlex
import signal
import socket
import stat
import struct
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
import urllib.parse
import urllib.request
import uuid
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple

# Flags

MOBILENET_WIDTHS = ('1.0', '0.75', '0.50', '0.25')
MOBILENET_SIDES = (224, 192, 160, 128)  # pixels
MOBILENET_SIZES = [f'{width}_{side}' for width in MOBILENET_WIDTHS for side in MOBILENET_SIDES]
# The networks of Keras Applications, by the side in pixels of the images that they were made for.
KERAS_SIDES = {
    224: 'ConvNeXtBase ConvNeXtLarge ConvNeXtSmall ConvNeXtTiny ConvNeXtXLarge DenseNet121 '
    'DenseNet169 DenseNet201 EfficientNetB0 EfficientNetV2B0 MobileNet MobileNetV2 '
    'MobileNetV3Large MobileNetV3Small NASNetMobile ResNet50 ResNet50V2 ResNet101 ResNet101V2 '
    'ResNet152 ResNet152V2 VGG16 VGG19',
    240: 'EfficientNetB1 EfficientNetV2B1',
    260: 'EfficientNetB2 EfficientNetV2B2',
    299: 'InceptionResNetV2 InceptionV3 Xception',
    300: 'EfficientNetB3 EfficientNetV2B3',
    331: 'NASNetLarge',
    380: 'EfficientNetB4',
    384: 'EfficientNetV2S',
    456: 'EfficientNetB5',
    480: 'EfficientNetV2L EfficientNetV2M',
    528: 'EfficientNetB6',
    600: 'EfficientNetB7',
}
KERAS_NETWORKS = {name: side for side, names in KERAS_SIDES.items() for name in names.split()}
ARCHITECTURES = [
    'inception_v3',
    *(f'mobilenet_{size}' for size in MOBILENET_SIZES),
    *KERAS_NETWORKS,
]
DEFAULT = ' (default: %(default)s)'


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


PERCENTAGE = checked(int, lambda value: 0 <= value <= 100, 'a whole number from 0 to 100')
COUNT = checked(int, lambda value: value >= 0, 'a whole number, 0 or more')
COUNT_FROM_1 = checked(int, lambda value: value >= 1, 'a whole number, 1 or more')
MAX_BATCH = 100_000  # more bottlenecks would fill the memory
BATCH = checked(
    int, lambda value: 1 <= value <= MAX_BATCH, f'a whole number from 1 to {MAX_BATCH:,}'
)
BATCH_OR_ALL = checked(
    int,
    lambda value: 1 <= value <= MAX_BATCH or value == -1,
    f'a whole number from 1 to {MAX_BATCH:,}, or -1 for all',
)
# Far smaller numbers are 0 in float32, and far larger ones are not finite.
RATE = checked(float, lambda value: 1e-37 < value < 1e38, 'a small number above 0, such as 0.05')
# Raises UnicodeEncodeError, a ValueError, for names that are not UTF-8.
PATH = checked(lambda text: to_path(text).encode().decode(), bool, 'a name in UTF-8')
ADDRESS = checked(str, re.compile(r'grpc://.+:\d{1,5}').fullmatch, 'grpc://HOST:PORT')
# The pattern is that of tensorflow/core/framework/node_def_util.cc.
NODE_PATTERN = re.compile(r'[A-Za-z0-9.][A-Za-z0-9_./-]*')
NODE_NAME = checked(str, NODE_PATTERN.fullmatch, 'of letters, digits, _ . - /')
BOOLEAN = checked(
    lambda text: {'true': True, 'false': False}.get(text.lower()),
    lambda value: True,
    'True or False',
)
# Tutorials write `--flip_left_right True`, and the original ignored the second word.
SWITCH: dict[str, Any] = {
    'nargs': '?',
    'metavar': 'True',
    'type': BOOLEAN,
    'const': True,
    'default': False,
}


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
        type=PATH,
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
        **SWITCH,
        help='stop at an image that cannot be read instead of leaving it out',
    )
    group.add_argument(
        '--upright',
        **SWITCH,
        help='turn images as their EXIF orientation says, as viewers do',
    )


def add_bottleneck_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('bottlenecks')
    group.add_argument(
        '--bottleneck_dir',
        metavar='DIR',
        type=PATH,
        default='/tmp/bottleneck',
        help='cache of the bottlenecks' + DEFAULT,
    )
    group.add_argument(
        '--data_service',
        metavar='grpc://HOST:PORT',
        type=ADDRESS,
        help='tf.data service that shares the work',
    )


def add_search_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('what to look for in the data')
    group.add_argument(
        '--print_duplicates',
        **SWITCH,
        help='name all near copies among the images, not only ten pairs',
    )
    group.add_argument(
        '--find_suspects',
        metavar='N',
        type=COUNT,
        default=0,
        help='name the N images whose label is most doubtful' + DEFAULT,
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('model')
    group.add_argument(
        '--model_dir',
        metavar='DIR',
        type=PATH,
        default='/tmp/imagenet',
        help='folder of the pretrained model' + DEFAULT,
    )
    group.add_argument(
        '--precision',
        choices=['float32', 'bfloat16'],
        default='float32',
        help='format of the numbers that bottlenecks are computed with' + DEFAULT,
    )
    network = group.add_mutually_exclusive_group()
    network.add_argument(
        '--architecture',
        metavar='NAME',
        type=architecture,
        default='inception_v3',
        help='inception_v3; mobilenet_<width>_<side> with a width of 1.0, 0.75, 0.50 or 0.25 and '
        'a side of 224, 192, 160 or 128 pixels; or a network of Keras, such as ConvNeXtTiny, '
        'EfficientNetV2B0, MobileNetV3Large or ResNet50V2 (the list is in inception/README.md)'
        + DEFAULT,
    )
    network.add_argument(
        '--tfhub_module',
        metavar='HANDLE',
        type=PATH,
        help='URL or folder of an image feature vector of your own, Kaggle or TensorFlow Hub',
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
        type=BATCH,
        default=100,
        help='images per training step' + DEFAULT,
    )
    group.add_argument(
        '--random_seed',
        metavar='N',
        type=COUNT,
        help='with the same cache, runs with the same number give the same result',
    )


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('evaluation')
    group.add_argument(
        '--validation_batch_size',
        metavar='N',
        type=BATCH_OR_ALL,
        default=100,
        help='images per validation; -1 uses all' + DEFAULT,
    )
    group.add_argument(
        '--test_batch_size',
        metavar='N',
        type=BATCH_OR_ALL,
        default=-1,
        help='images in the final test; -1 uses all' + DEFAULT,
    )
    group.add_argument(
        '--eval_step_interval',
        metavar='N',
        type=COUNT_FROM_1,
        default=10,
        help='steps between evaluations' + DEFAULT,
    )
    group.add_argument(
        '--print_misclassified_test_images',
        **SWITCH,
        help='list the misclassified test images',
    )


def add_distortion_flags(parser: argparse.ArgumentParser) -> None:
    title = 'distortions of the training images (training takes far longer)'
    group = parser.add_argument_group(title)
    group.add_argument(
        '--flip_left_right',
        **SWITCH,
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
        type=PATH,
        default='/tmp/output_graph.pb',
        help='the trained graph; the record of the run is FILE.json' + DEFAULT,
    )
    group.add_argument(
        '--optimized_graph',
        metavar='FILE',
        type=PATH,
        help='also write the trained graph for other runtimes',
    )
    group.add_argument(
        '--output_labels',
        metavar='FILE',
        type=PATH,
        default='/tmp/output_labels.txt',
        help='the labels, one per line' + DEFAULT,
    )
    group.add_argument(
        '--summaries_dir',
        metavar='DIR',
        type=PATH,
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
    description, command = (__doc__ or '\n\n').split('\n\n')[:2]  # there is none with -OO
    parser = argparse.ArgumentParser(
        usage='python3 %(prog)s --image_dir=DIR [flags]',
        description=description,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=36
        ),
        epilog=f'the usual command:\n{command}',
    )
    add_data_flags(parser)
    add_bottleneck_flags(parser)
    add_search_flags(parser)
    add_model_flags(parser)
    add_training_flags(parser)
    add_evaluation_flags(parser)
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
    if flags.find_suspects and not flags.how_many_training_steps:
        parser.error('--find_suspects needs --how_many_training_steps of 1 or more')
    if flags.upright and flags.data_service:
        parser.error('--upright and --data_service: the workers of a service cannot turn images')
    return flags


def create_serving_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line, with the flag of the SavedModel."""
    parser = create_parser()
    help_text = 'new folder for the SavedModel, named by its version (default: %(default)s)'
    group = parser.add_argument_group('serving')
    group.add_argument(
        '--saved_model_dir',
        metavar='DIR',
        type=PATH,
        default='/tmp/saved_models/1/',
        help=help_text,
    )
    return parser


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


def prepare_keras(flags: argparse.Namespace) -> None:
    """Tells Keras where to keep the weights of its networks.

    This comes before the import of TensorFlow: it imports Keras, which reads KERAS_HOME only then,
    and writes a keras.json there. A notebook may have imported it already.
    """
    if flags.architecture in KERAS_NETWORKS and 'keras' not in sys.modules:
        os.environ.setdefault('KERAS_HOME', flags.model_dir)


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
    parsed_flags = parse_flags(create_serving_parser())
    prepare_keras(parsed_flags)

# NumPy's products are small here: the threads of OpenBLAS would cost more time than they save.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
if platform.machine() in ('x86_64', 'AMD64'):
    # By default, TensorFlow uses oneDNN only where the processor has AVX-512 VNNI or the like.
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
try:
    ensure_avx()
    import absl.logging
    import numpy as np
    import orjson
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
# Photoshop's texts are longer than 1 MiB. Pillow would refuse the whole header for that.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
warnings.filterwarnings('ignore', module='PIL')  # a file that cannot be decoded is reported anyway

HAS_GPU = bool(tf.config.list_physical_devices('GPU'))


class UserError(Exception):
    """A failure that the user can fix. Its text names the file or flag, and says what to do."""


class OptionalOutput:
    """A text stream that ignores write errors: a training must not fail because of its messages."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        with contextlib.suppress(AttributeError):  # the streams of notebooks have no settings
            stream.reconfigure(errors='replace', line_buffering=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes a text as print() does."""
        try:
            return self.stream.write(text)
        except OSError:
            # Python flushes the stream at exit: that must not fail on what is still buffered.
            with contextlib.suppress(AttributeError, OSError):  # not all streams have a number
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            return len(text)


KEPT = 'What was computed so far is kept: fix this, and run the same command again.'
MEMORY_FULL = 'the memory is full. Close other programs, or lower the batch sizes'
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What a first signal does, and its handler. A second one ends the program at once.
#   before the training: ends the run with exit code 130                    stop_run
#   during the training: ends it early; the test and the outputs follow     stop_run, and train()
#   after the training: only prints a message; the outputs are written      finish_run
stop_requested = threading.Event()  # by a first Ctrl-C or SIGTERM before or in the training


def on_stop_signals(handler: Callable | signal.Handlers) -> None:
    """Sets what Ctrl-C and SIGTERM do. Only the main thread of a program can do that."""
    with contextlib.suppress(ValueError):
        for number in STOP_SIGNALS:
            signal.signal(number, handler)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM stop the run inside; then restores the handlers of a notebook."""
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    hook = sys.unraisablehook

    def ignore_stop(unraisable: Any) -> None:
        # Python drops what is raised in a __del__(). stop_requested ends the next loop. After a
        # stop, objects that were not yet complete may fail there, too.
        is_stop = isinstance(unraisable.exc_value, KeyboardInterrupt)
        if not is_stop and signal.getsignal(signal.SIGINT) != QUIT:
            hook(unraisable)

    sys.unraisablehook = ignore_stop
    on_stop_signals(stop_run)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in zip(STOP_SIGNALS, handlers, strict=True):
            # In another thread, nothing was set. A handler of another language is None.
            with contextlib.suppress(ValueError, TypeError):
                signal.signal(number, handler)


def stop_run(*signal_and_frame: object) -> None:
    """Stops the run at a first Ctrl-C or SIGTERM. A second one ends the program at once."""
    on_stop_signals(QUIT)
    stop_requested.set()
    raise KeyboardInterrupt


def until_stopped(items: Iterable) -> Iterator:
    """Yields items until the run is stopped: then raises KeyboardInterrupt.

    Loops need it, because TensorFlow drops a KeyboardInterrupt that is raised inside its ops.
    """
    for item in items:
        if stop_requested.is_set():
            raise KeyboardInterrupt
        yield item
    if stop_requested.is_set():
        raise KeyboardInterrupt


def start_thread(function: Callable, *arguments: Any, **options: Any) -> concurrent.futures.Future:
    """Calls a function in a thread, for which the end of the program does not wait.

    It would wait for the threads of concurrent.futures.ThreadPoolExecutor, and those of
    multiprocessing.pool need a semaphore in /dev/shm, which may be full. Raises UserError if the
    system allows no more threads.
    """
    future: concurrent.futures.Future = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)

    try:
        threading.Thread(target=work, daemon=True).start()
    except RuntimeError as error:
        raise UserError(f'{error}: too many programs run. Close some, and run the command again.')
    return future


def wait_for(future: concurrent.futures.Future, seconds: float) -> Any:
    """Returns the result of a thread; raises concurrent.futures.TimeoutError after `seconds`."""
    end = time.monotonic() + seconds
    while not future.done() and time.monotonic() < end:
        concurrent.futures.wait([future], 1)  # in parts: Python may hear a stop only after the wait
    return future.result(0)


def protect_outputs() -> None:
    """Makes a first Ctrl-C no longer stop the run, as what was learned would be lost.

    Does nothing unless run() has set stop_run(): a program that calls main() itself keeps its own
    handlers.
    """
    if signal.getsignal(signal.SIGINT) is stop_run:
        on_stop_signals(finish_run)


def go_on_after_stop() -> None:
    """Lets the test go on after a first Ctrl-C in the training."""
    stop_requested.clear()  # or the loops of the test would stop, too
    print('\nCtrl-C: what was learned so far will be tested and written. Ctrl-C again quits.')


def finish_run(*signal_and_frame: object) -> None:
    """Only prints a message at a first Ctrl-C after the training: the outputs are written."""
    on_stop_signals(QUIT)
    with contextlib.suppress(RuntimeError):  # the signal came in the middle of another print()
        print('\nCtrl-C: what was learned is being written. Ctrl-C again quits.')


def describe(error: BaseException) -> str:
    """Returns the message of an error, without the stack, op and node that TensorFlow adds."""
    message = getattr(error, 'message', '') or str(error)
    end = r'\n\s*\[\[.*|{{(function_)?node .*?}} *| \[Op:\w+\].*'
    message = re.sub(end, '', message, flags=re.DOTALL)
    start = r'\AGraph execution.*(unavailable>|\nNode: [^\n]*)\s*|\Ain user code:.*\n\s*\w+: '
    message = re.sub(start, '', message, flags=re.DOTALL)
    return message.lstrip().rstrip(' .\n') or type(error).__name__


def run(job: Callable, flags: argparse.Namespace) -> None:
    """Calls job(flags). If that fails, the program ends with a line and an exit code.

    It also works in a notebook or another program, in any thread.
    """
    problem: str | None
    if not isinstance(sys.stdout, OptionalOutput):  # an earlier run of the program may have set it
        sys.stdout = OptionalOutput(sys.stdout or open(os.devnull, 'w'))  # type: ignore[assignment]
        sys.stderr = OptionalOutput(sys.stderr or open(os.devnull, 'w'))  # type: ignore[assignment]
    try:
        with stoppable():
            job(flags)
        return
    except UserError as error:
        problem = str(error)
    except MemoryError:
        problem = f'{MEMORY_FULL}. {KEPT}'
    except (tf.errors.OpError, OSError, UnicodeError) as error:
        problem = f'{describe(error)}. {KEPT}'
    except KeyboardInterrupt:
        problem = None
    except Exception:
        # A stop may break other calls: tqdm then releases a lock that it has not taken.
        if not stop_requested.is_set():
            raise
    if stop_requested.is_set():  # whatever it says, the stop made it fail
        problem = None
    stop_requested.clear()
    # Not in the `except` clauses: there, the error still keeps the threads of the job alive, and
    # Python would abort if it ended while they work.
    if problem is None:
        kept = 'All bottlenecks computed so far are kept: the same command goes on.'
        print(f'\nStopped. {kept}', file=sys.stderr)
        sys.exit(130)
    # Not by sys.exit(), whose text only the main thread shows.
    print('ERROR:', problem.replace('\n', ' '), file=sys.stderr)
    sys.exit(1)


# Files

MOUNTS = '/proc/self/mountinfo'
REFUSED_BY_FAT = '"*:<>?\\|'


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


@contextlib.contextmanager
def open_file(path: str) -> Iterator[IO[bytes] | gfile.GFile]:
    """Opens a file to read; raises UserError if it is not a plain one, or cannot be read.

    On gs:// and its like, a failure is an OpError.
    """
    if is_special(path):
        raise UserError(f"'{path}' is not a plain file. Delete it, or name another file.")
    try:
        if '://' in path:
            file = gfile.GFile(path, 'rb')
        else:
            file = open(to_bytes(path), 'rb')  # gfile takes three times as long for 90 MB
        with file:
            yield file
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}. Check this file.") from error


def read_file(path: str) -> bytes:
    """Returns the contents of a file, as open_file() opens it."""
    with open_file(path) as file:
        return file.read()


def follow_link(path: str) -> str:
    """Returns the target of a symbolic link; any other path unchanged."""
    if os.path.islink(to_bytes(path)):
        return os.path.realpath(to_bytes(path)).decode(errors='surrogateescape')
    return path


def create_hidden_name() -> str:
    """Returns a name that no other file has, for a file that is renamed once it is whole."""
    return f'.{uuid.uuid4().hex[:8]}.tmp'


def keep_rights(path: str, temporary: str) -> None:
    """Gives a temporary file the group and the rights of the file at `path`, which it will replace.

    It does not do so if another user owns that file, and may have made it private: then this user
    could not read the new one.
    """
    with contextlib.suppress(OSError):  # there is no file yet, or it is on gs:// and the like
        status = os.stat(to_bytes(path))
        if status.st_uid == os.stat(to_bytes(temporary)).st_uid:
            mode = stat.S_IMODE(status.st_mode)
            if sys.platform != 'win32' and mode & stat.S_IRWXG:
                try:
                    os.chown(to_bytes(temporary), -1, status.st_gid)
                except OSError:  # then the group gets the rights of all others
                    mode = mode & ~stat.S_IRWXG | (mode & stat.S_IRWXO) << 3
            os.chmod(to_bytes(temporary), mode)


def write_whole(path: str, contents: bytes) -> None:
    """Writes a file so that `path` holds all of `contents` or is left as it was.

    That holds whenever the program is stopped. A symbolic link stays a link: its target is written.
    """
    path = follow_link(path)
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, create_hidden_name())
    gfile.makedirs(folder or '.')
    try:
        with gfile.GFile(temporary, 'wb') as file:
            file.write(contents)
        keep_rights(path, temporary)
        gfile.rename(temporary, path, overwrite=True)
    except BaseException:
        with contextlib.suppress(tf.errors.OpError):
            gfile.remove(temporary)
        if gfile.isdir(path):  # TensorFlow's message has the temporary name
            raise UserError(f"'{path}' is a folder. Delete it.")
        raise


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


def ensure_writable_dir(path: str, flag: str) -> None:
    """Creates a folder, and raises UserError if no file can be written there."""
    probe = os.path.join(path, create_hidden_name())
    try:
        write_whole(probe, b'probe')
        gfile.remove(probe)
    except tf.errors.OpError as error:
        raise UserError(
            f"{flag}: nothing can be written in '{path or '.'}' ({error.message}). "
            'Name another folder.'
        )


def is_mount_point(path: bytes) -> bool:
    """Tells whether a folder or file is mounted by itself, as by Docker's -v FILE:FILE.

    os.path.ismount() misses files, and folders that are mounted from the same drive. Only Linux has
    such mounts, and lists them (https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html).
    """
    try:
        mounts = pathlib.Path(MOUNTS).read_bytes().splitlines()
    except OSError:
        return os.path.ismount(path)
    listed = re.sub(rb'[ \t\n\\]', lambda match: b'\\%03o' % ord(match[0]), os.path.realpath(path))
    return any(mount.split()[4] == listed for mount in mounts)


def ensure_utf8(path: str, flag: str) -> None:
    """Raises UserError if a link leads to a name that TensorFlow cannot write."""
    try:
        follow_link(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{flag}: '{path}' is a link to a path that is not UTF-8. Name another file."
        )


def ensure_replaceable(path: str, flag: str) -> None:
    """Raises UserError if a file could not be written, or replaced, at the end of the run.

    That a folder is writable is not enough: in /tmp, nobody can replace the files of others. So
    this tries to rename an empty folder to the file. That always fails, and the error tells why.
    """
    target = os.path.realpath(to_bytes(path))
    if is_special(path):
        raise UserError(f"{flag}: '{path}' is not a plain file. Name another one.")
    try:
        status = os.lstat(target)
    except FileNotFoundError:
        ensure_name_is_allowed(path, flag)
        return
    except OSError as error:  # the name is too long
        raise UserError(f"{flag}: '{path}' cannot be written ({error.strerror}). Name another one.")
    is_own = sys.platform == 'win32' or status.st_uid == os.geteuid()
    is_writable = status.st_mode & stat.S_IWUSR if is_own else os.access(target, os.W_OK)
    if not is_writable:
        raise UserError(f"{flag}: '{path}' is read-only. Make it writable, or name another file.")
    if is_mount_point(target):  # the error below does not tell
        raise UserError(
            f"{flag}: '{path}' is a mount point, and cannot be replaced. Mount its folder instead."
        )
    if os.name != 'posix':  # on Windows, the error below does not tell why the rename failed
        return
    probe = os.path.join(os.path.dirname(target), create_hidden_name().encode())
    try:
        os.mkdir(probe)
        os.rename(probe, target)
    except NotADirectoryError:
        pass  # the only obstacle: a folder cannot replace a file, but another file could
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{flag}: '{path}' cannot be replaced ({reason}). Name another file.")
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(probe)


def ensure_name_is_allowed(path: str, flag: str) -> None:
    """Raises UserError if the drive allows no such name: FAT and NTFS allow none with a colon.

    This tries a hidden name with the same characters of those that they refuse.
    """
    target = os.path.realpath(to_bytes(path))
    odd = set(REFUSED_BY_FAT).intersection(os.path.basename(target).decode())
    if not odd or '://' in path:
        return
    name = f'{create_hidden_name()}{"".join(odd)}'
    probe = os.path.join(os.path.dirname(target), name.encode())
    try:
        os.mkdir(probe)
        os.rmdir(probe)
    except OSError as error:
        raise UserError(
            f"{flag}: '{path}' cannot be written ({error.strerror}). Name another one, of letters "
            'and digits.'
        )


def make_absolute(path: str) -> str:
    """Returns an absolute path, in which links are not resolved."""
    return os.path.abspath(to_bytes(path)).decode(errors='surrogateescape')


def is_inside(path: str, folder: str) -> bool:
    """Tells whether a path lies in a folder, or in a folder inside it."""
    real_path, real_folder = (os.path.realpath(to_bytes(name)) for name in (path, folder))
    return real_path.startswith(os.path.join(real_folder, b''))


def is_same_or_inside(path: str, folder: str) -> bool:
    """Tells whether a path is a folder itself, or lies in it, at any depth."""
    is_same = os.path.realpath(to_bytes(path)) == os.path.realpath(to_bytes(folder))
    return is_same or is_inside(path, folder)


def list_dir(path: str) -> list[str]:
    """Returns the sorted names in a folder, or [] if there is no such folder.

    Raises UserError if the drive fails or a name is not UTF-8, and PermissionDeniedError if the
    folder cannot be read.
    """
    if '://' in path:
        names = gfile.listdir(path) if gfile.isdir(path) else []
        return sorted(name.rstrip('/') for name in names)
    try:
        # gfile.listdir() would take an error of the drive for the end of the folder.
        return sorted(name.decode() for name in os.listdir(to_bytes(path)))
    except PermissionError as error:
        raise tf.errors.PermissionDeniedError(None, None, f'{path}; {error.strerror}')
    except OSError as error:
        if error.errno in MISSING:
            return []
        raise UserError(f"'{path}' cannot be listed: {error.strerror}. Check the drive.")
    except UnicodeDecodeError as error:
        name = error.object
        raise UserError(f"'{path}' has a file whose name is not UTF-8, {name!r}. Rename it.")


def escape(text: str) -> str:
    """Returns a text in one line: characters such as a tab or a newline become \\t or \\n."""
    return re.sub(r'[\x00-\x1f\x7f]', lambda match: repr(match[0])[1:-1], text)


def name_some(names: list[str]) -> str:
    """Returns the first ten of some names, and how many more there are, for a message."""
    more = f' and {len(names) - 10} more' if len(names) > 10 else ''
    return escape(', '.join(names[:10])) + more


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Turns a failure inside into a warning: an extra must not cost the user the training."""
    try:
        yield
    except Exception as error:
        if stop_requested.is_set():
            raise  # a stop made it fail: the run ends
        print(f'WARNING: {name} left out ({type(error).__name__}: {describe(error)})')


# Images

# Extensions of the files that are taken for images. Their content decides how they are decoded.
IMAGE_EXTENSIONS = tuple(
    '.jpg .jpeg .jpe .jfif .png .gif .webp .avif .bmp .tif .tiff .jp2 .heic .heif'.split()
)
# Formats of cameras and editors that are not read.
UNREAD_EXTENSIONS = tuple(
    '.cr2 .cr3 .nef .arw .dng .orf .raf .rw2 .pef .srw .mov .mp4 .psd .jxl .eps .svg .pdf'.split()
)
SETS = ('training', 'validation', 'testing')
# Folders of images that are split already, by their names in lower case, and their sets.
SET_FOLDERS = {
    'train': 'training',
    'training': 'training',
    'val': 'validation',
    'valid': 'validation',
    'validation': 'validation',
    'test': 'testing',
    'testing': 'testing',
}
# Folders that systems make beside photographs, for thumbnails and deleted files, in lower case.
SYSTEM_FOLDERS = ('@eadir', '#recycle', '$recycle.bin', '__macosx')
UNSURE = 'unsure'  # what tf_test.py prints in place of a label below --min_score
UNKNOWN = 'unknown'  # what tf_test.py prints in place of a label at or below --unknown
FEW_IMAGES = 20  # per class: with fewer, the original warns
MAX_NUM_IMAGES_PER_CLASS = 2**27 - 1  # the hash of a file name is taken modulo this plus one


@dataclasses.dataclass(frozen=True)
class Images:
    """The images: a row each, sorted by class and file. All other arrays share these rows."""

    folder: str  # --image_dir, as to_path() returns it: get_set() hashes it
    labels: list[str]  # of the classes
    files: np.ndarray  # 'class folder/file' of each image
    classes: np.ndarray  # indices into labels
    sets: np.ndarray  # one of SETS for each image
    # {folder: its set} if the images are split already: then files are 'folder/class folder/file'
    set_folders: dict[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def paths(self) -> list[str]:
        return [os.path.join(self.folder, file) for file in self.files]

    @functools.cached_property
    def folders(self) -> list[str]:
        """The name of the class folder of each class."""
        first = np.searchsorted(self.classes, np.arange(len(self.labels)))
        return [os.path.basename(os.path.dirname(file)) for file in self.files[first]]

    @functools.cached_property
    def stems(self) -> np.ndarray:
        return np.array([get_stem(file) for file in self.files], object)

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
        nonempty = np.flatnonzero(counts)
        classes = nonempty[rng.integers(nonempty.size, size=how_many)]
        # As rows are sorted by class, those of class c are rows[first[c]], rows[first[c] + 1], ...
        first = counts.cumsum() - counts
        return rows[first[classes] + rng.integers(counts[classes])]


def create_rng(seed: int | None, use: str) -> np.random.Generator:
    """Returns a generator for one use, independent of those for other uses."""
    key = zlib.crc32(use.encode())
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(key,)))


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


def is_image(name: str) -> bool:
    """Tells whether a file is taken for an image: by its extension, if it is not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith('.')


def is_hidden(name: str) -> bool:
    """Tells whether a file or folder is not the user's own: it is hidden, or made by the system."""
    return name.startswith('.') or name.lower() in SYSTEM_FOLDERS


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


def count_images(path: str) -> int:
    """Returns how many images are in a folder and below it.

    Hidden folders and links to folders are skipped.
    """
    if '://' in path:
        count = 0
        for parent, _, files in gfile.walk(path):
            folders = parent.removeprefix(path).split('/')
            if not any(map(is_hidden, folders)):
                count += sum(map(is_image, files))
        return count
    if os.path.islink(to_bytes(path)):
        return 0
    count = 0
    for _, folders, files in os.walk(to_bytes(path)):
        folders[:] = [name for name in folders if not is_hidden(os.fsdecode(name))]
        count += sum(is_image(name.decode(errors='surrogateescape')) for name in files)
    return count


def list_class_folder(path: str) -> list[str]:
    """Returns the images in a class folder, and prints which other names are passed over."""
    names = list_dir(path)
    images = [name for name in names if is_image(name)]
    others = [name for name in names if not is_image(name)]
    if others:
        report_passed_over(path, len(images), others)
    if not images:
        problem = 'has no images' if exists(path) else 'leads nowhere'
        print(f'WARNING: {escape(path)} {problem}. It is not used as a class.')
    return images


def report_passed_over(path: str, image_count: int, others: list[str]) -> None:
    """Names the other files and folders in a class folder, and warns of photographs among them."""
    folders = [
        name for name in others if not is_hidden(name) and gfile.isdir(os.path.join(path, name))
    ]
    below = {name: count_images(os.path.join(path, name)) for name in folders}
    named = [
        f'{name} ({below[name]} images below it)' if below.get(name) else name for name in others
    ]
    print(f'{escape(path)}: {image_count} images; passed over: {name_some(named)}')
    if sum(below.values()):
        print(
            f'WARNING: {escape(path)} has {sum(below.values())} images in folders inside it, which '
            'are not used. Move those that belong to this class into the class folder itself.'
        )
    extensions = [os.path.splitext(name)[1].lower() for name in others]
    unread = Counter(extension for extension in extensions if extension in UNREAD_EXTENSIONS)
    if unread:
        kinds = ', '.join(f'{count} {extension}' for extension, count in sorted(unread.items()))
        print(
            f'WARNING: {escape(path)} has photographs of kinds that are not read: {kinds}. Save '
            'them as JPEG.'
        )


def list_class_folders(image_dir: str) -> dict[str, list[str]]:
    """Returns {class folder: its images}, both sorted.

    Raises UserError for a folder on a drive that fails: its class would be missing from the graph.
    """
    folders = {}
    loose_images = 0
    for name in list_dir(image_dir):
        path = os.path.join(image_dir, name)
        if is_hidden(name):
            continue
        try:
            if may_be_folder(path):
                folders[name] = list_class_folder(path)
            else:
                loose_images += is_image(name)
        except tf.errors.PermissionDeniedError:  # as of lost+found
            print(f'WARNING: {escape(path)} cannot be read. It is not used as a class.')
    if loose_images:
        print(
            f'WARNING: {escape(image_dir)} has {loose_images} images outside of class folders. '
            'They are not used.'
        )
    return {name: images for name, images in folders.items() if images}


def report_small_folders(image_dir: str, folders: dict[str, list[str]]) -> None:
    """Warns of class folders with few images: names ten of them, and counts the others."""
    small = [name for name, images in folders.items() if len(images) < FEW_IMAGES]
    for name in small[:10]:
        path = escape(os.path.join(image_dir, name))
        print(
            f'WARNING: Folder has less than {FEW_IMAGES} images, which may cause issues. '
            f'({path}: {len(folders[name])})'
        )
    if len(small) > 10:
        print(f'WARNING: {len(small) - 10} more folders have less than {FEW_IMAGES} images.')


def get_labels(folders: dict[str, str]) -> list[str]:
    """Returns the labels of class folders, {name: path}.

    Raises UserError if two are equal, or one is blank.
    """
    paths: dict[str, str] = {}
    for folder, path in folders.items():
        label = get_label(folder)
        if not label:
            raise UserError(f'{path!r}: the label of this folder would be blank. Rename it.')
        if label in paths:
            raise UserError(
                f'{escape(paths[label])} and {escape(path)} have the same label {label!r}. Rename '
                'or merge them.'
            )
        paths[label] = path
    warn_of_labels(paths)
    return list(paths)


def warn_of_labels(paths: dict[str, str]) -> None:
    """Warns of labels that users may not expect, given {label: class folder}."""
    for label, path in paths.items():
        name = os.path.basename(path)
        # Labels lose all but a-z and 0-9. Nobody misses a separator between words, but a hyphen at
        # the start may be a minus sign.
        loses_meaning = re.search(r'[^A-Za-z0-9 _.,-]|^-', name) and label != name
        if loses_meaning:
            print(
                f"WARNING: the label of {escape(path)} is '{label}', as only a-z and 0-9 stay. "
                'To get another one, rename the folder, or change a copy of the labels file.'
            )
        if re.fullmatch('|'.join(SET_FOLDERS), re.sub(r'[ _-]?[0-9]+$', '', name.lower())):
            print(
                f"WARNING: {escape(path)} is used as a class, '{label}'. If it holds images of "
                'several classes, move it elsewhere.'
            )
    for word, flag in ((UNSURE, '--min_score'), (UNKNOWN, '--unknown')):
        if word in paths:
            print(
                f"WARNING: '{word}' is what tf_test.py {flag} says of images that it leaves "
                f'unlabeled. Rename {escape(paths[word])}, or it will refuse this flag.'
            )


def check_nohash(image_dir: str, class_folders: Iterable[str]) -> None:
    """Warns of class folders whose images would all be in one set.

    If the path of a folder has '_nohash_', get_stem() cuts off all that follows. Raises UserError
    if image_dir itself has it.
    """
    if '_nohash_' in image_dir:
        raise UserError(
            f"--image_dir: '_nohash_' in '{image_dir}' would put all images into one set. Rename "
            'the folder.'
        )
    for path in class_folders:
        if '_nohash_' in path:
            print(
                f"WARNING: '_nohash_' in {escape(path)} puts all of its images into one set. "
                'Rename the folder.'
            )


def ensure_image_dir(image_dir: str) -> None:
    """Raises UserError if there is no such folder, or if it cannot be read."""
    # exists() raises an error if the drive fails; isdir() would call that no folder.
    if not exists(image_dir) or not gfile.isdir(image_dir):
        raise UserError(
            f"--image_dir: there is no folder '{image_dir}'. Name the one with your class folders."
        )
    try:
        list_dir(image_dir)
    except tf.errors.PermissionDeniedError:
        raise UserError(f"--image_dir: '{image_dir}' cannot be read. Check its rights.")


def has_class_folders(path: str) -> bool:
    """Tells whether a folder has folders with images."""
    for name in list_dir(path):
        # What cannot be listed, such as lost+found, is no class folder.
        with contextlib.suppress(tf.errors.PermissionDeniedError):
            if not is_hidden(name) and any(map(is_image, list_dir(os.path.join(path, name)))):
                return True
    return False


def find_set_folders(image_dir: str) -> dict[str, str]:
    """Returns {folder: set} if the images are split already; {} if their folders are classes.

    They are split if there is a folder train/ with class folders, and another one of SET_FOLDERS,
    even an empty one. Raises UserError if an image or a folder with images lies beside them, or if
    there are no other folders and train/ has no class folders.
    """
    visible = [name for name in list_dir(image_dir) if not is_hidden(name)]
    named_like_sets = {
        name: SET_FOLDERS[name.lower()] for name in visible if name.lower() in SET_FOLDERS
    }
    if 'training' not in named_like_sets.values() or len(named_like_sets) < 2:
        return {}
    set_folders = {
        name: named_like_sets[name]
        for name in named_like_sets
        if has_class_folders(os.path.join(image_dir, name))
    }
    others = [name for name in visible if name not in named_like_sets]
    # Without class folders, train/ is a class itself if there are folders of other classes.
    if 'training' not in set_folders.values():
        if any(gfile.isdir(os.path.join(image_dir, name)) for name in others):
            return {}
        raise UserError(
            f"--image_dir: '{image_dir}' has {', '.join(named_like_sets)}, without class folders. "
            f'Make one folder per class in each of them, or in {image_dir} itself.'
        )
    ensure_no_images(image_dir, others, ', '.join(named_like_sets))
    for name in named_like_sets:
        if name not in set_folders:
            path = escape(os.path.join(image_dir, name))
            print(f'WARNING: {path} has no class folders. It is left alone.')
    return set_folders


def ensure_no_images(image_dir: str, names: list[str], sets: str) -> None:
    """Raises UserError if an image or a folder with images is among those beside the sets."""
    for name in names:
        path = os.path.join(image_dir, name)
        if has_images(path, image_dir):
            raise UserError(
                f"--image_dir: '{image_dir}' has the sets {sets}, and so '{path}' is in none of "
                'them. Move it elsewhere.'
            )


def has_images(path: str, image_dir: str) -> bool:
    """Tells whether a path in image_dir is an image, or a folder with images somewhere below it.

    A link back into image_dir has none of its own.
    """
    target = follow_link(path)
    leads_back = target != path and is_same_or_inside(target, image_dir)
    return is_image(os.path.basename(path)) or (count_images(target) > 0 and not leads_back)


def list_split_folders(image_dir: str, set_folders: dict[str, str]) -> dict[str, list[str]]:
    """Returns {class folder: its images, 'set folder/class folder/file'} of images in sets.

    Raises UserError if a class is missing in a training folder.
    """
    listed = {name: list_class_folders(os.path.join(image_dir, name)) for name in set_folders}
    classes = sorted(set().union(*listed.values()))
    files_of_class: dict[str, list[str]] = {name: [] for name in classes}
    for set_folder, folders in listed.items():
        path = os.path.join(image_dir, set_folder)
        if set_folders[set_folder] == 'training':
            missing = [name for name in classes if name not in folders]
            if missing:
                labels = [get_label(name) for name in folders]
                advice = 'Add some there, or rename or remove these folders in the other sets.'
                if get_label(missing[0]) in labels:
                    advice = 'A folder there has nearly this name: give both the same name.'
                raise UserError(f'{path} has no images of: {name_some(missing)}. {advice}')
            report_small_folders(path, folders)
        for name, images in folders.items():
            files_of_class[name] += [os.path.join(set_folder, name, image) for image in images]
    return files_of_class


def list_images(flags: argparse.Namespace) -> Images:
    """Returns the images of the class folders; raises UserError for fewer than two classes."""
    image_dir = flags.image_dir
    set_folders = find_set_folders(image_dir)
    if set_folders:
        files_of_class = list_split_folders(image_dir, set_folders)
    else:
        listed = list_class_folders(image_dir)
        report_small_folders(image_dir, listed)
        files_of_class = {
            name: [os.path.join(name, file) for file in files] for name, files in listed.items()
        }
    # The messages about a class in several sets may name any of its folders that exists.
    paths = {
        name: os.path.join(image_dir, os.path.dirname(files[0]))
        for name, files in files_of_class.items()
    }
    labels = get_labels(paths)
    if not {'validation', 'testing'} <= set(set_folders.values()):  # get_set() draws some
        check_nohash(image_dir, paths.values())
    if len(labels) < 2:
        raise UserError(
            f"--image_dir: '{image_dir}' has {len(labels) or 'no'} class folder with images. "
            f'Two or more are needed: {suggest_class_folders(image_dir)}.'
        )
    files = list(itertools.chain.from_iterable(files_of_class.values()))
    counts = [len(names) for names in files_of_class.values()]
    percentages = flags.testing_percentage, flags.validation_percentage
    sets = [get_set_of_file(image_dir, file, set_folders, percentages) for file in files]
    images = Images(
        folder=image_dir,
        labels=labels,
        files=np.array(files, object),
        classes=np.repeat(np.arange(len(labels)), counts),
        sets=np.array(sets),
        set_folders=set_folders,
    )
    if set_folders:
        report_set_folders(images)
    return images


def suggest_class_folders(image_dir: str) -> str:
    """Returns what to do about a folder without class folders."""
    for name in list_dir(image_dir):
        path = os.path.join(image_dir, name)
        if is_hidden(name):
            continue
        with contextlib.suppress(UserError, tf.errors.PermissionDeniedError):  # for odd folders
            is_class = any(map(is_image, list_dir(path)))
            if not is_class and has_class_folders(path):  # such as train/
                return f'those in {path} are used with --image_dir={path}'
    return 'put the images of each class into a folder of its own'


def report_set_folders(images: Images) -> None:
    """Prints how many images are in the sets of the folders."""
    folders: dict[str, list[str]] = {name: [] for name in SETS}
    for folder, name in images.set_folders.items():
        folders[name].append(folder)
    train = '+'.join(folders['training'])
    counts = []
    for name in SETS:
        where = '+'.join(folders[name]) or f'{name} drawn from {train}'
        counts.append(f'{len(images.rows[name])} {where}')
    print(f'The sets are those of the folders: {", ".join(counts)}.')


def find_empty_classes(images: Images, name: str) -> list[str]:
    """Returns the labels of the classes that have no image in a set."""
    counts = images.counts[name]
    return [label for label, count in zip(images.labels, counts, strict=True) if not count]


def check_sets(images: Images, flags: argparse.Namespace) -> None:
    """Warns of classes that a set has no image of; raises UserError without training images.

    If the images are split already, it also raises UserError if any class has no training image,
    which can only be an accident.
    """
    untrained = find_empty_classes(images, 'training')
    if images.set_folders and untrained:
        raise UserError(
            f'--image_dir: no training image of {name_some(untrained)} can be used: they cannot be '
            'read, or were drawn for another set. Add some.'
        )
    if len(untrained) == len(images.labels):
        raise UserError(
            '--image_dir: no image fell into the training set. Add images, or lower '
            '--testing_percentage or --validation_percentage.'
        )
    is_wanted = {
        'testing': flags.testing_percentage > 0,
        'validation': flags.validation_percentage > 0,
        'training': True,
    }
    for name, is_needed in is_wanted.items():
        empty = find_empty_classes(images, name)
        folders = [folder for folder, set_ in images.set_folders.items() if set_ == name]
        remedy = 'Add images, or change --testing_percentage or --validation_percentage.'
        if folders:
            paths = ' or '.join(os.path.join(images.folder, folder) for folder in folders)
            remedy = f'Put some that can be read into the class folders in {paths}.'
        if empty and (is_needed or folders):
            print(
                f'WARNING: no {name} image in {len(empty)} of {len(images.labels)} classes: '
                f'{name_some(empty)}. {remedy}'
            )


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


def decode_by_worker(contents: tf.Tensor) -> tf.Tensor:
    """Returns a JPEG or PNG, uint8 [height, width, 3]; other formats are an error.

    The workers of a tf.data service have no Python of this program, and TensorFlow decodes all
    frames of a GIF.
    """
    is_gif = tf.strings.substr(contents, 0, 2) == GIF
    message = ['The frames of a GIF are cut off in Python.']
    with tf.control_dependencies([tf.raw_ops.Assert(condition=~is_gif, data=message)]):
        contents = tf.identity(contents)
    return decode_by_tensorflow(contents)


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


# Networks

# The model of 2015. The graphs of other networks get its nodes from DecodeJpeg/contents to Mul.
DATA_URL = 'http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz'
MODEL_GRAPH_NAME = 'classify_image_graph_def.pb'
JPEG_DATA_NODE = 'DecodeJpeg/contents'
RESIZED_INPUT_NODE = 'ResizeBilinear'  # float, 0..255
SCALED_INPUT_NODE = 'Mul'
BOTTLENECK_NODE, BOTTLENECK_SIZE = 'pool_3/_reshape', 2048
MOBILENET_URL = 'http://download.tensorflow.org/models/mobilenet_v1_{}_frozen.tgz'
MOBILENET_GRAPH_NAME = 'mobilenet_v1_{}/frozen_graph.pb'
MOBILENET_BOTTLENECK_NODE, MOBILENET_BOTTLENECK_SIZE = 'MobilenetV1/Predictions/Reshape', 1001
FUNCTION_SCOPE = 'module'  # of the nodes of modules and Keras' networks, and of no others
FUNCTION_BOTTLENECK = f'{FUNCTION_SCOPE}/bottleneck'
# What the training puts behind a network.
FINAL_SCOPE = 'final_training_ops'
FAMILIARITY_NODE = 'familiarity'
MAX_ARCHIVE_SIZE = 2**30  # bytes, packed or unpacked: the largest model has a tenth of it
MAX_WEIGHTS_SIZE = 2**31  # bytes: the largest weights of Keras have 1.4 GB
DOWNLOAD_ATTEMPTS = 3
DOWNLOAD_TIMEOUT = 30  # seconds without a byte
LARGE_CONSTANT = 1024  # bytes: a larger Const holds weights


def extract(archive: bytes, name: str) -> bytes:
    """Returns a file of a .tgz; b'' if it is missing or the archive is corrupt."""
    try:
        # The archive may be untrusted: a small one can unpack to terabytes.
        unpacked = gzip.open(io.BytesIO(archive)).read(MAX_ARCHIVE_SIZE)
        if len(unpacked) == MAX_ARCHIVE_SIZE:
            return b''
        # 'r:' is for archives that are not compressed once more.
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode='r:') as tar:
            for member in tar:
                is_small = member.size <= MAX_ARCHIVE_SIZE  # a sparse file may claim any size
                if member.isfile() and is_small and posixpath.normpath(member.name) == name:
                    file = tar.extractfile(member)
                    return file.read() if file else b''
    except (EOFError, OSError, OverflowError, ValueError, zlib.error, tarfile.TarError):
        pass
    return b''


def fetch(url: str, name: str, largest: int) -> bytes:
    """Returns a downloaded file, all of it, and shows the progress.

    Raises OSError if it fails, or if the file has more than `largest` bytes.
    """
    contents = bytearray()
    with download_timeout(), urllib.request.urlopen(url) as response:
        total = int(response.headers.get('Content-Length', 0))
        try:
            while block := response.read1(1 << 16):
                contents += block
                done = len(contents)
                if done > largest:
                    raise OSError(f'more than {largest:,} bytes came')
                progress = f'{100 * done / total:.1f}%' if total else f'{done / 1e6:.1f} MB'
                print(f'\r>> Downloading {name} {progress}', end='', file=sys.stderr)
        finally:
            print(file=sys.stderr)
    if len(contents) < total:
        raise OSError(f'{len(contents):,} of {total:,} bytes came')
    return bytes(contents)


def download(url: str, path: str, find: Callable[[bytes], bytes], kind: str, largest: int) -> bytes:
    """Downloads a file of at most `largest` bytes to `path`, and returns what find() finds in it.

    Raises UserError after DOWNLOAD_ATTEMPTS failures. A file in which find() finds nothing is a
    failure, too: the message says that it is not `kind`. After a failure, `path` is as it was.
    """
    for attempt in range(DOWNLOAD_ATTEMPTS):
        time.sleep(attempt)
        try:
            contents = fetch(url, os.path.basename(path), largest)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f'{type(error).__name__}: {error}'.strip()
            continue
        if found := find(contents):
            write_whole(path, contents)
            return found
        reason = f'{len(contents):,} bytes came, and are not {kind}'
    suggestion = suggest_local_network(os.path.dirname(path))
    advice = f'Run the same command again, or save it as {path}.'
    raise UserError(f'{url} could not be downloaded ({reason}). {advice} {suggestion}'.strip())


def suggest_local_network(model_dir: str) -> str:
    """Returns a sentence that names a network that is in the folder already, or ''."""
    for size in MOBILENET_SIZES:
        if exists(os.path.join(model_dir, MOBILENET_GRAPH_NAME.format(size))):
            flag = f'--architecture=mobilenet_{size}'
            return f'Or add {flag}, whose network is in {model_dir or "."} already.'
    return ''


def is_downloaded(path: str) -> bool:
    """Tells whether a file is there, or would have to be downloaded.

    Raises UserError if it is a link that leads nowhere: a download would be written to where it
    leads, such as into the store of git-annex or DVC, under the name of another file.
    """
    is_there = exists(path)
    if not is_there and os.path.islink(to_bytes(path)):
        raise UserError(f"'{path}' leads nowhere. Restore what it leads to, or delete the link.")
    return is_there


def maybe_download_and_extract(model_dir: str, url: str, graph_name: str) -> str:
    """Returns the path of `graph_name` in `model_dir`.

    If it is missing, it is taken out of the archive at `url`, which is downloaded if need be.
    """
    graph_path = os.path.join(model_dir, graph_name)
    if is_downloaded(graph_path):
        return graph_path
    ensure_writable_dir(os.path.dirname(graph_path), '--model_dir')
    archive_path = os.path.join(model_dir, os.path.basename(url))
    graph = b''
    if is_downloaded(archive_path):
        graph = extract(read_file(archive_path), graph_name)
        if not graph:
            broken = f'{archive_path}.broken'
            gfile.rename(archive_path, broken, overwrite=True)
            print(f'{archive_path} is damaged, or has no {graph_name} in it: renamed to {broken}.')
    if not graph:
        find = functools.partial(extract, name=graph_name)
        kind = f'a .tgz with {graph_name}'
        graph = download(url, archive_path, find, kind, MAX_ARCHIVE_SIZE)
    write_whole(graph_path, graph)
    return graph_path


def load_graph_def(
    model_dir: str, url: str, graph_name: str, needed: list[str]
) -> tuple[str, GraphDef, int]:
    """Returns path, graph up to the needed nodes, and CRC-32 of a model's file.

    Raises UserError if it is damaged.
    """
    path = maybe_download_and_extract(model_dir, url, graph_name)
    contents = read_file(path)
    try:
        graph_def = extract_sub_graph(GraphDef.FromString(contents), needed)
        for node in graph_def.node:
            if node.op == 'Const':
                tf.make_ndarray(node.attr['value'].tensor)  # fails if it has too few numbers
    # AssertionError, KeyError: a node is missing. TypeError, ValueError: a Const is damaged.
    except (DecodeError, AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f'{path} is damaged or another graph ({error}). Delete it and run again to download '
            f'{url}.'
        )
    return path, graph_def, zlib.crc32(contents)


class InputFormat(NamedTuple):
    """How a network takes images: resized, and with values of (pixel - mean) / deviation."""

    size: tuple[int, int]
    mean: float
    deviation: float


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A pretrained network up to its bottleneck: all that depends on the kind of network."""

    source: str  # path, handle, or name and version of Keras: for messages and the record
    graph_def: GraphDef  # from DecodeJpeg/contents to the bottleneck, for TensorFlow 1 too
    checksum: int  # differs between models
    bottleneck: str  # the node of the bottlenecks, float [N, bottleneck_size]
    bottleneck_size: int
    input_format: InputFormat
    cache_suffix: str = ''  # between the name of an image and the '.txt' of its cache file
    optimizer: str = ''  # of Grappler, for bottlenecks that are faster to compute and less precise
    is_upright: bool = False  # whether images are turned as their EXIF orientation says

    def create_variant(self, name: str, **changes: Any) -> 'Backbone':
        """Returns a network whose bottlenecks are others, and so has cache files of its own."""
        return dataclasses.replace(
            self,
            cache_suffix=f'{self.cache_suffix}_{name}',
            # A --tfhub_module called m_upright has cache files of the same names as one called m
            # with --upright: x.jpg_m_upright.txt. By this checksum, their records differ.
            checksum=zlib.crc32(name.encode(), self.checksum),
            **changes,
        )

    def create_network(self, structure: GraphDef, weights: dict, device: str | None) -> Callable:
        """Returns a tf.function from images in 0..255, float [N, *size, 3], to bottlenecks.

        The weights, {node name: tensor}, are on the device.
        """

        @tf.function(input_signature=[tf.TensorSpec([None, *self.input_format.size, 3])])
        def network(images: tf.Tensor) -> tf.Tensor:
            with tf.device(device):
                # import_graph_def() takes no tensors from outside of this function.
                inputs = {f'{name}:0': tf.identity(tensor) for name, tensor in weights.items()}
                scaled = (images - self.input_format.mean) * (1 / self.input_format.deviation)
                inputs[f'{SCALED_INPUT_NODE}:0'] = scaled
                outputs = [f'{self.bottleneck}:0']
                return tf.graph_util.import_graph_def(structure, inputs, outputs)[0]

        network.get_concrete_function()  # finds out now whether TensorFlow accepts the graph
        return network

    @functools.cached_property
    def networks(self) -> list[Callable]:
        """The network on each device that computes; raises UserError if the graph is damaged."""
        shape = [None, *self.input_format.size, 3]
        devices = [gpu.name for gpu in tf.config.list_logical_devices('GPU')] or ['/CPU:0']
        networks = []
        try:
            folded = fold(self.graph_def, SCALED_INPUT_NODE, shape, self.bottleneck)
            structure = hide_weights(folded)
            if self.optimizer:
                structure = optimize(structure, self.bottleneck, self.optimizer)
            weights = get_weights(folded)
            for device in devices:
                with tf.device(device):
                    tensors = {name: tf.constant(value) for name, value in weights.items()}
                networks.append(self.create_network(structure, tensors, device))
        except tf.errors.ResourceExhaustedError as error:
            raise UserError(f'The memory is full ({describe(error)}). Close other programs.')
        except (LookupError, TypeError, ValueError, tf.errors.OpError) as error:
            raise UserError(
                f'The graph of {self.source} is damaged ({error}). Download the model again.'
            )
        return networks

    @functools.cached_property
    def patient_networks(self) -> list[Callable]:
        """The networks, which take smaller batches once the memory of their device was full."""
        return [run_in_parts(network, self.source) for network in self.networks]


def load_backbone(flags: argparse.Namespace) -> Backbone:
    """Returns the network that the flags ask for, which is downloaded if need be.

    Raises UserError if it cannot be used.
    """
    if flags.data_service:
        # The network runs on the CPUs of the workers. In a notebook, a GPU may be in use already.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], 'GPU')
    if flags.tfhub_module:
        backbone = load_tfhub_module(flags.tfhub_module)
    elif flags.architecture == 'inception_v3':
        backbone = load_inception(flags.model_dir)
    elif flags.architecture in KERAS_NETWORKS:
        backbone = load_keras_network(flags.architecture)
    else:
        backbone = load_mobilenet(flags.model_dir, flags.architecture)
    check_final_tensor_name(flags.final_tensor_name, backbone)
    if flags.precision == 'bfloat16':
        backbone = use_bfloat16(backbone)
    if flags.upright:
        backbone = backbone.create_variant('upright', is_upright=True)
    return backbone


def load_inception(model_dir: str) -> Backbone:
    """Returns Inception-v3 as published in 2015."""
    needed = [JPEG_DATA_NODE, RESIZED_INPUT_NODE, SCALED_INPUT_NODE, 'pool_3', BOTTLENECK_NODE]
    path, graph_def, checksum = load_graph_def(model_dir, DATA_URL, MODEL_GRAPH_NAME, needed)
    return Backbone(
        source=path,
        graph_def=graph_def,
        checksum=checksum,
        bottleneck=BOTTLENECK_NODE,
        bottleneck_size=BOTTLENECK_SIZE,
        input_format=InputFormat((299, 299), mean=128, deviation=128),
    )


@contextlib.contextmanager
def damage_explained(source: str, remedy: str) -> Iterator[None]:
    """Turns the many kinds of errors that a damaged or odd network can raise into a UserError."""
    try:
        yield
    except (UserError, MemoryError, tf.errors.ResourceExhaustedError):
        raise
    except Exception as error:
        reason = describe(error).splitlines()[0]
        raise UserError(f'{source} is damaged, or another kind of network ({reason}). {remedy}')


def load_mobilenet(model_dir: str, architecture: str) -> Backbone:
    """Returns a MobileNet v1 as published in 2017, such as mobilenet_1.0_224."""
    size = architecture.removeprefix('mobilenet_')
    side = int(size.split('_')[1])
    input_format = InputFormat((side, side), mean=127.5, deviation=127.5)
    path, graph_def, checksum = load_graph_def(
        model_dir,
        MOBILENET_URL.format(size),
        MOBILENET_GRAPH_NAME.format(size),
        ['input', MOBILENET_BOTTLENECK_NODE],
    )
    placeholder = next(node for node in graph_def.node if node.name == 'input')
    graph_def.node.remove(placeholder)
    with damage_explained(path, 'Delete it and run again to download it.'):
        # Clients of the retrain script of 2017 feed `input` with pixels of -1..1. So it stays.
        graph_def = prepend_decoding(graph_def, 'input:0', input_format, fed_name='input')
    return Backbone(
        source=path,
        graph_def=graph_def,
        checksum=checksum,
        bottleneck=MOBILENET_BOTTLENECK_NODE,
        bottleneck_size=MOBILENET_BOTTLENECK_SIZE,
        input_format=input_format,
        cache_suffix=f'_{architecture}',
    )


def load_keras_network(architecture: str) -> Backbone:
    """Returns a network of Keras, such as ConvNeXtTiny, with its weights from ImageNet."""
    import keras

    create = getattr(keras.applications, architecture)
    prepare = sys.modules[create.__module__].preprocess_input
    side = KERAS_NETWORKS[architecture]
    input_format = InputFormat((side, side), mean=0, deviation=1)  # prepare() does the rest
    network = create_keras_network(create, side)
    size = network.output_shape[-1]
    graph_def = freeze_function(lambda images: network(prepare(images)), input_format, size)
    checksum = 0
    for values in network.get_weights():
        checksum = zlib.crc32(values, checksum)
    return Backbone(
        source=f'{architecture} of Keras {keras.__version__}',
        graph_def=graph_def,
        checksum=checksum,
        bottleneck=FUNCTION_BOTTLENECK,
        bottleneck_size=size,
        input_format=input_format,
        cache_suffix=f'_{architecture}',
    )


def get_keras_home() -> str:
    """Returns the folder where Keras keeps its settings, and in models/ its weights."""
    return os.path.expanduser(os.environ.get('KERAS_HOME', '~/.keras'))


download_lock = threading.RLock()  # two trainings in threads must not restore what the other set


@contextlib.contextmanager
def download_timeout() -> Iterator[None]:
    """Makes libraries give up connections that hang, and lets a stop end them at once."""

    def look_up_in_thread(*arguments: Any, **options: Any) -> Any:
        # Python hears no signal while the system waits for a name server, which may be gone.
        try:
            return wait_for(start_thread(look_up, *arguments, **options), DOWNLOAD_TIMEOUT)
        except concurrent.futures.TimeoutError:
            raise OSError(f'no name server has answered for {DOWNLOAD_TIMEOUT} s')

    with download_lock:
        timeout, look_up = socket.getdefaulttimeout(), socket.getaddrinfo
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        socket.getaddrinfo = look_up_in_thread
        try:
            yield
        finally:
            socket.setdefaulttimeout(timeout)
            socket.getaddrinfo = look_up


@contextlib.contextmanager
def keras_in_float32() -> Iterator[None]:
    """Makes Keras compute in float32; then restores what a notebook has set."""
    import keras

    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_dtype_policy('float32')
    keras.config.set_floatx('float32')
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)
        keras.config.set_floatx(floatx)


def fetch_weights(
    name: str, url: str, cache_subdir: str = 'models', file_hash: str | None = None
) -> str:
    """Returns the path of a file of weights, which is downloaded if need be: Keras' get_file().

    A file of another hash, MD5 or SHA-256 in hexadecimal digits, is renamed.
    """
    path = os.path.join(get_keras_home(), cache_subdir, name)

    def find(contents: bytes) -> bytes:
        if file_hash is None:  # Keras has none for some networks
            return contents
        algorithm = 'md5' if len(file_hash) == 32 else 'sha256'
        digest = hashlib.new(algorithm, contents, usedforsecurity=False).hexdigest()
        return contents if digest == file_hash else b''

    is_there = is_downloaded(path)
    if is_there and find(read_file(path)):
        return path
    ensure_writable_dir(os.path.dirname(path), '--model_dir or KERAS_HOME')
    if is_there:
        broken = f'{path}.broken'
        gfile.rename(path, broken, overwrite=True)
        print(f'{path} is damaged, or not what this Keras needs: renamed to {broken}.')
    download(url, path, find, 'the weights that Keras expects', MAX_WEIGHTS_SIZE)
    return path


@contextlib.contextmanager
def keras_with_safe_downloads() -> Iterator[None]:
    """Makes Keras call fetch_weights().

    Its own function writes into the file itself, which another run may be reading, and deletes it
    if the download fails. It is no part of Keras' public interface: if it has another name one day,
    Keras downloads by itself.
    """
    module = sys.modules.get('keras.src.utils.file_utils')
    get_file = getattr(module, 'get_file', None)
    if get_file:
        module.get_file = fetch_weights  # type: ignore[union-attr]
    try:
        yield
    finally:
        if get_file:
            module.get_file = get_file  # type: ignore[union-attr]


def create_keras_network(create: Callable, side: int) -> Any:
    """Calls a function of Keras Applications, which downloads the weights if need be.

    Raises UserError if that fails.
    """
    try:
        with keras_in_float32(), keras_with_safe_downloads():
            return create(include_top=False, input_shape=[side, side, 3], pooling='avg')
    except (UserError, MemoryError, tf.errors.ResourceExhaustedError):
        raise
    except Exception as error:  # Keras has no class of its own for what fails
        raise UserError(explain_keras_error(error))


def explain_keras_error(error: Exception) -> str:
    """Returns what to do about weights that cannot be loaded."""
    reason = describe(error).splitlines()[0]
    folder = os.path.join(get_keras_home(), 'models')
    settings = os.path.join(get_keras_home(), 'keras.json')
    return (
        f'The weights in {folder} cannot be loaded ({reason}). Delete those of this network there, '
        f'and {settings}, and run the same command again.'
    )


def load_tfhub_module(handle: str) -> Backbone:
    """Returns the network of a TF2 image feature vector; raises UserError if it is none."""
    remedy = 'Download it again, or name another one.'
    with damage_explained(f"--tfhub_module: '{handle}'", remedy):
        checksum, module = open_tfhub_module(handle)
        function, input_format, size = find_feature_vector(module, handle)
        graph_def = freeze_function(function, input_format, size)
    # The suffix is that of the retrain script of TensorFlow Hub.
    suffix = '_' + to_file_name(re.sub(r'[:/]+', '~', handle.rstrip('/')))[-100:]
    return Backbone(
        source=handle,
        graph_def=graph_def,
        checksum=checksum,
        bottleneck=FUNCTION_BOTTLENECK,
        bottleneck_size=size,
        input_format=input_format,
        cache_suffix=suffix,
    )


def ensure_independent(backbone: Backbone) -> None:
    """Raises UserError if the bottleneck of an image depends on its batch, or on chance.

    Networks that were exported for training do that: they normalize batches, or drop units.
    """
    rng = np.random.default_rng(0)
    noise = np.float32(rng.uniform(0, 255, [1, *backbone.input_format.size, 3]))
    network = backbone.patient_networks[0]
    # Several, as a network may drop few units, and leave some images as they are.
    batch = np.concatenate([noise] * 16 + [noise / 2] * 16)
    # In a thread, or a stop would wait for large networks.
    results = run_ahead((network(images).numpy(),) for images in (noise, batch))
    (alone,), (together,) = until_stopped(results)
    if len(together) != len(batch):  # ensure_vectors() raises an error
        return
    difference = np.abs(together[:16] - alone).max(initial=0)
    if difference > 0.05 * np.abs(alone).max(initial=0):  # far more than rounding
        raise UserError(
            f'{backbone.source} gives other numbers for an image if other images are beside it. It '
            'was exported for training: export it for inference, or name another network.'
        )


def freeze_function(function: Callable, input_format: InputFormat, size: int) -> GraphDef:
    """Returns the graph of a function from images to features, behind the decoding nodes.

    It ends at FUNCTION_BOTTLENECK, float [N, size].
    """
    name = FUNCTION_BOTTLENECK.removeprefix(f'{FUNCTION_SCOPE}/')

    @tf.function(input_signature=[tf.TensorSpec([None, *input_format.size, 3])])
    def extract_features(images: tf.Tensor) -> tf.Tensor:
        features = tf.cast(tf.nest.flatten(function(images))[0], tf.float32)
        return tf.reshape(features, [-1, size], name=name)

    frozen = convert_variables_to_constants_v2(extract_features.get_concrete_function())
    # Functions become plain ops, which TensorFlow 1 has too.
    inlinable = allow_inlining(frozen.graph.as_graph_def())
    plain = drop_control_inputs(optimize(inlinable, name, 'function'))
    graph_def = prepend_decoding(plain, frozen.inputs[0].name, input_format, FUNCTION_SCOPE)
    return extract_sub_graph(graph_def, [FUNCTION_BOTTLENECK])


def allow_inlining(graph_def: GraphDef) -> GraphDef:
    """Removes from a graph, in place, the attributes that forbid inlining."""
    functions = graph_def.library.function
    nodes = itertools.chain(graph_def.node, *(function.node_def for function in functions))
    for owner in itertools.chain(nodes, functions):
        for name in ('_gradient_op_type', '_XlaMustCompile', '_noinline'):
            owner.attr.pop(name, None)
    return graph_def


def drop_control_inputs(graph_def: GraphDef) -> GraphDef:
    """Removes the control inputs of all nodes, in place, unless the graph has a tf.cond.

    In a function that was inlined, all weights wait for its images. TensorFlow's optimizers would
    make them wait for the file of the image, too, although a caller feeds pixels instead. For the
    branches of a tf.cond, the control inputs say which one runs.
    """
    if not any(node.op == 'Switch' for node in graph_def.node):
        for node in graph_def.node:
            node.input[:] = [name for name in node.input if not name.startswith('^')]
    return graph_def


@contextlib.contextmanager
def talkative_library() -> Iterator[None]:
    """Makes tensorflow_hub say what it downloads, or waits for.

    It waits ten minutes for the download of another process, even of one that was killed.
    """
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.INFO)
    try:
        yield
    finally:
        absl.logging.set_verbosity(verbosity)


def is_pattern(path: str) -> bool:
    """Tells whether TensorFlow takes a path for a pattern, such as 'photos [2026]'.

    Then it does not find the variables of a SavedModel (core/util/tensor_slice_reader.cc).
    """
    return any(character in path.replace(os.sep, '/') for character in '*?[\\')


def open_tfhub_module(handle: str) -> tuple[int, Any]:
    """Returns the checksum of a module, and the module; raises UserError if it cannot be loaded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # tensorflow_hub's use of pkg_resources
            import tensorflow_hub
        with download_timeout(), talkative_library():
            path = tensorflow_hub.resolve(handle)
        checksum = get_folder_checksum(path)  # first: it opens only plain files
        return checksum, tf.saved_model.load(path)
    except ImportError as error:
        raise UserError(
            f"--tfhub_module: {error}. Run pip install tensorflow-hub 'setuptools<81' first."
        )
    except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
        advice = 'Download it into a folder, as inception/README.md shows, and name that.'
        if is_pattern(handle) and gfile.isdir(handle):
            advice = 'It may be because of a * ? [ or \\ in its path: rename the folder.'
        raise UserError(
            f"--tfhub_module: '{handle}' cannot be loaded ({str(error).strip()}). {advice}"
        )


def is_image_batch(spec: tf.TensorSpec) -> bool:
    """Tells whether a tensor is one of images, float32 [N, height, width, 3], for any N."""
    if spec.shape.rank != 4 or spec.dtype != tf.float32:
        return False
    takes_any_number = spec.shape[0] is None  # some converters write functions for one image
    return takes_any_number and spec.shape[3] in (3, None)


def find_feature_vector(module: Any, handle: str) -> tuple[Callable, InputFormat, int]:
    """Returns the function of a module from images to features, its input format, and the size.

    The function takes images in 0..1, float [N, height, width, 3], and returns features, float
    [N, size]: the common signature of https://www.tensorflow.org/hub/common_signatures/images.
    """
    if callable(module):
        functions = module.__call__.concrete_functions
    else:
        functions = module.signatures.values()
    for function in functions:
        arguments = tf.nest.flatten(function.structured_input_signature)
        inputs = [argument for argument in arguments if isinstance(argument, tf.TensorSpec)]
        outputs = [output.shape for output in tf.nest.flatten(function.structured_outputs)]
        takes_images = len(inputs) == 1 and is_image_batch(inputs[0])
        gives_vectors = [shape.rank for shape in outputs] == [2] and bool(outputs[0][1])  # the size
        # A module of Keras has one function for training=True, and one for training=False.
        is_for_training = any(argument is True for argument in arguments)
        if takes_images and gives_vectors and not is_for_training:
            sides = inputs[0].shape[1:3]
            height, width = (side or 224 for side in sides)
            if None in sides:
                print(
                    '--tfhub_module: it takes images of any size. They are resized to '
                    f'{height} x {width} pixels.'
                )
            return function, InputFormat((height, width), mean=0, deviation=255), outputs[0][1]
    raise UserError(
        f"--tfhub_module: '{handle}' does not compute feature vectors of images, any number of "
        'them at once. Name one that does.'
    )


def find_files(folder: str) -> Iterator[str]:
    """Yields the paths of the files in and below a folder; raises UserError if the drive fails.

    Hidden files and folders are skipped: the Finder of macOS adds its .DS_Store to each folder that
    it shows.
    """
    for name in list_dir(folder):
        path = os.path.join(folder, name)
        if is_hidden(name):
            continue
        if gfile.isdir(path):  # if that fails, a folder is read as a file, which is an error
            yield from find_files(path)
        else:
            yield path


def get_folder_checksum(folder: str) -> int:
    """Returns the CRC-32 of the files in and below a folder, in the order of their paths."""
    checksum = 0
    for path in sorted(find_files(folder)):
        checksum = zlib.crc32(read_file(path), checksum)
    return checksum


def check_final_tensor_name(name: str, backbone: Backbone) -> None:
    """Raises UserError if the graph cannot have one more node with this name.

    A node of the backbone may have it already. TensorFlow would rename the node if another one of
    the head has this name, in upper or lower case, or if the name is odd, such as 'x/'. So a head
    is built that is not used, to see whether its last node keeps the name.
    """
    if name in {node.name for node in backbone.graph_def.node}:
        raise UserError(
            f"--final_tensor_name: '{name}' is taken by the graph's own nodes. Choose another name."
        )
    size = backbone.bottleneck_size
    untrained = FinalLayer(size, class_count=1, learning_rate=1, seed=np.zeros(2, int))
    familiarity = Familiarity(np.zeros([1, size], np.float32), np.zeros(1, np.float32))
    nodes = create_final_nodes(backbone, Head(untrained, [''], familiarity), name)
    if nodes.node[-1].name != name:
        raise UserError(
            f"--final_tensor_name: '{name}' would be named {nodes.node[-1].name}. Choose another "
            'name, of letters and digits.'
        )


def use_bfloat16(backbone: Backbone) -> Backbone:
    """Returns a network that computes in bfloat16, with cache files of its own.

    Without instructions for it, and on a GPU, the network stays as it is.
    """
    problem = ''
    if tf.config.get_visible_devices('GPU'):
        problem = 'it is for CPUs only'
    elif not has_bfloat16():
        problem = 'this processor has no bfloat16 instructions (or oneDNN is off)'
    if problem:
        print(f'--precision: {problem}. float32 is used.')
        return backbone
    return backbone.create_variant('bfloat16', optimizer='auto_mixed_precision_onednn_bfloat16')


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
    graph_def: GraphDef,
    image_name: str,
    input_format: InputFormat,
    prefix: str = '',
    fed_name: str = '',
) -> GraphDef:
    """Returns the decoding nodes of 2015, and behind them the nodes of a graph, as prefix/....

    The decoded image takes the place of the graph's input tensor `image_name`. With a `fed_name`,
    it passes through a node of this name, which can be fed with other images.
    """
    with tf.Graph().as_default() as graph:
        contents = tf.constant(b'', name=JPEG_DATA_NODE)
        decoded = tf.io.decode_jpeg(contents, 3, name='DecodeJpeg')
        image = tf.expand_dims(tf.cast(decoded, tf.float32, name='Cast'), 0, name='ExpandDims')
        image = resize_bilinear(image, input_format.size, name=RESIZED_INPUT_NODE)
        image = tf.subtract(image, input_format.mean, name='Sub')
        image = tf.multiply(image, 1 / input_format.deviation, name=SCALED_INPUT_NODE)
        if fed_name:
            shape = [None, *input_format.size, 3]
            image = tf.compat.v1.placeholder_with_default(image, shape, fed_name)
        tf.graph_util.import_graph_def(graph_def, {image_name: image}, name=prefix)
    return export_graph(graph)


def optimize(graph_def: GraphDef, output: str, optimizer: str) -> GraphDef:
    """Returns a graph up to the node `output`, rewritten by an optimizer.

    The optimizers are in tensorflow/core/grappler/optimizers.
    """
    meta_graph = tf.compat.v1.MetaGraphDef(graph_def=graph_def)
    meta_graph.collection_def['train_op'].node_list.value.append(output)  # what it must keep
    config = tf.compat.v1.ConfigProto()
    config.graph_options.rewrite_options.optimizers.append(optimizer)
    return tf_optimizer.OptimizeGraph(config, meta_graph)


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


# Bottlenecks

# Images per batch of the network: more are not faster on a CPU, and need more memory.
NETWORK_BATCH_SIZE = 128 if HAS_GPU else 32
DATA_SERVICE_TIMEOUT = 60  # seconds without a batch
DRIVE_TIMEOUT = 30  # seconds that the end of a run waits for an image: a network drive may hang
# FarmHash, which is the same everywhere. A digest is an int64 of 0 or more.
compute_digest = functools.partial(tf.strings.to_hash_bucket_fast, num_buckets=2**62)


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


def load_digests(keys: np.ndarray, paths: list[str]) -> Iterator:
    """Yields (key, digest) of the file of each key, paths[i] of keys[i]; skips files that fail."""
    files = load_files(keys, paths, lambda key, contents: (key, compute_digest(contents)))
    return files.as_numpy_iterator()


def run_in_parts(network: Callable, source: str) -> Callable:
    """Returns a network that takes smaller batches once the memory of its device was full.

    Raises UserError if the network cannot be run, or needs too much memory for a single image.
    """
    largest = NETWORK_BATCH_SIZE  # of all calls from now on

    def run_batch(images: tf.Tensor) -> tf.Tensor:
        nonlocal largest
        while True:
            starts = range(0, len(images), largest)
            try:
                parts = [network(images[start : start + largest]) for start in starts]
                return tf.concat(parts, 0)
            except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
                reason = describe(error).splitlines()[0]
                raise UserError(f'{source} cannot be run ({reason}). Name another network.')
            except tf.errors.ResourceExhaustedError as error:
                failed = min(largest, len(images))
                if failed == 1:
                    raise UserError(
                        f'The memory of the GPU or computer is full ({describe(error)}). Close '
                        'other programs, or set TF_FORCE_GPU_ALLOW_GROWTH=true, or '
                        'CUDA_VISIBLE_DEVICES= to leave the GPU out.'
                    )
                largest = failed // 2
                tqdm.write(
                    f'The memory is full: from now on, the network gets {largest} images at once.'
                )

    return run_batch


def run_networks(networks: list[Callable], batches: tf.data.Dataset) -> Generator:
    """Yields (keys, digests, bottlenecks) of each batch of (keys, digests, images).

    Each device has a network. They work at once, while the next batches are made.
    """
    iterator = iter(batches.prefetch(2 * len(networks)))
    while group := list(itertools.islice(iterator, len(networks))):
        results = []
        for (keys, digests, images), network in zip(group, networks, strict=False):
            results.append((keys, digests, network(images)))  # does not wait for the device
        for result in results:
            yield tuple(tensor.numpy() for tensor in result)


def run_service(address: str, network: Callable, batches: tf.data.Dataset) -> Iterator:
    """Yields what run_networks() would, computed by a tf.data service, until it is done or fails.

    Raises UserError if nothing answers at the address.
    """
    host, port = address.removeprefix('grpc://').rsplit(':', 1)
    try:
        server = host.strip('[]'), int(port)  # [...] is an IPv6 address
        with download_timeout():
            socket.create_connection(server, timeout=DATA_SERVICE_TIMEOUT).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last for an odd host
        raise UserError(
            f'--data_service: {address} does not answer ({error}). Start it, or leave the flag out.'
        )
    policy = tf.data.experimental.service.ShardingPolicy.DYNAMIC
    distribute = tf.data.experimental.service.distribute(policy, address)
    computed = batches.map(lambda keys, digests, images: (keys, digests, network(images)))

    def call_with_timeout(function: Callable, *arguments: Any) -> Any:
        # It may wait forever, for a dispatcher that hangs or a worker that died.
        return wait_for(start_thread(function, *arguments), DATA_SERVICE_TIMEOUT)

    try:
        dataset = call_with_timeout(computed.apply, distribute)
        iterator = call_with_timeout(dataset.as_numpy_iterator)
        while batch := call_with_timeout(next, iterator, None):
            yield batch
    except (tf.errors.OpError, concurrent.futures.TimeoutError) as error:
        reason = f'nothing came for {DATA_SERVICE_TIMEOUT} s'
        if isinstance(error, tf.errors.OpError):
            reason = describe(error)
        elif urllib.request.getproxies():
            reason += '; it may be the proxy: no_proxy must name the dispatcher and the workers'
        print(f'WARNING: {address} failed ({reason}).')


def drop_other_files(batches: Iterator, keys: np.ndarray, paths: list[str]) -> Iterator:
    """Yields batches of a service without images whose files are others there than here.

    paths[i] is the file of keys[i]. A worker may have an old copy of the folder, or may have been
    started in another one.
    """
    path_of = dict(zip(keys.tolist(), paths, strict=True))
    dropped = 0
    for some_keys, digests, bottlenecks in batches:
        own_paths = [path_of[key] for key in some_keys.tolist()]
        here = dict(load_digests(some_keys, own_paths))
        pairs = zip(some_keys, digests, strict=True)
        is_same = np.array([here.get(key) == digest for key, digest in pairs])
        dropped += np.count_nonzero(~is_same)
        if is_same.any():
            yield some_keys[is_same], digests[is_same], bottlenecks[is_same]
    if dropped:
        tqdm.write(f'WARNING: the service read other files than those here for {dropped} images.')


def ensure_vectors(batches: Iterator, source: str) -> Iterator:
    """Yields batches of (keys, digests, bottlenecks) of a network.

    Raises UserError if there is not one bottleneck per image.
    """
    for keys, digests, bottlenecks in batches:
        if len(bottlenecks) != len(keys):
            numbers = f'{len(bottlenecks)} vectors for {len(keys)} images'
            raise UserError(f'{source} gives {numbers}. Name another network.')
        yield keys, digests, bottlenecks


def run_ahead(batches: Generator) -> Iterator:
    """Yields batches, each of which is computed while the one before it is used.

    A stop does not wait for the batch in hand: a network drive may hang, and what was learned must
    be written. Only the end of the program waits: Python would abort in the middle of a batch, or
    while TensorFlow ends the threads that make the next ones.
    """
    future = start_thread(next, batches, None)

    def close_after_the_batch_in_hand() -> None:
        concurrent.futures.wait([future])
        batches.close()

    try:
        while batch := future.result():
            future = start_thread(next, batches, None)
            yield batch
    finally:
        with contextlib.suppress(UserError):  # without another thread, nothing waits for the batch
            end = start_thread(close_after_the_batch_in_hand)
            atexit.register(concurrent.futures.wait, [end], DRIVE_TIMEOUT)


def compute_bottlenecks(
    keys: np.ndarray,
    paths: list[str],
    backbone: Backbone,
    distort: Callable | None = None,
    service: str | None = None,
) -> Iterator:
    """Yields (keys, digests, bottlenecks) in batches, without images that cannot be decoded.

    paths[i] is the image of keys[i], int [N]: a row of Images, or another number that tells the
    images apart. Keys are in ascending order, and come out in this order, except from a service.
    Digests, int64 [N], are those of the image files.
    Images are resized, or distorted by distort(image, key). With the address of a tf.data service,
    its workers do all this.
    """

    def load(key: tf.Tensor, contents: tf.Tensor) -> tuple[tf.Tensor, ...]:
        if service:
            image = decode_by_worker(contents)
        else:
            image = decode_image(contents, backbone.is_upright)
        if distort:
            image = distort(image, key)
        else:
            image = resize_bilinear(image[tf.newaxis], backbone.input_format.size)[0]
        return key, compute_digest(contents), image

    batches = load_files(keys, paths, load).batch(NETWORK_BATCH_SIZE)
    if service:
        computed = run_service(service, backbone.networks[0], batches)
        return drop_other_files(ensure_vectors(computed, backbone.source), keys, paths)
    computed = run_ahead(run_networks(backbone.patient_networks, batches))
    return ensure_vectors(computed, backbone.source)


def to_text(bottleneck: np.ndarray) -> bytes:
    """Returns the contents of a cache file: the digits of str(), in a tenth of its time."""
    return orjson.dumps(bottleneck, option=orjson.OPT_SERIALIZE_NUMPY).strip(b'[]')


def read_bottlenecks(paths: list[str], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bottlenecks in cache files, float32 [N, size], and the files' digests, int64 [N].

    The digest of a missing or damaged file is -1.
    """

    def parse(row: tf.Tensor, text: tf.Tensor) -> tuple[tf.Tensor, ...]:
        # tf.strings.split() would make a ragged tensor, which takes a fifth longer.
        texts = tf.raw_ops.StringSplitV2(input=[text], sep=',').values
        numbers = tf.strings.to_number(texts)
        numbers = tf.debugging.check_numerics(tf.ensure_shape(numbers, [size]), '')
        return row, compute_digest(text), numbers

    bottlenecks = np.empty([len(paths), size], np.float32)
    digests = np.full(len(paths), -1)
    batches = load_files(np.arange(len(paths)), paths, parse).batch(256)
    for rows, found_digests, numbers in until_stopped(batches.as_numpy_iterator()):
        digests[rows] = found_digests
        bottlenecks[rows] = numbers
    return bottlenecks, digests


# Cache

RECORD_VERSION = 3
# Recorded in place of the time of an image that changed during the run. No image has this time (a
# missing one has -1), so the next run compares the contents.
NO_TIME = -2
# What may decide whether an image can be decoded. After it changes, images are tried again.
DECODER = f'TensorFlow {tf.__version__}, Pillow {PIL.__version__}, {MAX_PIXELS} pixels'
with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    DECODER += f', pi-heif {importlib.metadata.version("pi-heif")}'


class Status(NamedTuple):
    """What tells a file from another version of itself without reading it."""

    size: int  # bytes; -1 if there is no file
    modified: int  # ns; programs can set it, as `touch` and `cp -p` do
    changed: int  # ns; only the system sets it


@dataclasses.dataclass(frozen=True)
class CacheRecord:
    """What a cache file was made of, or why there is none; see bottlenecks/README.md."""

    size: int  # of the image, in bytes
    time: int  # of the image's last modification, in ns, or NO_TIME
    digest: int | None  # of the image's contents; None if they were not read
    model: int  # checksum of the network
    outcome: int | str  # digest of the cache file, or why the image cannot be decoded
    orientation: int | None  # of the image's Header
    bits: int | None  # of the image's Header
    decoder: str
    version: int = RECORD_VERSION

    @property
    def lacks_header(self) -> bool:
        """Tells whether the header of an image that can be decoded could not be read."""
        return self.bits is None and isinstance(self.outcome, int)


# In place of a record that may be there, but cannot be read now. It holds for no image: none has
# this size.
UNREADABLE_RECORD = CacheRecord(
    size=-2,
    time=-1,
    digest=None,
    model=0,
    outcome=-1,
    orientation=None,
    bits=None,
    decoder='',
)


def get_status(path: str) -> Status:
    """Returns the status of a file; sizes and times of -1 if there is none."""
    with contextlib.suppress(OSError):
        status = os.stat(to_bytes(path))
        return Status(status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    with contextlib.suppress(tf.errors.OpError):  # gs:// and its like
        status = gfile.stat(path)
        return Status(status.length, status.mtime_nsec, 0)
    return Status(-1, -1, -1)


def ensure_folders_are_there(paths: Iterable[str]) -> None:
    """Raises UserError if the folder of an image is gone, or has no images left.

    It may have been on a drive that was removed, or hold links to files on such a drive. Without
    the images of a class, a training would only spoil the outputs of an earlier one.
    """
    for folder in sorted({os.path.dirname(path) for path in paths}):
        images = (os.path.join(folder, name) for name in list_dir(folder) if is_image(name))
        if not any('://' in image or os.path.exists(to_bytes(image)) for image in images):
            raise UserError(
                f"--image_dir: '{folder}' is gone, or its images are. Restore them. {KEPT}"
            )


def explain_unreadable(path: str) -> tuple[str, int | None]:
    """Returns why an image could not be used, and the digest of its contents.

    The digest is None if the reason is not in the contents: it may be gone at the next run.
    """
    if is_special(path):
        return 'it is not a plain file', None
    if is_too_large(to_bytes(path)):
        return f'it has more than {MAX_FILE_SIZE:,} bytes', None
    digest = None
    try:
        contents = tf.io.read_file(path).numpy()
        digest = int(compute_digest(contents))
        decode(contents, is_upright=False)
    except (MemoryError, tf.errors.ResourceExhaustedError):
        return 'the memory is full', None
    except tf.errors.OpError as error:
        return describe(error).replace('\n', ' '), digest
    except ImageError as error:
        if is_memory_scarce():
            return f'{error}, or the memory is full', None
        return str(error), digest
    # Now it can be decoded.
    return 'it changed while it was read, or the memory was full. Run the same command again', None


def is_memory_scarce() -> bool:
    """Tells whether the memory is too small for the largest image.

    Then libraries may call an image damaged for which they only lack the memory.
    """
    try:
        np.empty(16 * MAX_PIXELS, np.uint8)  # 16 bytes per pixel: a progressive JPEG needs 13
    except MemoryError:
        return True
    return False


def load_header(path: str) -> Header:
    """Returns the header of an image file, as far as it can be read."""
    with contextlib.suppress(UserError, tf.errors.OpError), open_file(path) as file:
        return read_header(file)
    return Header()


def parse_record(text: bytes) -> CacheRecord | None:
    """Returns the record in a file; None if it is damaged or of another version."""
    try:
        record = CacheRecord(**json.loads(text))
        numbers = record.size, record.time, record.model, record.version
        is_valid = (
            all(isinstance(number, int) for number in numbers)
            and isinstance(record.digest, int | None)
            and isinstance(record.outcome, int | str)
            and isinstance(record.orientation, int | None)
            and isinstance(record.bits, int | None)
        )
        # Sizes and outcomes of -1 would fit files that are missing, and '' is no reason.
        is_valid = is_valid and record.size >= 0 and record.outcome not in (-1, '')
    except (ValueError, TypeError, RecursionError):
        return None
    return record if is_valid and record.version == RECORD_VERSION else None


def read_record(path: str) -> CacheRecord | None:
    """Returns the record in a file, or UNREADABLE_RECORD; None if it is missing or damaged."""
    try:
        return parse_record(read_file(path))
    except (UserError, tf.errors.OpError) as error:
        reason = error.__cause__ or error
    missing = FileNotFoundError, tf.errors.NotFoundError
    # A folder or device, or a file in the place of the folder.
    is_other = UserError, IsADirectoryError, NotADirectoryError
    return None if isinstance(reason, missing + is_other) else UNREADABLE_RECORD


def read_records(paths: list[str]) -> list[CacheRecord | None]:
    """Returns read_record() of each file, in their order."""
    # Files on gs:// and its like take long, and local ones so little that threads would only wait
    # for each other. load_files() would take three times as long for them.
    thread_count = 32 if any('://' in path for path in paths) else 1
    parts = np.array_split(np.array(paths, object), thread_count)
    futures = [start_thread(lambda part: list(map(read_record, part)), part) for part in parts]
    return [record for future in futures for record in wait_for(future, math.inf)]


class BottleneckCache:
    """The cache files of some images and one network, and their bottlenecks.

    Each cache file, <name>.txt, has a record, .records/<name>.rec. A cache file on disk is always
    the one of its record: the old cache file is removed before a record with another outcome is
    written, and the new cache file is written after it. So a kill at any moment leaves a missing
    file, and never a wrong one.
    """

    def __init__(self, images: Images, backbone: Backbone, folder: str) -> None:
        names = [f'{file}{backbone.cache_suffix}' for file in images.files]
        self.images = images
        self.backbone = backbone
        self.paths = [os.path.join(folder, f'{name}.txt') for name in names]
        self.record_paths = [os.path.join(folder, '.records', f'{name}.rec') for name in names]
        # bottlenecks: float32 [images, size]; digests: those of the cache files, -1 if missing
        self.bottlenecks, self.cache_digests = read_bottlenecks(
            self.paths, backbone.bottleneck_size
        )
        # The records are read after the cache files. The other way round, a file that another run
        # writes between the two would seem to have no record, and so be trusted.
        self.records = read_records(self.record_paths)
        self.statuses = [get_status(path) for path in images.paths]
        self.written = 0

    def save_record(
        self, row: int, image_digest: int | None, outcome: int | str, header: Header
    ) -> None:
        """Records what was found in an image.

        The status of each image was taken when the run began. If it has changed since, its size and
        time may be those of other contents than the digest. Then NO_TIME is recorded, and the next
        run compares the contents. A change of rights or hard links counts, too, as it cannot be
        told from the `cp -p` of another image. Without a digest, there would be nothing to compare.
        Then nothing is recorded if the size or time has changed.

        Raises OpError or UserError if the record cannot be written: then its cache file must not be
        written either.
        """
        status = self.statuses[row]
        now = get_status(self.images.paths[row])
        if image_digest is None and (now.size, now.modified) != (status.size, status.modified):
            return
        may_differ = image_digest is not None and now != status
        record = CacheRecord(
            size=max(status.size, 0),  # it is -1 if there was no image when the run began
            time=NO_TIME if may_differ else status.modified,
            digest=image_digest,
            model=self.backbone.checksum,
            outcome=outcome,
            **header._asdict(),
            decoder=DECODER,
        )
        self.records[row] = record  # this run goes by it, even if it cannot be written
        if outcome != self.cache_digests[row]:
            self.remove_cache_file(row)
        text = json.dumps(vars(record))
        self.write_file(self.record_paths[row], text.encode())

    def write_file(self, path: str, contents: bytes) -> None:
        """Writes a file of the cache. A link there is replaced, and not its target.

        It may lead into the store of git-annex or DVC, or to a device.
        """
        if not os.path.islink(to_bytes(path)):
            write_whole(path, contents)
            return
        # The link stays until the new file is whole: without a record, a cache file is trusted.
        temporary = os.path.join(os.path.dirname(path), create_hidden_name())
        write_whole(temporary, contents)
        gfile.rename(temporary, path, overwrite=True)

    def remove_cache_file(self, row: int) -> None:
        """Removes the old cache file of a row, if there is one, before there is a new record.

        If a kill left the file beside the new record, retrain.py of 2017 would use it, and so would
        this program if the record is lost.
        """
        with contextlib.suppress(tf.errors.NotFoundError):
            gfile.remove(self.paths[row])

    def try_to_save_record(
        self, row: int, image_digest: int | None, outcome: int | str, header: Header
    ) -> None:
        """Does what save_record() does, but ignores a failure: the next run finds it out again."""
        with contextlib.suppress(tf.errors.OpError, UserError):
            self.save_record(row, image_digest, outcome, header)

    def fits(self, row: int, record: CacheRecord) -> bool:
        """Tells whether a record holds, provided that its image is unchanged: compare() finds out.

        With NO_TIME, the recorded size may be that of other contents, so it is not compared.
        """
        if record.size != self.statuses[row].size and record.time != NO_TIME:
            return False
        if isinstance(record.outcome, str):  # why it cannot be decoded, whatever the network is
            return record.decoder == DECODER
        is_written = record.outcome == self.cache_digests[row]
        return is_written and record.model == self.backbone.checksum

    def is_unusable(self, row: int) -> bool:
        """Tells whether an image probably has no bottleneck to write.

        It cannot be read, or is unchanged since it could not be decoded by other versions of the
        libraries.
        """
        path, record, status = self.images.paths[row], self.records[row], self.statuses[row]
        if '://' not in path and not os.access(to_bytes(path), os.R_OK):
            return True
        if record is None or not isinstance(record.outcome, str):
            return False
        return (record.size, record.time) == (status.size, status.modified)

    def trust_unrecorded(self) -> None:
        """Records cache files as they are if their record is missing or damaged."""
        has_record = np.array([record is not None for record in self.records])
        # Of an image that is missing, the size and time to record are not known.
        has_image = np.array([status.size >= 0 for status in self.statuses])
        is_unrecorded = (self.cache_digests >= 0) & ~has_record & has_image
        rows = np.flatnonzero(is_unrecorded).tolist()
        # On a slow drive, the headers of thousands of images take minutes.
        bar = tqdm(rows, desc='Records', unit='image', delay=1, disable=None)
        for row in until_stopped(bar):
            header = load_header(self.images.paths[row])
            self.try_to_save_record(row, None, int(self.cache_digests[row]), header)

    def compare_contents(self, records: dict[int, CacheRecord]) -> Iterator[tuple[int, bool]]:
        """Yields (row, whether its contents are those of its record), given {row: record}.

        Images that cannot be read are left out. Records new modification times of unchanged images,
        and headers that could not be read before.
        """
        rows = np.array(list(records), int)
        paths = [self.images.paths[row] for row in rows]
        for row, image_digest in until_stopped(load_digests(rows, paths)):
            record = records[row]
            # The digest is None if trust_unrecorded() made the record: it does not read the image.
            # Then an image of the same size counts as unchanged.
            is_unchanged = record.digest in (image_digest, None)
            if is_unchanged:
                header = Header(record.orientation, record.bits)
                # With --upright, an image whose header could not be read was not turned. Its record
                # says so until its bottleneck is computed again.
                is_to_read = record.lacks_header and not self.backbone.is_upright
                # With NO_TIME, it may be that of other contents, which the image had for a while.
                if record.digest is None or record.time == NO_TIME or is_to_read:
                    header = load_header(self.images.paths[row])
                self.try_to_save_record(row, int(image_digest), record.outcome, header)
            yield int(row), is_unchanged

    def compare(self) -> tuple[np.ndarray, dict[int, str]]:
        """Returns the rows to compute, and {row: reason} of images that cannot be decoded.

        An image is read only if its record has another modification time, or no header, but fits in
        all else.
        """
        self.trust_unrecorded()
        fitting = {
            row: record
            for row, record in enumerate(self.records)
            if record and self.fits(row, record)
        }
        # An image that is not read, or cannot be, is unchanged if its time is.
        is_unchanged = {
            row: record.time == self.statuses[row].modified for row, record in fitting.items()
        }
        to_read = {
            row: record
            for row, record in fitting.items()
            if record.lacks_header or not is_unchanged[row]
        }
        is_unchanged.update(self.compare_contents(to_read))
        outcomes = {row: record.outcome for row, record in fitting.items() if is_unchanged[row]}
        reasons = {row: reason for row, reason in outcomes.items() if isinstance(reason, str)}
        return np.setdiff1d(np.arange(len(self.paths)), list(outcomes)), reasons

    def report_recomputed(self, rows: np.ndarray) -> None:
        """Prints why bottlenecks are computed although there is a cache file.

        Raises UserError if a folder is in the place of a cache file.
        """
        for row in rows:
            path = self.paths[row]
            record = self.records[row]
            if gfile.isdir(path):
                raise UserError(f"--bottleneck_dir: '{path}' is a folder. Delete it.")
            if self.cache_digests[row] < 0:
                # Unlike exists(), this does not end the run if the drive fails.
                reason = 'Invalid float found' if gfile.exists(path) else ''
            elif record is UNREADABLE_RECORD:
                reason = 'The record cannot be read'
            elif record and record.outcome == self.cache_digests[row]:
                reason = 'The image or the model changed'
            else:
                reason = 'The cache file is not the one that was written'
            if reason:
                print(f'{reason}, recreating bottleneck {escape(path)}')

    def write(self, row: int, image_digest: int, text: bytes, cache_digest: int) -> None:
        """Writes a cache file, and the record that it is of an image with this digest."""
        path = self.paths[row]
        tqdm.write(f'Creating bottleneck at {escape(path)}')
        try:
            header = load_header(self.images.paths[row])
            self.save_record(row, image_digest, cache_digest, header)
            self.write_file(path, text)
        except tf.errors.OpError as error:
            # Linux says so itself, by an InvalidArgumentError, and Windows does not.
            is_name_refused = isinstance(error, tf.errors.InvalidArgumentError) or is_too_long(
                self.record_paths[row]
            )
            if not is_name_refused:
                raise
            tqdm.write(
                f'WARNING: {escape(path)}: the name is too long, or the drive does not allow it. '
                'Each run computes this bottleneck.'
            )
            return
        self.written += 1
        if self.written % 100 == 0:
            tqdm.write(f'{self.written} bottleneck files created.')

    def write_batch(
        self, rows: np.ndarray, image_digests: np.ndarray, bottlenecks: np.ndarray
    ) -> None:
        """Writes the cache files and records of a batch that compute_bottlenecks() yields."""
        texts = [to_text(bottleneck) for bottleneck in bottlenecks]
        cache_digests = compute_digest(texts).numpy()  # a call takes longer than all the digests
        for row, image_digest, text, cache_digest in until_stopped(
            zip(rows.tolist(), image_digests.tolist(), texts, cache_digests.tolist(), strict=True)
        ):
            self.write(row, image_digest, text, cache_digest)

    def check(self, rows: np.ndarray, bottlenecks: np.ndarray) -> None:
        """Raises UserError if bottlenecks are not finite."""
        is_finite = np.isfinite(bottlenecks).all(axis=1)
        if not is_finite.all():
            names = name_some([self.images.paths[row] for row in rows[~is_finite]])
            remedy = 'Remove them.'
            if len(rows) > 1 and not is_finite.any():  # of the whole batch
                remedy = 'Download the model again.'
            source = self.backbone.source
            raise UserError(f'{source} gives numbers that are not finite for {names}. {remedy}')

    def compute(
        self, rows: np.ndarray, service: str | None, is_strict: bool, bar: tqdm
    ) -> np.ndarray:
        """Computes and writes the bottlenecks of some rows; returns those that have none after it.

        With `is_strict`, it ends soon after one has failed, which is the first of those returned.
        A service must be called without it: its batches come in any order.
        """
        left = set(rows.tolist())
        paths = [self.images.paths[row] for row in rows]
        batches = compute_bottlenecks(rows, paths, self.backbone, service=service)
        for found_rows, image_digests, bottlenecks in batches:
            self.check(found_rows, bottlenecks)
            self.bottlenecks[found_rows] = bottlenecks
            self.write_batch(found_rows, image_digests, bottlenecks)
            left.difference_update(found_rows.tolist())
            bar.update(len(found_rows))
            if not left:  # a service may wait for a worker that has gone
                break
            # Rows come in order. So a row below the last one found has failed, if it is left.
            if is_strict and min(left) < found_rows.max():
                break
        return np.array(sorted(left), int)

    def fill(self, rows: np.ndarray, flags: argparse.Namespace) -> dict[int, str]:
        """Computes and writes the bottlenecks of some rows; returns {row: reason} of failures."""
        self.report_recomputed(rows)
        if flags.tfhub_module:
            ensure_independent(self.backbone)
        with tqdm(total=len(rows), desc='Bottlenecks', unit='image', disable=None) as bar:
            left = rows
            if flags.data_service:
                left = self.compute(rows, flags.data_service, False, bar)
                paths = [self.images.paths[row] for row in left]
                report_left_out(paths, len(rows), flags.data_service)
            failed = self.compute(left, None, flags.strict, bar)
        if flags.strict:
            failed = failed[:1]  # those behind it may not have been tried
        ensure_folders_are_there(self.images.paths[row] for row in failed)
        reasons = {}
        for row in until_stopped(failed):
            reasons[row], image_digest = explain_unreadable(self.images.paths[row])
            if image_digest is not None:
                self.try_to_save_record(row, image_digest, reasons[row], Header())
        return reasons


def report_left_out(paths: list[str], count: int, service: str) -> None:
    """Warns how many JPEG and PNG images, of `count`, a service has left out.

    It cannot decode other formats.
    """
    starts = [read_start(path) for path in paths]
    left_out = sum(start in (JPEG, PNG) for start in starts)
    if left_out:
        tqdm.write(
            f'WARNING: {service} left out {left_out} of {count} images. They are tried here.'
        )


def read_start(path: str) -> bytes:
    """Returns the first two bytes of a file, or none if it cannot be read."""
    with contextlib.suppress(UserError, tf.errors.OpError), open_file(path) as file:
        return file.read(2)
    return b''


def report_unreadable(images: Images, reasons: dict[int, str], is_strict: bool) -> None:
    """Names the images that are left out; if `is_strict`, raises UserError for the first one."""
    for row, reason in sorted(reasons.items()):
        line = f'{images.paths[row]!r} is left out: {escape(reason)}'
        if is_strict:
            raise UserError(f'--strict: {line}. Replace or delete it.')
        print(f'WARNING: {line}')
    if reasons:
        print(
            f'WARNING: {len(reasons)} of {len(images.files)} images are left out. Replace or '
            'delete them.'
        )


def report_headers(records: list[CacheRecord | None], is_upright: bool) -> int:
    """Warns of images that look different in other programs; returns how many are sideways."""
    known = [record for record in records if record]
    sideways = sum(record.orientation in range(2, 9) for record in known)
    if sideways and not is_upright:
        print(
            'WARNING: images that the camera stored sideways, and that are used as stored: '
            f'{sideways}. Add --upright to turn them, here and to tf_test.py.'
        )
    unknown = sum(record.bits is None for record in known)
    if unknown:
        print(
            'WARNING: images whose orientation cannot be read, and that are used as stored: '
            f'{unknown}. If they lie on their side, open them, and save them again.'
        )
    deep = sum(record.bits == 16 for record in known)
    if deep:
        print(
            'WARNING: images with 16 bits per sample, of which the upper 8 are used: '
            f'{deep}. See data/README.md if they have fewer bits, and so look black.'
        )
    return sideways


def cache_bottlenecks(
    images: Images, backbone: Backbone, flags: argparse.Namespace
) -> tuple[Images, np.ndarray, dict[str, Any]]:
    """Returns the images that can be read, and their bottlenecks, float32 [images, size].

    The third value is what the record of the run says of the images. Raises UserError if none of a
    class can be read.

    What was computed is not read again: a float32 that is written as text and parsed is the same
    number.
    """
    cache = BottleneckCache(images, backbone, flags.bottleneck_dir)
    missing, reasons = cache.compare()
    ends_at_once = flags.strict and bool(reasons)  # report_unreadable() raises
    if missing.size and not ends_at_once:
        if not all(map(cache.is_unusable, missing)):
            ensure_writable_dir(flags.bottleneck_dir, '--bottleneck_dir')
        reasons |= cache.fill(missing, flags)
    report_unreadable(images, reasons, flags.strict)
    readable = np.ones(len(images.files), bool)
    readable[list(reasons)] = False
    records = list(itertools.compress(cache.records, readable))
    sideways = report_headers(records, backbone.is_upright)
    lost = np.setdiff1d(images.classes, images.classes[readable])
    if lost.size:
        folder = os.path.dirname(images.files[images.classes == lost[0]][0])
        raise UserError(
            f"No image in the class folder '{folder}' can be read. Add some, or remove the folder."
        )
    facts = {'sideways': sideways, 'unreadable': len(reasons)}
    if not reasons:
        return images, cache.bottlenecks, facts  # without a copy
    return images.keep(readable), cache.bottlenecks[readable], facts


# What the images say

DUPLICATE_SIMILARITY = 0.99  # cosine of two bottlenecks
MAX_COMPARED = 25_000  # images: of more, comparing all pairs would take many seconds
FOLDS = 5  # of the cross-validation


def get_scale(bottlenecks: np.ndarray) -> np.ndarray:
    """Returns the factor that scales each bottleneck to length 1, float [N, 1].

    It is 0 for a bottleneck whose own numbers are all the same, such as 0: this says nothing about
    the image, which so is similar to no other.
    """
    lengths = np.linalg.norm(bottlenecks, axis=1, keepdims=True)
    is_constant = np.ptp(bottlenecks, axis=1, keepdims=True) == 0
    return np.where(is_constant, 0, 1 / lengths)


def to_units(bottlenecks: np.ndarray) -> np.ndarray:
    """Returns bottlenecks, float [N, size], scaled to length 1."""
    return bottlenecks * get_scale(bottlenecks)


def get_group_norms(bottlenecks: np.ndarray) -> np.ndarray:
    """Returns the norms of groups of eight numbers of each bottleneck, [N, ceil(size / 8)]."""
    starts = np.arange(0, bottlenecks.shape[1], 8)
    blocks = np.array_split(bottlenecks, 1 + len(bottlenecks) // 1024)
    squares = [np.add.reduceat(np.square(block), starts, axis=1) for block in blocks]
    return np.sqrt(np.concatenate(squares))


def compare_bottlenecks(bottlenecks: np.ndarray, rows: np.ndarray) -> Iterator:
    """Yields (some of the rows, others, their cosine similarities, float [rows, others]).

    Others are rows of any images. Together, the blocks hold all pairs of a row and another image
    whose similarity is DUPLICATE_SIMILARITY or more. An image's similarity to itself is set to 0.

    The dot product of two bottlenecks is at most that of their group norms, which are vectors of an
    eighth of the length (Cauchy-Schwarz inequality). This bound rules out most pairs.
    """
    scale = get_scale(bottlenecks)
    norms = tf.constant(get_group_norms(bottlenecks) * scale)
    for block in until_stopped(np.split(rows, range(512, len(rows), 512))):
        # The products are TensorFlow's, which uses all cores.
        bounds = tf.matmul(tf.gather(norms, block), norms, transpose_b=True).numpy()
        bounds[np.arange(len(block)), block] = 0
        may_be_near = bounds > DUPLICATE_SIMILARITY - 1e-4  # for what is lost by rounding
        candidates = block[may_be_near.any(axis=1)]
        others = np.flatnonzero(may_be_near.any(axis=0))
        if candidates.size:
            units = bottlenecks[candidates] * scale[candidates]
            other_units = bottlenecks[others] * scale[others]
            similarity = tf.matmul(units, other_units, transpose_b=True).numpy()
            similarity[candidates[:, None] == others] = 0
            yield candidates, others, similarity


class NearCopy(NamedTuple):
    """An image and the worst of its near copies. The larger of two such tuples is the worse."""

    has_other_label: bool
    has_leaked: bool  # the image is for validation or test, and any near copy is for training
    similarity: float
    row: int
    other: int


def prefer(candidates: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the wanted candidates of each row if there are any, else all, bool [rows, others]."""
    wanted_candidates = candidates & wanted
    has_wanted = wanted_candidates.any(axis=1, keepdims=True)
    return np.where(has_wanted, wanted_candidates, candidates)


def find_near_copies(images: Images, bottlenecks: np.ndarray) -> list[NearCopy]:
    """Returns each image that has near copies with the worst of them; the worst images come first.

    Of more than MAX_COMPARED images, those for training are not compared with each other.
    """
    rows = np.arange(len(images.files))
    if len(rows) > MAX_COMPARED:
        rows = np.flatnonzero(images.sets != 'training')
    blocks = compare_bottlenecks(bottlenecks, rows)
    found = [copy for block in blocks for copy in choose_worst(images, *block)]
    return sorted(found, reverse=True)


def choose_worst(
    images: Images, rows: np.ndarray, others: np.ndarray, similarity: np.ndarray
) -> Iterator[NearCopy]:
    """Yields the worst near copy of each of the rows that have any.

    Preferred are, in this order, near copies with another label, near copies for training of an
    image for validation or test, and the most similar ones. Variants by `_nohash_` with one label,
    in one set, are meant to be alike, and do not count.
    """
    is_other_label = images.classes[rows, None] != images.classes[others]
    is_training = images.sets == 'training'
    is_leak = is_training[others] & ~is_training[rows, None]
    is_variant = images.stems[rows, None] == images.stems[others]
    is_meant = is_variant & ~is_other_label & ~is_leak
    is_near = (similarity >= DUPLICATE_SIMILARITY) & ~is_meant
    has_leaked = (is_near & is_leak).any(axis=1)  # by any of them, not only by the worst
    preferred = prefer(is_near, is_other_label)
    preferred = prefer(preferred, is_leak)
    columns = np.where(preferred, similarity, -1).argmax(axis=1)
    for index in np.flatnonzero(is_near.any(axis=1)):
        column = columns[index]
        yield NearCopy(
            has_other_label=is_other_label[index, column],
            has_leaked=has_leaked[index],
            similarity=similarity[index, column],
            row=rows[index],
            other=others[column],
        )


def get_pairs(near_copies: list[NearCopy]) -> list[tuple[int, int]]:
    """Returns the pairs of rows. Most of them have been found twice, by both images."""
    pairs = [(int(copy.row), int(copy.other)) for copy in near_copies]
    return list(dict.fromkeys((min(pair), max(pair)) for pair in pairs))


def report_near_copies(images: Images, near_copies: list[NearCopy], print_all: bool) -> int:
    """Prints what near copies there are, and names ten pairs or all; returns how many pairs.

    These are pairs of an image and the worst of its near copies.
    """
    pairs = get_pairs(near_copies)
    mislabeled = sum(images.classes[row] != images.classes[other] for row, other in pairs)
    if mislabeled:
        print(
            f'WARNING: pairs of near copies with different labels: {mislabeled}. Delete what is in '
            'the wrong folder.'
        )
    leaked = sum(copy.has_leaked for copy in near_copies)
    if leaked:
        print(
            f'WARNING: validation or test images with near copies in the training set: {leaked}. '
            'They make the accuracy look better than it is: delete one of each pair.'
        )
    if pairs:
        print('Near copies, the worst first:')
    for row, other in pairs if print_all else pairs[:10]:
        first = f'{images.paths[row]} ({images.sets[row]})'
        second = f'{images.paths[other]} ({images.sets[other]})'
        print(escape(f'  {first}, {second}'))
    if len(pairs) > 10 and not print_all:
        print(f'  and {len(pairs) - 10} more pairs of near copies, which --print_duplicates names')
    if len(images.files) > MAX_COMPARED:
        print(
            'Training images were not compared with each other for near copies: there are too many.'
        )
    return len(pairs)


def cross_validate(images: Images, bottlenecks: np.ndarray, flags: argparse.Namespace) -> Iterator:
    """Yields (rows, scores) until all images are scored, by layers that were not trained on them.

    The scores, float [rows, classes], come from FOLDS layers. Each is trained on all folds but one,
    and scores that one. All scores together would fill the memory if there are many classes.
    """
    rng = create_rng(flags.random_seed, 'cross-validation')
    total = FOLDS * flags.how_many_training_steps
    # As rows are sorted by class, each class is spread evenly.
    folds = np.arange(len(images.files)) % FOLDS
    with tqdm(total=total, desc='Cross-validation', unit='step', delay=1, disable=None) as bar:
        for fold_index in range(FOLDS):
            sets = np.where(folds == fold_index, 'testing', 'training')
            split = dataclasses.replace(images, sets=sets)
            layer = train_fold(split, bottlenecks, rng, bar, flags)
            rows = split.rows['testing']
            for block, evaluation in evaluate_blocks(layer, images, bottlenecks, rows):
                yield block, evaluation.scores


def train_fold(
    split: Images,
    bottlenecks: np.ndarray,
    rng: np.random.Generator,
    bar: tqdm,
    flags: argparse.Namespace,
) -> 'FinalLayer':
    """Returns a layer that was trained on the training images of a split."""
    seed = rng.integers(2**31, size=2)
    layer = create_layer(bottlenecks.shape[1], len(split.labels), flags.learning_rate, seed)
    for _ in until_stopped(range(flags.how_many_training_steps)):
        rows = split.draw('training', flags.train_batch_size, rng)
        layer.train(bottlenecks[rows], split.classes[rows])
        bar.update()
    return layer


def report_suspects(images: Images, scored: Iterable, flags: argparse.Namespace) -> None:
    """Names the images whose own label has the lowest score, and shows them in TensorBoard.

    `scored` yields (rows, scores) as cross_validate does.

    With wrong labels put on 73 of the 3,670 tutorial flowers, the first 73 suspects have 76 % of
    them. By the off-diagonal of confident learning (Northcutt et al. 2021,
    https://arxiv.org/abs/1911.00068), it is 70 % (tests/benchmark.py).
    """
    own_scores = np.zeros(len(images.files))
    best_scores = np.zeros(len(images.files))
    best_classes = np.zeros(len(images.files), int)
    for rows, scores in scored:
        own_scores[rows] = scores[np.arange(len(rows)), images.classes[rows]]
        best_scores[rows] = scores.max(axis=1)
        best_classes[rows] = scores.argmax(axis=1)
    print('=== SUSPECT IMAGES ===')
    pictures: dict[str, Image.Image] = {}
    for row in np.argsort(own_scores, kind='stable')[: flags.find_suspects]:
        own = f'{images.labels[images.classes[row]]} {own_scores[row]:.2f}'
        words = f'{own}  {images.labels[best_classes[row]]} {best_scores[row]:.2f}'
        print(escape(f'{images.paths[row]:>70}  {words}'))
        if len(pictures) < SHOWN_IMAGES:
            thumbnail = load_thumbnail(images.paths[row], flags.upright)
            pictures[f'{words}/{images.files[row]}'] = thumbnail
    print(
        'Look at these images, here or in TensorBoard. Move those in a wrong folder, and run the '
        'same command again.'
    )
    single = np.flatnonzero(np.bincount(images.classes) == 1)
    if single.size:
        names = name_some([images.labels[index] for index in single])
        print(f'Of these classes, the only image is always a suspect: {names}')
    SummaryWriter(os.path.join(flags.summaries_dir, 'suspects')).write(pictures)


# Final layer

NUMPY_CLASSES = 1000  # with more, TensorFlow on two cores is faster than NumPy on one
EVALUATED_ROWS = 512  # at once: the scores of 10,000 classes take 20 MB


class Evaluation(NamedTuple):
    """The outputs of the final layer for N bottlenecks, and how good they are."""

    logits: np.ndarray  # float [N, classes]
    scores: np.ndarray  # their softmax
    cross_entropy: float  # mean over the N
    accuracy: float  # share of the N whose best score is that of their class


class FinalLayer:
    """The new last layer: softmax(bottlenecks @ weights + biases).

    Weights, [bottleneck size, classes], are initialized from a truncated normal of stddev 0.001,
    biases with 0. The loss is the mean softmax cross entropy of the batch, minimized by plain
    stochastic gradient descent. It is in NumPy, as a step is two small matrix products, which take
    a third of the time of a call into TensorFlow. With many classes, WideLayer is faster.
    """

    def __init__(
        self, bottleneck_size: int, class_count: int, learning_rate: float, seed: np.ndarray
    ) -> None:
        shape = [bottleneck_size, class_count]
        self.weights = tf.random.stateless_truncated_normal(shape, seed, stddev=0.001).numpy()
        self.biases = np.zeros(class_count, np.float32)
        self.learning_rate = np.float32(learning_rate)
        self.steps = 0

    def evaluate(self, bottlenecks: np.ndarray, classes: np.ndarray) -> Evaluation:
        """Evaluates bottlenecks, float [N, size], of classes, int [N].

        Raises UserError if the training has diverged.
        """
        logits = self.multiply(bottlenecks) + self.biases
        # exp() of the logits themselves may overflow.
        shifted = logits - logits.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)
        sums = exponentials.sum(axis=1, keepdims=True)
        own_logits = shifted[np.arange(len(classes)), classes]
        cross_entropy = (np.log(sums[:, 0]) - own_logits).mean()
        if not np.isfinite(cross_entropy):
            raise UserError(
                f'--learning_rate: the cross entropy is not finite after {self.steps} steps. Lower '
                'it.'
            )
        accuracy = (logits.argmax(axis=1) == classes).mean()
        return Evaluation(logits, exponentials / sums, cross_entropy, accuracy)

    def train(self, bottlenecks: np.ndarray, classes: np.ndarray) -> Evaluation:
        """Takes one step, and returns the evaluation of the batch as it was before the step."""
        before = self.evaluate(bottlenecks, classes)
        # The gradient of the loss with respect to the logits is (scores - one-hot labels) / N.
        step = before.scores.copy()
        step[np.arange(len(classes)), classes] -= 1
        step *= self.learning_rate / len(classes)
        self.move_weights(bottlenecks, step)
        self.biases -= step.sum(axis=0)
        self.steps += 1
        return before

    def multiply(self, bottlenecks: np.ndarray) -> np.ndarray:
        """Returns the product of bottlenecks, float [N, size], and the weights."""
        return bottlenecks @ self.weights

    def move_weights(self, bottlenecks: np.ndarray, step: np.ndarray) -> None:
        """Takes the step of the weights.

        `step`, float [N, classes], is the gradient of the logits times the learning rate.
        """
        self.weights -= bottlenecks.T @ step


class WideLayer(FinalLayer):
    """The same with many classes: TensorFlow has the weights, and multiplies on all cores."""

    @property
    def weights(self) -> np.ndarray:  # type: ignore[override]
        return self.variable.numpy()

    @weights.setter
    def weights(self, weights: np.ndarray) -> None:
        self.variable = tf.Variable(weights)

    def multiply(self, bottlenecks: np.ndarray) -> np.ndarray:
        return tf.matmul(bottlenecks, self.variable).numpy()

    def move_weights(self, bottlenecks: np.ndarray, step: np.ndarray) -> None:
        product = tf.matmul(bottlenecks, step, transpose_a=True)
        self.variable.assign_sub(product, read_value=False)


def create_layer(
    bottleneck_size: int, class_count: int, learning_rate: float, seed: np.ndarray
) -> FinalLayer:
    """Returns an untrained layer, the faster one for this many classes."""
    kind = FinalLayer if class_count <= NUMPY_CLASSES else WideLayer
    return kind(bottleneck_size, class_count, learning_rate, seed)


def evaluate_blocks(
    layer: FinalLayer, images: Images, bottlenecks: np.ndarray, rows: np.ndarray
) -> Iterator:
    """Yields (some of the rows, their Evaluation) until all rows are evaluated."""
    for start in range(0, len(rows), EVALUATED_ROWS):
        block = rows[start : start + EVALUATED_ROWS]
        yield block, layer.evaluate(bottlenecks[block], images.classes[block])


# Familiarity

NEIGHBOR = 3  # an image is as similar as its third nearest training image
# The graph has this many training images to compare with, or one per class if these are more.
REFERENCES = 500
MAX_REFERENCES = 5_000  # 40 MB
MAX_OWN_IMAGES = 2_500  # whose similarities are in the graph
ROUNDING = 1e-6  # of a similarity, which has other last digits in a batch of another size


class Familiarity(NamedTuple):
    """What the familiarity of a new image, a number in 0..1, is computed from.

    That is the share of the user's images whose similarity is no higher than that of the new image.
    The similarity of an image is the cosine of its bottleneck and that of its third nearest
    reference. This is a conformal p-value (Bates et al. 2023, https://arxiv.org/abs/2104.08279)
    without the 1 that is added to numerator and denominator.
    """

    references: np.ndarray  # training images: bottlenecks of length 1, float32 [R, bottleneck size]
    similarities: np.ndarray  # those of the user's images, float32 [M]


def choose_references(images: Images, rng: np.random.Generator) -> np.ndarray:
    """Returns rows of training images, drawn in turns: one of each class, then another of each.

    It stops when there are enough.
    """
    rows = rng.permutation(images.rows['training'])
    rows = rows[np.argsort(images.classes[rows], kind='stable')]
    # Sorted by their place in their class (0, 1, 2, ...), the images of all classes take turns.
    places = np.concatenate([np.arange(count) for count in images.counts['training']])
    limit = min(max(REFERENCES, len(images.labels)), MAX_REFERENCES)
    return rows[np.argsort(places, kind='stable')][:limit]


def get_neighbor(reference_count: int) -> int:
    """Returns which of the nearest references tells how similar an image is: 3, the third, or less.

    A training image has one reference less: itself does not count.
    """
    return max(1, min(NEIGHBOR, reference_count - 1))


def measure_similarities(
    images: Images, bottlenecks: np.ndarray, rows: np.ndarray, references: np.ndarray
) -> np.ndarray:
    """Returns the similarity of each of the rows to the references, which are rows too: float [N].

    Own images must not look more familiar than new ones. So an image is compared neither with
    itself nor with near copies, such as other pictures of a burst, as long as choose_neighbors()
    finds enough others.
    """
    neighbor = get_neighbor(len(references))
    reference_units = to_units(bottlenecks[references])
    similarities = []
    for block in np.array_split(rows, 1 + len(rows) // 1024):
        units = to_units(bottlenecks[block])
        cosines = tf.matmul(units, reference_units, transpose_b=True).numpy()
        is_other = block[:, None] != references
        is_distinct = is_other & (cosines < DUPLICATE_SIMILARITY)
        is_own_class = images.classes[block, None] == images.classes[references]
        is_neighbor = choose_neighbors(is_other, is_distinct, is_own_class, neighbor)
        cosines = np.where(is_neighbor, cosines, -1)
        similarities.append(np.partition(cosines, -neighbor, axis=1)[:, -neighbor])
    return np.float32(np.concatenate(similarities))


def choose_neighbors(
    is_other: np.ndarray, is_distinct: np.ndarray, is_own_class: np.ndarray, needed: int
) -> np.ndarray:
    """Returns which references an image is compared with, all bool [N, references].

    is_other holds for all but the image itself, and is_distinct for those of them that are no near
    copies of it. The distinct ones are chosen if both hold:
    - There are at least `needed` of them.
    - At least min(needed, half of the other references of the image's class) of them are of this
      class. Near copies are among these other references.
    Otherwise, the nearest ones would be of other classes, and the image would look unfamiliar. So
    near copies count then, too.
    """
    count = functools.partial(np.sum, axis=1, keepdims=True)
    needed_of_class = np.minimum(needed, count(is_other & is_own_class) / 2)
    has_enough_of_class = count(is_distinct & is_own_class) >= needed_of_class
    has_enough = has_enough_of_class & (count(is_distinct) >= needed)
    return np.where(has_enough, is_distinct, is_other)


def find_familiarity(
    images: Images, bottlenecks: np.ndarray, flags: argparse.Namespace
) -> Familiarity:
    """Returns reference images, and the similarities of the user's images to them.

    With --find_suspects, names the user's least familiar images.
    """
    rng = create_rng(flags.random_seed, 'familiarity')
    references = choose_references(images, rng)
    rows = np.arange(len(images.files))
    sample = np.sort(rng.permutation(rows)[:MAX_OWN_IMAGES])
    similarities = measure_similarities(images, bottlenecks, sample, references)
    units = to_units(bottlenecks[references])
    # Later, an image of the user's own is compared with its own similarity.
    familiarity = Familiarity(np.float32(units), np.float32(similarities - ROUNDING))
    if flags.find_suspects:
        of_all = measure_similarities(images, bottlenecks, rows, references)
        report_least_familiar(images, of_all, familiarity, flags.find_suspects)
    return familiarity


def report_least_familiar(
    images: Images, similarities: np.ndarray, familiarity: Familiarity, count: int
) -> None:
    """Names the `count` images with the lowest similarities: they may belong to no class."""
    print('=== LEAST FAMILIAR IMAGES ===')
    for row in np.argsort(similarities, kind='stable')[:count]:
        share = (familiarity.similarities <= similarities[row]).mean()
        label = images.labels[images.classes[row]]
        print(escape(f'{images.paths[row]:>70}  {label}  familiarity {share:.4f}'))


def compute_familiarity(bottlenecks: tf.Tensor, familiarity: Familiarity) -> tf.Tensor:
    """Returns the familiarity of bottlenecks, float [N, size]: float [N].

    It uses only ops that TensorFlow 1.15 has, too.
    """
    squares = tf.reduce_sum(tf.square(bottlenecks), axis=1, keepdims=True)
    units = bottlenecks * tf.math.rsqrt(tf.maximum(squares, 1e-30))
    cosines = tf.matmul(units, familiarity.references, transpose_b=True)
    neighbor = get_neighbor(len(familiarity.references))
    nearest = tf.math.top_k(cosines, neighbor).values
    similarity = tf.reduce_min(nearest, axis=1, keepdims=True)
    is_no_more_similar = tf.less_equal(familiarity.similarities, similarity)
    return tf.reduce_mean(tf.cast(is_no_more_similar, tf.float32), axis=1)


class Head(NamedTuple):
    """What the training appends to the backbone."""

    layer: FinalLayer
    labels: list[str]
    familiarity: Familiarity | None = None  # None if it could not be computed


# Distortions

DISTORTED_STEPS = 100  # per pipeline: to build one takes as long as to read ten images


def create_distortion(flags: argparse.Namespace, size: tuple[int, int]) -> Callable | None:
    """Returns a function that distorts an image at random; None if the flags ask for none.

    distort(image, key) returns float [*size, 3]. The key, a number for each time that an image is
    used, is the seed. As in the original, an image is enlarged and then cropped:

        +--------- enlarged by --random_crop and --random_scale ---------+
        |                                                                |
        |        +----------- size -----------+                          |
        |        |  cropped at a random place |                          |
        |        +----------------------------+                          |
        +----------------------------------------------------------------+

    Then the crop may be mirrored, and its pixels are multiplied by a random factor.
    """
    spread = flags.random_brightness / 100.0
    if not (flags.flip_left_right or flags.random_crop or flags.random_scale or spread):
        return None
    root = create_rng(flags.random_seed, 'distortions').integers(2**31, size=2)

    def distort(image: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
        seeds = tf.unstack(tf.random.split(tf.random.fold_in(root, key), 4))
        largest_scale = 1.0 + flags.random_scale / 100.0
        scale = tf.random.stateless_uniform([], seeds[0], 1.0, largest_scale)
        enlarged = tf.cast((1.0 + flags.random_crop / 100.0) * scale * size, tf.int32)
        image = resize_bilinear(image[tf.newaxis], enlarged)[0]
        image = tf.image.stateless_random_crop(image, [*size, 3], seeds[1])
        if flags.flip_left_right:
            image = tf.image.stateless_random_flip_left_right(image, seeds[2])
        return image * tf.random.stateless_uniform([], seeds[3], 1.0 - spread, 1.0 + spread)

    return distort


def compute_distorted(
    draws: Iterator, images: Images, backbone: Backbone, distort: Callable
) -> Iterator:
    """Yields (rows, bottlenecks) of distorted images for each draw of rows.

    Images that can no longer be read are left out. Raises UserError if all images of a folder, or
    all training images of a class, are among them.
    """
    vanished: set[int] = set()  # rows of images that could not be read at some step
    missing: set[int] = set()  # rows of those that could not be read when they were used last
    first_key = 0
    try:
        while drawn := list(itertools.islice(draws, DISTORTED_STEPS)):
            rows = np.stack(drawn)
            # An image may be drawn more than once. So each draw has a key of its own, which is also
            # the seed of its distortion.
            keys = first_key + np.arange(rows.size).reshape(rows.shape)
            paths = [images.paths[row] for row in rows.flat]
            computed = compute_bottlenecks(keys.ravel(), paths, backbone, distort)
            steps = zip(rows, regroup(computed, keys), strict=True)
            for step_rows, (is_found, bottlenecks) in steps:
                missing.update(step_rows[~is_found].tolist())
                missing.difference_update(step_rows[is_found].tolist())
                vanished.update(missing)
                if not is_found.all():
                    ensure_folders_are_there(images.paths[row] for row in missing)
                    ensure_classes_are_there(images, missing)
                yield step_rows[is_found], bottlenecks
            first_key += rows.size
    finally:
        report_vanished({images.paths[row] for row in vanished})


def ensure_classes_are_there(images: Images, missing: set[int]) -> None:
    """Raises UserError if all training images of a class are among the missing rows."""
    training = images.rows['training']
    remaining = np.setdiff1d(training, list(missing))
    lost = np.setdiff1d(images.classes[training], images.classes[remaining])
    if lost.size:
        names = name_some([images.labels[index] for index in lost])
        raise UserError(
            f'--image_dir: none of the training images of {names} can be read any longer. Restore '
            'them.'
        )


def regroup(computed: Iterator, keys: np.ndarray) -> Iterator:
    """Yields (is_found, bottlenecks) of each step, of which `keys`, int [steps, N], has a row.

    is_found, bool [N], tells which images of the step have a bottleneck. `computed` is what
    compute_bottlenecks() yields: in the order of the keys, and in batches that need not end where
    steps do.
    """
    remaining = (
        (key, bottleneck)
        for some_keys, _, bottlenecks in computed
        for key, bottleneck in zip(some_keys, bottlenecks, strict=True)
    )
    item = next(remaining, None)
    for step_keys in keys:
        found, step_bottlenecks = [], []
        while item and item[0] <= step_keys[-1]:
            found.append(item[0])
            step_bottlenecks.append(item[1])
            item = next(remaining, None)
        yield np.isin(step_keys, found), np.array(step_bottlenecks)


def report_vanished(paths: set[str]) -> None:
    """Warns of images that could not be read again."""
    if paths:
        print(
            f'WARNING: {len(paths)} images could no longer be read, and are missing in some steps: '
            f'{name_some(sorted(paths))}'
        )


# Training


def draw_batches(
    images: Images, bottlenecks: np.ndarray, backbone: Backbone, flags: argparse.Namespace
) -> Iterator:
    """Yields (rows, bottlenecks) of a batch of training images per step."""
    rng = create_rng(flags.random_seed, 'training')
    steps = range(flags.how_many_training_steps)
    draws = (images.draw('training', flags.train_batch_size, rng) for _ in steps)
    distort = create_distortion(flags, backbone.input_format.size)
    if distort:
        return compute_distorted(draws, images, backbone, distort)
    return ((rows, bottlenecks[rows]) for rows in draws)


class Unfinished(Exception):
    """Why the batches of the remaining training steps cannot be computed."""


def start_batches(batches: Iterator) -> Iterator:
    """Computes the first of the batches, and returns all of them.

    An error in the first one is raised unchanged. An error in a later one is raised as Unfinished:
    the steps before it have learned something, which must be kept.
    """
    first = list(itertools.islice(batches, 1))
    return itertools.chain(first, with_unfinished(batches))


def with_unfinished(batches: Iterator) -> Iterator:
    """Yields batches, and raises Unfinished if one of them cannot be computed, for any reason."""
    try:
        yield from batches
    except Exception as error:
        if stop_requested.is_set():
            raise
        raise Unfinished(MEMORY_FULL if isinstance(error, MemoryError) else describe(error))


def train(
    images: Images,
    bottlenecks: np.ndarray,
    backbone: Backbone,
    start: 'Start',
    flags: argparse.Namespace,
) -> tuple[FinalLayer, str | None]:
    """Returns the final layer, which is trained, and evaluated every --eval_step_interval steps.

    Ctrl-C ends the training early. So does an error in computing distorted images: then the second
    value is its message. Raises UserError if there was nothing to train on.
    """
    layer = create_untrained_layer(images, backbone, flags)
    rng = create_rng(flags.random_seed, 'validation')
    last = flags.how_many_training_steps - 1
    problem = None
    # The first batch of distorted images may take minutes. Earlier logs are removed after it, so
    # that a run that is stopped before keeps them.
    batches = start_batches(until_stopped(draw_batches(images, bottlenecks, backbone, flags)))
    with extra('the removal of earlier logs'):
        clear_events(flags.summaries_dir, start)
    logs = open_logs(backbone, Head(layer, images.labels), flags)
    try:
        for step, (rows, batch) in enumerate(batches):
            is_evaluated = step % flags.eval_step_interval == 0 or step == last
            if rows.size:  # it is empty if none of the images of this step can be read any longer
                train_step(layer, batch, images.classes[rows], step, is_evaluated, logs['train'])
            if is_evaluated:
                drawn = images.draw('validation', flags.validation_batch_size, rng)
                validate(layer, bottlenecks[drawn], images.classes[drawn], step, logs['validation'])
        protect_outputs()  # a Ctrl-C up to here still ends the training early
    except Unfinished as error:
        protect_outputs()
        stop_requested.clear()  # a Ctrl-C just before it would stop the loops of the test, too
        problem = str(error)
    except BaseException as error:  # TensorFlow may make any other of a KeyboardInterrupt
        is_stopped = isinstance(error, KeyboardInterrupt) or stop_requested.is_set()
        if not (is_stopped and layer.steps):
            raise
        go_on_after_stop()
    if flags.how_many_training_steps and not layer.steps:
        raise UserError(
            problem or f'--image_dir: none of the drawn images can be read any longer. {KEPT}'
        )
    return layer, problem


def train_step(
    layer: FinalLayer,
    bottlenecks: np.ndarray,
    classes: np.ndarray,
    step: int,
    is_evaluated: bool,
    log: 'SummaryWriter',
) -> None:
    """Takes a training step, and logs what the layer made of this batch before the step.

    If the step is evaluated, the log also has the weights and biases after the step, and the
    original's lines say what the layer then makes of this batch.
    """
    before = layer.train(bottlenecks, classes)
    log.write(summarize(before, summarize_layer(layer) if is_evaluated else None), step=step)
    if is_evaluated:
        report_training(step, layer.evaluate(bottlenecks, classes))


def validate(
    layer: FinalLayer,
    bottlenecks: np.ndarray,
    classes: np.ndarray,
    step: int,
    log: 'SummaryWriter',
) -> None:
    """Prints and logs what the layer makes of validation images, if there are any."""
    if classes.size:
        evaluation = layer.evaluate(bottlenecks, classes)
        log.write(summarize(evaluation, summarize_layer(layer)), step=step)
        report_validation(step, evaluation)


def open_logs(
    backbone: Backbone, head: Head, flags: argparse.Namespace
) -> dict[str, 'SummaryWriter']:
    """Returns writers for the training, whose log begins with the graph, and the validation."""
    folders = {name: os.path.join(flags.summaries_dir, name) for name in ('train', 'validation')}
    writers = {name: SummaryWriter(folder) for name, folder in folders.items()}
    # The frozen graph without its weights, of which 87 MB would take long to copy.
    structure = hide_weights(backbone.graph_def)
    final_nodes = create_final_nodes(backbone, head, flags.final_tensor_name)
    structure.node.extend(hide_weights(final_nodes).node)
    writers['train'].write(graph_def=structure.SerializeToString())
    return writers


def create_untrained_layer(
    images: Images, backbone: Backbone, flags: argparse.Namespace
) -> FinalLayer:
    """Returns the final layer as it is before the first training step."""
    seed = create_rng(flags.random_seed, 'initial weights').integers(2**31, size=2)
    size = backbone.bottleneck_size
    return create_layer(size, len(images.labels), flags.learning_rate, seed)


def report_training(step: int, evaluation: Evaluation) -> None:
    """Prints the original's lines on a training batch."""
    start = f'{datetime.datetime.now()}: Step {step}:'
    print(f'{start} Train accuracy = {100 * evaluation.accuracy:.1f}%')
    print(f'{start} Cross entropy = {evaluation.cross_entropy:f}')


def report_validation(step: int, evaluation: Evaluation) -> None:
    """Prints the original's line on a validation batch."""
    count = len(evaluation.scores)
    accuracy = f'Validation accuracy = {100 * evaluation.accuracy:.1f}% (N={count})'
    print(f'{datetime.datetime.now()}: Step {step}: {accuracy}')


TABLE_CLASSES = 30  # with at most this many classes, the table has them all
WORST_CLASSES = 20  # otherwise, it has this many: those with the most errors
MATRIX_CLASSES = 200  # up to so many, there is a confusion matrix: 40,000 numbers


class Tested(NamedTuple):
    """The result of the test of N images."""

    rows: np.ndarray  # int [N]
    classes: np.ndarray  # the true ones, int [N]
    predictions: np.ndarray  # the classes that they were taken for, int [N]

    @property
    def is_wrong(self) -> np.ndarray:
        return self.predictions != self.classes

    @property
    def misclassified(self) -> Iterator[tuple[int, int]]:
        """The rows of the wrong ones, and the classes that they were taken for."""
        return zip(self.rows[self.is_wrong], self.predictions[self.is_wrong], strict=True)

    def measure(self) -> tuple[int, int, tuple[float, float]]:
        """Returns how many are right, how many were tested, and the interval of the accuracy."""
        right = int((~self.is_wrong).sum())
        return right, len(self.rows), get_interval(right, len(self.rows))

    def count_confusion(self, class_count: int) -> np.ndarray:
        """Returns the confusion matrix: counts, int [true class, predicted class]."""
        shape = class_count, class_count
        cells = np.ravel_multi_index((self.classes, self.predictions), shape)
        return np.bincount(cells, minlength=class_count**2).reshape(shape)

    def count_cells(self) -> np.ndarray:
        """Returns the cells of the matrix that are not 0: int [cells, (true, predicted, count)]."""
        pairs = np.stack([self.classes, self.predictions], axis=1)
        cells, counts = np.unique(pairs, axis=0, return_counts=True)
        return np.column_stack([cells, counts])


def test(
    images: Images, bottlenecks: np.ndarray, layer: FinalLayer, flags: argparse.Namespace
) -> Tested | None:
    """Tests the layer on images that it was not trained on; returns None if there are none."""
    rows = images.rows['testing']
    if not rows.size:
        return None
    if 0 < flags.test_batch_size < rows.size:
        rng = create_rng(flags.random_seed, 'test')
        rows = np.sort(rng.choice(rows, flags.test_batch_size, replace=False))
    blocks = evaluate_blocks(layer, images, bottlenecks, rows)
    predictions = [evaluation.logits.argmax(axis=1) for _, evaluation in blocks]
    return Tested(rows, images.classes[rows], np.concatenate(predictions))


def get_interval(right: float, count: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a share (Wilson 1927, https://doi.org/10.2307/2276774)."""
    z = 1.96
    share = right / count
    widening = 1 + z * z / count
    center = (share + z * z / (2 * count)) / widening
    variance = share * (1 - share) / count + z * z / (4 * count * count)
    half_width = z * math.sqrt(variance) / widening
    return max(0.0, center - half_width), min(1.0, center + half_width)


def count_for_half_interval(right: int, count: int) -> int:
    """Returns how many images of the same accuracy have an interval of half the width."""

    def get_width(size: int) -> float:
        low, high = get_interval(right / count * size, size)
        return high - low

    largest = get_width(count) / 2
    return next(size for size in itertools.count(count) if get_width(size) <= largest)


def report_test(images: Images, tested: Tested | None, flags: argparse.Namespace) -> None:
    """Prints the accuracy on the test set, as a whole and per class.

    --print_misclassified_test_images adds the misclassified images.
    """
    if not tested:
        remedy = 'Add images, or raise --testing_percentage.'
        if 'testing' in images.set_folders.values():
            remedy = 'Add images that can be read to the test folder.'
        print(f'Final test accuracy: unknown, as the test set is empty. {remedy}')
        return
    right, count, (low, high) = tested.measure()
    print(f'Final test accuracy = {100 * right / count:.1f}% (N={count})')
    advice = ''
    if high - low > 0.1:
        needed = count_for_half_interval(right, count)
        advice = f' About {needed} test images would halve the width of the interval.'
    print(f'95% confidence interval: {100 * low:.1f} to {100 * high:.1f}%.{advice}')
    print_table(tested.classes, tested.predictions, images.labels)
    if len(images.labels) > TABLE_CLASSES:
        print(f'{get_record_path(flags.output_graph)} has the counts of all classes.')
    if flags.print_misclassified_test_images:
        print('=== MISCLASSIFIED TEST IMAGES ===')
        for row, predicted in tested.misclassified:
            print(escape(f'{images.paths[row]:>70}  {images.labels[predicted]}'))


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


# Outputs

SAVED_MODEL = 'the SavedModel'  # an output of retrain_serving.py
EARLIER_OUTPUTS = 'The outputs of an earlier training are as they were.'


def freeze(value: np.ndarray, name: str) -> tf.Tensor:
    """Returns a constant behind an Identity, as TensorFlow freezes a variable."""
    return tf.identity(tf.constant(value, name=name), f'{name}/read')


def create_final_nodes(backbone: Backbone, head: Head, final_tensor_name: str) -> GraphDef:
    """Returns the nodes of the head: those of the original, with their names, and two more outputs.

    These are the labels, to tell a labels file of another training from the right one, and the
    familiarity.
    """
    trained_weights = head.layer.weights  # a WideLayer cannot read them while a graph is built
    with tf.Graph().as_default() as graph:
        source = tf.compat.v1.placeholder(tf.float32, name=backbone.bottleneck)
        fed = tf.compat.v1.placeholder_with_default(
            source, [None, backbone.bottleneck_size], 'input/BottleneckInputPlaceholder'
        )
        weights = freeze(trained_weights, f'{FINAL_SCOPE}/weights/final_weights')
        biases = freeze(head.layer.biases, f'{FINAL_SCOPE}/biases/final_biases')
        product = tf.matmul(fed, weights, name=f'{FINAL_SCOPE}/Wx_plus_b/MatMul')
        logits = tf.add(product, biases, f'{FINAL_SCOPE}/Wx_plus_b/add')
        tf.constant(head.labels, name=f'{FINAL_SCOPE}/labels')
        if head.familiarity:
            # With a slash, a scope does not reserve its name: it is left for the output below.
            with tf.name_scope(f'{FAMILIARITY_NODE}/'):
                result = compute_familiarity(fed, head.familiarity)
            tf.identity(result, FAMILIARITY_NODE)
        # The last node: tf_test.py finds the scores by this place, whatever their name is.
        tf.nn.softmax(logits, name=final_tensor_name)
    nodes = export_graph(graph)
    assert nodes.node[0].name == backbone.bottleneck
    del nodes.node[0]  # the placeholder that stands for the backbone
    return nodes


def create_frozen_graph(backbone: Backbone, head: Head, final_tensor_name: str) -> GraphDef:
    """Returns the frozen graph: the backbone's nodes as they are, and the head behind them."""
    frozen = GraphDef()
    # `versions` too: from producer 9 on, TensorFlow refuses the batch norms of 2015.
    frozen.CopyFrom(backbone.graph_def)
    frozen.node.extend(create_final_nodes(backbone, head, final_tensor_name).node)
    return frozen


def warn_of_other_labels(path: str, contents: bytes) -> None:
    """Warns if an earlier labels file has other contents."""
    if exists(path) and read_file(path) != contents:
        print(
            f'WARNING: {escape(path)} had other labels, or another order. Replace it together with '
            'the graph wherever they are used.'
        )


def create_writers(
    backbone: Backbone, head: Head, flags: argparse.Namespace
) -> dict[str, Callable]:
    """Returns {output: function that writes it} of graph, labels and optimized graph.

    That of the graph returns the CRC-32 of its file.
    """

    @functools.cache
    def create_graph() -> GraphDef:  # by a writer: if that fails, the others go on
        return create_frozen_graph(backbone, head, flags.final_tensor_name)

    def write_graph() -> int:
        contents = create_graph().SerializeToString(deterministic=True)
        write_whole(flags.output_graph, contents)
        return zlib.crc32(contents)

    def write_labels() -> None:
        lines = ''.join(f'{label}\n' for label in head.labels).encode()
        with extra('the comparison with the earlier labels'):
            warn_of_other_labels(flags.output_labels, lines)
        write_whole(flags.output_labels, lines)

    def write_optimized_graph() -> None:
        shape = [None, *backbone.input_format.size, 3]
        folded = fold(create_graph(), SCALED_INPUT_NODE, shape, flags.final_tensor_name)
        write_whole(flags.optimized_graph, folded.SerializeToString(deterministic=True))

    writers: dict[str, Callable] = {
        flags.output_graph: write_graph,
        flags.output_labels: write_labels,
    }
    if flags.optimized_graph:
        writers[flags.optimized_graph] = write_optimized_graph
    return writers


def write_outputs(writers: dict[str, Callable]) -> tuple[dict[str, Any], dict[str, str]]:
    """Calls a writer per output, whatever becomes of the others.

    Returns {output: what its writer returned} and {output: failure}.
    """
    results, failures = {}, {}
    for output, write in writers.items():
        try:
            results[output] = write()
        except Exception as error:
            failures[output] = describe(error)
    return results, failures


def create_record(
    images: Images,
    backbone: Backbone,
    head: Head,
    tested: Tested | None,
    flags: argparse.Namespace,
) -> dict[str, Any]:
    """Returns what the run did, in the order of trained_model/README.md."""
    record: dict[str, Any] = {'command': sys.argv, 'flags': vars(flags)}
    record['versions'] = {
        'python': sys.version.split()[0],
        'tensorflow': tf.__version__,
        'numpy': np.__version__,
    }
    record['network'] = {
        'source': backbone.source,
        'checksum': backbone.checksum,
        'input': {
            **backbone.input_format._asdict(),
            'tensor': f'{JPEG_DATA_NODE}:0',
            'optimized_tensor': f'{SCALED_INPUT_NODE}:0',
        },
    }
    record['labels'] = images.labels
    record['folders'] = images.folders
    record['set_folders'] = images.set_folders
    record['image_dir'] = record['real_image_dir'] = images.folder
    if '://' not in images.folder:
        record['image_dir'] = make_absolute(images.folder)
        real_path = os.path.realpath(to_bytes(images.folder))
        record['real_image_dir'] = real_path.decode(errors='surrogateescape')
    record['images'] = {
        name: dict(zip(images.labels, counts.tolist(), strict=True))
        for name, counts in images.counts.items()
    }
    if tested:
        record['test'] = describe_test(tested, len(images.labels))
    if head.familiarity:
        own = head.familiarity.similarities
        record['familiarity'] = {
            'images': len(own),
            'similarities': {str(p): float(np.percentile(own, p)) for p in (1, 5, 50)},
        }
    return record


def describe_test(tested: Tested, class_count: int) -> dict[str, Any]:
    """Returns what the record says of the test."""
    right, count, interval = tested.measure()
    facts = {'images': count, 'accuracy': right / count, 'interval': interval}
    if class_count <= MATRIX_CLASSES:
        return {**facts, 'confusion': tested.count_confusion(class_count).tolist()}
    return {**facts, 'confusion_cells': tested.count_cells().tolist()}


def get_record_path(graph: str) -> str:
    """Returns the path of the record of the run that wrote a graph."""
    return f'{graph}.json'


def write_record(record: dict[str, Any], flags: argparse.Namespace) -> None:
    """Writes the record of the run beside the graph."""
    text = json.dumps(record, indent=2)
    write_whole(get_record_path(flags.output_graph), f'{text}\n'.encode())


def rename_outputs(flags: argparse.Namespace) -> argparse.Namespace:
    """Returns flags with one more extension in the names of the outputs: '.unfinished_' and a time.

    So an unfinished training does not replace the outputs of an earlier one, which may be better.
    """
    extension = datetime.datetime.now().strftime('unfinished_%Y%m%d_%H%M%S')
    renamed = argparse.Namespace(**vars(flags))
    for name in ('output_graph', 'output_labels', 'optimized_graph'):
        path = getattr(flags, name)
        if not path:
            continue
        path = follow_link(path)
        if not is_writable_dir(os.path.dirname(path) or '.'):  # it was on the drive of the images
            # A folder per output keeps equal names apart.
            path = os.path.join(make_folder() or os.path.dirname(path), os.path.basename(path))
        setattr(renamed, name, f'{path}.{extension}')
    return renamed


def make_folder() -> str | None:
    """Returns a new folder where one can be made, or None: TMPDIR may be on the same drive."""
    for parent in (None, '/tmp', '.', os.path.expanduser('~')):
        with contextlib.suppress(OSError):
            return tempfile.mkdtemp(dir=parent)
    return None


def is_writable_dir(path: str) -> bool:
    """Tells whether a folder exists, and its rights allow to write there.

    If a drive is removed, its mount point may stay as a folder of another user.
    """
    return gfile.isdir(path) and ('://' in path or os.access(to_bytes(path), os.W_OK))


def is_in_module(path: str, flags: argparse.Namespace) -> bool:
    """Tells whether a path is the folder of the module, or lies in it."""
    module = flags.tfhub_module
    return bool(module) and gfile.isdir(module) and is_same_or_inside(path, module)


def list_outputs(flags: argparse.Namespace) -> list[tuple[str, str]]:
    """Returns (flag, path) of each file that the end of the run writes."""
    outputs = [
        ('--output_graph', flags.output_graph),
        ('--output_graph', get_record_path(flags.output_graph)),
        ('--output_labels', flags.output_labels),
    ]
    if flags.optimized_graph:
        outputs.append(('--optimized_graph', flags.optimized_graph))
    return outputs


def ensure_outside_module(folder: str, flag: str, flags: argparse.Namespace) -> None:
    """Raises UserError if the run would write into the module, and so make it another one."""
    if is_in_module(folder, flags):
        raise UserError(f'{flag}: {folder} is in the folder of the module. Name another one.')


def check_folders(flags: argparse.Namespace) -> None:
    """Raises UserError if the path of an output is that of a folder of the run, or of one above it.

    The folder need not exist yet, as in --output_graph=x with --bottleneck_dir=x/y. An output in
    the folder of a SavedModel is refused, too: such a folder must stay as it is.
    """
    outputs = list_outputs(flags)
    folders = [os.path.dirname(path) for _, path in outputs]
    folders += [os.path.join(flags.summaries_dir, name) for name in SUMMARY_FOLDERS]
    folders += [flags.bottleneck_dir, flags.model_dir]
    for flag, path in outputs:
        # As a file, the output could be neither a folder of the run nor have one in it.
        if any(is_same_or_inside(folder, path) for folder in folders):
            raise UserError(
                f"{flag}: '{path}' is used as a folder by another flag. Name another file."
            )
        parent = os.path.dirname(follow_link(path))
        if all(exists(os.path.join(parent, name)) for name in ('saved_model.pb', 'variables')):
            raise UserError(f"{flag}: '{path}' is in the folder of a SavedModel. Name another one.")


def is_model(path: str, model_dir: str) -> bool:
    """Tells whether a path is that of a pretrained network in model_dir, or of its archive.

    A file of Keras' weights counts, too: prepare_keras() makes Keras keep them in model_dir.
    """
    real_path = os.path.realpath(to_bytes(path))
    keras_folders = [os.path.join(home, 'models') for home in (model_dir, get_keras_home())]
    if real_path.endswith(b'.h5') and any(is_inside(path, folder) for folder in keras_folders):
        return True
    graph_names = [MODEL_GRAPH_NAME, *map(MOBILENET_GRAPH_NAME.format, MOBILENET_SIZES)]
    urls = [DATA_URL, *map(MOBILENET_URL.format, MOBILENET_SIZES)]
    models = [
        os.path.join(model_dir, name) for name in (*graph_names, *map(os.path.basename, urls))
    ]
    return any(os.path.realpath(to_bytes(model)) == real_path for model in models)


def is_other_file(path: str) -> bool:
    """Tells whether a file in the place of a record is something else.

    Raises UserError if there is one that cannot be read: it may be another user's.
    """
    if not exists(path):
        return False
    with open_file(path) as file:
        start = file.read(100)
    return bool(start) and b'"command"' not in start


def check_outputs(flags: argparse.Namespace) -> None:
    """Tries out what the end of the run needs, before anything is computed.

    Raises UserError if something is wrong.
    """
    outputs = list_outputs(flags)
    paths = [os.path.realpath(to_bytes(path)) for _, path in outputs]
    if len(set(paths)) < len(paths):
        names = ', '.join(dict.fromkeys(flag for flag, _ in outputs))
        raise UserError(
            f'{names} and FILE.json of --output_graph must be different files. Name others.'
        )
    for flag, path in outputs:
        ensure_utf8(path, flag)
        if gfile.isdir(path) or not os.path.basename(path):
            raise UserError(f"{flag}: '{path}' is a folder. Name a file in it.")
        if is_model(path, flags.model_dir):
            raise UserError(f'{flag}: {path} is the pretrained model. Name another file.')
        is_photograph = is_image(os.path.basename(path)) and is_inside(path, flags.image_dir)
        if is_photograph or is_in_module(path, flags):
            raise UserError(f'{flag}: {path} is what the training reads. Name another file.')
    check_folders(flags)
    ensure_outside_module(flags.bottleneck_dir, '--bottleneck_dir', flags)
    ensure_outside_module(flags.summaries_dir, '--summaries_dir', flags)
    # Only what follows creates folders. Those of a refused command would be in the way of the next.
    for flag, path in outputs:
        ensure_writable_dir(os.path.dirname(follow_link(path)), flag)
        ensure_replaceable(path, flag)
    record = get_record_path(flags.output_graph)
    if is_other_file(record):
        raise UserError(
            f"--output_graph: the record of the run would replace '{record}', which is no record. "
            'Move it, or name another graph.'
        )
    for name in SUMMARY_FOLDERS:
        ensure_writable_dir(os.path.join(flags.summaries_dir, name), '--summaries_dir')


def is_in_cache(path: str, images: Images, bottleneck_dir: str) -> bool:
    """Tells whether a path is that of a folder for cache files or records, or lies in one."""
    if not is_inside(path, bottleneck_dir):
        return False
    real_path, real_folder = (os.path.realpath(to_bytes(name)) for name in (path, bottleneck_dir))
    first = os.path.relpath(real_path, real_folder).split(to_bytes(os.sep))[0]
    folders = {to_bytes(file.split(os.sep)[0]) for file in images.files}
    return first == b'.records' or first in folders


def check_outputs_and_images(images: Images, flags: argparse.Namespace) -> None:
    """Raises UserError if an output is an image, to which a link may lead, or a cache file."""
    for flag, output in list_outputs(flags):
        if is_in_cache(output, images, flags.bottleneck_dir):
            raise UserError(f'{flag}: {output} is in the cache. Name another file.')
        if is_image(os.path.basename(follow_link(output))) and exists(output):
            real_output = os.path.realpath(to_bytes(output))
            if any(os.path.realpath(to_bytes(path)) == real_output for path in images.paths):
                raise UserError(f'{flag}: {output} is what the training reads. Name another file.')


# TensorBoard

SUMMARY_FOLDERS = ('train', 'validation', 'test', 'suspects')
LOG_START = 'events.out.tfevents.'
# The names of event files end with the time in ns, the computer and the process. Keras, PyTorch and
# retrain.py of 2017 write the time in s, of 10 digits.
LOG_NAME = re.compile(rf'{re.escape(LOG_START)}\d{{11,}}\.(.+)\.(\d+)$')
# A run on another computer may still be at work if it wrote its log up to this many seconds before
# this run started: it may be in a long step, or the clock there may be wrong.
OTHER_RUNS = 60
THUMBNAIL_SIZE = 299, 299  # pixels
SHOWN_IMAGES = 100  # misclassified or suspect images, at most
MAX_HISTOGRAM = 1_000_000  # numbers: of more, only a sample is counted
SAMPLE_SIZE = 100_000


class Start(NamedTuple):
    """When a run started, and what was there."""

    time: datetime.datetime
    monotonic: float  # seconds of a clock that is never set back
    logs: list[str] | None  # the event files of earlier runs; None if they could not be listed


def note_start(summaries_dir: str) -> Start:
    """Returns the start of a run, now."""
    logs = None
    with extra('the removal of earlier logs'):
        logs, _ = list_logs(summaries_dir)
    return Start(datetime.datetime.now(), time.monotonic(), logs)


def list_logs(summaries_dir: str) -> tuple[list[str], list[str]]:
    """Returns the paths of the event files of runs below summaries_dir, and of other programs."""
    own: list[str] = []
    others: list[str] = []
    for name in SUMMARY_FOLDERS:
        folder = os.path.join(summaries_dir, name)
        for file in list_dir(folder):
            path = os.path.join(folder, file)
            if file.startswith(LOG_START) and not is_special(path):
                (own if LOG_NAME.match(file) else others).append(path)
    return own, others


def clear_events(summaries_dir: str, start: Start) -> None:
    """Removes the logs of earlier runs that are no longer at work."""
    if start.logs is None:  # note_start() has said why
        return
    now, others = list_logs(summaries_dir)
    other_runs = find_runs_at_work(now, start)
    locked = []
    for path in start.logs:
        # A run at work keeps all of its logs, also those that it has written and closed already.
        if get_owner(path) in other_runs:
            continue
        try:
            gfile.remove(path)
        except tf.errors.NotFoundError:
            pass  # another run has removed it
        except tf.errors.OpError:
            locked.append(path)
    if locked:
        print(
            f'WARNING: logs of an earlier run stay, as they cannot be removed: {name_some(locked)}.'
            ' On Windows, end TensorBoard before the next run.'
        )
    if other_runs:
        print(
            f'WARNING: another run logs to {summaries_dir} at the same time, or did a moment ago. '
            'Name another --summaries_dir to tell the two apart in TensorBoard.'
        )
    if others:
        print(
            'WARNING: logs of other programs stay, and TensorBoard shows them together with those '
            f'of this run: {name_some(others)}. Name another --summaries_dir.'
        )


def find_runs_at_work(now: list[str], start: Start) -> set[tuple[str, ...]]:
    """Returns get_owner() of other runs that still write logs, given the event files of now."""
    before = start.logs or []
    new = {get_owner(path) for path in now if path not in before} - {get_process()}
    ended = {get_owner(path) for path in now if os.path.basename(os.path.dirname(path)) == 'test'}
    return new | {get_owner(path) for path in before if is_at_work(path, start, ended)}


def is_recent(path: str, start: Start, margin: int) -> bool:
    """Tells whether a file was written since the run started, or `margin` seconds before it.

    A file from the future, by more than the margin, is an old one, made while the clock was wrong.
    """
    modified = get_status(path).modified / 1e9
    return start.time.timestamp() - margin < modified <= time.time() + margin


def get_process() -> tuple[str, str]:
    """Returns this computer, or the container on it, and the ID of this process there."""
    computer = socket.gethostname()  # which containers may have in common
    with contextlib.suppress(OSError):  # not Linux
        computer += f'-{os.stat("/proc/self/ns/pid").st_ino}'
    return computer, str(os.getpid())


def get_owner(path: str) -> tuple[str, ...]:
    """Returns get_process() of the run that made an event file."""
    match = LOG_NAME.search(path)
    assert match
    return match.groups()


def is_at_work(path: str, start: Start, ended: set) -> bool:
    """Tells whether another run still writes an event file, as far as can be told.

    It does if the file was written since this run started. Otherwise, a run on this computer does
    if it has the file open, and one on another computer if it wrote the file up to OTHER_RUNS
    seconds before this run started, and has not ended. `ended` has the owners of the logs of tests,
    which are the last ones that runs make.
    """
    if is_recent(path, start, margin=0):
        return True
    owner = get_owner(path)
    if owner[0] != get_process()[0]:
        return owner not in ended and is_recent(path, start, OTHER_RUNS)
    return is_open_elsewhere(path)


def is_open_elsewhere(path: str) -> bool:
    """Tells whether another program here still writes an event file, as far as Linux tells."""
    owner = get_owner(path)
    if owner == get_process():
        return False
    folder = f'/proc/{owner[1]}/fd'
    real_path = os.path.realpath(to_bytes(path))
    with contextlib.suppress(OSError):  # it has ended, or is another user's
        links = [os.path.join(folder, name).encode() for name in os.listdir(folder)]
        return any(os.path.realpath(link) == real_path for link in links)
    return False


def summarize_layer(layer: FinalLayer) -> dict[str, Any]:
    """Returns the original's summaries of the layer, {tag: number or array}."""
    tags = {}
    for name, values in (('weights', layer.weights), ('biases', layer.biases)):
        scope = f'{FINAL_SCOPE}/{name}/summaries'
        tags[f'{scope}/mean_1'] = values.mean()
        tags[f'{scope}/stddev_1'] = values.std()
        tags[f'{scope}/max_1'] = values.max()
        tags[f'{scope}/min_1'] = values.min()
        tags[f'{scope}/histogram'] = values
    return tags


def summarize(evaluation: Evaluation, layer_tags: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the original's summaries of a batch, and those of the layer.

    Without those of the layer, None, they are only the cross entropy and the accuracy.
    """
    tags: dict[str, Any] = {
        'cross_entropy_1': evaluation.cross_entropy,
        'accuracy_1': evaluation.accuracy,
    }
    if layer_tags is None:
        return tags
    tags[f'{FINAL_SCOPE}/Wx_plus_b/pre_activations'] = evaluation.logits
    tags['activations'] = evaluation.scores
    return tags | layer_tags


def create_value(tag: str, value: Any) -> Summary.Value:
    """Returns a summary of a number, a picture, a text, or an array, which becomes a histogram."""
    if isinstance(value, Image.Image):
        png = io.BytesIO()
        value.save(png, 'PNG')
        size = {'width': value.width, 'height': value.height}
        return Summary.Value(tag=tag, image={**size, 'encoded_image_string': png.getvalue()})
    if isinstance(value, str):
        summary = Summary.Value(tag=tag, tensor=tf.make_tensor_proto(value))
        summary.metadata.plugin_data.plugin_name = 'text'
        return summary
    if not np.ndim(value):
        return Summary.Value(tag=tag, simple_value=value)
    return create_histogram(tag, np.ravel(value))


def create_histogram(tag: str, values: np.ndarray) -> Summary.Value:
    """Returns a histogram of numbers in 30 buckets; that of a sample if there are many."""
    summary = Summary.Value(tag=tag)
    if values.size > MAX_HISTOGRAM:
        # TensorBoard shows the description beside the histogram.
        description = f'a sample of {SAMPLE_SIZE:,} of {values.size:,} numbers'
        summary.metadata.summary_description = description
        values = values[np.random.default_rng(0).integers(values.size, size=SAMPLE_SIZE)]
    values = values.astype(np.float64)
    counts, edges = np.histogram(values, 30)
    summary.histo.num = values.size
    summary.histo.sum = values.sum()
    summary.histo.sum_squares = np.square(values).sum()
    summary.histo.min = edges[0]
    summary.histo.max = edges[-1]
    summary.histo.bucket_limit.extend(edges[1:])
    summary.histo.bucket.extend(counts)
    return summary


class SummaryWriter:
    """Writes what TensorBoard reads: a TFRecord file of Event protos.

    The format is that of tensorflow/core/util/events_writer.cc. tf.summary would take 0.3 to 5 ms
    for each tag.
    """

    def __init__(self, folder: str) -> None:
        self.file = None
        name = '.'.join([str(time.time_ns()), *get_process()])
        try:
            gfile.makedirs(folder)
            self.file = tf.io.TFRecordWriter(os.path.join(folder, f'{LOG_START}{name}'))
        except tf.errors.OpError as error:
            self.give_up(error)
        self.write(file_version='brain.Event:2')

    def write(self, values: Mapping[str, Any] | None = None, **fields: object) -> None:
        """Writes an Event of {tag: number, picture, text or array}, and with other fields."""
        if self.file is None:
            return
        try:
            event = tf.compat.v1.Event(wall_time=time.time(), **fields)
            if values:
                event.summary.value.extend(itertools.starmap(create_value, values.items()))
            self.file.write(event.SerializeToString())
            self.file.flush()
        except (tf.errors.OpError, ValueError) as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Stops writing: logs are not worth a training."""
        self.file = None
        print(f'WARNING: --summaries_dir: {describe(error)}. Nothing more is logged there.')


def load_thumbnail(path: str, is_upright: bool) -> Image.Image:
    """Returns an image, reduced to THUMBNAIL_SIZE if it is larger.

    What cannot be read becomes a gray square.
    """
    with contextlib.suppress(Exception):  # Pillow has many kinds
        contents = read_file(path)
        if name_format(contents) == 'JPEG':
            thumbnail = open_by_pillow(io.BytesIO(contents))
            check_size(thumbnail.width * thumbnail.height)
            thumbnail.draft('RGB', THUMBNAIL_SIZE)  # decodes it no larger than needed
            thumbnail = thumbnail.convert('RGB')
        else:
            thumbnail = Image.fromarray(decode(contents, is_upright=False))
        thumbnail.thumbnail(THUMBNAIL_SIZE)
        if is_upright:
            turned = turn(np.asarray(thumbnail), get_orientation(contents))
            thumbnail = Image.fromarray(turned)
        return thumbnail
    return Image.new('RGB', THUMBNAIL_SIZE, 'gray')


def name_in_picture(label: str, number: int) -> str:
    """Returns what pictures call a class: its label, or its number, such as '#3' for the third.

    It is the number if the font lacks a character, as it has only those of ASCII and a few more.
    """
    font = ImageFont.load_default(16)
    box = bytes(font.getmask('\uffff'))  # which the font has in place of what it lacks
    is_drawable = all(bytes(font.getmask(character)) != box for character in label)
    return label if is_drawable else f'#{number}'


def draw_confusion_matrix(confusion: np.ndarray, labels: list[str]) -> Image.Image:
    """Draws counts, int [true class, predicted class].

    The darker a cell is, the larger is its share of the true class.
    """
    cell = min(48, 1200 // len(labels))  # pixels
    font = ImageFont.load_default(min(16, cell))
    names = [f'{label[:23]}…' if len(label) > 24 else label for label in labels]
    margin = 12 + int(max(map(font.getlength, names)))
    size = cell * len(labels)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    cells = Image.fromarray(np.uint8(255 - 255 * shares))
    picture = Image.new('L', (margin + size, margin + size), 'white')
    picture.paste(cells.resize((size, size), Image.Resampling.NEAREST), (margin, margin))
    draw = ImageDraw.Draw(picture)
    middles = margin + cell * (np.arange(len(labels)) + 0.5)
    draw_names(draw, names, margin - 6, middles, font)
    if cell >= 16:
        draw_counts(draw, confusion, shares, middles, font)
    return picture


def draw_counts(
    draw: ImageDraw.ImageDraw,
    confusion: np.ndarray,
    shares: np.ndarray,
    middles: np.ndarray,
    font: Any,
) -> None:
    """Draws the counts that are not 0 into their cells."""
    for row, column in np.argwhere(confusion):
        color = 'white' if shares[row, column] > 0.5 else 'black'
        center = middles[column], middles[row]
        draw.text(center, str(confusion[row, column]), color, font, 'mm')


def draw_names(
    draw: ImageDraw.ImageDraw, names: list[str], end: int, middles: np.ndarray, font: Any
) -> None:
    """Draws the names of the classes beside their rows, and upwards above their columns."""
    upwards = ImageFont.TransposedFont(font, Image.Transpose.ROTATE_90)
    for name, middle in zip(names, middles, strict=True):
        draw.text((end, middle), name, 'black', font, 'rm')
        top = end - font.getlength(name)
        draw.text((middle - font.size / 2, top), name, 'black', upwards)


def load_misclassified(images: Images, tested: Tested, is_upright: bool) -> dict[str, Image.Image]:
    """Returns {name in TensorBoard: picture} of misclassified images.

    It ends with a warning at the first image of a drive that hangs.
    """
    pictures = {}
    for row, predicted in itertools.islice(tested.misclassified, SHOWN_IMAGES):
        path = images.paths[row]
        label = images.labels[images.classes[row]]
        name = f'misclassified/{label} classified as {images.labels[predicted]}'
        thumbnail = start_thread(load_thumbnail, path, is_upright)
        try:
            pictures[f'{name}/{images.files[row]}'] = wait_for(thumbnail, DRIVE_TIMEOUT)
        except concurrent.futures.TimeoutError:
            print(
                f'WARNING: misclassified images are missing in TensorBoard: {escape(path)} did not '
                f'come within {DRIVE_TIMEOUT} s. Check the drive.'
            )
            break
    return pictures


def write_pictures(
    images: Images, head: Head, tested: Tested | None, flags: argparse.Namespace
) -> None:
    """Writes the confusion matrix, misclassified images, and the similarities of the images.

    The names in the matrix that are numbers have a legend.
    """
    pictures: dict[str, Any] = {}
    if head.familiarity:
        pictures['familiarity'] = head.familiarity.similarities
    if tested and len(images.labels) <= MATRIX_CLASSES:
        confusion = tested.count_confusion(len(images.labels))
        names = [name_in_picture(label, i) for i, label in enumerate(images.labels, 1)]
        pictures['confusion_matrix'] = draw_confusion_matrix(confusion, names)
        pairs = zip(names, images.labels, strict=True)
        legend = [f'- `{name}`: {label}' for name, label in pairs if name != label]
        if legend:
            pictures['confusion_matrix/legend'] = '\n'.join(legend)
    if tested:
        pictures.update(load_misclassified(images, tested, flags.upright))
    SummaryWriter(os.path.join(flags.summaries_dir, 'test')).write(pictures)


# Main


def report_start(images: Images, backbone: Backbone) -> None:
    """Prints what the run works with."""
    gpus = [device.name for device in tf.config.list_logical_devices('GPU')]
    devices = ', '.join(gpus) or 'CPU'
    versions = f'TensorFlow {tf.__version__}, Python {sys.version.split()[0]}'
    print(f'{versions}, {devices}, network {backbone.source}')
    counts = ', '.join(f'{len(rows)} {name}' for name, rows in images.rows.items())
    print(f'{len(images.labels)} classes, {len(images.files)} images: {counts}')


def report_end(
    written: list[str],
    failures: dict[str, str],
    head: Head,
    problem: str | None,
    flags: argparse.Namespace,
) -> None:
    """Prints what was written, and what to do next.

    Raises UserError if an output is missing, or if the training could not be finished.
    """
    if failures:
        problems = '; '.join(f'{output} ({reason})' for output, reason in failures.items())
        missing = f'could not be written: {problems}. Written: {", ".join(written) or "nothing"}.'
        if problem:
            raise UserError(f'{problem}. What was learned {missing} {EARLIER_OUTPUTS}')
        advice = 'Fix this, and run the same command again.'
        if SAVED_MODEL in written:
            advice = 'Fix this, and run the command again with a new --saved_model_dir.'
        raise UserError(f'{missing} {advice}')
    graph = shlex.quote(flags.output_graph)
    labels = shlex.quote(flags.output_labels)
    print(f'To look at the training: tensorboard --logdir {shlex.quote(flags.summaries_dir)}')
    if head.familiarity and UNKNOWN not in head.labels:
        percentage = 5 if len(head.familiarity.similarities) >= 100 else 10
        print(
            f"To get 'unknown' for images unlike yours, add --unknown {percentage} to the command "
            'below: see README.md.'
        )
    if flags.optimized_graph:
        print(f'Wrote the optimized graph {shlex.quote(flags.optimized_graph)}')
    print(f'Wrote the graph {graph} and the labels {labels}. To label an image with them:')
    upright = ' --upright' if flags.upright else ''
    print(f'python3 tf_test.py <path to image> {graph} {labels}{upright}')
    if problem:
        raise UserError(
            f'{problem}. What {head.layer.steps} training steps have learned is in the files '
            f'above. {EARLIER_OUTPUTS}'
        )


def search_images(images: Images, bottlenecks: np.ndarray, flags: argparse.Namespace) -> int | None:
    """Reports near copies and suspects.

    Returns the number of pairs of near copies, or None if it could not be found out.
    """
    pair_count = None
    with extra('the search for near copies'):
        near_copies = find_near_copies(images, bottlenecks)
        pair_count = report_near_copies(images, near_copies, flags.print_duplicates)
    if flags.find_suspects:
        with extra('the search for suspects'):
            scored = cross_validate(images, bottlenecks, flags)
            report_suspects(images, scored, flags)
    return pair_count


def write_results(
    images: Images,
    backbone: Backbone,
    head: Head,
    tested: Tested | None,
    facts: dict[str, Any],
    flags: argparse.Namespace,
    export: Callable | None,
) -> None:
    """Writes all outputs, even if some fail; then the record, if there is a graph, and pictures.

    `facts` are added to the record. Raises UserError if an output is missing, or if the training
    could not be finished.
    """
    writers = create_writers(backbone, head, flags)
    if export:
        writers[SAVED_MODEL] = functools.partial(export, backbone, head)
    results, failures = write_outputs(writers)
    written = list(results)
    if flags.output_graph in results:
        with extra('the record of the run'):
            record = create_record(images, backbone, head, tested, flags) | facts
            record['graph_checksum'] = results[flags.output_graph]
            write_record(record, flags)
            written.append(get_record_path(flags.output_graph))
    with extra('the pictures for TensorBoard'):
        write_pictures(images, head, tested, flags)
    report_end(written, failures, head, facts['problem'], flags)


def main(flags: argparse.Namespace, export: Callable | None = None) -> None:
    """Runs the whole training. export(backbone, head), if given, writes the SavedModel."""
    start = note_start(flags.summaries_dir)
    ensure_image_dir(flags.image_dir)
    check_outputs(flags)
    images = list_images(flags)
    check_outputs_and_images(images, flags)
    backbone = load_backbone(flags)
    report_start(images, backbone)
    images, bottlenecks, facts = cache_bottlenecks(images, backbone, flags)
    check_sets(images, flags)
    facts['duplicates'] = search_images(images, bottlenecks, flags)
    familiarity = None
    with extra('the familiarity'):
        familiarity = find_familiarity(images, bottlenecks, flags)
    layer, problem = train(images, bottlenecks, backbone, start, flags)
    facts |= {'problem': problem, 'steps': layer.steps}
    if problem:
        flags = rename_outputs(flags)
        export = None  # a server would load what is unfinished
    tested = None
    with extra('the test'):
        tested = test(images, bottlenecks, layer, flags)
        report_test(images, tested, flags)
    head = Head(layer, images.labels, familiarity)
    facts['started'] = str(start.time)
    facts['seconds'] = time.monotonic() - start.monotonic
    write_results(images, backbone, head, tested, facts, flags, export)


# SavedModel


def find_latest_version(folder: str) -> int:
    """Returns the highest version in a folder, which TensorFlow Serving serves; 0 if none."""
    versions = [int(name) for name in list_dir(folder or '.') if name.isdecimal()]
    return max(versions, default=0)


def find_free_version(folder: str) -> str:
    """Returns the path of the next free version in a folder."""
    return os.path.join(folder, str(find_latest_version(folder) + 1))


def check_saved_model_dir(saved_model_dir: str) -> None:
    """Raises UserError if the SavedModel could not be written there, or would replace another.

    Warns if TensorFlow Serving would not serve it.
    """
    flag = '--saved_model_dir'
    folder = saved_model_dir.rstrip(f'/{os.sep}')
    if exists(folder) and not gfile.isdir(folder):
        raise UserError(
            f"{flag}: '{saved_model_dir}' is a file. Name a folder, such as "
            'trained_model_serving/1.'
        )
    parent = os.path.dirname(folder)
    if list_dir(folder):
        is_version = os.path.basename(folder).isdecimal() or 'saved_model.pb' in list_dir(folder)
        versions_dir = parent if is_version else folder
        advice = f'The next free version is {flag}={find_free_version(versions_dir)}'
        raise UserError(
            f"{flag}: '{saved_model_dir}' is not empty, and may be a model that is being served. "
            f'{advice}'
        )
    if 'saved_model.pb' in list_dir(parent or '.'):
        free = find_free_version('..' if parent in ('', '.') else os.path.dirname(parent))
        raise UserError(
            f"{flag}: '{saved_model_dir}' is inside of a SavedModel. Name {flag}={free}"
        )
    if is_pattern(saved_model_dir):
        raise UserError(
            f"{flag}: TensorFlow cannot load a model from '{saved_model_dir}', because of a * ? [ "
            'or \\ in its path. Name another folder.'
        )
    ensure_writable_dir(parent, flag)
    ensure_renamable(folder, flag)
    ensure_name_is_allowed(folder, flag)
    name = os.path.basename(folder)
    if not name.isdecimal():
        print(
            'WARNING: TensorFlow Serving only serves folders with a number as name, unlike '
            f'{saved_model_dir}'
        )
    elif find_latest_version(parent) > int(name):
        print(
            'WARNING: TensorFlow Serving serves the highest version, and not '
            f'{saved_model_dir}. The next free one is {flag}={find_free_version(parent)}'
        )


def ensure_apart(flags: argparse.Namespace) -> None:
    """Raises UserError if something else would be written into the folder of the SavedModel."""
    if not flags.saved_model_dir.rstrip(f'/{os.sep}'):
        raise UserError('--saved_model_dir: / is no new folder. Name trained_model_serving/1.')
    outputs = list_outputs(flags)
    folders = [
        ('--bottleneck_dir', flags.bottleneck_dir),
        ('--summaries_dir', flags.summaries_dir),
        ('--model_dir', flags.model_dir),
    ]
    for flag, path in outputs + folders:
        if is_same_or_inside(path, flags.saved_model_dir):
            raise UserError(f'{flag}: {path} is in --saved_model_dir. Name another one.')
    for flag, path in outputs:
        # As a file, the output could not have the folder of the SavedModel in it.
        if is_inside(flags.saved_model_dir, path):
            raise UserError(f"{flag}: '{path}' is above --saved_model_dir. Name another file.")


def ensure_renamable(folder: str, flag: str) -> None:
    """Raises UserError if a folder cannot be replaced by renaming: a link or a mount point."""
    path = to_bytes(folder)
    problem = 'a symbolic link' if os.path.islink(path) else ''
    if is_mount_point(path):
        problem = 'a mount point'
    if problem:
        remedy = f'Name a new folder in it: {folder}/1'
        if not os.path.exists(path):
            remedy = 'Name another folder.'
        raise UserError(f"{flag}: '{folder}' is {problem}. {remedy}")


class Classifier(tf.Module):
    """What the SavedModel has: the folded network, the final layer, the labels, the familiarity."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.image_size = backbone.input_format.size
        shape = [None, *self.image_size, 3]
        folded = fold(backbone.graph_def, SCALED_INPUT_NODE, shape, backbone.bottleneck)
        self.network_weights = {
            name: tf.Variable(value, trainable=False) for name, value in get_weights(folded).items()
        }
        structure = hide_weights(folded)
        self.network = backbone.create_network(structure, self.network_weights, device=None)
        self.weights = tf.Variable(head.layer.weights, name='final_weights')
        self.biases = tf.Variable(head.layer.biases, name='final_biases')
        self.labels = tf.constant(head.labels)
        self.familiarity = None
        if head.familiarity:
            self.familiarity = Familiarity(*[tf.constant(array) for array in head.familiarity])

    def decode_and_resize(self, contents: tf.Tensor) -> tf.Tensor:
        """Returns an encoded image, resized: float [*size, 3].

        It is not turned, even if the training had --upright: see data/README.md.
        """
        image = decode_by_tensorflow(contents)
        return resize_bilinear(image[tf.newaxis], self.image_size)[0]

    def embed(self, contents: tf.Tensor) -> tf.Tensor:
        """Returns the bottlenecks of encoded images, string [N], as one batch: float [N, size]."""
        spec = tf.TensorSpec([*self.image_size, 3])
        images = tf.map_fn(self.decode_and_resize, contents, fn_output_signature=spec)
        # A convolution refuses an empty batch: one black image takes its place.
        black = tf.zeros([1, *self.image_size, 3])
        padded = tf.cond(tf.size(contents) > 0, lambda: images, lambda: black)
        return self.network(padded)[: tf.size(contents)]

    def score(self, bottlenecks: tf.Tensor) -> tf.Tensor:
        """Returns the scores of bottlenecks: float [N, classes]."""
        return tf.nn.softmax(bottlenecks @ self.weights + self.biases)

    @tf.function(input_signature=[tf.TensorSpec(None, tf.string, name='image')])
    def predict(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """The original's signature, for one encoded image, string [], or a batch, string [N]."""
        bottlenecks = self.embed(tf.reshape(image, [-1]))
        return {'prediction': self.score(bottlenecks), 'classes': self.labels}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name='image')])
    def predict_rows(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """For REST in row format, where each output has one row per image.

        A row has the best label and its score, all labels and scores in descending order of the
        scores, and how familiar the image is.
        """
        bottlenecks = self.embed(image)
        scores = self.score(bottlenecks)
        order = tf.argsort(scores, direction='DESCENDING')
        labels = tf.gather(self.labels, order)
        scores = tf.gather(scores, order, batch_dims=1)
        row = {'label': labels[:, 0], 'score': scores[:, 0], 'labels': labels, 'scores': scores}
        if self.familiarity:
            row['familiarity'] = compute_familiarity(bottlenecks, self.familiarity)
        return row


def write_saved_model(classifier: Classifier, saved_model_dir: str) -> str:
    """Writes a SavedModel, and returns its folder.

    The folder appears whole or not at all, as a server may be watching. It is another free version
    if `saved_model_dir` is no longer empty.
    """
    saved_model_dir = saved_model_dir.rstrip(f'/{os.sep}')
    temporary = os.path.join(os.path.dirname(saved_model_dir), create_hidden_name())
    signatures = {'serving_default': classifier.predict, 'predict_rows': classifier.predict_rows}
    try:
        tf.saved_model.save(classifier, temporary, signatures)
        with contextlib.suppress(OSError):  # it is missing, or no longer empty
            os.rmdir(to_bytes(saved_model_dir))
        while not try_to_rename(temporary, saved_model_dir):
            saved_model_dir = find_free_version(os.path.dirname(saved_model_dir))
    except BaseException:
        with contextlib.suppress(tf.errors.OpError):
            gfile.rmtree(temporary)
        raise
    return saved_model_dir


def try_to_rename(folder: str, target: str) -> bool:
    """Renames a folder; returns False if the target exists, perhaps since a moment ago."""
    try:
        gfile.rename(folder, target)
    except tf.errors.OpError:
        if exists(target):
            return False
        raise
    return True


def main_serving(flags: argparse.Namespace) -> None:
    """Does the whole job, and writes the SavedModel; raises UserError for what the user can fix."""
    ensure_image_dir(flags.image_dir)  # before a folder for the SavedModel is made
    ensure_outside_module(flags.saved_model_dir, '--saved_model_dir', flags)
    ensure_apart(flags)
    check_saved_model_dir(flags.saved_model_dir)
    written = []

    def export(backbone: Backbone, head: Head) -> None:
        classifier = Classifier(backbone, head)
        written.append(write_saved_model(classifier, flags.saved_model_dir))

    main(flags, export)
    (path,) = written
    wrote = f'Wrote the SavedModel {shlex.quote(path)}'
    if '://' in path or not os.path.basename(path).isdecimal():  # no version that Docker finds
        print(wrote)
        return
    folder = shlex.quote(os.path.abspath(os.path.dirname(path)))
    print(f'{wrote}. To serve it at http://localhost:8501 with Docker:')
    print(
        f'docker run -p 8501:8501 -v {folder}:/models/retrained -e MODEL_NAME=retrained '
        'tensorflow/serving'
    )


if __name__ == '__main__':
    run(main_serving, parsed_flags)
