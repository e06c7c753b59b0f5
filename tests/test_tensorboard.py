"""What TensorBoard shows: curves, distributions, graph and pictures; and the table of classes."""

import importlib
import io
import itertools
import json
import os
import re
import time
import urllib.parse
import urllib.request

import numpy as np
import pytest
from helpers import COLOURS, Job, read_events, run_v1_on_all, write_photographs
from PIL import Image

import tf_retrain

tf = tf_retrain.tf
LABELS = ['cat', 'dog', 'wolf']


@pytest.fixture(scope='module')
def confused(tmp_path_factory, model):
    """A finished run on three classes, two of which look alike.

    So some test images are misclassified. In .confusion are the paths of the test images by true
    and predicted label, according to the frozen graph.
    """
    job = Job(tmp_path_factory.mktemp('confused'), model).photographs(cat=60, dog=60)
    write_photographs(job.data, 'wolf', 60, COLOURS[1])
    flags = {'testing_percentage': 30, 'how_many_training_steps': 20}
    job.process = job.run('--print_misclassified_test_images', **flags)
    job.tested = job.test_images(30)
    images = [path.read_bytes() for path in job.tested]
    results = run_v1_on_all(job.graph(), images, 'final_result:0')
    job.confusion = {pair: [] for pair in itertools.product(LABELS, LABELS)}
    for path, scores in zip(job.tested, results, strict=True):
        job.confusion[path.parent.name, LABELS[scores.argmax()]].append(path)
    job.wrong = {pair: paths for pair, paths in job.confusion.items() if pair[0] != pair[1]}
    assert any(job.wrong.values())
    return job


@pytest.mark.parametrize('label', LABELS)
def test_table_of_classes(confused, label):
    out = confused.process.stdout
    header = r'\nclass  images   right   wrong  precision  most confused with\n'
    assert re.search(rf'\(N={len(confused.tested)}\)\n95% confidence interval: .*{header}', out)
    counts = {pair: len(paths) for pair, paths in confused.confusion.items()}
    right = counts[label, label]
    others = {other: counts[label, other] for other in LABELS if other != label}
    called = sum(counts[true, label] for true in LABELS)
    wrong = sum(others.values())
    row = re.search(rf'^{label} +(\d+) +(\d+) +(\d+) +(?:([\d.]+)%|-)(.*)$', out, re.MULTILINE)
    assert list(map(int, row.groups()[:3])) == [right + wrong, right, wrong]
    assert row[4] == (f'{100 * right / called:.1f}' if called else None)
    most = max(others.values())
    named = {f'  {other} ({count})' for other, count in others.items() if count == most > 0}
    assert row[5] in (named or {''})


def test_misclassified_images_are_listed(confused):
    _, _, listed = confused.process.stdout.partition('=== MISCLASSIFIED TEST IMAGES ===\n')
    listed, _, _ = listed.partition('To look at the training')
    expected = [
        f'{path.relative_to(confused.folder)!s:>70}  {predicted}'
        for (_, predicted), paths in confused.wrong.items()
        for path in paths
    ]
    assert sorted(listed.splitlines()) == sorted(expected)
    share = 100 * (1 - len(expected) / len(confused.tested))
    assert f'Final test accuracy = {share:.1f}%' in confused.process.stdout


def test_the_table_is_readable_at_80_columns(job):
    """Only the class that a label is confused with may be further right."""
    out = job.photographs(**{'x' * 30: 20, 'a' * 10: 20, 'cat': 20}).main()
    _, header, rest = out.partition('class ')
    header, *rows = (header + rest).splitlines()[:4]
    assert header.index('precision') + len('precision') <= 80
    for row in rows:
        assert re.match(r'.{,79}[%-]', row)


LAYER = 'final_training_ops'
SCALARS = [
    f'{LAYER}/{name}/summaries/{statistic}_1'
    for name in ('weights', 'biases')
    for statistic in ('mean', 'stddev', 'max', 'min')
]
HISTOGRAMS = [f'{LAYER}/{name}/summaries/histogram' for name in ('weights', 'biases')]
HISTOGRAMS += [f'{LAYER}/Wx_plus_b/pre_activations', 'activations']


