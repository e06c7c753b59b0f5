"""tf_retrain.py from photographs to labels: what it prints, learns, tests, writes and refuses."""

import collections
import gc
import json
import re
import runpy
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
from helpers import (
    COLOURS,
    GRAPH,
    LABELS,
    ROOT,
    created,
    get_set,
    label_images,
    parse,
    read_events,
    write_photographs,
)

import tf_retrain
from tf_retrain import tf


def test_output(trained):
    out = trained.process.stdout
    lines = out.splitlines()
    stamp = r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+'
    texts = (
        r'Train accuracy = \d+\.\d%',
        r'Cross entropy = \d+\.\d{6}',
        r'Validation accuracy = \d+\.\d% \(N=100\)',
    )
    steps = ''.join(f'{stamp}: Step {i}: {text}\n' for i in (0, 10, 20, 29) for text in texts)
    assert re.search(rf'\n{steps}Final test', out)
    assert len([line for line in lines if 'Step' in line]) == 12
    paths = sorted(trained.data.rglob('*.jpg'))
    assert created(out) == [str(path.relative_to(trained.data)) for path in paths]
    assert '100 bottleneck files created.' in lines
    versions = f'TensorFlow {tf.__version__}, Python {sys.version.split()[0]}'
    assert lines[0].startswith(f'{versions}, CPU, network inception/')
    counts = collections.Counter(get_set(trained.folder, path) for path in paths)
    sets = '{training} training, {validation} validation, {testing} testing'.format(**counts)
    assert lines[1] == f'3 classes, 145 images: {sets}'
    assert lines[-4] == 'To look at the training: tensorboard --logdir logs'
    assert lines[-3] == (
        "To get 'unknown' for images unlike yours, add --unknown 5 to the command below: see "
        'README.md.'
    )
    files = 'trained_model/unoptimized_model.pb trained_model/labels.txt'
    assert lines[-1] == f'python3 tf_test.py <path to image> {files}'
    # TensorFlow's chatter is gone, and a bar is only for a terminal.
    assert trained.process.stderr == ''


