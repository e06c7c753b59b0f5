"""Wherever a run is stopped, and whatever its terminal is: nothing is lost, and nothing ends in a traceback."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

import numpy as np
import pytest
from helpers import ROOT, Job, default_ctrl_c, read_all, run_new, run_v1, send, serve

import tf_retrain

ENDLESS = {'how_many_training_steps': '100000000'}


def stop_at(process, pattern, signum=signal.SIGINT):
    """Reads the output up to a line that matches, and sends a signal."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            process.send_signal(signum)
            return
    raise AssertionError(''.join(lines))


def check_stopped(process):
    """Reads the rest of the output of a run that must end with one line for the user, and returns it."""
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 'Traceback' not in out
    assert out.splitlines()[-1].startswith('Stopped. All bottlenecks computed so far are kept')
    return out


def test_ctrl_c_stops_training_and_keeps_what_was_learned(job):
    process = job.photographs(cat=30, dog=30).start(**ENDLESS)
    stop_at(process, 'Step 1000: Train')
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert 'Ctrl-C: what was learned so far will be tested and written.' in out
    assert 'Final test accuracy = ' in out
    scores = run_v1(job.graph(), (job.data / 'dog/dog 0.jpg').read_bytes(), 'final_result:0')[0]
    assert scores.argmax() == 1
    assert (job.folder / 'trained_model/labels.txt').exists()


SLOW_TEST = """
import sys, time, tf_retrain
tf_retrain.test = lambda *arguments: time.sleep(60)
tf_retrain.run(tf_retrain.main, tf_retrain.parse_flags(tf_retrain.create_parser()))
"""


def test_a_second_ctrl_c_quits(job):
    """During the test, which takes a minute here."""
    job.photographs(cat=30, dog=30)
    command = [sys.executable, '-u', '-c', SLOW_TEST, *job.arguments(**ENDLESS)]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    process = subprocess.Popen(
        command, cwd=job.folder, env=environment, **pipes, preexec_fn=default_ctrl_c
    )
    stop_at(process, 'Step 1000: Validation')
    stop_at(process, 'Ctrl-C: what was learned')
    check_stopped(process)
    assert not (job.folder / 'trained_model/unoptimized_model.pb').exists()


def test_ctrl_c_while_caching_keeps_what_was_computed(job):
    process = job.photographs(cat=2000, dog=2000).start()
    stop_at(process, '100 bottleneck files created')
    check_stopped(process)
    paths, _ = read_all(job.folder / 'bottlenecks')
    assert 100 <= len(paths) < 4000
    assert not list((job.folder / 'bottlenecks').rglob('*.tmp'))  # no half-written file stays


