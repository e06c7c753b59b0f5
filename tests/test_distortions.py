"""Distorted training images: what is done to them, and runs that lose images on the way."""

import itertools
import json
import os
import pathlib
import re
import zlib
from unittest import mock

import numpy as np
import pytest
from helpers import get_scores, get_set, parse, read_events, write_mobilenet

import tf_retrain

SIZE = (299, 299)


def test_distortions():
    ramp = np.broadcast_to(np.linspace(0, 255, 400, dtype=np.uint8)[:, None], [300, 400, 3])
    plain = tf_retrain.resize_bilinear(ramp[np.newaxis], SIZE)[0].numpy()

    def distorted(*arguments):
        flags = parse('--image_dir=data', '--random_seed=0', *arguments)
        distort = tf_retrain.create_distortion(flags, SIZE)
        return np.stack([distort(ramp, index).numpy() for index in range(40)])

    assert tf_retrain.create_distortion(parse('--image_dir=data'), SIZE) is None
    mirrored = distorted('--flip_left_right')
    flipped = [not np.allclose(image, plain) for image in mirrored]
    assert 8 <= sum(flipped) <= 32
    np.testing.assert_allclose(mirrored[flipped.index(True)], plain[:, ::-1])

    factors = distorted('--random_brightness=30').mean(axis=(1, 2, 3)) / plain.mean()
    assert 0.7 <= factors.min() < 0.8
    assert 1.2 < factors.max() <= 1.3

    # A margin of 20 % leaves 1 / 1.2 of the ramp to be seen; where it begins differs from image to
    # image.
    cropped = distorted('--random_crop=20')
    seen = cropped[:, 0, -1, 0] - cropped[:, 0, 0, 0]
    np.testing.assert_allclose(seen, 255 / 1.2, rtol=0.02)
    assert np.ptp(cropped[:, 0, 0, 0]) > 10

    seen = np.ptp(distorted('--random_scale=50')[:, 0, :, 0], axis=1)
    assert 255 / 1.5 * 0.98 < seen.min() < 255 / 1.35
    assert 255 / 1.15 < seen.max() <= 255


@pytest.mark.parametrize(
    'distortion',
    ['--flip_left_right', '--random_crop=10', '--random_scale=10', '--random_brightness=10'],
)
def test_training_with_distortions(job, distortion):
    flags = {'how_many_training_steps': '12', 'train_batch_size': '40'}
    out = job.photographs(cat=25, dog=25).main(distortion, **flags)
    distorted = job.graph()
    assert 'Step 11: Train accuracy' in out
    events = read_events(job.folder / 'logs/train')
    logged = [event.step for event in events if 'accuracy_1' in str(event.summary)]
    assert logged == list(range(12))
    job.main(distortion, **flags)
    assert job.graph() == distorted  # with the same seed
    job.main(**flags)
    assert job.graph() != distorted
    scores = get_scores(distorted, (job.data / 'cat/cat 0.jpg').read_bytes())
    assert scores.argmax() == 0


def test_distortions_of_a_mobilenet(job):
    write_mobilenet(job.folder / 'inception', '0.25_128')
    job.photographs(cat=20, dog=20)
    distortions = '--flip_left_right', '--random_crop=10', '--random_brightness=5'
    flags = {'architecture': 'mobilenet_0.25_128', 'how_many_training_steps': '3'}
    out = job.main(*distortions, **flags)
    assert 'Step 2: Train accuracy' in out
    assert job.graph().node[-1].name == 'final_result'


def read_outputs(job):
    folder = job.folder / 'trained_model'
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lose(job, monkeypatch, paths, lose_image=pathlib.Path.unlink):
    """Loses images when the training begins, after the bottlenecks were cached."""

    def train(*arguments, original=tf_retrain.train):
        for path in paths:
            lose_image(path)
        return original(*arguments)

    monkeypatch.setattr(tf_retrain, 'train', train)


