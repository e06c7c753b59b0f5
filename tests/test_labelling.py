"""tf_test.py: one image or many, in words or in JSON, sorted into folders, drawn as a heatmap."""

import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import zlib
from unittest import mock

import forks
import numpy as np
import pytest
from helpers import GRAPH, LABELS, ROOT, run, run_new, run_v1, run_v1_on_all, write_photographs
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from networks import save_function
from PIL import Image

import tf_retrain
import tf_test

tf = tf_test.tf
FILES = GRAPH, LABELS
NAMES = ['red fox', 'cat', 'dog']
ADVICE = 'Replace it, or save it as a JPEG or PNG of at most 178,956,970 pixels.'
RED = (200, 60, 60)


def parse(*arguments):
    """Returns the flags as the script does at its start."""
    return tf_test.create_labeling_parser().parse_intermixed_args(list(map(str, arguments)))


class Labeling:
    """Runs tf_test.py inside of this process, in the folder of a finished training."""

    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, *arguments, files=FILES):
        """Labels images; returns the lines that were printed."""
        tf_test.label_images(parse(*arguments, *files))
        out, err = self.capsys.readouterr()
        assert re.fullmatch(r'(Sorted into .*\n)?', err)
        return out.splitlines()

    def fails(self, match, *arguments, files=FILES):
        """Labels images, which must end in an error; returns what was printed before it."""
        with pytest.raises(tf_test.UserError, match=match) as error:
            tf_test.label_images(parse(*arguments, *files))
        assert '\n' not in str(error.value)
        return self.capsys.readouterr()


@pytest.fixture
def label(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained.folder)
    return Labeling(capsys)


def rank(trained, paths, top=3):
    """Yields (path, [(label, score), ...]) of images, the best first, by the graph for one."""
    images = [(trained.folder / path).read_bytes() for path in paths]
    results = run_v1_on_all(trained.graph(), images, 'final_result:0')
    for path, (scores,) in zip(paths, results, strict=True):
        best = np.argsort(-scores)[:top]
        yield str(path), [(NAMES[i], pytest.approx(scores[i], abs=1e-5)) for i in best]


def read_rows(text):
    """Yields the same of each line."""
    for line in text.splitlines():
        path, *cells = line.split('\t')
        yield path, list(zip(cells[::2], map(float, cells[1::2]), strict=True))


def test_every_class_with_its_score_the_best_first(trained, label):
    image = trained.test_image()
    lines = label(image)
    matches = [re.fullmatch(r'(.+) \(score = (\d\.\d{5})\)', line) for line in lines]
    ((_, ranking),) = rank(trained, [image])
    assert [(match[1], float(match[2])) for match in matches] == ranking
    assert label(image, '--top=2') == lines[:2]


@pytest.mark.posix
def test_a_folder_gives_a_line_per_image_in_order(trained, tmp_path):
    """Files that are no images, hidden ones, and a link to the folder itself are among them."""
    folder = tmp_path / 'mixed'
    write_photographs(folder, 'b', 40, RED)
    write_photographs(folder / 'a', 'deep', 40, (60, 60, 200))
    write_photographs(folder, '.hidden', 1, RED)
    (folder / 'a/deep/0.jpg').write_text('not an image')
    (folder / 'b/notes.txt').write_text('not tried')
    (folder / '.x.jpg').touch()
    (folder / 'a/back').symlink_to(folder)
    Image.new('RGB', (40, 30), RED).save(folder / 'c.PNG')
    process = run('tf_test.py', folder, *FILES, cwd=trained.folder, check=False)
    assert process.returncode == 1
    reason = "cannot be labeled: its format is not known: it starts with b'not an image'"
    lines = [line for line in process.stderr.splitlines() if not line.startswith('WARNING: ')]
    assert lines == [
        f"ERROR: '{folder}/a/deep/0.jpg' {reason}. {ADVICE}",
        'There is no accuracy, as no folder has the name of a class: red fox, cat, dog',
        'ERROR: 1 of 82 images could not be labeled.',
    ]
    paths = sorted([*folder.glob('a/deep/deep*'), *folder.glob('b/*.jpg'), folder / 'c.PNG'])
    assert list(read_rows(process.stdout)) == list(rank(trained, paths, 1))


def test_paths_from_standard_input_beside_arguments(trained):
    """Flags may stand between them."""
    animals = 'cat/cat', 'dog/dog', 'Red_Fox/Red_Fox'
    paths = [f'data/{animal} {i}.jpg' for animal in animals for i in range(2)]
    arguments = paths[0], '-', '--top', '2', paths[5], *FILES
    text = '\n'.join(paths[1:5]) + '\n\n'
    process = run_new('tf_test.py', *arguments, cwd=trained.folder, input=text)
    assert process.stderr == ''
    assert list(read_rows(process.stdout)) == list(rank(trained, paths, 2))


def test_json_lines(trained, label, tmp_path):
    bad = tmp_path / 'bad.jpg'
    bad.write_text('<html>')
    images = list(map(str, trained.test_images()[:3]))
    out, err = label.fails('1 of 4 images could not be labeled', '--json', *images, bad)
    assert err == ''
    *answers, failed = map(json.loads, out.splitlines())
    for answer, (image, ranking) in zip(answers, rank(trained, images), strict=True):
        labels, scores = map(list, zip(*ranking, strict=True))
        assert list(answer) == ['image', 'labels', 'scores', 'familiarity', 'folder_label']
        assert 0 <= answer['familiarity'] <= 1
        expected = {'image': image, 'labels': labels, 'scores': scores}
        folder_label = tf_retrain.get_label(pathlib.Path(image).parent.name)
        expected |= {'familiarity': answer['familiarity'], 'folder_label': folder_label}
        assert answer == expected
        (line,) = label('--json', '--top=1', image)
        assert json.loads(line)['labels'] == labels[:1]
    reason = f"'{bad}' cannot be labeled: it is a web page (HTML), which is not read. {ADVICE}"
    assert list(failed.items()) == [('image', str(bad)), ('error', reason)]
    out, err = label.fails('1 of 1 images could not be labeled', '--json', bad)
    assert json.loads(out) == failed


