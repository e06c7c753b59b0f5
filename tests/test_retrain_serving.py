"""What retrain_serving.py adds: a SavedModel, looked at by the clients that there are."""

import base64
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import Job, run
from PIL import Image
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import predict_pb2

import retrain_serving
import tf_retrain
import tf_test

tf = tf_retrain.tf
ROWS = ('label', 'score', 'labels', 'scores')


@pytest.fixture(scope='module')
def served(tmp_path_factory, model):
    """A finished run of retrain_serving.py on three classes, one of them with a name that is not ASCII."""
    job = Job(tmp_path_factory.mktemp('served'), model).photographs(cat=60, dog=60, 猫=25)
    flags = '--saved_model_dir=trained_model_serving/1', '--how_many_training_steps=10'
    job.process = job.run(*flags, script='retrain_serving.py')
    return job


@pytest.fixture(scope='module')
def signatures(served):
    return tf.saved_model.load(str(served.folder / 'trained_model_serving/1')).signatures


@pytest.fixture(scope='module')
def photographs(served):
    """Encoded images, and their scores by tf_test.py's own function."""
    images = [path.read_bytes() for path in sorted(served.data.rglob('*.jpg'))[::8]][:18]
    for kind in ('PNG', 'GIF'):
        with io.BytesIO() as file:
            Image.open(io.BytesIO(images[0])).save(file, kind)
            images.append(file.getvalue())
    scores = np.array([tf_test.run_graph(served.graph(), image) for image in images])
    assert np.ptp(scores[:, 0]) > 0.1  # not all alike
    return images, scores


def test_output(served):
    *_, wrote, docker = served.process.stdout.splitlines()
    assert wrote.startswith('Wrote the SavedModel trained_model_serving/1.')
    assert f'-v {served.folder}/trained_model_serving:/models/retrained' in docker
    assert [path.name for path in (served.folder / 'trained_model_serving').iterdir()] == ['1']
    labelled = run(
        'tf_test.py',
        served.test_image(),
        'trained_model/unoptimized_model.pb',
        'trained_model/labels.txt',
        cwd=served.folder,
    )
    assert len(labelled.stdout.splitlines()) == 3
    assert (served.folder / 'trained_model/labels.txt').read_text() == 'cat\ndog\n猫\n'


def test_serving_default(signatures, photographs):
    images, expected = photographs
    predict = signatures['serving_default']
    for image, scores in zip(images, expected, strict=True):
        one = predict(image=tf.constant(image))
        np.testing.assert_allclose(one['prediction'], [scores], atol=1e-5)
        assert [label.decode() for label in one['classes'].numpy()] == ['cat', 'dog', '猫']
    np.testing.assert_allclose(predict(image=tf.constant(images))['prediction'], expected, atol=1e-5)


def test_rows(signatures, photographs):
    images, expected = photographs
    rows = {name: value.numpy() for name, value in signatures['predict_rows'](image=tf.constant(images)).items()}
    assert sorted(rows) == sorted(ROWS)
    names = np.array(['cat', 'dog', '猫'])
    order = np.argsort(-expected, axis=1, kind='stable')
    np.testing.assert_allclose(rows['scores'], np.take_along_axis(expected, order, 1), atol=1e-5)
    assert (np.char.decode(rows['labels'].astype(bytes), 'utf-8') == names[order]).all()
    np.testing.assert_array_equal(rows['score'], rows['scores'][:, 0])
    np.testing.assert_array_equal(rows['label'], rows['labels'][:, 0])


def test_signature_definitions(served):
    contents = (served.folder / 'trained_model_serving/1/saved_model.pb').read_bytes()
    (meta_graph,) = saved_model_pb2.SavedModel.FromString(contents).meta_graphs
    assert list(meta_graph.meta_info_def.tags) == ['serve']
    definitions = meta_graph.signature_def
    default, rows = definitions['serving_default'], definitions['predict_rows']
    assert {default.method_name, rows.method_name} == {'tensorflow/serving/predict'}
    assert default.inputs['image'].dtype == rows.inputs['image'].dtype == tf.string.as_datatype_enum
    assert default.inputs['image'].tensor_shape.unknown_rank

    def shape(info):
        return [dim.size for dim in info.tensor_shape.dim]

    assert shape(default.outputs['prediction']) == [-1, 3]
    assert shape(default.outputs['classes']) == [3]
    assert all(shape(rows.outputs[name])[0] == -1 for name in ROWS)


def ask(signatures, request):
    """Answers a request message as TensorFlow Serving does; returns the response message."""
    request = predict_pb2.PredictRequest.FromString(request.SerializeToString())
    signature = signatures[request.model_spec.signature_name or 'serving_default']
    outputs = signature(**{name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()})
    response = predict_pb2.PredictResponse(model_spec=request.model_spec)
    for name, value in outputs.items():
        response.outputs[name].CopyFrom(tf.make_tensor_proto(value.numpy()))
    return predict_pb2.PredictResponse.FromString(response.SerializeToString())


