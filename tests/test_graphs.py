"""The graphs: folded, frozen and optimized, and their scores in TensorFlow 1.15 and in others."""

import json
import os
import pathlib
import shutil
import subprocess

import cv2
import numpy as np
import openvino
import pytest
from helpers import ROOT, build_model, get_scores, load_backbone, run_v1_on_all

import tf_retrain

tf = tf_retrain.tf


def test_folded_network_equals_the_graph(job):
    """It ran on all images, and has none of the ops that TensorFlow 2 refuses or that cost time."""
    backbone = load_backbone(job.folder / 'inception')
    before = backbone.graph_def.SerializeToString(deterministic=True)
    graph_def = tf_retrain.fold(backbone.graph_def, 'Mul', [None, 299, 299, 3], backbone.bottleneck)
    folded = {node.op for node in graph_def.node}
    assert folded.isdisjoint({'BatchNormWithGlobalNormalization', 'CheckNumerics', 'DecodeJpeg'})
    # The frozen graph is copied from it, so nothing may have changed it.
    assert backbone.graph_def.SerializeToString(deterministic=True) == before
    job.photographs(cat=3, dog=3).cache()
    job.check_bottlenecks(
        *(f'{label}/{label} {i}.jpg' for label in ('cat', 'dog') for i in range(3))
    )


def test_several_devices_share_the_batches():
    """With two networks, as with two GPUs, every batch comes back once and with its own rows."""
    networks = [lambda x: x * 1.0, lambda x: x * 1.0]
    batches = tf.data.Dataset.range(103).map(lambda i: (i, -i, tf.cast(i, tf.float32))).batch(4)
    found = [
        row
        for batch in tf_retrain.run_networks(networks, batches)
        for row in zip(*batch, strict=True)
    ]
    assert found == [(i, -i, float(i)) for i in range(103)]


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
        if not node.name.startswith('familiarity')
    }
    scope, fed = 'final_training_ops', 'input/BottleneckInputPlaceholder'
    weights, biases = f'{scope}/weights/final_weights', f'{scope}/biases/final_biases'
    product, logits = f'{scope}/Wx_plus_b/MatMul', f'{scope}/Wx_plus_b/add'
    # TensorFlow 1 knows no other attributes.
    assert added == {
        fed: ('PlaceholderWithDefault', ['pool_3/_reshape'], ['dtype', 'shape']),
        weights: ('Const', [], ['dtype', 'value']),
        f'{weights}/read': ('Identity', [weights], ['T']),
        biases: ('Const', [], ['dtype', 'value']),
        f'{biases}/read': ('Identity', [biases], ['T']),
        product: ('MatMul', [fed, f'{weights}/read'], ['T']),
        logits: ('AddV2', [product, f'{biases}/read'], ['T']),
        f'{scope}/labels': ('Const', [], ['dtype', 'value']),
        'final_result': ('Softmax', [logits], ['T']),
    }
    nodes = {node.name: node for node in graph_def.node}
    shape = nodes[fed].attr['shape'].shape
    assert [dim.size for dim in shape.dim] == [-1, 2048]
    assert tf.make_ndarray(nodes[weights].attr['value'].tensor).shape == (2048, 3)
    labels = tf.make_ndarray(nodes[f'{scope}/labels'].attr['value'].tensor)
    assert list(labels) == [b'red fox', b'cat', b'dog']


@pytest.fixture(scope='module')
def scaled(networks):
    """The path of an optimized graph, 20 photographs as it takes them, and their scores.

    The scores are those by tf_test.py's own function.
    """
    paths = sorted(networks.data.rglob('*.jpg'))[:140:7]
    kind = networks.folder.name.rstrip('0123456789')
    inputs = {'inception': ([299, 299], 128, 128), 'mobilenet': ([128, 128], 127.5, 127.5)}
    size, mean, deviation = inputs.get(kind, ([96, 128], 0, 255))
    decoded = np.stack([tf.io.decode_jpeg(path.read_bytes(), 3) for path in paths])
    images = tf.compat.v1.image.resize_bilinear(decoded, size).numpy()
    scores = np.array([get_scores(networks.graph(), path.read_bytes()) for path in paths])
    assert len(paths) == 20
    assert np.ptp(scores, axis=0).max() > 0.01  # they are not all alike
    path = networks.folder / networks.flags['optimized_graph']
    return str(path), (images - mean) / np.float32(deviation), scores


