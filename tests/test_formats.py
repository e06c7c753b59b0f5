"""Photographs of every format, and which way is up: the pixels that reach the network."""

import argparse
import copy
import io
import json
import random
import shutil
import struct
import sys
from unittest import mock

import numpy as np
import pillow_heif
import pytest
from helpers import (
    GRAPH,
    LABELS,
    classify_images,
    created,
    label_images,
    parse,
    read_cache,
    read_events,
    run,
    write_photographs,
)
from PIL import Image, ImageOps

import tf_retrain
import tf_test
from tf_retrain import tf

ResourceExhaustedError = tf.errors.ResourceExhaustedError

pillow_heif.register_heif_opener()  # writes HEIC; the scripts read it by pi_heif
RNG = np.random.default_rng(7)
BLOCKS = Image.fromarray(RNG.integers(0, 255, [6, 8, 3], np.uint8))
PHOTOGRAPH = BLOCKS.resize((80, 60), Image.Resampling.BICUBIC)
DEEP = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
FRAMES = {'save_all': True, 'append_images': [PHOTOGRAPH.rotate(180)]}


def encode(image, image_format, **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def to_pixels(contents):
    """What Pillow gives as RGB."""
    with Image.open(io.BytesIO(contents)) as image:
        return np.asarray(image.convert('RGB'))


CONTENTS = {  # without an extension: the names do not count
    'webp': encode(PHOTOGRAPH, 'WEBP'),
    'webp-lossless-alpha': encode(PHOTOGRAPH.convert('RGBA'), 'WEBP', lossless=True),
    'webp-animated': encode(PHOTOGRAPH, 'WEBP', **FRAMES),
    'avif': encode(PHOTOGRAPH, 'AVIF'),
    'heic': encode(PHOTOGRAPH, 'HEIF'),
    'bmp': encode(PHOTOGRAPH, 'BMP'),
    'bmp-palette': encode(PHOTOGRAPH.convert('P'), 'BMP'),
    'dib': encode(PHOTOGRAPH, 'DIB'),
    'tiff': encode(PHOTOGRAPH, 'TIFF'),
    'big-tiff': encode(PHOTOGRAPH, 'TIFF', big_tiff=True),
    'tiff-cmyk': encode(PHOTOGRAPH.convert('CMYK'), 'TIFF', compression='tiff_lzw'),
    'tiff-bilevel': encode(PHOTOGRAPH.convert('1'), 'TIFF'),
    'gif-animated': encode(PHOTOGRAPH, 'GIF', **FRAMES),
    'jpeg2000': encode(PHOTOGRAPH, 'JPEG2000'),
    'jpeg2000-gray-alpha': encode(PHOTOGRAPH.convert('LA'), 'JPEG2000'),
    'ppm': encode(PHOTOGRAPH, 'PPM'),
    'png-palette-alpha': encode(PHOTOGRAPH.convert('RGBA').quantize(64), 'PNG'),
}
PIXELS = {name: to_pixels(contents) for name, contents in CONTENTS.items()}
DEEP_CONTENTS = {
    'png-16': encode(Image.fromarray(DEEP), 'PNG'),
    'tiff-16': encode(Image.fromarray(DEEP), 'TIFF'),
    'jpeg2000-16': encode(Image.fromarray(DEEP), 'JPEG2000'),
    'tiff-16-white-is-zero': encode(Image.fromarray(65535 - DEEP), 'TIFF', tiffinfo={262: 0}),
    'pgm-16': encode(Image.fromarray(DEEP.astype(np.int32)), 'PPM'),
}
CONTENTS |= DEEP_CONTENTS
# As TensorFlow does of PNG: the upper byte.
PIXELS |= dict.fromkeys(DEEP_CONTENTS, np.repeat(np.uint8(DEEP >> 8)[..., np.newaxis], 3, axis=2))


def write_all(folder):
    """Writes each content as a .jpg, and its pixels as a .png; returns {name: both paths}."""
    paths = {}
    folder.mkdir(parents=True)
    for name, contents in CONTENTS.items():
        paths[name] = folder / f'{name}.jpg', folder / f'{name}.png'
        paths[name][0].write_bytes(contents)
        Image.fromarray(PIXELS[name]).save(paths[name][1])
    return paths


@pytest.fixture(scope='module')
def formats(networks, tmp_path_factory):
    """A finished run of one of the networks that has all formats in the class `formats`."""
    job = copy.copy(networks)  # other files of tests look at what the first run left
    job.folder = tmp_path_factory.mktemp('formats') / 'job'
    job.data = job.folder / 'data'
    shutil.copytree(networks.folder, job.folder)
    job.formats = write_all(job.data / 'formats')
    flags = ['--saved_model_dir=saved/2', '--how_many_training_steps=5', '--find_suspects=500']
    job.out = job.run(
        *job.network,
        *flags,
        script='retrain_serving.py',
        output_graph='formats/graph.pb',
        output_labels='formats/labels.txt',
        optimized_graph='formats/optimized.pb',
    ).stdout
    return job


def get_cache(job, path):
    kind = '_'.join(flag.split('=')[1] for flag in job.network)
    return job.cache_file(f'formats/{path.name}' + (f'_{kind}' if kind else ''))


def test_the_bottleneck_is_that_of_a_png_with_the_pixels(formats):
    assert 'is left out' not in formats.out
    for name, (path, png) in formats.formats.items():
        expected = read_cache(get_cache(formats, png))
        found = read_cache(get_cache(formats, path))
        atol = 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=atol, err_msg=name)
    warning = 'images with 16 bits per sample, of which the upper 8 are used'
    assert f'{warning}: {len(DEEP_CONTENTS)}. ' in formats.out