def test_messages_of_tensorflow_serving(signatures, photographs):
    images, expected = photographs
    for image, shape in ((images[0], (1, 3)), (images, (20, 3))):  # old clients send a scalar
        request = predict_pb2.PredictRequest()
        request.model_spec.name = 'retrained'
        request.inputs['image'].CopyFrom(tf.make_tensor_proto(image))
        response = ask(signatures, request)
        prediction = tf.make_ndarray(response.outputs['prediction'])
        assert prediction.shape == shape
        np.testing.assert_allclose(prediction, expected[: shape[0]], atol=1e-5)
        assert [label.decode() for label in response.outputs['classes'].string_val] == ['cat', 'dog', '猫']


def test_rest_rows(signatures, photographs):
    """The row format: each instance becomes a row of the input, and each row of the outputs a prediction."""
    images, expected = photographs
    instances = [{'image': {'b64': base64.b64encode(image).decode()}} for image in images]
    body = json.loads(json.dumps({'signature_name': 'predict_rows', 'instances': instances}))
    request = predict_pb2.PredictRequest()
    request.model_spec.signature_name = body['signature_name']
    batch = [base64.b64decode(instance['image']['b64']) for instance in body['instances']]
    request.inputs['image'].CopyFrom(tf.make_tensor_proto(batch))
    outputs = {name: tf.make_ndarray(value) for name, value in ask(signatures, request).outputs.items()}
    assert {len(value) for value in outputs.values()} == {20}
    for i, scores in enumerate(expected):
        prediction = {name: value[i] for name, value in outputs.items()}
        assert prediction['label'].decode() == ['cat', 'dog', '猫'][scores.argmax()]
        assert prediction['score'] == pytest.approx(scores.max(), abs=1e-5)
        by_label = dict(zip(prediction['labels'], prediction['scores'], strict=True))
        assert [by_label[name.encode()] for name in ('cat', 'dog', '猫')] == pytest.approx(list(scores), abs=1e-5)


def webp():
    with io.BytesIO() as file:
        Image.new('RGB', (40, 30)).save(file, 'WEBP')
        return file.getvalue()


@pytest.mark.parametrize(
    ('contents', 'message'),
    [
        (b'no image', 'Unknown image file format'),
        (b'', 'Input is empty'),
        (webp(), 'The image is not JPEG, PNG or still GIF, but WebP'),
        (b'\xff\xd8\xff\xe0broken', 'Invalid JPEG data'),
    ],
    ids=['text', 'nothing', 'WebP', 'cut JPEG'],
)
@pytest.mark.parametrize('signature', ['serving_default', 'predict_rows'])
def test_what_is_no_image_is_an_error(signatures, photographs, contents, message, signature):
    images, _ = photographs
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        signatures[signature](image=tf.constant([images[0], contents]))
    answer = signatures[signature](image=tf.constant(images[:1]))
    assert len(answer['prediction' if signature == 'serving_default' else 'score']) == 1


def test_an_existing_version_is_left_alone(served):
    for version in ('2', '7'):
        (served.folder / 'trained_model_serving' / version).mkdir()
    versions = served.folder / 'trained_model_serving'
    before = {path: path.stat().st_mtime_ns for path in versions.rglob('*')}
    flags = '--saved_model_dir=trained_model_serving/1/', '--bottleneck_dir=other'
    process = served.run(*flags, script='retrain_serving.py', check=False)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("ERROR: --saved_model_dir: 'trained_model_serving/1/' has something in it")
    assert line.endswith('--saved_model_dir=trained_model_serving/8')
    assert process.stdout == ''
    assert not (served.folder / 'other').exists()
    assert {path: path.stat().st_mtime_ns for path in versions.rglob('*')} == before
    for version in ('2', '7'):
        (versions / version).rmdir()


def test_where_a_version_can_be(tmp_path, capsys):
    retrain_serving.check_saved_model_dir(str(tmp_path / 'new/1/'))
    (tmp_path / 'new/1').mkdir()
    retrain_serving.check_saved_model_dir(str(tmp_path / 'new/1'))
    assert capsys.readouterr().out == ''
    retrain_serving.check_saved_model_dir(str(tmp_path / 'new/best'))
    assert 'WARNING: TensorFlow Serving serves only folders whose name is a number' in capsys.readouterr().out
    (tmp_path / 'file').touch()
    for path, message in (
        (tmp_path / 'file', 'is a file'),
        ('/', 'name a folder'),
        (tmp_path / 'file/1', 'file/1|nothing can'),
    ):
        with pytest.raises(retrain_serving.UserError, match=f'--saved_model_dir.*({message})'):
            retrain_serving.check_saved_model_dir(str(path))


