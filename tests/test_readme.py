"""Every command of README.md, run as it stands there, in a copy of the project with a small model and photographs."""

import contextlib
import importlib
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from conftest import COLOURS, ROOT, write_mobilenet, write_photographs

import tf_retrain

README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'^```sh\n(.*?)^```', README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace('\\\n', '').splitlines()]


def commands_with(text):
    """Returns the commands with a text in them, and marks them as run."""
    found = [command for command in COMMANDS if text in command]
    assert found
    RUN.update(found)
    return found


RUN = set()


@pytest.fixture(scope='module')
def clone(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp('clone')
    for name in ('tf_retrain.py', 'retrain_serving.py', 'tf_test.py'):
        shutil.copy(ROOT / name, folder)
    for label, colour in zip(('cat', 'dog'), COLOURS, strict=False):
        write_photographs(folder / 'data', label, 40, colour)
    shutil.copytree(folder / 'data', folder / 'train_data/train')
    (folder / 'inception').mkdir()
    shutil.copy(model, folder / 'inception')
    write_mobilenet(folder / 'inception', '1.0_224')
    return folder


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


def test_set_up_and_test_command_are_those_of_ci():
    """CI runs the two commands at the top of README.md as they stand there."""
    (test,) = commands_with('pipenv run test')
    (quickstart,) = commands_with('pipenv run quickstart')
    assert test == quickstart.replace('pipenv install', 'pipenv install --dev').replace('run quickstart', 'run test')
    ci = (ROOT / '.ci/run').read_text()
    assert 'for name in quickstart test; do\n  command=$(grep -m 1 "pipenv run $name\\$" README.md)' in ci
    assert '. .venv/bin/activate' in commands_with('activate')


def test_training_and_labelling(clone):
    for command in commands_with('python3 tf_retrain.py'):
        assert 'Final test accuracy = ' in shell(command, clone)
    (label,) = commands_with('tf_test.py')
    out = shell(label.replace('<path to image>', '"data/cat/cat 0.jpg"'), clone)
    assert re.fullmatch(r'cat \(score = 0\.\d+\)\ndog \(score = 0\.\d+\)\n', out)


@pytest.mark.slow
def test_serving_and_other_runtimes(clone, monkeypatch):
    """The blocks of Python in README.md run one after the other, and give the scores of tf_test.py."""
    (optimized,) = commands_with('--optimized_graph=')
    shell(f'{optimized} --random_seed 1', clone)
    (serving,) = commands_with('retrain_serving.py')
    assert 'Wrote the SavedModel trained_model_serving/1.' in shell(
        f'{serving} --output_graph=x --output_labels=y', clone
    )
    (show,) = commands_with('saved_model_cli')
    assert "inputs['image']" in shell(show, clone)
    monkeypatch.chdir(clone)
    path = 'data/dog/dog 0.jpg'
    (label,) = commands_with('tf_test.py')
    scores = shell(label.replace('<path to image>', f'"{path}"'), clone)
    expected = [float(re.search(rf'{name} \(score = (.+)\)', scores)[1]) for name in ('cat', 'dog')]
    blocks = [block for block in re.findall(r'^```python\n(.*?)^```', README, re.M | re.S) if 'sha1' not in block]
    space = {name: importlib.import_module(name) for name in ('pathlib', 'cv2', 'openvino')} | {'path': path}
    found = []
    for block in blocks:
        with tf_retrain.tf.Graph().as_default() if 'Session' in block else contextlib.nullcontext():
            exec(block, space)
        if 'scores = ' in block:
            found.append(space['scores'][0])
    np.testing.assert_allclose(found, [expected] * 3, atol=1e-4)
    assert len(blocks) == 6
    assert space['answer']['label'].numpy() == [b'dog']
    assert pathlib.Path('trained_model/model.tflite').stat().st_size > 10_000


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


def start(command):
    return subprocess.Popen(f'exec {command}', shell=True, env=environment(), stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_tensorboard_serves_the_tags(trained):
    (command,) = commands_with('tensorboard --logdir')
    port = free_port()
    command = command.replace('/tmp/retrain_logs', str(trained.folder / 'logs'))
    server = start(f'{command} --host localhost --port {port}')
    try:
        wait_for(port)

        def get(path):
            with urllib.request.urlopen(f'http://localhost:{port}/data/plugin/{path}', timeout=60) as response:
                return json.load(response)

        deadline = time.monotonic() + 60
        while not {'train', 'validation'} <= set(get('scalars/tags')) and time.monotonic() < deadline:
            time.sleep(1)
        for name in ('train', 'validation'):
            assert len(get('scalars/tags')[name]) == 10
            assert len(get('histograms/tags')[name]) == 4
            accuracy = get(f'scalars/scalars?run={name}&tag=accuracy_1')
            assert [point[1] for point in accuracy] == (list(range(30)) if name == 'train' else [0, 10, 20, 29])
            values = get(f'histograms/histograms?run={name}&tag=activations')
            assert [point[1] for point in values] == [0, 10, 20, 29]
        assert get('graphs/info')['train']['run_graph']
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_data_service(clone):
    (dispatcher,) = commands_with('DispatchServer')
    (worker,) = commands_with('WorkerServer')
    ports = {'5000': str(free_port()), '5001': str(free_port())}
    servers = []
    try:
        for command in (dispatcher, worker):
            servers.append(start(re.sub('5000|5001', lambda match: ports[match[0]], command)))
            wait_for(int(ports['5000' if command == dispatcher else '5001']))
        (training, *_) = commands_with('python3 tf_retrain.py')
        training = training.replace('bottlenecks/', 'served/')
        out = shell(f'{training} --data_service grpc://localhost:{ports["5000"]}', clone)
        assert out.count('Creating bottleneck at served/') == 80
        assert 'WARNING' not in out
    finally:
        for server in servers:
            server.kill()
            server.wait()


def test_accelerators(tmp_path):
    (command,) = commands_with('list_physical_devices')
    assert re.search(r'^\[.*\]$', shell(command, tmp_path), re.MULTILINE)


def test_every_flag_is_explained():
    for flag in [*vars(tf_retrain.create_parser().parse_args(['--image_dir=x'])), 'saved_model_dir']:
        assert f'| `--{flag}' in README


def test_every_command_was_run(request):
    """Comes last: the tests above have marked what they ran."""
    if sum(item.module.__name__ == 'test_readme' for item in request.session.items) < 8:
        pytest.skip('not all tests above were selected')
    assert set(COMMANDS) - RUN == set()
