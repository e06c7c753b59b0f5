"""Which files are images, of which class and set; what happens to those that cannot be used."""

import hashlib
import os
import pathlib
import re
import tempfile

import numpy as np
import pytest
from helpers import Job, build_model, created, parse, run_v1
from PIL import Image

import tf_retrain
from tf_retrain import UserError, tf


@pytest.mark.parametrize(
    ('folder', 'label'),
    [
        ('cat', 'cat'),
        ('Red_Fox', 'red fox'),
        ('a-b', 'a b'),
        ('Crêpe  2', 'cr pe 2'),
        ('a\nb', 'a b'),
        ('_x_', ' x '),
        ('猫', '猫'),
        ('犬\n小', '犬 小'),
        ('---', '---'),
        (' ', ''),
    ],
)
def test_labels(folder, label):
    assert tf_retrain.get_label(folder) == label


# `printf PATH | sha1sum`, its last 27 bits as a percentage of 2**27 - 1: 4.138, 5.085, 15.728, 50.347
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


def original_set(path, testing_percentage, validation_percentage):
    """The formula of the reference, written out again in other words."""
    share = (
        int.from_bytes(hashlib.sha1(path.split('_nohash_')[0].encode()).digest(), 'big')
        % 2**27
        / (2**27 - 1)
    )
    if share * 100 < validation_percentage:
        return 'validation'
    return 'testing' if share * 100 < validation_percentage + testing_percentage else 'training'


def test_split_follows_the_formula_and_ignores_nohash():
    paths = [f'data/{folder}/{i}.jpg' for folder in ('cat', 'Ünï') for i in range(2000)]
    found = [tf_retrain.get_set(path, 15, 25) for path in paths]
    assert found == [original_set(path, 15, 25) for path in paths]
    assert abs(found.count('testing') / len(found) - 0.15) < 0.03
    assert abs(found.count('validation') / len(found) - 0.25) < 0.03
    for i in range(100):
        assert (
            len({tf_retrain.get_set(f'd/{i}_nohash_{suffix}.jpg', 30, 30) for suffix in 'abcdef'})
            == 1
        )


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def list_images(image_dir, testing=10, validation=10):
    percentages = f'--testing_percentage={testing}', f'--validation_percentage={validation}'
    return tf_retrain.list_images(parse(f'--image_dir={image_dir}', *percentages))


def test_the_table_is_sorted_and_complete(tmp_path, monkeypatch, capsys):
    touch(
        tmp_path, *(f'd/{folder}/{i}.jpg' for folder in ('zebra', 'Ant', 'bee') for i in range(40))
    )
    touch(
        tmp_path,
        'd/bee/x.JPG',
        'd/bee/y.Jpeg',
        'd/bee/z.png',
        'd/bee/._0.jpg',
        'd/bee/a.webp',
        'd/bee/b.webp',
    )
    touch(
        tmp_path,
        'd/bee/sub/deep.jpg',
        'd/.hidden/1.jpg',
        'd/empty/notes.txt',
        'd/loose.jpg',
        'd/bee/README',
    )
    monkeypatch.chdir(tmp_path)
    images = list_images('d/')
    assert images.labels == ['ant', 'bee', 'zebra']
    assert list(images.files) == sorted(images.files)
    assert list(np.bincount(images.classes)) == [40, 43, 40]
    for file, index, name, path in zip(
        images.files, images.classes, images.sets, images.paths, strict=True
    ):
        assert path == f'd/{file}'
        assert file.split('/')[0].lower() == images.labels[index]
        assert name == original_set(path, 10, 10)
    out = capsys.readouterr().out
    assert 'd/bee: 43 images; passed over: ._0.jpg, README, a.webp, b.webp, sub\n' in out
    assert 'WARNING: d/ has 1 images outside of class folders. They are not used.\n' in out
    assert 'WARNING: d/empty has no images. It is not used as a class.\n' in out