@pytest.mark.parametrize(
    ('right', 'count', 'low', 'high'),
    [
        (307, 337, 0.8758, 0.9369),
        (26, 26, 0.8713, 1),
        (0, 10, 0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (1, 1, 0.2065, 1),
    ],
)
def test_interval_of_the_accuracy(right, count, low, high):
    """Wilson's, of 95 %."""
    assert tf_retrain.get_interval(right, count) == pytest.approx((low, high), abs=5e-5)


def test_labels_file(trained):
    assert (trained.folder / 'trained_model/labels.txt').read_bytes() == b'red fox\ncat\ndog\n'


def test_a_hundred_classes_and_odd_labels(job):
    names = {f'class {i}' for i in range(98)}
    for name in (*names, 'two\nlines', '猫'):
        write_photographs(job.data, name, 3, COLOURS[0])
    job.main()
    labels = (job.folder / job.flags['output_labels']).read_text()
    assert labels.count('\n') == 100
    assert {*labels.split('\n')} == {*names, 'two lines', '猫', ''}


def test_the_garbage_collector_passes_over_what_is_imported():
    """But it works on what is created later."""
    assert gc.get_freeze_count() > 100_000
    assert gc.isenabled()


# The final layer


@pytest.mark.parametrize('kind', [tf_retrain.FinalLayer, tf_retrain.WideLayer])
def test_final_layer_descends_the_gradient_of_the_cross_entropy(kind):
    rng = np.random.default_rng(0)
    layer = kind(2048, 4, 0.5, [1, 2])
    assert np.abs(layer.weights).max() < 0.002  # truncated at two standard deviations
    assert 0.0008 < layer.weights.std() < 0.00095
    assert not layer.biases.any()
    weights, biases = tf.Variable(layer.weights), tf.Variable(layer.biases)
    for _ in range(3):
        batch = rng.uniform(size=[20, 2048]).astype(np.float32)
        classes = rng.integers(4, size=20)
        evaluation = layer.train(batch, classes)
        with tf.GradientTape() as tape:
            logits = batch @ weights + biases
            entropies = tf.nn.sparse_softmax_cross_entropy_with_logits(classes, logits)
            cross_entropy = tf.reduce_mean(entropies)
        accuracy = np.mean(np.argmax(logits, axis=1) == classes)
        expected = logits, tf.nn.softmax(logits), cross_entropy, accuracy
        for found, value in zip(evaluation, expected, strict=True):
            np.testing.assert_allclose(found, value, atol=1e-4)
        scores = tf.nn.softmax(evaluation.logits)
        np.testing.assert_allclose(evaluation.scores, scores, atol=1e-6)
        variables = weights, biases
        for variable, gradient in zip(
            variables, tape.gradient(cross_entropy, variables), strict=True
        ):
            variable.assign_sub(0.5 * gradient)
    np.testing.assert_allclose(layer.weights, weights, atol=1e-5)
    np.testing.assert_allclose(layer.biases, biases, atol=1e-5)


def test_the_steps_of_many_classes_are_those_of_few():
    """Above 1,000 classes, they are TensorFlow's, with the same result."""
    assert type(tf_retrain.create_layer(8, 1000, 0.5, [1, 2])) is tf_retrain.FinalLayer
    wide = tf_retrain.create_layer(2048, 1001, 0.5, [1, 2])
    assert type(wide) is tf_retrain.WideLayer
    layer = tf_retrain.FinalLayer(2048, 1001, 0.5, [1, 2])
    rng = np.random.default_rng(0)
    for _ in range(5):
        batch = rng.exponential(0.3, [100, 2048]).astype(np.float32)
        classes = rng.integers(1001, size=100)
        for found, expected in zip(
            wide.train(batch, classes), layer.train(batch, classes), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(wide.weights, layer.weights, rtol=0, atol=1e-5)
    np.testing.assert_allclose(wide.biases, layer.biases, rtol=0, atol=1e-5)


def test_seeds_make_layers_alike():
    seeds = [1, 2], [1, 2], [1, 3]
    first, same, other = (tf_retrain.FinalLayer(2048, 3, 0.1, seed).weights for seed in seeds)
    assert (first == same).all()
    assert (first != other).any()


def test_a_training_that_diverges_ends_at_once(job):
    """Nothing of an earlier result is overwritten."""
    graph = job.folder / job.flags['output_graph']
    graph.parent.mkdir()
    graph.write_bytes(b'earlier')
    message = r'^--learning_rate: the cross entropy is not finite after 1 steps\. Lower it\.$'
    job.photographs(cat=25, dog=25).fails(message, learning_rate='1e37')
    assert graph.read_bytes() == b'earlier'


def test_zero_steps_test_the_untrained_layer(job):
    out = job.photographs(cat=30, dog=30).main(how_many_training_steps='0')
    assert 'Step' not in out
    assert re.search(rf'Final test accuracy = .*\(N={len(job.test_images())}\)', out)
    nodes = {node.name: node.attr['value'].tensor for node in job.graph().node}
    weights = tf.make_ndarray(nodes['final_training_ops/weights/final_weights'])
    assert 0 < np.abs(weights).max() < 0.002
    assert not tf.make_ndarray(nodes['final_training_ops/biases/final_biases']).any()


@pytest.mark.parametrize('interval', [7, 250])
def test_evaluations_come_at_the_interval_and_at_the_end(job, interval):
    flags = {'how_many_training_steps': '230', 'eval_step_interval': interval}
    out = job.photographs(cat=25, dog=25).main(**flags)
    steps = map(int, re.findall(r'Step (\d+): Train', out))
    assert list(steps) == sorted({*range(0, 230, interval), 229})
    events = read_events(job.folder / 'logs/train')
    logged = [event.step for event in events if 'accuracy_1' in str(event.summary)]
    assert logged == list(range(230))


def test_without_validation_and_test_images(job):
    flags = {'testing_percentage': '0', 'validation_percentage': '0'}
    job.photographs(cat=20, dog=20)
    out = job.main('--print_misclassified_test_images', **flags)
    assert 'Validation accuracy' not in out
    assert 'Final test accuracy: unknown' in out
    assert 'WARNING' not in out


def test_whole_sets_and_samples(job):
    job.photographs(cat=60, dog=60)
    out = job.main(validation_batch_size='-1', test_batch_size='7')
    count = sum(get_set(job.folder, path) == 'validation' for path in job.data.rglob('*.jpg'))
    assert re.findall(r'Validation accuracy = .*N=(\d+)', out) == 4 * [str(count)]
    assert re.search(r'Final test accuracy = .*\(N=7\)', out)


# Outputs


FULL = tf.errors.ResourceExhaustedError(None, None, 'No space left on device')


def fill_disk(monkeypatch, full):
    """Leaves no space for one file."""

    def write(path, contents, write_whole=tf_retrain.write_whole):
        if path == full:
            raise FULL
        write_whole(path, contents)

    monkeypatch.setattr(tf_retrain, 'write_whole', write)


MODEL = 'inception/classify_image_graph_def.pb'
ABSENT_MODEL = 'inception/mobilenet_v1_0.25_128/frozen_graph.pb'


@pytest.mark.parametrize(
    ('flag', 'value', 'message'),
    [
        ('output_graph', 'file/g.pb', "nothing can be written in 'file'"),
        ('output_graph', MODEL, f'{MODEL} is the pretrained model'),
        ('output_labels', 'folder', "'folder' is a folder."),
        ('output_labels', 'new/', "'new/' is a folder."),
        ('output_labels', f'./{MODEL}', f'./{MODEL} is the pretrained model'),
        ('output_labels', 'data/cat/cat 0.jpg', 'data/cat/cat 0.jpg is what the training'),
        ('optimized_graph', 'file/o.pb', "nothing can be written in 'file'"),
        ('optimized_graph', ABSENT_MODEL, f'{ABSENT_MODEL} is the pretrained model'),
        ('bottleneck_dir', 'file', "nothing can be written in 'file'"),
        ('summaries_dir', 'file', "nothing can be written in 'file/train'"),
        ('final_tensor_name', 'mixed/join', "'mixed/join' is taken by the graph"),
        ('final_tensor_name', 'Familiarity', "'Familiarity' would be named Familiarity_1"),
    ],
)
def test_outputs_are_tried_before_any_work(job, flag, value, message):
    (job.folder / 'file').touch()
    (job.folder / 'folder').mkdir()
    job.photographs(cat=20, dog=20).fails(f'^--{flag}: {re.escape(message)}', **{flag: value})
    assert not job.cache_file('cat/cat 0.jpg').exists()


@pytest.mark.parametrize('labels', ['x', 'x.json'])
def test_outputs_must_not_overwrite_each_other(job, labels):
    job.photographs(cat=1, dog=1)
    job.fails('must be different files', output_graph='x', output_labels=labels)


def test_output_folders_are_created(job):
    files = {'output_graph': 'new/a/g.pb', 'output_labels': 'new/b/l.txt'}
    job.photographs(cat=20, dog=20).main(**files, summaries_dir='new/logs')
    for path in (*files.values(), 'new/logs/train'):
        assert (job.folder / path).exists()


def test_errors_are_one_line_and_exit_code_1(job):
    process = job.run(check=False)
    assert (process.returncode, process.stdout) == (1, '')
    problem = "there is no folder 'data/'. Name the one with your class folders."
    assert process.stderr == f'ERROR: --image_dir: {problem}\n'


def test_final_tensor_name(job):
    """tf_test.py finds the scores by themselves, whatever their name."""
    job.photographs(cat=20, dog=20).main(final_tensor_name='scores')
    assert job.graph().node[-1].name == 'scores'
    assert label_images(job.folder, [job.test_image()]).shape == (1, 2)


def test_a_test_draws_no_image_twice(trained, monkeypatch):
    """A batch as large as the test set is the whole set; a smaller one is a part of it."""
    monkeypatch.chdir(trained.folder)
    flags = parse(*trained.arguments())
    images = tf_retrain.list_images(flags)
    bottlenecks = np.zeros([len(images.files), 5], np.float32)
    layer = tf_retrain.FinalLayer(5, 3, 0.1, [1, 2])
    everything = images.rows['testing']
    for size, expected in ((-1, None), (1000, None), (len(everything), None), (7, 7)):
        flags.test_batch_size = size
        rows = tf_retrain.test(images, bottlenecks, layer, flags).rows
        assert len(set(rows)) == len(rows) == (expected or len(everything))
        assert set(rows) <= set(everything)


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        (MemoryError(), 'the memory is full'),
        (OSError(28, 'No space left on device'), 'No space left on device. What was computed'),
        (tf.errors.InternalError(None, None, 'two\nlines.'), 'two lines. What was computed'),
    ],
)
def test_an_unexpected_error_is_one_line(monkeypatch, capsys, error, line):
    def fail(flags):
        raise error

    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    with pytest.raises(SystemExit, match='^1$'):
        tf_retrain.run(fail, None)
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith('ERROR: ')
    assert line in printed


