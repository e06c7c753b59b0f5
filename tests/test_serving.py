"""What retrain_serving.py adds: a SavedModel, looked at by the clients that there are."""

import base64
import io
import json
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from google.protobuf import any_pb2
from helpers import ROOT, Job, run, run_v1
from PIL import Image
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2

import retrain_serving

tf = retrain_serving.tf
LABELS = ['cat', 'dog', '猫']
ROWS = ['label', 'labels', 'score', 'scores']


@pytest.fixture(scope='module')
def served(tmp_path_factory, model):
    """A finished run of retrain_serving.py on three classes, one of them with a name that is not
    ASCII.
    """
    job = Job(tmp_path_factory.mktemp('served'), model).photographs(cat=60, dog=60, 猫=25)
    job.saved_model = job.folder / 'trained_model_serving/1'
    flags = '--saved_model_dir=trained_model_serving/1', '--how_many_training_steps=10'
    job.process = job.run(*flags, script='retrain_serving.py')
    return job


@pytest.fixture(scope='module')
def signatures(served):
    return tf.saved_model.load(str(served.saved_model)).signatures


def parse(*arguments):
    return retrain_serving.parse_flags(retrain_serving.create_serving_parser(), list(arguments))


def encode(image, kind, **options):
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


@pytest.fixture(scope='module')
def photographs(served):
    """Twenty photographs, a PNG and a GIF, and their scores by the frozen graph."""
    images = [path.read_bytes() for path in sorted(served.data.rglob('*.jpg'))[::7]][:20]
    picture = Image.open(io.BytesIO(images[0]))
    images += [encode(picture, 'PNG'), encode(picture, 'GIF')]
    scores = np.concatenate([run_v1(served.graph(), image, 'final_result:0') for image in images])
    assert set(scores.argmax(1)) == {0, 1, 2}
    return images, scores


def decoded(strings):
    """Returns strings of a tensor, bytes, as an array of str."""
    return np.vectorize(bytes.decode, otypes=[object])(strings)


def check_rows(rows, expected):
    """Checks outputs of predict_rows against scores in the order of the labels."""
    assert sorted(rows) == ROWS
    order = np.argsort(-expected, axis=1)
    np.testing.assert_allclose(rows['scores'], np.take_along_axis(expected, order, 1), atol=1e-5)
    assert (decoded(rows['labels']) == np.array(LABELS)[order]).all()
    np.testing.assert_array_equal(rows['score'], rows['scores'][:, 0])
    np.testing.assert_array_equal(rows['label'], rows['labels'][:, 0])


# What is written


def test_output(served):
    *_, logs, graph, usage, wrote, docker = served.process.stdout.splitlines()
    assert logs == 'To look at the training: tensorboard --logdir logs'
    assert 'trained_model/unoptimized_model.pb' in graph
    assert usage.startswith('python3 tf_test.py ')
    assert wrote == (
        'Wrote the SavedModel trained_model_serving/1. To serve it at http://localhost:8501 with '
        'Docker:'
    )
    volume = f'-v {served.folder}/trained_model_serving:/models/retrained'
    assert docker == f'docker run -p 8501:8501 {volume} -e MODEL_NAME=retrained tensorflow/serving'
    assert os.listdir(served.folder / 'trained_model_serving') == ['1']
    assert (served.folder / 'trained_model/labels.txt').read_text() == ''.join(
        f'{label}\n' for label in LABELS
    )
    files = 'trained_model/unoptimized_model.pb', 'trained_model/labels.txt'
    labelled = run('tf_test.py', served.test_image(), *files, cwd=served.folder).stdout
    assert sorted(line.split()[0] for line in labelled.splitlines()) == sorted(LABELS)


def meta_graph(saved_model):
    contents = (saved_model / 'saved_model.pb').read_bytes()
    (only,) = saved_model_pb2.SavedModel.FromString(contents).meta_graphs
    return only


def test_signature_definitions(served):
    assert list(meta_graph(served.saved_model).meta_info_def.tags) == ['serve']
    definitions = meta_graph(served.saved_model).signature_def
    assert {'serving_default', 'predict_rows'} <= set(definitions)

    def described(infos):
        shapes = {
            name: None
            if info.tensor_shape.unknown_rank
            else [dim.size for dim in info.tensor_shape.dim]
            for name, info in infos.items()
        }
        return {name: (tf.as_dtype(infos[name].dtype), shape) for name, shape in shapes.items()}

    default, rows = definitions['serving_default'], definitions['predict_rows']
    assert default.method_name == rows.method_name == 'tensorflow/serving/predict'
    assert described(default.inputs) == {'image': (tf.string, None)}
    assert described(default.outputs) == {
        'prediction': (tf.float32, [-1, 3]),
        'classes': (tf.string, [3]),
    }
    assert described(rows.inputs) == {'image': (tf.string, [-1])}
    assert described(rows.outputs) == {
        'label': (tf.string, [-1]),
        'score': (tf.float32, [-1]),
        'labels': (tf.string, [-1, 3]),
        'scores': (tf.float32, [-1, 3]),
    }


