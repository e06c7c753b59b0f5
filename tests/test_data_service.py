"""Bottlenecks from a tf.data service: each once and the same, whoever is slow, hangs or dies."""

import contextlib
import itertools
import pathlib
import re
import signal
import socket

import numpy as np
import pytest
from forks import Fork
from helpers import ROOT, check_same_bottlenecks, created, set_processor
from networks import save_function

import tf_retrain

tf = tf_retrain.tf
PROGRAMS = ROOT / 'tests/programs'


@contextlib.contextmanager
def run_service(count=2):
    """Yields the address of a dispatcher in this process, its workers, and how to start one."""
    dispatcher = tf.data.experimental.service.DispatchServer()
    command = [PROGRAMS / 'worker.py', dispatcher.target.removeprefix('grpc://')]
    with contextlib.ExitStack() as stack:

        def start():
            return stack.enter_context(Fork(command))

        workers = [start() for _ in range(count)]
        for worker in workers:
            worker.wait_for('The worker is up')
        yield dispatcher.target, workers, start


@pytest.fixture(scope='module')
def address():
    """A service for the tests that leave its workers alone."""
    with run_service() as (address, *_):
        yield address


@pytest.fixture
def small_batches(monkeypatch):
    """A few photographs make many batches."""
    monkeypatch.setattr(tf_retrain, 'NETWORK_BATCH_SIZE', 4)


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_workers_compute_every_bottleneck_once(job, monkeypatch, small_batches, address, precision):
    """All of them, and the same as here, whatever the workers' own settings and folders are."""
    set_processor(monkeypatch, 'bf16')
    flags = {'precision': precision, 'image_dir': job.photographs(cat=60, dog=60).data}
    job.cache(**flags, bottleneck_dir='alone')
    monkeypatch.setattr(
        tf_retrain, 'run_networks', lambda networks, batches: (batch for batch in ())
    )
    out = job.cache(**flags, data_service=address)
    assert out.count('Creating bottleneck at') == 120
    check_same_bottlenecks(job.folder / 'alone', job.folder / 'bottlenecks')


def test_a_module_that_does_not_keep_its_promise(job, address):
    """The workers do not look at what it gives."""
    save_function(job.folder / 'module', lambda images: tf.reshape(images, [-1, 3]))
    problem = '^module gives 512 vectors for 8 images. Name another network'
    job.photographs(cat=4, dog=4).fails(problem, '--tfhub_module=module', data_service=address)


def test_a_worker_that_reads_other_files(tmp_path, capsys):
    """It was started in another folder, or has an old copy of this one."""
    paths = [str(tmp_path / name) for name in 'abc']
    for path in paths[:2]:
        pathlib.Path(path).write_text(path)
    digests = np.array([int(tf_retrain.compute_digest(path)) for path in paths])
    digests[1] += 1
    keys = np.array([5, 7, 9])  # the last file is missing here
    batches = [(keys, digests, np.eye(3)), (keys[1:], digests[1:], np.eye(2))]
    ((left, *_, bottlenecks),) = tf_retrain.drop_other_files(iter(batches), keys, paths)
    assert left.tolist() == [5]
    assert bottlenecks.tolist() == [[1, 0, 0]]
    line = 'WARNING: the service read other files than those here for 4 images.\n'
    assert capsys.readouterr().out == line


def test_a_worker_that_dies(job, monkeypatch, small_batches):
    """What it had in its hands is computed here: a few batches that it made or was making.

    It is alone until then, so it has some: another worker comes and does the rest.
    """
    job.photographs(cat=150, dog=150).cache(bottleneck_dir='alone')
    compute, here, writes = tf_retrain.run_networks, [], itertools.count(1)

    def count(networks, batches):
        for rows, *result in compute(networks, batches):
            here.extend(rows)
            yield rows, *result

    with run_service(1) as (address, (worker,), start):

        def write(path, contents, write_whole=tf_retrain.write_whole):
            write_whole(path, contents)
            if next(writes) == 40:
                start().wait_for('The worker is up')
                worker.kill()
                monkeypatch.setattr(tf_retrain, 'DATA_SERVICE_TIMEOUT', 10)

        monkeypatch.setattr(tf_retrain, 'write_whole', write)
        monkeypatch.setattr(tf_retrain, 'run_networks', count)
        out = job.cache(data_service=address)
    assert out.count('Creating bottleneck at') == 300
    assert 0 < len(here) <= 16 * tf_retrain.NETWORK_BATCH_SIZE
    check_same_bottlenecks(job.folder / 'alone', job.folder / 'bottlenecks')


def check_computed_here(job, address):
    """With a service that hangs, images are computed here after a warning, and the process ends."""
    command = [PROGRAMS / 'impatient.py', *job.arguments(data_service=address)]
    with Fork(command, job.folder) as process:
        out, errors = process.communicate()
    assert process.returncode == 0
    assert errors == ''
    assert re.search(r'WARNING: grpc://\S+ failed \(nothing came for 1 s\)\.', out)
    assert re.search(r'WARNING: grpc://\S+ left out 60 of 60 images\.', out)
    assert len(created(out)) == 60


def test_workers_that_hang_do_not_hold_up_the_run(job):
    """Neither when they bring nothing, nor at the end of the process."""
    job.photographs(cat=30, dog=30)
    with run_service() as (address, workers, _):
        for worker in workers:
            worker.send_signal(signal.SIGSTOP)
        check_computed_here(job, address)


def test_a_dispatcher_that_hangs_does_not_hold_up_the_run(job):
    """It lets clients connect, and answers nothing."""
    job.photographs(cat=30, dog=30)
    with socket.create_server(('localhost', 0)) as dispatcher:
        check_computed_here(job, f'grpc://localhost:{dispatcher.getsockname()[1]}')


def test_a_service_that_fails_says_why_at_once(job, monkeypatch, address):
    """The rest is computed here, without the wait for what does not come."""
    job.photographs(cat=30, dog=30)
    monkeypatch.setattr(tf_retrain, 'DATA_SERVICE_TIMEOUT', 100_000)  # too long for this test

    def fail(*arguments):
        return lambda batches: batches.map(
            lambda *row: (*row[:-1], tf.debugging.check_numerics(row[-1] / 0, 'reason'))
        )

    monkeypatch.setattr(tf.data.experimental.service, 'distribute', fail)
    out = job.cache(data_service=address)
    assert re.search(r'WARNING: grpc://\S+ failed \(.*reason.*\)\.', out, re.DOTALL)
    assert re.search(r'WARNING: grpc://\S+ left out 60 of 60 images\. They are tried here\.', out)
    assert len(created(out)) == 60


def test_a_service_is_not_waited_for_when_all_has_come(job, monkeypatch, address):
    """It waits for a worker that was ended before the run."""

    def run_service(*arguments, original=tf_retrain.run_service):
        yield from original(*arguments)
        raise AssertionError('the service was asked for more')

    monkeypatch.setattr(tf_retrain, 'run_service', run_service)
    image_dir = job.photographs(cat=20, dog=20).data
    out = job.cache(image_dir=image_dir, data_service=address)
    assert out.count('Creating bottleneck at') == 40


@pytest.mark.parametrize('address', ['localhost:1', 'a..b:5000', 'localhost:99999'])
def test_a_service_that_is_not_there(job, address):
    match = f'--data_service: grpc://{address} does not answer .*Start it, or leave'
    job.photographs(cat=20, dog=20).fails(match, data_service=f'grpc://{address}')
