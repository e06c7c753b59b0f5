"""Photographs, feature vectors, servers and a way to run the scripts: what many tests share."""

import contextlib
import errno
import http.server
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import forks
import numpy as np
import pytest
from networks import build_model, write_mobilenet  # noqa: F401 (for the tests)
from PIL import Image

import tf_retrain
import tf_test
from tf_retrain import UserError

tf = tf_retrain.tf
ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'
GRAPH, LABELS = 'trained_model/unoptimized_model.pb', 'trained_model/labels.txt'


class FeatureVector(tf.Module):
    """A small feature vector, called as those of TensorFlow Hub are: images in 0..1 to [N, 37]."""

    def __init__(self, height=96, width=128, seed=0):
        super().__init__()
        self.kernel = tf.Variable(
            tf.random.stateless_normal([8, 8, 3, 37], [seed, 1], stddev=0.2), name='kernel'
        )
        spec = tf.TensorSpec([None, height, width, 3])
        self.__call__.get_concrete_function(spec, training=True)
        self.__call__.get_concrete_function(spec, training=False)

    @tf.function
    def __call__(self, images, training=False):
        features = tf.reduce_mean(tf.nn.relu(tf.nn.conv2d(images, self.kernel, 8, 'VALID')), [1, 2])
        return features * 0 if training else features


def write_module(path, **options):
    tf.saved_model.save(FeatureVector(**options), str(path))


COLOURS = [(200, 60, 60), (60, 60, 200), (60, 200, 60), (200, 200, 60)]