def test_no_trace_of_the_machine_is_inside(served):
    for path in served.saved_model.rglob('*'):
        for trace in (ROOT, served.folder):
            assert path.is_dir() or str(trace).encode() not in path.read_bytes()


# A program of its own that loads it

FRESH = """
import sys, numpy as np, tensorflow as tf
folder, results, *paths = sys.argv[1:]
images = [open(path, 'rb').read() for path in paths]
signatures = tf.saved_model.load(folder, tags=['serve']).signatures
found = {'signatures': sorted(signatures)}
for name, signature in signatures.items():
    answers = {'all': signature(image=tf.constant(images))}
    answers |= {i: signature(image=tf.constant(images[i:i + 1])) for i in range(len(images))}
    if name == 'serving_default':
        for i, image in enumerate(images):
            answers[f'scalar{i}'] = signature(image=tf.constant(image))
    for request, answer in answers.items():
        found |= {f'{name} {request} {output}': value.numpy() for output, value in answer.items()}
assert not {'retrain_serving', 'tf_retrain', 'tf_test'} & set(sys.modules)
np.savez(results, **found)
"""


@pytest.fixture(scope='module')
def fresh(served, photographs, tmp_path_factory):
    """What a process that has only TensorFlow gets from the SavedModel, moved to another place."""
    folder = tmp_path_factory.mktemp('fresh')
    shutil.copytree(served.saved_model, folder / 'moved')
    paths = [folder / f'image {i}' for i in range(len(photographs[0]))]
    for path, image in zip(paths, photographs[0], strict=True):
        path.write_bytes(image)
    call(sys.executable, '-I', '-c', FRESH, folder / 'moved', folder / 'results.npz', *paths)
    with np.load(folder / 'results.npz', allow_pickle=True) as results:
        return dict(results)


def call(*command):
    process = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def answer(fresh, signature, request):
    start = f'{signature} {request} '
    return {
        name.removeprefix(start): value for name, value in fresh.items() if name.startswith(start)
    }


def test_serving_default(fresh, photographs):
    _, expected = photographs
    assert {'serving_default', 'predict_rows'} <= set(fresh['signatures'])
    requests = [('all', expected)]
    requests += [
        (f'{kind}{i}', expected[i : i + 1]) for i in range(len(expected)) for kind in ('', 'scalar')
    ]
    for request, scores in requests:
        found = answer(fresh, 'serving_default', request)
        assert sorted(found) == ['classes', 'prediction']
        assert found['prediction'].shape == scores.shape
        np.testing.assert_allclose(found['prediction'], scores, atol=1e-5)
        assert decoded(found['classes']).tolist() == LABELS


def test_predict_rows(fresh, photographs):
    _, expected = photographs
    check_rows(answer(fresh, 'predict_rows', 'all'), expected)
    for i in range(len(expected)):
        check_rows(answer(fresh, 'predict_rows', i), expected[i : i + 1])


SAVED_MODEL_CLI = pathlib.Path(sys.executable).with_name('saved_model_cli')


def test_saved_model_cli_shows_it(served):
    shown = call(SAVED_MODEL_CLI, 'show', '--dir', served.saved_model, '--all')
    for signature in ('serving_default', 'predict_rows'):
        assert f"signature_def['{signature}']:" in shown
    assert shown.count('Method name is: tensorflow/serving/predict') == 2
    assert (
        "inputs['image'] tensor_info:\n        dtype: DT_STRING\n        shape: unknown_rank"
        in shown
    )


def run_saved_model_cli(served, signature, outdir, *inputs):
    flags = '--dir', served.saved_model, '--tag_set', 'serve', '--signature_def', signature
    printed = call(SAVED_MODEL_CLI, 'run', *flags, *inputs, '--outdir', outdir)
    outputs = re.findall('Result for output key (.*):', printed)
    return {name: np.load(outdir / f'{name}.npy', allow_pickle=True) for name in outputs}


