"""Every command of every README.md, from top to bottom, in a copy of the project."""

import base64
import concurrent.futures
import contextlib
import glob
import io
import json
import pathlib
import re
import subprocess
import sys
import urllib.error
import urllib.request
from unittest import mock

import forks
import numpy as np
import pytest
from helpers import COLOURS, ROOT, created, get_set, parse, write_mobilenet, write_photographs
from PIL import Image
from reader import CI, Reader, read_blocks, train

import retrain_serving
import tf_retrain
import tf_test

tf = tf_retrain.tf


def test_the_first_commands_are_those_of_ci():
    first, second = (text for _, text in read_blocks('README.md') if text.endswith(CI))
    assert second == first.replace('pipenv install', 'pipenv install --dev').replace(
        'run quickstart', 'run test'
    )
    ci = (ROOT / '.ci/run').read_text()
    assert (
        'for name in quickstart test; do\n  command=$(grep -m 1 "pipenv run $name\\$" README.md)'
        in ci
    )


def test_powershell():
    """The commands for Windows are those for Linux, in other words."""
    commands = [text for language, text in read_blocks('README.md') if language == 'sh']
    (block,) = (text for language, text in read_blocks('README.md') if language == 'powershell')
    expected = []
    for command in commands:
        if command.endswith(CI):
            words = command.replace('python3', 'python').replace(' && ', '; ')
            expected.append(words.replace('.venv/bin/', '.venv\\Scripts\\'))
    assert block.splitlines() == expected


def test_main(clone):
    """Each script once in a new interpreter."""
    scripts = 'tf_retrain.py', 'retrain_serving.py', 'tf_test.py'
    with Reader(clone, scripts) as reader:
        reader.follow('README.md')
        assert not reader.new
        for output in reader.find('--image_dir'):
            assert 'Final test accuracy = ' in output
        one, folder = reader.find('tf_test.py')
        assert re.fullmatch(r'dog \(score = 0\.\d+\)\ncat \(score = 0\.\d+\)\n', one)
        assert len(folder.splitlines()) == 80
        assert len(list((clone / 'sorted').glob('*/*.jpg'))) == 80
        assert (clone / 'trained_model_serving/1/saved_model.pb').exists()
        url = f'http://localhost:{reader.ports["6006"]}/data/environment'
        with urllib.request.urlopen(url, timeout=120) as answer:
            assert json.load(answer)['data_location'] == '/tmp/retrain_logs'


def test_data(tmp_path, monkeypatch):
    """Photographs that are all in one folder, a table of labels, and an image of 12 bits."""
    monkeypatch.chdir(tmp_path)
    for kind, colour in zip(('cat', 'dog'), COLOURS, strict=False):
        write_photographs(tmp_path, kind, 15, colour)
    train_dir = tmp_path / 'kaggle/train'
    train_dir.mkdir(parents=True)
    for path in tmp_path.glob('*/*.jpg'):
        path.rename(train_dir / path.name.replace(' ', '.'))
    before = {path.name: path.read_bytes() for path in train_dir.iterdir()}
    write_photographs(tmp_path, 'photographs', 2, COLOURS[2])
    rows = 'file,label', 'photographs 0.jpg,bird', 'photographs 1.jpg,cat', 'unknown.jpg,'
    (tmp_path / 'labels.csv').write_text('\n'.join(rows), 'utf-8-sig')  # as Excel does
    Image.fromarray(np.arange(0, 4096, 2, np.uint16).reshape(32, 64)).save('scan.png')
    names = {'name': 'data/cat/cat.0.jpg', 'validation_percentage': 10, 'testing_percentage': 10}
    reader = Reader(tmp_path, **names).follow('data/README.md')
    assert reader.names['p'] == pytest.approx(15.7, abs=0.05)
    linked = [tmp_path / 'data/bird/photographs 0.jpg', tmp_path / 'data/cat/photographs 1.jpg']
    linked[1].unlink()
    (recipe,) = (text for _, text in read_blocks('data/README.md') if 'os.link' in text)
    exec(recipe, {})  # again, with a row that is not linked yet
    for path in linked:
        assert path.read_bytes() == (tmp_path / 'photographs' / path.name).read_bytes()
        path.unlink()
    after = {path.name: path.read_bytes() for path in tmp_path.glob('data/*/*.jpg')}
    assert after == before
    with Image.open('rescaled.png') as image:
        assert image.getextrema() == (0, 255)
    (rule,) = (text for _, text in read_blocks('data/README.md') if 'sha1' in text)
    for path in tmp_path.glob('data/*/*.jpg'):
        assert path.parent.name == path.name[:3]
        names['name'] = str(path.relative_to(tmp_path))
        exec(rule, names)
        assert names['result'] == get_set(tmp_path, path)


