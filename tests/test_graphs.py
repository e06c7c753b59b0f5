"""The graphs: folded, frozen and optimized, and what TensorFlow 1.15 and other runtimes make of them."""

import json
import pathlib
import shutil
import subprocess

import cv2
import numpy as np
import openvino
import pytest
from helpers import build_model, get_scores, load_backbone, run_v1, write_photographs

import tf_retrain

tf = tf_retrain.tf


def test_folded_network_equals_the_graph(tmp_path, model):
    write_photographs(tmp_path, 'x', 5, (90, 140, 60))
    backbone = load_backbone(model.parent)
    before = backbone.graph_def.SerializeToString(deterministic=True)
    paths = sorted(str(path) for path in (tmp_path / 'x').iterdir())
    graph_def = tf_retrain.fold(backbone.graph_def, 'Mul', [None, 299, 299, 3], backbone.bottleneck)
    folded = {node.op for node in graph_def.node}
    assert folded.isdisjoint({'BatchNormWithGlobalNormalization', 'CheckNumerics', 'DecodeJpeg'})
    ((tags, bottlenecks),) = tf_retrain.compute_bottlenecks(paths, backbone, None, None)
    assert list(tags[:, 0]) == [0, 1, 2, 3, 4]
    assert list(tags[:, 1]) == [
        tf_retrain.fingerprint(pathlib.Path(path).read_bytes()) for path in paths
    ]
    for path, bottleneck in zip(paths, bottlenecks, strict=True):
        expected = run_v1(build_model(), pathlib.Path(path).read_bytes(), 'pool_3/_reshape:0')[0]
        np.testing.assert_allclose(bottleneck, expected, atol=1e-5 * np.abs(expected).max())
    # The frozen graph is copied from it, so nothing may have changed it.
    assert backbone.graph_def.SerializeToString(deterministic=True) == before


def test_several_devices_share_the_batches():
    """With two networks, as with two GPUs, every batch comes back once and with its own tags."""
    networks = [lambda x: x * 1.0, lambda x: x * 1.0]
    batches = tf.data.Dataset.range(103).map(lambda i: (i, tf.cast(i, tf.float32))).batch(4)
    found = [
        pair
        for tags, values in tf_retrain.run_networks(networks, batches)
        for pair in zip(tags, values, strict=True)
    ]
    assert found == [(i, float(i)) for i in range(103)]


def test_frozen_graph(trained):
    graph_def = trained.graph()
    assert not graph_def.versions.producer
    model = {node.name: node for node in build_model().node}
    names = [node.name for node in graph_def.node]
    kept = [name for name in model if not name.startswith('softmax')]
    assert names[: len(kept)] == kept
    for node in graph_def.node[: len(kept)]:
        assert node == model[node.name]
    added = {
        node.name: (node.op, list(node.input), sorted(node.attr))
        for node in graph_def.node[len(kept) :]
    }
    scope = 'final_training_ops'
    weights, biases = f'{scope}/weights/final_weights', f'{scope}/biases/final_biases'
    assert added == {
        'input/BottleneckInputPlaceholder': (
            'PlaceholderWithDefault',
            ['pool_3/_reshape'],
            ['dtype', 'shape'],
        ),
        weights: ('Const', [], ['dtype', 'value']),
        f'{weights}/read': ('Identity', [weights], ['T']),
        biases: ('Const', [], ['dtype', 'value']),
        f'{biases}/read': ('Identity', [biases], ['T']),
        f'{scope}/Wx_plus_b/MatMul': (
            'MatMul',
            ['input/BottleneckInputPlaceholder', f'{weights}/read'],
            ['T'],
        ),
        f'{scope}/Wx_plus_b/add': ('AddV2', [f'{scope}/Wx_plus_b/MatMul', f'{biases}/read'], ['T']),
        'final_result': ('Softmax', [f'{scope}/Wx_plus_b/add'], ['T']),
    }
    nodes = {node.name: node for node in graph_def.node}
    shape = nodes['input/BottleneckInputPlaceholder'].attr['shape'].shape
    assert [dim.size for dim in shape.dim] == [-1, 2048]
    assert tf.make_ndarray(nodes[weights].attr['value'].tensor).shape == (2048, 3)


@pytest.fixture(scope='module')
def scaled(networks):
    """The optimized graph's path, 20 photographs as it takes them, and their scores by tf_test.py's own function."""
    paths = sorted(networks.data.rglob('*.jpg'))[::7][:20]
    size, mean, deviation = {
        'inception': ([299, 299], 128, 128),
        'mobilenet': ([128, 128], 127.5, 127.5),
        'module': ([96, 128], 0, 255),
    }[networks.folder.name.rstrip('0123456789')]
    resize = tf.compat.v1.image.resize_bilinear
    images = [
        resize(tf.io.decode_jpeg(tf.io.read_file(str(path)), 3)[tf.newaxis], size)[0]
        for path in paths
    ]
    scores = np.array([get_scores(networks.graph(), path.read_bytes()) for path in paths])
    assert len(paths) == 20
    assert np.ptp(scores, axis=0).max() > 0.01  # they are not all alike
    return (
        str(networks.folder / networks.flags['optimized_graph']),
        (np.array(images) - mean) / deviation,
        scores,
    )


