"""Runs programs in forks of a process that has imported TensorFlow: the import is most of a run.

Each run is a process of its own, with its own arguments, folder, environment, output, signals and
exit code. Of the settings that an interpreter reads when it starts, only PYTHONIOENCODING counts.
Windows has no forks: there, each run imports TensorFlow again.
"""

import contextlib
import functools
import multiprocessing
import os
import pathlib
import re
import runpy
import subprocess
import sys
import tempfile
import time

CAN_FORK = 'forkserver' in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context('forkserver' if CAN_FORK else 'spawn')
if CAN_FORK:
    CONTEXT.set_forkserver_preload(
        ['tensorflow', 'tensorflow.python.grappler.tf_optimizer', 'PIL.ImageFont', 'tqdm']
    )


def execute(command, folder, environment, outputs):
    """Becomes the process of a program."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, (name, path) in enumerate(zip(('stdout', 'stderr'), outputs, strict=True), 1):
        if path is None:  # as an interpreter does that starts with this stream closed
            os.close(number)
            setattr(sys, name, None)
            continue
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
        encoding = environment.get('PYTHONIOENCODING', 'utf-8')
        setattr(sys, name, open(number, 'w', buffering=1, encoding=encoding, closefd=False))
    program, *arguments = command
    sys.path.insert(0, '' if program.startswith('-') else os.path.dirname(program))
    sys.argv = command
    if program == '-c':
        exec(arguments[0], {'__name__': '__main__'})
    elif program == '-m':
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name='__main__', alter_sys=True)
    else:
        runpy.run_path(program, run_name='__main__')


class Fork:
    """A running program, with the part of subprocess.Popen's interface that the tests use.

    The command is what follows `python3`: a script, -c or -m, and its arguments. The two outputs
    are paths, or None for a closed stream. Without them, read() and communicate() return what the
    program writes.
    """

    def __init__(self, command, cwd=None, outputs=None):
        self.args = list(map(str, command))
        # Windows does not let others open a file that goes when it is closed.
        create = functools.partial(tempfile.NamedTemporaryFile, delete=CAN_FORK)
        self.files = [] if outputs else [create() for _ in range(2)]
        outputs = outputs or [file.name for file in self.files]
        arguments = self.args, str(cwd or os.getcwd()), dict(os.environ), outputs
        self.process = CONTEXT.Process(target=execute, args=arguments, daemon=True)
        self.process.start()
        self.kill = self.process.kill

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.kill()
        self.process.join()

    def send_signal(self, signum):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.process.pid, signum)

    def read(self):
        """Returns what the program has written so far to stdout and to stderr."""
        return tuple(pathlib.Path(file.name).read_text() for file in self.files)

    def wait_for(self, pattern, count=1):
        """Waits until the output has `count` matches of a pattern, and returns the last of them."""
        end = time.monotonic() + 120
        matches = []
        while len(matches) < count:
            is_alive = self.process.is_alive()
            written = ''.join(self.read())
            matches = re.findall(pattern, written)
            assert len(matches) >= count or (is_alive and time.monotonic() < end), written
            time.sleep(0.01)
        return matches[count - 1]

    def communicate(self, timeout=120):
        """Returns what the program wrote to stdout and to stderr, when it has ended."""
        self.process.join(timeout)
        self.returncode = self.process.exitcode
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.read()


def run(command, cwd=None, outputs=None):
    """Runs a program to its end, as subprocess.run() does, and captures its output."""
    with Fork(command, cwd, outputs) as fork:
        written = fork.communicate(timeout=300)
    return subprocess.CompletedProcess(fork.args, fork.returncode, *(written or (None, None)))
