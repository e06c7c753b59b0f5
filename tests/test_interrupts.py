"""Wherever a run is stopped, and whatever its terminal: nothing is lost, without a traceback."""

import contextlib
import fcntl
import itertools
import json
import os
import pty
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from unittest import mock

import numpy as np
import pytest
from forks import Fork
from helpers import GRAPH, ROOT, Job, created, parse, read_all, run, run_new, run_v1, send, serve

import tf_retrain

SCRIPT = ROOT / 'tf_retrain.py'
PAUSE = ROOT / 'tests/programs/pause.py'
ENDLESS = {'how_many_training_steps': '100000000'}
STOPS = [signal.SIGINT, signal.SIGTERM]
is_linux = os.path.exists('/proc')


def start(job, *program, **changes):
    """Starts a program of tests/programs/ with the flags of the job."""
    return Fork([*program, *job.arguments(**changes)], job.folder)


def check_stopped(process):
    """A run that was stopped ends with one line for the user; returns what it printed."""
    out = ''.join(process.communicate())
    assert process.returncode == 130
    assert 'Traceback' not in out
    assert out.splitlines()[-1].startswith('Stopped. All bottlenecks computed so far are kept')
    return out


def check_graph(job):
    """The graph tells a dog from a cat."""
    photograph = (job.data / 'dog/dog 0.jpg').read_bytes()
    assert run_v1(job.graph(), photograph, 'final_result:0')[0].argmax() == 1
    assert (job.folder / 'trained_model/labels.txt').read_text() == 'cat\ndog\n'


@pytest.mark.parametrize('signum', STOPS)
def test_a_stop_while_training_keeps_what_was_learned(job, signum):
    with job.photographs(cat=30, dog=30).fork(**ENDLESS) as process:
        process.wait_for('Step 100: Train')
        process.send_signal(signum)
        out, _ = process.communicate()
    assert process.returncode == 0
    assert 'Ctrl-C: what was learned so far will be tested and written.' in out
    assert 'Final test accuracy = ' in out
    check_graph(job)


@pytest.mark.parametrize(('paused', 'changes'), [('get_interval', ENDLESS), ('write_record', {})])
def test_a_second_ctrl_c_quits_at_once(job, paused, changes):
    """The first comes during the training or after it, where the program waits for the second."""
    job.photographs(cat=30, dog=30)
    with start(job, PAUSE, paused, 1, **changes) as process:
        process.wait_for('Step 100: Validation' if changes else 'Paused')
        process.send_signal(signal.SIGINT)
        process.wait_for('Ctrl-C: what was learned')
        process.wait_for('Paused')
        process.send_signal(signal.SIGINT)
        out = ''.join(process.communicate())
    assert process.returncode == -signal.SIGINT
    assert 'Traceback' not in out
    is_written = paused == 'write_record'
    assert (job.folder / 'trained_model/unoptimized_model.pb').exists() == is_written


@pytest.fixture
def signals():
    """The handlers of a run; those of pytest come back."""
    handlers = {number: signal.getsignal(number) for number in STOPS}
    tf_retrain.on_stop_signals(tf_retrain.stop_run)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    tf_retrain.stop_requested.clear()


