"""What TensorBoard shows: curves, distributions, graph and pictures; and the table of classes."""

import collections
import datetime
import importlib
import io
import itertools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import types
import urllib.parse
import urllib.request
from unittest import mock

import numpy as np
import pytest
from helpers import COLOURS, GRAPH, ROOT, Job, read_events, run_v1_on_all, write_photographs
from PIL import Image

import tf_retrain

tf = tf_retrain.tf
LABELS = ['cat', 'dog', 'wolf']
PROGRAMS = ROOT / 'tests/programs'


@pytest.fixture(scope='module')
def confused(tmp_path_factory, model):
    """A finished run on three classes, two of which look alike.

    .predicted has the label of each test image according to the frozen graph, .wrong those that are
    misclassified.
    """
    job = Job(tmp_path_factory.mktemp('confused'), model).photographs(cat=60, dog=60)
    write_photographs(job.data, 'wolf', 60, COLOURS[1])
    flags = {'testing_percentage': 30, 'how_many_training_steps': 20}
    job.process = job.run('--print_misclassified_test_images', **flags)
    paths = job.test_images(30)
    images = [path.read_bytes() for path in paths]
    scores = np.concatenate(run_v1_on_all(job.graph(), images, 'final_result:0'))
    predicted = np.array(LABELS)[scores.argmax(axis=1)]
    job.predicted = dict(zip(paths, predicted, strict=True))
    job.wrong = {path: label for path, label in job.predicted.items() if label != path.parent.name}
    assert job.wrong
    return job


def test_confusion_in_the_record(confused):
    counts = collections.Counter((path.parent.name, of) for path, of in confused.predicted.items())
    test = json.loads((confused.folder / f'{GRAPH}.json').read_text())['test']
    assert test['confusion'] == [[counts[true, label] for label in LABELS] for true in LABELS]


def test_misclassified_images_are_listed(confused):
    out = confused.process.stdout
    _, _, rest = out.partition('=== MISCLASSIFIED TEST IMAGES ===\n')
    listed, _, _ = rest.partition('To look at the training')
    assert listed.splitlines() == [
        f'{path.relative_to(confused.folder)!s:>70}  {predicted}'
        for path, predicted in confused.wrong.items()
    ]


# Only the class that a label is confused with may be further right than 80 columns.
TABLE = """\
Final test accuracy = 40.0% (N=20)
95% confidence interval: 21.9 to 61.3%. About 92 test images would halve the width of the interval.
class                     images   right   wrong  precision  most confused with
cat                            6       3       3     100.0%  none (2)
dog                            5       5       0      50.0%
none                           0       0       0       0.0%
wolfwolfwolfwolfwolfwolfwolfwolf       9       0       9          -  none (5)
"""


def create_tested(confusion):
    """Returns the result of a test with these counts, [true class, predicted class]."""
    cells = np.argwhere(np.array(confusion) >= 0)
    classes, predictions = np.repeat(cells, np.ravel(confusion), axis=0).T
    return tf_retrain.Tested(np.arange(len(classes)), classes, predictions)


def report(confusion, labels, capsys):
    images = tf_retrain.Images('data', labels, None, None, None)
    flags = types.SimpleNamespace(print_misclassified_test_images=False, output_graph='g.pb')
    tf_retrain.report_test(images, create_tested(confusion), flags)
    return capsys.readouterr().out


def test_table_of_classes(capsys):
    confusion = [[3, 1, 2, 0], [0, 5, 0, 0], [0, 0, 0, 0], [0, 4, 5, 0]]
    assert report(confusion, ['cat', 'dog', 'none', 'wolf' * 8], capsys) == TABLE


@pytest.mark.parametrize('count', [30, 31, 500])
def test_the_table_of_many_classes_has_those_with_the_most_errors(capsys, count):
    confusion = 2 * np.eye(count, dtype=int)
    confusion[:, 0] = np.arange(count)
    out = report(confusion, [f'class {i}' for i in range(count)], capsys)
    expected = range(30) if count == 30 else range(count - 1, count - 21, -1)
    listed = re.findall(r'^class (\d+) +\d+ +(\d+) +(\d+) ', out, re.MULTILINE)
    assert listed == [(f'{i}', '2' if i else '0', f'{i}') for i in expected]
    rest = f'These 20 of {count} classes have the most errors.\n'
    rest += 'g.pb.json has the counts of all classes.\n'
    assert out.endswith(rest) == (count > 30)


