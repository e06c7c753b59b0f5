"""What TensorBoard shows: curves, distributions, the graph, pictures and the projector; and the table of classes."""

import io
import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import numpy as np
import pytest
from helpers import COLOURS, Job, get_scores, get_set, parse, read_events, write_photographs
from PIL import Image, ImageChops

import tf_retrain

tf = tf_retrain.tf


@pytest.fixture(scope='module')
def confused(tmp_path_factory, model):
    """A finished run on three classes, two of which look alike, so that some test images are misclassified."""
    job = Job(tmp_path_factory.mktemp('confused'), model).photographs(cat=60, dog=60)
    write_photographs(job.data, 'wolf', 60, COLOURS[1])
    job.process = job.run('--testing_percentage=30', '--how_many_training_steps=20')
    job.tested = job.test_images(30)
    return job


def predict(job, path):
    return ['cat', 'dog', 'wolf'][get_scores(job.graph(), path.read_bytes()).argmax()]


@pytest.fixture(scope='module')
def confusion(confused):
    """{(true label, predicted label): the paths of the test images}, by the frozen graph."""
    found = {}
    for path in confused.tested:
        found.setdefault((path.parent.name, predict(confused, path)), []).append(path)
    assert any(true != predicted for true, predicted in found)
    return found


def test_table_of_classes(confused, confusion):
    out = confused.process.stdout
    header = r'\nclass  images   right   wrong  precision  most confused with\n'
    assert re.search(rf'\(N={len(confused.tested)}\)\n95% confidence interval: .*{header}', out)
    for label in ('cat', 'dog', 'wolf'):
        counts = {
            predicted: len(paths) for (true, predicted), paths in confusion.items() if true == label
        }
        called = sum(
            len(paths) for (_, predicted), paths in confusion.items() if predicted == label
        )
        right, total = counts.pop(label, 0), sum(counts.values())
        pattern = rf'^{label} +(\d+) +(\d+) +(\d+) +(?:([\d.]+)%|-)(.*)$'
        images, found_right, wrong, precision, most = re.search(pattern, out, re.MULTILINE).groups()
        assert [int(images), int(found_right), int(wrong)] == [right + total, right, total]
        assert precision == (f'{100 * right / called:.1f}' if called else None)
        expected = {
            f'  {other} ({count})'
            for other, count in counts.items()
            if count == max(counts.values())
        }
        assert most in (expected or {''})


def test_the_table_is_readable_at_80_columns(capsys):
    labels = ['x' * 30, 'a' * 10, 'cat']
    images = tf_retrain.Images(
        'd', labels, np.array(['a', 'b', 'c'], object), np.arange(3), np.array(['testing'] * 3)
    )
    tested = tf_retrain.Tested(
        np.arange(3), np.array([1, 1, 2]), np.array([[0, 1, 0], [0, 1, 0], [0, 0, 1]]), []
    )
    tf_retrain.report_test(images, tested, parse('--image_dir=d'))
    _, _, header, *rows = capsys.readouterr().out.splitlines()
    assert header.index('precision') + len('precision') <= 80
    assert all(row.index('%' if '%' in row else ' -') <= 80 for row in rows)


SCALARS = [
    f'final_training_ops/{v}/summaries/{s}_1'
    for v in ('weights', 'biases')
    for s in ('mean', 'stddev', 'max', 'min')
]
HISTOGRAMS = [
    'final_training_ops/weights/summaries/histogram',
    'final_training_ops/biases/summaries/histogram',
    'final_training_ops/Wx_plus_b/pre_activations',
    'activations',
]


def test_summaries(trained):
    for name in ('train', 'validation'):
        written = read_events(trained.folder / 'logs' / name)
        assert written[0].file_version == 'brain.Event:2'
        steps = {}
        for event in written:
            for value in event.summary.value:
                steps.setdefault(value.tag, []).append(event.step)
                kind = value.WhichOneof('value')
                assert kind == ('histo' if value.tag in HISTOGRAMS else 'simple_value')
        losses = list(range(30)) if name == 'train' else [0, 10, 20, 29]
        expected = dict.fromkeys([*SCALARS, *HISTOGRAMS], [0, 10, 20, 29])
        assert steps == {**expected, 'cross_entropy_1': losses, 'accuracy_1': losses}