@pytest.fixture(scope='module')
def classifier(model):
    backbone = tf_retrain.load_backbone('inception_v3', str(model.parent))
    return retrain_serving.Classifier(backbone, tf_retrain.FinalLayer(2048, 2, 0.1, [1, 2]), ['cat', 'dog'])


def test_a_version_that_came_meanwhile_is_left_alone(tmp_path, classifier):
    (tmp_path / '1').mkdir()
    assert retrain_serving.write_saved_model(classifier, f'{tmp_path}/1/') == str(tmp_path / '1')
    assert retrain_serving.write_saved_model(classifier, str(tmp_path / '1')) == str(tmp_path / '2')
    assert sorted(os.listdir(tmp_path)) == ['1', '2']
    assert tf.saved_model.contains_saved_model(str(tmp_path / '2'))


def test_a_version_appears_whole(tmp_path, classifier):
    found = []

    def watch():
        while not (tmp_path / '1').exists():
            time.sleep(0.0001)
        found.extend(sorted(str(path.relative_to(tmp_path / '1')) for path in (tmp_path / '1').rglob('*')))

    watcher = threading.Thread(target=watch)
    watcher.start()
    retrain_serving.write_saved_model(classifier, str(tmp_path / '1'))
    watcher.join()
    files = [str(path.relative_to(tmp_path / '1')) for path in (tmp_path / '1').rglob('*')]
    assert found == sorted(files)
    assert {'saved_model.pb', 'variables/variables.index'} <= set(found)


def test_a_version_that_fails_does_not_appear(tmp_path, classifier, monkeypatch):
    save = tf.saved_model.save

    def fail(*arguments):
        save(*arguments)
        raise tf.errors.ResourceExhaustedError(None, None, 'disk full')

    monkeypatch.setattr(tf.saved_model, 'save', fail)
    with pytest.raises(tf.errors.ResourceExhaustedError):
        retrain_serving.write_saved_model(classifier, str(tmp_path / '1'))
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_kill_while_it_is_written(served):
    """The files are there, under a name that no server takes for a version."""
    folder = served.folder / 'killed'
    flags = [*served.arguments(), '--saved_model_dir=killed/1', '--how_many_training_steps=1']
    script = pathlib.Path(retrain_serving.__file__)
    process = subprocess.Popen([sys.executable, str(script), *flags], cwd=served.folder, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob('.*.tmp/*')) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (name,) = os.listdir(folder)
    assert re.fullmatch(r'\.[0-9a-f]{32}\.tmp', name)


@pytest.mark.slow
def test_no_script_does_what_is_deprecated(job, monkeypatch):
    monkeypatch.setenv('PYTHONWARNINGS', 'error::DeprecationWarning')
    flags = '--saved_model_dir=saved/1', '--optimized_graph=optimized.pb', '--random_brightness=1'
    job.photographs(cat=20, dog=20).run(*flags, script='retrain_serving.py', how_many_training_steps='2')
    job.run(how_many_training_steps='2')
    run('tf_test.py', job.test_image(), job.flags['output_graph'], job.flags['output_labels'], cwd=job.folder)


FRESH = """
import sys, tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
scores = model.signatures['serving_default'](image=tf.constant(open(sys.argv[2], 'rb').read()))
print(*scores['prediction'].numpy()[0])
"""


@pytest.mark.slow
def test_clients_in_processes_of_their_own(served, photographs, tmp_path):
    folder, image = served.folder / 'trained_model_serving/1', tmp_path / 'image'
    image.write_bytes(photographs[0][0])

    def call(*command):
        process = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
        assert process.returncode == 0, process.stderr
        return process.stdout

    scores = call(sys.executable, '-c', FRESH, folder, image).split()
    np.testing.assert_allclose(np.array(scores, float), photographs[1][0], atol=1e-5)
    cli = pathlib.Path(sys.executable).with_name('saved_model_cli')
    shown = call(cli, 'show', '--dir', folder, '--all')
    assert "signature_def['serving_default']" in shown
    assert "signature_def['predict_rows']" in shown
    np.save(tmp_path / 'images.npy', np.array(photographs[0][:2]))
    for signature, name in (('serving_default', 'prediction'), ('predict_rows', 'scores')):
        arguments = ['--dir', folder, '--tag_set', 'serve', '--signature_def', signature]
        out = call(cli, 'run', *arguments, '--inputs', f'image={tmp_path}/images.npy', '--outdir', tmp_path)
        assert f'Result for output key {name}:' in out
        found = np.load(tmp_path / f'{name}.npy')
        np.testing.assert_allclose(np.sort(found), np.sort(photographs[1][:2]), atol=1e-5)
