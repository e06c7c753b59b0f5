"""A reader of a README.md, who does what it says."""

import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

from helpers import ROOT

CI = ('pipenv run quickstart', 'pipenv run test')  # .ci/run runs these
IMAGE = 'data/dog/dog 0.jpg'


def read_blocks(readme, section=None):
    """Returns the blocks of a README.md, or of a section, in their order as (language, text): those in sh by lines."""
    document = (ROOT / readme).read_text()
    if section:
        document = re.search(rf'^## {section}\n(.*?)(?=^## |\Z)', document, re.M | re.S)[1]
    blocks = []
    for language, text in re.findall(r'^```(\w+)\n(.*?)^```', document, re.M | re.S):
        is_shell = language == 'sh'
        blocks += [
            (language, line)
            for line in (text.replace('\\\n', '').splitlines() if is_shell else [text])
        ]
    return blocks


def environment():
    """python3 and tensorboard are those of the environment that runs the tests, as after `. .venv/bin/activate`."""
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ['PATH']])
    return {**os.environ, 'PATH': path}


def shell(command, folder):
    process = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


class Reader:
    """Does what a README.md says, in a folder; .outputs are (command, what it printed).

    Servers are left running, until the reader leaves, on other ports than those of the text: .ports.
    """

    def __init__(self, folder, **names):
        self.folder, self.names = folder, names
        self.outputs = []
        self.servers = []
        self.ports = {port: str(free_port()) for port in ('5000', '5001', '6006', '8000', '8501')}

    def follow(self, readme, section=None):
        for language, text in read_blocks(readme, section):
            if language == 'sh':
                self.outputs.append((text, self.type(text)))
            elif 'serve_forever' in text:
                self.serve(shlex.join(['python3', '-c', text]))
            elif language == 'python':
                exec(text, self.names)
        return self

    def type(self, command):
        """Runs a line. The environment is there already."""
        if command.endswith(CI) or command == '. .venv/bin/activate' or ' pip install ' in command:
            return ''
        if command.startswith('tensorboard'):
            return self.serve(f'{command} --host localhost --port 6006')
        if re.search('[dD]ispatcher|http.server', command):
            return self.serve(command)
        return shell(command.replace('<path to image>', f'"{IMAGE}"'), self.folder)

    def serve(self, command):
        """Starts a server, and waits until it listens; a worker of the tf.data service also names its dispatcher."""
        port = max(re.findall('|'.join(self.ports), command))
        command = re.sub('|'.join(self.ports), lambda match: self.ports[match[0]], command)
        null = subprocess.DEVNULL
        options = {
            'shell': True,
            'cwd': self.folder,
            'env': environment(),
            'stdout': null,
            'stderr': null,
        }
        self.servers.append(subprocess.Popen(command, start_new_session=True, **options))
        wait_for(int(self.ports[port]))
        return ''

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for server in self.servers:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    def find(self, text):
        """Returns what the commands with a text in them printed."""
        return [output for command, output in self.outputs if text in command]


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


TRAIN = [
    *(
        '--bottleneck_dir=bottlenecks/',
        '--how_many_training_steps=100',
        '--model_dir=inception/',
        '--random_seed=1',
    ),
    *(
        '--output_graph=trained_model/unoptimized_model.pb',
        '--output_labels=trained_model/labels.txt',
    ),
    *('--image_dir=data/', '--summaries_dir=logs'),
]


def train(script, *flags):
    subprocess.run([sys.executable, script, *TRAIN, *flags], check=True, capture_output=True)
