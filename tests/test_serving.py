"""What retrain_serving.py adds: the SavedModel, its two signatures, and where it is written."""

import io
import os
import pathlib
import re
import shutil
import signal
import struct
import sys

import numpy as np
import pytest
from forks import Fork
from helpers import (
    COLOURS,
    ROOT,
    Job,
    check_familiarity,
    load_backbone,
    run,
    run_v1_on_all,
    write_photographs,
)
from PIL import Image

import retrain_serving

tf = retrain_serving.tf
# In the order of their folders, which is another one than their own.
LABELS = ['red fox', 'ant', '猫']
LABELS_IN_BYTES = np.array([label.encode() for label in LABELS], object)


@pytest.fixture(scope='module')
def served(tmp_path_factory, model):
    """A finished run of retrain_serving.py on three classes."""
    job = Job(tmp_path_factory.mktemp('served'), model)
    counts = {'Red_Fox': 60, 'ant': 60, '猫': 25}
    for (label, count), colour in zip(counts.items(), COLOURS, strict=False):
        write_photographs(job.data, label, count, colour, spread=15)
    job.saved_model = job.folder / 'trained_model_serving/1'
    flags = '--saved_model_dir=trained_model_serving/1', '--how_many_training_steps=10'
    job.process = job.run(*flags, script='retrain_serving.py')
    return job


@pytest.fixture(scope='module')
def signatures(served):
    return tf.saved_model.load(str(served.saved_model)).signatures


def parse(*arguments):
    return retrain_serving.parse_flags(retrain_serving.create_serving_parser(), list(arguments))


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope='module')
def photographs(served):
    """Twenty photographs, a PNG and a GIF, and their scores by the frozen graph."""
    images = [path.read_bytes() for path in sorted(served.data.rglob('*.jpg'))[::7]][:20]
    picture = Image.open(io.BytesIO(images[0]))
    images += [encode(picture, 'PNG'), encode(picture, 'GIF')]
    scores = np.concatenate(run_v1_on_all(served.graph(), images, 'final_result:0'))
    assert set(scores.argmax(axis=1)) == {0, 1, 2}
    return np.array(images, object), scores


def check_default(found, expected):
    """Checks outputs of serving_default against scores in the order of the labels."""
    np.testing.assert_array_equal(found['classes'], LABELS_IN_BYTES)
    np.testing.assert_allclose(found['prediction'], expected, atol=1e-5)


def check_rows(found, expected):
    """Checks outputs of predict_rows against the same."""
    labels = LABELS_IN_BYTES[np.argsort(-expected)]
    scores = -np.sort(-expected)
    np.testing.assert_array_equal(found['labels'], labels)
    np.testing.assert_array_equal(found['label'], labels[:, 0])
    np.testing.assert_allclose(found['scores'], scores, atol=1e-5)
    np.testing.assert_array_equal(found['score'], found['scores'][:, 0])


# What is written


def test_output(served):
    *_, logs, _, graph, usage, wrote, docker = served.process.stdout.splitlines()
    assert logs == 'To look at the training: tensorboard --logdir logs'
    assert 'trained_model/unoptimized_model.pb' in graph
    assert usage.startswith('python3 tf_test.py ')
    assert wrote == (
        'Wrote the SavedModel trained_model_serving/1. To serve it at http://localhost:8501 with '
        'Docker:'
    )
    volume = f'-v {served.folder}/trained_model_serving:/models/retrained'
    assert docker == f'docker run -p 8501:8501 {volume} -e MODEL_NAME=retrained tensorflow/serving'
    assert os.listdir(served.folder / 'trained_model_serving') == ['1']
    written = (served.folder / 'trained_model/labels.txt').read_text()
    assert written == ''.join(f'{label}\n' for label in LABELS)


def test_no_trace_of_the_machine_is_inside(served):
    for path in filter(pathlib.Path.is_file, served.saved_model.rglob('*')):
        contents = path.read_bytes()
        assert str(ROOT).encode() not in contents
        assert str(served.folder).encode() not in contents


# Its signatures, in this process and in one that has only TensorFlow


# Batches of none, three (as many as classes), and all; and of each image.
BATCHES = [slice(0), slice(3), slice(None), *(slice(i, i + 1) for i in range(22))]


# A number: no batch, as the original's clients send an image.
@pytest.mark.parametrize('which', [*range(22), *BATCHES])
def test_serving_default(signatures, photographs, which):
    images, expected = photographs
    found = signatures['serving_default'](image=tf.constant(images[which], tf.string))
    check_default(found, np.atleast_2d(expected[which]))


