"""Which files are images, of which class and set; what happens to those that cannot be used."""

import hashlib
import io
import os
import pathlib
import re
import shutil
import struct
import tempfile
import zlib
from unittest import mock

import numpy as np
import pytest
from helpers import COLOURS, Job, build_model, created, parse, run_v1, write_photographs
from PIL import ExifTags, Image, PngImagePlugin

import tf_retrain
import tf_test
from tf_retrain import UserError, tf


@pytest.mark.parametrize(
    ('folder', 'label'),
    [
        ('cat', 'cat'),
        ('Red_Fox', 'red fox'),
        ('a-b', 'a b'),
        ('Crêpe  2', 'cr pe 2'),
        ('a\nb', 'a b'),
        ('_x_', 'x'),
        ('猫', '猫'),
        ('犬\n小', '犬 小'),
        ('---', '---'),
        (' ', ''),
        ('ハ\u309aン', 'パン'),  # as macOS writes it
        ('Ga\u0308nse', 'g nse'),
        ('Gänse', 'g nse'),
    ],
)
def test_labels(folder, label):
    assert tf_retrain.get_label(folder) == label


# The last 27 bits of `printf PATH | sha1sum`, as a percentage of 2**27 - 1:
# 4.138, 5.085, 15.728, 50.347
@pytest.mark.parametrize(
    ('path', 'name'),
    [
        ('data/cat/cat.2.jpg', 'validation'),
        ('data/cat/cat.9.jpg', 'validation'),
        ('data/cat/cat.0.jpg', 'testing'),
        ('data/cat/cat.1.jpg', 'training'),
    ],
)
def test_split(path, name):
    assert tf_retrain.get_set(path, 10, 10) == name


def original_set(path, testing, validation):
    """The formula of the reference, written out again in other words."""
    digest = hashlib.sha1(path.split('_nohash_')[0].encode()).digest()
    percentage = int.from_bytes(digest, 'big') % 2**27 / (2**27 - 1) * 100
    if percentage < validation:
        return 'validation'
    return 'testing' if percentage < validation + testing else 'training'


def test_split_follows_the_formula_and_ignores_nohash():
    paths = [f'data/{folder}/{i}.jpg' for folder in ('cat', 'Ünï') for i in range(2000)]
    found = [tf_retrain.get_set(path, 15, 25) for path in paths]
    assert found == [original_set(path, 15, 25) for path in paths]
    assert abs(found.count('testing') / len(found) - 0.15) < 0.03
    assert abs(found.count('validation') / len(found) - 0.25) < 0.03
    for i in range(100):
        variants = [f'd/{i}_nohash_{suffix}.jpg' for suffix in 'abcdef']
        assert {tf_retrain.get_set(path, 30, 30) for path in variants} == {
            original_set(f'd/{i}', 30, 30)
        }


def test_all_images_in_one_set_by_the_name_of_their_folder(tmp_path):
    (tmp_path / 'my_nohash_data').mkdir()
    flags = parse(f'--image_dir={tmp_path}/my_nohash_data')
    with pytest.raises(tf_retrain.UserError, match="^--image_dir: '_nohash_' in '.*' would put"):
        tf_retrain.list_images(flags)
    for name in ('train/cat', 'train/dog', 'val/cat', 'test/cat'):  # nothing is drawn
        (tmp_path / 'my_nohash_data' / name).mkdir(parents=True)
        (tmp_path / 'my_nohash_data' / name / '1.jpg').touch()
    assert len(tf_retrain.list_images(flags).files) == 4


def test_the_border_of_two_sets_belongs_to_the_upper_one(monkeypatch):
    """With hashes of 0 to 100, a percentage can be whole."""
    monkeypatch.setattr(tf_retrain, 'MAX_NUM_IMAGES_PER_CLASS', 100)
    for i in range(300):
        path = f'data/cat/{i}.jpg'
        share = int(hashlib.sha1(path.encode()).hexdigest(), 16) % 101
        expected = 'validation' if share < 30 else 'testing' if share < 60 else 'training'
        assert tf_retrain.get_set(path, 30, 30) == expected