@pytest.mark.parametrize('typed', ['d', 'd/', 'd//', './d', '../{name}/d/'])
def test_the_path_is_hashed_as_typed(tmp_path, monkeypatch, typed):
    touch(tmp_path, *(f'd/{folder}/{i}.jpg' for folder in ('a', 'b') for i in range(50)))
    monkeypatch.chdir(tmp_path)
    typed = typed.format(name=tmp_path.name)
    images = list_images(typed, 30, 30)
    prefix = typed if typed.endswith('/') else typed + '/'
    assert list(images.sets) == [original_set(f'{prefix}{file}', 30, 30) for file in images.files]


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ([], "--image_dir: 'd' has no class folder with images"),
        (
            ['d/1.jpg', 'd/2.jpg'],
            "--image_dir: 'd' has no class folder with images. Two or more are needed: put ",
        ),
        (['d/cat/1.jpg'], "--image_dir: 'd' has 1 class folder with images"),
        (['d/Cat/1.jpg', 'd/cat/1.jpg'], "d/Cat and d/cat have the same label 'cat'"),
        (['d/a-b/1.jpg', 'd/a b/1.jpg'], "d/a b and d/a-b have the same label 'a b'"),
        (['d/ /1.jpg', 'd/cat/1.jpg'], 'blank'),
    ],
)
def test_folders_that_make_no_classes(tmp_path, monkeypatch, files, message):
    (tmp_path / 'd').mkdir()
    touch(tmp_path, *files)
    monkeypatch.chdir(tmp_path)
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
    files, classes, names = map(np.array, zip(*rows, strict=True))
    return tf_retrain.Images('data', list(sets), files, classes, names)


TABLE = make_table(
    a={'training': 3, 'validation': 1},
    b={'testing': 2, 'training': 1},
    c={'testing': 1, 'validation': 0},
)


def test_draws_are_uniform_over_classes_then_images():
    rows = TABLE.draw('training', 6000, np.random.default_rng(0))
    assert set(TABLE.sets[rows]) == {'training'}
    np.testing.assert_allclose(
        np.bincount(TABLE.classes[rows]) / 6000, [0.5, 0.5], atol=0.03
    )  # c has none
    of_a = np.bincount(rows[TABLE.classes[rows] == 0])
    np.testing.assert_allclose(of_a / of_a.sum(), 1 / 3, atol=0.03)


def test_minus_one_draws_every_image_of_the_set_once():
    rows = TABLE.draw('testing', -1, np.random.default_rng(0))
    assert list(TABLE.files[rows]) == ['b/testing0', 'b/testing1', 'c/testing0']


def test_images_that_are_left_out_are_missing_from_all_of_a_new_table():
    kept = TABLE.keep(TABLE.sets != 'testing')
    assert list(kept.files) == [
        'a/training0',
        'a/training1',
        'a/training2',
        'a/validation0',
        'b/training0',
    ]
    assert list(kept.classes) == [0, 0, 0, 0, 1]
    assert kept.paths[-1] == 'data/b/training0'
    assert kept.labels == ['a', 'b', 'c']
    assert len(TABLE.files) == 8
    assert list(kept.draw('testing', 5, np.random.default_rng(0))) == []


def test_empty_sets_are_named_in_one_line_per_set(capsys):
    tf_retrain.check_sets(TABLE, parse('--image_dir=data', '--validation_percentage=0'))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2  # none for validation, as 0 % was asked for
    assert 'no testing image in 1 of 3 classes' in lines[0]
    assert ': a. ' in lines[0]
    assert 'no training image in 1 of 3 classes' in lines[1]
    assert ': c. ' in lines[1]
    with pytest.raises(UserError, match='no image fell into the training set'):
        tf_retrain.check_sets(
            make_table(a={'testing': 1}, b={'testing': 1}), parse('--image_dir=data')
        )


def test_tiny_classes_never_crash(job, capsys):
    """Three images per class leave sets empty, which the original met with a ZeroDivisionError."""
    job.photographs(cat=3, dog=3, fox=3).main()
    out = capsys.readouterr().out
    assert out.count('WARNING: Folder has less than 20 images, which may cause issues.') == 3
    assert 'WARNING: no testing image in' in out
    assert 'WARNING: no validation image in' in out
    assert (job.folder / 'trained_model/labels.txt').exists()


# What is in the files

PIXELS = np.random.default_rng(0).integers(0, 256, [30, 40, 3], np.uint8)


def save(path, image_format, image=None, **options):
    (image or Image.fromarray(PIXELS)).save(path, image_format, **options)


def read_by_the_graph(path):
    """Returns the reason why the graph's own decoder refuses an image, or None."""
    try:
        run_v1(build_model(), path.read_bytes(), 'pool_3/_reshape:0')
    except tf.errors.OpError as error:
        return error.message


