"""What several files of tests use: a small model, a job to run, and finished runs to look at."""

import os
import shutil

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


@pytest.fixture(scope='session')
def finished_runs():
    """{kind of network: Job}. With params, a session fixture would forget a run at the next one."""
    return {}


@pytest.fixture(scope='session', params=['inception', 'mobilenet', 'module'])
def networks(request, finished_runs, tmp_path_factory, model):
    """A finished run of retrain_serving.py with each kind of network; .network are the flags that
    ask for it.
    """
    if request.param not in finished_runs:
        folder = tmp_path_factory.mktemp(request.param)
        finished_runs[request.param] = train_network(request.param, folder, model)
    return finished_runs[request.param]


def train_network(kind, folder, model):
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