@pytest.fixture
def touch(tmp_path, monkeypatch):
    """Creates empty files in a new working directory."""
    monkeypatch.chdir(tmp_path)

    def create(*paths):
        for path in map(pathlib.Path, paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    return create


def list_images(image_dir, percentage=10):
    names = 'testing_percentage', 'validation_percentage'
    percentages = [f'--{name}={percentage}' for name in names]
    return tf_retrain.list_images(parse(f'--image_dir={image_dir}', *percentages))


def test_the_table_is_sorted_and_complete(touch, capsys):
    touch(*(f'd/{folder}/{i}.jpg' for folder in ('zebra', 'Ant', 'bee') for i in range(40)))
    touch('d/bee/x.JPG', 'd/bee/y.Jpeg', 'd/bee/z.png')
    touch('d/bee/._0.jpg', 'd/bee/a.webp', 'd/bee/b.webp', 'd/bee/sub/deep.jpg', 'd/bee/README')
    touch('d/.hidden/1.jpg', 'd/empty/notes.txt', 'd/loose.jpg')
    images = list_images('d/')
    assert images.labels == ['ant', 'bee', 'zebra']
    assert list(images.files) == sorted(images.files)
    assert list(np.bincount(images.classes)) == [40, 45, 40]
    assert images.paths == [f'd/{file}' for file in images.files]
    folders = [file.split('/')[0].lower() for file in images.files]
    assert folders == [images.labels[index] for index in images.classes]
    assert list(images.sets) == [original_set(path, 10, 10) for path in images.paths]
    out = capsys.readouterr().out
    assert 'd/bee: 45 images; passed over: ._0.jpg, README, sub (1 images below it)\n' in out
    assert 'WARNING: d/ has 1 images outside of class folders. They are not used.\n' in out
    assert 'WARNING: d/empty has no images. It is not used as a class.\n' in out


@pytest.mark.parametrize('typed', ['d', 'd/', 'd//', './d', '../{name}/d/'])
def test_the_path_is_hashed_as_typed(touch, tmp_path, typed):
    touch(*(f'd/{folder}/{i}.jpg' for folder in 'ab' for i in range(50)))
    typed = typed.format(name=tmp_path.name)
    images = list_images(typed, percentage=30)
    prefix = typed if typed.endswith('/') else typed + '/'
    assert list(images.sets) == [original_set(f'{prefix}{file}', 30, 30) for file in images.files]


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ([], 'has no class folder with images'),
        (
            ['d/1.jpg', 'd/2.jpg'],
            "--image_dir: 'd' has no class folder with images. Two or more are needed: put ",
        ),
        (['d/cat/1.jpg'], "--image_dir: 'd' has 1 class folder with images"),
        (['d/Cat/1.jpg', 'd/cat/1.jpg'], "d/Cat and d/cat have the same label 'cat'"),
        (['d/パン/1.jpg', 'd/ハ\u309aン/1.jpg'], "have the same label 'パン'"),
        (['d/Gänse/1.jpg', 'd/Ga\u0308nse/1.jpg'], "have the same label 'g nse'"),
        (['d/a-b/1.jpg', 'd/a b/1.jpg'], "d/a b and d/a-b have the same label 'a b'"),
        (['d/ /1.jpg', 'd/cat/1.jpg'], 'blank'),
    ],
)
@pytest.mark.posix
def test_folders_that_make_no_classes(touch, files, message):
    os.mkdir('d')
    touch(*files)
    with pytest.raises(UserError, match=re.escape(message)):
        list_images('d')


def make_table(**sets):
    """Returns a table of images; {label: {set: how many images}}."""
    rows = [
        (f'{label}/{name}{i}', index, name)
        for index, (label, counts) in enumerate(sets.items())
        for name, count in counts.items()
        for i in range(count)
    ]
    return tf_retrain.Images('data', list(sets), *map(np.array, zip(*rows, strict=True)))