@pytest.mark.posix
def test_standard_streams_wait_for_their_reader():
    """Node.js may leave a pipe in a mode in which print() would lose what does not fit into it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    command = [
        sys.executable,
        '-c',
        'import tf_test; tf_test.prepare_process(); print("x" * 10**6)',
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=writer) as process:
        os.close(writer)
        with open(reader) as stream:
            assert len(stream.readline()) == 10**6 + 1
    assert process.returncode == 0


@pytest.mark.parametrize('signum', STOPS)
@pytest.mark.parametrize('is_stopped', [False, True])
def test_the_first_process_of_a_container_can_be_stopped(signum, is_stopped):
    """Linux drops signals for it that have no handler: at the start, and after a first Ctrl-C."""
    namespace = ['unshare', '--user', '--map-root-user', '--pid', '--fork']
    if not shutil.which('unshare') or subprocess.run([*namespace, 'true'], check=False).returncode:
        pytest.skip('needs a namespace for processes')
    lines = [
        'import os, signal, tf_retrain',
        'assert os.getpid() == 1',
        'tf_retrain.prepare_process()',
        f'signal.raise_signal({signum:d})',
        'print("alive")',
    ]
    if is_stopped:
        lines.insert(3, 'tf_retrain.finish_run()')
    command = [*namespace, sys.executable, '-c', '\n'.join(lines)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 128 + signum, process.stderr
    assert 'alive' not in process.stdout


def test_after_a_run_that_was_stopped_a_notebook_can_call_main(monkeypatch, capsys):
    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    with pytest.raises(SystemExit) as exit_:
        tf_retrain.run(lambda flags: signal.raise_signal(signal.SIGINT), None)
    assert exit_.value.code == 130
    assert list(tf_retrain.until_stopped([1, 2])) == [1, 2]


def stop_at(monkeypatch, name, signum, is_dropped=False):
    """Sends a signal to this process at the next call of a function; then the default is set.

    TensorFlow drops the KeyboardInterrupt of a signal that comes inside of one of its ops.
    """
    original = getattr(tf_retrain, name)
    dropped = [KeyboardInterrupt] if is_dropped else []

    def stop(*arguments, **options):
        monkeypatch.setattr(tf_retrain, name, original)
        try:
            with contextlib.suppress(*dropped):
                signal.raise_signal(signum)
        finally:
            assert signal.getsignal(signum) == tf_retrain.QUIT  # a second one ends the program
        return original(*arguments, **options)

    monkeypatch.setattr(tf_retrain, name, stop)


BEFORE_TRAINING = ['list_dir', 'load_backbone', 'read_records', 'load_header']
BEFORE_TRAINING += ['compute_digest', 'explain_unreadable', 'compare_bottlenecks']
BEFORE_TRAINING += ['cross_validate', 'find_familiarity', 'draw_batches']
AFTER_TRAINING = ['get_interval', 'write_outputs', 'create_record', 'draw_confusion_matrix']


@pytest.mark.parametrize('is_dropped', [False, True])
@pytest.mark.parametrize(('name', 'signum'), [*zip(BEFORE_TRAINING, itertools.cycle(STOPS))])
def test_a_stop_before_the_training_leaves_the_old_outputs(
    job, monkeypatch, signals, name, signum, is_dropped
):
    graph = job.folder / 'trained_model/unoptimized_model.pb'
    graph.parent.mkdir()
    graph.write_text('old')
    job.photographs(cat=20, dog=20)
    (job.data / 'cat/damaged.jpg').write_bytes(b'\xff\xd8')
    stop_at(monkeypatch, name, signum, is_dropped)
    with pytest.raises(KeyboardInterrupt):
        job.main('--find_suspects=1')
    assert graph.read_text() == 'old'
    assert os.listdir(graph.parent) == ['unoptimized_model.pb']


def test_a_stop_before_the_first_step_has_learned_nothing(job, monkeypatch, signals):
    stop_at(monkeypatch, 'train_step', signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        job.photographs(cat=20, dog=20).main()
    assert list(job.folder.glob('trained_model/*')) == []


def test_a_stop_that_is_dropped_ends_the_searches(signals):
    """Each of them at its next block or step."""
    bottlenecks = np.ones([2, 8], np.float32)
    images = tf_retrain.Images('d', ['a', 'b'], None, np.arange(2), np.full(2, 'training'))
    flags = parse('--image_dir=d', '--how_many_training_steps=9')
    tf_retrain.stop_requested.set()
    with pytest.raises(KeyboardInterrupt):
        next(tf_retrain.compare_bottlenecks(bottlenecks, np.arange(2)))
    with pytest.raises(KeyboardInterrupt):
        tf_retrain.train_fold(images, bottlenecks, np.random.default_rng(0), mock.Mock(), flags)


def test_the_end_of_the_program_waits_for_the_batch_in_hand(monkeypatch):
    """And until the threads that make the next batches have ended."""
    registered, ended = [], []
    monkeypatch.setattr(tf_retrain.atexit, 'register', lambda *call: registered.append(call))
    comes_back = threading.Event()

    def compute():
        try:
            yield 'first'
            comes_back.wait(60)
            yield 'in hand'
        finally:
            time.sleep(0.1)  # as TensorFlow may take
            ended.append('in hand')

    for batch in tf_retrain.run_ahead(compute()):
        assert batch == 'first'
        break
    ((wait, futures, timeout),) = registered
    assert timeout == tf_retrain.DRIVE_TIMEOUT
    assert not wait(futures, 0).done
    comes_back.set()
    wait(futures, 60)
    assert ended == ['in hand']


def test_a_drive_that_hangs_does_not_keep_what_was_learned(job, monkeypatch, signals):
    """After Ctrl-C, everything is written before the batch in hand is waited for."""
    compute, load = tf_retrain.run_networks, tf_retrain.load_thumbnail
    comes_back = threading.Event()

    def hang(networks, batches):
        yield from itertools.islice(compute(networks, batches), 2)
        os.kill(os.getpid(), signal.SIGINT)
        comes_back.wait(60)

    def hang_too(*arguments):
        comes_back.wait(60)
        return load(*arguments)

    job.photographs(cat=30, dog=30).cache()
    monkeypatch.setattr(tf_retrain, 'run_networks', hang)
    monkeypatch.setattr(tf_retrain, 'load_thumbnail', hang_too)
    monkeypatch.setattr(tf_retrain, 'DRIVE_TIMEOUT', 0.1)
    misclassified = property(lambda tested: iter([(0, 1)]))
    monkeypatch.setattr(tf_retrain.Tested, 'misclassified', misclassified)
    try:
        out = job.main('--flip_left_right', train_batch_size='10')
        assert not comes_back.is_set()
    finally:
        comes_back.set()
    assert 'Ctrl-C: what was learned so far will be tested and written.' in out
    assert 'cat 0.jpg did not come within 0.1 s. Check the drive.' in out
    assert b'confusion_matrix' in next((job.folder / 'logs/test').iterdir()).read_bytes()
    assert out.splitlines()[-1].startswith('python3 tf_test.py')
    check_graph(job)


@pytest.mark.parametrize('is_dropped', [False, True])
@pytest.mark.parametrize(
    ('name', 'signum'), [*zip(['report_validation', *AFTER_TRAINING], itertools.cycle(STOPS))]
)
def test_a_stop_from_the_training_on_finishes_the_run(
    job, monkeypatch, signals, name, signum, is_dropped
):
    stop_at(monkeypatch, name, signum, is_dropped)
    out = job.photographs(cat=20, dog=20).main()
    assert 'Ctrl-C: what was learned' in out
    assert ('Step 29:' in out) == (name != 'report_validation')
    assert out.splitlines()[-1].startswith('python3 tf_test.py')
    check_graph(job)
    assert (job.folder / 'trained_model/unoptimized_model.pb.json').exists()


@pytest.mark.parametrize('signum', STOPS)
def test_a_stop_while_caching_keeps_what_was_computed(job, signum):
    """The signal comes when a file has its contents and not yet its name."""
    job.photographs(cat=60, dog=60)
    with start(job, PAUSE, 'gfile.rename', 50) as process:
        process.wait_for('Paused')
        process.send_signal(signum)
        out = check_stopped(process)
    paths, _ = read_all(job.folder / 'bottlenecks')
    assert 10 <= len(paths) < 50
    assert len(created(out)) - len(paths) in (0, 1)
    assert not list((job.folder / 'bottlenecks').rglob('*.tmp'))  # no half-written file stays


def test_ctrl_c_while_downloading(job, monkeypatch):
    """A server sends a thousand bytes, and then nothing more."""
    folder = job.photographs(cat=20, dog=20).folder / 'inception'
    (folder / 'classify_image_graph_def.pb').unlink()
    release = threading.Event()

    def stall(handler):
        send(handler, b'x' * 1000, 5000)
        release.wait(120)

    with serve(stall) as url:
        monkeypatch.setenv('http_proxy', url)
        monkeypatch.setenv('no_proxy', '')
        with job.fork() as process:
            process.wait_for('20.0%')
            process.send_signal(signal.SIGINT)
            check_stopped(process)
        release.set()
    assert not list(folder.glob('*.tgz'))
    assert not list(folder.glob('*.pb'))


@pytest.mark.posix
@pytest.mark.parametrize('is_stopped', [True, False])
def test_a_name_server_that_does_not_answer(monkeypatch, is_stopped):
    """The system waits for it in a thread: Python hears no signal while it does."""
    release = threading.Event()

    def hang(*arguments, **options):
        assert threading.current_thread() is not threading.main_thread()
        if is_stopped:
            os.kill(os.getpid(), signal.SIGINT)
        release.wait(60)

    monkeypatch.setattr(socket, 'getaddrinfo', hang)
    monkeypatch.setattr(tf_retrain, 'DOWNLOAD_TIMEOUT', 60 if is_stopped else 0.1)
    error = KeyboardInterrupt if is_stopped else OSError
    message = None if is_stopped else 'no name server has answered for 0.1 s'
    with pytest.raises(error, match=message):
        with tf_retrain.stoppable():
            tf_retrain.fetch('http://example.org/model.tgz', 'model.tgz', 100)
    assert socket.getaddrinfo is hang
    release.set()
    tf_retrain.stop_requested.clear()


@pytest.mark.posix
def test_a_stop_does_not_wait_for_the_trial_of_a_large_module():
    release = threading.Event()

    def compute(images):
        assert threading.current_thread() is not threading.main_thread()
        os.kill(os.getpid(), signal.SIGINT)
        release.wait(60)

    backbone = mock.Mock(patient_networks=[compute])
    backbone.input_format.size = (8, 8)
    with pytest.raises(KeyboardInterrupt), tf_retrain.stoppable():
        tf_retrain.ensure_independent(backbone)
    release.set()
    tf_retrain.stop_requested.clear()


@pytest.mark.parametrize('signum', STOPS)
def test_a_stop_does_not_wait_for_a_service_that_hangs(job, signum):
    """The dispatcher lets clients connect, and answers nothing."""
    job.photographs(cat=20, dog=20)
    with socket.create_server(('localhost', 0)) as dispatcher:
        port = dispatcher.getsockname()[1]
        with job.fork(data_service=f'grpc://localhost:{port}') as process:
            dispatcher.accept()  # whether something answers
            dispatcher.accept()  # the request of TensorFlow
            process.send_signal(signum)
            check_stopped(process)


@pytest.mark.skipif(not is_linux, reason='only Linux tells in /proc which libraries a process has')
@pytest.mark.parametrize(
    'library', ['_multiarray_umath', '_imaging', '_pywrap_tensorflow', 'tensorflow_cc']
)
def test_ctrl_c_while_the_program_starts(job, library):
    """As soon as a library is mapped into the process, to the middle of TensorFlow's own start."""
    process = job.photographs(cat=30, dog=30).start(**ENDLESS)
    maps = f'/proc/{process.pid}/maps'
    while library not in open(maps).read():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT or out.splitlines()[-1].startswith('Stopped.')
    assert 'Traceback' not in out


