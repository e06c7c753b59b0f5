"""Every command of every README.md, from top to bottom, in a copy of the project with a small model and photographs."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request

import numpy as np
import pytest
from helpers import COLOURS, ROOT, created, get_set, write_mobilenet, write_photographs
from PIL import Image

import retrain_serving
import tf_retrain

CI = ('pipenv run quickstart', 'pipenv run test')  # .ci/run runs these
IMAGE = 'data/dog/dog 0.jpg'


def read_blocks(readme):
    """Returns the blocks of a README.md in their order, as (language, text): those in sh line by line."""
    blocks = []
    for language, text in re.findall(r'^```(\w+)\n(.*?)^```', (ROOT / readme).read_text(), re.M | re.S):
        is_shell = language == 'sh'
        blocks += [(language, line) for line in (text.replace('\\\n', '').splitlines() if is_shell else [text])]
    return blocks


def environment():
    """python3 and tensorboard are those of the environment that runs the tests, as after `. .venv/bin/activate`."""
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ['PATH']])
    return {**os.environ, 'PATH': path}


def shell(command, folder):
    process = subprocess.run(
        command, shell=True, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


class Reader:
    """Does what a README.md says, in a folder; .outputs are (command, what it printed)."""

    def __init__(self, folder, **names):
        self.folder, self.names = folder, names
        self.outputs = []
        self.servers = []
        self.ports = {port: str(free_port()) for port in ('5000', '5001', '6006')}

    def follow(self, readme):
        for language, text in read_blocks(readme):
            if language == 'sh':
                self.outputs.append((text, self.type(text)))
            elif language == 'python':
                exec(text, self.names)
        return self

    def type(self, command):
        """Runs a line; a server is left running."""
        if command.endswith(CI):
            return ''
        if 'dispatcher' in command.lower():  # of the tf.data service, or one of its workers
            port = '5001' if 'worker_address' in command else '5000'
            return self.serve(re.sub('5000|5001', lambda match: self.ports[match[0]], command), self.ports[port])
        if command.startswith('tensorboard'):
            return self.serve(f'{command} --host localhost --port {self.ports["6006"]}', self.ports['6006'])
        if command == '. .venv/bin/activate':
            return ''
        return shell(command.replace('<path to image>', f'"{IMAGE}"'), self.folder)

    def serve(self, command, port):
        null = subprocess.DEVNULL
        options = {'shell': True, 'cwd': self.folder, 'env': environment(), 'stdout': null, 'stderr': null}
        self.servers.append(subprocess.Popen(command, start_new_session=True, **options))
        wait_for(int(port))
        return ''

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for server in self.servers:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    def find(self, text):
        """Returns what the commands with a text in them printed."""
        return [output for command, output in self.outputs if text in command]


def wait_for(port, seconds=60):
    """Waits until something listens on a port of this machine."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if not probe.connect_ex(('localhost', port)):
                return
        time.sleep(0.2)
    raise AssertionError(f'nothing listens on port {port}')


def free_port():
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


@pytest.fixture
def clone(tmp_path, model, monkeypatch):
    for name in ('tf_retrain.py', 'retrain_serving.py', 'tf_test.py'):
        shutil.copy(ROOT / name, tmp_path)
    for label, colour in zip(('cat', 'dog'), COLOURS, strict=False):
        write_photographs(tmp_path / 'data', label, 40, colour)
    for name in ('inception', 'trained_model', 'trained_model_serving', 'bottlenecks'):
        (tmp_path / name).mkdir()
    shutil.copy(model, tmp_path / 'inception')
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = [
    *('--bottleneck_dir=bottlenecks/', '--how_many_training_steps=100', '--model_dir=inception/', '--random_seed=1'),
    *('--output_graph=trained_model/unoptimized_model.pb', '--output_labels=trained_model/labels.txt'),
    *('--image_dir=data/', '--summaries_dir=logs'),
]


def train(script, *flags):
    subprocess.run([sys.executable, script, *TRAIN, *flags], check=True, capture_output=True)