def test_images_that_vanish_are_missing_from_their_steps(job, monkeypatch):
    """The run goes on to its last step, and one warning says which images vanished."""
    job.photographs(cat=30, dog=30)
    paths = sorted(job.data.rglob('*.jpg'))
    gone = [path for path in paths if get_set(job.folder, path) == 'training'][3:5]
    lose(job, monkeypatch, gone)
    out = job.main('--flip_left_right', how_many_training_steps='25', train_batch_size='40')
    assert 'Step 24: Train accuracy' in out
    names = ', '.join(str(path.relative_to(job.folder)) for path in gone)
    warning = 'WARNING: 2 images could no longer be read, and are missing in some steps: '
    assert re.findall('^.* could no longer be read.*$', out, re.MULTILINE) == [warning + names]
    scores = get_scores(job.graph(), (job.data / 'dog/dog 0.jpg').read_bytes())
    assert scores.argmax() == 1


def test_without_any_image_the_old_graph_stays(job, monkeypatch):
    job.photographs(cat=30, dog=30).main()
    before = job.graph()
    paths = sorted(job.data.rglob('*.jpg'))
    lose(job, monkeypatch, paths, lambda path: path.write_bytes(b'damaged'))
    message = '--image_dir: none of .* can be read any longer'
    out = job.fails(message, '--flip_left_right', how_many_training_steps='12')
    assert re.search(r'WARNING: \d+ images could no longer be read, .* and \d+ more\n', out)
    assert job.graph() == before


@pytest.mark.parametrize(
    ('left', 'problem'),
    [
        ('nothing', 'is gone, or its images are. Restore them'),
        ('notes', 'is gone, or its images are. Restore them'),
        ('mount point', 'is gone, or its images are. Restore them'),
        pytest.param('loop', 'is gone, or its images are. Restore', marks=pytest.mark.posix),
    ],
)
@pytest.mark.parametrize('lost', ['data', 'data/dog'])
def test_a_drive_that_is_removed_ends_the_training(job, monkeypatch, lost, left, problem):
    """It has all classes or one of them. What was learned is written beside the earlier outputs.

    A first Ctrl-C no longer stops the run then, and the next unfinished training does not replace
    the files either.
    """
    job.photographs(cat=30, dog=30).main()
    before = read_outputs(job)
    protect = mock.Mock()
    monkeypatch.setattr(tf_retrain, 'protect_outputs', protect)
    monkeypatch.setattr(tf_retrain, 'DISTORTED_STEPS', 2)
    step = tf_retrain.train_step
    path = job.folder / lost

    def train_step(layer, *arguments):
        if layer.steps == 3:
            path.rename(job.folder / 'gone')
            if left == 'notes':
                for folder in ('cat', 'dog'):
                    (job.data / folder).mkdir(parents=True, exist_ok=True)
                    (job.data / folder / 'notes.txt').touch()
            elif left == 'mount point':
                path.mkdir()
            elif left == 'loop':
                path.symlink_to(path)
        step(layer, *arguments)

    monkeypatch.setattr(tf_retrain, 'train_step', train_step)
    flags = {'how_many_training_steps': '50', 'train_batch_size': '10', 'optimized_graph': 'o.pb'}
    message = f"^--image_dir: 'data/.*' {problem}|'data.*' {problem}"
    out = job.fails(message, '--flip_left_right', **flags)
    protect.assert_called()
    assert 'Final test accuracy = ' in out
    wrote = r'Wrote the graph trained_model/(.*\.pb\.unfinished_(\d{8}_\d{6})) and'
    learned, time = re.search(wrote, out).groups()
    assert (job.folder / f'o.pb.unfinished_{time}').exists()
    after = read_outputs(job)
    assert {name: after[name] for name in before} == before
    assert after[f'labels.txt.unfinished_{time}'] == before['labels.txt']
    record = json.loads(after[f'{learned}.json'])
    assert 3 <= record['steps'] < 50
    assert 'data' in record['problem']
    assert record['graph_checksum'] == zlib.crc32(after[learned])


