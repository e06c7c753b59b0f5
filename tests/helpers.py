"""Small networks with the ops, names and versions of the published ones; photographs; a way to run the scripts."""

import contextlib
import http.server
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
from PIL import Image

import tf_retrain
import tf_test
from tf_retrain import UserError

tf = tf_retrain.tf
ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'


class GraphWriter:
    """Appends nodes to a GraphDef whose producer version stays 0, as that of the 2015 graph is."""

    def __init__(self):
        self.graph_def = tf.compat.v1.GraphDef()
        self.rng = np.random.default_rng(0)

    def node(self, name, op, inputs=(), **attrs):
        node = self.graph_def.node.add(name=name, op=op, input=list(inputs))
        for key, value in attrs.items():
            node.attr[key].CopyFrom(value)
        return name

    def const(self, name, value):
        tensor = tf.make_tensor_proto(value)
        return self.node(name, 'Const', dtype=attr(type=tensor.dtype), value=attr(tensor=tensor))

    def conv(
        self, name, source, size, channels, filters, stride=1, padding=b'SAME', scale_after=False
    ):
        """A convolution, its batch norm, the check of its numbers, and a Relu: as in the 2015 graph."""
        rng = self.rng
        weights = rng.normal(
            0, np.sqrt(2 / (size * size * channels)), [size, size, channels, filters]
        )
        self.const(f'{name}/conv2d_params', weights.astype(np.float32))
        strides = attr(list=tf.compat.v1.AttrValue.ListValue(i=[1, stride, stride, 1]))
        conv_inputs = [source, f'{name}/conv2d_params']
        self.node(
            f'{name}/Conv2D',
            'Conv2D',
            conv_inputs,
            T=FLOAT,
            strides=strides,
            padding=attr(s=padding),
        )
        statistics = {
            'moving_mean': rng.normal(0, 0.1, filters),
            'moving_variance': rng.uniform(0.5, 1.5, filters),
            'beta': rng.normal(0, 0.1, filters),
            'gamma': rng.uniform(0.5, 1.5, filters),
        }
        inputs = [
            self.const(f'{name}/batchnorm/{k}', v.astype(np.float32)) for k, v in statistics.items()
        ]
        norm = self.node(
            f'{name}/batchnorm',
            'BatchNormWithGlobalNormalization',
            [f'{name}/Conv2D', *inputs],
            T=FLOAT,
            variance_epsilon=attr(f=0.001),
            scale_after_normalization=attr(b=scale_after),
        )
        check = self.node(
            f'{name}/CheckNumerics', 'CheckNumerics', [norm], T=FLOAT, message=attr(s=b'batchnorm')
        )
        self.node(f'{name}/control_dependency', 'Identity', [norm, f'^{check}'], T=FLOAT)
        return self.node(name, 'Relu', [f'{name}/control_dependency'], T=FLOAT)

    def pool(self, name, op, source, size, stride):
        window = attr(list=tf.compat.v1.AttrValue.ListValue(i=[1, size, size, 1]))
        strides = attr(list=tf.compat.v1.AttrValue.ListValue(i=[1, stride, stride, 1]))
        return self.node(
            name, op, [source], T=FLOAT, ksize=window, strides=strides, padding=attr(s=b'VALID')
        )


def attr(**value):
    return tf.compat.v1.AttrValue(**value)


FLOAT = attr(type=tf.float32.as_datatype_enum)


def build_model():
    """Returns the small model: JPEG bytes in, 2,048 numbers and the old softmax out, a millisecond an image."""
    g = GraphWriter()
    g.const('DecodeJpeg/contents', b'')
    g.node(
        'DecodeJpeg',
        'DecodeJpeg',
        ['DecodeJpeg/contents'],
        channels=attr(i=3),
        fancy_upscaling=attr(b=True),
    )
    g.node('Cast', 'Cast', ['DecodeJpeg'], SrcT=attr(type=tf.uint8.as_datatype_enum), DstT=FLOAT)
    g.node('ExpandDims', 'ExpandDims', ['Cast', g.const('ExpandDims/dim', np.int32(0))], T=FLOAT)
    size = g.const('ResizeBilinear/size', np.array([299, 299], np.int32))
    g.node('ResizeBilinear', 'ResizeBilinear', ['ExpandDims', size], T=FLOAT)
    g.node('Sub', 'Sub', ['ResizeBilinear', g.const('Sub/y', np.float32(128))], T=FLOAT)
    g.node('Mul', 'Mul', ['Sub', g.const('Mul/y', np.float32(0.0078125))], T=FLOAT)
    g.conv('conv', 'Mul', 16, 3, 8, stride=16, padding=b'VALID', scale_after=True)
    g.pool('pool', 'MaxPool', 'conv', 3, 3)
    towers = [g.conv('mixed/conv', 'pool', 1, 8, 16), g.conv('mixed/tower/conv', 'pool', 3, 8, 16)]
    dim = g.const('mixed/concat_dim', np.int32(3))
    g.node('mixed/join', 'Concat', [dim, *towers], T=FLOAT, N=attr(i=2))
    g.conv('mixed_10/conv', 'mixed/join', 1, 32, 2048)
    g.pool('pool_3', 'AvgPool', 'mixed_10/conv', 6, 1)
    shape = g.const('pool_3/_reshape/shape', np.array([1, 2048], np.int32))
    g.node('pool_3/_reshape', 'Reshape', ['pool_3', shape], T=FLOAT)
    weights = g.const('softmax/weights', g.rng.normal(0, 0.03, [2048, 10]).astype(np.float32))
    g.node('softmax/logits', 'MatMul', ['pool_3/_reshape', weights], T=FLOAT)
    g.node('softmax', 'Softmax', ['softmax/logits'], T=FLOAT)
    return g.graph_def


