"""What several files of tests use: a small model, a job to run, and finished runs to look at."""

import os
import pickle
import shutil
import time

import pytest
from helpers import (
    COLOURS,
    ROOT,
    Job,
    build_model,
    write_mobilenet,
    write_module,
    write_photographs,
)
from hypothesis import settings

# The same examples in every run. `pytest --hypothesis-profile=default` searches for others.
settings.register_profile('same', derandomize=True)
settings.load_profile('same')

# Windows has neither these signals nor terminals.
collect_ignore = [] if os.name == 'posix' else ['test_interrupts.py']


def pytest_xdist_auto_num_workers():
    """One worker more than processors, as many tests wait for a process, a server or the disk."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0)) + 1
    return os.cpu_count() + 1


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Files with slow tests come first: at the end, no worker is left alone with one of them.

    Windows skips the tests with the marker `posix`.
    """
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if os.name != 'posix' and item.get_closest_marker('posix'):
            item.add_marker(pytest.mark.skip(reason='Windows has no such files'))


@pytest.fixture(scope='session')
def model(tmp_path_factory):
    """The path of the small model's GraphDef."""
    path = tmp_path_factory.mktemp('model') / 'classify_image_graph_def.pb'
    path.write_bytes(build_model().SerializeToString())
    return path


@pytest.fixture
def job(tmp_path, model, monkeypatch, capsys):
    return Job(tmp_path, model, monkeypatch, capsys)


@pytest.fixture(scope='session')
def trained(tmp_path_factory, model):
    """A finished run of tf_retrain.py, for tests that only look at what it left; .process is the
    finished process.
    """
    job = Job(tmp_path_factory.mktemp('trained'), model).photographs(cat=60, dog=60, Red_Fox=25)
    job.process = job.run('--print_misclassified_test_images')
    return job


@pytest.fixture(scope='session', params=['inception', 'mobilenet', 'module'])
def networks(request, tmp_path_factory, model):
    """A finished run of retrain_serving.py with each kind of network, for tests that only look at
    what it left; .network are the flags that ask for it. All workers share it.
    """
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        base = base.parent
    return share(base / request.param, train_network, request.param, model)


def share(folder, make, *arguments):
    """Returns make(folder, *arguments), which the first worker calls; the others wait for it."""
    finished = folder.with_suffix('.pickle')
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + 240
        while not finished.exists():
            assert time.monotonic() < end, f'nothing was made in {folder}'
            time.sleep(0.1)
        return pickle.loads(finished.read_bytes())
    result = make(folder, *arguments)
    unfinished = folder.with_suffix('.part')
    unfinished.write_bytes(pickle.dumps(result))
    unfinished.rename(finished)
    return result


def train_network(folder, kind, model):
    job = Job(folder, model).photographs(cat=60, dog=60, Red_Fox=25)
    write_mobilenet(job.folder / 'inception', '0.25_128')
    write_module(job.folder / 'module')
    flags = {
        'mobilenet': ['--architecture=mobilenet_0.25_128'],
        'module': ['--tfhub_module=module'],
    }
    job.network = flags.get(kind, [])
    job.flags |= {
        'how_many_training_steps': '5',
        'optimized_graph': 'trained_model/optimized_model.pb',
    }
    job.process = job.run(*job.network, '--saved_model_dir=saved/1', script='retrain_serving.py')
    return job


def make_clone(folder, model):
    """Copies the project, with the small model and photographs, into a folder."""
    for name in ('tf_retrain.py', 'retrain_serving.py', 'tf_test.py'):
        shutil.copy(ROOT / name, folder)
    for label, colour in zip(('cat', 'dog'), COLOURS, strict=False):
        write_photographs(folder / 'data', label, 40, colour, spread=15)
    for name in ('inception', 'trained_model', 'trained_model_serving', 'bottlenecks'):
        (folder / name).mkdir()
    shutil.copy(model, folder / 'inception')
    return folder


@pytest.fixture
def clone(tmp_path, model, monkeypatch):
    """A copy of the project, as the working directory."""
    monkeypatch.chdir(tmp_path)
    return make_clone(tmp_path, model)