TABLE = make_table(
    a={'training': 3, 'validation': 1},
    b={'testing': 2, 'training': 1},
    c={'testing': 1, 'validation': 0},
)


def test_draws_are_uniform_over_classes_then_images():
    rows = TABLE.draw('training', 6000, np.random.default_rng(0))
    shares = np.bincount(rows, minlength=8) / 6000
    third = 0.5 / 3  # of a; b has one image in this set, and c has none
    np.testing.assert_allclose(shares, [third, third, third, 0, 0, 0, 0.5, 0], atol=0.03)
    assert set(TABLE.sets[rows]) == {'training'}


def test_minus_one_draws_every_image_of_the_set_once():
    rows = TABLE.draw('testing', -1, np.random.default_rng(0))
    assert list(TABLE.files[rows]) == ['b/testing0', 'b/testing1', 'c/testing0']


def test_images_that_are_left_out_are_missing_from_all_of_a_new_table():
    kept = TABLE.keep(TABLE.sets != 'testing')
    of_a = ['a/training0', 'a/training1', 'a/training2', 'a/validation0']
    assert list(kept.files) == [*of_a, 'b/training0']
    assert list(kept.classes) == [0, 0, 0, 0, 1]
    assert kept.paths[-1] == 'data/b/training0'
    assert kept.labels == ['a', 'b', 'c']
    assert len(TABLE.files) == 8
    assert list(kept.draw('testing', 5, np.random.default_rng(0))) == []


def test_empty_sets_are_named_in_one_line_per_set(capsys):
    tf_retrain.check_sets(TABLE, parse('--image_dir=data', '--validation_percentage=0'))
    # None for validation, as 0 % was asked for.
    testing, training = capsys.readouterr().out.splitlines()
    assert 'no testing image in 1 of 3 classes: a. ' in testing
    assert 'no training image in 1 of 3 classes: c. ' in training
    table = make_table(a={'testing': 1}, b={'testing': 1})
    with pytest.raises(UserError, match='no image fell into the training set'):
        tf_retrain.check_sets(table, parse('--image_dir=data'))


def test_tiny_classes_never_crash(job):
    """Three images per class leave sets empty, which the original met with a ZeroDivisionError."""
    out = job.photographs(cat=3, dog=3, fox=3).main()
    assert out.count('WARNING: Folder has less than 20 images, which may cause issues.') == 3
    assert 'WARNING: no testing image in' in out
    assert 'WARNING: no validation image in' in out
    assert (job.folder / 'trained_model/labels.txt').read_text() == 'cat\ndog\nfox\n'


@pytest.mark.parametrize('count', [10, 13])
def test_small_folders_beyond_ten_are_one_line(capsys, count):
    folders = {f'{i:02}\t': ['x.jpg'] * (i + 1) for i in range(count)}
    tf_retrain.report_small_folders('data', {**folders, 'large': ['x.jpg'] * 20})
    lines = capsys.readouterr().out.splitlines()
    start = 'WARNING: Folder has less than 20 images, which may cause issues. '
    assert lines[:10] == [f'{start}(data/{i:02}\\t: {i + 1})' for i in range(10)]
    assert lines[10:] == ['WARNING: 3 more folders have less than 20 images.'][: count - 10]


# What is in the files

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, [30, 40, 3], np.uint8))
DEEP = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)


def save(path, image_format='JPEG', image=IMAGE, **options):
    image.save(path, image_format, **options)