def test_histogram_keeps_the_moments():
    values = np.random.default_rng(0).normal(size=[7, 30])
    histogram = tf_retrain.create_value('tag', values).histo
    assert histogram.num == sum(histogram.bucket) == 210
    assert (histogram.min, histogram.max) == (values.min(), values.max())
    np.testing.assert_allclose(
        [histogram.sum, histogram.sum_squares], [values.sum(), (values**2).sum()]
    )
    assert len(tf_retrain.create_value('tag', np.zeros(5)).histo.bucket) == 30


def test_logged_graph_has_no_weights(trained):
    (graph,) = [
        event.graph_def
        for event in read_events(trained.folder / 'logs' / 'train')
        if event.graph_def
    ]
    logged = tf.compat.v1.GraphDef.FromString(graph)
    assert [node.name for node in logged.node] == [node.name for node in trained.graph().node]
    assert len(graph) < 20_000 < trained.graph().ByteSize()
    assert not any(event.graph_def for event in read_events(trained.folder / 'logs' / 'validation'))


def test_only_event_files_are_removed_from_the_logs(job):
    job.photographs(cat=20, dog=20)
    keep = [
        'train/notes.txt',
        'train/other/events.out.tfevents.1',
        'mine/events.out.tfevents.1',
        'events.out.tfevents.2',
    ]
    for name in (
        *keep,
        'train/events.out.tfevents.123.host',
        'validation/events.out.tfevents.123.host.v2',
    ):
        (job.folder / 'logs' / name).parent.mkdir(parents=True, exist_ok=True)
        (job.folder / 'logs' / name).write_text('x')
    job.main()
    assert all((job.folder / 'logs' / name).read_text() == 'x' for name in keep)
    assert len(read_events(job.folder / 'logs/train')) > 10
    assert len(read_events(job.folder / 'logs/validation')) == 5


def read_pictures(folder):
    """Returns {tag: picture} of an event file, in its order."""
    pictures = {}
    for value in (value for event in read_events(folder) for value in event.summary.value):
        pictures[value.tag] = Image.open(io.BytesIO(value.image.encoded_image_string))
        assert pictures[value.tag].size == (value.image.width, value.image.height)
    return pictures


def test_pictures(confused, confusion):
    pictures = read_pictures(confused.folder / 'logs/test')
    wrong = [
        (true, predicted, path) for (true, predicted), paths in confusion.items() for path in paths
    ]
    expected = {
        f'misclassified/{true} classified as {predicted}/{path.name}': path
        for true, predicted, path in wrong
        if true != predicted
    }
    assert set(pictures) == {'confusion_matrix', *expected}
    for tag, path in expected.items():
        np.testing.assert_array_equal(np.array(pictures[tag]), np.array(Image.open(path)))


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


def test_thumbnails(tmp_path):
    Image.new('RGB', (300, 100), 'red').save(tmp_path / 'wide.png')
    (tmp_path / 'broken.jpg').write_bytes(b'\xff\xd8\xff\xe0broken')
    wide, broken, missing = (
        tf_retrain.load_thumbnail(str(tmp_path / name), 64)
        for name in ('wide.png', 'broken.jpg', 'missing')
    )
    assert wide.size == (64, 21)
    assert broken.size == missing.size == (64, 64)
    assert broken.getpixel((5, 5)) == missing.getpixel((5, 5)) == (128, 128, 128)


def get_thumbnail(sprite, i):
    """Returns a thumbnail of those that the projector shows, without what is white or clear around it."""
    columns = sprite.width // 64
    x, y = i % columns * 64, i // columns * 64
    tile = Image.new('RGB', (64, 64), 'white')
    cut = sprite.crop((x, y, x + 64, y + 64)).convert('RGBA')
    tile.paste(cut, mask=cut)
    return tile.crop(ImageChops.invert(tile).getbbox())


def test_test_images_that_can_no_longer_be_read(job, monkeypatch, capsys):
    """Their bottlenecks are known by then; in the pictures they are grey."""
    job.photographs(cat=30, dog=30)
    broken, gone = [
        path for path in sorted(job.data.rglob('*.jpg')) if get_set(job.folder, path) == 'testing'
    ][:2]

    def lose_images(*arguments, train=tf_retrain.train):
        broken.write_bytes(broken.read_bytes()[:300])
        gone.unlink()
        return train(*arguments)

    monkeypatch.setattr(tf_retrain, 'train', lose_images)
    job.main()
    names = [
        line.split('\t')[2]
        for line in (job.folder / 'logs/test/metadata.tsv').read_text().splitlines()[1:]
    ]
    assert f'(N={len(names)})' in capsys.readouterr().out
    sprite = Image.open(job.folder / 'logs/test/thumbnails')
    colours = [get_thumbnail(sprite, i).getcolors() for i in range(len(names))]
    grey = {
        name
        for name, found in zip(names, colours, strict=True)
        if found and found[0][1] == (128, 128, 128)
    }
    assert grey == {broken.name, gone.name}


