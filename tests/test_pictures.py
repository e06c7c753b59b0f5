"""What is shown of the tested images: the table in the terminal, and in TensorBoard pictures and the projector."""

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
from conftest import COLOURS, Job, category, write_photographs
from PIL import Image, ImageChops

import tf_retrain
import tf_test

tf = tf_retrain.tf


@pytest.fixture(scope='module')
def mistaken(tmp_path_factory, model):
    """A finished run on three classes, two of which look alike, so that some test images are mistaken."""
    job = Job(tmp_path_factory.mktemp('mistaken'), model).photographs(cat=60, dog=60)
    write_photographs(job.data, 'wolf', 60, COLOURS[1])
    job.process = job.run('--testing_percentage=30', '--how_many_training_steps=20')
    job.tested = [path for path in job.data.rglob('*.jpg') if is_tested(job, path)]
    return job


def is_tested(job, path):
    return tf_retrain.get_category(str(path.relative_to(job.folder)), 30, 10) == 'testing'


def predict(job, path):
    return ['cat', 'dog', 'wolf'][tf_test.run_graph(job.graph(), path.read_bytes()).argmax()]


@pytest.fixture(scope='module')
def confusion(mistaken):
    """{(true label, predicted label): the paths of the test images}, by the frozen graph."""
    found = {}
    for path in mistaken.tested:
        found.setdefault((path.parent.name, predict(mistaken, path)), []).append(path)
    assert any(true != predicted for true, predicted in found)
    return found


def test_table_of_classes(mistaken, confusion):
    out = mistaken.process.stdout
    assert f'(N={len(mistaken.tested)})\nclass  images   right   wrong  most confused with\n' in out
    for label in ('cat', 'dog', 'wolf'):
        counts = {predicted: len(paths) for (true, predicted), paths in confusion.items() if true == label}
        right, total = counts.pop(label, 0), sum(counts.values())
        images, found_right, wrong, most = re.search(rf'^{label} +(\d+) +(\d+) +(\d+)(.*)$', out, re.MULTILINE).groups()
        assert [int(images), int(found_right), int(wrong)] == [right + total, right, total]
        expected = {f'  {other} ({count})' for other, count in counts.items() if count == max(counts.values())}
        assert most in (expected or {''})


def read_pictures(folder):
    """Returns {tag: picture} of an event file, the confusion matrix first."""
    (path,) = folder.glob('events.out.tfevents.*')
    pictures = {}
    for record in tf.compat.v1.io.tf_record_iterator(str(path)):
        for value in tf.compat.v1.Event.FromString(record).summary.value:
            pictures[value.tag] = Image.open(io.BytesIO(value.image.encoded_image_string))
            assert pictures[value.tag].size == (value.image.width, value.image.height)
    return pictures