@pytest.mark.parametrize('which', BATCHES)
def test_predict_rows(served, signatures, photographs, which):
    images, expected = photographs
    found = signatures['predict_rows'](image=tf.constant(images[which], tf.string))
    check_rows(found, expected[which])
    if which == slice(None):
        check_familiarity(found['familiarity'].numpy(), served.graph(), images)


SAVED_MODEL_CLI = pathlib.Path(sys.executable).with_name('saved_model_cli')
SHOWN = """
signature_def['predict_rows']:
  The given SavedModel SignatureDef contains the following input(s):
    inputs['image'] DT_STRING (-1)
  The given SavedModel SignatureDef contains the following output(s):
    outputs['familiarity'] DT_FLOAT (-1)
    outputs['label'] DT_STRING (-1)
    outputs['labels'] DT_STRING (-1, 3)
    outputs['score'] DT_FLOAT (-1)
    outputs['scores'] DT_FLOAT (-1, 3)
  Method name is: tensorflow/serving/predict

signature_def['serving_default']:
  The given SavedModel SignatureDef contains the following input(s):
    inputs['image'] DT_STRING unknown_rank
  The given SavedModel SignatureDef contains the following output(s):
    outputs['classes'] DT_STRING (3)
    outputs['prediction'] DT_FLOAT (-1, 3)
  Method name is: tensorflow/serving/predict
"""


def test_saved_model_cli_shows_it(served):
    shown = run(SAVED_MODEL_CLI, 'show', '--dir', served.saved_model, '--all').stdout
    assert "MetaGraphDef with tag-set: 'serve'" in shown
    tensor = r' tensor_info:\n *dtype: (.*)\n *shape: (.*)\n *name: .*'
    assert SHOWN in re.sub(tensor, r' \1 \2', shown)


@pytest.mark.parametrize(
    ('signature', 'check', 'count'),
    [('serving_default', check_default, 1), ('predict_rows', check_rows, 2)],
)
def test_saved_model_cli_runs_it(served, photographs, tmp_path, signature, check, count):
    """Moved to another place: with one image as a text, and with two in a file."""
    images, expected = photographs
    np.save(tmp_path / 'images.npy', images[:2])
    literal = ''.join(f'\\x{byte:02x}' for byte in images[0])
    inputs = {1: ['--input_exprs', f"image=b'{literal}'"]}
    inputs[2] = ['--inputs', f'image={tmp_path}/images.npy']
    shutil.copytree(served.saved_model, tmp_path / 'moved')
    (tmp_path / 'out').mkdir()
    flags = '--dir', tmp_path / 'moved', '--tag_set', 'serve', '--signature_def', signature
    run(SAVED_MODEL_CLI, 'run', *flags, *inputs[count], '--outdir', tmp_path / 'out')
    outputs = {path.stem: np.load(path, allow_pickle=True) for path in tmp_path.glob('out/*.npy')}
    check(outputs, expected[:count])


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
JPEG = encode(PICTURE, 'JPEG')
WRONG = {
    'random': np.random.default_rng(0).bytes(2000),
    'empty': b'',
    'webp': encode(PICTURE, 'WEBP'),
    'bmp': encode(PICTURE, 'BMP'),
    'half a jpeg': JPEG[: len(JPEG) // 2],
    'head of a jpeg': JPEG[:20],
    'half a png': encode(PICTURE, 'PNG')[:1000],
}
REASONS = {
    'half a jpeg': 'Invalid JPEG data',
    'head of a jpeg': 'Invalid JPEG data',
    'half a png': 'Invalid PNG data',
}


@pytest.mark.parametrize('kind', WRONG)
def test_what_is_no_image_is_an_error(signatures, photographs, kind):
    """Always with the same reason, of all that could fail; and the next request is answered."""
    images, expected = photographs
    reason = REASONS.get(kind, 'The image is not JPEG, PNG or GIF. It starts with')
    for signature in signatures.values():
        for batch in ([WRONG[kind]], [images[0], WRONG[kind], images[1]]):
            with pytest.raises(tf.errors.InvalidArgumentError, match=reason):
                signature(image=tf.constant(batch))
    check_rows(signatures['predict_rows'](image=tf.constant(images[:2])), expected[:2])


@pytest.mark.parametrize(
    ('signature', 'image'), [('serving_default', WRONG['webp']), ('predict_rows', [WRONG['webp']])]
)
def test_the_reason_is_the_same_each_time(signatures, signature, image):
    """The check of the image comes before what else could fail."""
    for _ in range(200):
        with pytest.raises(tf.errors.InvalidArgumentError, match='JPEG, PNG or GIF'):
            signatures[signature](image=tf.constant(image))


@pytest.mark.parametrize('side', [20_000, 60_000])
@pytest.mark.parametrize(
    ('kind', 'start', 'layout'),
    [('PNG', 16, '>II'), ('GIF', 6, '<HH'), ('JPEG', JPEG.index(b'\xff\xc0') + 5, '>HH')],
)
def test_an_image_of_too_many_pixels_is_refused_by_its_header(
    signatures, kind, start, layout, side
):
    """They would take gigabytes to decode; 60,000 x 60,000 is negative in 32 bits."""
    contents = bytearray(encode(PICTURE, kind))
    struct.pack_into(layout, contents, start, side, side)
    for signature in signatures.values():
        with pytest.raises(tf.errors.InvalidArgumentError, match='more than 178,956,970 pixels'):
            signature(image=tf.constant([bytes(contents)]))


# Where it is written


def listing(folder):
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob('*')
    }


