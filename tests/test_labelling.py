"""tf_test.py: one image or many, in words or in JSON, sorted into folders, drawn as a heatmap."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys

import forks
import numpy as np
import pytest
from helpers import ROOT, build_model, run, run_new, run_v1, run_v1_on_all, write_photographs
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import tf_retrain
import tf_test

tf = tf_test.tf
GRAPH, LABELS = FILES = 'trained_model/unoptimized_model.pb', 'trained_model/labels.txt'
NAMES = ['red fox', 'cat', 'dog']
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
        assert err == ''
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


def compute_scores(trained, paths):
    """Returns the scores of images, float [N, classes], by the graph that takes one at a time."""
    images = [(trained.folder / path).read_bytes() for path in paths]
    return np.concatenate(run_v1_on_all(trained.graph(), images, 'final_result:0'))


def check_table(lines, paths, scores):
    """Checks that there is a line for each image, with its path, its best label and that score."""
    rows = [line.split('\t') for line in lines]
    found_paths, found_labels, found_scores = zip(*rows, strict=True)
    assert list(found_paths) == list(map(str, paths))
    assert list(found_labels) == [NAMES[index] for index in scores.argmax(axis=1)]
    np.testing.assert_allclose(np.float64(found_scores), scores.max(axis=1), atol=2e-5)


def test_every_class_with_its_score_the_best_first(trained, label):
    image = trained.test_image()
    process = run('tf_test.py', image, *FILES, cwd=trained.folder)
    assert process.stderr == ''
    lines = process.stdout.splitlines()
    matches = [re.fullmatch(r'(.+) \(score = (\d\.\d{5})\)', line) for line in lines]
    (scores,) = compute_scores(trained, [image])
    assert [match[1] for match in matches] == [NAMES[index] for index in np.argsort(-scores)]
    found = [float(match[2]) for match in matches]
    np.testing.assert_allclose(found, sorted(scores, reverse=True), atol=1e-5)
    assert label(image, '--top=2') == lines[:2]


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
    with Image.open(folder / 'b/b 0.jpg') as image:
        image.save(folder / 'c.PNG')
    process = run('tf_test.py', folder, *FILES, cwd=trained.folder, check=False)
    assert process.returncode == 1
    advice = 'Save it as JPEG, PNG or still GIF.'
    assert process.stderr.splitlines() == [
        f"ERROR: '{folder}/a/deep/0.jpg' is not an image that the graph decodes. {advice}",
        'ERROR: 1 of 82 images could not be labeled.',
    ]
    paths = sorted([*folder.glob('a/deep/deep*'), *folder.glob('b/*.jpg'), folder / 'c.PNG'])
    check_table(process.stdout.splitlines(), paths, compute_scores(trained, paths))


def test_paths_from_standard_input_beside_arguments(trained):
    """Flags may stand between them."""
    paths = sorted(path.relative_to(trained.folder) for path in trained.data.rglob('*.jpg'))[:70:10]
    first, *inner, last = map(str, paths)
    arguments = first, '-', '--top', '3', last, *FILES
    text = '\n'.join(inner) + '\n\n'
    process = run_new('tf_test.py', *arguments, cwd=trained.folder, input=text)
    assert process.stderr == ''
    rows = [line.split('\t') for line in process.stdout.splitlines()]
    assert {len(row) for row in rows} == {7}
    best = ['\t'.join(row[:3]) for row in rows]
    check_table(best, paths, compute_scores(trained, paths))


def test_json_lines(trained, label, tmp_path):
    bad = str(tmp_path / 'bad.jpg')
    (tmp_path / 'bad.jpg').write_text('<html>')
    images = list(map(str, trained.test_images()[:3]))
    out, err = label.fails('1 of 4 images could not be labeled', '--json', *images, bad)
    assert err == ''
    *found, failed = map(json.loads, out.splitlines())
    for image, result, scores in zip(images, found, compute_scores(trained, images), strict=True):
        assert list(result) == ['image', 'labels', 'scores', 'familiarity']
        assert result['image'] == image
        assert result['labels'] == [NAMES[index] for index in np.argsort(-scores)]
        np.testing.assert_allclose(result['scores'], sorted(scores, reverse=True), atol=1e-5)
        (alone,) = map(json.loads, label('--json', '--top=1', image))
        assert alone['labels'] == result['labels'][:1]
    assert failed['image'] == bad
    assert 'is not an image that the graph decodes' in failed['error']
    out, err = label.fails('1 of 1 images could not be labeled', '--json', bad)
    assert json.loads(out) == failed


def test_sorting_links_and_never_overwrites(label, tmp_path):
    for name in ('1', '2'):
        write_photographs(tmp_path / name, 'cat', 3, RED)
    with Image.open(tmp_path / '2/cat/cat 0.jpg') as image:
        image.transpose(Image.Transpose.ROTATE_180).save(tmp_path / '2/cat/cat 0.jpg')
    target = tmp_path / 'sorted/cat'
    target.mkdir(parents=True)
    (target / 'cat 1.jpg').write_text('mine')
    before = {path: path.read_bytes() for path in tmp_path.rglob('*.jpg')}
    for _ in range(2):  # a second run finds the images where they are, as does an equal image
        label(tmp_path, f'--sort_into={tmp_path}/sorted')
        assert {path: path.read_bytes() for path in before} == before
        names = sorted(path.name for path in target.iterdir())
        assert names == [f'cat {name}.jpg' for name in ('0 2', '0', '1 2', '1', '2')]
    linked = {path.stat().st_ino for path in target.iterdir()}
    assert linked < {path.stat().st_ino for path in before}


def test_unsure_images_and_copies_where_links_are_impossible(trained, label, tmp_path, monkeypatch):
    image = trained.test_image()
    (scores,) = compute_scores(trained, [image])
    wanted, score = NAMES[scores.argmax()], scores.max()

    def refuse(*arguments):
        raise OSError('Operation not permitted')

    monkeypatch.setattr(os, 'link', refuse)
    for limit, name in ((score - 0.01, wanted), (min(1, score + 0.01), 'unsure')):
        flags = f'--sort_into={tmp_path}', f'--min_score={limit}'
        assert label(image, *flags)[0].startswith(f'{name} (score = ')
        assert [line.split('\t')[1] for line in label(image, image, *flags)] == [name, name]
        assert json.loads(label(image, *flags, '--json')[0])['labels'][0] == wanted
        (copy,) = (tmp_path / name).iterdir()
        assert copy.read_bytes() == image.read_bytes()


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
    (line,) = err.splitlines()
    assert 'ERROR: --sort_into: ' in line and 'File name too long' in line
    assert len(out.splitlines()) == 3
    assert sorted(os.listdir(tmp_path / 'out/cat')) == ['3 0.jpg', long_name]

    def fail(*arguments):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'link', fail)
    monkeypatch.setattr(os, 'rename', fail)
    label.fails('3 of 3 images', tmp_path / 'in', f'--sort_into={tmp_path}/full')
    assert os.listdir(tmp_path / 'full/cat') == []


@pytest.mark.parametrize('path', ['image', *FILES])
def test_nothing_that_is_read_is_written(trained, label, path):
    image = trained.test_image()
    path = image if path == 'image' else trained.folder / path
    before = path.read_bytes()
    label.fails('^--heatmap: .* is read. Name another file', f'--heatmap={path}', image)
    assert path.read_bytes() == before
    label.fails('^--sort_into: .* is read. Name another folder', '--sort_into=data', 'data/')


def test_paths_with_nul_after_each(trained):
    """That is what find -print0 writes, also of names with a newline."""
    paths = sorted(trained.data.rglob('*.jpg'))[:3]
    odd = trained.folder / 'odd\nname.jpg'
    odd.write_bytes(paths[0].read_bytes())
    text = ''.join(f'{path}\0' for path in (*paths, odd))
    process = run_new('tf_test.py', '-', *FILES, cwd=trained.folder, input=text)
    lines = process.stdout.splitlines()
    assert [line.split('\t')[0] for line in lines[:3]] == list(map(str, paths))
    assert lines[3].split('\t')[0] == str(odd).replace('\n', '\\n')


def test_names_that_are_not_utf_8(trained, tmp_path):
    """Such an image is labeled as any other, and a missing one is named."""
    folder = os.fsencode(tmp_path / 'in')
    os.mkdir(folder)
    with open(os.path.join(folder, b'\xff.jpg'), 'wb') as file:
        file.write(trained.test_image().read_bytes())
    arguments = tmp_path / 'in', os.fsdecode(b'\xfe.jpg'), *FILES
    process = run('tf_test.py', *arguments, cwd=trained.folder, check=False)
    assert len(process.stdout.splitlines()) == 1
    failure, summary = process.stderr.splitlines()
    assert 'cannot be read' in failure
    assert summary == 'ERROR: 1 of 2 images could not be labeled.'


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


def test_a_label_called_unsure(trained, label, tmp_path):
    (tmp_path / 'l.txt').write_text('red fox\nunsure\ndog\n')
    files = GRAPH, tmp_path / 'l.txt'
    label.fails(
        "^--min_score: one of the labels is 'unsure'", '--min_score=0.5', 'data', files=files
    )


@pytest.mark.parametrize('position', [0, 1, 2])
def test_only_plain_files_are_opened(trained, label, position):
    if not (trained.folder / 'fifo').exists():
        os.mkfifo(trained.folder / 'fifo')
    files = [trained.test_image(), *FILES]
    files[position] = 'fifo'
    label.fails(
        "The (image|graph|labels file) 'fifo' cannot be read: only plain files are",
        files[0],
        files=files[1:],
    )


def test_a_score_equal_to_min_score_is_enough(trained, label):
    image = trained.test_image()
    answer = json.loads(label(image, '--json')[0])
    lines = label(image, f'--min_score={answer["scores"][0]!r}')
    assert lines[0].startswith(f'{answer["labels"][0]} (score = ')


@pytest.mark.parametrize('name', ['..', '', 'a/b', '.hidden'])
def test_a_label_never_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / 'x.jpg').write_text('x')
    tf_test.place(str(tmp_path / 'x.jpg'), name, str(tmp_path / 'sorted'))
    (found,) = (tmp_path / 'sorted').rglob('x.jpg')
    assert found.parent.parent == tmp_path / 'sorted'


@pytest.mark.parametrize('screens', [{'stderr'}, {'stderr', 'stdout'}, {'stdout'}])
def test_a_bar_where_only_the_output_goes_elsewhere(trained, monkeypatch, capsys, screens):
    monkeypatch.chdir(trained.folder)
    for name in screens:
        monkeypatch.setattr(getattr(sys, name), 'isatty', lambda: True)
    tf_test.label_images(parse('data', *FILES))
    out, err = capsys.readouterr()
    assert ('145image' in err) == (screens == {'stderr'})
    assert out.count('\n') == 145


@pytest.mark.parametrize(
    ('images', 'reader'), [('data', 'head -1'), ('"data/cat/cat 0.jpg"', 'true')]
)
def test_a_reader_may_close_the_pipe_early(trained, images, reader):
    command = f'{sys.executable} {ROOT / "tf_test.py"} {images} {" ".join(FILES)} | {reader}'
    process = subprocess.run(
        command, shell=True, cwd=trained.folder, capture_output=True, text=True, timeout=120
    )
    assert process.stderr == ''
    assert len(process.stdout.splitlines()) == (reader != 'true')


def test_closed_streams(trained):
    command = f'{sys.executable} {ROOT / "tf_test.py"} data {" ".join(FILES)} <&- >&- 2>&-'
    assert subprocess.run(command, shell=True, cwd=trained.folder, timeout=120).returncode == 0


MODEL = 'inception/classify_image_graph_def.pb'  # with a softmax of its own
NO_IMAGE = 'is not an image that the graph decodes. Save it as JPEG, PNG or still GIF.'
NO_GRAPH = 'is not a graph with a node DecodeJpeg/contents. Name the --output_graph of the training'
ONE_TRAINING = 'Name files of one training.'
ERRORS = [
    ('absent.jpg', GRAPH, LABELS, "The image 'absent.jpg' cannot be read: "),
    ('folder', GRAPH, LABELS, 'There is no image in folder. '),
    (LABELS, GRAPH, LABELS, f"'{LABELS}' {NO_IMAGE}"),
    ('empty', GRAPH, LABELS, f"'empty' {NO_IMAGE}"),
    ('pipe', GRAPH, LABELS, "The image 'pipe' cannot be read: only plain files are."),
    (os.devnull, GRAPH, LABELS, "The image '/dev/null' cannot be read: only plain files are."),
    ('huge.png', GRAPH, LABELS, "'huge.png' has 400,000,000 pixels. Make it smaller: "),
    ('cat.jpg', 'absent.pb', LABELS, "The graph 'absent.pb' cannot be read: "),
    ('cat.jpg', LABELS, LABELS, f"'{LABELS}' {NO_GRAPH}"),
    ('cat.jpg', 'empty', LABELS, f"'empty' {NO_GRAPH}"),
    ('cat.jpg', GRAPH, 'absent.txt', "The labels file 'absent.txt' cannot be read: "),
    ('cat.jpg', GRAPH, GRAPH, f"The labels file '{GRAPH}' is not text. "),
    ('cat.jpg', GRAPH, 'empty', f"'empty' has 0 labels, but '{GRAPH}' has 3 cl"),
    ('cat.jpg', MODEL, LABELS, f"'{LABELS}' has 3 labels, but '{MODEL}' has 10 cl"),
]


@pytest.fixture(scope='module')
def odd_files(trained, tmp_path_factory):
    """A folder with a photograph, a graph, labels, and files that are nothing of this."""
    folder = tmp_path_factory.mktemp('odd')
    write_photographs(folder, 'cat', 1, RED)
    (folder / 'cat/cat 0.jpg').rename(folder / 'cat.jpg')
    (folder / 'empty').touch()
    (folder / 'folder').mkdir()
    os.mkfifo(folder / 'pipe')  # nobody writes into it: it would be waited for
    Image.new('1', (20_000, 20_000)).save(folder / 'huge.png')  # it would take all memory
    for name in ('trained_model', 'inception'):
        (folder / name).symlink_to(trained.folder / name)
    return folder


@pytest.mark.parametrize(('image', 'graph', 'labels', 'message'), ERRORS)
def test_errors(odd_files, label, monkeypatch, image, graph, labels, message):
    monkeypatch.chdir(odd_files)
    printed = label.fails(f'^{re.escape(message)}', image, files=(graph, labels))
    assert printed == ('', '')


@pytest.mark.parametrize('image', ['empty', 'absent.jpg'])
def test_an_error_is_one_line_and_exit_code_1(odd_files, image):
    process = run('tf_test.py', image, *FILES, cwd=odd_files, check=False)
    assert process.returncode == 1
    assert process.stdout == ''
    assert re.fullmatch(rf"ERROR: .*'{image}'.*\n", process.stderr)


def test_images_that_are_refused_do_not_stop_the_others(odd_files, label, monkeypatch):
    monkeypatch.chdir(odd_files)
    images = 'pipe', 'cat.jpg', 'huge.png', 'absent.jpg'
    out, err = label.fails('3 of 4 images could not be labeled', *images)
    assert out.startswith('cat.jpg\tcat\t')
    assert out.count('\n') == 1
    reasons = ['only plain files are', 'has 400,000,000 pixels', 'No such file']
    for line, reason in zip(err.splitlines(), reasons, strict=True):
        assert line.startswith('ERROR: ')
        assert reason in line


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


@pytest.fixture(scope='module')
def halves(tmp_path_factory):
    """A graph that sees a cat in every red pixel, and a photograph whose right half is red."""
    folder = tmp_path_factory.mktemp('halves')
    graph_def, bottleneck = build_model(), 'pool_3/_reshape'
    network = tf.compat.v1.graph_util.extract_sub_graph(graph_def, [bottleneck])
    backbone = tf_retrain.Backbone('x', network, 0, bottleneck, 2048, None)
    gray = 128, 128, 128
    picture = Image.new('RGB', (120, 90), gray)
    picture.paste(RED, (60, 0, 120, 90))
    picture.save(folder / 'half.png')
    bottlenecks = []
    for colour in (RED, gray):
        Image.new('RGB', (50, 50), colour).save(png := io.BytesIO(), 'PNG')
        bottlenecks.append(run_v1(graph_def, png.getvalue(), f'{bottleneck}:0')[0])
    cat, nothing = bottlenecks
    direction = cat - nothing * (cat @ nothing) / (nothing @ nothing)  # gray counts for nothing
    layer = tf_retrain.FinalLayer(2048, 2, 0.01, np.array([1, 2]))
    layer.weights = np.stack([direction, -direction], 1)
    head = tf_retrain.Head(layer, ['cat', 'nothing'])
    frozen = tf_retrain.create_frozen_graph(backbone, head, 'final_result')
    (folder / 'g.pb').write_bytes(frozen.SerializeToString())
    (folder / 'l.txt').write_text('cat\nnothing\n')
    return folder


def test_the_heatmap_shows_the_half_that_decides(halves):
    run('tf_test.py', '--heatmap', 'out.png', 'half.png', 'g.pb', 'l.txt', cwd=halves)
    with Image.open(halves / 'out.png') as picture:
        assert picture.size == (120, 24 + 90 + 24)  # title, photograph, scale
        pixels = np.asarray(picture, int)[24:-24]
    red = pixels[:, :, 0] - pixels[:, :, 1]
    assert red[:, 60:].sum() > 0.8 * red.sum() > 0


def test_the_mean_of_the_positions_is_the_logit(trained):
    """The class activation map of each class adds up to what the graph itself computes."""
    graph = tf_test.load_graph(str(trained.folder / GRAPH))
    assert graph.labels == NAMES
    contents = trained.test_image().read_bytes()
    (logits,) = run_v1(graph.graph_def, contents, 'final_training_ops/Wx_plus_b/MatMul:0')
    heatmaps = [tf_test.compute_heatmap(graph, contents, index) for index in range(3)]
    assert np.shape(heatmaps) == (3, 6, 6)
    np.testing.assert_allclose(np.mean(heatmaps, axis=(1, 2)), logits, rtol=1e-3, atol=1e-4)


def test_heatmaps_of_each_network(networks, label, tmp_path):
    """All of these end in the mean of a map, and affine ops after it."""
    files = [networks.folder / name for name in FILES]
    label(f'--heatmap={tmp_path}/h.png', networks.test_image(), files=files)
    with Image.open(tmp_path / 'h.png') as picture:
        assert picture.height == 30 + 24 + 24


@pytest.mark.parametrize(
    ('heatmap', 'image', 'graph', 'message'),
    [
        ('o.png', 'half.png', 'max.pb', 'this network has no class activation map'),
        ('no/o.png', 'half.png', 'g.pb', r'.* Name a file such as heatmap\.png'),
        ('o.png', '.', 'g.pb', 'name one image'),
    ],
)
def test_heatmaps_that_are_impossible(halves, label, monkeypatch, heatmap, image, graph, message):
    graph_def = tf.compat.v1.GraphDef.FromString((halves / 'g.pb').read_bytes())
    (pool,) = (node for node in graph_def.node if node.name == 'pool_3')
    pool.op = 'MaxPool'  # a maximum is no mean
    (halves / 'max.pb').write_bytes(graph_def.SerializeToString())
    monkeypatch.chdir(halves)
    label.fails(f'^--heatmap: {message}', f'--heatmap={heatmap}', image, files=(graph, 'l.txt'))
    assert not (halves / 'o.png').exists()


# Damaged files


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(['image', 'graph', 'labels']),
    st.binary(max_size=200),
    st.integers(0, 300_000),
    st.booleans(),
)
@example('graph', b'', 0, True)
@example('labels', b'\xff', 0, True)
@example('graph', bytes(10) + b'}', 19732, False)  # scores that are not finite
def test_fuzzed_labelling(trained, tmp_path, which, junk, at, cut):
    """Whatever is in the three files, the result is scores, or an error that the script prints."""
    files = {'image': trained.data / 'cat/cat 0.jpg'}
    files |= {'graph': trained.folder / GRAPH, 'labels': trained.folder / LABELS}
    contents = files[which].read_bytes()
    at %= len(contents)
    rest = b'' if cut else contents[at + len(junk) :]
    files[which] = tmp_path / which
    files[which].write_bytes(contents[:at] + junk + rest)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            tf_test.label_images(parse('--json', *files.values()))
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
    labels = [label for name in folders if (label := tf_retrain.get_label(name))]
    path = tmp_path_factory.getbasetemp() / 'labels.txt'
    path.write_bytes(''.join(f'{label}\n' for label in labels).encode())
    assert tf_test.load_labels(str(path)) == labels