def test_sorting_links_and_never_overwrites(label, tmp_path):
    write_photographs(tmp_path / '1', 'pet', 3, RED)
    write_photographs(tmp_path / '2', 'pet', 3, RED)
    with Image.open(tmp_path / '2/pet/pet 0.jpg') as image:
        image.transpose(Image.Transpose.ROTATE_180).save(tmp_path / '2/pet/pet 0.jpg')
    target = tmp_path / 'sorted/cat'
    target.mkdir(parents=True)
    (target / 'pet 1.jpg').write_text('mine')
    before = {path: path.read_bytes() for path in tmp_path.rglob('*.jpg')}
    for _ in range(2):  # a second run finds the images where they are, as does an equal image
        label(tmp_path, f'--sort_into={tmp_path}/sorted')
        assert {path: path.read_bytes() for path in before} == before
        names = sorted(path.name for path in target.iterdir())
        assert names == [f'pet {name}.jpg' for name in ('0 2', '0', '1 2', '1', '2')]
    linked = {path.stat().st_ino for path in target.iterdir()}
    assert linked < {path.stat().st_ino for path in before}


def test_unsure_images_and_copies_where_links_are_impossible(trained, label, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'link', mock.Mock(side_effect=OSError('Operation not permitted')))
    image = trained.test_image()
    answer = json.loads(label(image, '--json')[0])
    best, score = answer['labels'][0], answer['scores'][0]
    for limit, name in ((score - 1e-4, best), (score + 1e-4, 'unsure')):
        flags = f'--sort_into={tmp_path}', f'--min_score={limit}'
        assert label(image, *flags)[0].startswith(f'{name} (score = ')
        assert all(f'\t{name}\t' in line for line in label(image, image, *flags))
        assert json.loads(label(image, *flags, '--json')[0]) == answer
        folder = {'red fox': 'Red_Fox'}.get(name, name)
        (copy,) = (tmp_path / folder).iterdir()
        assert copy.read_bytes() == image.read_bytes()
    line, *_ = label(image, f'--min_score={score!r}')
    assert line.startswith(best)  # the very score is enough


def test_copies_appear_whole_and_one_that_fails_is_one_line(label, tmp_path, monkeypatch):
    """Two names are too long for a number behind them; a copy fails half-way."""
    long_name = 'x' * 251 + '.jpg'
    for name, colour in (('1', RED), ('2', (60, 60, 200)), ('3', (60, 200, 60))):
        write_photographs(tmp_path / 'in', name, 1, colour)
    os.rename(tmp_path / 'in/1/1 0.jpg', tmp_path / 'in/1' / long_name)
    os.rename(tmp_path / 'in/2/2 0.jpg', tmp_path / 'in/2' / long_name)
    monkeypatch.setattr(tf_test, 'rank', lambda *arguments: [('cat', 1.0)])
    out, err = label.fails(
        '1 of 3 images could not be labeled and sorted',
        tmp_path / 'in',
        f'--sort_into={tmp_path}/out',
    )
    line, summary = err.splitlines()
    assert 'ERROR: --sort_into: ' in line and 'File name too long' in line
    assert summary == f'Sorted into {tmp_path}/out: 2 cat'
    assert len(out.splitlines()) == 3
    assert sorted(os.listdir(tmp_path / 'out/cat')) == ['3 0.jpg', long_name]

    def fail(*arguments):
        raise OSError(28, 'No space left on device')

    def copy_half(source, target):
        pathlib.Path(target.decode()).write_bytes(b'half')
        fail()

    monkeypatch.setattr(os, 'link', fail)
    monkeypatch.setattr(shutil, 'copyfile', copy_half)
    label.fails('3 of 3 images', tmp_path / 'in', f'--sort_into={tmp_path}/full')
    assert os.listdir(tmp_path / 'full/cat') == []


def test_a_copy_does_not_replace_one_that_came_meanwhile(tmp_path, monkeypatch):
    """Two runs may sort images of one name into one folder."""
    (tmp_path / 'x.jpg').write_bytes(b'own')
    monkeypatch.setattr(os, 'link', mock.Mock(side_effect=OSError('Operation not permitted')))

    def copy_late(source, target, copy=shutil.copyfile):
        copy(source, target)
        (tmp_path / 'sorted/cat/x.jpg').write_bytes(b'of another run')

    monkeypatch.setattr(shutil, 'copyfile', copy_late)
    tf_test.place(f'{tmp_path}/x.jpg', 'cat', f'{tmp_path}/sorted')
    found = {path.name: path.read_bytes() for path in (tmp_path / 'sorted/cat').iterdir()}
    assert found == {'x.jpg': b'of another run', 'x 2.jpg': b'own'}


def test_images_of_one_name_and_size_and_time_are_both_sorted(tmp_path):
    for number in '12':
        path = tmp_path / number / 'x.jpg'
        path.parent.mkdir()
        path.write_text(number)
        os.utime(path, (1e9, 1e9))
        tf_test.place(str(path), 'cat', f'{tmp_path}/sorted')
    found = {path.name: path.read_text() for path in (tmp_path / 'sorted/cat').iterdir()}
    assert found == {'x.jpg': '1', 'x 2.jpg': '2'}


def test_two_runs_that_sort_the_same_images_at_once(tmp_path, monkeypatch):
    (tmp_path / 'x.jpg').write_bytes(b'own')
    link = os.link

    def link_late(source, target):
        link(source, target)  # by the other run
        link(source, target)

    monkeypatch.setattr(os, 'link', link_late)
    tf_test.place(f'{tmp_path}/x.jpg', 'cat', f'{tmp_path}/sorted')
    assert os.listdir(tmp_path / 'sorted/cat') == ['x.jpg']


