"""Random sequences of runs, of what users do to the files between and during them, and of stops.

RANDOM_RUNS=1000:2000 python3 -m pytest -x tests/test_random_runs.py tries those with these seeds.
"""

import io
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from forks import Fork
from helpers import GRAPH, LABELS, ROOT, Job, parse
from PIL import Image

import tf_retrain
import tf_test

SEEDS = os.environ.get('RANDOM_RUNS', '0:3')
STEPS = 6  # runs per sequence
OUTPUTS = [GRAPH, f'{GRAPH}.json', LABELS]
TRAINING_FLAGS = [
    [],
    ['--flip_left_right', '--random_brightness=10', '--train_batch_size=5'],
    ['--find_suspects=3'],
    ['--strict'],
    ['--optimized_graph=trained_model/optimized.pb'],
    ['--print_misclassified_test_images', '--test_batch_size=5'],
    ['--validation_batch_size=-1', '--eval_step_interval=1'],
    ['--how_many_training_steps=0'],
    ['--how_many_training_steps=3000'],
    ['--summaries_dir=logs', '--train_batch_size=3'],
]
LABELLING_FLAGS = [
    [],
    ['--json'],
    ['--top=1'],
    ['--unknown=10'],
    ['--min_score=0.9'],
    ['--upright'],
]