def test_in_a_terminal_of_20_columns(job):
    """The bar is drawn again and again, below the lines."""
    job.photographs(cat=100, dog=100)
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 20, 0, 0))
    blocks = []

    def read():
        with contextlib.suppress(OSError):  # what Linux raises when the other side has closed
            while block := os.read(screen, 1 << 16):
                blocks.append(block)

    thread = threading.Thread(target=read)
    thread.start()
    with Fork([SCRIPT, *job.arguments()], job.folder, [os.ttyname(terminal)] * 2) as process:
        process.communicate()
    os.close(terminal)
    thread.join()
    os.close(screen)
    assert process.returncode == 0
    out = b''.join(blocks).decode()
    lines = out.splitlines()
    assert lines[-1].startswith('python3 tf_test.py ')
    assert sum('Creating bottleneck at' in line for line in lines) == 200
    assert sum('Bottlenecks' in part for part in out.split('\r')) > 2


@pytest.mark.parametrize(
    ('settings', 'shown'),
    [
        ({'LANG': 'C', 'LC_ALL': 'C', 'COLUMNS': '20'}, '猫'),
        ({'PYTHONIOENCODING': 'ascii'}, '?'),
        ({'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}, '?'),
    ],
)
def test_names_that_the_terminal_cannot_show(tmp_path, model, monkeypatch, capsys, settings, shown):
    """tf_test.py labels an image, and then tf_retrain.py trains once more."""
    (tmp_path / '猫').mkdir()
    job = Job(tmp_path / '猫', model, monkeypatch, capsys)
    job.photographs(cat=20, 猫=20).main(bottleneck_dir='first')
    labels = job.folder / 'trained_model/labels.txt'
    image = next((job.data / '猫').iterdir())
    labelling = [ROOT / 'tf_test.py', '--heatmap=猫.png', image, job.flags['output_graph'], labels]
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    start = run if 'PYTHONIOENCODING' in settings else run_new  # a fork has the tests' locale
    arguments = [*labelling, '--', SCRIPT, *job.arguments(output_labels='again.txt')]
    out = start('tests/programs/both.py', *arguments, cwd=job.folder).stdout
    assert f'{shown} (score = ' in out
    assert f'bottlenecks/{shown}/{shown} 3.jpg' in out
    assert (job.folder / 'again.txt').read_text(encoding='utf-8') == 'cat\n猫\n'
    assert (job.folder / '猫.png').read_bytes().startswith(b'\x89PNG')
    record = json.loads((job.folder / f'{GRAPH}.json').read_text())
    assert record['image_dir'] == str(job.data)


class InterruptedEnd:
    def __init__(self, error):
        self.error = error

    def __del__(self):
        raise self.error


def test_a_stop_that_python_drops_is_not_printed(monkeypatch):
    """A signal may come while an object is deleted; other errors there are shown as ever."""
    dropped = []
    monkeypatch.setattr(sys, 'unraisablehook', dropped.append)
    with tf_retrain.stoppable():
        InterruptedEnd(KeyboardInterrupt())
        InterruptedEnd(ValueError())
        with contextlib.suppress(KeyboardInterrupt):
            tf_retrain.stop_run()
        InterruptedEnd(AttributeError())  # of an object that is not complete
    tf_retrain.stop_requested.clear()
    InterruptedEnd(KeyboardInterrupt())
    assert [one.exc_type for one in dropped] == [ValueError, KeyboardInterrupt]


def release_in_vain():
    """Is stopped before it has the lock that it releases, as tqdm may be."""
    lock = threading.RLock()
    try:
        tf_retrain.stop_run()
        lock.acquire()
    finally:
        lock.release()


def release_in_extra():
    with tf_retrain.extra('the search'):
        release_in_vain()


def fail_by_stop(flags):
    """As the load of a module may, whose errors are explained."""
    with contextlib.suppress(KeyboardInterrupt):
        tf_retrain.stop_run()
    raise tf_retrain.UserError('the module cannot be loaded')


@pytest.mark.parametrize('error', [RuntimeError, TypeError])
def test_a_stop_that_fails_a_batch_ends_the_training_early(job, monkeypatch, signals, error):
    """TensorFlow may make another error of it, which is no reason for unfinished outputs."""

    def compute(*arguments):
        yield np.arange(2), np.zeros([2, 2048], np.float32)
        with contextlib.suppress(KeyboardInterrupt):
            tf_retrain.stop_run()
        raise error('REPLACED BY KeyboardInterrupt')

    job.photographs(cat=20, dog=20)
    monkeypatch.setattr(tf_retrain, 'compute_distorted', compute)
    # What fails later does not fail because of the stop.
    monkeypatch.setattr(tf_retrain, 'write_pictures', mock.Mock(side_effect=ValueError('too much')))
    out = job.main('--flip_left_right')
    assert 'Ctrl-C: what was learned so far will be tested and written.' in out
    assert 'WARNING: the pictures for TensorBoard left out (ValueError: too much)' in out
    assert out.splitlines()[-1].startswith('python3 tf_test.py')
    assert (job.folder / 'trained_model/unoptimized_model.pb').exists()


def test_what_fails_because_of_a_stop_is_a_stop(capsys):
    handlers = [signal.getsignal(number) for number in STOPS]
    with pytest.raises(SystemExit, match='^130$'):
        tf_retrain.run(lambda flags: release_in_vain(), None)
    assert [signal.getsignal(number) for number in STOPS] == handlers
    assert capsys.readouterr().err.startswith('\nStopped. All bottlenecks')
    # What the graph does not need does not hide it, and neither does an error for the user.
    for job in (lambda flags: release_in_extra(), fail_by_stop):
        with pytest.raises(SystemExit, match='^130$'):
            tf_retrain.run(job, None)
        assert capsys.readouterr().err.startswith('\nStopped. All bottlenecks')
    # The next run is not stopped, and its own errors are shown.
    with pytest.raises(ZeroDivisionError):
        tf_retrain.run(lambda flags: 1 / 0, None)


def check_all_is_written(job):
    assert len(list((job.folder / 'bottlenecks').rglob('*.txt'))) == 60
    check_graph(job)


@pytest.mark.parametrize(
    ('stdout', 'stderr'),
    [('pipe', 'errors'), (None, 'errors'), ('lines', None), ('/dev/full', 'errors')],
)
def test_output_that_cannot_be_written(job, stdout, stderr):
    """The training goes on. The pipe's reader leaves after one line; None is a closed stream."""
    if stdout == '/dev/full' and not is_linux:
        pytest.skip('only Linux has /dev/full')
    job.photographs(cat=30, dog=30)
    os.mkfifo(job.folder / 'pipe')
    with Fork([SCRIPT, *job.arguments()], job.folder, [stdout, stderr]) as process:
        if stdout == 'pipe':
            with open(job.folder / 'pipe') as pipe:
                assert pipe.readline().startswith('TensorFlow')
        process.communicate()
    assert process.returncode == 0
    assert not stderr or 'rror' not in (job.folder / 'errors').read_text()
    check_all_is_written(job)


def test_all_streams_closed_from_the_start(job):
    """In a new interpreter: no file of the program gets the number of a standard stream."""
    arguments = job.photographs(cat=30, dog=30).arguments()
    command = shlex.join([sys.executable, str(SCRIPT), *arguments])
    subprocess.run(['bash', '-c', f'{command} >&- 2>&- <&-'], cwd=job.folder, check=True)
    check_all_is_written(job)


def test_kills_at_any_moment(job):
    """After SIGKILL while caching and training, the graph is that of a run which nobody disturbed.

    Each run goes on where the last one was killed. A fifth of the cache is deleted in between, so
    that there is always something to compute.
    """
    kills = [('Creating', 1), ('Creating', 70), ('Step', 1), ('Creating', 20), ('Step', 99)]
    job.photographs(cat=100, dog=100).main(bottleneck_dir='undisturbed')
    undisturbed = job.graph()
    computed = deleted = 0
    for line, count in kills:
        with job.fork(**ENDLESS) as process:
            process.wait_for(line, count)
            process.kill()
            out, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL
        computed += out.count('Creating bottleneck at ')
        for path in sorted((job.folder / 'bottlenecks').rglob('*.txt'))[::5]:
            path.unlink()
            deleted += 1
    computed += job.main().count('Creating bottleneck at ')
    assert job.graph() == undisturbed
    # At each kill a batch may be computed and not yet written.
    assert 0 <= computed - deleted - 200 <= len(kills) * tf_retrain.NETWORK_BATCH_SIZE