# Extras


def test_an_extra_that_fails_is_a_warning(job, monkeypatch):
    """Cache files vanish, the record cannot be written, there is no font: the graph is written."""

    def lose_the_cache(*arguments, train=tf_retrain.train):
        shutil.rmtree(job.folder / 'bottlenecks')
        return train(*arguments)

    fill_disk(monkeypatch, f'{job.flags["output_graph"]}.json')
    monkeypatch.setattr(tf_retrain, 'train', lose_the_cache)
    monkeypatch.setattr(tf_retrain, 'DUPLICATE_SIMILARITY', None)
    monkeypatch.setattr(tf_retrain.ImageFont, 'load_default', None)
    out = job.photographs(cat=30, dog=30).main()
    extras = ['the search for near copies', 'the familiarity', 'the record of the run']
    extras.append('the pictures for TensorBoard')
    assert re.findall(r'^WARNING: (.*) left out \(', out, re.MULTILINE) == extras
    assert out.splitlines()[-1].startswith('python3 tf_test.py')
    assert job.graph().node[-1].name == 'final_result'
    assert (job.folder / job.flags['output_labels']).read_text() == 'cat\ndog\n'


def test_logs_that_cannot_be_written_are_a_warning(job, monkeypatch):
    write = mock.Mock(side_effect=[None] * 9 + [FULL] * 99)
    monkeypatch.setattr(tf.io, 'TFRecordWriter', lambda path: mock.Mock(write=write))
    out = job.photographs(cat=30, dog=30).main()
    assert 1 <= out.count('No space left on device. Nothing more is logged there.') <= 3
    assert 'Step 29: Validation accuracy' in out
    assert job.graph().node[-1].name == 'final_result'