def test_the_table_of_many_classes_has_none_without_images(capsys):
    """tf_test.py may label images of one class out of a thousand."""
    confusion = np.zeros([40, 40], int)
    confusion[7, 7] = 3
    out = report(confusion, [f'class {i}' for i in range(40)], capsys)
    assert re.findall(r'^class (\d+) +(\d+) ', out, re.MULTILINE) == [('7', '3')]
    assert 'have the most errors' not in out  # it has none, and is the only one with images


def test_cells_are_the_matrix_without_its_zeros():
    confusion = np.random.default_rng(0).integers(3, size=[20, 20])
    tested = create_tested(confusion)
    np.testing.assert_array_equal(tested.count_confusion(20), confusion)
    expected = [[true, predicted, n] for (true, predicted), n in np.ndenumerate(confusion) if n]
    assert tested.count_cells().tolist() == expected


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
    found = tf_retrain.create_value('tag', values).histo
    assert found.num == 210
    assert (found.min, found.max) == (values.min(), values.max())
    sums = values.sum(), np.square(values).sum()
    assert (found.sum, found.sum_squares) == pytest.approx(sums)
    below = [np.count_nonzero(values <= limit) for limit in found.bucket_limit]
    assert np.cumsum(found.bucket).tolist() == below
    assert len(tf_retrain.create_value('tag', np.zeros(5)).histo.bucket) == 30