def check_scores(classify, images, expected):
    """Checks the scores of images, as a batch and one at a time."""
    np.testing.assert_allclose(classify(images), expected, atol=1e-5)
    for image, scores in zip(images, expected, strict=True):
        np.testing.assert_allclose(classify(image[np.newaxis]), [scores], atol=1e-5)


def test_tensorflow(scaled):
    path, images, expected = scaled
    graph_def = tf.compat.v1.GraphDef.FromString(pathlib.Path(path).read_bytes())
    assert [node.name for node in graph_def.node if 'Placeholder' in node.op] == ['Mul']

    @tf.function(reduce_retracing=True)
    def classify(images):
        return tf.graph_util.import_graph_def(graph_def, {'Mul:0': images}, ['final_result:0'])[0]

    wrapped = tf.compat.v1.wrap_function(lambda: tf.import_graph_def(graph_def, name=''), [])
    pruned = wrapped.prune('Mul:0', 'final_result:0')
    for run in (classify, pruned):
        check_scores(lambda batch, run=run: run(tf.constant(batch)), images, expected)


def test_opencv(scaled):
    path, images, expected = scaled
    network = cv2.dnn.readNetFromTensorflow(path)

    def classify(batch):
        network.setInput(batch.transpose(0, 3, 1, 2))
        return network.forward()

    check_scores(classify, images, expected)


def test_openvino(scaled):
    path, images, expected = scaled
    network = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    check_scores(lambda batch: network(batch)[0], images, expected)


@pytest.mark.filterwarnings('ignore:.*tf.lite.Interpreter is deprecated')
def test_tensorflow_lite(scaled):
    path, images, expected = scaled
    converter = tf.compat.v1.lite.TFLiteConverter.from_frozen_graph(path, ['Mul'], ['final_result'])
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    (fed,), (fetched,) = interpreter.get_input_details(), interpreter.get_output_details()

    def classify(batch):
        interpreter.resize_tensor_input(fed['index'], batch.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(fed['index'], batch)
        interpreter.invoke()
        return interpreter.get_tensor(fetched['index'])

    check_scores(classify, images, expected)


@pytest.fixture(scope='session')
def tensorflow_1(tmp_path_factory):
    """Returns a Python, and the environment variables with which it has TensorFlow 1.15."""
    pyenv = pathlib.Path.home().glob('.pyenv/versions/3.7*/bin/python')
    python = next(pyenv, None) or shutil.which('python3.7')
    if not python:
        pytest.skip('there is no Python 3.7 here')
    folder = str(tmp_path_factory.mktemp('tensorflow_1'))
    pip = '-m pip install --quiet --disable-pip-version-check --no-compile --target'.split()
    packages = 'tensorflow==1.15.5', 'protobuf<3.21', 'numpy<1.19'
    if subprocess.run([python, *pip, folder, *packages], capture_output=True).returncode:
        pytest.skip('TensorFlow 1.15 cannot be installed here')
    # What the first import compiles is kept for the next.
    return python, {**os.environ, 'PYTHONPATH': folder, 'PYTHONDONTWRITEBYTECODE': ''}


@pytest.mark.slow
def test_tensorflow_1_runs_the_graph(networks, tensorflow_1):
    """Python 3.7 with TensorFlow 1.15 gives what we get, for every test image.

    The familiarity may differ by a step, and by more where all images are alike, as for the small
    MobileNet: cosines of nearly 1 have few digits that differ.
    """
    python, environment = tensorflow_1
    images = networks.test_images()
    graph = networks.folder / networks.flags['output_graph']
    command = [python, ROOT / 'tests/programs/score_v1.py', graph, *images]
    out = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
    found = np.array([json.loads(line) for line in out.splitlines()])
    ours = [get_scores(networks.graph(), path.read_bytes()) for path in images]
    np.testing.assert_allclose(found[:, :-1], ours, atol=1e-5)
    contents = [path.read_bytes() for path in images]
    familiarity = run_v1_on_all(networks.graph(), contents, 'familiarity:0')
    tolerance = 0.2 if 'mobilenet' in networks.folder.name else 1.01 / 145
    np.testing.assert_allclose(found[:, -1], np.ravel(familiarity), atol=tolerance)