def serve(job):
    """Trains in this process, and writes version 7; returns what was printed."""
    job.monkeypatch.chdir(job.folder)
    retrain_serving.main_serving(parse(*job.arguments(saved_model_dir='versions/7/')))
    return job.capsys.readouterr().out


def write_other_version(job):
    version = job.folder / 'versions/7'
    version.mkdir(parents=True, exist_ok=True)
    (version / 'saved_model.pb').write_bytes(b'of another training')


def test_an_existing_version_is_left_alone(job):
    """It is found before any work."""
    write_other_version(job.photographs(cat=20, dog=20))
    before = listing(job.folder)
    with pytest.raises(
        retrain_serving.UserError,
        match="^--saved_model_dir: 'versions/7/' is not empty.* --saved_model_dir=versions/8$",
    ):
        serve(job)
    assert listing(job.folder) == before


def test_nothing_is_written_into_an_existing_version(job, monkeypatch):
    write_other_version(job)
    monkeypatch.chdir(job.folder)
    message = 'is inside of a SavedModel. Name --saved_model_dir=versions/8$'
    with pytest.raises(retrain_serving.UserError, match=message):
        retrain_serving.check_saved_model_dir('versions/7/2')
    monkeypatch.chdir('versions/7')
    for path in ('2', './2'):
        with pytest.raises(retrain_serving.UserError, match='Name --saved_model_dir=../8$'):
            retrain_serving.check_saved_model_dir(path)


@pytest.mark.parametrize('existing', [False, True])
def test_a_version_that_came_meanwhile_is_left_alone(job, monkeypatch, existing):
    if existing:
        (job.folder / 'versions/7').mkdir(parents=True)
    monkeypatch.setattr(retrain_serving, 'report_test', lambda *_: write_other_version(job))
    *_, wrote, docker = serve(job.photographs(cat=20, dog=20)).splitlines()
    assert wrote.startswith('Wrote the SavedModel versions/8. ')
    assert f'-v {job.folder}/versions:/models/retrained ' in docker
    assert sorted(os.listdir('versions')) == ['7', '8']
    assert os.listdir('versions/7') == ['saved_model.pb']
    assert pathlib.Path('versions/7/saved_model.pb').read_bytes() == b'of another training'
    assert tf.saved_model.contains_saved_model('versions/8')


def test_no_command_for_docker_where_there_is_no_version(job, monkeypatch):
    """TensorFlow Serving takes only numbers."""
    monkeypatch.chdir(job.folder)
    flags = job.photographs(cat=20, dog=20).arguments('--saved_model_dir=new/best')
    retrain_serving.main_serving(parse(*flags))
    out = job.capsys.readouterr().out
    assert out.endswith('Wrote the SavedModel new/best\n')
    assert 'docker' not in out


def test_a_version_that_comes_at_the_moment_of_the_rename(job, monkeypatch):
    """Two runs may end at once: the later one takes the next free version."""
    rename = retrain_serving.gfile.rename

    def come_first(source, target, overwrite=False):
        if target == 'versions/7':
            write_other_version(job)
        rename(source, target, overwrite)

    monkeypatch.setattr(retrain_serving.gfile, 'rename', come_first)
    *_, wrote, _ = serve(job.photographs(cat=20, dog=20)).splitlines()
    assert wrote.startswith('Wrote the SavedModel versions/8. ')
    assert pathlib.Path('versions/7/saved_model.pb').read_bytes() == b'of another training'
    assert sorted(os.listdir('versions')) == ['7', '8']


