"""The graphs: folded, frozen and optimized, and their scores in TensorFlow 1.15 and in others."""

import json
import os
import pathlib
import shutil
import subprocess

import cv2
import numpy as np
import pytest
from helpers import (
    GRAPH,
    ROOT,
    build_model,
    check_familiarity,
    created,
    get_scores,
    load_backbone,
    resize,
    run_openvino,
)
from reader import read_blocks
from tensorflow.python.tools import optimize_for_inference_lib, strip_unused_lib

import tf_retrain

tf = tf_retrain.tf


FILES = [f'{label}/{label} {i}.jpg' for label in ('cat', 'dog') for i in range(40)]


def test_folded_network_equals_the_graph(job):
    """It ran on all images, and has none of the ops that TensorFlow 2 refuses or that cost time."""
    backbone = load_backbone(job.folder / 'inception')
    before = backbone.graph_def.SerializeToString(deterministic=True)
    graph_def = tf_retrain.fold(backbone.graph_def, 'Mul', [None, 299, 299, 3], backbone.bottleneck)
    folded = {node.op for node in graph_def.node}
    assert folded.isdisjoint({'BatchNormWithGlobalNormalization', 'CheckNumerics', 'DecodeJpeg'})
    # The frozen graph is copied from it, so nothing may have changed it.
    assert backbone.graph_def.SerializeToString(deterministic=True) == before
    job.photographs(cat=40, dog=40).cache()
    job.check_bottlenecks(*FILES)


def test_several_devices_share_the_batches(job, monkeypatch):
    """With two networks, as with two GPUs, each image gets its own bottleneck."""
    devices = 2 * tf.config.list_logical_devices('CPU')
    monkeypatch.setattr(tf.config, 'list_logical_devices', lambda kind: devices)
    assert len(created(job.photographs(cat=40, dog=40).cache())) == 80
    job.check_bottlenecks(*FILES)


# TensorFlow 1 knows no other attributes.
ADDED = """
input/BottleneckInputPlaceholder: PlaceholderWithDefault pool_3/_reshape [dtype, shape]
final_training_ops/weights/final_weights: Const [dtype, value]
final_training_ops/weights/final_weights/read: Identity final_training_ops/weights/final_weights [T]
final_training_ops/biases/final_biases: Const [dtype, value]
final_training_ops/biases/final_biases/read: Identity final_training_ops/biases/final_biases [T]
final_training_ops/Wx_plus_b/MatMul: MatMul input/BottleneckInputPlaceholder
    final_training_ops/weights/final_weights/read [T]
final_training_ops/Wx_plus_b/add: AddV2 final_training_ops/Wx_plus_b/MatMul
    final_training_ops/biases/final_biases/read [T]
final_training_ops/labels: Const [dtype, value]
final_result: Softmax final_training_ops/Wx_plus_b/add [T]
"""


def test_frozen_graph(trained):
    """The nodes of the model as they were, and those of the new layer."""
    graph_def = trained.graph()
    assert not graph_def.versions.producer
    kept = [node for node in build_model().node if not node.name.startswith('softmax')]
    (decode,) = (node for node in kept if node.op == 'DecodeJpeg')
    assert len(decode.attr) == 5  # default values, too, as in the published file
    assert graph_def.node[: len(kept)] == kept
    added = [
        node for node in graph_def.node[len(kept) :] if not node.name.startswith('familiarity')
    ]
    found = [
        f'{node.name}: {" ".join([node.op, *node.input])} [{", ".join(sorted(node.attr))}]'
        for node in added
    ]
    assert ' '.join(found).split() == ADDED.split()
    assert [dim.size for dim in added[0].attr['shape'].shape.dim] == [-1, 2048]
    assert tf.make_ndarray(added[1].attr['value'].tensor).shape == (2048, 3)
    labels = tf.make_ndarray(added[-2].attr['value'].tensor)
    assert labels.tolist() == [b'red fox', b'cat', b'dog']