# The record


def read_record(graph):
    return json.loads(graph.with_name(f'{graph.name}.json').read_text())


def test_record(trained):
    """It says what the run did, and what is needed to do it again."""
    record = read_record(trained.folder / trained.flags['output_graph'])
    readme = (ROOT / 'trained_model/README.md').read_text()
    assert list(record) == re.findall(r'^\| `(\w+)` \|', readme, re.MULTILINE)
    arguments = trained.arguments('--print_misclassified_test_images')
    assert record['command'][1:] == arguments
    assert record['flags'] == vars(parse(*arguments))
    assert record['versions']['tensorflow'] == tf.__version__
    assert record['labels'] == ['red fox', 'cat', 'dog']
    assert record['network']['source'] == 'inception/classify_image_graph_def.pb'
    assert record['network']['input']['size'] == [299, 299]
    assert record['unreadable'] == 0
    assert record['seconds'] > 0
    assert record['steps'] == record['flags']['how_many_training_steps']
    totals = {name: sum(counts.values()) for name, counts in record['images'].items()}
    assert sum(totals.values()) == 145
    assert totals['testing'] == len(trained.test_images())


@pytest.mark.parametrize(('right', 'count', 'needed'), [(26, 26, 56), (12, 20, 92), (0, 5, 14)])
def test_how_many_images_halve_the_interval(right, count, needed):
    """Near 0 and 100 %, twice as many do; in the middle, a little more than four times as many."""
    assert tf_retrain.count_for_half_interval(right, count) == needed
    low, high = tf_retrain.get_interval(right, count)
    half_low, half_high = tf_retrain.get_interval(right / count * needed, needed)
    assert half_high - half_low == pytest.approx((high - low) / 2, rel=0.05)