# {name: what is saved there}
GOOD = {
    'png named.jpg': ('PNG', IMAGE),
    'gif named.jpg': ('GIF', IMAGE),
    'a.png': ('PNG', IMAGE),
    'b.gif': ('GIF', IMAGE),
    'cmyk.jpg': ('JPEG', IMAGE.convert('CMYK')),
    'grey.jpg': ('JPEG', IMAGE.convert('L')),
    '16 bit.png': ('PNG', DEEP),
    'palette.png': ('PNG', IMAGE.convert('P')),
    'transparent.png': ('PNG', IMAGE.convert('RGBA')),
    'one.jpg': ('JPEG', Image.new('RGB', (1, 1))),
}
GOOD_NAMES = [
    'quote\'s "and", comma.jpg',
    '100 %s %d {x} $HOME `x`.jpg',
    'new\nline.jpg',
    'caf\u00e9.jpg',
    'cafe\u0301.jpg',
    '猫.JPEG',
    '-flag.jpg',
    'glob[1]*?.jpg',
    'x' * 246 + '.jpg',
]
NO_FORMAT = 'its format is not known: it starts with '
# {name: (how it is written, why it is left out)}
BAD = {
    'empty.jpg': (lambda p: p.touch(), 'it is empty'),
    'truncated.jpg': (lambda p: (save(p), os.truncate(p, 600)), 'Invalid JPEG data'),
    'webp.jpg': (lambda p: (save(p, 'WEBP'), os.truncate(p, 200)), 'it is WebP, and damaged ('),
    'heic.jpg': (
        lambda p: p.write_bytes(b'\0\0\0\x24ftypheic' + b'\0' * 50),
        'it is HEIC, and damaged, or of a kind that is not read',
    ),
    'eps.jpg': (lambda p: save(p, 'EPS'), 'it is EPS, which is not read'),
    'psd.jpg': (
        lambda p: p.write_bytes(b'8BPS' + bytes(50)),
        'it is Photoshop (PSD), which is not',
    ),
    'fits.jpg': (
        lambda p: p.write_bytes(b'SIMPLE  =' + bytes(50)),
        'it is FITS, which is not read',
    ),
    'float.tif': (
        lambda p: save(p, 'TIFF', Image.new('F', (9, 9))),
        'its samples are signed, or have 32 bits',
    ),
    'wide.bmp': (
        lambda p: save(p, 'BMP', Image.new('L', (1_000_001, 1))),
        'it is more than 1,000,000 pixels wide or high',
    ),
    'html.jpg': (
        lambda p: p.write_text('<!doctype html><title>404</title>'),
        'it is a web page (HTML), which is not read',
    ),
    'xhtml.jpg': (
        lambda p: p.write_text('<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "">'),
        'it is a web page (HTML), which is not read',
    ),
    'drawing.png': (
        lambda p: p.write_text('<?xml version="1.0"?>\n<!DOCTYPE svg>'),
        'it is SVG, which is not read',
    ),
    'resource.jpg': (lambda p: p.write_bytes(b'\0\5\x16\7' + b'\0' * 50), NO_FORMAT),
    'text.png': (lambda p: p.write_text('hello'), NO_FORMAT + "b'hello'"),
    'giant.jpg': (lambda p: p.write_text('GIant'), NO_FORMAT + "b'GIant'"),  # as a GIF: GIF8
    'folder.jpg': (lambda p: p.mkdir(), 'Is a directory'),
    'dangling.jpg': (lambda p: p.symlink_to('nowhere'), 'No such file'),
}


def test_what_the_graph_decodes_is_used(job):
    job.photographs(cat=4, dog=4)
    images = GOOD | {name: ('JPEG', IMAGE) for name in GOOD_NAMES}
    for name, (image_format, image) in images.items():
        save(job.data / 'cat' / name, image_format, image)
    assert 'is left out' not in job.cache()
    job.check_bottlenecks(*(f'cat/{name}' for name in images))
    assert 'Creating' not in job.cache()