def test_pictures(mistaken, confusion):
    pictures = read_pictures(mistaken.folder / 'logs/test')
    wrong = [(true, predicted, path) for (true, predicted), paths in confusion.items() for path in paths]
    expected = {
        f'misclassified/{true} taken for {predicted}/{path.name}': path
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
    picture = np.array(tf_retrain.draw_confusion_matrix(confusion, labels)).astype(int).sum(axis=2)
    cell = max(2, min(48, 1200 // count))
    margin = picture.shape[0] - cell * count - 10
    corners = picture[margin + 1 :: cell, margin + 1 :: cell][:count, :count]  # inside of the cells' outlines
    if cell > 8:
        corners = picture[margin + 2 :: cell, margin + 2 :: cell][:count, :count]
    assert corners[1, 1] == corners[-1, -1] < corners[0, 0] < corners[0, 1] < corners[1, 0] == 3 * 255
    assert picture.shape[0] < 1900


def test_thumbnails(tmp_path):
    Image.new('RGB', (300, 100), 'red').save(tmp_path / 'wide.png')
    (tmp_path / 'broken.jpg').write_bytes(b'\xff\xd8\xff\xe0broken')
    wide, broken, missing = (
        tf_retrain.load_thumbnail(str(tmp_path / name), 64) for name in ('wide.png', 'broken.jpg', 'missing')
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
    broken, gone = [path for path in sorted(job.data.rglob('*.jpg')) if category(job.folder, path) == 'testing'][:2]

    def lose_images(*arguments, train=tf_retrain.train_final_layer):
        broken.write_bytes(broken.read_bytes()[:300])
        gone.unlink()
        train(*arguments)

    monkeypatch.setattr(tf_retrain, 'train_final_layer', lose_images)
    job.main(monkeypatch)
    names = [line.split('\t')[2] for line in (job.folder / 'logs/test/metadata.tsv').read_text().splitlines()[1:]]
    assert f'(N={len(names)})' in capsys.readouterr().out
    sprite = Image.open(job.folder / 'logs/test/thumbnails')
    colours = [get_thumbnail(sprite, i).getcolors() for i in range(len(names))]
    grey = {name for name, found in zip(names, colours, strict=True) if found and found[0][1] == (128, 128, 128)}
    assert grey == {broken.name, gone.name}


def test_nothing_is_left_of_the_pictures_of_an_earlier_run(job, monkeypatch, capsys):
    job.photographs(cat=30, dog=30).main(monkeypatch)
    assert (job.folder / 'logs/test/projector_config.pbtxt').exists()
    job.main(monkeypatch, testing_percentage='0')
    assert 'Final test accuracy: unknown' in capsys.readouterr().out
    assert not (job.folder / 'logs/test/projector_config.pbtxt').exists()
    assert read_pictures(job.folder / 'logs/test') == {}


def test_odd_file_names(job, monkeypatch):
    """A tab or a line break in a file name does not shift the projector's table."""
    job.photographs(cat=30, dog=30)
    odd = [job.data / f'cat/tab\t{i} new\nline.jpg' for i in range(5)]
    for i, path in enumerate(odd):
        (job.data / f'cat/cat {i}.jpg').rename(path)
    job.main(monkeypatch, testing_percentage='80')
    tested = [path for path in odd if tf_retrain.get_category(f'data/cat/{path.name}', 80, 10) == 'testing']
    assert tested
    lines = (job.folder / 'logs/test/metadata.tsv').read_text().splitlines()
    assert {line.count('\t') for line in lines} == {2}
    assert sum(bool(re.search(r'\ttab \d new line\.jpg$', line)) for line in lines) == len(tested)


@pytest.mark.slow
def test_tensorboard_serves_them(mistaken, confusion):
    """A real TensorBoard finds all of it."""
    command = [sys.executable, '-m', 'tensorboard.main', '--logdir', str(mistaken.folder / 'logs'), '--port=0']
    server = subprocess.Popen([*command, '--host=localhost'], stderr=subprocess.PIPE, text=True)
    try:
        address = next(match[0] for line in server.stderr if (match := re.search(r'http://localhost:\d+', line)))

        def get(plugin, route, **query):
            url = f'{address}/data/plugin/{plugin}/{route}?{urllib.parse.urlencode(query)}'
            with urllib.request.urlopen(url, timeout=60) as response:
                return response.read()

        def is_loaded():
            return 'test' in json.loads(get('images', 'tags')) and b'test' in get('projector', 'runs')

        deadline = time.monotonic() + 60
        while not is_loaded() and time.monotonic() < deadline:
            time.sleep(1)
        tags = json.loads(get('images', 'tags'))['test']
        assert set(tags) == set(read_pictures(mistaken.folder / 'logs/test'))
        (image,) = json.loads(get('images', 'images', run='test', tag='confusion_matrix', sample=0))
        served = Image.open(io.BytesIO(get('images', f'individualImage?{image["query"]}&x')))
        written = read_pictures(mistaken.folder / 'logs/test')['confusion_matrix']
        np.testing.assert_array_equal(np.array(served), np.array(written))

        (embedding,) = json.loads(get('projector', 'info', run='test'))['embeddings']
        count = len(mistaken.tested)
        assert embedding['tensorShape'] == [count, 2048]
        tensor = np.frombuffer(get('projector', 'tensor', run='test', name='bottlenecks'), np.float32)
        metadata = get('projector', 'metadata', run='test', name='bottlenecks').decode().splitlines()
        assert metadata[0] == 'label\tpredicted\timage'
        sprite = Image.open(io.BytesIO(get('projector', 'sprite_image', run='test', name='bottlenecks')))
        columns = sprite.width // 64
        assert sprite.size == (64 * columns, 64 * columns)
        assert (columns - 1) ** 2 < count <= columns**2
        for i, (line, row) in enumerate(zip(metadata[1:], tensor.reshape(count, 2048), strict=True)):
            label, predicted, name = line.split('\t')
            path = mistaken.data / label / name
            assert path in confusion[label, predicted]
            cached = (mistaken.folder / f'bottlenecks/{label}/{name}.txt').read_text().split(',')
            np.testing.assert_allclose(row, np.array(cached, np.float32), rtol=1e-5)
            np.testing.assert_array_equal(np.array(get_thumbnail(sprite, i)), np.array(Image.open(path)))
    finally:
        server.kill()
        server.wait()