def test_ctrl_c_in_the_training_still_writes_a_version(job, monkeypatch):
    def interrupt(layer, *batch, train=retrain_serving.FinalLayer.train):
        if layer.steps == 3:
            raise KeyboardInterrupt
        return train(layer, *batch)

    monkeypatch.setattr(retrain_serving.FinalLayer, 'train', interrupt)
    out = serve(job.photographs(cat=20, dog=20))
    assert 'Ctrl-C: what was learned' in out
    assert 'Step 0:' in out
    assert 'Step 10:' not in out
    assert os.listdir('versions') == ['7']


@pytest.mark.parametrize('path', ['new/1/', 'new/1', '1', 'made/1', 'new/best'])
def test_where_a_version_can_be(tmp_path, monkeypatch, capsys, path):
    monkeypatch.chdir(tmp_path)
    os.makedirs('made/1')
    retrain_serving.check_saved_model_dir(path)
    warning = (
        'WARNING: TensorFlow Serving only serves folders with a number as name, unlike new/best\n'
    )
    assert capsys.readouterr().out == (warning if path == 'new/best' else '')


def test_a_version_below_the_one_that_is_served_is_a_warning(tmp_path, capsys):
    (tmp_path / '3').mkdir()
    retrain_serving.check_saved_model_dir(f'{tmp_path}/4')
    assert capsys.readouterr().out == ''
    retrain_serving.check_saved_model_dir(f'{tmp_path}/1/')
    line = f'and not {tmp_path}/1/. The next free one is --saved_model_dir={tmp_path}/4\n'
    assert capsys.readouterr().out.endswith(line)


@pytest.mark.parametrize('flag', ['output_labels', 'bottleneck_dir', 'summaries_dir', 'model_dir'])
def test_nothing_else_is_written_into_the_version(job, monkeypatch, flag):
    """Or it would no longer be empty in the end."""
    flags = job.photographs(cat=3, dog=3).arguments('--saved_model_dir=new/1', **{flag: 'new/1/x'})
    message = f'^--{flag}: new/1/x is in --saved_model_dir'
    monkeypatch.chdir(job.folder)
    with pytest.raises(retrain_serving.UserError, match=message):
        retrain_serving.main_serving(parse(*flags))
    assert not (job.folder / 'new').exists()


def test_an_output_is_not_above_the_version(job, monkeypatch):
    """Nor is the folder made: it would be in the way of the next command."""
    flags = job.photographs(cat=3, dog=3).arguments('--saved_model_dir=new/1', output_graph='new')
    monkeypatch.chdir(job.folder)
    message = "^--output_graph: 'new' is above --saved_model_dir. Name another file"
    with pytest.raises(retrain_serving.UserError, match=message):
        retrain_serving.main_serving(parse(*flags))
    assert not (job.folder / 'new').exists()


