"""tf_test.py: one image or many, in words or in JSON, sorted into folders, or drawn as a heatmap."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
from helpers import ROOT, build_model, get_scores, run, run_new, run_v1, write_photographs
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import tf_retrain
import tf_test

tf = tf_test.tf
GRAPH, LABELS = 'trained_model/unoptimized_model.pb', 'trained_model/labels.txt'
NAMES = ['red fox', 'cat', 'dog']


def label(trained, *arguments, check=True):
    return run('tf_test.py', *arguments, GRAPH, LABELS, cwd=trained.folder, check=check)


def expect(trained, paths):
    """Returns label and score of images, by the graph that runs one at a time."""
    scores = [
        run_v1(trained.graph(), (trained.folder / path).read_bytes(), 'final_result:0')[0]
        for path in paths
    ]
    return [(NAMES[row.argmax()], row.max()) for row in scores]


def test_every_class_with_its_score_the_best_first(trained):
    image = trained.test_image()
    process = label(trained, image)
    assert process.stderr == ''
    lines = [
        re.fullmatch(r'(.+) \(score = (\d\.\d{5})\)', line) for line in process.stdout.splitlines()
    ]
    scores = run_v1(trained.graph(), image.read_bytes(), 'final_result:0')[0]
    assert [line[1] for line in lines] == [NAMES[i] for i in np.argsort(-scores)]
    np.testing.assert_allclose(
        [float(line[2]) for line in lines], sorted(scores, reverse=True), atol=1e-5
    )
    assert label(trained, image, '--top=2').stdout.splitlines() == process.stdout.splitlines()[:2]


@pytest.fixture(scope='module')
def mixed(trained, tmp_path_factory):
    """A folder of photographs in folders, with files that are no images among them."""
    folder = tmp_path_factory.mktemp('mixed')
    for name, colour in {
        'b': (200, 60, 60),
        'deep': (60, 60, 200),
        '.hidden': (60, 200, 60),
    }.items():
        write_photographs(folder / 'a' if name == 'deep' else folder, name, 40, colour)
    (folder / 'a/deep/0.jpg').write_text('not an image')
    (folder / 'b/notes.txt').write_text('not tried')
    (folder / '.x.jpg').touch()
    (folder / 'a/back').symlink_to(folder)
    with Image.open(folder / 'b/b 0.jpg') as image:
        image.save(folder / 'c.PNG')
    return folder


def test_a_folder_gives_a_line_per_image_in_order(trained, mixed):
    process = label(trained, mixed, check=False)
    assert process.returncode == 1
    assert process.stderr.splitlines() == [
        f"ERROR: '{mixed}/a/deep/0.jpg' is not an image that the graph decodes. Save it as JPEG, PNG or still GIF.",
        'ERROR: 1 of 82 images could not be labeled.',
    ]
    lines = [line.split('\t') for line in process.stdout.splitlines()]
    paths = sorted([*mixed.glob('a/deep/deep*'), *mixed.glob('b/*.jpg'), mixed / 'c.PNG'])
    assert [line[0] for line in lines] == list(map(str, paths))
    expected = expect(trained, paths)
    assert [line[1] for line in lines] == [name for name, _ in expected]
    np.testing.assert_allclose(
        [float(line[2]) for line in lines], [score for _, score in expected], atol=2e-5
    )


def test_paths_from_standard_input_beside_arguments(trained):
    names = [
        str(path.relative_to(trained.folder))
        for path in sorted(trained.data.rglob('*.jpg'))[:70:10]
    ]
    text = '\n'.join(names[1:-1]) + '\n\n'
    arguments = names[0], '-', names[-1], GRAPH, LABELS, '--top', '3'
    process = run_new('tf_test.py', *arguments, cwd=trained.folder, input=text)
    lines = [line.split('\t') for line in process.stdout.splitlines()]
    assert [line[0] for line in lines] == names
    assert {len(line) for line in lines} == {7}
    assert [line[1] for line in lines] == [name for name, _ in expect(trained, names)]


def test_json_lines(trained, tmp_path):
    (tmp_path / 'bad.jpg').write_text('<html>')
    images = [*map(str, trained.test_images()[:3]), str(tmp_path / 'bad.jpg')]
    process = label(trained, '--json', *images, check=False)
    assert process.returncode == 1
    *found, bad = map(json.loads, process.stdout.splitlines())
    for image, result in zip(images, found, strict=False):
        scores = get_scores(trained.graph(), open(image, 'rb').read())
        assert list(result) == ['image', 'labels', 'scores']
        assert (result['image'], result['labels']) == (
            image,
            [NAMES[i] for i in np.argsort(-scores)],
        )
        np.testing.assert_allclose(result['scores'], sorted(scores, reverse=True), atol=1e-5)
        (alone,) = map(json.loads, label(trained, '--json', '--top=1', image).stdout.splitlines())
        assert alone['labels'] == result['labels'][:1]
    assert bad['image'] == images[-1]
    assert 'is not an image that the graph decodes' in bad['error']
    process = label(trained, '--json', images[-1], check=False)
    assert (process.returncode, json.loads(process.stdout)) == (1, bad)


def test_sorting_links_and_never_overwrites(trained, tmp_path):
    for name in ('1', '2'):
        write_photographs(tmp_path / name, 'cat', 3, (200, 60, 60))
    with Image.open(tmp_path / '2/cat/cat 0.jpg') as image:
        image.transpose(Image.Transpose.ROTATE_180).save(tmp_path / '2/cat/cat 0.jpg')
    (tmp_path / 'sorted/cat').mkdir(parents=True)
    (tmp_path / 'sorted/cat/cat 1.jpg').write_text('mine')
    before = {path: path.read_bytes() for path in tmp_path.rglob('*.jpg')}
    for _ in range(2):  # a second run finds the images where they are
        label(trained, tmp_path, f'--sort_into={tmp_path}/sorted')
        assert {path: path.read_bytes() for path in before} == before
        names = sorted(path.name for path in (tmp_path / 'sorted/cat').iterdir())
        assert names == [f'cat {name}.jpg' for name in ('0 2', '0', '1 2', '1 3', '1', '2 2', '2')]
    inodes = {path.stat().st_ino for path in (tmp_path / 'sorted/cat').iterdir()}
    assert {path.stat().st_ino for path in before} == inodes


def test_unsure_images_and_copies_where_links_are_impossible(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(trained.folder)
    image = str(trained.test_image())
    (wanted, score) = expect(trained, [image])[0]

    def refuse(*arguments):
        raise OSError('Operation not permitted')

    monkeypatch.setattr(os, 'link', refuse)
    parser = tf_test.create_labeling_parser()
    for limit, name in ((score - 0.01, wanted), (min(1, score + 0.01), 'unsure')):
        arguments = [image, image, GRAPH, LABELS, f'--sort_into={tmp_path}', f'--min_score={limit}']
        tf_test.label_images(parser.parse_args(arguments[1:]))
        assert capsys.readouterr().out.startswith(f'{name} (score = ')
        tf_test.label_images(parser.parse_args(arguments))
        assert [line.split('\t')[1] for line in capsys.readouterr().out.splitlines()] == [
            name,
            name,
        ]
        tf_test.label_images(parser.parse_args([*arguments[1:], '--json']))
        assert json.loads(capsys.readouterr().out)['labels'][0] == wanted
        copies = list((tmp_path / name).iterdir())
        assert len(copies) == 4
        assert {path.read_bytes() for path in copies} == {open(image, 'rb').read()}


@pytest.mark.parametrize('name', ['..', '', 'a/b', '.hidden'])
def test_a_label_never_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / 'x.jpg').write_text('x')
    tf_test.place(str(tmp_path / 'x.jpg'), name, str(tmp_path / 'sorted'))
    (found,) = (tmp_path / 'sorted').rglob('x.jpg')
    assert found.parent.parent == tmp_path / 'sorted'


def test_a_bar_where_only_the_output_goes_elsewhere(trained):
    for to_file in (True, False):
        screen, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
        command = [sys.executable, str(ROOT / 'tf_test.py'), 'data', GRAPH, LABELS]
        out = subprocess.DEVNULL if to_file else terminal
        process = subprocess.Popen(command, cwd=trained.folder, stdout=out, stderr=terminal)
        os.close(terminal)
        shown = b''
        with contextlib.suppress(OSError):  # what Linux raises when the other side has closed
            while block := os.read(screen, 1 << 16):
                shown += block
        assert process.wait(timeout=60) == 0
        assert (b'image/s' in shown) == to_file
        assert (b'\tcat\t' in shown) != to_file


@pytest.mark.parametrize('reader', ['true', 'head -1'])
@pytest.mark.parametrize('images', ['data', 'data/cat/*0.jpg', '"data/cat/cat 0.jpg"'])
def test_a_reader_that_has_enough_ends_it_quietly(trained, reader, images):
    command = f'{sys.executable} {ROOT / "tf_test.py"} {images} {GRAPH} {LABELS} | {reader}'
    process = subprocess.run(
        command, shell=True, cwd=trained.folder, capture_output=True, text=True, timeout=60
    )
    assert process.stderr == ''
    assert len(process.stdout.splitlines()) == (reader != 'true')


def test_closed_streams(trained):
    command = f'{sys.executable} {ROOT / "tf_test.py"} data {GRAPH} {LABELS} <&- >&- 2>&-'
    assert subprocess.run(command, shell=True, cwd=trained.folder, timeout=60).returncode == 0


ERRORS = [
    ('absent.jpg', GRAPH, LABELS, r"The image 'absent\.jpg' cannot be read: .*"),
    ('folder', GRAPH, LABELS, r'There is no image in folder\. .*'),
    (
        LABELS,
        GRAPH,
        LABELS,
        rf"'{LABELS}' is not an image that the graph decodes\. Save it as JPEG, .*",
    ),
    ('empty', GRAPH, LABELS, r"'empty' is not an image that the graph decodes\. .*"),
    ('pipe', GRAPH, LABELS, r"The image 'pipe' cannot be read: only plain files are\."),
    ('/dev/stdin', GRAPH, LABELS, r"The image '/dev/stdin' cannot be read: only plain files are\."),
    ('huge.png', GRAPH, LABELS, r"'huge.png' has 400,000,000 pixels\. Make it smaller: .*"),
    ('cat.jpg', 'absent.pb', LABELS, r"The graph 'absent\.pb' cannot be read: .*"),
    ('cat.jpg', LABELS, LABELS, rf"'{LABELS}' is not a graph with a node DecodeJpeg/contents\. .*"),
    ('cat.jpg', 'empty', LABELS, r"'empty' is not a graph with a node DecodeJpeg/contents\. .*"),
    ('cat.jpg', GRAPH, 'absent.txt', r"The labels file 'absent\.txt' cannot be read: .*"),
    ('cat.jpg', GRAPH, GRAPH, rf"The labels file '{GRAPH}' is not text\. .*"),
    ('cat.jpg', GRAPH, 'empty', rf"'empty' has 0 labels, but '{GRAPH}' has 3 classes\. .*"),
]


@pytest.mark.parametrize(('image', 'graph', 'labels', 'message'), ERRORS)
def test_errors_are_one_line(trained, tmp_path, image, graph, labels, message):
    write_photographs(tmp_path, 'cat', 1, (200, 60, 60))
    (tmp_path / 'cat.jpg').hardlink_to(tmp_path / 'cat/cat 0.jpg')
    (tmp_path / 'empty').touch()
    (tmp_path / 'folder').mkdir()
    os.mkfifo(tmp_path / 'pipe')
    Image.new('1', (20_000, 20_000)).save(tmp_path / 'huge.png')
    (tmp_path / 'trained_model').symlink_to(trained.folder / 'trained_model')
    arguments = 'tf_test.py', image, graph, labels
    if image == '/dev/stdin':
        process = run_new(*arguments, cwd=tmp_path, check=False, stdin=subprocess.PIPE)
    else:
        process = run(*arguments, cwd=tmp_path, check=False)
    assert process.returncode == 1
    assert process.stdout == ''
    assert re.fullmatch(f'ERROR: {message}\n', process.stderr), process.stderr


def test_images_that_are_refused_do_not_stop_the_others(trained, tmp_path):
    """A pipe that nobody writes into would be waited for, and a huge image would take all memory."""
    os.mkfifo(tmp_path / 'pipe.jpg')
    Image.new('1', (20_000, 20_000)).save(tmp_path / 'huge.png')
    images = [
        tmp_path / 'pipe.jpg',
        trained.test_image(),
        tmp_path / 'huge.png',
        tmp_path / 'absent.jpg',
    ]
    process = label(trained, *images, check=False)
    assert process.returncode == 1
    assert [line.split('\t')[0] for line in process.stdout.splitlines()] == [
        str(trained.test_image())
    ]
    reasons = [
        'only plain files are.',
        'has 400,000,000 pixels',
        'No such file',
        '3 of 4 images could not be labeled',
    ]
    for line, reason in zip(process.stderr.splitlines(), reasons, strict=True):
        assert reason in line


def test_the_old_model_itself_is_answered_clearly(trained):
    """The graph of --model_dir has a softmax of 10 classes of its own."""
    graph = 'inception/classify_image_graph_def.pb'
    process = run(
        'tf_test.py', trained.test_image(), graph, LABELS, cwd=trained.folder, check=False
    )
    assert process.returncode == 1
    message = f"ERROR: '{LABELS}' has 3 labels, but '{graph}' has 10 classes. Name files of one training.\n"
    assert process.stderr == message


def test_a_blank_last_line_and_a_mark_at_the_start_of_the_labels(trained, tmp_path):
    (tmp_path / 'labels.txt').write_bytes(b'\xef\xbb\xbfred fox\r\ncat\r\ndog\r\n\r\n')
    image = trained.test_image()
    process = run('tf_test.py', image, GRAPH, tmp_path / 'labels.txt', cwd=trained.folder)
    assert process.stdout == label(trained, image).stdout


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('', 'the following arguments are required: IMAGE, GRAPH, LABELS'),
        ('a b c --top=0', '1 or more'),
        ('a b c --min_score=2', 'from 0 to 1'),
        ('a b c --tip=1', 'unrecognized arguments: --tip=1'),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments, message):
    process = run_new('tf_test.py', *arguments.split(), check=False)
    assert process.returncode == 2
    assert message in process.stderr.splitlines()[-1]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(trained):
    """Standard input names an image again and again."""

    def measure(count):
        code = 'import resource, runpy, sys; del sys.argv[0]\ntry: runpy.run_path(sys.argv[0], run_name="__main__")\n'
        code += (
            'finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)'
        )
        command = [sys.executable, '-c', code, str(ROOT / 'tf_test.py'), '-', GRAPH, LABELS]
        text = f'{trained.test_image()}\n' * count
        process = subprocess.run(
            command, input=text, cwd=trained.folder, capture_output=True, text=True, check=True
        )
        assert len(process.stdout.splitlines()) == count
        return int(process.stderr) * 1024

    assert (
        measure(10_000) - measure(1000) < 100e6
    )  # the images themselves take 9 GB when they are resized


# Heatmaps


@pytest.fixture(scope='module')
def halves(tmp_path_factory):
    """A graph that sees a cat in every red pixel, and a photograph whose right half is red."""
    folder = tmp_path_factory.mktemp('halves')
    graph_def = build_model()
    backbone = tf_retrain.Backbone(
        'x',
        tf.compat.v1.graph_util.extract_sub_graph(graph_def, ['pool_3/_reshape']),
        0,
        'pool_3/_reshape',
        2048,
        None,
    )
    pixels = np.full([90, 120, 3], 128, np.uint8)
    pixels[:, 60:] = 200, 60, 60
    Image.fromarray(pixels).save(folder / 'half.png')
    layer = tf_retrain.FinalLayer(2048, 2, 0.01, np.array([1, 2]))
    bottlenecks = []
    for colour in ((200, 60, 60), (128, 128, 128)):
        Image.new('RGB', (50, 50), colour).save(folder / 'x.png')
        bottlenecks.append(
            run_v1(graph_def, (folder / 'x.png').read_bytes(), 'pool_3/_reshape:0')[0]
        )
    cat, grey = bottlenecks
    direction = cat - grey * (cat @ grey) / (grey @ grey)  # in which grey counts for nothing
    layer.weights = np.stack([direction, -direction], 1)
    frozen = tf_retrain.create_frozen_graph(backbone, layer, 'final_result')
    (folder / 'g.pb').write_bytes(frozen.SerializeToString())
    (folder / 'l.txt').write_text('cat\nnothing\n')
    return folder


def test_the_heatmap_shows_the_half_that_decides(halves):
    graph_def = tf_test.load_graph(str(halves / 'g.pb'))
    contents = (halves / 'half.png').read_bytes()
    heatmap = np.maximum(tf_test.compute_heatmap(graph_def, contents, 0), 0)
    assert heatmap.shape == (6, 6)
    assert heatmap[:, 3:].sum() > 0.8 * heatmap.sum() > 0
    run('tf_test.py', '--heatmap', 'out.png', 'half.png', 'g.pb', 'l.txt', cwd=halves)
    with Image.open(halves / 'out.png') as picture:
        assert picture.width == 120
        red = np.asarray(picture, int)[-90:, :, 0] - np.asarray(picture, int)[-90:, :, 1]
    assert red[:, 60:].sum() > 0.8 * red.sum() > 0


def test_the_mean_of_the_positions_is_the_logit(trained):
    """The class activation map of each class adds up to what the graph itself computes."""
    graph_def = tf_test.load_graph(str(trained.folder / GRAPH))
    contents = trained.test_image().read_bytes()
    scope = 'final_training_ops/Wx_plus_b'
    (product,) = run_v1(graph_def, contents, f'{scope}/MatMul:0')
    found = [tf_test.compute_heatmap(graph_def, contents, index).mean() for index in range(3)]
    np.testing.assert_allclose(found, product, rtol=1e-3, atol=1e-4)


def test_heatmaps_of_each_network(networks):
    """All of these end in the mean of a map, and affine ops after it."""
    process = run(
        'tf_test.py', '--heatmap=h.png', networks.test_image(), GRAPH, LABELS, cwd=networks.folder
    )
    assert process.stderr == ''
    with Image.open(networks.folder / 'h.png') as picture:
        assert picture.height == 30 + 24


def test_a_network_without_a_map_and_other_mistakes(trained, halves, tmp_path):
    graph_def = tf.compat.v1.GraphDef.FromString((halves / 'g.pb').read_bytes())
    for node in graph_def.node:
        if node.name == 'pool_3':  # a maximum is no mean
            node.op = 'MaxPool'
    (tmp_path / 'max.pb').write_bytes(graph_def.SerializeToString())
    for arguments, message in [
        (
            ['--heatmap=o.png', halves / 'half.png', tmp_path / 'max.pb'],
            'this network has no class activation map',
        ),
        (
            ['--heatmap=no/o.png', halves / 'half.png', halves / 'g.pb'],
            'Name a file such as heatmap.png',
        ),
        (['--heatmap=o.png', halves, halves / 'g.pb'], 'name one image'),
    ]:
        process = run('tf_test.py', *arguments, halves / 'l.txt', cwd=tmp_path, check=False)
        assert process.returncode == 1
        assert process.stderr.startswith('ERROR: --heatmap: ')
        assert message in process.stderr
        assert len(process.stderr.splitlines()) == 1


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
    """Whatever is in the three files, the answer is scores, or an error that the program prints as one line."""
    files = {
        'images': trained.data / 'cat/cat 0.jpg',
        'graph': trained.folder / GRAPH,
        'labels': trained.folder / LABELS,
    }
    key = 'images' if which == 'image' else which
    contents = files[key].read_bytes()
    at %= len(contents)
    (tmp_path / which).write_bytes(
        contents[:at] + junk + (b'' if cut else contents[at + len(junk) :])
    )
    files[key] = tmp_path / which
    flags = tf_test.create_labeling_parser().parse_args(list(map(str, files.values())))
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf_test, 'print_ranking', lambda path, ranking, *_: printed.extend(ranking))
        try:
            tf_test.label_images(flags)
        except (tf_test.UserError, tf.errors.OpError, LookupError, TypeError, ValueError) as error:
            assert str(error)
            assert not printed
        else:
            assert len(printed) == 3
            assert sum(score for _, score in printed) == pytest.approx(1, abs=1e-4)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(min_size=1, max_size=40).filter(lambda name: '\0' not in name and '/' not in name),
        min_size=1,
    )
)
def test_fuzzed_labels(tmp_path_factory, folders):
    """Labels come back from the labels file as they were, whatever the names of the folders are."""
    labels = [text for name in folders if (text := tf_retrain.get_label(name))]
    path = tmp_path_factory.getbasetemp() / 'labels.txt'
    path.write_bytes(''.join(f'{text}\n' for text in labels).encode(errors='surrogatepass'))
    if not any('\ud800' <= character <= '\udfff' for character in ''.join(labels)):
        assert tf_test.load_labels(str(path)) == labels