class World:
    """A folder in which trainings and labelings run, and anything happens."""

    def __init__(self, folder, model, seed):
        self.random = random.Random(seed)
        self.job = Job(folder, model)
        self.folder, self.data = folder, self.job.data
        self.story = [f'seed {seed}']
        self.kept = {}  # files of the user, which no run may change: {path: contents}
        self.count = 0
        for label in ('cat', 'dog'):
            for _ in range(14):
                self.add_image(label)
        store = folder / 'store'
        store.mkdir()
        self.keep(store / 'notes.txt', b'of the user')
        self.output = ''  # of the last run

    def keep(self, path, contents):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
        self.kept[path] = contents

    def choose(self, paths):
        return self.random.choice(sorted(paths))

    def list_images(self):
        return [path for path in self.data.glob('*/*.jpg') if path.is_file()]

    def draw_image(self):
        """Returns a JPEG or PNG file of noise."""
        rng = np.random.default_rng(self.random.randrange(2**32))
        shape = *rng.integers(8, 40, 2), 3
        file = io.BytesIO()
        kind = self.random.choice(['JPEG', 'JPEG', 'PNG', 'WEBP'])
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(file, kind)
        return file.getvalue()

    # What happens to images

    def add_image(self, label=None):
        folder = label or self.choose(path.name for path in self.data.iterdir())
        path = self.data / folder / f'{self.count}.jpg'
        self.count += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.draw_image())

    def replace_image(self):
        """Perhaps by an older one, of another size: `cp -p`."""
        path = self.choose(self.list_images())
        before = path.stat()
        contents = self.draw_image()
        path.write_bytes(contents)
        if len(contents) != before.st_size and self.random.random() < 0.5:
            os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))

    def swap_images(self):
        first, second = (self.choose(self.list_images()) for _ in range(2))
        if first != second and first.stat().st_size != second.stat().st_size:
            first.rename(self.folder / 'third')
            second.rename(first)
            (self.folder / 'third').rename(second)

    def damage_image(self):
        path = self.choose(self.list_images())
        path.write_bytes(path.read_bytes()[: self.random.randrange(100)])

    def remove_image(self):
        path = self.choose(self.list_images())
        path.unlink()
        self.add_image(path.parent.name)

    def add_what_is_no_image(self):
        folder = self.data / self.random.choice(['cat', 'dog'])
        name = f'{self.random.randrange(100)}'
        kind = self.random.randrange(4)
        if kind == 0 and not (folder / f'f{name}.jpg').exists():
            os.mkfifo(folder / f'f{name}.jpg')
        elif kind == 1 and not (folder / f'z{name}.jpg').is_symlink():
            (folder / f'z{name}.jpg').symlink_to('/dev/zero')
        elif kind == 2:
            self.keep(folder / f'{name}.txt', b'notes')
        else:
            header = b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xff\0\0\xff\xff\x08\x02\0\0\0'
            (folder / f'{name}.png').write_bytes(header)

    # What happens to the cache, outputs and logs

    def change_cache(self):
        files = [path for path in (self.folder / 'bottlenecks').rglob('*') if path.is_file()]
        if not files:
            return
        path = self.choose(files)
        kind = self.random.randrange(5)
        if kind == 0:
            path.unlink()
        elif kind == 1:
            path.write_bytes(path.read_bytes()[: self.random.randrange(2000)])
        elif kind == 2:
            path.write_bytes(self.choose(files).read_bytes())
        elif kind == 3:
            path.unlink()
            path.symlink_to(self.folder / 'store/notes.txt')
        else:
            shutil.rmtree(self.folder / 'bottlenecks/.records', ignore_errors=True)
            for file in (self.folder / 'bottlenecks').rglob('*.txt'):
                file.unlink()
        if path.suffix == '.rec':
            # Without a record, the cache file of an image that has changed would be believed.
            name = path.relative_to(self.folder / 'bottlenecks/.records').with_suffix('.txt')
            (self.folder / 'bottlenecks' / name).unlink(missing_ok=True)

    def change_output(self):
        path = self.folder / self.random.choice(OUTPUTS)
        path.parent.mkdir(exist_ok=True)
        self.kept.pop(path, None)
        kind = self.random.randrange(5)
        if kind == 0 and path.is_file() and not path.is_symlink():
            path.chmod(0o444)
            self.kept[path] = path.read_bytes()
        elif kind == 1:
            path.unlink(missing_ok=True)
            os.mkfifo(path)
        elif kind == 2:
            path.unlink(missing_ok=True)
            path.symlink_to(self.folder / f'store/{path.name}')
        elif kind == 3 and path.name.endswith('.json'):
            path.unlink(missing_ok=True)
            self.keep(path, b'{"name": "my-app"}')
        else:
            path.unlink(missing_ok=True)

    def free_outputs(self):
        """The user finds out why a training was refused."""
        for name in OUTPUTS:
            path = self.folder / name
            if self.kept.pop(path, None) or path.is_fifo():
                path.unlink()

    def add_log(self):
        name = 'events.out.tfevents.1764345600.host'  # of retrain.py of 2017, PyTorch and Keras
        names = [name, f'{name}.7.0', f'{name}.7.0.v2', 'notes.txt']
        path = self.folder / 'logs/train' / self.random.choice(names)
        self.keep(path, b'')
        os.utime(path, (1, 1))

    def change_something(self):
        changes = [self.add_image, self.replace_image, self.swap_images, self.damage_image]
        changes += [self.remove_image, self.add_what_is_no_image, self.change_cache]
        changes += [self.change_output, self.add_log]
        change = self.random.choice(changes)
        self.story.append(change.__name__)
        change()

    # Runs

    def run(self, *command, changes):
        """Runs a script, and stops it or changes files in the middle; returns the ended process."""
        fault = self.random.choice([None, None, 'stop', 'stop', 'change'])
        lines = self.random.randrange(1, 60)  # before the first one, it may not yet be the script
        self.story.append(f'{" ".join(map(str, command))}: {fault} after {lines} lines')
        signals = []
        with Fork(command, self.folder) as process:
            while fault and process.process.is_alive():
                if sum(text.count('\n') for text in process.read()) >= lines:
                    if fault == 'change':
                        self.random.choice(changes)()
                        break
                    stops = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
                    signals = self.random.choices(stops, [5, 3, 2], k=self.random.choice([1, 1, 2]))
                    for signum in signals:
                        if process.process.is_alive():
                            process.send_signal(signum)
                        time.sleep(self.random.random() / 5)
                    break
                time.sleep(0.01)
            self.output = process.out = ''.join(process.communicate())
        process.is_cut_off = len(signals) > 1 or signal.SIGKILL in signals
        return process

    def train(self):
        script = self.random.choice(['tf_retrain.py', 'retrain_serving.py'])
        flags = [flag for _ in range(2) for flag in self.random.choice(TRAINING_FLAGS)]
        if script == 'retrain_serving.py':
            flags.append(f'--saved_model_dir=served/{self.random.randrange(1, 4)}')
        before = self.read_outputs()
        changes = [self.replace_image, self.damage_image, self.remove_image, self.swap_images]
        command = ROOT / script, *self.job.arguments(*flags, random_seed=self.random.randrange(9))
        process = self.run(*command, changes=changes)
        self.check_process(process)
        # A stop may come after everything was written, while the program ends.
        if process.returncode == 0 or 'Wrote the graph' in process.out:
            self.check_training(before)
        elif not process.is_cut_off and '.unfinished_' not in process.out:
            assert self.read_outputs() == before
        if process.returncode == 1:
            self.free_outputs()

    def label(self):
        flags = list(self.random.choice(LABELLING_FLAGS))
        image = self.choose(self.list_images()).relative_to(self.folder)
        kind = self.random.randrange(4)
        if kind == 0:
            target = self.random.choice([image, GRAPH, LABELS, 'h.png', 'store/notes.txt'])
            flags.append(f'--heatmap={target}')
        elif kind == 1:
            image = 'data'
            flags.append(f'--sort_into={self.random.choice(["sorted", "data", "data/cat"])}')
        elif kind == 2:
            image = 'data'
        before = self.read_outputs()
        process = self.run(ROOT / 'tf_test.py', image, GRAPH, LABELS, *flags, changes=[int])
        self.check_process(process)
        assert self.read_outputs() == before

    def read_outputs(self):
        paths = [self.folder / name for name in OUTPUTS]
        return [path.is_file() and (path.stat().st_mtime_ns, path.read_bytes()) for path in paths]

    # What holds after each run

    def check_process(self, process):
        assert 'Traceback' not in process.out
        assert process.returncode in {0, 1, 2, 130, -signal.SIGINT, -signal.SIGTERM, -9}
        if process.returncode == 1:
            assert 'ERROR: ' in process.out.splitlines()[-1]
        for path, contents in self.kept.items():
            assert path.read_bytes() == contents, path
        temporary = list(self.folder.rglob('.*.tmp'))
        if process.is_cut_off:
            for path in temporary:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            assert not temporary

    def check_training(self, before):
        """The outputs are new and of one training, and each cache file is that of its image."""
        for old, new in zip(before, self.read_outputs(), strict=True):
            assert new
            assert not old or new[0] > old[0]
        graph = tf_test.load_graph(str(self.folder / GRAPH))
        assert graph.training
        assert (self.folder / LABELS).read_text().splitlines() == graph.labels
        self.check_cache()

    def check_cache(self):
        """After one more run, in which nothing happens."""
        names = 'found', 'fresh'
        for name, bottleneck_dir in zip(names, ('bottlenecks', 'fresh'), strict=True):
            arguments = self.job.arguments(bottleneck_dir=self.folder / bottleneck_dir)
            flags = parse(*arguments, f'--image_dir={self.data}')
            flags.model_dir = str(self.folder / 'inception')
            images = tf_retrain.list_images(flags)
            backbone = tf_retrain.load_backbone(flags)
            setattr(self, name, tf_retrain.cache_bottlenecks(images, backbone, flags))
        (found_images, found, _), (images, expected, _) = self.found, self.fresh
        assert found_images.paths == images.paths
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
        shutil.rmtree(self.folder / 'fresh')


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.parametrize('seed', range(*map(int, SEEDS.split(':'))))
def test_whatever_happens(tmp_path, model, seed):
    world = World(tmp_path, model, seed)
    try:
        for _ in range(STEPS):
            for _ in range(world.random.randrange(3)):
                world.change_something()
            world.random.choice([world.train, world.train, world.label])()
    except BaseException:
        print('\n'.join(world.story))
        print(world.output[-5000:])
        raise