def test_the_first_commands_are_those_of_ci():
    first, second = (text for _, text in read_blocks('README.md') if text.endswith(CI))
    assert second == first.replace('pipenv install', 'pipenv install --dev').replace('run quickstart', 'run test')
    ci = (ROOT / '.ci/run').read_text()
    assert 'for name in quickstart test; do\n  command=$(grep -m 1 "pipenv run $name\\$" README.md)' in ci


@pytest.mark.slow
def test_main(clone):
    with Reader(clone).follow('README.md') as reader:
        for output in reader.find('--image_dir'):
            assert 'Final test accuracy = ' in output
        assert '=== SUSPECT IMAGES ===' in reader.outputs[-1][1]
        one, folder = reader.find('tf_test.py')
        assert re.fullmatch(r'dog \(score = 0\.\d+\)\ncat \(score = 0\.\d+\)\n', one)
        assert len(folder.splitlines()) == 80
        assert len(list((clone / 'sorted').glob('*/*.jpg'))) == 80
        assert (clone / 'trained_model_serving/1/saved_model.pb').exists()
        with urllib.request.urlopen(f'http://localhost:{reader.ports["6006"]}/data/environment', timeout=60) as answer:
            assert json.load(answer)['data_location'] == '/tmp/retrain_logs'


def test_data(tmp_path, monkeypatch):
    """Photographs that are all in one folder, and lie on their side."""
    monkeypatch.chdir(tmp_path)
    write_photographs(tmp_path / 'data', 'train', 30, COLOURS[0])
    for i, path in enumerate(sorted((tmp_path / 'data/train').iterdir())):
        path.rename(path.with_name(f'{"cat" if i % 2 else "dog"}.{i}.jpg'))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new('RGB', (40, 30), 'red')
    picture.save('data/train/cat.99.jpg', exif=exif)
    before = {path.name: hashlib.sha1(path.read_bytes()).digest() for path in (tmp_path / 'data/train').iterdir()}
    names = {'name': 'data/cat/cat.0.jpg', 'validation_percentage': 10, 'testing_percentage': 10}
    reader = Reader(tmp_path, **names).follow('data/README.md')
    paths = sorted((tmp_path / 'data').rglob('*.jpg'))
    assert [path.parent.name for path in paths] == [path.name[:3] for path in paths]
    changed = [path.name for path in paths if hashlib.sha1(path.read_bytes()).digest() != before[path.name]]
    assert changed == ['cat.99.jpg']
    with Image.open('data/cat/cat.99.jpg') as image:
        assert image.size == (30, 40)
        assert 0x0112 not in image.getexif()
    assert reader.names['p'] == pytest.approx(15.7, abs=0.05)
    (rule,) = (text for language, text in read_blocks('data/README.md') if 'sha1' in text)
    for path in paths:
        names['name'] = str(path.relative_to(tmp_path))
        exec(rule, names)
        assert names['result'] == get_set(tmp_path, path)


@pytest.mark.slow
def test_inception(clone, monkeypatch):
    import keras

    create = keras.applications.EfficientNetV2B0
    untrained = lambda **options: create(**{**options, 'weights': None})  # noqa: E731
    monkeypatch.setattr(keras.applications, 'EfficientNetV2B0', untrained)
    asked = []
    hub = types.SimpleNamespace(model_download=lambda handle: asked.append(handle) or 'folder')
    monkeypatch.setitem(sys.modules, 'kagglehub', hub)
    write_mobilenet(clone / 'inception', '1.0_224')
    reader = Reader(clone).follow('inception/README.md')
    mobilenet, efficientnet = reader.find('--image_dir')
    assert 'Final test accuracy = ' in mobilenet and 'Final test accuracy = ' in efficientnet
    assert 'network inception/efficientnet' in efficientnet
    assert len(asked) == 1
    (label,) = (text for _, text in read_blocks('README.md') if 'tf_test.py <path' in text)
    assert len(reader.type(label).splitlines()) == 2


@pytest.mark.slow
def test_bottlenecks(clone):
    with Reader(clone).follow('bottlenecks/README.md') as reader:
        (devices,) = reader.find('list_physical_devices')
        assert re.search(r'^\[.*\]$', devices, re.MULTILINE)
        (train,) = (text for _, text in read_blocks('README.md') if 'tf_retrain.py' in text and 'suspects' not in text)
        out = reader.type(f'{train} --data_service grpc://localhost:{reader.ports["5000"]}')
        assert len(created(out)) == 80
        assert 'WARNING: grpc' not in out