def test_saved_model_cli_runs_serving_default(served, photographs, tmp_path):
    literal = ''.join(f'\\x{byte:02x}' for byte in photographs[0][0])
    found = run_saved_model_cli(
        served, 'serving_default', tmp_path, '--input_exprs', f"image=b'{literal}'"
    )
    assert decoded(found['classes']).tolist() == LABELS
    np.testing.assert_allclose(found['prediction'], photographs[1][:1], atol=1e-5)


def test_saved_model_cli_runs_predict_rows(served, photographs, tmp_path):
    np.save(tmp_path / 'images.npy', np.array(photographs[0][:2], object))
    found = run_saved_model_cli(
        served, 'predict_rows', tmp_path, '--inputs', f'image={tmp_path}/images.npy'
    )
    check_rows(found, photographs[1][:2])


# TensorFlow Serving: its messages, and what its documentation says of REST


def ask(signatures, request):
    """Answers a request message as TensorFlow Serving does; returns the response message."""
    request = predict_pb2.PredictRequest.FromString(request.SerializeToString())
    signature = signatures[request.model_spec.signature_name or 'serving_default']
    outputs = signature(
        **{name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()}
    )
    response = predict_pb2.PredictResponse(model_spec=request.model_spec)
    for name, value in outputs.items():
        response.outputs[name].CopyFrom(tf.make_tensor_proto(value.numpy()))
    return predict_pb2.PredictResponse.FromString(response.SerializeToString())


def predict_request(image, signature=''):
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = 'retrained', signature
    request.inputs['image'].CopyFrom(tf.make_tensor_proto(image))
    return request


def test_messages_for_serving_default(signatures, photographs):
    images, expected = photographs
    # Old clients send a scalar.
    for image, scores in ((images[0], expected[:1]), (images, expected)):
        for signature in ('', 'serving_default'):
            response = ask(signatures, predict_request(image, signature))
            assert sorted(response.outputs) == ['classes', 'prediction']
            prediction = tf.make_ndarray(response.outputs['prediction'])
            assert prediction.shape == scores.shape
            np.testing.assert_allclose(prediction, scores, atol=1e-5)
            assert [label.decode() for label in response.outputs['classes'].string_val] == LABELS


def test_messages_for_predict_rows(signatures, photographs):
    images, expected = photographs
    response = ask(signatures, predict_request(images, 'predict_rows'))
    assert response.model_spec.signature_name == 'predict_rows'
    check_rows({name: tf.make_ndarray(value) for name, value in response.outputs.items()}, expected)


def test_message_of_the_metadata(served):
    definitions = meta_graph(served.saved_model).signature_def
    packed = any_pb2.Any()
    packed.Pack(get_model_metadata_pb2.SignatureDefMap(signature_def=definitions))
    response = get_model_metadata_pb2.GetModelMetadataResponse(metadata={'signature_def': packed})
    response.model_spec.version.value = int(served.saved_model.name)
    parsed = get_model_metadata_pb2.GetModelMetadataResponse.FromString(
        response.SerializeToString()
    )
    unpacked = get_model_metadata_pb2.SignatureDefMap()
    assert parsed.metadata['signature_def'].Unpack(unpacked)
    assert dict(unpacked.signature_def) == dict(definitions)


def rest(signatures, body):
    """Answers the JSON of a REST request, in row or column format, as TensorFlow Serving does."""
    body = json.loads(body)
    rows = 'instances' in body

    def read(value):
        return (
            base64.b64decode(value['b64'])
            if isinstance(value, dict)
            else [read(item) for item in value]
        )

    image = (
        [read(row['image']) for row in body['instances']] if rows else read(body['inputs']['image'])
    )
    response = ask(signatures, predict_request(image, body.get('signature_name', '')))
    # These would be sent in base64.
    assert not any(name.endswith('_bytes') for name in response.outputs)
    arrays = {name: tf.make_ndarray(value) for name, value in response.outputs.items()}
    outputs = {
        name: (decoded(value) if value.dtype == object else value).tolist()
        for name, value in arrays.items()
    }
    if not rows:
        return json.dumps({'outputs': outputs})
    if any(len(value) != len(image) for value in outputs.values()):
        raise ValueError('inconsistent batch size')
    predictions = [{name: value[i] for name, value in outputs.items()} for i in range(len(image))]
    return json.dumps({'predictions': predictions})


def b64(image):
    return {'b64': base64.b64encode(image).decode()}