def test_accuracy_and_its_interval(trained):
    """Advice comes with an interval that is wide."""
    test = read_record(trained.folder / trained.flags['output_graph'])['test']
    confusion, count = np.array(test['confusion']), len(trained.test_images())
    right = np.trace(confusion)
    assert confusion.sum() == test['images'] == count
    assert test['accuracy'] == right / count > 0.9
    low, high = tf_retrain.get_interval(right, count)
    assert test['interval'] == [low, high]
    needed = tf_retrain.count_for_half_interval(right, count)
    assert (
        f'Final test accuracy = {100 * right / count:.1f}% (N={count})\n'
        f'95% confidence interval: {100 * low:.1f} to {100 * high:.1f}%. '
        f'About {needed} test images would halve the width of the interval.\n'
    ) in trained.process.stdout


@pytest.mark.parametrize('count', [200, 201, 1001])
def test_many_classes(job, monkeypatch, count):
    """Output and record stay short, and the counts are all there."""
    rng = np.random.default_rng(0)
    for index in range(count):
        path = job.data / f'{index}/x.jpg'
        path.parent.mkdir(parents=True)
        path.touch()
    images = 3 * count
    bottlenecks = np.float32(rng.exponential(0.3, [images, 2048]))
    names = ['a test.jpg', 'b.jpg', 'c.jpg']
    monkeypatch.setattr(tf_retrain, 'list_class_folder', lambda path: names)
    monkeypatch.setattr(
        tf_retrain, 'get_set', lambda path, *_: 'testing' if 'test' in path else 'training'
    )
    monkeypatch.setattr(
        tf_retrain, 'cache_bottlenecks', lambda images, *_: (images, bottlenecks, {})
    )
    out = job.main('--find_suspects=3', how_many_training_steps='2')
    assert len(out.splitlines()) < 70
    assert len(re.findall(r'^\d+ +1 +[01] +[01] ', out, re.MULTILINE)) == 20
    test = read_record(job.folder / job.flags['output_graph'])['test']
    assert ('confusion' in test) == (count == 200)
    if count == 200:
        cells = [(*place, value) for place, value in np.ndenumerate(test['confusion']) if value]
    else:
        cells = test['confusion_cells']
    true, predicted, counts = np.transpose(cells)
    assert true.tolist() == list(range(count))  # one test image of each class
    assert counts.sum() == test['images'] == count
    assert (true == predicted).sum() == test['accuracy'] * count
    events = read_events(job.folder / 'logs/test')
    tags = {value.tag for event in events for value in event.summary.value}
    assert ('confusion_matrix' in tags) == (count == 200)


def test_the_command_in_a_record_gives_the_same_graph(trained, tmp_path, monkeypatch):
    first = trained.folder / trained.flags['output_graph']
    second = tmp_path / 'g.pb'
    record = read_record(first)
    outputs = f'--output_graph={second}', f'--output_labels={tmp_path}/l'
    monkeypatch.chdir(trained.folder)
    tf_retrain.main(parse(*record['command'][1:], *outputs, f'--summaries_dir={tmp_path}/logs'))
    assert second.read_bytes() == first.read_bytes()
    changed = dict.fromkeys(['command', 'flags', 'started', 'seconds'])
    assert read_record(second) | changed == record | changed


@pytest.mark.filterwarnings('error::DeprecationWarning')
def test_no_script_does_what_is_deprecated(job, monkeypatch):
    """Neither while it is loaded nor in a run."""
    monkeypatch.chdir(job.photographs(cat=20, dog=20).folder)
    names = 'retrain_serving.py', 'tf_retrain.py', 'tf_test.py'
    serving, retrain, test = (runpy.run_path(str(ROOT / name)) for name in names)
    extras = '--optimized_graph=o.pb', '--random_brightness=1', '--find_suspects=1'
    arguments = job.arguments(*extras, how_many_training_steps='2')
    parser = serving['create_serving_parser']()
    serving['main_serving'](parser.parse_args([*arguments, '--saved_model_dir=saved/1']))
    retrain['main'](retrain['create_parser']().parse_args(arguments))
    files = str(job.test_image()), GRAPH, LABELS
    test['label_images'](test['create_labeling_parser']().parse_args(files))
    assert (job.folder / 'o.pb').exists()