def test_the_root_is_no_place_for_a_model(job, monkeypatch):
    flags = job.photographs(cat=3, dog=3).arguments('--saved_model_dir=/')
    monkeypatch.chdir(job.folder)
    with pytest.raises(retrain_serving.UserError, match='^--saved_model_dir: / is no new folder'):
        retrain_serving.main_serving(parse(*flags))


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('file', "'file' is a file"),
        ('file/1', "nothing can be written in 'file'"),
        ('models [2026]/1', r"TensorFlow cannot load a model from 'models \[2026\]/1'"),
    ],
)
def test_where_no_version_can_be(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    pathlib.Path('file').touch()
    with pytest.raises(retrain_serving.UserError, match=f'--saved_model_dir.*{message}'):
        retrain_serving.check_saved_model_dir(path)
    assert os.listdir() == ['file']


@pytest.mark.parametrize(
    ('versions', 'free'),
    [(['best'], 1), (['best', '009', 'x3', '10.bak'], 10), (['best', '9', '10'], 11)],
)
def test_the_next_free_version_is_named(tmp_path, versions, free):
    for version in versions:
        (tmp_path / version / 'saved_model.pb').mkdir(parents=True)
    with pytest.raises(retrain_serving.UserError, match=f'--saved_model_dir={tmp_path}/{free}$'):
        retrain_serving.check_saved_model_dir(f'{tmp_path}/best/')


@pytest.mark.parametrize(('name', 'free'), [('1', 2), ('README.md', 1)])
def test_the_next_free_version_in_a_folder_of_versions_is_named(tmp_path, name, free):
    (tmp_path / 'served' / name).mkdir(parents=True)
    with pytest.raises(retrain_serving.UserError, match=f'_dir={tmp_path}/served/{free}$'):
        retrain_serving.check_saved_model_dir(f'{tmp_path}/served')


@pytest.fixture(scope='module')
def classifier(model):
    layer = retrain_serving.FinalLayer(2048, 2, 0.1, [1, 2])
    head = retrain_serving.Head(layer, ['cat', 'dog'])
    return retrain_serving.Classifier(load_backbone(model.parent), head)


def test_a_file_that_came_meanwhile_is_left_alone(tmp_path, classifier):
    (tmp_path / '1').touch()
    assert retrain_serving.write_saved_model(classifier, str(tmp_path / '1')) == str(tmp_path / '2')
    assert (tmp_path / '1').is_file()
    assert tf.saved_model.contains_saved_model(str(tmp_path / '2'))


@pytest.mark.parametrize('existing', [False, True])
def test_a_version_appears_whole(tmp_path, classifier, existing):
    version = tmp_path / '1'
    if existing:
        version.mkdir()
    seen = []

    def watch(frame, event, argument):
        """Looks into the folder after each call of a function in C: all that writes files is."""
        if event == 'c_return' and not seen and version.exists() and os.listdir(version):
            seen.append(listing(version))

    sys.setprofile(watch)
    try:
        written = retrain_serving.write_saved_model(classifier, f'{version}/')
    finally:
        sys.setprofile(None)
    assert written == str(version)
    assert seen == [listing(version)]
    names = {str(path.relative_to(version)) for path in seen[0]}
    variables = 'variables/variables.index', 'variables/variables.data-00000-of-00001'
    assert {'saved_model.pb', *variables} <= names
    assert os.listdir(tmp_path) == ['1']


def write_nothing(thing, folder, *arguments):
    pass


def write_half(thing, folder, *arguments):
    (folder / 'variables').mkdir(parents=True)
    (folder / 'variables/variables.index').write_bytes(b'half')


@pytest.mark.parametrize(
    'error', [tf.errors.ResourceExhaustedError(None, None, 'disk full'), KeyboardInterrupt()]
)
@pytest.mark.parametrize('write', [write_nothing, write_half, tf.saved_model.save])
def test_a_version_that_fails_does_not_appear(tmp_path, classifier, monkeypatch, write, error):
    """Until it is whole, its folder has a name that no server takes for a version."""

    def fail(thing, folder, *arguments):
        write(thing, pathlib.Path(folder), *arguments)
        assert re.fullmatch(rf'{tmp_path}/\.[0-9a-f]{{8}}\.tmp', folder)
        raise error

    monkeypatch.setattr(tf.saved_model, 'save', fail)
    with pytest.raises(type(error)):
        retrain_serving.write_saved_model(classifier, str(tmp_path / '1'))
    assert os.listdir(tmp_path) == []


KILLED = """
import os, runpy, signal, sys, tensorflow as tf
save = tf.saved_model.save

def save_and_die(*arguments):
    save(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

tf.saved_model.save = save_and_die
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_a_kill_while_it_is_written_leaves_no_version(served, tmp_path):
    """The files are there, under a name that no server takes for one. Older versions stay."""
    versions = tmp_path / 'versions'
    shutil.copytree(served.saved_model, versions / '1')
    before = listing(versions / '1')
    outputs = {
        'output_graph': tmp_path / 'graph.pb',
        'output_labels': tmp_path / 'labels',
        'summaries_dir': tmp_path,
    }
    arguments = served.arguments(f'--saved_model_dir={versions}/2', **outputs)
    with Fork(['-c', KILLED, ROOT / 'retrain_serving.py', *arguments], served.folder) as process:
        out = process.communicate()
    assert process.returncode == -signal.SIGKILL, out
    assert listing(versions / '1') == before
    temporary, kept = sorted(os.listdir(versions))
    assert kept == '1'
    assert re.fullmatch(r'\.[0-9a-f]{8}\.tmp', temporary)
    assert (versions / temporary / 'saved_model.pb').exists()