@pytest.mark.parametrize('count', [1, 3, 22])  # three: as many as classes
def test_rest_in_row_format(signatures, photographs, count):
    images, expected = photographs[0][:count], photographs[1][:count]
    instances = [{'image': b64(image)} for image in images]
    answer = rest(
        signatures, json.dumps({'signature_name': 'predict_rows', 'instances': instances})
    )
    predictions = json.loads(answer)['predictions']
    assert len(predictions) == count
    for prediction, scores in zip(predictions, expected, strict=True):
        assert sorted(prediction) == ROWS
        assert prediction['label'] == prediction['labels'][0] == LABELS[scores.argmax()]
        assert (
            prediction['score'] == prediction['scores'][0] == pytest.approx(scores.max(), abs=1e-5)
        )
        by_label = dict(zip(prediction['labels'], prediction['scores'], strict=True))
        assert [by_label[label] for label in LABELS] == pytest.approx(list(scores), abs=1e-5)


def test_rest_of_serving_default_is_in_column_format(signatures, photographs):
    """The original's `classes` has no row an image, which is why there is predict_rows."""
    images, expected = photographs
    for image, scores in (
        (b64(images[0]), expected[:1]),
        ([b64(image) for image in images], expected),
    ):
        outputs = json.loads(rest(signatures, json.dumps({'inputs': {'image': image}})))['outputs']
        assert outputs['classes'] == LABELS
        np.testing.assert_allclose(outputs['prediction'], scores, atol=1e-5)
    with pytest.raises(ValueError, match='inconsistent batch size'):
        rest(signatures, json.dumps({'instances': [{'image': b64(image)} for image in images]}))


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
JPEG = encode(PICTURE, 'JPEG')


@pytest.mark.parametrize(
    ('contents', 'message'),
    [
        pytest.param(
            np.random.default_rng(0).bytes(2000),
            'Unknown image file format|JPEG, PNG or still GIF',
            id='random',
        ),
        pytest.param(b'', 'Input is empty|JPEG, PNG or still GIF', id='empty'),
        pytest.param(encode(PICTURE, 'WEBP'), 'JPEG, PNG or still GIF', id='webp'),
        pytest.param(encode(PICTURE, 'BMP'), 'BMP|JPEG, PNG or still GIF', id='bmp'),
        pytest.param(JPEG[: len(JPEG) // 2], 'Invalid JPEG data', id='half a jpeg'),
        pytest.param(JPEG[:20], 'Invalid JPEG data', id='head of a jpeg'),
        pytest.param(encode(PICTURE, 'PNG')[:1000], 'Invalid PNG data', id='png'),
        pytest.param(
            encode(PICTURE, 'GIF', save_all=True, append_images=[PICTURE.rotate(180)]),
            'animated gif',
            id='animated',
        ),
    ],
)
@pytest.mark.parametrize('signature', ['serving_default', 'predict_rows'])
def test_what_is_no_image_is_an_error(signatures, photographs, signature, contents, message):
    images, expected = photographs
    for batch in ([contents], [images[0], contents, images[1]]):
        with pytest.raises(tf.errors.InvalidArgumentError) as error:
            signatures[signature](image=tf.constant(batch))
        lines = [
            line
            for line in error.value.message.splitlines()
            if ' node ' not in line and '{{node' not in line
        ]
        assert re.search(message, '\n'.join(lines)), error.value.message
        output = {'serving_default': 'prediction', 'predict_rows': 'score'}[signature]
        answered = signatures[signature](image=tf.constant(images[:2]))[output]
        wanted = expected[:2] if output == 'prediction' else expected[:2].max(1)
        np.testing.assert_allclose(answered, wanted, atol=1e-5)


def test_an_empty_batch_gets_empty_answers(signatures):
    nothing = tf.constant([], tf.string)
    answer = signatures['serving_default'](image=nothing)
    assert answer['prediction'].shape == (0, 3)
    assert decoded(answer['classes'].numpy()).tolist() == LABELS
    shapes = {
        name: tuple(value.shape)
        for name, value in signatures['predict_rows'](image=nothing).items()
    }
    assert shapes == {'label': (0,), 'score': (0,), 'labels': (0, 3), 'scores': (0, 3)}


@pytest.mark.parametrize('side', [20_000, 60_000])
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'GIF'])
def test_an_image_of_too_many_pixels_is_refused_by_its_header(signatures, kind, side):
    """They would take gigabytes to decode; 60,000 x 60,000 is negative in 32 bits."""
    contents = bytearray(encode(PICTURE, kind))
    if kind == 'PNG':
        contents[16:24] = struct.pack('>II', side, side)
    elif kind == 'GIF':
        contents[6:10] = struct.pack('<HH', side, side)
    else:
        start = contents.index(b'\xff\xc0')
        contents[start + 5 : start + 9] = struct.pack('>HH', side, side)
    for signature in signatures.values():
        with pytest.raises(tf.errors.InvalidArgumentError, match='more than 200,000,000 pixels'):
            signature(image=tf.constant([bytes(contents)]))