@pytest.fixture(scope='module')
def scaled(networks):
    """The path of an optimized graph, 20 photographs as it takes them, and their scores.

    The scores are those by tf_test.py's own function.
    """
    paths = sorted(networks.data.rglob('*.jpg'))[:140:7]
    pixels = json.loads((networks.folder / f'{GRAPH}.json').read_text())['network']['input']
    images = np.concatenate([resize(path, pixels['size']) for path in paths])
    images = (images - pixels['mean']) / np.float32(pixels['deviation'])
    scores = np.array([get_scores(networks.graph(), path.read_bytes()) for path in paths])
    assert len(paths) == 20
    assert np.ptp(scores, axis=0).max() > 0.01  # they are not all alike
    return str(networks.folder / networks.flags['optimized_graph']), images, scores


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
    def classify(batch):
        return tf.graph_util.import_graph_def(graph_def, {'Mul:0': batch}, ['final_result:0'])[0]

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


def test_openvino(networks, scaled):
    path, images, expected = scaled
    blocks = read_blocks('trained_model/README.md', 'Other runtimes')
    (recipe,) = (text for _, text in blocks if 'import openvino' in text)
    recipe = recipe.replace('trained_model/optimized_model.pb', path)
    singles = images[:, np.newaxis]
    scores = run_openvino(networks.folder, recipe, [images, *singles])
    np.testing.assert_allclose(scores[0], expected, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(scores[1:]), expected, atol=1e-5)


def score_pixels(graph_def, source, images):
    """Returns the scores of a graph that begins at a node for each image of -1..1."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(graph_def, name='')
        return np.concatenate(
            [session.run('final_result:0', {f'{source}:0': image[np.newaxis]}) for image in images]
        )


def test_tools_of_2017(networks, scaled):
    """strip_unused and optimize_for_inference, from each node that takes pixels of -1..1."""
    _, images, expected = scaled
    graph_def = networks.graph()
    sources = {'Mul', 'input'}.intersection(node.name for node in graph_def.node)
    assert len(sources) == 1 + ('--architecture=mobilenet_0.25_128' in networks.network)
    for source in sources:
        boundaries = [source], ['final_result'], tf.float32.as_datatype_enum
        stripped = strip_unused_lib.strip_unused(graph_def, *boundaries)
        optimized = optimize_for_inference_lib.optimize_for_inference(graph_def, *boundaries)
        for each in (graph_def, stripped, optimized):
            np.testing.assert_allclose(score_pixels(each, source, images), expected, atol=1e-5)


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
    pip = '-m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target'
    # What it takes to run a graph: without TensorBoard and what that needs, pip is done sooner.
    packages = 'tensorflow==1.15.5 tensorflow-estimator==1.15.1 protobuf<3.21 numpy<1.19'
    packages += ' absl-py astor gast==0.2.2 google-pasta keras-applications keras-preprocessing'
    packages += ' opt-einsum six termcolor typing-extensions wrapt'
    command = [python, *pip.split(), folder, *packages.split()]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip('TensorFlow 1.15 cannot be installed here')
    # What the first import compiles is kept for the next.
    return python, {**os.environ, 'PYTHONPATH': folder, 'PYTHONDONTWRITEBYTECODE': ''}


@pytest.mark.slow
def test_tensorflow_1_runs_the_graph(networks, tensorflow_1):
    """Python 3.7 with TensorFlow 1.15 gives what we get, for every test image.

    A MobileNet also takes pixels, as clients of 2017 do.
    """
    python, environment = tensorflow_1
    images = networks.test_images()
    command = [python, ROOT / 'tests/programs/score_v1.py', networks.folder / GRAPH, *images]
    out = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
    scores, found, *of_pixels = zip(*map(json.loads, out.splitlines()), strict=True)
    ours = [get_scores(networks.graph(), path.read_bytes()) for path in images]
    np.testing.assert_allclose(scores, ours, atol=1e-5)
    contents = [path.read_bytes() for path in images]
    check_familiarity(found, networks.graph(), contents)
    assert len(of_pixels) == ('--architecture=mobilenet_0.25_128' in networks.network)
    for each in of_pixels:
        np.testing.assert_allclose(each, ours, atol=1e-5)