def test_images_that_were_missing_only_for_a_moment(job, monkeypatch):
    """Another program rewrites the photographs of a class, one half after the other."""
    job.photographs(cat=30, dog=30)
    step = tf_retrain.train_step
    monkeypatch.setattr(tf_retrain, 'DISTORTED_STEPS', 1)
    paths = sorted(job.data.glob('dog/*'))
    training = [path for path in paths if get_set(job.folder, path) == 'training']
    contents = {path: path.read_bytes() for path in training}
    halves = itertools.cycle([training[::2], training[1::2]])

    def train_step(layer, *arguments):
        away = next(halves)
        for path in training:
            path.write_bytes(b'' if path in away else contents[path])
        step(layer, *arguments)

    monkeypatch.setattr(tf_retrain, 'train_step', train_step)
    flags = {'how_many_training_steps': '12', 'train_batch_size': '200'}
    out = job.main('--flip_left_right', **flags)
    assert (
        f'WARNING: {len(training)} images could no longer be read, and are missing in some' in out
    )
    assert 'Wrote the graph' in out


def test_a_class_whose_images_are_all_damaged_ends_the_training(job, monkeypatch):
    """Their folder, on another drive than the outputs, is there."""
    job.photographs(cat=30, dog=30).main()
    before = read_outputs(job)
    step = tf_retrain.train_step
    monkeypatch.setattr(tf_retrain, 'DISTORTED_STEPS', 1)

    def train_step(layer, *arguments):
        if layer.steps == 3:
            for path in job.data.glob('dog/*'):
                path.write_bytes(b'')
        step(layer, *arguments)

    monkeypatch.setattr(tf_retrain, 'train_step', train_step)
    message = 'none of the training images of dog can be read any longer. .* is in the files above'
    flags = {'how_many_training_steps': '50', 'train_batch_size': '40'}
    out = job.fails(message, '--flip_left_right', **flags)
    assert 'images could no longer be read, and are missing in some steps: data/dog/dog ' in out
    after = read_outputs(job)
    assert {name: after[name] for name in before} == before
    assert len(after) == 2 * len(before)


def test_outputs_whose_folders_are_gone_get_others(tmp_path, monkeypatch):
    """They were on the drive of the images, or it leaves an empty mount point of root.

    Equal names stay apart.
    """
    monkeypatch.chdir(tmp_path)
    for name in ('temporary', 'mount_point', 'rw'):
        pathlib.Path(name).mkdir()
    monkeypatch.setattr(tf_retrain.tempfile, 'tempdir', str(tmp_path / 'temporary'))
    monkeypatch.setattr(os, 'access', lambda path, mode: path == b'rw')  # root may write anywhere
    graphs = {'output_graph': 'gone/x', 'optimized_graph': 'mount_point/x'}
    paths = graphs | {'output_labels': 'rw/l.txt'}
    flags = parse('--image_dir=data', *(f'--{name}={path}' for name, path in paths.items()))
    renamed = vars(tf_retrain.rename_outputs(flags))
    assert re.fullmatch(r'rw/l\.txt\.unfinished_\d+_\d+', renamed['output_labels'])
    graphs = {renamed['output_graph'], renamed['optimized_graph']}
    assert len(graphs) == 2
    for path in map(pathlib.Path, graphs):
        assert path.name.startswith('x.unfinished_')
        assert path.parent.parent == tmp_path / 'temporary'


@pytest.mark.parametrize('is_anything_left', [True, False])
def test_outputs_if_the_folder_for_temporary_files_is_gone_too(
    tmp_path, monkeypatch, is_anything_left
):
    """On the same drive, such as /scratch. If nothing is left, the end of the run says so."""
    monkeypatch.chdir(tmp_path)
    make = tf_retrain.tempfile.mkdtemp

    def make_in(dir):
        if dir != '.' or not is_anything_left:
            raise FileNotFoundError(2, 'No such file or directory', dir)
        return make(dir=dir)

    monkeypatch.setattr(tf_retrain.tempfile, 'mkdtemp', make_in)
    flags = tf_retrain.rename_outputs(parse('--image_dir=data', '--output_labels=gone/l.txt'))
    folder = pathlib.Path(flags.output_labels).parent
    assert folder.is_dir() == is_anything_left
    assert (str(folder) == 'gone') != is_anything_left