def test_copies_to_another_disk(label, tmp_path, monkeypatch):
    """There are links on each of the two, but none from one to the other."""
    link = os.link
    write_photographs(tmp_path / 'in', 'x', 2, RED)

    def link_on_one_disk(source, target):
        if os.path.dirname(source) != os.path.dirname(target):
            raise OSError(18, 'Invalid cross-device link')
        link(source, target)

    monkeypatch.setattr(os, 'link', link_on_one_disk)
    for _ in range(2):
        label(tmp_path / 'in', f'--sort_into={tmp_path}/sorted')
        copies = sorted((tmp_path / 'sorted').rglob('*.*'))
        assert [path.name for path in copies] == ['x 0.jpg', 'x 1.jpg']
        assert {path.stat().st_nlink for path in copies} == {1}


@pytest.mark.parametrize('flag', ['--heatmap', '--sort_into'])
def test_outputs_on_other_computers_are_refused(trained, label, tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        label.fails(
            f"^{flag}: 's3://x/y' is not on this computer", f'{flag}=s3://x/y', trained.test_image()
        )
        (tmp_path / 's3:/x').mkdir(parents=True, exist_ok=True)


def test_images_on_other_computers_are_not_sorted(tmp_path):
    with pytest.raises(tf_test.UserError, match="^--sort_into: 'gs://b/x.jpg' is not on this"):
        tf_test.place('gs://b/x.jpg', 'cat', f'{tmp_path}/sorted')
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('path', ['image', *FILES])
def test_nothing_that_is_read_is_written(trained, label, path):
    image = trained.test_image()
    path = image if path == 'image' else trained.folder / path
    before = path.read_bytes()
    label.fails('^--heatmap: .* is read. Name another file', f'--heatmap={path}', image)
    assert path.read_bytes() == before
    label.fails('^--sort_into: .* is read. Name another folder', '--sort_into=data', 'data/')


@pytest.mark.posix
def test_images_of_a_folder_to_which_a_link_led_are_not_new(job, monkeypatch):
    """`data` leads to one version of the images in the training, and to the next one later."""
    job.photographs(cat=20, dog=20)
    job.data.rename(job.folder / 'v1')
    job.data.symlink_to('v1')
    job.main(how_many_training_steps='2')
    job.data.unlink()
    for name in ('cat', 'dog'):
        (job.folder / 'v2' / name).mkdir(parents=True)
    job.data.symlink_to('v2')
    monkeypatch.chdir(job.folder)
    for name in ('v1', f'{job.folder}/v1'):
        tf_test.label_images(parse(name, GRAPH, LABELS))
        err = job.capsys.readouterr().err
        counts = re.search(r'Accuracy on the (\d+) images.*not counted: (\d+) more', err, re.DOTALL)
        tested, not_new = map(int, counts.groups())
        assert (0 < tested < 20, tested + not_new) == (True, 40)


def test_images_are_not_sorted_into_what_is_trained_on(trained, label, monkeypatch):
    """Cats that are taken for dogs would be trained on as dogs."""
    monkeypatch.chdir(trained.folder)
    before = sorted(trained.data.rglob('*'))
    for folder in ('data', 'data/', trained.data):
        message = '^--sort_into: .* is where the training looks for class folders, and would train'
        label.fails(message, f'--sort_into={folder}', *sorted(before)[1:3])
    assert sorted(trained.data.rglob('*')) == before
    label('--sort_into=data/sorted', trained.test_image())  # no class folder, and so not trained on
    shutil.rmtree(trained.data / 'sorted')


def test_images_are_not_sorted_into_a_set_of_the_training(trained):
    """The test set of the next training would have the labels that this one gave."""
    training = tf_test.load_graph(str(trained.folder / GRAPH)).training
    training = training._replace(set_folders={'train': 'training', 'val': 'validation'})
    for name in ('val', 'test'):
        flags = parse('x.jpg', GRAPH, LABELS, f'--sort_into={trained.data / name}')
        with pytest.raises(
            tf_test.UserError, match='is where the training looks for class folders'
        ):
            tf_test.ensure_outside_images(training, flags)
    flags.sort_into = str(trained.data.parent / 'test')
    tf_test.ensure_outside_images(training, flags)


def test_a_heatmap_is_no_photograph_to_train_on(trained, label):
    other = trained.data / 'cat/cat 1.jpg'
    before = other.read_bytes()
    for path in (other, 'data/dog/new.png'):
        message = '^--heatmap: .* is in the --image_dir of the training. Name a file elsewhere'
        label.fails(message, f'--heatmap={path}', trained.test_image())
    assert other.read_bytes() == before
    assert not (trained.data / 'dog/new.png').exists()


@pytest.mark.posix
def test_the_record_of_a_training_in_a_folder_that_is_not_utf_8(trained, tmp_path):
    """It says which images are not new."""
    record = json.loads((trained.folder / f'{GRAPH}.json').read_text())
    record['image_dir'] = f'{tmp_path}/m\udcfcller/data'
    (tmp_path / 'graph.pb.json').write_text(json.dumps(record))
    contents = (trained.folder / GRAPH).read_bytes()
    training = tf_test.load_training(str(tmp_path / 'graph.pb'), contents)
    tally = tf_test.Tally(tf_test.Classes(NAMES, NAMES, []), training)
    folder = f'{record["image_dir"]}/cat'
    images = [f'{folder}/{i}.jpg' for i in range(50)]
    assert 0 < sum(tally.is_new(image) for image in images) < 50  # those of the test set


def test_a_heatmap_does_not_replace_a_photograph(trained, label, tmp_path):
    """Such as the first of two that were named after the flag."""
    other = tmp_path / 'other.JPG'
    other.write_bytes(trained.test_image().read_bytes())
    before = other.read_bytes()
    message = (
        "^--heatmap: '.*other.JPG' exists, and may be a photograph. Delete it, or name another"
    )
    link = tmp_path / 'link.png'
    link.symlink_to(other)
    for path in (other, link):
        label.fails(
            message.replace('other.JPG', path.name), '--heatmap', path, trained.test_image()
        )
    assert other.read_bytes() == before
    heatmap = tmp_path / 'heatmap.png'
    for _ in range(2):  # a heatmap may be drawn again
        label(f'--heatmap={heatmap}', trained.test_image())
    heatmap.chmod(0o444)
    message_read_only = "^--heatmap: '.*heatmap.png' is read-only. Make it writable, or name"
    label.fails(message_read_only, f'--heatmap={heatmap}', trained.test_image())
    for name, contents in (('photo.png', png(other)), ('cut.png', png(other)[:50])):
        path = tmp_path / name
        path.write_bytes(contents)
        label.fails(message.replace('other.JPG', name), '--heatmap', path, trained.test_image())
        assert path.read_bytes() == contents


def png(path):
    """Returns an image as PNG."""
    contents = io.BytesIO()
    with Image.open(path) as image:
        image.save(contents, 'PNG')
    return contents.getvalue()


@pytest.mark.posix
def test_a_heatmap_replaces_only_plain_files(trained, label, tmp_path):
    """A link stays a link: the picture is written to where it leads."""
    image = trained.test_image()
    os.mkfifo(tmp_path / 'pipe.png')
    label.fails('^--heatmap: .*pipe.png. is not a plain', f'--heatmap={tmp_path}/pipe.png', image)
    (tmp_path / 'link.png').symlink_to(tmp_path / 'there.png')
    label(f'--heatmap={tmp_path}/link.png', image)
    assert (tmp_path / 'link.png').is_symlink()
    assert Image.open(tmp_path / 'there.png').format == 'PNG'
    label.fails('^--heatmap: there is no folder for ', f'--heatmap={tmp_path}/nowhere/h.png', image)
    record = trained.folder / f'{GRAPH}.json'
    (tmp_path / 'record.png').symlink_to(record)
    before = record.read_bytes()
    label.fails('^--heatmap: .* is read. Name', f'--heatmap={tmp_path}/record.png', image)
    assert record.read_bytes() == before
    (tmp_path / 'store').mkdir()
    (tmp_path / 'linked.png').symlink_to(tmp_path / 'store/3f2a')  # of a store by checksums
    for _ in range(2):
        label(f'--heatmap={tmp_path}/linked.png', image)
    assert Image.open(tmp_path / 'store/3f2a').format == 'PNG'
    for name in ('h.psd', 'h.xyz', 'h'):  # the first is a format that Pillow can only read
        label.fails(
            '^--heatmap: .* cannot be written .*. Name another file, such as heatmap',
            f'--heatmap={tmp_path}/{name}',
            image,
        )


def test_a_heatmap_is_written_whole(trained, label, monkeypatch, tmp_path):
    heatmap = tmp_path / 'heatmap.png'
    label(f'--heatmap={heatmap}', trained.test_image())
    before = heatmap.read_bytes()
    monkeypatch.setattr(os, 'replace', mock.Mock(side_effect=OSError('No space left on device')))
    message = '^--heatmap: .* cannot be written .*No space left on device'
    label.fails(message, f'--heatmap={heatmap}', trained.data / 'cat/cat 1.jpg')
    assert heatmap.read_bytes() == before
    assert os.listdir(tmp_path) == ['heatmap.png']


@pytest.mark.parametrize('images', [['data/cat/cat 0.jpg'], ['data/cat']])
def test_a_full_memory_is_not_the_graph_s_fault(trained, images):
    command = [ROOT / 'tests/programs/full_memory.py', *images, GRAPH, LABELS]
    process = forks.run(command, trained.folder)
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert last.startswith('ERROR: the memory of the GPU or computer is full (')
    assert last.endswith('or set CUDA_VISIBLE_DEVICES= to leave the GPU out.')


def test_a_label_with_a_nul_is_sorted(trained, label, tmp_path):
    (tmp_path / 'labels').write_bytes(b'a\0b\nc\0d\ne\0f\n')
    shutil.copy(trained.folder / GRAPH, tmp_path / 'graph')  # without the record, which has folders
    files = tmp_path / 'graph', tmp_path / 'labels'
    run('tf_test.py', trained.data / 'cat/cat 0.jpg', *files, f'--sort_into={tmp_path}/s')
    assert os.listdir(tmp_path / 's') == ['c_d']


def test_a_label_with_a_tab_stays_in_its_column(capsys):
    flags = parse('a\t1.jpg', *FILES)
    tf_test.print_ranking('a\t1.jpg', [('b\t2', 0.75)], flags, is_single=False)
    assert capsys.readouterr().out == 'a\\t1.jpg\tb\\t2\t0.75000\n'


def test_a_folder_that_cannot_be_read_is_one_line(trained, label, monkeypatch):
    """The images of the others are labeled."""

    def list_names(folder, original=tf_test.list_names):
        if folder.endswith('cat'):
            raise tf.errors.PermissionDeniedError(None, None, 'Permission denied')
        return original(folder)

    monkeypatch.setattr(tf_test, 'list_names', list_names)
    out, err = label.fails('1 of 86 images could not be labeled', 'data')
    assert len(out.splitlines()) == 85
    assert err.startswith("ERROR: The folder 'data/cat' cannot be listed. Check its drive and its")


def test_the_heatmap_of_what_pillow_cannot_read(trained, label, tmp_path):
    """TensorFlow decodes a PNG with a damaged chunk of text, and Pillow does not."""
    contents = png(trained.test_image())
    chunk = b'\0\0\0\x01tEXtx\0\0\0\0'  # with a wrong checksum
    (tmp_path / 'x.png').write_bytes(contents[:33] + chunk + contents[33:])
    label(f'--heatmap={tmp_path}/h.png', tmp_path / 'x.png')
    assert Image.open(tmp_path / 'h.png').height == 24 + 30 + 24


def test_the_limit_on_pixels_holds_whatever_comes_before_the_header(trained, label, tmp_path):
    """The contents of another chunk are not the sides of a PNG, which the graph would decode."""
    contents = png(trained.test_image())
    data = b'prVt' + struct.pack('>II', 10, 10)
    chunk = struct.pack('>I', 8) + data + struct.pack('>I', zlib.crc32(data))
    path = tmp_path / 'x.png'
    path.write_bytes(contents[:8] + chunk + contents[8:])
    reason = r'cannot be labeled: it is PNG, and damaged \(.*The image is not JPEG, PNG or GIF'
    label.fails(reason, path)
    label.fails(reason, f'--heatmap={tmp_path}/h.png', path)


def test_an_image_that_changes_before_its_heatmap_is_drawn(trained, label, monkeypatch, tmp_path):
    path = tmp_path / 'x.png'
    path.write_bytes(png(trained.test_image()))
    monkeypatch.setattr(tf_test, 'report_tally', lambda *arguments: path.write_bytes(b'other'))
    reason = f"--heatmap: '{path}' cannot be drawn: its format is not known"
    label.fails(reason, f'--heatmap={tmp_path}/h.png', path)
    assert not (tmp_path / 'h.png').exists()


@pytest.mark.posix
def test_paths_with_nul_after_each(trained):
    """That is what find -print0 writes, also of names with a newline."""
    paths = sorted(trained.data.rglob('*.jpg'))[:3]
    odd = trained.folder / 'odd\nname.jpg'
    odd.write_bytes(paths[0].read_bytes())
    text = ''.join(f'{path}\0' for path in (odd, *paths))
    process = run_new('tf_test.py', '-', *FILES, cwd=trained.folder, input=text)
    lines = process.stdout.splitlines()
    names = [str(path).replace('\n', '\\n') for path in (odd, *paths)]
    assert [line.split('\t')[0] for line in lines] == names


def test_what_find_lists_is_labelled_once(trained, tmp_path):
    """A folder, and then what is in it: also files that are not taken for images in a folder."""
    inside, above = tmp_path / 'inside', tmp_path / 'above'
    for name in ('cat/1.jpg', 'cat/2', 'dog/3.jpg'):
        for folder in (inside, above):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(trained.data / 'cat/cat 0.jpg', folder / name)
    lines = [
        *('.', './cat', './cat/1.jpg', './cat/2', './dog', './dog/3.jpg', '../above'),
        *('../above/cat', '../above/cat/1.jpg', '../above/cat/2', '../above/dog/3.jpg', '.'),
    ]
    files = trained.folder / GRAPH, trained.folder / LABELS
    process = run_new('tf_test.py', '-', *files, cwd=inside, input='\n'.join(lines))
    names = [line.split('\t')[0] for line in process.stdout.splitlines()]
    images = ['cat/1.jpg', 'dog/3.jpg', 'cat/2']  # the last is not found in the folder
    assert names == [f'{folder}/{name}' for folder in ('.', '../above') for name in images]


class Slow(io.RawIOBase):
    """A stream that gives what it has in parts."""

    def __init__(self, *parts):
        self.parts = [*parts]

    def readable(self):
        return True

    def readinto(self, buffer):
        part = self.parts.pop(0) if self.parts else b''
        buffer[: len(part)] = part
        return len(part)


@pytest.mark.parametrize(
    ('parts', 'paths'),
    [
        ((b'a\nb\n',), ['a', 'b']),
        ((b'\xef\xbb\xbfa', b'\r\nb'), ['a', 'b']),
        ((b'a\n\xef\xbb\xbfb\n',), ['a', 'b']),
        ((b'a', b'\0b\r\0'), ['a', 'b\r']),
        ((b'a\nb\0c\0',), ['a\nb', 'c']),
        ((), []),
    ],
)
def test_paths_on_standard_input_come_in_parts(monkeypatch, parts, paths):
    stream = io.BufferedReader(Slow(*parts))
    monkeypatch.setattr(sys, 'stdin', mock.Mock(buffer=stream))
    assert list(tf_test.read_paths()) == paths


def test_a_nul_in_a_path_that_comes_late_fails_alone(label, trained, monkeypatch):
    image = trained.test_image()
    parts = f'{image}\n'.encode(), b'b\0c\n', f'{image}\n'.encode()
    monkeypatch.setattr(sys, 'stdin', mock.Mock(buffer=io.BufferedReader(Slow(*parts))))
    out, err = label.fails('^1 of 3 images could not be labeled', '-')
    assert [line.split('\t')[0] for line in out.splitlines()] == [str(image), str(image)]
    assert "ERROR: The image 'b\\x00c' cannot be read: it is not a plain file." in err


def test_a_list_in_utf_16_is_refused(monkeypatch):
    """Its NUL bytes would end paths, one of which would be /."""
    stream = io.BufferedReader(io.BytesIO('/home\n'.encode('utf-16')))
    monkeypatch.setattr(sys, 'stdin', mock.Mock(buffer=stream))
    with pytest.raises(tf_test.UserError, match='^-: standard input is UTF-16'):
        list(tf_test.read_paths())


def test_standard_input_that_cannot_be_read(tmp_path, monkeypatch):
    with open(tmp_path / 'only_written', 'wb') as file:
        stream = open(file.fileno(), 'rb', closefd=False)
        monkeypatch.setattr(sys, 'stdin', mock.Mock(buffer=stream))
        with pytest.raises(tf_test.UserError, match='^-: standard input cannot be read: Bad file'):
            list(tf_test.read_paths())


@pytest.mark.posix
def test_names_that_are_not_utf_8(trained, tmp_path):
    """Such an image is labeled as any other, and a missing one is named."""
    folder = os.fsencode(tmp_path / 'in')
    os.mkdir(folder)
    with open(os.path.join(folder, b'\xff.jpg'), 'wb') as file:
        file.write(trained.test_image().read_bytes())
    missing = os.fsdecode(b'\xfe.jpg'), os.fsdecode(b'gs://bucket/\xfe.jpg')
    arguments = tmp_path / 'in', *missing, *FILES
    process = run('tf_test.py', *arguments, cwd=trained.folder, check=False)
    assert len(process.stdout.splitlines()) == 1
    *failures, summary = process.stderr.splitlines()
    assert all('cannot be read' in failure for failure in failures)
    assert summary == 'ERROR: 2 of 3 images could not be labeled.'


def test_images_that_do_not_exist_do_not_go_through_the_network(label, monkeypatch):
    monkeypatch.setattr(tf_test, 'create_classifier', lambda graph_def: (None, [299, 299]))
    out, err = label.fails('300 of 300 images', *(f'{i}.jpg' for i in range(300)))
    assert len(err.splitlines()) == 300
    assert out == ''


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='only Linux has /dev/full')
@pytest.mark.parametrize('arguments', [['data'], ['--json', 'data/cat/cat 0.jpg']])
def test_a_full_disk_is_one_line(trained, tmp_path, arguments):
    command = [ROOT / 'tf_test.py', *arguments, *FILES]
    errors = tmp_path / 'errors'
    with forks.Fork(command, trained.folder, ['/dev/full', errors]) as process:
        process.communicate()
    assert process.returncode == 1
    (line,) = errors.read_text().splitlines()
    assert line == 'ERROR: standard output cannot be written: No space left on device.'