@pytest.mark.parametrize('name', ['train', 'validation'])
def test_summaries(trained, name):
    written = read_events(trained.folder / 'logs' / name)
    assert written[0].file_version == 'brain.Event:2'
    steps = {}
    for event in written:
        for value in event.summary.value:
            steps.setdefault(value.tag, []).append(event.step)
            kind = 'histo' if value.tag in HISTOGRAMS else 'simple_value'
            assert value.WhichOneof('value') == kind
    evaluated = [0, 10, 20, 29]
    expected = dict.fromkeys([*SCALARS, *HISTOGRAMS], evaluated)
    losses = list(range(30)) if name == 'train' else evaluated
    assert steps == {**expected, 'cross_entropy_1': losses, 'accuracy_1': losses}


def test_histogram_keeps_the_moments():
    values = np.random.default_rng(0).normal(size=[7, 30])
    histogram = tf_retrain.create_value('tag', values).histo
    assert histogram.num == sum(histogram.bucket) == 210
    below = np.searchsorted(np.sort(values, axis=None), histogram.bucket_limit, 'right')
    np.testing.assert_array_equal(np.cumsum(histogram.bucket), below)
    assert (histogram.min, histogram.max) == (values.min(), values.max())
    assert histogram.sum == pytest.approx(values.sum())
    assert histogram.sum_squares == pytest.approx((values**2).sum())
    assert len(tf_retrain.create_value('tag', np.zeros(5)).histo.bucket) == 30


def test_logged_graph_has_no_weights(trained):
    train, validation = (
        [event.graph_def for event in read_events(trained.folder / 'logs' / name)]
        for name in ('train', 'validation')
    )
    (graph,) = filter(None, train)
    logged = tf.compat.v1.GraphDef.FromString(graph)
    assert [node.name for node in logged.node] == [node.name for node in trained.graph().node]
    assert len(graph) < 20_000 < trained.graph().ByteSize()
    assert not any(validation)


def test_only_event_files_are_removed_from_the_logs(job):
    old = 'events.out.tfevents.1'
    kept = ['train/notes.txt', f'train/other/{old}', f'mine/{old}', old]
    for name in (*kept, f'train/{old}.host', f'validation/{old}.host.v2'):
        path = job.folder / 'logs' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('x')
    job.photographs(cat=20, dog=20).main()
    assert all((job.folder / 'logs' / name).read_text() == 'x' for name in kept)
    # These find one event file each.
    assert len(read_events(job.folder / 'logs/train')) > 10
    assert len(read_events(job.folder / 'logs/validation')) == 5


def read_pictures(job):
    """Returns {tag: picture} of the test, in the order of the event file."""
    pictures = {}
    for event in read_events(job.folder / 'logs/test'):
        for value in event.summary.value:
            picture = Image.open(io.BytesIO(value.image.encoded_image_string))
            assert picture.size == (value.image.width, value.image.height)
            pictures[value.tag] = picture
    return pictures


def check_same_picture(first, second):
    np.testing.assert_array_equal(np.array(first), np.array(second))


def test_pictures(confused):
    pictures = read_pictures(confused)
    expected = {
        f'misclassified/{true} classified as {predicted}/{path.name}': path
        for (true, predicted), paths in confused.wrong.items()
        for path in paths
    }
    assert set(pictures) == {'confusion_matrix', *expected}
    for tag, path in expected.items():
        check_same_picture(pictures[tag], Image.open(path))