@pytest.mark.posix
def test_an_unfinished_output_lies_beside_the_target_of_a_link(tmp_path):
    """The folder of the link may be read-only."""
    (tmp_path / 'labels.txt').touch()
    link = tmp_path / 'links/l.txt'
    link.parent.mkdir()
    link.symlink_to(tmp_path / 'labels.txt')
    flags = tf_retrain.rename_outputs(parse('--image_dir=data', f'--output_labels={link}'))
    assert flags.output_labels.startswith(f'{tmp_path}/labels.txt.unfinished_')


@pytest.mark.parametrize(
    ('error', 'message'),
    [
        (MemoryError(), r'the memory is full\. Close .*, or lower the batch sizes'),
        (RuntimeError("can't start new thread"), "can't start new thread"),  # pids of a container
    ],
)
def test_a_lack_of_resources_after_the_first_step_keeps_what_was_learned(
    job, monkeypatch, error, message
):
    real = tf_retrain.compute_distorted

    def fail(*arguments):
        yield from itertools.islice(real(*arguments), 3)
        raise error

    monkeypatch.setattr(tf_retrain, 'compute_distorted', fail)
    message = rf'^{message}\. What 3 training steps have'
    job.photographs(cat=30, dog=30).fails(message, '--flip_left_right')


def test_an_unfinished_training_whose_outputs_fail_says_both(job, monkeypatch):
    def fill(*arguments):
        yield np.arange(2), np.zeros([2, 2048], np.float32)
        raise OSError('gone')

    def refuse(path, contents, write_whole=tf_retrain.write_whole):
        if path.startswith('trained_model/labels.txt.unfinished_'):
            raise OSError('full')
        write_whole(path, contents)

    monkeypatch.setattr(tf_retrain, 'compute_distorted', fill)
    monkeypatch.setattr(tf_retrain, 'write_whole', refuse)
    message = (
        r'^gone\. What was learned could not be written: .*/labels\.txt\.unfinished_\w+ \(full\). '
        r'Written: .*\.pb\.unfinished_\w+, .*\.json\. '
        r'The outputs of an earlier training are as they were\.$'
    )
    job.photographs(cat=30, dog=30).fails(message, '--flip_left_right')


def test_what_ended_a_training_without_a_step_is_said(job, monkeypatch):
    """The first image drawn was unreadable. Then something else ended the training."""

    def fill(*arguments):
        yield np.array([], int), np.array([])
        raise OSError('the drive is gone')

    monkeypatch.setattr(tf_retrain, 'compute_distorted', fill)
    job.photographs(cat=30, dog=30).fails('^the drive is gone$', '--flip_left_right')


def test_a_run_that_is_stopped_before_the_first_step_leaves_the_logs(job, monkeypatch):
    """With distortions, this step takes its time."""
    job.photographs(cat=30, dog=30).main()
    before = sorted(path for path in (job.folder / 'logs').rglob('*') if path.is_file())
    assert len(before) == 3

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tf_retrain, 'regroup', stop)
    with pytest.raises(KeyboardInterrupt):
        job.main('--flip_left_right')
    assert sorted(path for path in (job.folder / 'logs').rglob('*') if path.is_file()) == before


def test_images_are_regrouped_by_step():
    """Batches of the network end within steps; whole batches and whole steps may be missing."""
    places = np.arange(20).reshape(5, 4)
    kept = [0, 1, 2, 3, 5, 6, 13, 15, 19]
    for size in (1, 2, 3, 9):
        blocks = [np.array(kept[start : start + size]) for start in range(0, len(kept), size)]
        computed = iter([(block, None, block[:, None] * np.ones(3)) for block in blocks])
        steps = list(tf_retrain.regroup(computed, places))
        assert [list(row[found]) for row, (found, _) in zip(places, steps, strict=True)] == [
            [0, 1, 2, 3],
            [5, 6],
            [],
            [13, 15],
            [19],
        ]
        rows = [bottlenecks[:, 0].tolist() for _, bottlenecks in steps if bottlenecks.size]
        assert sum(rows, []) == kept