def test_errors_do_not_get_among_the_results_if_stderr_is_closed(trained):
    command = [ROOT / 'tf_test.py', 'data/cat/cat 0.jpg', 'missing.jpg', *FILES]
    with forks.Fork(command, trained.folder, ['out', None]) as process:
        process.communicate()
    assert process.returncode == 1
    (line,) = (trained.folder / 'out').read_text().splitlines()
    assert line.startswith('data/cat/cat 0.jpg\t')


def test_images_without_a_label_do_not_go_into_the_folder_of_a_class():
    """Its label may have been translated."""
    classes = tf_test.Classes(['cat', 'anderes'], ['cat', 'unknown'], [])
    graph = tf_test.Graph(None, ['final_result', 'familiarity'], [], None)
    flags = parse('data', *FILES, '--unknown=5')
    tf_test.check_refusal_flags(classes, graph, flags)
    flags.sort_into = 'sorted'
    with pytest.raises(
        tf_test.UserError, match="^--unknown: --sort_into puts .* into 'unknown', but"
    ):
        tf_test.check_refusal_flags(classes, graph, flags)


def test_a_label_called_unsure(trained, label, tmp_path):
    (tmp_path / 'l.txt').write_text('red fox\nunsure\ndog\n')
    files = GRAPH, tmp_path / 'l.txt'
    label.fails(
        "^--min_score: one of the labels is 'unsure'", '--min_score=0.5', 'data', files=files
    )