@pytest.mark.slow
def test_trained_model(clone):
    """Every runtime gives the scores of tf_test.py."""
    train('tf_retrain.py')
    first = (clone / 'trained_model/unoptimized_model.pb').read_bytes()
    found = []
    reader = Reader(clone, path=IMAGE)
    for language, text in read_blocks('trained_model/README.md'):
        if language == 'sh':
            reader.type(f'{text} --random_seed=1' if 'retrain' in text else text)
        elif language == 'python':
            with tf_retrain.tf.Graph().as_default() if 'Session' in text else contextlib.nullcontext():
                exec(compile(text, 'README', 'exec'), reader.names)
                if 'scores = ' in text:
                    found.append(np.ravel(reader.names.pop('scores')))
        if 'record' in text and language == 'python':
            assert (clone / 'trained_model/unoptimized_model.pb').read_bytes() == first
    assert (clone / 'trained_model/model.tflite').stat().st_size > 10_000
    with Image.open(clone / 'trained_model/heatmap.png') as heatmap:
        assert heatmap.height > 24
    lines = reader.type(f'python3 tf_test.py "{IMAGE}" trained_model/unoptimized_model.pb trained_model/labels.txt')
    expected = [float(re.search(rf'{name} \(score = (.+)\)', lines)[1]) for name in ('cat', 'dog')]
    assert len(found) >= 2
    # The first is of the graph before the second training, with other steps.
    np.testing.assert_allclose(found[1:], [expected] * (len(found) - 1), atol=1e-4)


@pytest.mark.slow
def test_serving(clone):
    train('retrain_serving.py', '--saved_model_dir=trained_model_serving/1')
    reader = Reader(clone, path=IMAGE).follow('trained_model_serving/README.md')
    (shown,) = reader.find('saved_model_cli')
    assert "inputs['image']" in shown
    assert reader.names['answer']['label'].numpy() == [b'dog']


@pytest.mark.slow
def test_tests():
    tests, benchmark = (output for _, output in Reader(ROOT).follow('tests/README.md').outputs)
    assert re.search(r'\d+ passed', tests)
    assert re.search(r'^\| reading the cache of 1,000 images \|', benchmark, re.MULTILINE)


def test_every_flag_is_explained():
    readme = (ROOT / 'README.md').read_text()
    trainers = retrain_serving.create_serving_parser().parse_args(['--image_dir=x'])
    labeling = re.findall(r"add_argument\('--(\w+)'", (ROOT / 'tf_test.py').read_text())
    for flag in [*vars(trainers), *labeling]:
        assert f'| `--{flag}' in readme


def test_readmes_are_found():
    """Each folder of the layout has one, which the main one names; and the main one stays short."""
    folders = ('data', 'inception', 'bottlenecks', 'trained_model', 'trained_model_serving', 'tests')
    main = (ROOT / 'README.md').read_text()
    for folder in folders:
        assert (ROOT / folder / 'README.md').exists()
        assert f'({folder}/README.md)' in main
    assert len(main.splitlines()) <= 400


@pytest.mark.parametrize('readme', ['README.md', *(str(path.relative_to(ROOT)) for path in ROOT.glob('*/README.md'))])
def test_links_lead_somewhere(readme):
    folder, text = (ROOT / readme).parent, re.sub(r'^```.*?^```', '', (ROOT / readme).read_text(), flags=re.M | re.S)
    for target in re.findall(r'\]\(([^)]+)\)', text):
        path, _, anchor = target.partition('#')
        if not path.startswith('http'):
            page = folder / path if path else ROOT / readme
            assert page.exists(), target
            headings = re.findall(r'^#+ (.+)$', page.read_text(), re.MULTILINE) if anchor else []
            anchors = [re.sub(r'[^a-z0-9 -]', '', heading.lower()).replace(' ', '-') for heading in headings]
            assert not anchor or anchor in anchors, target