@pytest.mark.parametrize('signature', ['serving_default', 'predict_rows'])
def test_the_message_is_the_same_each_time(signatures, signature):
    """The check of the image comes before what else could fail."""
    webp = encode(Image.new('RGB', (8, 8)), 'WEBP')
    for _ in range(200):
        with pytest.raises(tf.errors.InvalidArgumentError, match='JPEG, PNG or still GIF'):
            signatures[signature](
                image=tf.constant(webp if signature == 'serving_default' else [webp])
            )


# Where it is written


def listing(folder):
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob('*')
    }


def test_an_existing_version_is_left_alone(served, tmp_path):
    versions = tmp_path / 'versions'
    for number in (1, 2, 7):
        (versions / str(number)).mkdir(parents=True)
        (versions / str(number) / 'saved_model.pb').write_bytes(b'served')
    before = listing(versions)
    elsewhere = {'bottleneck_dir': tmp_path / 'bottlenecks', 'output_graph': tmp_path / 'graph.pb'}
    flag = f'--saved_model_dir={versions}/1/'
    process = served.run(flag, script='retrain_serving.py', check=False, **elsewhere)
    assert process.returncode == 1
    assert process.stdout == ''
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"ERROR: --saved_model_dir: '{versions}/1/' is not empty")
    assert line.endswith(f' --saved_model_dir={versions}/8')
    assert os.listdir(tmp_path) == ['versions']
    assert listing(versions) == before