@pytest.mark.parametrize('position', [0, 1, 2])
@pytest.mark.posix
def test_only_plain_files_are_opened(trained, label, position):
    if not (trained.folder / 'fifo').exists():
        os.mkfifo(trained.folder / 'fifo')
    files = [trained.test_image(), *FILES]
    files[position] = 'fifo'
    label.fails(
        "The (image|graph|labels file) 'fifo' cannot be read: it is not a plain file",
        files[0],
        files=files[1:],
    )


@pytest.mark.parametrize('name', ['..', '', 'a/b', '.hidden'])
def test_a_label_never_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / 'x.jpg').write_text('x')
    tf_test.place(str(tmp_path / 'x.jpg'), name, str(tmp_path / 'sorted'))
    assert len(list(tmp_path.glob('sorted/*/x.jpg'))) == 1


@pytest.mark.parametrize('screens', [{'stderr'}, {'stderr', 'stdout'}, {'stdout'}])
def test_a_bar_where_only_the_output_goes_elsewhere(label, monkeypatch, capsys, screens):
    for name in screens:
        monkeypatch.setattr(f'sys.{name}.isatty', lambda: True)
    tf_test.label_images(parse('data', *FILES))
    out, err = capsys.readouterr()
    assert ('145image' in err) == (screens == {'stderr'})
    assert out.count('\n') == 145