def test_labels_are_those_of_a_png_with_the_pixels(formats, tmp_path):
    """Of many images, of one, and in a heatmap."""
    files = 'formats/graph.pb', 'formats/labels.txt'
    pairs = list(formats.formats.values())
    scores, expected = (
        label_images(formats.folder, [pair[index] for pair in pairs], *files) for index in (0, 1)
    )
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    singles = [label_images(formats.folder, [pair[0]], *files)[0] for pair in pairs[::5]]
    np.testing.assert_allclose(singles, expected[::5], atol=1e-5)
    if formats.network:
        return  # heatmaps of other networks are the subject of test_labelling.py
    for path, png in pairs[::5]:
        drawn = []
        for source in (path, png):
            target = tmp_path / f'{source.name}.heat.png'
            run('tf_test.py', f'--heatmap={target}', source, *files, cwd=formats.folder)
            drawn.append(np.asarray(Image.open(target)))
        np.testing.assert_array_equal(*drawn)


def test_the_saved_model_takes_the_first_frame(formats):
    path, png = formats.formats['gif-animated']
    signatures = tf_retrain.tf.saved_model.load(str(formats.folder / 'saved/2')).signatures
    found, expected = classify_images(signatures, [path, png])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def change_frames(contents, *sizes):
    """Returns a GIF of PHOTOGRAPH whose frames have other widths and heights in their headers."""
    head, *frames = contents.split(b',' + struct.pack('<4H', 0, 0, 80, 60))
    assert len(frames) == len(sizes)
    for frame, size in zip(frames, sizes, strict=True):
        head += b',' + struct.pack('<4H', 0, 0, *size) + frame
    return head


GRAY = {'append_images': [PHOTOGRAPH.rotate(180).convert('L')]}
GIFS = {
    'still': encode(PHOTOGRAPH, 'GIF'),
    'animated': CONTENTS['gif-animated'],
    'transparent': encode(PHOTOGRAPH, 'GIF', **FRAMES, transparency=3, disposal=2),
    'gray': encode(PHOTOGRAPH.convert('L'), 'GIF', save_all=True, **GRAY),
    'with a comment': encode(PHOTOGRAPH, 'GIF', **FRAMES, comment=1000 * b',!;'),
    'in the second frame': CONTENTS['gif-animated'][:-500],
    'in the first frame': CONTENTS['gif-animated'][:1000],
    'in the colors': CONTENTS['gif-animated'][:400],
    'smaller second frame': change_frames(CONTENTS['gif-animated'], (80, 60), (8, 6)),
    'smaller first frame': change_frames(CONTENTS['gif-animated'], (8, 6), (80, 60)),
    'flat second frame': change_frames(CONTENTS['gif-animated'], (80, 60), (90, 1)),
}


