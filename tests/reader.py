"""A reader of a README.md, who does what it says."""

import contextlib
import http.server
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import forks
import pytest
from helpers import ROOT

CI = ('pipenv run quickstart', 'pipenv run test')  # .ci/run runs these
IMAGE = 'data/dog/dog 0.jpg'
BIN = pathlib.Path(sys.executable).parent
SERVER = 'http.server.ThreadingHTTPServer'


def read_blocks(readme, section=None):
    """Returns the blocks of a README.md, or of a section, as (language, text): in sh, each line."""
    document = (ROOT / readme).read_text()
    if section:
        document = re.search(rf'^## {section}\n(.*?)(?=^## |\Z)', document, re.M | re.S)[1]
    blocks = []
    for language, text in re.findall(r'^```(\w+)\n(.*?)^```', document, re.M | re.S):
        lines = text.replace('\\\n', '').splitlines() if language == 'sh' else [text]
        blocks += [(language, line) for line in lines]
    return blocks


def read_training_command():
    """Returns the command of README.md to which other pages add flags."""
    return next(text for _, text in read_blocks('README.md') if 'tf_retrain.py' in text)


def shell(command, folder):
    """Runs a line; python3 is that of the environment that runs the tests, as if it were active."""
    environment = {**os.environ, 'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}'}
    options = {'capture_output': True, 'text': True, 'timeout': 300}
    process = subprocess.run(command, shell=True, cwd=folder, env=environment, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


class Reader:
    """Does what a README.md says, in a folder; .outputs are (command, what it printed).

    Python programs run in forks, where TensorFlow is. Only the first line of each script in `new`
    is typed into a shell. Servers run until the reader leaves. Their ports are those of the
    operating system: .ports has them by the port in the text.
    """

    def __init__(self, folder, new=(), **names):
        if os.name != 'posix':
            pytest.skip('the commands are for a POSIX shell')
        self.folder, self.new, self.names = folder, set(new), names
        self.stack = contextlib.ExitStack()
        self.outputs = []
        self.ports = {port: self.reserve() for port in ('5000', '5001')}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stack.close()

    def follow(self, readme, section=None):
        for language, text in read_blocks(readme, section):
            if language == 'sh':
                self.outputs.append((text, self.type(text)))
            elif 'serve_forever' in text:
                self.serve_block(text)
            elif language == 'python':
                exec(text, self.names)
        return self

    def type(self, command):
        """Runs a line. The environment is there already."""
        if command.endswith(CI) or command == '. .venv/bin/activate' or ' pip install ' in command:
            return ''
        command = command.replace('<path to image>', f'"{IMAGE}"')
        command = command.replace('<folder of images>', 'data/')
        if command.startswith('--'):  # flags to add to the training command
            command = f'{read_training_command()} {command}'
        program, *arguments = shlex.split(command)
        if 'ispatch' in command:
            return self.serve_data(arguments)
        if command.startswith('python3 -m http.server'):
            return self.serve([*arguments[:-1], 0], arguments[-1], r'port (\d+)')
        if program == 'tensorboard':
            arguments = [BIN / program, *arguments, '--host=localhost', '--port=0']
            return self.serve(arguments, '6006', r'http://localhost:(\d+)')
        if arguments[0] in self.new:
            self.new.remove(arguments[0])
            return shell(command, self.folder)
        if program == 'saved_model_cli':
            arguments = [BIN / program, *arguments]
        elif program != 'python3':
            return shell(command, self.folder)
        process = forks.run(arguments, self.folder)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    def serve(self, arguments, port, pattern):
        """Starts a server, which prints the port that it got."""
        process = self.stack.enter_context(forks.Fork(arguments, self.folder))
        self.ports[port] = process.wait_for(pattern)
        return ''

    def serve_data(self, arguments):
        """Starts the dispatcher or the worker: both know their ports before they bind them."""
        text = re.sub(r'\d{4}', lambda match: self.ports[match[0]], arguments[-1])
        process = self.stack.enter_context(forks.Fork(['-c', text], self.folder))
        wait_for_listener(re.findall(r'\d+', text)[-1], process)
        return ''

    def reserve(self):
        """Returns a port that only a server with SO_REUSEPORT can bind, as those of gRPC are."""
        probe = self.stack.enter_context(socket.socket())
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        probe.bind(('', 0))
        return str(probe.getsockname()[1])

    def serve_block(self, text):
        """Runs a block that serves forever in a thread, on a port of the operating system."""
        is_up = threading.Event()

        def create(address, handler, create=http.server.ThreadingHTTPServer):
            server = create((address[0], 0), handler)
            self.ports[str(address[1])] = str(server.server_port)
            self.stack.callback(server.server_close)
            self.stack.callback(server.shutdown)
            is_up.set()
            return server

        with mock.patch(SERVER, create):
            threading.Thread(target=exec, args=[text, {}], daemon=True).start()
            assert is_up.wait(120)

    def find(self, text):
        """Returns what the commands with a text in them printed."""
        return [output for command, output in self.outputs if text in command]


def wait_for_listener(port, process):
    """Waits until the process listens on a port of this machine."""
    end = time.monotonic() + 120
    while socket.socket().connect_ex(('localhost', int(port))):
        assert process.process.is_alive() and time.monotonic() < end, process.read()
        time.sleep(0.05)


TRAIN = [
    '--bottleneck_dir=bottlenecks/',
    '--how_many_training_steps=100',
    '--model_dir=inception/',
    '--random_seed=1',
    '--output_graph=trained_model/unoptimized_model.pb',
    '--output_labels=trained_model/labels.txt',
    '--image_dir=data/',
    '--summaries_dir=logs',
]


def train(script, *flags):
    process = forks.run([os.path.abspath(script), *TRAIN, *flags])
    assert process.returncode == 0, process.stdout + process.stderr