def test_where_a_version_can_be(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in ('new/1/', 'new/1', '1', 'made/1'):
        (tmp_path / 'made/1').mkdir(parents=True, exist_ok=True)
        retrain_serving.check_saved_model_dir(path)
        assert capsys.readouterr().out == ''
    retrain_serving.check_saved_model_dir('new/best')
    assert capsys.readouterr().out == (
        'WARNING: TensorFlow Serving only serves folders with a number as name, unlike new/best\n'
    )
    pathlib.Path('file').touch()
    for path, message in (
        ('file', "'file' is a file"),
        ('', 'name a folder'),
        ('/', 'name a folder'),
        ('file/1', "nothing can be written in 'file'"),
    ):
        with pytest.raises(retrain_serving.UserError, match=f'--saved_model_dir.*{message}'):
            retrain_serving.check_saved_model_dir(path)
    pathlib.Path('named/best').mkdir(parents=True)
    pathlib.Path('named/best/file').touch()
    for versions, following in (((), 1), (('009', 'x3', '10.bak'), 10), (('10', '9'), 11)):
        for version in versions:
            pathlib.Path('named', version).mkdir()
        with pytest.raises(
            retrain_serving.UserError, match=f'--saved_model_dir=named/{following}$'
        ):
            retrain_serving.check_saved_model_dir('named/best/')


def serve(served, tmp_path, monkeypatch, during):
    """Does the whole job of retrain_serving.py in this process, and `during` while it trains."""
    monkeypatch.chdir(served.folder)
    outputs = {
        'output_graph': tmp_path / 'graph.pb',
        'output_labels': tmp_path / 'labels',
        'summaries_dir': tmp_path,
    }
    flags = parse(*served.arguments(**outputs))
    flags.saved_model_dir = str(tmp_path / 'versions/7')
    train = retrain_serving.train

    def train_and_more(*arguments):
        during()
        return train(*arguments)

    monkeypatch.setattr(retrain_serving, 'train', train_and_more)
    retrain_serving.main_serving(flags)


@pytest.mark.parametrize('existing', [False, True])
def test_a_version_that_came_meanwhile_is_left_alone(
    served, tmp_path, monkeypatch, capsys, existing
):
    version = tmp_path / 'versions/7'
    if existing:
        version.mkdir(parents=True)

    def another_training():
        version.mkdir(parents=True, exist_ok=True)
        (version / 'saved_model.pb').write_bytes(b'of another training')

    serve(served, tmp_path, monkeypatch, another_training)
    assert sorted(os.listdir(version.parent)) == ['7', '8']
    assert os.listdir(version) == ['saved_model.pb']
    assert (version / 'saved_model.pb').read_bytes() == b'of another training'
    assert tf.saved_model.contains_saved_model(str(version.parent / '8'))
    *_, wrote, docker = capsys.readouterr().out.splitlines()
    assert f'Wrote the SavedModel {version.parent}/8.' in wrote
    assert f'-v {version.parent}:/models/retrained ' in docker


def test_a_file_that_came_meanwhile_is_left_alone(tmp_path, classifier):
    (tmp_path / '1').touch()
    assert retrain_serving.write_saved_model(classifier, str(tmp_path / '1')) == str(tmp_path / '2')
    assert (tmp_path / '1').is_file()
    assert tf.saved_model.contains_saved_model(str(tmp_path / '2'))


def test_ctrl_c_in_the_training_still_writes_a_version(served, tmp_path, monkeypatch, capsys):
    class Interrupting(retrain_serving.FinalLayer):
        def train(self, *arguments):
            if self.steps == 3:
                raise KeyboardInterrupt
            return super().train(*arguments)

    monkeypatch.setattr(retrain_serving, 'FinalLayer', Interrupting)
    serve(served, tmp_path, monkeypatch, lambda: None)
    assert os.listdir(tmp_path / 'versions') == ['7']
    printed = capsys.readouterr().out
    assert 'Step 0:' in printed
    assert 'Step 10:' not in printed


@pytest.fixture(scope='module')
def classifier(model):
    backbone = retrain_serving.load_backbone(
        parse('--image_dir=unused', f'--model_dir={model.parent}')
    )
    return retrain_serving.Classifier(
        backbone, retrain_serving.FinalLayer(2048, 2, 0.1, [1, 2]), ['cat', 'dog']
    )


@pytest.mark.parametrize('existing', [False, True])
def test_a_version_appears_whole(tmp_path, classifier, existing):
    version = tmp_path / '1'
    if existing:
        version.mkdir()
    seen, path = [], str(version)

    def watch(frame, event, argument):
        """Looks into the folder after each call of a function in C: all that writes files is."""
        if event == 'c_return' and not seen and os.path.isdir(path) and os.listdir(path):
            seen.append(listing(version))

    sys.setprofile(watch)
    try:
        written = retrain_serving.write_saved_model(classifier, f'{version}/')
    finally:
        sys.setprofile(None)
    assert written == str(version)
    assert seen == [listing(version)]
    names = {str(path.relative_to(version)) for path in seen[0]}
    assert {
        'saved_model.pb',
        'variables/variables.index',
        'variables/variables.data-00000-of-00001',
    } <= names
    assert os.listdir(tmp_path) == ['1']


@pytest.mark.parametrize(
    'error', [tf.errors.ResourceExhaustedError(None, None, 'disk full'), KeyboardInterrupt()]
)
@pytest.mark.parametrize('written', ['nothing', 'half', 'all'])
def test_a_version_that_fails_does_not_appear(tmp_path, classifier, monkeypatch, written, error):
    save = tf.saved_model.save

    def fail(thing, folder, *arguments):
        if written == 'half':
            pathlib.Path(folder, 'variables').mkdir(parents=True)
            pathlib.Path(folder, 'variables/variables.index').write_bytes(b'half')
        elif written == 'all':
            save(thing, folder, *arguments)
        raise error

    monkeypatch.setattr(tf.saved_model, 'save', fail)
    with pytest.raises(type(error)):
        retrain_serving.write_saved_model(classifier, str(tmp_path / '1'))
    assert os.listdir(tmp_path) == []


KILLED = """
import os, runpy, signal, sys, tensorflow as tf
save = tf.saved_model.save

def save_and_die(*arguments):
    save(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

tf.saved_model.save = save_and_die
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_a_kill_while_it_is_written_leaves_no_version(served, tmp_path):
    """The files are there, under a name that no server takes for a version."""
    outputs = {
        'output_graph': tmp_path / 'graph.pb',
        'output_labels': tmp_path / 'labels',
        'summaries_dir': tmp_path,
    }
    arguments = served.arguments(f'--saved_model_dir={tmp_path}/versions/1', **outputs)
    command = [sys.executable, '-c', KILLED, str(ROOT / 'retrain_serving.py'), *arguments]
    process = subprocess.run(
        command, cwd=served.folder, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    (name,) = os.listdir(tmp_path / 'versions')
    assert re.fullmatch(r'\.[0-9a-f]{8}\.tmp', name)
    assert (tmp_path / 'versions' / name / 'saved_model.pb').exists()
