"""Networks of Keras, by their names and as exported modules: their kinds of layers, at toy size."""

import hashlib
import inspect
import json
import os
import pathlib
import re
import sys
from unittest import mock

import keras
import numpy as np
import pytest
from helpers import (
    GRAPH,
    ROOT,
    classify_images,
    created,
    label_images,
    load_signatures,
    parse,
    read_cache,
    resize,
    run_new,
    send,
    serve,
)
from keras.src.applications import convnext, efficientnet_v2, imagenet_utils, mobilenet_v3, resnet

import tf_retrain
from tf_retrain import tf

SIDE = 64
OPTIONS = {'include_top': False, 'weights': None, 'pooling': 'avg'}


def create_efficientnet():
    """A fused block, and two with depthwise convolutions and squeeze-and-excitation."""
    blocks = efficientnet_v2.DEFAULT_BLOCKS_ARGS['efficientnetv2-b0']
    blocks = [{**blocks[1], 'num_repeat': 1}, {**blocks[5], 'num_repeat': 2}]
    name = 'efficientnetv2-b0'  # the networks of this name normalize each channel
    return efficientnet_v2.EfficientNetV2(0.1, 1, SIDE, blocks_args=blocks, name=name, **OPTIONS)


def create_mobilenet():
    """Inverted residual blocks, one of them with squeeze-and-excitation and hard swish."""

    def stack(x, kernel, activation, ratio):
        block = mobilenet_v3._inverted_res_block
        x = block(x, 1, 16, 3, 1, None, mobilenet_v3.relu, 0)
        return block(x, 3, 24, kernel, 2, ratio, activation, 1)

    return mobilenet_v3.MobileNetV3(stack, 16, **OPTIONS)


def create_convnext():
    """Grouped convolutions, layer normalization, GELU and layer scale."""
    return convnext.ConvNeXt([1, 1, 1, 1], [8, 8, 16, 24], **OPTIONS)


def create_resnet():
    """Two residual blocks that begin with a batch norm."""
    stack = resnet.stack_residual_blocks_v2
    return resnet.ResNet(lambda x: stack(x, 8, 2, name='conv2'), True, True, **OPTIONS)


NETWORKS = [  # with what turns pixels from 0 to 1 into those that the network wants
    (create_efficientnet, (255, 0)),
    (create_mobilenet, (255, 0)),
    (create_convnext, (255, 0)),
    (create_resnet, (2, -1)),
]