@pytest.mark.parametrize('count', [1_000_000, 1_002_000])
def test_the_histogram_of_many_numbers_is_of_a_sample(count):
    """TensorBoard shows its description."""
    values = np.arange(count).reshape(2000, -1) % (count // 2000)
    value = tf_retrain.create_value('tag', values)
    described = value.metadata.summary_description
    if count == 1_000_000:
        assert (value.histo.num, described) == (count, '')
    else:
        assert (value.histo.num, described) == (100_000, 'a sample of 100,000 of 1,002,000 numbers')
    assert sum(value.histo.bucket) == value.histo.num
    assert value.histo.sum / value.histo.num == pytest.approx(values.mean(), rel=0.01)


def read_graphs(folder):
    return [event.graph_def for event in read_events(folder) if event.graph_def]


def test_logged_graph_has_no_weights(trained):
    graph = trained.graph()
    (contents,) = read_graphs(trained.folder / 'logs/train')
    logged = tf.compat.v1.GraphDef.FromString(contents)
    names = [node.name for node in graph.node if not node.name.startswith('familiarity')]
    assert [node.name for node in logged.node] == names
    assert logged.ByteSize() < 20_000 < graph.ByteSize()
    assert not read_graphs(trained.folder / 'logs/validation')


def name_log(owner):
    """Returns what an earlier run called an event file."""
    return f'events.out.tfevents.1764345600000000000.{owner}'


def test_only_event_files_of_runs_are_removed_from_the_logs(job):
    """Those of other programs, which may have folders of the same names, stay."""
    old = name_log('host.7')
    kept = ['train/notes.txt', f'train/other/{old}', f'mine/{old}', old]
    for name in (*kept, f'train/{old}', f'validation/{old}'):
        path = job.folder / 'logs' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('x')
        os.utime(path, (1, 1))
    job.photographs(cat=20, dog=20).main()
    for name in kept:
        assert (job.folder / 'logs' / name).read_text() == 'x'
    # These find one event file each.
    assert len(read_events(job.folder / 'logs/train')) > 10
    assert len(read_events(job.folder / 'logs/validation')) == 5


def test_logs_of_other_programs_stay(job):
    start = 'events.out.tfevents.1764345600.host'
    # Of retrain.py of 2017 and tensorboardX, PyTorch, a named run of PyTorch, and Keras; a copy.
    others = [start, f'{start}.7.0', f'{start}.7.0.run1', f'{start}.7.0.v2']
    others.append(f'{name_log("host.7")}.best')
    train = job.folder / 'logs/train'
    train.mkdir(parents=True)
    for name in (*others, name_log('host.7')):
        (train / name).touch()
        os.utime(train / name, (1, 1))
    out = job.photographs(cat=20, dog=20).main()
    assert 'WARNING: logs of other programs stay, and TensorBoard shows them t' in out
    assert all(f'logs/train/{name}' in out for name in others)
    left = set(os.listdir(train))
    assert set(others) < left
    (own,) = left - set(others)
    assert own != name_log('host.7')


def read_pictures(job):
    """Returns {tag: picture} of the test, in the order of the event file."""
    pictures = {}
    for event in read_events(job.folder / 'logs/test'):
        for value in event.summary.value:
            if value.tag == 'familiarity':
                continue
            picture = Image.open(io.BytesIO(value.image.encoded_image_string))
            assert picture.size == (value.image.width, value.image.height)
            pictures[value.tag] = picture
    return pictures


def test_pictures(confused):
    pictures = read_pictures(confused)
    expected = {}
    for path, predicted in confused.wrong.items():
        label = path.parent.name
        expected[f'misclassified/{label} classified as {predicted}/{label}/{path.name}'] = path
    assert set(pictures) == {'confusion_matrix', *expected}
    for tag, path in expected.items():
        np.testing.assert_array_equal(pictures[tag], Image.open(path))


def test_thumbnails(tmp_path):
    """What is large becomes smaller, and what cannot be read (any longer) is gray."""
    wide, broken, gone = (tmp_path / f'{name}.png' for name in ('wide', 'broken', 'gone'))
    Image.new('RGB', (600, 200), 'red').save(wide)
    broken.write_bytes(wide.read_bytes()[:100])
    found = [tf_retrain.load_thumbnail(str(path), False) for path in (wide, broken, gone)]
    assert [picture.size for picture in found] == [(299, 100), (299, 299), (299, 299)]
    colours = [picture.getpixel((5, 5)) for picture in found]
    assert colours == [(255, 0, 0), (128, 128, 128), (128, 128, 128)]


@pytest.mark.posix
def test_a_thumbnail_of_what_became_a_fifo(tmp_path):
    os.mkfifo(tmp_path / 'x.jpg')
    thumbnail = tf_retrain.load_thumbnail(str(tmp_path / 'x.jpg'), False)
    assert thumbnail.getpixel((5, 5)) == (128, 128, 128)
    assert tf_retrain.read_start(str(tmp_path / 'x.jpg')) == b''


def test_the_limit_on_pixels_holds_for_thumbnails(tmp_path, monkeypatch):
    """Of an image that has changed since its bottleneck was computed."""
    monkeypatch.setattr(tf_retrain, 'MAX_PIXELS', 600 * 200 - 1)
    for kind in ('JPEG', 'PNG', 'WEBP'):
        Image.new('RGB', (600, 200), 'red').save(tmp_path / kind, kind)
        thumbnail = tf_retrain.load_thumbnail(str(tmp_path / kind), False)
        assert thumbnail.getpixel((5, 5)) == (128, 128, 128)


def test_pictures_of_images_that_have_changed_since(job, monkeypatch):
    """The same at the end of a run, whose bottlenecks are known by then.

    Zero steps have many images misclassified.
    """
    job.photographs(cat=30, dog=30)
    tested = job.test_images(40)
    broken, gone, wide = (tested[start::3] for start in range(3))

    def change_images(*arguments, train=tf_retrain.train):
        for path in broken:
            path.write_bytes(path.read_bytes()[:300])
        for path in gone:
            path.unlink()
        for path in wide:
            Image.new('RGB', (600, 200), 'red').save(path, 'PNG')
        return train(*arguments)

    monkeypatch.setattr(tf_retrain, 'train', change_images)
    out = job.main(testing_percentage='40', how_many_training_steps='0')
    assert f'(N={len(tested)})' in out
    pictures = {tag.split('/')[-1]: picture for tag, picture in read_pictures(job).items()}
    gray = (299, 299), (128, 128, 128)
    red = (299, 100), (255, 0, 0)
    for paths, looks in ((broken, gray), (gone, gray), (wide, red)):
        found = [pictures[path.name] for path in paths if path.name in pictures]
        assert {(picture.size, picture.getpixel((5, 5))) for picture in found} == {looks}


@pytest.mark.parametrize(('count', 'cell'), [(2, 48), (5, 48), (30, 40), (200, 6)])
def test_confusion_matrix(count, cell):
    """Each cell is as dark as its share of its row."""
    labels = [['猫', 'x' * 60, 'dog'][i % 3] for i in range(count)]
    confusion = 8 * np.eye(count, dtype=int)
    confusion[0, :2] = 3, 1
    picture = np.array(tf_retrain.draw_confusion_matrix(confusion, labels)).astype(int)
    margin = len(picture) - cell * count
    corners = picture[margin + 1 :: cell, margin + 1 :: cell]
    assert corners[1, 1] == corners[-1, -1] < corners[0, 0] < corners[0, 1] < corners[1, 0] == 255
    assert len(picture) < 1900
    assert picture[margin:, :margin].min() < 128  # labels at the left
    assert picture[:margin, margin:].min() < 128  # and at the top


def test_labels_that_the_font_lacks(job):
    """The matrix has their numbers, and a text says whose they are."""
    job.photographs(dog=20, 犬=20, 猫=20).main(testing_percentage='40', how_many_training_steps='0')
    values = (
        value for event in read_events(job.folder / 'logs/test') for value in event.summary.value
    )
    found = {value.tag: value for value in values}
    legend = found['confusion_matrix/legend']
    assert legend.metadata.plugin_data.plugin_name == 'text'
    assert tf.make_ndarray(legend.tensor).item().decode() == '- `#2`: 犬\n- `#3`: 猫'
    matrix = Image.open(io.BytesIO(found['confusion_matrix'].image.encoded_image_string))
    margin = matrix.width - 3 * 48
    rows = [np.array(matrix)[-48 * i :, :margin][:48] for i in (3, 2, 1)]
    for first, second in itertools.combinations(rows, 2):
        assert (first != second).any()  # not the same empty box


def test_nothing_is_left_of_the_pictures_of_an_earlier_run(job):
    job.photographs(cat=30, dog=30).main()
    assert 'confusion_matrix' in read_pictures(job)
    out = job.main(testing_percentage='0')
    assert 'Final test accuracy: unknown' in out
    assert read_pictures(job) == {}


def test_what_another_run_writes_at_the_same_time_is_left_alone(job, monkeypatch):
    """It may also remove what this run is about to remove."""
    job.photographs(cat=30, dog=30).main('--find_suspects=2')
    events = job.folder / 'logs/train' / name_log('other.2')
    list_dir, removed = tf_retrain.list_dir, []

    def list_and_remove(path):
        if path == 'logs/train':
            events.write_bytes(b'of another run')
        names = list_dir(path)
        if path == 'logs/suspects':
            removed.extend(names)
            for name in names:
                os.remove(os.path.join(path, name))
        return names

    monkeypatch.setattr(tf_retrain, 'list_dir', list_and_remove)
    out = job.main()
    assert out.count('WARNING: another run logs to logs at the same time') == 1
    assert 'logs of an earlier run stay' not in out
    assert events.read_bytes() == b'of another run'
    assert len(list(events.parent.iterdir())) == 2
    assert removed
    assert os.listdir(job.folder / 'logs/suspects') == []


def test_what_was_written_since_the_run_started_stays(tmp_path, capsys):
    """By a run on this computer that has closed its log since, or ended."""
    (tmp_path / 'train').mkdir()
    host, _ = tf_retrain.get_process()
    old, other = (tmp_path / 'train' / name_log(f'{host}.9999999{i}') for i in (1, 2))
    for path in (old, other):
        path.touch()
        os.utime(path, (1e9, 1e9))
    start = tf_retrain.note_start(str(tmp_path))
    start = start._replace(time=start.time - datetime.timedelta(seconds=9))
    other.touch()
    tf_retrain.clear_events(str(tmp_path), start)
    assert 'another run logs to' in capsys.readouterr().out
    assert os.listdir(tmp_path / 'train') == [other.name]


@pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='only Linux tells who has a file')
def test_the_log_of_a_run_that_is_at_work_stays(job):
    """With distortions, a step may take longer than the whole of another run."""
    logs = job.folder / 'logs/train'
    logs.mkdir(parents=True)
    host, _ = tf_retrain.get_process()
    with subprocess.Popen(['cat'], stdin=subprocess.PIPE) as other:
        # A notebook may live on after its training: what counts is that the file is open.
        old = logs / name_log(f'{host}.{other.pid}')
        old.touch()
        os.utime(old, (10**9, 10**9))
        job.photographs(cat=30, dog=30)
        assert 'another run' not in job.main('--find_suspects=2')
        assert not old.exists()
        other.stdin.close()
    command = [sys.executable, PROGRAMS / 'open_log.py', logs / name_log(f'{host}.')]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        path = pathlib.Path(other.stdout.readline().decode().strip())
        os.utime(path, (10**9, 10**9))
        out = job.main('--find_suspects=2')
        assert out.count('WARNING: another run logs to logs at the same time') == 1
        assert path.exists()
        other.stdin.close()
    assert 'another run' not in job.main('--find_suspects=2')
    assert not path.exists()
    assert len(list((job.folder / 'logs/suspects').iterdir())) == 1