@pytest.mark.parametrize('count', [2, 5, 30, 300])
def test_confusion_matrix(count):
    """Each cell is as dark as its share of its row."""
    labels = [['猫', 'x' * 60, 'dog'][i % 3] for i in range(count)]
    confusion = np.diag(np.full(count, 8))
    confusion[0] = 0
    confusion[0, :2] = 3, 1
    picture = np.array(tf_retrain.draw_confusion_matrix(confusion, labels)).astype(int)
    cell = max(4, min(48, 1200 // count))
    margin = picture.shape[0] - cell * count
    corners = picture[margin + 1 :: cell, margin + 1 :: cell][:count, :count]
    assert corners[1, 1] == corners[-1, -1] < corners[0, 0] < corners[0, 1] < corners[1, 0] == 255
    assert picture.shape[0] < 1900
    assert (picture[margin:, :margin] < 128).any()  # labels at the left
    assert (picture[:margin, margin:] < 128).any()  # and at the top


def test_pictures_of_images_that_have_changed_since(job, monkeypatch):
    """What can no longer be read is gray, and what is large becomes smaller.

    The bottlenecks are known by then. Zero steps have many images misclassified.
    """
    job.photographs(cat=60, dog=60)
    tested = job.test_images(40)
    broken, gone, wide = (tested[start::3] for start in range(3))

    def change_images(*arguments, train=tf_retrain.train):
        for path in broken:
            path.write_bytes(path.read_bytes()[:300])
        for path in gone:
            path.unlink()
        for path in wide:
            Image.new('RGB', (600, 200), (255, 0, 0)).save(path, 'PNG')
        return train(*arguments)

    monkeypatch.setattr(tf_retrain, 'train', change_images)
    out = job.main(testing_percentage='40', how_many_training_steps='0')
    assert f'(N={len(tested)})' in out
    pictures = {tag.split('/')[-1]: picture for tag, picture in read_pictures(job).items()}
    for paths, colour, size in (
        (broken, (128, 128, 128), (299, 299)),
        (gone, (128, 128, 128), (299, 299)),
        (wide, (255, 0, 0), (299, 100)),
    ):
        found = [pictures[path.name] for path in paths if path.name in pictures]
        assert found
        for picture in found:
            assert picture.size == size
            assert picture.getpixel((5, 5)) == colour


def test_nothing_is_left_of_the_pictures_of_an_earlier_run(job):
    job.photographs(cat=30, dog=30).main()
    assert 'confusion_matrix' in read_pictures(job)
    out = job.main(testing_percentage='0')
    assert 'Final test accuracy: unknown' in out
    assert os.listdir(job.folder / 'logs/test') == []


def test_what_another_run_writes_at_the_same_time_is_left_alone(job, monkeypatch):
    """It may also remove what this run is about to remove."""
    job.photographs(cat=30, dog=30).main('--find_suspects=2')
    events = job.folder / 'logs/train/events.out.tfevents.1.other.2'
    events.write_bytes(b'of another run')
    os.utime(events, (2**40, 2**40))
    list_dir, removed = tf_retrain.list_dir, []

    def list_and_remove(path):
        names = list_dir(path)
        if path == 'logs/suspects':
            removed.extend(names)
            for name in names:
                os.remove(os.path.join(path, name))
        return names

    monkeypatch.setattr(tf_retrain, 'list_dir', list_and_remove)
    out = job.main()
    assert out.count('WARNING: another run logs to logs at the same time.') == 1
    assert events.read_bytes() == b'of another run'
    assert len(list(events.parent.iterdir())) == 2
    assert removed
    assert os.listdir(job.folder / 'logs/suspects') == []


@pytest.mark.filterwarnings('ignore:html5lib:DeprecationWarning')
def test_tensorboard_serves_the_pictures(confused):
    """A real TensorBoard finds all of them."""
    program = importlib.import_module('tensorboard.program')  # here, where its warning is ignored
    board = program.TensorBoard()
    flags = f'--logdir={confused.folder}/logs', '--port=0', '--load_fast=false'
    board.configure(['', *flags, '--reload_interval=0'])
    address = board.launch().rstrip('/')

    def get(route):
        with urllib.request.urlopen(f'{address}/data/plugin/images/{route}', timeout=60) as answer:
            return answer.read()

    written = read_pictures(confused)
    deadline = time.monotonic() + 60
    while set(tags := json.loads(get('tags')).get('test', {})) != set(written):
        assert time.monotonic() < deadline, tags
        time.sleep(0.1)
    query = urllib.parse.urlencode({'run': 'test', 'tag': 'confusion_matrix', 'sample': 0})
    (image,) = json.loads(get(f'images?{query}'))
    served = Image.open(io.BytesIO(get(f'individualImage?{image["query"]}')))
    check_same_picture(served, written['confusion_matrix'])