def write_mobilenet(model_dir, size):
    """Writes a small network with names, ops and layout of the published MobileNet v1 <size>, such as '0.25_128'."""
    side = int(size.split('_')[1])
    g = GraphWriter()
    g.node(
        'input',
        'Placeholder',
        dtype=FLOAT,
        shape=attr(shape=tf.TensorShape([1, side, side, 3]).as_proto()),
    )

    def read(name, *shape):
        deviation = np.sqrt(2 / np.prod(shape[:3])) if len(shape) == 4 else 0.1
        value = g.rng.normal(0 if len(shape) == 4 else 1, deviation, shape)
        g.const(
            name, np.abs(value).astype(np.float32) if len(shape) == 1 else value.astype(np.float32)
        )
        location = attr(list=tf.compat.v1.AttrValue.ListValue(s=[f'loc:@{name}'.encode()]))
        return g.node(f'{name}/read', 'Identity', [name], T=FLOAT, _class=location)

    def layer(name, op, source, weights, filters, stride, **attrs):
        strides = attr(list=tf.compat.v1.AttrValue.ListValue(i=[1, stride, stride, 1]))
        x = g.node(
            f'{name}/convolution',
            op,
            [source, weights],
            T=FLOAT,
            strides=strides,
            padding=attr(s=b'SAME'),
        )
        mean, variance, beta, gamma = (
            read(f'{name}/BatchNorm/{key}', filters)
            for key in ('moving_mean', 'moving_variance', 'beta', 'gamma')
        )
        norm = f'{name}/BatchNorm/batchnorm'
        x = g.node(f'{norm}/mul_1', 'Mul', [x, f'{norm}/mul'], T=FLOAT)
        x = g.node(f'{norm}/add_1', 'Add', [x, f'{norm}/sub'], T=FLOAT)
        g.node(
            f'{norm}/add', 'Add', [variance, g.const(f'{norm}/add/y', np.float32(0.001))], T=FLOAT
        )
        g.node(f'{norm}/Rsqrt', 'Rsqrt', [f'{norm}/add'], T=FLOAT)
        g.node(f'{norm}/mul', 'Mul', [f'{norm}/Rsqrt', gamma], T=FLOAT)
        g.node(f'{norm}/mul_2', 'Mul', [mean, f'{norm}/mul'], T=FLOAT)
        g.node(f'{norm}/sub', 'Sub', [beta, f'{norm}/mul_2'], T=FLOAT)
        return g.node(f'{name}/Relu6', 'Relu6', [x], T=FLOAT)

    x = layer(
        'MobilenetV1/Conv2d_0',
        'Conv2D',
        'input',
        read('MobilenetV1/Conv2d_0/weights', 8, 8, 3, 16),
        16,
        8,
    )
    weights = read('MobilenetV1/Conv2d_1_depthwise/depthwise_weights', 3, 3, 16, 1)
    x = layer('MobilenetV1/Conv2d_1_depthwise', 'DepthwiseConv2dNative', x, weights, 16, 1)
    x = g.pool('MobilenetV1/Logits/AvgPool_1a/AvgPool', 'AvgPool', x, side // 8, 2)
    one = attr(list=tf.compat.v1.AttrValue.ListValue(i=[1, 1, 1, 1]))
    inputs = [x, read('MobilenetV1/Logits/Conv2d_1c_1x1/weights', 1, 1, 16, 1001)]
    x = g.node(
        'MobilenetV1/Logits/Conv2d_1c_1x1/convolution',
        'Conv2D',
        inputs,
        T=FLOAT,
        strides=one,
        padding=attr(s=b'SAME'),
    )
    x = g.node(
        'MobilenetV1/Logits/Conv2d_1c_1x1/BiasAdd',
        'BiasAdd',
        [x, read('MobilenetV1/Logits/biases', 1001)],
        T=FLOAT,
    )
    squeezed = attr(list=tf.compat.v1.AttrValue.ListValue(i=[1, 2]))
    x = g.node('MobilenetV1/Logits/SpatialSqueeze', 'Squeeze', [x], T=FLOAT, squeeze_dims=squeezed)
    shape = g.const('MobilenetV1/Predictions/Reshape/shape', np.array([-1, 1001], np.int32))
    x = g.node('MobilenetV1/Predictions/Reshape', 'Reshape', [x, shape], T=FLOAT)
    g.node('MobilenetV1/Predictions/Softmax', 'Softmax', [x], T=FLOAT)
    # The published graphs are not in topological order either.
    graph_def = tf.compat.v1.GraphDef(node=reversed(g.graph_def.node))
    path = model_dir / f'mobilenet_v1_{size}' / 'frozen_graph.pb'
    path.parent.mkdir(parents=True)
    path.write_bytes(graph_def.SerializeToString())
    return path


class FeatureVector(tf.Module):
    """A small image feature vector, called as those of TensorFlow Hub are: images in 0..1 to [N, 37]."""

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


def write_photographs(folder, label, count, colour, **save):
    """Writes `count` JPEG files of noise around a colour, which the small model tells apart with ease."""
    rng = np.random.default_rng(len(label))
    target = folder / label
    target.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.clip(rng.normal(colour, 40, [30, 40, 3]), 0, 255).astype(np.uint8)
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
        """Does the same job inside of this process, where TensorFlow is; returns what it printed."""
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
        self.bottlenecks, self.readable = tf_retrain.cache_bottlenecks(images, backbone, flags)
        return self.capsys.readouterr().out

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


def parse(*arguments):
    return tf_retrain.parse_flags(tf_retrain.create_parser(), list(arguments))


def load_backbone(model_dir, *arguments):
    return tf_retrain.load_backbone(
        parse('--image_dir=unused', f'--model_dir={model_dir}', *arguments)
    )


def get_set(folder, path, testing=10):
    return tf_retrain.get_set(str(path.relative_to(folder)), testing, 10)


def created(out):
    """Returns the images, 'folder/file', whose bottlenecks a run says to have computed, each as often as it says so."""
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
    """Returns a tensor of a graph for each of some encoded images, by the v1 Session that the original used."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(graph_def, name='')
        return [session.run(tensor, {'DecodeJpeg/contents:0': image_data}) for image_data in images]


def run_v1(graph_def, image_data, tensor):
    return run_v1_on_all(graph_def, [image_data], tensor)[0]


def get_scores(graph_def, image_data):
    """Returns what tf_test.py makes of an encoded image, by the softmax that ends a graph: float [classes]."""
    return tf_test.run_graph(graph_def, image_data, graph_def.node[-1].name)[0]


@contextlib.contextmanager
def serve(answer):
    """Has answer(handler) answer GET requests at a port of this machine, from which it yields the URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
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


class DataService:
    """A dispatcher in this process, and two worker processes."""

    WORKER = """
import sys
import tensorflow as tf
service = tf.data.experimental.service
server = service.WorkerServer(service.WorkerConfig(dispatcher_address=sys.argv[1]))
print('up', flush=True)
server.join()
"""

    def __enter__(self):
        self.dispatcher = tf.data.experimental.service.DispatchServer()
        command = [
            sys.executable,
            '-c',
            self.WORKER,
            self.dispatcher.target.removeprefix('grpc://'),
        ]
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.DEVNULL}
        self.workers = [subprocess.Popen(command, **pipes) for _ in range(2)]
        assert [worker.stdout.readline() for worker in self.workers] == [b'up\n', b'up\n']
        return self

    def __exit__(self, *exception):
        for worker in self.workers:
            worker.kill()
            worker.wait()


def read_all(folder):
    paths = sorted(path for path in folder.rglob('*.txt'))
    bottlenecks, fingerprints = tf_retrain.read_bottlenecks(list(map(str, paths)), 2048)
    assert (fingerprints >= 0).all()
    return [path.relative_to(folder) for path in paths], bottlenecks


def check_same_bottlenecks(expected_dir, found_dir):
    (expected_paths, expected), (found_paths, found) = read_all(expected_dir), read_all(found_dir)
    assert found_paths == expected_paths
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