@pytest.mark.parametrize('is_first', [True, False])
def test_the_suspects_of_a_run_that_is_at_work_stay(tmp_path, capsys, monkeypatch, is_first):
    """Their file is closed before the training: the file of the training may come later, too."""
    suspects, train, old = (
        tmp_path / path
        for path in (
            f'suspects/{name_log("other.2")}',
            f'train/{name_log("other.2")}',
            f'train/{name_log("other.9")}',
        )
    )
    for path in (suspects, train, old):
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (10**9, 10**9))
    if is_first:
        os.utime(train)
        start = tf_retrain.note_start(str(tmp_path))
    else:
        train.unlink()
        start = tf_retrain.note_start(str(tmp_path))
        train.touch()
    tf_retrain.clear_events(str(tmp_path), start)
    assert sorted(tmp_path.rglob('events*')) == [suspects, train]
    assert capsys.readouterr().out.count('WARNING: another run logs to') == 1


def test_a_run_that_is_stopped_before_the_training_leaves_the_logs(job, monkeypatch):
    job.photographs(cat=30, dog=30).main()
    before = sorted((job.folder / 'logs').rglob('events*'))
    monkeypatch.setattr(tf_retrain, 'cross_validate', mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        job.main('--find_suspects=2')
    assert sorted((job.folder / 'logs').rglob('events*')) == before


def test_events_of_the_future_are_old_ones(job):
    """The clock was set back since then."""
    job.photographs(cat=30, dog=30)
    events = job.folder / 'logs/train' / name_log('other.2')
    events.parent.mkdir(parents=True)
    events.touch()
    os.utime(events, (2**40, 2**40))
    assert 'another run' not in job.main()
    assert not events.exists()


def test_logs_that_cannot_be_listed_stay(job, monkeypatch):
    """The drive fails for a moment. They are not taken for those of another run."""
    job.photographs(cat=30, dog=30)
    log = job.folder / 'logs/train' / name_log('other.2')
    log.parent.mkdir(parents=True)
    log.touch()
    os.utime(log, (10**9, 10**9))
    list_logs = mock.Mock(wraps=tf_retrain.list_logs, side_effect=[OSError(5, 'I/O'), mock.DEFAULT])
    monkeypatch.setattr(tf_retrain, 'list_logs', list_logs)
    out = job.main()
    assert 'WARNING: the removal of earlier logs left out (OSError: ' in out
    assert out.count('left out') == 1
    assert 'another run' not in out
    assert log.exists()


def clear_events(folder):
    """As a run that starts now."""
    tf_retrain.clear_events(str(folder), tf_retrain.note_start(str(folder)))


@pytest.mark.parametrize(('seconds', 'stays'), [(-30, True), (30, True), (-99, False), (99, False)])
def test_logs_of_other_computers_whose_clocks_differ(tmp_path, capsys, seconds, stays):
    """They may log to the same network drive."""
    (tmp_path / 'train').mkdir()
    events = tmp_path / 'train' / name_log('other.2')
    events.touch()
    modified = time.time() + seconds
    os.utime(events, (modified, modified))
    clear_events(tmp_path)
    assert events.exists() == stays
    assert ('another run logs to' in capsys.readouterr().out) == stays


@pytest.mark.skipif(not os.path.exists('/proc/self/ns/pid'), reason='not Linux')
def test_containers_on_this_computer_do_not_remove_logs_of_each_other(tmp_path, capsys):
    """They may have its name, and the same numbers for their processes."""
    (tmp_path / 'train').mkdir()
    log = tmp_path / 'train' / name_log(f'{socket.gethostname()}-1.{os.getpid()}')
    log.touch()
    os.utime(log, (time.time() - 9, time.time() - 9))
    clear_events(tmp_path)
    assert log.exists()
    assert 'WARNING: another run logs to' in capsys.readouterr().out


def test_the_logs_of_containers_that_have_ended_are_removed(tmp_path, capsys):
    """Each container has a name of its own."""
    for name in ('train', 'validation', 'test'):
        (tmp_path / name).mkdir()
        (tmp_path / name / name_log('other.2')).touch()
    clear_events(tmp_path)
    assert list(tmp_path.rglob('events*')) == []
    assert capsys.readouterr().out == ''


def test_the_logs_of_this_run_stay_whatever_the_clocks_say(tmp_path, capsys, monkeypatch):
    """That of the drive is wrong, and that of this computer is set back during the run."""
    start = tf_retrain.note_start(str(tmp_path))
    past = time.time_ns() - 10**12
    monkeypatch.setattr(time, 'time_ns', lambda: past)
    tf_retrain.SummaryWriter(f'{tmp_path}/suspects')
    (log,) = (tmp_path / 'suspects').iterdir()
    os.utime(log, (2**40, 2**40))
    tf_retrain.clear_events(str(tmp_path), start)
    assert log.exists()
    assert capsys.readouterr().out == ''
    # A notebook trains again: now it is the log of an earlier run.
    clear_events(tmp_path)
    assert not log.exists()


@pytest.mark.filterwarnings('ignore:html5lib:DeprecationWarning')
def test_tensorboard_serves_the_pictures(confused):
    """A real TensorBoard finds all of them."""
    program = importlib.import_module('tensorboard.program')  # here, where its warning is ignored
    board = program.TensorBoard()
    once = '--reload_interval=0', '--reload_task=blocking', '--load_fast=false'
    board.configure(['', f'--logdir={confused.folder}/logs', '--port=0', *once])
    address = board.launch()

    def get(route):
        with urllib.request.urlopen(f'{address}data/plugin/images/{route}', timeout=60) as answer:
            return answer.read()

    written = read_pictures(confused)
    assert set(json.loads(get('tags'))['test']) == set(written)
    query = urllib.parse.urlencode({'run': 'test', 'tag': 'confusion_matrix', 'sample': 0})
    (image,) = json.loads(get(f'images?{query}'))
    served = Image.open(io.BytesIO(get(f'individualImage?{image["query"]}')))
    np.testing.assert_array_equal(served, written['confusion_matrix'])


@pytest.mark.posix
def test_a_log_folder_that_cannot_be_cleared_is_a_warning(job, monkeypatch):
    """The graph is written all the same, and a FIFO that looks like a log stays."""
    logs = job.folder / 'logs/train'
    logs.mkdir(parents=True)
    os.mkfifo(logs / name_log('host.7'))
    os.utime(logs / name_log('host.7'), (1e9, 1e9))
    job.photographs(cat=20, dog=20).main(how_many_training_steps='2')
    assert (logs / name_log('host.7')).is_fifo()
    with open(os.fsencode(logs) + b'/\xff', 'w'):
        pass
    out = job.main(how_many_training_steps='2')
    assert 'WARNING: the removal of earlier logs left out (UserError: ' in out
    assert 'Wrote the graph' in out