def start_in_shell(trained, images, end):
    """Labels images in a new interpreter; the command has this end."""
    script = f'{sys.executable} {ROOT / "tf_test.py"} {images} {" ".join(FILES)}'
    command = f'({script}; echo $? > code) {end}'
    return subprocess.run(
        command, shell=True, cwd=trained.folder, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ('images', 'end', 'count', 'code'),
    [
        ('data', '| head -1', 1, 141),  # 128 + SIGPIPE
        ('"data/cat/cat 0.jpg"', '| true', 0, 141),
        ('data', '<&- >&- 2>&-', 0, 0),
    ],
)
@pytest.mark.posix
def test_pipes_and_streams_may_be_closed(trained, images, end, count, code):
    process = start_in_shell(trained, images, end)
    assert (process.stderr, process.stdout.count('\n')) == ('', count)
    assert int((trained.folder / 'code').read_text()) == code


def test_standard_input_that_is_closed(trained):
    process = start_in_shell(trained, '-', '<&-')
    assert ((trained.folder / 'code').read_text(), process.stdout) == ('1\n', '')
    assert process.stderr == 'ERROR: -: standard input is closed. Name images or a folder.\n'


NO_GRAPH = 'is not a graph with a node DecodeJpeg/contents. Name the --output_graph of the training'
ERRORS = [  # image, graph and labels
    ('absent.jpg graph labels', "The image 'absent.jpg' cannot be read: "),
    ('folder graph labels', 'There is no image in folder. '),
    ('labels graph labels', "'labels' cannot be labeled: its format is not known: it starts with "),
    ('empty graph labels', f"'empty' cannot be labeled: it is empty. {ADVICE}"),
    ('pipe graph labels', "The image 'pipe' cannot be read: it is not a plain file."),
    ('/dev/null graph labels', "The image '/dev/null' cannot be read: it is not a plain file."),
    (
        'huge.png graph labels',
        "'huge.png' cannot be labeled: it has 400,000,000 pixels, more than ",
    ),
    ('cat.jpg absent labels', "The graph 'absent' cannot be read: "),
    ('cat.jpg labels labels', f"'labels' {NO_GRAPH}"),
    ('cat.jpg empty labels', f"'empty' {NO_GRAPH}"),
    ('cat.jpg graph absent', "The labels file 'absent' cannot be read: "),
    ('cat.jpg graph graph', "The labels file 'graph' is not text. "),
    ('cat.jpg graph empty', "'empty' has 0 labels, but 'graph' has 3 classes. Name files of one"),
    ('cat.jpg graph other', "'other' has 1 labels, but 'graph' has 3 classes. Name files of one"),
    ('cat.jpg graph more', "'more' has 4 labels, but 'graph' has 3 classes. Name files of one"),
    ('cat.jpg model labels', "'labels' has 3 labels, but 'model' has 10 classes. Name files of"),
]