@pytest.mark.parametrize('module', [tf_retrain, tf_test])
@pytest.mark.parametrize('name', GIFS)
def test_the_first_frame_is_that_of_tensorflow(module, name):
    """Which decodes all of them, or as many as there are before the file ends."""
    contents = GIFS[name]
    try:
        expected = tf.io.decode_image(contents, channels=3, expand_animations=False).numpy()
    except tf.errors.InvalidArgumentError:
        with pytest.raises(module.ImageError, match='it is GIF, and damaged'):
            module.decode(contents, is_upright=False)
        return
    np.testing.assert_array_equal(module.decode(contents, is_upright=False), expected)
    frames = list(module.read_frames(module.keep_first_frame(contents)))
    assert len(frames) == (2 if name in ('smaller first frame', 'flat second frame') else 1)


@pytest.mark.parametrize('module', [tf_retrain, tf_test])
def test_only_the_frames_that_are_decoded_count_for_the_limit_on_pixels(module, monkeypatch):
    monkeypatch.setattr(module, 'MAX_PIXELS', 5000)
    frames = [PHOTOGRAPH.rotate(angle) for angle in range(30)]
    long = encode(PHOTOGRAPH, 'GIF', save_all=True, append_images=frames)
    assert module.decode(long, is_upright=False).shape == (60, 80, 3)
    animated = CONTENTS['gif-animated']
    for sizes, pixels in [
        [((80, 60), (80, 63)), '5,040'],  # larger than the canvas
        [((80, 63), (80, 60)), '5,040'],
        [((5001, 1), (1, 60)), '300,060'],
        [((79, 60), (80, 60)), '9,540'],  # both are decoded
    ]:
        with pytest.raises(module.ImageError, match=f'^it has {pixels} pixels, more than 5,000$'):
            module.decode(change_frames(animated, *sizes), is_upright=False)


def test_a_worker_decodes_no_gif():
    """The frames are cut off in Python, of which the workers of a service have none."""
    for name in ('still', 'animated'):
        with pytest.raises(tf.errors.InvalidArgumentError, match='frames of a GIF'):
            tf_retrain.decode_by_worker(GIFS[name])
    png = CONTENTS['png-palette-alpha']
    pixels = tf_retrain.decode_by_worker(png).numpy()
    np.testing.assert_array_equal(pixels, PIXELS['png-palette-alpha'])


def test_thumbnails_of_all_formats(tmp_path):
    for path, png in write_all(tmp_path / 'formats').values():
        found, expected = (
            np.asarray(tf_retrain.load_thumbnail(str(file), False)) for file in (path, png)
        )
        np.testing.assert_array_equal(found, expected, path.name)


def test_distortions(job):
    """Each step runs all images through the network."""
    write_all(job.photographs(cat=4, dog=4).data / 'cat/..' / 'formats')
    out = job.main('--flip_left_right', how_many_training_steps=2)
    assert 'could no longer be read' not in out


def test_all_extensions(job):
    """In any case of their letters."""
    job.photographs(cat=4, dog=4)
    names = '.jpg .jpeg .jpe .jfif .png .gif .webp .avif .bmp .tif .tiff .jp2 .heic .heif'.split()
    for name in names:
        (job.data / f'cat/x{name.upper()}').write_bytes(CONTENTS['webp'])
    assert len(created(job.cache())) == 8 + len(names)
    found = list(tf_test.find_images(str(job.data), None))
    assert len(found) == 8 + len(names)