GOOD = {
    'png named.jpg': lambda p: save(p, 'PNG'),
    'gif named.jpg': lambda p: save(p, 'GIF'),
    'a.png': lambda p: save(p, 'PNG'),
    'b.gif': lambda p: save(p, 'GIF'),
    'cmyk.jpg': lambda p: save(p, 'JPEG', Image.fromarray(PIXELS).convert('CMYK')),
    'grey.jpg': lambda p: save(p, 'JPEG', Image.fromarray(PIXELS).convert('L')),
    '16 bit.png': lambda p: save(p, 'PNG', Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)),
    'palette.png': lambda p: save(p, 'PNG', Image.fromarray(PIXELS).convert('P')),
    'transparent.png': lambda p: save(p, 'PNG', Image.fromarray(PIXELS).convert('RGBA')),
    'one.jpg': lambda p: save(p, 'JPEG', Image.new('RGB', (1, 1))),
    'quote\'s "and", comma.jpg': lambda p: save(p, 'JPEG'),
    '100 %s %d {x} $HOME `x`.jpg': lambda p: save(p, 'JPEG'),
    'new\nline.jpg': lambda p: save(p, 'JPEG'),
    'caf\u00e9.jpg': lambda p: save(p, 'JPEG'),
    'cafe\u0301.jpg': lambda p: save(p, 'JPEG'),
    '猫.JPEG': lambda p: save(p, 'JPEG'),
    '-flag.jpg': lambda p: save(p, 'JPEG'),
    'glob[1]*?.jpg': lambda p: save(p, 'JPEG'),
    'x' * 246 + '.jpg': lambda p: save(p, 'JPEG'),
}
BAD = {
    'empty.jpg': (lambda p: p.touch(), 'Input is empty'),
    'truncated.jpg': (
        lambda p: (save(p, 'JPEG'), p.write_bytes(p.read_bytes()[:600])),
        'Invalid JPEG data',
    ),
    'bmp.jpg': (lambda p: save(p, 'BMP'), "it is not JPEG, PNG or still GIF: it starts with b'BM"),
    'webp.jpg': (
        lambda p: save(p, 'WEBP'),
        "it is not JPEG, PNG or still GIF: it starts with b'RIFF",
    ),
    'tiff.jpg': (
        lambda p: save(p, 'TIFF'),
        "it is not JPEG, PNG or still GIF: it starts with b'II*",
    ),
    'heic.jpg': (lambda p: p.write_bytes(b'\0\0\0\x24ftypheic' + b'\0' * 50), 'ftypheic'),
    'html.jpg': (lambda p: p.write_text('<!doctype html><title>404</title>'), "b'<!doctype"),
    'resource.jpg': (
        lambda p: p.write_bytes(b'\0\5\x16\7' + b'\0' * 50),
        'it is not JPEG, PNG or still GIF',
    ),
    'text.png': (lambda p: p.write_text('hello'), "it starts with b'hello'"),
    'moving.gif': (
        lambda p: save(p, 'GIF', save_all=True, append_images=[Image.new('RGB', (40, 30))]),
        'animated gif',
    ),
    'folder.jpg': (lambda p: p.mkdir(), 'Is a directory'),
    'dangling.jpg': (lambda p: p.symlink_to('nowhere'), 'No such file'),
}


def test_what_the_graph_decodes_is_used(job):
    job.photographs(cat=20, dog=20)
    for name, write in GOOD.items():
        write(job.data / 'cat' / name)
        assert read_by_the_graph(job.data / 'cat' / name) is None
    out = job.cache()
    assert 'is left out' not in out
    for name in GOOD:
        numbers = np.array(
            (job.folder / 'bottlenecks/cat' / f'{name}.txt').read_text().split(','), float
        )
        expected = run_v1(
            build_model(), (job.data / 'cat' / name).read_bytes(), 'pool_3/_reshape:0'
        )[0]
        np.testing.assert_allclose(numbers, expected, atol=1e-5 * np.abs(expected).max())
    assert 'Creating' not in job.cache()


def test_what_it_cannot_decode_is_named_and_left_out(job):
    job.photographs(cat=20, dog=20)
    for name, (write, _) in BAD.items():
        write(job.data / 'cat' / name)
        assert not (job.data / 'cat' / name).is_file() or read_by_the_graph(job.data / 'cat' / name)
    out = job.cache()
    for name, (_, reason) in BAD.items():
        (line,) = [line for line in out.splitlines() if name in line]
        assert line.startswith(f"WARNING: 'data/cat/{name}' is left out: ")
        assert reason in line
    assert (
        f'WARNING: {len(BAD)} of {40 + len(BAD)} images are left out. Replace or delete them.'
        in out
    )
    assert len(created(out)) == 40

    # They are named again in each run, as they still need to be replaced.
    again = job.cache()
    assert [line for line in again.splitlines() if 'left out' in line] == [
        line for line in out.splitlines() if 'left out' in line
    ]
    save(job.data / 'cat/text.png', 'PNG')
    out = job.cache()
    assert created(out) == ['cat/text.png']
    assert f'WARNING: {len(BAD) - 1} of' in out