@pytest.mark.posix
def test_what_it_cannot_decode_is_named_and_left_out(job):
    job.photographs(cat=4, dog=4)
    for name, (write, _) in BAD.items():
        path = job.data / 'cat' / name
        write(path)
        if path.is_file():
            with pytest.raises(tf.errors.OpError):
                run_v1(build_model(), path.read_bytes(), 'pool_3/_reshape:0')
    out = job.cache()
    assert len(created(out)) == 8
    lines = [line for line in out.splitlines() if 'left out' in line]
    assert lines.pop() == (
        f'WARNING: {len(BAD)} of {8 + len(BAD)} images are left out. Replace or delete them.'
    )
    for line, (name, (_, reason)) in zip(lines, sorted(BAD.items()), strict=True):
        assert line.startswith(f"WARNING: 'data/cat/{name}' is left out: ")
        assert reason in line

    # They are named again in each run, as they still need to be replaced.
    again = job.cache().splitlines()
    assert [line for line in again if 'is left out' in line] == lines
    save(job.data / 'cat/text.png', 'PNG')
    out = job.cache()
    assert created(out) == ['cat/text.png']
    assert f'WARNING: {len(BAD) - 1} of' in out


def test_files_that_are_larger_than_any_image_are_not_read(job):
    """Such as a video, or a slide of a microscope: it would be in memory several times."""
    job.photographs(cat=4, dog=4)
    with open(job.data / 'cat/film.jpg', 'wb') as file:
        file.truncate(2**30 + 1)  # takes no space
    reason = 'it has more than 1,073,741,824 bytes'
    assert f"WARNING: 'data/cat/film.jpg' is left out: {reason}" in job.cache()
    with pytest.raises(tf_test.UserError, match=reason):
        tf_test.load_file(str(job.data / 'cat/film.jpg'), 'image')


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(job, monkeypatch):
    job.photographs(cat=4, dog=4)
    monkeypatch.setattr(tf_retrain, 'MAX_PIXELS', 120_000)
    save(job.data / 'cat/large.jpg', 'JPEG', Image.new('RGB', (400, 300)))
    formats = 'GIF', 'JPEG', 'PNG'
    for name in formats:
        save(job.data / f'cat/{name}.jpg', name, Image.new('L', (400, 301)))
    out = job.cache()
    for name in formats:
        reason = 'it has 120,400 pixels, more than 120,000'
        assert f"WARNING: 'data/cat/{name}.jpg' is left out: {reason}" in out
    assert 'cat/large.jpg' in created(out)
    assert len(created(out)) == 9


def test_the_limit_on_pixels_holds_for_the_tiles_of_a_tiff(monkeypatch):
    """They may be larger than the image."""
    tile = zlib.compress(bytes(400 * 304))
    # The compression 8 is deflate. The tile lies behind the header and the tags.
    tags = {'ImageWidth': 64, 'ImageLength': 64, 'BitsPerSample': 8, 'Compression': 8}
    tags |= {'PhotometricInterpretation': 1, 'TileWidth': 400, 'TileLength': 304}
    tags |= {'TileOffsets': 8 + 2 + 9 * 12 + 4, 'TileByteCounts': len(tile)}
    entries = [struct.pack('<HHII', ExifTags.Base[name], 4, 1, tags[name]) for name in tags]
    contents = struct.pack('<2sHIH', b'II', 42, 8, 9) + b''.join(entries) + bytes(4) + tile
    assert tf_retrain.decode(contents, is_upright=False).shape == (64, 64, 3)
    monkeypatch.setattr(tf_retrain, 'MAX_PIXELS', 120_000)
    with pytest.raises(tf_retrain.ImageError, match='^it has 121,600 pixels, more than 120,000$'):
        tf_retrain.decode(contents, is_upright=False)


def test_photographs_that_lie_on_their_side_are_counted(job):
    job.photographs(cat=4, dog=4)
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(job.data / f'cat/phone {orientation}.jpg', exif=exif)
    (line,) = [line for line in job.cache().splitlines() if '--upright' in line]
    warning = 'images that the camera stored sideways, and that are used as stored: 3. '
    assert line.startswith(f'WARNING: {warning}')
    job.check_bottlenecks('cat/phone 6.jpg')  # no pixel was changed