@pytest.fixture(scope='module')
def odd_files(trained, tmp_path_factory):
    """A folder with a photograph, a graph, labels, and files that are nothing of this."""
    if not hasattr(os, 'mkfifo'):
        pytest.skip('FIFOs')
    folder = tmp_path_factory.mktemp('odd')
    links = {'cat.jpg': 'data/cat/cat 0.jpg', 'graph': GRAPH, 'labels': LABELS}
    links['model'] = 'inception/classify_image_graph_def.pb'  # it has a softmax of its own
    for name, target in links.items():
        (folder / name).symlink_to(trained.folder / target)
    (folder / 'empty').touch()
    (folder / 'other').write_text('dog\n')
    (folder / 'more').write_text('cat\ndog\nother\nmore\n')
    (folder / 'folder').mkdir()
    os.mkfifo(folder / 'pipe')  # nobody writes into it: it would be waited for
    Image.new('1', (20_000, 20_000)).save(folder / 'huge.png')  # it would take all memory
    return folder


@pytest.mark.parametrize(('files', 'message'), ERRORS)
def test_errors(odd_files, label, monkeypatch, files, message):
    monkeypatch.chdir(odd_files)
    assert label.fails(f'^{re.escape(message)}', files=files.split()) == ('', '')


@pytest.mark.parametrize('image', ['empty', 'absent.jpg'])
def test_an_error_is_one_line_and_exit_code_1(odd_files, image):
    process = run('tf_test.py', image, 'graph', 'labels', cwd=odd_files, check=False)
    assert (process.returncode, process.stdout) == (1, '')
    assert re.fullmatch(rf"ERROR: .*'{image}'.*\n", process.stderr)


def test_images_that_are_refused_do_not_stop_the_others(odd_files, label, monkeypatch):
    monkeypatch.chdir(odd_files)
    images = 'pipe', 'cat.jpg', 'huge.png', 'absent.jpg', 'graph', 'labels'
    out, err = label.fails('3 of 4 images could not be labeled', files=images)
    assert re.fullmatch(r'cat\.jpg\tcat\t.*\n', out)
    reasons = 'it is not a plain file', 'has 400,000,000 pixels', 'No such file'
    assert re.fullmatch(''.join(rf'ERROR: .*{reason}.*\n' for reason in reasons), err)


def test_a_blank_last_line_and_a_mark_at_the_start_of_the_labels(trained, label, tmp_path):
    (tmp_path / 'labels.txt').write_bytes(b'\xef\xbb\xbfred fox\r\ncat\r\ndog\r\n\r\n')
    image = trained.test_image()
    assert label(image, files=(GRAPH, tmp_path / 'labels.txt')) == label(image)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('', 'the following arguments are required: IMAGE, GRAPH, LABELS'),
        ('a b c --top=0', '1 or more'),
        ('a b c --min_score=2', 'from 0 to 1'),
        ('a b c --tip=1', 'unrecognized arguments: --tip=1'),
    ],
)
def test_wrong_arguments_are_usage_errors(capsys, arguments, message):
    with pytest.raises(SystemExit, match='^2$'):
        parse(*arguments.split())
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.posix
def test_memory_does_not_grow_with_the_number_of_images(trained):
    def measure(count):
        images = [trained.test_image()] * count
        program = ROOT / 'tests/programs/peak_memory.py'
        process = forks.run([program, ROOT / 'tf_test.py', *images, *FILES], trained.folder)
        assert process.stdout.count('\n') == count
        return int(re.fullmatch(r'(\d+) bytes\n', process.stderr)[1])

    # The thousand images more would take 1,070 MB, resized as the network wants them.
    assert measure(1300) - measure(300) < 100e6


# Heatmaps


def test_the_heatmap_shows_the_part_that_decides(trained, label, tmp_path):
    """Cats in the right half of a photograph, behind foxes."""
    picture = Image.new('RGB', (320, 30))
    for i, animal in enumerate(4 * ['Red_Fox'] + 4 * ['cat']):
        picture.paste(Image.open(trained.data / animal / f'{animal} {i}.jpg'), (40 * i, 0))
    picture.save(tmp_path / 'both.png')
    tf_test.label_images(parse(f'--heatmap={tmp_path}/heatmap.png', tmp_path / 'both.png', *FILES))
    assert label.capsys.readouterr().out.startswith('cat')
    with Image.open(tmp_path / 'heatmap.png') as heatmap:
        assert heatmap.size == (320, 24 + 30 + 24)  # title, photograph, scale
        red, green, _ = np.asarray(heatmap, int)[24:-24].T
    redness = red - green
    assert redness[160:].sum() > 0.8 * redness.sum() > 0


def test_the_mean_of_the_positions_is_the_logit(trained):
    """The class activation map of each class adds up to what the graph itself computes."""
    graph = tf_test.load_graph(str(trained.folder / GRAPH))
    assert graph.labels == NAMES
    contents = trained.test_image().read_bytes()
    (logits,) = run_v1(graph.graph_def, contents, 'final_training_ops/Wx_plus_b/MatMul:0')
    heatmaps = [tf_test.compute_heatmap(graph, contents, index) for index in range(3)]
    assert np.shape(heatmaps) == (3, 6, 6)
    assert np.mean(heatmaps, axis=(1, 2)) == pytest.approx(logits, rel=1e-3, abs=1e-4)


def test_the_text_on_the_heatmap_of_a_long_strip():
    """The picture is not many times as high as the strip."""
    pixels = np.zeros((10, 20_000, 3), np.uint8)
    picture = tf_test.draw_heatmap(pixels, np.ones((1, 9)), 'cat 0.9')
    assert picture.size == (20_000, 10 + 2 * 600)