def write_photographs(folder, label, count, colour, spread=0, **save):
    """Writes JPEG files of noise around a colour, which the small model tells apart with ease.

    With a spread, each has a colour of its own: otherwise, those of a label are nearly alike.
    """
    rng = np.random.default_rng(len(label))
    colours = colour + np.random.default_rng(0).normal(0, spread, [count, 3])
    target = folder / label
    target.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.clip(rng.normal(colours[i], 40, [30, 40, 3]), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(target / f'{label} {i}.jpg', **save)


def run(script, *arguments, check=True, cwd=None):
    """Runs a script as a user does; returns the finished process with what it printed."""
    process = forks.run([ROOT / script, *arguments], cwd)
    if check:
        assert process.returncode == 0, process.stdout + process.stderr
    return process


def run_new(script, *arguments, check=True, interpreter=(), **options):
    """Does the same in a new interpreter, for what depends on how it starts."""
    command = [sys.executable, *interpreter, str(ROOT / script), *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    if check:
        assert process.returncode == 0, process.stdout + process.stderr
    return process


class Job:
    """A folder with photographs and a model, and the flags that train on them there."""

    def __init__(self, folder, model, monkeypatch=None, capsys=None):
        self.folder = folder
        self.monkeypatch = monkeypatch  # these two only for what runs inside of this process
        self.capsys = capsys
        self.data = folder / 'data'
        (folder / 'inception').mkdir()
        os.link(model, folder / 'inception' / 'classify_image_graph_def.pb')
        self.flags = {
            'image_dir': 'data/',
            'model_dir': 'inception/',
            'bottleneck_dir': 'bottlenecks/',
            'output_graph': 'trained_model/unoptimized_model.pb',
            'output_labels': 'trained_model/labels.txt',
            'summaries_dir': 'logs',
            'how_many_training_steps': '30',
            'random_seed': '1',
        }

    def photographs(self, **counts):
        for (label, count), colour in zip(counts.items(), COLOURS, strict=False):
            write_photographs(self.data, label, count, colour)
        return self

    def arguments(self, *more, **changes):
        return [*(f'--{name}={value}' for name, value in {**self.flags, **changes}.items()), *more]

    def run(self, *more, check=True, script='tf_retrain.py', **changes):
        return run(script, *self.arguments(*more, **changes), cwd=self.folder, check=check)

    def fork(self, *more, **changes):
        """Starts the training as run() does, and returns the running process."""
        return forks.Fork([ROOT / 'tf_retrain.py', *self.arguments(*more, **changes)], self.folder)

    def start(self, *more, **changes):
        """Starts the training in a new interpreter; its output can be read while it runs."""
        command = [
            sys.executable,
            '-u',
            str(ROOT / 'tf_retrain.py'),
            *self.arguments(*more, **changes),
        ]
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
        return subprocess.Popen(command, cwd=self.folder, **pipes, preexec_fn=default_ctrl_c)

    def main(self, *more, **changes):
        """Does the same job in this process, where TensorFlow is; returns what it printed."""
        self.monkeypatch.chdir(self.folder)
        tf_retrain.main(parse(*self.arguments(*more, **changes)))
        return self.capsys.readouterr().out

    def fails(self, match, *more, **changes):
        """Does the same job, which must end in an error for the user; returns what it printed."""
        with pytest.raises(UserError, match=match):
            self.main(*more, **changes)
        return self.capsys.readouterr().out

    def cache(self, *more, **changes):
        """Lists the images and caches their bottlenecks, no more; returns what that printed."""
        self.monkeypatch.chdir(self.folder)
        flags = parse(*self.arguments(*more, **changes))
        images = tf_retrain.list_images(flags)
        backbone = tf_retrain.load_backbone(flags)
        _, self.bottlenecks, _ = tf_retrain.cache_bottlenecks(images, backbone, flags)
        return self.capsys.readouterr().out

    def cache_file(self, file):
        return self.folder / 'bottlenecks' / f'{file}.txt'

    def check_bottlenecks(self, *files):
        """The cache files of some images hold what TensorFlow 1 makes of them, as the original."""
        images = [(self.data / file).read_bytes() for file in files]
        results = run_v1_on_all(build_model(), images, 'pool_3/_reshape:0')
        for file, (expected,) in zip(files, results, strict=True):
            found = np.array(self.cache_file(file).read_text().split(','), float)
            atol = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(found, expected, atol=atol, err_msg=file)

    def graph(self):
        return tf.compat.v1.GraphDef.FromString(
            (self.folder / self.flags['output_graph']).read_bytes()
        )

    def test_image(self):
        return self.test_images()[0]

    def test_images(self, testing=10):
        """Returns the paths of the images in the test set, sorted."""
        paths = sorted(path for path in self.data.rglob('*') if path.is_file())
        return [path for path in paths if get_set(self.folder, path, testing) == 'testing']


def fail_once(monkeypatch, path):
    """Has the next question for the status of a path fail, as on a drive that connects again."""
    original = os.stat
    errors = [OSError(errno.EIO, 'Input/output error')]

    def get_status(other, **options):
        if errors and not isinstance(other, int) and os.fsencode(other) == os.fsencode(path):
            raise errors.pop()
        return original(other, **options)

    monkeypatch.setattr(os, 'stat', get_status)
    return errors


def parse(*arguments):
    return tf_retrain.parse_flags(tf_retrain.create_parser(), list(arguments))


def load_backbone(model_dir, *arguments):
    return tf_retrain.load_backbone(
        parse('--image_dir=unused', f'--model_dir={model_dir}', *arguments)
    )


def get_set(folder, path, testing=10):
    return tf_retrain.get_set(str(path.relative_to(folder)), testing, 10)


def created(out):
    """Returns the images, 'folder/file', whose bottlenecks a run says that it has computed."""
    return sorted(re.findall(r'Creating bottleneck at bottlenecks/(.*)\.txt', out))


def read_events(folder):
    """Returns the events of a run, as TensorBoard would read them."""
    (path,) = folder.glob('events.out.tfevents.*')
    return [
        tf.compat.v1.Event.FromString(record.numpy())
        for record in tf.data.TFRecordDataset(str(path))
    ]


def default_ctrl_c():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_v1_on_all(graph_def, images, tensor):
    """Returns a tensor of a graph for each encoded image, by a v1 Session as the original."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(graph_def, name='')
        return [session.run(tensor, {'DecodeJpeg/contents:0': image_data}) for image_data in images]


def run_v1(graph_def, image_data, tensor):
    return run_v1_on_all(graph_def, [image_data], tensor)[0]


def check_familiarity(found, graph_def, images):
    """The familiarities that something gives to encoded images are those of the graph.

    Rounding may turn around the order of an image and some of the own images, which are as similar
    up to the last digits. So a familiarity must lie between those of a similarity that is a little
    lower and one that is a little higher.
    """
    similarities = np.ravel(run_v1_on_all(graph_def, images, 'familiarity/Min:0'))
    (own,) = (node for node in graph_def.node if node.name == 'familiarity/LessEqual/x')
    own = tf.make_ndarray(own.attr['value'].tensor)
    for each, similarity in zip(found, similarities, strict=True):
        lowest, highest = ((own <= similarity + by).mean() for by in (-1e-5, 1e-5))
        assert lowest - 1e-6 <= each <= highest + 1e-6  # a float32 is less precise than these


def get_scores(graph_def, image_data):
    """Returns the scores that tf_test.py gives an encoded image: float [classes]."""
    ((scores,),) = tf_test.run_graph(graph_def, image_data, [graph_def.node[-1].name])
    return scores


def label_images(folder, images, graph=GRAPH, labels=LABELS):
    """Returns the scores that tf_test.py prints, [images, classes] in the order of the labels."""
    names = (folder / labels).read_text().splitlines()
    process = run('tf_test.py', '--json', *images, graph, labels, cwd=folder)
    answers = [json.loads(line) for line in process.stdout.splitlines()]
    scores = [dict(zip(answer['labels'], answer['scores'], strict=True)) for answer in answers]
    return np.array([[row[name] for name in names] for row in scores])


def load_signatures(folder):
    """Returns the functions of the SavedModel in saved/1."""
    return tf.saved_model.load(str(folder / 'saved/1')).signatures


def classify_images(signatures, images):
    """Returns the scores by a SavedModel, [images, classes]."""
    contents = tf.constant([path.read_bytes() for path in images])
    return signatures['serving_default'](image=contents)['prediction']


def run_openvino(folder, recipe, images):
    """Returns the scores that a recipe for OpenVINO gives to each of some decoded images."""
    (folder / 'recipe.py').write_text(recipe)
    np.savez(folder / 'images.npz', *images)
    run('tests/programs/run_openvino.py', 'recipe.py', 'images.npz', 'outputs.npz', cwd=folder)
    return list(np.load(folder / 'outputs.npz').values())


def set_processor(monkeypatch, features):
    """Lets the program find these features in /proc/cpuinfo."""

    def open_fake(path, *arguments):
        if path == '/proc/cpuinfo':
            return io.StringIO(f'flags : fpu {features} sse\n')
        return open(path, *arguments)

    monkeypatch.setattr(tf_retrain, 'open', open_fake, raising=False)


def read_cache(path):
    """Returns the bottleneck in a cache file."""
    return np.array(path.read_text().split(','), np.float32)


def resize(path, size):
    """Decodes and resizes an image as version 1 of TensorFlow does: float [1, *size, 3]."""
    image = tf.cast(tf.io.decode_jpeg(path.read_bytes(), 3), tf.float32)[tf.newaxis]
    return tf.compat.v1.image.resize_bilinear(image, size).numpy()


@contextlib.contextmanager
def serve(answer):
    """Has answer(handler) answer GET requests at a free port, and yields the URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 60  # or its sockets would give up as soon as those of this process that ask it

        def do_GET(self):
            answer(self)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()


def send(handler, body, length=None, status=200):
    """Sends a body, of which the header may say another length."""
    handler.send_response(status)
    handler.send_header('Content-Length', str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def read_all(folder):
    paths = sorted(path for path in folder.rglob('*.txt'))
    bottlenecks, fingerprints = tf_retrain.read_bottlenecks(list(map(str, paths)), 2048)
    assert (fingerprints >= 0).all()
    return [path.relative_to(folder) for path in paths], bottlenecks


def check_same_bottlenecks(expected_dir, found_dir):
    (expected_paths, expected), (found_paths, found) = read_all(expected_dir), read_all(found_dir)
    assert found_paths == expected_paths
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