def test_the_orientation_of_a_png_with_long_texts(job):
    """ImageMagick stores Photoshop's resources as a compressed text. Pillow has a limit for it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = io.BytesIO()
    Image.new('RGB', (40, 30)).save(contents, 'PNG', exif=exif)
    text = b'Raw profile type 8bim\0\0' + zlib.compress(bytes(3_000_000))
    job.photographs(cat=4, dog=4)
    image = job.data / 'cat/photoshop.png'
    image.write_bytes(add_chunk(contents.getvalue(), b'zTXt', text))
    assert 'that the camera stored sideways, and that are used as stored: 1.' in job.cache()
    assert tf_test.load_image(str(image), False)[1] == 6


def test_an_orientation_that_cannot_be_read(job):
    contents = io.BytesIO()
    Image.new('RGB', (40, 30)).save(contents, 'PNG')
    job.photographs(cat=4, dog=4)
    image = job.data / 'cat/damaged.png'
    image.write_bytes(add_chunk(contents.getvalue(), b'eXIf', b'XX*garbage'))
    for _ in range(2):
        out = job.cache()
        assert 'WARNING: images whose orientation cannot be read, and that are used as st' in out
        assert 'as stored: 1. If they lie on their side, open them, and save them again.' in out


def test_the_header_of_a_png_is_read_without_its_pixels(monkeypatch):
    """They may be too many."""
    contents = io.BytesIO()
    Image.new('RGB', (40, 30)).save(contents, 'PNG')
    contents.seek(0)
    load = mock.Mock()
    monkeypatch.setattr(PngImagePlugin.PngImageFile, 'load', load)
    assert tf_retrain.read_header(contents) == (None, 8)
    load.assert_not_called()


def test_an_image_that_is_read_for_its_orientation_is_compared(job, monkeypatch):
    """Its size and time say nothing of a change, but its contents do."""
    job.photographs(cat=4, dog=4)
    monkeypatch.setattr(tf_retrain, 'read_header', lambda file: tf_retrain.Header())
    for color in ('red', 'blue'):
        image = job.data / 'cat/damaged.bmp'
        Image.new('RGB', (40, 30), color).save(image)
        os.utime(image, (1e9, 1e9))
        assert 'cat/damaged.bmp' in created(job.cache())


def test_an_orientation_that_is_read_too_late_for_upright(job, monkeypatch):
    """The bottleneck is that of the image as it is stored, and the warning stays."""
    exif = Image.Exif()
    exif[0x0112] = 6
    save(job.photographs(cat=4, dog=4).data / 'cat/phone.jpg', exif=exif)
    monkeypatch.setattr(tf_retrain, 'read_header', lambda file: tf_retrain.Header())
    job.cache('--upright')
    monkeypatch.undo()
    warning = 'images whose orientation cannot be read, and that are used as stored: '
    assert f'{warning}9.' in job.cache('--upright')
    (job.folder / 'bottlenecks/cat/phone.jpg_upright.txt').unlink()
    out = job.cache('--upright')
    assert created(out) == ['cat/phone.jpg_upright']
    assert f'{warning}8.' in out


@pytest.mark.posix
def test_photographs_that_are_left_out_are_not_counted(job):
    """They are links to a drive that is gone; with a record, and without."""
    job.photographs(cat=4, dog=4)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(job.folder / 'phone.jpg', exif=exif)
    (job.data / 'cat/phone.jpg').symlink_to(job.folder / 'phone.jpg')
    assert '--upright' in job.cache()
    (job.folder / 'phone.jpg').rename(job.folder / 'gone.jpg')
    for _ in range(3):
        out = job.cache()
        assert "'data/cat/phone.jpg' is left out: " in out
        assert '--upright' not in out
        shutil.rmtree(job.folder / 'bottlenecks/.records', ignore_errors=True)


@pytest.fixture
def open_job(model, monkeypatch, capsys):
    """A job in a folder that every user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(pathlib.Path(folder), model, monkeypatch, capsys).photographs(cat=4, dog=4)
        for path in (job.folder, *job.folder.rglob('*')):
            path.chmod(0o777)
        yield job