def test_tensorflow(scaled):
    path, images, expected = scaled
    graph_def = tf.compat.v1.GraphDef.FromString(pathlib.Path(path).read_bytes())

    @tf.function
    def classify(images):
        return tf.graph_util.import_graph_def(graph_def, {'Mul:0': images}, ['final_result:0'])[0]

    wrapped = tf.compat.v1.wrap_function(lambda: tf.import_graph_def(graph_def, name=''), [])
    pruned = wrapped.prune('Mul:0', 'final_result:0')
    images = tf.constant(images, tf.float32)
    for run in (classify, pruned):
        np.testing.assert_allclose(run(images), expected, atol=1e-5)
        for image, scores in zip(images, expected, strict=True):
            np.testing.assert_allclose(run(image[tf.newaxis]), [scores], atol=1e-5)


def test_opencv(scaled):
    path, images, expected = scaled
    network = cv2.dnn.readNetFromTensorflow(path)
    channels_first = images.transpose(0, 3, 1, 2).astype(np.float32)
    network.setInput(channels_first)
    np.testing.assert_allclose(network.forward(), expected, atol=1e-5)
    for image, scores in zip(channels_first, expected, strict=True):
        network.setInput(image[np.newaxis])
        np.testing.assert_allclose(network.forward(), [scores], atol=1e-5)


def test_openvino(scaled):
    path, images, expected = scaled
    network = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    np.testing.assert_allclose(network(images.astype(np.float32))[0], expected, atol=1e-5)
    for image, scores in zip(images.astype(np.float32), expected, strict=True):
        np.testing.assert_allclose(network(image[np.newaxis])[0], [scores], atol=1e-5)


@pytest.mark.filterwarnings('ignore:.*tf.lite.Interpreter is deprecated')
def test_tensorflow_lite(scaled):
    path, images, expected = scaled
    converter = tf.compat.v1.lite.TFLiteConverter.from_frozen_graph(path, ['Mul'], ['final_result'])
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    (fed,), (fetched,) = interpreter.get_input_details(), interpreter.get_output_details()
    for batch, scores in [(images, expected), (images[:1], expected[:1])]:
        interpreter.resize_tensor_input(fed['index'], batch.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(fed['index'], batch.astype(np.float32))
        interpreter.invoke()
        np.testing.assert_allclose(interpreter.get_tensor(fetched['index']), scores, atol=1e-5)


@pytest.fixture(scope='session')
def tensorflow_1(tmp_path_factory):
    """Returns the Python of an environment with TensorFlow 1.15."""
    pyenv = pathlib.Path.home().glob('.pyenv/versions/3.7*/bin/python')
    python = next(pyenv, None) or shutil.which('python3.7')
    if not python:
        pytest.skip('there is no Python 3.7 here')
    environment = tmp_path_factory.mktemp('tensorflow_1')
    subprocess.run([python, '-m', 'venv', str(environment)], check=True)
    packages = ['tensorflow==1.15.5', 'protobuf<3.21', 'numpy<1.19']
    pip = [
        str(environment / 'bin/pip'),
        'install',
        '--quiet',
        '--disable-pip-version-check',
        *packages,
    ]
    if subprocess.run(pip).returncode:
        pytest.skip('TensorFlow 1.15 cannot be installed here')
    return environment / 'bin/python'


PROGRAM = """
import json, sys
import tensorflow as tf
graph_def = tf.compat.v1.GraphDef.FromString(open(sys.argv[1], 'rb').read())
tf.import_graph_def(graph_def, name='')
with tf.compat.v1.Session() as session:
    for path in sys.argv[2:]:
        print(json.dumps(session.run('final_result:0', {'DecodeJpeg/contents:0': open(path, 'rb').read()})[0].tolist()))
"""


@pytest.mark.slow
def test_tensorflow_1_runs_the_graph(networks, tensorflow_1):
    """Python 3.7 with TensorFlow 1.15 gives the scores that we get, for every test image."""
    images = networks.test_images()
    graph = networks.folder / networks.flags['output_graph']
    command = [str(tensorflow_1), '-c', PROGRAM, str(graph), *map(str, images)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ours = [get_scores(networks.graph(), path.read_bytes()) for path in images]
    np.testing.assert_allclose([json.loads(line) for line in out.splitlines()], ours, atol=1e-5)
