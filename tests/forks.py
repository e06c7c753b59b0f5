"""Runs the scripts in forks of a process that has imported TensorFlow, as the import takes longer than most runs.

Each run is a process of its own, with its own arguments, folder, environment, output, signals and exit code. What the
interpreter reads when it starts is that of the tests.
"""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(
    ['tensorflow', 'tensorflow.python.grappler.tf_optimizer', 'PIL.ImageFont', 'tqdm']
)


def execute(command, folder, environment, outputs):
    """Becomes the process of a script."""
    for stream, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = command, os.path.dirname(command[0])
    runpy.run_path(command[0], run_name='__main__')


class Fork:
    """The running process of a script, with the part of subprocess.Popen's interface that the tests use."""

    def __init__(self, command, cwd=None):
        self.args = list(map(str, command))
        self.outputs = [tempfile.NamedTemporaryFile() for _ in range(2)]
        names = [output.name for output in self.outputs]
        arguments = self.args, str(cwd or os.getcwd()), dict(os.environ), names
        self.process = CONTEXT.Process(target=execute, args=arguments)
        self.process.start()
        self.kill = self.process.kill

    def communicate(self, timeout=None):
        """Returns what the script wrote to stdout and to stderr, when it has ended."""
        self.process.join(timeout)
        self.returncode = self.process.exitcode
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return tuple(pathlib.Path(output.name).read_text() for output in self.outputs)


def run(command, cwd=None):
    """Runs a script to its end, as subprocess.run() does, and captures its output."""
    fork = Fork(command, cwd)
    try:
        stdout, stderr = fork.communicate(timeout=300)
    finally:
        fork.kill()
    return subprocess.CompletedProcess(fork.args, fork.returncode, stdout, stderr)