def cache_as_nobody(job):
    """Caches as a user who may not read everything, which root may."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        return job.cache()
    finally:
        os.seteuid(user)


@pytest.mark.posix
def test_an_image_without_read_permission_is_tried_again(open_job):
    path = open_job.data / 'cat/cat 0.jpg'
    path.chmod(0)
    for _ in range(2):
        out = cache_as_nobody(open_job)
        assert re.search(r"'data/cat/cat 0\.jpg' is left out: .*[Pp]ermission denied", out)
    path.chmod(0o644)
    out = cache_as_nobody(open_job)
    assert 'is left out' not in out
    assert created(out) == ['cat/cat 0.jpg']


def test_an_image_that_vanishes_before_it_is_read(job, monkeypatch):
    path = job.photographs(cat=4, dog=4).data / 'cat/cat 0.jpg'
    contents = path.read_bytes()

    def list_and_delete(flags, list_images=tf_retrain.list_images):
        images = list_images(flags)
        path.unlink()
        return images

    monkeypatch.setattr(tf_retrain, 'list_images', list_and_delete)
    assert re.search(r"WARNING: 'data/cat/cat 0.jpg' is left out: .*No such file", job.cache())
    monkeypatch.undo()
    path.write_bytes(contents)
    assert created(job.cache()) == ['cat/cat 0.jpg']


def test_a_drive_that_is_removed_while_bottlenecks_are_computed(job, monkeypatch):
    """The outputs of an earlier training stay, and so does what was computed."""
    job.photographs(cat=25, dog=25).main()
    before = job.graph()
    write_photographs(job.data, 'dog', 225, COLOURS[1])
    monkeypatch.setattr(tf_retrain, 'NETWORK_BATCH_SIZE', 5)
    write_batch = tf_retrain.BottleneckCache.write_batch

    def remove_drive(cache, rows, *arrays):
        write_batch(cache, rows, *arrays)
        monkeypatch.setattr(tf_retrain.BottleneckCache, 'write_batch', write_batch)
        job.data.rename(job.folder / 'gone')

    monkeypatch.setattr(tf_retrain.BottleneckCache, 'write_batch', remove_drive)
    job.fails(
        "^--image_dir: 'data/dog' is gone, or its images are. Restore them. What was computed"
    )
    assert job.graph() == before
    kept = len(list((job.folder / 'bottlenecks').rglob('*.txt')))
    assert kept >= 50 + 5
    (job.folder / 'gone').rename(job.data)
    assert job.main().count('Creating bottleneck') == 250 - kept


@pytest.mark.posix
def test_names_that_are_not_unicode(job):
    job.photographs(cat=4, dog=4)
    try:
        open(os.fsencode(job.data / 'cat') + b'/\xe9t\xe9.jpg', 'w').close()
    except OSError:
        pytest.skip('this file system has names of Unicode only')
    name = r"b'\xe9t\xe9.jpg'"
    message = f"'data/cat' has a file whose name is not UTF-8, {name}. Rename it."
    job.fails(f'^{re.escape(message)}$')


def test_strict_makes_the_first_unreadable_image_an_error(job):
    job.photographs(cat=4, dog=4)
    (job.data / 'dog/bad.jpg').write_text('<html>')
    job.fails(
        r"^--strict: 'data/dog/bad\.jpg' is left out: it is a web page \(HTML\), which is not read",
        '--strict',
    )
    assert len(list((job.folder / 'bottlenecks').rglob('*.txt'))) == 8


def test_a_class_without_readable_images(job):
    job.photographs(cat=4, dog=4)
    (job.data / 'fox').mkdir()
    (job.data / 'fox/1.jpg').write_bytes(b'not an image')
    message = "No image in the class folder 'fox' can be read. Add some, or remove the folder."
    job.fails(f'^{re.escape(message)}$')
    # What was computed is kept.
    assert len(list((job.folder / 'bottlenecks').rglob('*.txt'))) == 8


def add_chunk(png, kind, data, place=33):
    """Adds a chunk to a PNG, by default after its header, which is in bytes 8 to 32."""
    chunk = struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return png[:place] + chunk + png[place:]


@pytest.mark.parametrize(
    ('kind', 'data'),
    [
        (b'eXIf', b'XX*garbage'),
        (b'zTXt', b'x\0\0' + zlib.compress(bytes(3_000_000))),
        (b'iCCP', b'x\0\0' + b'no profile'),
    ],
)
def test_the_limit_on_pixels_holds_whatever_else_is_in_the_header(job, monkeypatch, kind, data):
    """What Pillow cannot read in a PNG does not hide its size."""
    job.photographs(cat=4, dog=4)
    monkeypatch.setattr(tf_retrain, 'MAX_PIXELS', 120_000)
    contents = io.BytesIO()
    Image.new('L', (400, 301)).save(contents, 'PNG')
    (job.data / 'cat/bomb.png').write_bytes(add_chunk(contents.getvalue(), kind, data))
    reason = 'it has 120,400 pixels, more than 120,000'
    assert f"'data/cat/bomb.png' is left out: {reason}" in job.cache()


def test_the_limit_on_pixels_holds_whatever_comes_before_the_header(job, monkeypatch):
    """The contents of another chunk are not the sides of a PNG."""
    job.photographs(cat=4, dog=4)
    monkeypatch.setattr(tf_retrain, 'MAX_PIXELS', 120_000)
    contents = io.BytesIO()
    Image.new('L', (400, 301)).save(contents, 'PNG')
    bomb = add_chunk(contents.getvalue(), b'prVt', struct.pack('>II', 10, 10), place=8)
    (job.data / 'cat/bomb.png').write_bytes(bomb)
    reason = r'it is PNG, and damaged \(.*The image is not JPEG, PNG or GIF'
    assert re.search(f"'data/cat/bomb.png' is left out: {reason}", job.cache())


def test_strict_stops_at_the_first_image_that_cannot_be_read(job, monkeypatch):
    monkeypatch.setattr(tf_retrain, 'NETWORK_BATCH_SIZE', 4)
    job.photographs(cat=20, dog=20)
    (job.data / 'cat/cat 10.jpg').write_text('not an image')
    out = job.fails(
        r"^--strict: 'data/cat/cat 10.jpg' is left out: its format is not known", '--strict'
    )
    assert 0 < len(created(out)) <= 8
    # What is known from the record stops the run before anything is computed.
    assert created(job.fails('^--strict: ', '--strict')) == []


@pytest.mark.posix
def test_names_that_would_break_a_line_are_escaped(job):
    job.photographs(cat=20, dog=20)
    (job.data / 'cat/cat 1.jpg').rename(job.data / 'cat/new\nline\ttab.jpg')
    shutil.copy(job.data / 'dog/dog 1.jpg', job.data / 'cat/copy\rof.jpg')
    (job.data / 'dog/note\nbook.txt').touch()
    flags = '--find_suspects=41', '--print_misclassified_test_images'
    out = job.main(*flags, how_many_training_steps='2', testing_percentage='60')
    assert 'passed over: note\\nbook.txt' in out
    assert '\nCreating bottleneck at bottlenecks/cat/new\\nline\\ttab.jpg.txt\n' in out
    assert '\r' not in out
    assert '\t' not in out
    # As a bottleneck, a near copy, a suspect and a misclassified image.
    assert out.count('copy\\rof.jpg') >= 4


def test_a_class_called_unsure_is_a_warning(job):
    out = job.photographs(cat=4, unsure=4).cache()
    assert "WARNING: 'unsure' is what tf_test.py --min_score says" in out
    assert 'Rename data/unsure,' in out