def test_heatmaps_of_each_network(networks, label, tmp_path):
    """All of these end in the mean of a map, and affine ops after it."""
    files = [networks.folder / name for name in FILES]
    label(f'--heatmap={tmp_path}/h.png', networks.test_image(), files=files)
    with Image.open(tmp_path / 'h.png') as picture:
        assert picture.height == 30 + 24 + 24


def rotate(images):
    """The means of the channels, in another order: a split has several outputs."""
    first, rest = tf.split(tf.reduce_mean(images, [1, 2]), [1, 2], axis=1)
    one, two = tf.split(rest, 2, axis=1)
    return tf.concat([two, one, first], axis=1)


def rotate_before_the_mean(images):
    one, two, three = tf.split(images, 3, axis=3)
    return tf.reduce_mean(tf.concat([two, three, one], axis=3), [1, 2])


def unstack(images):
    one, two, three = tf.unstack(tf.reduce_mean(images, [1, 2]), axis=1)
    return tf.stack([two, three, one], axis=1)


@pytest.mark.parametrize('function', [rotate, rotate_before_the_mean, unstack])
def test_the_heatmap_of_a_network_that_splits_its_features(job, function):
    heatmap, share = draw_heatmap_of(job, function)
    assert heatmap.mean() == pytest.approx(share, rel=1e-3)


def normalize(images):
    means = tf.reduce_mean(images, [1, 2])
    return means / tf.norm(means, axis=1, keepdims=True)


def branch(images):
    """The mean of the parts of the image is a second branch."""
    parts = tf.image.resize(images, [4, 4])
    return tf.concat([tf.reduce_mean(images, [1, 2]), tf.reduce_mean(parts, [1, 2])], axis=1)


@pytest.mark.parametrize('function', [normalize, branch])
def test_no_heatmap_of_a_network_that_is_not_affine_behind_one_mean(job, function):
    """After few training steps, too, when all logits are small."""
    with pytest.raises(tf_test.UserError, match='this network has no class activation map'):
        draw_heatmap_of(job, function)


def draw_heatmap_of(job, function):
    """Returns the heatmap of the first class, and the logit without the bias."""
    save_function(job.folder / 'module', function)
    image = job.photographs(cat=20, dog=20).test_image().read_bytes()
    job.main('--tfhub_module=module', how_many_training_steps='3')
    graph = tf_test.load_graph(str(job.folder / GRAPH))
    (logits,) = run_v1(graph.graph_def, image, 'final_training_ops/Wx_plus_b/MatMul:0')
    return tf_test.compute_heatmap(graph, image, 0), logits[0]


def test_the_heatmap_of_a_label_that_the_font_lacks(trained, label, tmp_path):
    """Its title has the number of the label. Here, the labels are translated."""
    (tmp_path / 'labels').write_text('狐\n猫\n犬\n')
    image = trained.data / 'cat/cat 0.jpg'
    files = GRAPH, tmp_path / 'labels'
    with mock.patch.object(tf_test, 'draw_heatmap', wraps=tf_test.draw_heatmap) as draw:
        tf_test.label_images(parse(f'--heatmap={tmp_path}/h.png', image, *files))
    title = draw.call_args.args[2]
    assert re.fullmatch(r'#2 \d\.\d\d, familiarity \d\.\d\d', title)
    assert f"{tmp_path}/h.png: #2 is '猫'.\n" in label.capsys.readouterr().err


@pytest.mark.parametrize(
    ('heatmap', 'files', 'message'),
    [
        ('o.png', 'cat.jpg max labels', 'this network has no class activation map'),
        ('no/o.png', 'cat.jpg graph labels', 'there is no folder for .no/o.png.. Make it first'),
        ('o.png', '. graph labels', 'name one image'),
    ],
)
def test_heatmaps_that_are_impossible(
    trained, odd_files, label, monkeypatch, heatmap, files, message
):
    graph_def = trained.graph()
    (pool,) = (node for node in graph_def.node if node.name == 'pool_3')
    pool.op = 'MaxPool'  # a maximum is no mean
    (odd_files / 'max').write_bytes(graph_def.SerializeToString())
    monkeypatch.chdir(odd_files)
    label.fails(f'^--heatmap: {message}', f'--heatmap={heatmap}', files=files.split())
    assert not (odd_files / 'o.png').exists()


# Damaged files


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(['data/cat/cat 0.jpg', GRAPH, LABELS]),
    st.binary(max_size=200),
    st.integers(0, 300_000),
    st.booleans(),
)
@example(GRAPH, b'', 0, True)
@example(LABELS, b'\xff', 0, True)
@example(GRAPH, bytes(10) + b'}', 19709, False)  # scores that are not finite
def test_fuzzed_labelling(trained, tmp_path, file, junk, at, cut):
    """Whatever is in the three files, the result is scores, or an error that the script prints."""
    paths = {name: trained.folder / name for name in ('data/cat/cat 0.jpg', *FILES)}
    contents = paths[file].read_bytes()
    at %= len(contents)
    paths[file] = tmp_path / 'damaged'
    paths[file].write_bytes(contents[:at] + junk + (b'' if cut else contents[at + len(junk) :]))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            tf_test.label_images(parse('--json', *paths.values()))
        except (tf_test.UserError, tf.errors.OpError, LookupError, TypeError, ValueError) as error:
            assert str(error)
            assert '"scores"' not in out.getvalue()
        else:
            scores = json.loads(out.getvalue())['scores']
            assert len(scores) == 3
            assert sum(scores) == pytest.approx(1, abs=1e-4)


NAME = st.text(min_size=1, max_size=40).filter(lambda name: '\0' not in name and '/' not in name)


@settings(max_examples=200, deadline=None)
@given(st.lists(NAME, min_size=1))
def test_fuzzed_labels(tmp_path_factory, folders):
    """Labels come back from the labels file as they were, whatever the names of the folders are."""
    labels = list(filter(None, map(tf_retrain.get_label, folders)))
    path = tmp_path_factory.getbasetemp() / 'labels.txt'
    path.write_bytes(''.join(f'{label}\n' for label in labels).encode())
    assert tf_test.load_labels(str(path)) == labels