def test_sigterm_does_what_ctrl_c_does(job):
    process = job.photographs(cat=1000, dog=1000).start()
    stop_at(process, '100 bottleneck files created', signal.SIGTERM)
    check_stopped(process)
    process = job.start(**ENDLESS)
    stop_at(process, 'Step 100:', signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert 'Final test accuracy = ' in out
    assert job.graph().node[-1].name == 'final_result'


PROGRAM = """
import runpy, sys, urllib.request
url, urlopen = sys.argv[1], urllib.request.urlopen
urllib.request.urlopen = lambda request, **options: urlopen(url, **options)
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_ctrl_c_while_downloading_keeps_what_came(job):
    """A server sends a thousand bytes, and then nothing more."""
    job.photographs(cat=20, dog=20)
    (job.folder / 'inception/classify_image_graph_def.pb').unlink()
    release = threading.Event()

    def stall(handler):
        send(handler, b'x' * 1000, 5000)
        release.wait(60)

    with serve(stall) as url:
        command = [
            sys.executable,
            '-c',
            PROGRAM,
            f'{url}/',
            str(ROOT / 'tf_retrain.py'),
            *job.arguments(),
        ]
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
        process = subprocess.Popen(command, cwd=job.folder, **pipes, preexec_fn=default_ctrl_c)
        shown = ''
        while '20.0%' not in shown:
            assert process.poll() is None, shown
            shown += process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        check_stopped(process)
        release.set()
    assert (job.folder / 'inception' / 'inception-2015-12-05.tgz.part').exists()


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
    out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT or out.splitlines()[-1].startswith('Stopped.')
    assert 'Traceback' not in out


def test_in_a_terminal_of_20_columns(job):
    """The bar is drawn again and again, below the lines."""
    job.photographs(cat=100, dog=100)
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 20, 0, 0))
    command = [sys.executable, str(ROOT / 'tf_retrain.py'), *job.arguments()]
    process = subprocess.Popen(
        command, cwd=job.folder, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    out = b''
    with contextlib.suppress(OSError):  # what Linux raises when the other side has closed
        while block := os.read(screen, 1 << 16):
            out += block
    assert process.wait(timeout=60) == 0
    lines = out.decode().splitlines()
    assert lines[-1].startswith('python3 tf_test.py ')
    assert sum('Creating bottleneck at' in line for line in lines) == 200
    assert sum('Bottlenecks' in part for part in out.decode().split('\r')) > 2


@pytest.mark.parametrize(
    ('settings', 'shown'),
    [
        ({'LANG': 'C', 'LC_ALL': 'C', 'COLUMNS': '20'}, '猫'),
        ({'PYTHONIOENCODING': 'ascii'}, '?'),
        ({'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}, '?'),
    ],
)
def test_names_that_the_terminal_cannot_show(job, settings, shown):
    job.photographs(cat=20, 猫=20)
    environment = {**os.environ, **settings}
    process = run_new('tf_retrain.py', *job.arguments(), cwd=job.folder, env=environment)
    assert f'bottlenecks/{shown}/{shown} 3.jpg' in process.stdout
    assert (job.folder / 'trained_model/labels.txt').read_text(encoding='utf-8') == 'cat\n猫\n'
    image = next((job.data / '猫').iterdir())
    labelled = run_new(
        'tf_test.py',
        image,
        job.flags['output_graph'],
        job.flags['output_labels'],
        env=environment,
        cwd=job.folder,
    )
    assert f'{shown} (score = ' in labelled.stdout


@pytest.mark.parametrize('streams', ['| head -1', '>&- 2>&- <&-', '>&-', '2>&-', '> /dev/full'])
def test_nobody_reads_the_output(job, streams):
    """The training goes on without a word, and writes everything."""
    job.photographs(cat=100, dog=100)
    command = ' '.join([sys.executable, '-u', str(ROOT / 'tf_retrain.py'), *job.arguments()])
    process = subprocess.run(
        ['bash', '-c', f'set -o pipefail; {command} {streams}'],
        cwd=job.folder,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert 'rror' not in process.stderr
    assert len(list((job.folder / 'bottlenecks').rglob('*.txt'))) == 200
    scores = run_v1(job.graph(), (job.data / 'dog/dog 0.jpg').read_bytes(), 'final_result:0')[0]
    assert scores.argmax() == 1


@pytest.mark.slow
def test_kills_at_any_moment(job, model, tmp_path_factory):
    """SIGKILL at 30 moments of caching and training; then the graph is that of a run which nobody disturbed.

    Each run goes on where the last one was killed. A fifth of the cache is deleted in between, so that there is
    always something to compute.
    """
    flags = {'how_many_training_steps': '1000'}
    job.photographs(cat=400, dog=400)
    undisturbed = Job(tmp_path_factory.mktemp('undisturbed'), model)
    undisturbed.data.symlink_to(job.data)
    began = time.monotonic()
    undisturbed.run(**flags)
    duration = time.monotonic() - began
    rng = np.random.default_rng(0)
    computed = deleted = kills = 0
    while kills < 30:
        process, began = job.fork(**flags), time.monotonic()
        try:
            out, _ = process.communicate(timeout=rng.uniform(0.1, 0.95) * duration)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            kills += 1
        else:
            duration = (
                time.monotonic() - began
            )  # it was faster than the run that had everything to compute
        computed += out.count('Creating bottleneck at ')
        for path in sorted((job.folder / 'bottlenecks').rglob('*.txt')):
            if rng.random() < 0.2:
                path.unlink()
                deleted += 1
    computed += job.run(**flags).stdout.count('Creating bottleneck at ')
    assert job.graph() == undisturbed.graph()
    # At each kill a batch may be computed and not yet written.
    assert 0 <= computed - deleted - 800 <= 30 * tf_retrain.NETWORK_BATCH_SIZE