def test_networks_of_keras(job):
    """Four networks, exported as inception/README.md shows: trained, labeled, served."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    pixels = keras.Input([SIDE, SIDE, 3])
    features = []
    for create, scaling in NETWORKS:
        network = create()
        # Untrained batch norms and layer scales do next to nothing.
        for variable in network.weights:
            if len(variable.shape) == 1 and variable.dtype == 'float32':
                variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        features.append(network(keras.layers.Rescaling(*scaling)(pixels)))
    keras.Model(pixels, keras.layers.Concatenate()(features)).export(
        str(job.folder / 'module'), verbose=False
    )
    flags = ['--tfhub_module=module', '--saved_model_dir=saved/1', '--how_many_training_steps=3']
    job.photographs(cat=20, dog=20).run(*flags, script='retrain_serving.py')

    images = job.test_images()
    caches = [job.cache_file(f'{image.relative_to(job.data)}_module') for image in images]
    bottlenecks = np.stack([read_cache(cache) for cache in caches])
    *ends, size = np.cumsum([feature.shape[1] for feature in features])
    assert bottlenecks.shape[1] == size
    resized = np.concatenate([resize(image, [SIDE, SIDE]) for image in images]) / 255
    expected = keras.Model(pixels, features)(resized)
    for ours, theirs in zip(np.split(bottlenecks, ends, axis=1), expected, strict=True):
        spread = np.ptp(theirs, axis=0).max()
        assert spread > 1e-3 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * spread)

    scores = label_images(job.folder, images)
    assert np.ptp(scores) > 0.01
    signatures = load_signatures(job.folder)
    np.testing.assert_allclose(classify_images(signatures, images), scores, atol=1e-5)
    rows = signatures['predict_rows'](image=tf.constant([path.read_bytes() for path in images]))
    best_first = np.argsort(-scores)
    np.testing.assert_array_equal(rows['labels'], np.array([b'cat', b'dog'])[best_first])
    expected = np.take_along_axis(scores, best_first, 1)
    np.testing.assert_allclose(rows['scores'], expected, atol=1e-5)


# By their names


class SideFoundError(Exception):
    """Ends the construction of a network as soon as it knows the side of its images."""


def test_names_and_sides_are_those_of_keras(monkeypatch):
    """All of Keras Applications; and each has a row in inception/README.md."""

    def stop(input_shape, default_size, **options):
        raise SideFoundError(default_size)

    def stop_without_default(*arguments, **options):
        raise SideFoundError(224)  # which is in the names of the files with the weights

    monkeypatch.setattr(imagenet_utils, 'obtain_input_shape', stop)
    monkeypatch.setattr(mobilenet_v3, 'MobileNetV3', stop_without_default)
    sides = {}
    for name, create in inspect.getmembers(keras.applications, inspect.isfunction):
        with pytest.raises(SideFoundError) as found:
            create(weights=None)
        (sides[name],) = found.value.args
        assert callable(sys.modules[create.__module__].preprocess_input)
    assert sides == tf_retrain.KERAS_NETWORKS
    table = (ROOT / 'inception/README.md').read_text()
    rows = re.findall(r'^\| `([^`]+)` \| (\d+) \|', table, re.MULTILINE)
    assert sides.items() <= {(name, int(side)) for name, side in rows}


def create_named(
    include_top=True, weights='imagenet', input_shape=None, pooling=None, name='resnet50'
):
    """Stands in for any network of Keras, with some of its arguments: a ResNet of one block."""

    def stack(x):
        return resnet.stack_residual_blocks_v1(x, 4, 1, stride1=4, name='conv2')

    options = {'include_top': include_top, 'input_shape': input_shape, 'pooling': pooling}
    return resnet.ResNet(
        stack, False, True, weights=weights, weights_name='resnet50', name=name, **options
    )


FILE = 'resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5'


@pytest.fixture
def keras_host(tmp_path, monkeypatch):
    """The networks of Keras are replaced by a small one, which is downloaded from a local server.

    Yields {path: arguments of send()}, which a test may change, and the paths that were asked for.
    """
    keras.utils.set_random_seed(0)
    network = create_named(False, None, [64, 64, 3], 'avg')
    network.save(tmp_path / 'x.h5')
    body = (tmp_path / 'x.h5').read_bytes()
    monkeypatch.setitem(resnet.WEIGHTS_HASHES, 'resnet50', ['', hashlib.md5(body).hexdigest()])
    monkeypatch.setenv('KERAS_HOME', str(tmp_path / 'home'))
    for name in tf_retrain.KERAS_NETWORKS:
        monkeypatch.setattr(keras.applications, name, create_stand_in(name))
    answers, asked = {f'/{FILE}': {'body': body}}, []

    def answer(handler):
        asked.append(handler.path)
        if not answers[handler.path]:  # it says nothing
            handler.connection.recv(1)  # until the other side gives up
            return
        send(handler, **answers[handler.path])

    with serve(answer) as url:
        monkeypatch.setattr(resnet, 'BASE_WEIGHTS_PATH', f'{url}/')
        yield answers, asked


def create_stand_in(name):
    """Returns a function that seems to come from the module of the network with this name."""
    module = getattr(keras.applications, name).__module__

    def create(**options):
        return create_named(**options)

    create.__module__ = module
    return create


def prepare_for_caffe(images):
    return images[..., ::-1] - np.float32([103.939, 116.779, 123.68])


def prepare_for_torch(images):
    return (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]


PREPARATIONS = [
    ('EfficientNetV2B1', 240, lambda images: images),
    ('InceptionV3', 299, lambda images: images / 127.5 - 1),
    ('DenseNet121', 224, prepare_for_torch),
    ('VGG16', 224, prepare_for_caffe),
]


@pytest.mark.parametrize(('name', 'side', 'prepare'), PREPARATIONS)
def test_bottlenecks_are_those_of_keras(job, keras_host, name, side, prepare):
    """Of images as the network wants them; the weights are downloaded once."""
    _, asked = keras_host
    assert len(created(job.photographs(cat=3, dog=3).cache(f'--architecture={name}'))) == 6
    assert created(job.cache(f'--architecture={name}')) == []
    assert asked == [f'/{FILE}']
    weights = job.folder / 'home/models' / FILE
    network = create_named(False, weights, [side, side, 3], 'avg')
    images = sorted(job.data.rglob('*.jpg'))
    found = [read_cache(job.cache_file(f'{i.relative_to(job.data)}_{name}')) for i in images]
    resized = np.concatenate([resize(image, [side, side]) for image in images])
    expected = network(prepare(resized)).numpy()
    assert np.ptp(expected, axis=0).max() > 0
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_notebook_that_computes_in_half_precision(job, keras_host):
    """Its bottlenecks are the same as those of a command, and its setting stays."""
    job.photographs(cat=20, dog=20).cache('--architecture=ResNet50V2')
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy('mixed_bfloat16')
    keras.config.set_floatx('float16')
    try:
        job.cache('--architecture=ResNet50V2', bottleneck_dir='notebook')
        assert keras.config.dtype_policy().name == 'mixed_bfloat16'
        assert keras.config.floatx() == 'float16'
    finally:
        keras.config.set_dtype_policy(before)
        keras.config.set_floatx('float32')
    for path in (job.folder / 'bottlenecks').rglob('*.txt'):
        other = job.folder / 'notebook' / path.relative_to(job.folder / 'bottlenecks')
        np.testing.assert_array_equal(read_cache(other), read_cache(path))


def test_a_network_by_its_name(job, keras_host):
    """Graph, record and labels are as with any network; other weights are noticed."""
    answers, _ = keras_host
    flags = ['--architecture=ResNet50V2', '--optimized_graph=optimized.pb']
    out = job.photographs(cat=20, dog=20).main(*flags, how_many_training_steps='100')
    assert 'network ResNet50V2 of Keras' in out
    assert 'Wrote the optimized graph optimized.pb' in out
    record = json.loads((job.folder / f'{GRAPH}.json').read_text())
    assert record['flags']['architecture'] == 'ResNet50V2'
    assert record['network']['source'] == f'ResNet50V2 of Keras {keras.__version__}'
    assert record['network']['input']['size'] == [224, 224]
    images = job.test_images()
    is_dog = [path.parent.name == 'dog' for path in images]
    labelled = label_images(job.folder, images).argmax(axis=1)
    assert np.mean(labelled == is_dog) == record['test']['accuracy'] == 1

    path = job.folder / 'home/models' / FILE
    network = create_named(False, path, [64, 64, 3], 'avg')
    network.set_weights([weights * 2 for weights in network.get_weights()])
    network.save(job.folder / 'x.h5')
    body = (job.folder / 'x.h5').read_bytes()
    resnet.WEIGHTS_HASHES['resnet50'][1] = hashlib.md5(body).hexdigest()
    answers[f'/{FILE}'] = {'body': body}
    assert job.cache(*flags).count('The image or the model changed') == 40


FAILURES = [
    ({'body': b'', 'status': 404}, 'HTTP Error 404: Not Found'),
    ({'body': b'half', 'length': 8}, '4 of 8 bytes came'),
    ({}, 'timed out'),
    ({'body': b'<html></html>'}, '13 bytes came, and are not the weights that Keras expects'),
]


def test_weights_that_cannot_be_downloaded(job, keras_host, monkeypatch):
    """The next run tries again; a file that the user puts there is taken."""
    monkeypatch.setattr(tf_retrain, 'DOWNLOAD_TIMEOUT', 0.5)
    monkeypatch.setattr(tf_retrain, 'DOWNLOAD_ATTEMPTS', 1)
    answers, asked = keras_host
    right = answers[f'/{FILE}']['body']
    path = job.folder / 'home/models' / FILE
    job.photographs(cat=3, dog=3)
    for answer, reason in FAILURES:
        answers[f'/{FILE}'] = answer
        with pytest.raises(tf_retrain.UserError) as error:
            job.cache('--architecture=ResNet50')
        message = str(error.value)
        assert message.startswith(f'{resnet.BASE_WEIGHTS_PATH}{FILE} could not be downloaded (')
        assert reason in message
        assert message.endswith(f'or save it as {path}.')
        assert not path.exists()
    assert len(asked) == len(FAILURES)
    path.write_bytes(right)
    assert len(created(job.cache('--architecture=ResNet50'))) == 6
    assert len(asked) == len(FAILURES)


@pytest.mark.parametrize('is_online', [True, False])
def test_weights_of_another_version_of_keras_are_kept(job, keras_host, monkeypatch, is_online):
    """Keras would overwrite them, or delete them if it has no network connection."""
    monkeypatch.setattr(tf_retrain, 'DOWNLOAD_ATTEMPTS', 1)
    answers, _ = keras_host
    if not is_online:
        answers[f'/{FILE}'] = {'body': b'', 'status': 503}
    path = job.folder / 'home/models' / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(b'of another version')
    job.photographs(cat=3, dog=3)
    if is_online:
        out = job.cache('--architecture=ResNet50')
    else:
        with pytest.raises(tf_retrain.UserError, match='HTTP Error 503'):
            job.cache('--architecture=ResNet50')
        out = job.capsys.readouterr().out
    assert f'{path} is damaged, or not what this Keras needs: renamed to {path}.broken.' in out
    assert pathlib.Path(f'{path}.broken').read_bytes() == b'of another version'
    assert path.exists() == is_online


def test_weights_that_came_a_moment_ago_are_kept(tmp_path, monkeypatch):
    """Those that another run has downloaded."""
    path = tmp_path / 'w.h5'

    def arrive(*arguments):
        path.write_bytes(b'of another run')

    monkeypatch.setattr(tf_retrain, 'ensure_writable_dir', arrive)
    monkeypatch.setattr(tf_retrain, 'download', mock.Mock())
    assert tf_retrain.fetch_weights(str(path), '', cache_subdir='') == str(path)
    assert [path.name for path in tmp_path.iterdir()] == ['w.h5']


def test_weights_may_be_read_only(job, keras_host, monkeypatch):
    path = job.folder / 'home/models' / FILE
    job.photographs(cat=3, dog=3).cache('--architecture=ResNet50')
    probe = mock.Mock(wraps=tf_retrain.ensure_writable_dir)
    monkeypatch.setattr(tf_retrain, 'ensure_writable_dir', probe)
    before = path.stat()
    job.cache('--architecture=ResNet50')
    assert not probe.called
    assert path.stat() == before


@pytest.mark.parametrize(
    ('error', 'expected', 'message'),
    [
        (MemoryError('full'), MemoryError, '^full$'),
        (
            ValueError('Layer count mismatch\nmore'),  # Keras checks not all files by a checksum
            tf_retrain.UserError,
            r'^The weights in .*models cannot be loaded \(Layer count mismatch\)\. Delete those',
        ),
    ],
)
def test_weights_that_cannot_be_loaded(job, keras_host, monkeypatch, error, expected, message):
    def fail(**options):
        raise error

    fail.__module__ = resnet.__name__
    monkeypatch.setattr(keras.applications, 'ResNet50', fail)
    with pytest.raises(expected, match=message):
        job.photographs(cat=3, dog=3).cache('--architecture=ResNet50')


@pytest.mark.parametrize(
    ('architecture', 'before', 'after', 'is_imported'),
    [
        ('ResNet50', {}, {'KERAS_HOME': 'inception/'}, False),
        ('ResNet50', {'KERAS_HOME': '/mine'}, {'KERAS_HOME': '/mine'}, False),
        ('ResNet50', {}, {}, True),
        ('inception_v3', {}, {}, False),
    ],
)
def test_where_keras_keeps_weights(monkeypatch, architecture, before, after, is_imported):
    """In --model_dir, unless the user has set another folder, or a notebook has imported Keras."""
    monkeypatch.setattr(os, 'environ', dict(before))
    if not is_imported:
        monkeypatch.delitem(sys.modules, 'keras')
    flags = parse('--image_dir=x', '--model_dir=inception/', f'--architecture={architecture}')
    tf_retrain.prepare_keras(flags)
    assert os.environ == after


def test_without_a_network_connection(job, monkeypatch):
    """A new interpreter, as Keras looks for its folder when TensorFlow is imported."""
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:1')
    monkeypatch.delenv('KERAS_HOME', raising=False)
    arguments = job.photographs(cat=3, dog=3).arguments('--architecture=VGG16')
    process = run_new('tf_retrain.py', *arguments, cwd=job.folder, check=False)
    assert process.returncode == 1
    assert 'Downloading' not in process.stdout
    url = (
        'https://storage.googleapis.com/tensorflow/keras-applications/vgg16/'
        'vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5'
    )
    start = f'ERROR: {url} could not be downloaded ('
    end = f'or save it as inception/models/{url.split("/")[-1]}.'
    line = process.stderr.splitlines()[-1]
    assert (line.startswith(start), line.endswith(end)) == (True, True), line