def test_inception(clone, monkeypatch):
    """Keras' network is replaced by a small one, which takes the same arguments.

    The run that asks for it by its name is in this process, where it is.
    """
    import keras

    def run(command, folder, fork=forks.run):
        if '--architecture=EfficientNetV2B0' not in command:
            return fork(command, folder)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            tf_retrain.main(parse(*command[1:]))
        return subprocess.CompletedProcess(command, 0, out.getvalue(), '')

    layers = [
        keras.Input([None, None, 3]),
        keras.layers.Conv2D(8, 16, 16),
        keras.layers.GlobalAveragePooling2D(),
    ]
    create = mock.create_autospec(keras.applications.EfficientNetV2B0)
    create.return_value = keras.Sequential(layers)
    create.__module__ = keras.applications.EfficientNetV2B0.__module__
    monkeypatch.setattr(keras.applications, 'EfficientNetV2B0', create)
    monkeypatch.setattr(forks, 'run', run)
    hub = mock.Mock()
    monkeypatch.setitem(sys.modules, 'kagglehub', hub)
    write_mobilenet(clone / 'inception', '1.0_224')
    reader = Reader(clone).follow('inception/README.md')
    outputs = [*reader.find('--architecture'), *reader.find('--tfhub_module')]
    networks = (
        'inception/mobilenet_v1_1.0_224/',
        'EfficientNetV2B0 of Keras',
        'inception/my_network',
    )
    for output, network in zip(outputs, networks, strict=True):
        assert f'network {network}' in output
        assert 'Final test accuracy = ' in output
    hub.model_download.assert_called_once()
    (label,) = (text for _, text in read_blocks('README.md') if 'tf_test.py <path' in text)
    assert len(reader.type(label).splitlines()) == 2


def test_bottlenecks(clone):
    with Reader(clone) as reader:
        reader.follow('bottlenecks/README.md')
        (devices,) = reader.find('list_physical_devices')
        assert re.search(r'^\[.*\]$', devices, re.MULTILINE)
        out = reader.type(f'--data_service grpc://localhost:{reader.ports["5000"]}')
        assert len(created(out)) == 80
        assert 'WARNING: grpc' not in out


def test_trained_model(clone, monkeypatch):
    train('tf_retrain.py')
    graph = clone / 'trained_model/unoptimized_model.pb'
    first = graph.read_bytes()
    with tf.Graph().as_default():
        reader = Reader(clone).follow('trained_model/README.md', 'Tensors')
    expected = sorted(reader.names['scores'][0], reverse=True)
    labels = 'trained_model/labels.txt'
    labelled = reader.type(f'python3 tf_test.py --json "{reader.names["path"]}" {graph} {labels}')
    assert json.loads(labelled)['scores'] == pytest.approx(expected, abs=1e-5)
    graph.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, 'run', lambda command, check: forks.run(command[1:]))
        reader.follow('trained_model/README.md', 'The record of a run')
    assert graph.read_bytes() == first
    reader.follow('trained_model/README.md', 'Which pixels mattered')
    with Image.open(clone / 'trained_model/heatmap.png') as heatmap:
        assert heatmap.height > 24