def test_nothing_is_left_of_the_pictures_of_an_earlier_run(job, capsys):
    job.photographs(cat=30, dog=30).main()
    assert (job.folder / 'logs/test/projector_config.pbtxt').exists()
    job.main(testing_percentage='0')
    assert 'Final test accuracy: unknown' in capsys.readouterr().out
    assert not (job.folder / 'logs/test/projector_config.pbtxt').exists()
    assert read_pictures(job.folder / 'logs/test') == {}


def test_odd_file_names(job):
    """A tab or a line break in a file name does not shift the projector's table."""
    job.photographs(cat=30, dog=30)
    odd = [job.data / f'cat/tab\t{i} new\nline.jpg' for i in range(5)]
    for i, path in enumerate(odd):
        (job.data / f'cat/cat {i}.jpg').rename(path)
    job.main(testing_percentage='80')
    tested = [
        path for path in odd if tf_retrain.get_set(f'data/cat/{path.name}', 80, 10) == 'testing'
    ]
    assert tested
    lines = (job.folder / 'logs/test/metadata.tsv').read_text().splitlines()
    assert {line.count('\t') for line in lines} == {2}
    assert sum(bool(re.search(r'\ttab \d new line\.jpg$', line)) for line in lines) == len(tested)


@pytest.mark.slow
def test_tensorboard_serves_them(confused, confusion):
    """A real TensorBoard finds all of it."""
    command = [
        sys.executable,
        '-m',
        'tensorboard.main',
        '--logdir',
        str(confused.folder / 'logs'),
        '--port=0',
    ]
    server = subprocess.Popen([*command, '--host=localhost'], stderr=subprocess.PIPE, text=True)
    try:
        address = next(
            match[0]
            for line in server.stderr
            if (match := re.search(r'http://localhost:\d+', line))
        )

        def get(plugin, route, **query):
            url = f'{address}/data/plugin/{plugin}/{route}?{urllib.parse.urlencode(query)}'
            with urllib.request.urlopen(url, timeout=60) as response:
                return response.read()

        def is_loaded():
            return 'test' in json.loads(get('images', 'tags')) and b'test' in get(
                'projector', 'runs'
            )

        deadline = time.monotonic() + 60
        while not is_loaded() and time.monotonic() < deadline:
            time.sleep(1)
        tags = json.loads(get('images', 'tags'))['test']
        assert set(tags) == set(read_pictures(confused.folder / 'logs/test'))
        (image,) = json.loads(get('images', 'images', run='test', tag='confusion_matrix', sample=0))
        served = Image.open(io.BytesIO(get('images', f'individualImage?{image["query"]}&x')))
        written = read_pictures(confused.folder / 'logs/test')['confusion_matrix']
        np.testing.assert_array_equal(np.array(served), np.array(written))

        (embedding,) = json.loads(get('projector', 'info', run='test'))['embeddings']
        count = len(confused.tested)
        assert embedding['tensorShape'] == [count, 2048]
        tensor = np.frombuffer(
            get('projector', 'tensor', run='test', name='bottlenecks'), np.float32
        )
        metadata = (
            get('projector', 'metadata', run='test', name='bottlenecks').decode().splitlines()
        )
        assert metadata[0] == 'label\tpredicted\timage'
        sprite = Image.open(
            io.BytesIO(get('projector', 'sprite_image', run='test', name='bottlenecks'))
        )
        columns = sprite.width // 64
        assert sprite.size == (64 * columns, 64 * columns)
        assert (columns - 1) ** 2 < count <= columns**2
        for i, (line, row) in enumerate(
            zip(metadata[1:], tensor.reshape(count, 2048), strict=True)
        ):
            label, predicted, name = line.split('\t')
            path = confused.data / label / name
            assert path in confusion[label, predicted]
            cached = (confused.folder / f'bottlenecks/{label}/{name}.txt').read_text().split(',')
            np.testing.assert_allclose(row, np.array(cached, np.float32), rtol=1e-5)
            np.testing.assert_array_equal(
                np.array(get_thumbnail(sprite, i)), np.array(Image.open(path))
            )
    finally:
        server.kill()
        server.wait()