def test_without_pi_heif_a_line_names_the_command(job, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pi_heif', None)
    job.photographs(cat=4, dog=4)
    (job.data / 'cat/x.heic').write_bytes(CONTENTS['heic'])
    reason = 'it is HEIC. To read it, run: pip install pi-heif'
    assert f"'data/cat/x.heic' is left out: {reason}\n" in job.cache()


@pytest.mark.parametrize('error', [MemoryError(), ResourceExhaustedError(None, None, 'full')])
def test_a_lack_of_memory_says_nothing_of_an_image(tmp_path, monkeypatch, error):
    """It is not recorded."""
    path = tmp_path / 'x.webp'
    path.write_bytes(CONTENTS['webp'])
    monkeypatch.setattr(tf_retrain, 'decode_by_pillow', mock.Mock(side_effect=error))
    assert tf_retrain.explain_unreadable(str(path)) == ('the memory is full', None)


def replace_item(heic, change):
    """Returns a HEIC whose item of a text has another box; the boxes around it grow."""
    start = heic.rindex(b'infe', 0, heic.index(b'mime')) - 4
    size = int.from_bytes(heic[start : start + 4], 'big')
    box = change(heic[start + 8 : start + size])
    changed = bytearray(heic)
    changed[start : start + size] = box
    for name in (b'meta', b'iinf'):
        position = heic.index(name) - 4
        outer_size = int.from_bytes(heic[position : position + 4], 'big') + len(box) - size
        changed[position : position + 4] = outer_size.to_bytes(4, 'big')
    return bytes(changed)


# The sizes of boxes: of eight bytes, and one that takes more than two.
BOXES = [
    lambda contents: struct.pack('>I4sQ', 1, b'infe', 16 + len(contents)) + contents,
    lambda contents: (
        struct.pack('>I4s', 70_008 + len(contents), b'infe') + contents + 70_000 * b'x'
    ),
]


@pytest.mark.parametrize('create_box', BOXES)
def test_a_heic_with_damaged_types_in_odd_boxes(create_box):
    contents = io.BytesIO()
    Image.new('RGB', (64, 48), 'red').save(contents, 'HEIF', xmp=b'<x:xmpmeta/>')
    whole = replace_item(contents.getvalue(), create_box)
    with tf_retrain.open_by_pillow(io.BytesIO(whole)) as image:
        assert image.size == (64, 48)
    damaged = whole.replace(b'mime', b'm\xffme')
    with pytest.raises(tf_retrain.ImageError, match='^it is HEIC, and damaged$'):
        tf_retrain.decode(damaged, is_upright=False)


@pytest.mark.parametrize('size', [0, 14_975])
def test_a_heic_whose_items_overlap(size):
    """To look at each of them would take hours."""
    item = struct.pack('>I4s', size, b'infe') + b'\0aaaaaaa'
    with pytest.raises(tf_retrain.ImageError, match='^it is HEIC, and damaged$'):
        tf_retrain.check_heic(CONTENTS['heic'][:24] + item * 1000)


def test_a_heic_with_damaged_types_of_its_items(trained, tmp_path):
    """pi_heif would end the program by a signal."""
    contents = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new('RGB', (64, 48), 'red')
    image.save(contents, 'HEIF', exif=exif.tobytes(), xmp=b'<x:xmpmeta/>')
    whole = contents.getvalue()
    tf_retrain.check_heic(whole)
    mime = whole.index(b'mime')
    # Some have a second damage, in the version, the flags or the size of the box.
    cases = [(b'Exif', {}), (b'mime', {}), (b'rdf+xml', {})]
    cases += [(b'rdf+xml', {mime - 8: 0}), (b'mime', {mime - 6: 4}), (b'mime', {mime - 13: 0})]
    for index, (text, others) in enumerate(cases):
        damaged = bytearray(whole)
        damaged[whole.index(text)] ^= 128
        for position, value in others.items():
            damaged[position] = value
        (tmp_path / f'{index}.heic').write_bytes(damaged)
        with pytest.raises(tf_retrain.ImageError, match='^it is HEIC, and damaged$'):
            tf_retrain.decode(bytes(damaged), is_upright=False)
    for images in ([tmp_path], sorted(tmp_path.iterdir())[:1]):
        process = run('tf_test.py', *images, GRAPH, LABELS, cwd=trained.folder, check=False)
        assert process.returncode == 1
        assert "0.heic' cannot be labeled: it is HEIC, and damaged. Replace it" in process.stderr


def mutate(contents, generator):
    """Returns contents that are cut, or have some bytes changed."""
    contents = bytearray(contents)
    if generator.random() < 0.3:
        return bytes(contents[: generator.randrange(len(contents))])
    for _ in range(generator.randrange(1, 9)):
        contents[generator.randrange(min(len(contents), 400))] = generator.randrange(256)
    return bytes(contents)


def test_two_hundred_damaged_files(trained, tmp_path):
    """Each is labeled, or has a reason: the same in all ways to ask."""
    generator = random.Random(0)
    sources = list(CONTENTS.values())
    for index in range(200):
        (tmp_path / f'{index}.jpg').write_bytes(mutate(sources[index % len(sources)], generator))
    process = run('tf_test.py', '--json', tmp_path, GRAPH, LABELS, cwd=trained.folder, check=False)
    answers = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(answers) == 200
    failed = [answer for answer in answers if 'error' in answer]
    assert process.returncode == bool(failed)
    assert 20 < len(failed) < 180
    for answer in failed:
        start = f"'{answer['image']}' cannot be labeled: it"
        assert answer['error'].startswith(start), answer
        assert 'changed while' not in answer['error']
        assert tf_retrain.explain_unreadable(answer['image'])[0] in answer['error']


# Which way is up


TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize('image_format', ['JPEG', 'PNG', 'WEBP', 'AVIF', 'HEIF', 'TIFF'])
@pytest.mark.parametrize('orientation', [0, *TURNS])
def test_images_are_turned_as_pillow_turns_them(image_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    contents = encode(PHOTOGRAPH, image_format, exif=exif)
    with Image.open(io.BytesIO(contents)) as image:
        image.load()  # turns TIFF
        expected = np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
    found = tf_retrain.decode(contents, is_upright=True)
    np.testing.assert_allclose(found.astype(int), expected, atol=8)  # of two JPEG decoders
    is_always_upright = image_format in ('HEIF', 'TIFF')
    stored = tf_retrain.read_header(io.BytesIO(contents)).orientation
    assert (stored or 1) == (1 if is_always_upright else orientation or 1)


@pytest.mark.parametrize(
    ('kind', 'value'),
    [(5, struct.pack('<II', 6, 1)), (12, struct.pack('<d', 6))],
    ids=['fraction', 'float'],
)
def test_an_orientation_of_an_odd_type(kind, value):
    """The record, which is JSON, has an int all the same."""
    entry = struct.pack('<HHII', 0x0112, kind, 1, 26)
    exif = b'Exif\0\0II*\0' + struct.pack('<IH', 8, 1) + entry + bytes(4) + value
    header = tf_retrain.read_header(io.BytesIO(encode(PHOTOGRAPH, 'JPEG', exif=exif)))
    assert json.dumps(header) == '[6, 8]'


def test_16_bits_per_pixel_are_not_16_bits_per_sample():
    masks = struct.pack('<III', 0xF800, 0x07E0, 0x001F)
    info = struct.pack('<IiiHHIIiiII', 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0) + masks
    start = 14 + len(info)
    pixels = struct.pack('<HHHH', 0xF800, 0x07E0, 0x001F, 0)
    contents = b'BM' + struct.pack('<IHHI', start + len(pixels), 0, 0, start) + info + pixels
    assert tf_retrain.decode(contents, is_upright=False)[1, 0].tolist() == [255, 0, 0]
    assert tf_retrain.read_header(io.BytesIO(contents)).bits == 8


@pytest.fixture
def phone(job):
    """Photographs that are stored turned by 90 degrees, and a copy of them that is not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, colour in (('cat', (200, 60, 60)), ('dog', (60, 60, 200))):
        write_photographs(job.data, name, 20, colour, quality=95)
        for path in sorted((job.data / name).iterdir()):
            upright = job.folder / 'upright' / name / path.name
            upright.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as image:
                image.save(path, 'PNG', exif=exif)
                image.transpose(TURNS[6]).save(upright, 'PNG')
    return job


def test_upright(phone, monkeypatch, capsys):
    """The same bottlenecks as of images that were turned by hand, in files of their own."""
    phone.main()
    out = phone.main('--upright', '--find_suspects=1', '--print_misclassified_test_images')
    assert 'sideways' not in out
    assert out.splitlines()[-1].endswith('trained_model/labels.txt --upright')
    phone.cache(image_dir='upright', bottleneck_dir='by_hand')
    for image in sorted((phone.folder / 'upright').rglob('*.jpg')):
        file = image.relative_to(phone.folder / 'upright')
        expected = read_cache(phone.folder / f'by_hand/{file}.txt')
        found = read_cache(phone.cache_file(f'{file}_upright'))
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
        stored = read_cache(phone.cache_file(file))
        assert np.abs(found - stored).max() > 1e-3 * np.abs(expected).max()
    # The network counts as another one: the suffix may also be that of a module, 'm_upright'.
    flags = parse('--image_dir=data/', '--model_dir=inception/')
    plain, upright = (
        tf_retrain.load_backbone(argparse.Namespace(**{**vars(flags), 'upright': is_upright}))
        for is_upright in (False, True)
    )
    assert plain.checksum != upright.checksum
    record = json.loads((phone.folder / f'{GRAPH}.json').read_text())
    assert record['sideways'] == 40
    assert record['flags']['upright'] is True
    (suspect,) = (
        value.image
        for event in read_events(phone.folder / 'logs/suspects')
        for value in event.summary.value
    )
    assert (suspect.width, suspect.height) == (30, 40)


def test_labels_of_upright_images(phone, capsys):
    phone.main('--upright')
    turned = sorted((phone.folder / 'upright').rglob('*.jpg'))[:4]
    stored = [phone.data / path.relative_to(phone.folder / 'upright') for path in turned]
    expected = label_images(phone.folder, turned)
    for images in (stored, stored[:1]):
        command = ['--json', '--upright', *images, GRAPH, LABELS]
        process = run('tf_test.py', *command, cwd=phone.folder)
        assert process.stderr == ''
        answers = [json.loads(line) for line in process.stdout.splitlines()]
        best = [max(answer['scores']) for answer in answers]
        np.testing.assert_allclose(best, expected.max(axis=1)[: len(images)], atol=1e-5)
        assert 'orientation' not in answers[0]
    process = run('tf_test.py', '--json', *stored, GRAPH, LABELS, cwd=phone.folder)
    assert 'WARNING: Add --upright: that is how the graph was trained.' in process.stderr
    assert json.loads(process.stdout.splitlines()[0])['orientation'] == 6


def test_the_warning_is_the_same_in_each_run(phone):
    warning = 'images that the camera stored sideways, and that are used as stored: 40. '
    assert warning in phone.main()
    assert warning in phone.main()
    # A cache of the original has no records.
    for path in (phone.folder / 'bottlenecks/.records').rglob('*.rec'):
        path.unlink()
    assert warning in phone.main()
    image = next((phone.data / 'cat').iterdir())
    process = run('tf_test.py', image, GRAPH, LABELS, cwd=phone.folder)
    assert 'stored sideways, and that are labeled as stored: 1. ' in process.stderr


def test_upright_is_not_for_a_service(capsys):
    with pytest.raises(SystemExit, match='^2$'):
        flags = ['--image_dir=d', '--upright', '--data_service=grpc://localhost:1']
        tf_retrain.parse_flags(tf_retrain.create_parser(), flags)
    assert 'cannot turn images' in capsys.readouterr().err