def ask(url, body):
    """Returns the status and the JSON of the answer to a POST request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


WRONG = [
    b'',
    b'{}',
    b'[1]',
    b'{"instances": [{"image": {"b64": "eA=="}}]}',
    b'{"instances": [{"b64": 1}]}',
]


def check_wrong(url, body):
    status, answer = ask(url, body)
    assert status == 400
    assert list(answer) == ['error']
    assert answer['error']


def check_right(url, predict, images):
    """The server gives what `predict_rows` gives."""
    instances = [{'image': {'b64': base64.b64encode(image).decode()}} for image in images]
    request = {'signature_name': 'predict_rows', 'instances': instances}
    status, answer = ask(url, json.dumps(request).encode())
    assert status == 200
    outputs = predict(image=tf.constant(images))
    assert set(answer['predictions'][0]) == set(outputs)
    for name, expected in outputs.items():
        found = [row[name] for row in answer['predictions']]
        if expected.dtype == tf.string:
            np.testing.assert_array_equal(np.char.encode(found), expected)
        else:
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_serving(clone):
    """Right and wrong requests to the server come eight at once."""
    train('retrain_serving.py', '--saved_model_dir=trained_model_serving/1')
    with Reader(clone) as reader:
        reader.follow('trained_model_serving/README.md')
        (shown,) = reader.find('saved_model_cli')
        assert "inputs['image']" in shown
        label = pathlib.Path(reader.names['path']).parent.name
        assert reader.names['answer']['label'].numpy() == [label.encode()]
        url = f'http://localhost:{reader.ports["8501"]}/v1/models/retrained:predict'
        predict = reader.names['model'].signatures['predict_rows']
        contents = [path.read_bytes() for path in sorted(clone.glob('data/*/*.jpg'))]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            checks = []
            for i in range(150):
                first = 2 * i % 80
                checks.append(pool.submit(check_right, url, predict, contents[first : first + 2]))
                if i % 3 == 0:
                    checks.append(pool.submit(check_wrong, url, WRONG[i // 3 % len(WRONG)]))
        assert len(checks) == 200
        for check in checks:
            check.result()


def test_tests():
    """One file of tests, one subject, and the benchmark."""
    *tests, benchmark = (output for _, output in Reader(ROOT).follow('tests/README.md').outputs)
    for output in tests:
        assert re.search(r'\d+ passed', output)
    assert len(tests) == 2
    assert re.search(r'^\| reading the cache of 1,000 images \|', benchmark, re.MULTILINE)


def test_every_flag_is_explained():
    readme = (ROOT / 'README.md').read_text()
    for parser in (retrain_serving.create_serving_parser(), tf_test.create_labeling_parser()):
        for option in set(parser._option_string_actions) - {'-h', '--help'}:
            assert f'| `{option}' in readme


def test_readmes_are_found():
    """Each folder of the layout has one, which the main one names; and the main one stays short."""
    folders = (
        'data',
        'inception',
        'bottlenecks',
        'trained_model',
        'trained_model_serving',
        'tests',
    )
    main = (ROOT / 'README.md').read_text()
    for folder in folders:
        assert (ROOT / folder / 'README.md').exists()
        assert f'({folder}/README.md)' in main
    assert len(main.splitlines()) <= 450


def list_anchors(page):
    """Returns the anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r'^#+ (.+)$', page.read_text(), re.MULTILINE)
    return [re.sub(r'[^a-z0-9 -]', '', text.lower()).replace(' ', '-') for text in headings]


@pytest.mark.parametrize('readme', ['README.md', *glob.glob('*/README.md', root_dir=ROOT)])
def test_links_lead_somewhere(readme):
    """Those of the project's pages, and of no hidden folder."""
    text = re.sub(r'^```.*?^```', '', (ROOT / readme).read_text(), flags=re.M | re.S)
    for path, anchor in re.findall(r'\]\((?!http)([^)#]*)#?([^)]*)\)', text):
        page = (ROOT / readme).parent / path if path else ROOT / readme
        assert page.exists(), path
        assert not anchor or anchor in list_anchors(page), anchor