@pytest.mark.parametrize('image_format', ['PNG', 'GIF', 'JPEG'])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    job, monkeypatch, image_format
):
    job.photographs(cat=20, dog=20)
    save(job.data / 'cat/large.jpg', 'JPEG', Image.new('RGB', (4_000, 3_000), (200, 60, 60)))
    save(job.data / 'cat/huge.jpg', image_format, Image.new('L', (4_000, 3_001)))
    monkeypatch.setattr(tf_retrain, 'MAX_PIXELS', 12_000_000)
    out = job.cache()
    assert (
        "WARNING: 'data/cat/huge.jpg' is left out: it has 12,004,000 pixels, more than 12,000,000"
        in out
    )
    assert 'cat/large.jpg' in created(out)
    assert len(created(out)) == 41


def test_photographs_that_lie_on_their_side_are_counted(job):
    job.photographs(cat=20, dog=20)
    for i, orientation in enumerate((1, 3, 6, 8)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(job.data / f'cat/phone {i}.jpg', 'JPEG', exif=exif)
    out = job.cache()
    (line,) = [line for line in out.splitlines() if 'data/README.md' in line]
    assert line.startswith(
        'WARNING: images that the camera stored sideways, and that are used as stored: 3. '
    )
    expected = run_v1(
        build_model(), (job.data / 'cat/phone 2.jpg').read_bytes(), 'pool_3/_reshape:0'
    )[0]
    numbers = np.array(
        (job.folder / 'bottlenecks/cat/phone 2.jpg.txt').read_text().split(','), float
    )
    np.testing.assert_allclose(
        numbers, expected, atol=1e-5 * np.abs(expected).max()
    )  # no pixel was changed


@pytest.fixture
def open_job(model):
    """A job in a folder that every user may enter, as the tests may run as root, who may read everything."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(pathlib.Path(folder), model).photographs(cat=20, dog=20)
        for path in (job.folder, *job.folder.rglob('*')):
            path.chmod(0o777)
        yield job


def cache_as_nobody(job, monkeypatch, capsys):
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        return job.cache()
    finally:
        monkeypatch.undo()
        os.seteuid(user)


def test_an_image_without_read_permission_is_tried_again(open_job, monkeypatch, capsys):
    path = open_job.data / 'cat/cat 0.jpg'
    path.chmod(0)
    for _ in range(2):
        out = cache_as_nobody(open_job, monkeypatch, capsys)
        assert re.search(r"'data/cat/cat 0\.jpg' is left out: .*[Pp]ermission denied", out)
    path.chmod(0o644)
    out = cache_as_nobody(open_job, monkeypatch, capsys)
    assert 'is left out' not in out
    assert created(out) == ['cat/cat 0.jpg']


def test_an_image_that_vanishes_before_it_is_read(job, monkeypatch, capsys):
    job.photographs(cat=20, dog=20)
    contents = (job.data / 'cat/cat 0.jpg').read_bytes()

    def list_and_delete(flags, original=tf_retrain.list_images):
        images = original(flags)
        (job.data / 'cat/cat 0.jpg').unlink(missing_ok=True)
        return images

    with monkeypatch.context() as patch:
        patch.setattr(tf_retrain, 'list_images', list_and_delete)
        out = job.cache(patch, capsys)
    assert re.search(r"WARNING: 'data/cat/cat 0.jpg' is left out: .*No such file", out)
    (job.data / 'cat/cat 0.jpg').write_bytes(contents)
    assert created(job.cache()) == ['cat/cat 0.jpg']


def test_names_that_are_not_unicode(job):
    job.photographs(cat=20, dog=20)
    with open(os.fsencode(job.data / 'cat') + b'/\xe9t\xe9.jpg', 'w'):
        pass
    process = job.run(check=False)
    assert process.returncode == 1
    assert (
        process.stderr
        == "ERROR: 'data/cat' has a file whose name is not UTF-8, b'\\xe9t\\xe9.jpg'. Rename it.\n"
    )


def test_strict_makes_the_first_unreadable_image_an_error(job):
    job.photographs(cat=20, dog=20)
    (job.data / 'dog/bad.jpg').write_text('<html>')
    with pytest.raises(
        UserError, match=r"^--strict: 'data/dog/bad\.jpg' is left out: it is not JPEG"
    ):
        job.main('--strict')
    assert len(list((job.folder / 'bottlenecks').rglob('*.txt'))) == 40


def test_a_class_without_readable_images(job):
    job.photographs(cat=20, dog=20)
    (job.data / 'fox').mkdir()
    (job.data / 'fox/1.jpg').write_bytes(b'not an image')
    process = job.run(check=False)
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert (
        last
        == "ERROR: No image in the class folder 'fox' can be read. Add some, or remove the folder."
    )
    assert len(list((job.folder / 'bottlenecks').rglob('*.txt'))) == 40  # what was computed is kept
