"""tf_retrain.py from photographs to labels: what it prints, learns, tests, writes and refuses."""

import collections
import json
import math
import re
import runpy
import sys

import numpy as np
import pytest
from helpers import ROOT, created, get_set, parse, read_events
from PIL import Image

import tf_retrain
import tf_test
from tf_retrain import tf


def test_output(trained):
    lines = trained.process.stdout.splitlines()
    stamp = r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: '
    texts = [r'Train accuracy = \d+\.\d%', r'Cross entropy = \d+\.\d{6}']
    texts.append(r'Validation accuracy = \d+\.\d% \(N=100\)')
    steps = [line for line in lines if 'Step' in line]
    expected = [f'{stamp}Step {step}: {text}' for step in (0, 10, 20, 29) for text in texts]
    for line, pattern in zip(steps, expected, strict=True):
        assert re.fullmatch(pattern, line)
    paths = sorted(trained.data.rglob('*.jpg'))
    files = [str(path.relative_to(trained.data)) for path in paths]
    assert created(trained.process.stdout) == files
    assert '100 bottleneck files created.' in lines
    versions = f'TensorFlow {tf.__version__}, Python {sys.version.split()[0]}'
    assert lines[0].startswith(f'{versions}, CPU, network inception/')
    counts = collections.Counter(get_set(trained.folder, path) for path in paths)
    sets = ', '.join(f'{counts[name]} {name}' for name in ('training', 'validation', 'testing'))
    assert lines[1] == f'3 classes, 145 images: {sets}'
    assert lines[-4] == 'To look at the training: tensorboard --logdir logs'
    assert lines[-3] == "To get 'unknown' for images unlike yours, add --unknown 5: see README.md."
    files = 'trained_model/unoptimized_model.pb trained_model/labels.txt'
    assert lines[-1] == f'python3 tf_test.py <path to image> {files}'
    # TensorFlow's chatter is gone, and a bar is only for a terminal.
    assert trained.process.stderr == ''


def test_accuracy_and_its_interval(trained):
    """Advice comes with an interval that is wide."""
    out = trained.process.stdout
    found = re.search(r'^Final test accuracy = (.+)% \(N=(\d+)\)\n(.*)$', out, re.MULTILINE)
    accuracy, count = float(found[1]), int(found[2])
    assert accuracy > 90
    assert count == len(trained.test_images())
    bounds = tf_retrain.get_interval(round(accuracy * count / 100), count)
    low, high = (100 * bound for bound in bounds)
    advice = (
        f' About {4 * count} test images would halve the width of the interval.'
        if high - low > 10
        else ''
    )
    assert found[3] == f'95% confidence interval: {low:.1f} to {high:.1f}%.{advice}'


@pytest.mark.parametrize(('right', 'count'), [(307, 337), (26, 26), (0, 10), (5, 10), (1, 1)])
def test_interval_of_the_accuracy(right, count):
    """Its bounds are the shares from which the measured one is 1.96 standard deviations away."""
    share, bounds = right / count, tf_retrain.get_interval(right, count)
    for bound in bounds:
        deviation = math.sqrt(bound * (1 - bound) / count)
        assert abs(share - bound) == pytest.approx(1.96 * deviation, abs=1e-6)
    assert bounds[0] <= share <= bounds[1] + 1e-9
    assert tf_retrain.get_interval(307, 337) == pytest.approx((0.876, 0.937), abs=5e-4)


def test_labels_file(trained):
    assert (trained.folder / 'trained_model/labels.txt').read_bytes() == b'red fox\ncat\ndog\n'


def test_a_hundred_classes_and_odd_labels(job):
    names = [*(f'class {i}' for i in range(98)), 'two\nlines', '猫']
    for i, name in enumerate(names):
        (job.data / name).mkdir(parents=True)
        for j in range(3):
            Image.new('RGB', (8, 8), (i, 2 * i, 255 - i)).save(job.data / name / f'{j}.jpg')
    job.main()
    labels = (job.folder / 'trained_model/labels.txt').read_text()
    assert set(labels.removesuffix('\n').split('\n')) == {*names[:98], 'two lines', '猫'}
    assert labels.count('\n') == 100


# The final layer


def test_final_layer_descends_the_gradient_of_the_cross_entropy():
    rng = np.random.default_rng(0)
    bottlenecks = rng.uniform(size=[3, 20, 2048]).astype(np.float32)
    classes = rng.integers(4, size=[3, 20])
    layer = tf_retrain.FinalLayer(2048, 4, 0.5, [1, 2])
    weights, biases = layer.weights.astype(float), layer.biases.astype(float)
    assert np.abs(weights).max() < 0.002  # truncated at two standard deviations
    assert 0.0008 < weights.std() < 0.00095
    assert not biases.any()
    for batch, label in zip(bottlenecks, classes, strict=True):
        logits = batch @ weights + biases
        scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        accuracy = (logits.argmax(axis=1) == label).mean()
        before = layer.train(batch, label)
        cross_entropy = -np.log(scores[np.arange(20), label]).mean()
        assert before.cross_entropy == pytest.approx(cross_entropy, rel=1e-4)
        assert before.accuracy == pytest.approx(accuracy)
        error = (scores - np.eye(4)[label]) / 20
        weights = weights - 0.5 * batch.T @ error
        biases = biases - 0.5 * error.sum(axis=0)
    np.testing.assert_allclose(layer.weights, weights, atol=1e-5)
    np.testing.assert_allclose(layer.biases, biases, atol=1e-5)
    evaluation = layer.evaluate(bottlenecks[0], classes[0])
    np.testing.assert_allclose(evaluation.logits, bottlenecks[0] @ weights + biases, atol=1e-4)
    np.testing.assert_allclose(evaluation.scores, tf.nn.softmax(evaluation.logits), atol=1e-6)


def test_seeds_make_layers_alike():
    seeds = [1, 2], [1, 2], [1, 3]
    first, second, other = (tf_retrain.FinalLayer(2048, 3, 0.1, seed).weights for seed in seeds)
    np.testing.assert_array_equal(first, second)
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
    values = [
        (e.step, v.tag) for e in read_events(job.folder / 'logs/train') for v in e.summary.value
    ]
    assert [step for step, tag in values if tag == 'accuracy_1'] == list(range(230))


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
    sets = collections.Counter(get_set(job.folder, path) for path in job.data.rglob('*.jpg'))
    sizes = re.findall(r'Validation accuracy = .*N=(\d+)', out)
    assert sizes == 4 * [str(sets['validation'])]
    assert re.search(r'Final test accuracy = .*\(N=7\)', out)


# Outputs


def test_outputs_are_tried_before_any_work(job, monkeypatch):
    monkeypatch.setattr(tf_retrain, 'cache_bottlenecks', None)
    job.photographs(cat=20, dog=20)
    (job.folder / 'file').touch()
    (job.folder / 'folder').mkdir()
    for flag, value, message in [
        ('output_graph', 'file/g.pb', "nothing can be written in 'file'"),
        ('output_labels', 'folder', "'folder' is a folder."),
        ('output_labels', 'new/', "'new/' is a folder."),
        ('optimized_graph', 'file/o.pb', "nothing can be written in 'file'"),
        ('summaries_dir', 'file', "nothing can be written in 'file/train'"),
        ('final_tensor_name', 'mixed/join', 'the graph already has a node named mixed/join.'),
        ('final_tensor_name', 'input/x', 'the graph already has a node named input/x.'),
    ]:
        job.fails(f'^--{flag}: {re.escape(message)}', **{flag: value})


def test_a_cache_that_cannot_be_written_is_found_before_any_work(job, monkeypatch):
    monkeypatch.setattr(tf_retrain, 'compute_bottlenecks', None)
    (job.folder / 'file').touch()
    message = "^--bottleneck_dir: nothing can be written in 'file'"
    job.photographs(cat=20, dog=20).fails(message, bottleneck_dir='file')


def test_outputs_must_not_overwrite_each_other_or_the_model(job):
    job.photographs(cat=20, dog=20)
    model = 'inception/classify_image_graph_def.pb'
    absent = 'inception/mobilenet_v1_0.25_128/frozen_graph.pb'
    for flag, path in [
        ('output_graph', model),
        ('output_labels', f'./{model}'),
        ('optimized_graph', absent),
    ]:
        job.fails(f'^--{flag}: {re.escape(path)} is the pretrained model', **{flag: path})
    for labels in ('x', 'x.json'):
        job.fails('must be different files', output_labels=labels, output_graph='x')


def test_output_folders_are_created(job):
    files = {'output_graph': 'new/a/g.pb', 'output_labels': 'new/b/l.txt'}
    job.photographs(cat=20, dog=20).main(**files, summaries_dir='new/logs')
    for path in (*files.values(), 'new/logs/train'):
        assert (job.folder / path).exists()


def test_an_output_that_cannot_be_written_is_named(job, monkeypatch):
    """Three outputs of the same name in different folders."""
    outputs = {'output_graph': 'a/output', 'output_labels': 'b/output'}
    outputs['optimized_graph'] = 'c/output'
    job.photographs(cat=20, dog=20)
    write = tf_retrain.write_whole
    for failing in outputs.values():

        def refuse(path, contents, failing=failing):
            if path == failing:
                raise tf.errors.ResourceExhaustedError(None, None, 'No space left on device')
            write(path, contents)

        monkeypatch.setattr(tf_retrain, 'write_whole', refuse)
        message = f'^could not be written: {failing} .No space left on device.*run the same command'
        job.fails(message, **outputs)


def test_errors_are_one_line_and_exit_code_1(job):
    process = job.run(check=False)
    assert process.returncode == 1
    assert process.stdout == ''
    problem = "there is no folder 'data/'. Name the one with your class folders."
    assert process.stderr == f'ERROR: --image_dir: {problem}\n'


def test_final_tensor_name(job):
    """tf_test.py finds the scores by themselves, whatever their name."""
    job.photographs(cat=20, dog=20).main(final_tensor_name='scores')
    assert job.graph().node[-1].name == 'scores'
    files = job.test_image(), job.flags['output_graph'], job.flags['output_labels']
    tf_test.label_images(tf_test.create_labeling_parser().parse_args(map(str, files)))
    assert job.capsys.readouterr().out.count('(score = ') == 2


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
def test_an_unexpected_error_is_one_line(monkeypatch, error, line):
    def fail(flags):
        raise error

    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setattr(tf_retrain, 'on_stop_signals', lambda handler: None)
    with pytest.raises(SystemExit) as exit_info:
        tf_retrain.run(fail, None)
    assert line in exit_info.value.code
    assert exit_info.value.code.startswith('ERROR: ')
    assert '\n' not in exit_info.value.code


# Extras


def test_an_extra_that_fails_is_a_warning(job, monkeypatch):
    """Cache files vanish, the record cannot be written, there is no font: the graph is written."""
    job.photographs(cat=30, dog=30)
    train, write_whole = tf_retrain.train, tf_retrain.write_whole

    def lose_the_cache(*arguments):
        layer = train(*arguments)
        for path in (job.folder / 'bottlenecks').rglob('*.txt'):
            path.unlink()
        return layer

    def refuse(path, contents):
        if path.endswith('.json'):
            raise tf.errors.ResourceExhaustedError(None, None, 'No space left on device')
        write_whole(path, contents)

    monkeypatch.setattr(tf_retrain, 'train', lose_the_cache)
    monkeypatch.setattr(tf_retrain, 'write_whole', refuse)
    monkeypatch.setattr(tf_retrain, 'find_near_copies', None)
    monkeypatch.setattr(tf_retrain.ImageFont, 'load_default', None)
    out = job.main()
    extras = ['the search for near copies', 'the record of the run', 'the pictures for TensorBoard']
    assert re.findall(r'^WARNING: (.*) left out \(', out, re.MULTILINE) == extras
    assert out.splitlines()[-1].startswith('python3 tf_test.py')
    assert job.graph().node[-1].name == 'final_result'
    assert (job.folder / job.flags['output_labels']).read_text() == 'cat\ndog\n'


def test_logs_that_cannot_be_written_are_a_warning(job, monkeypatch):
    records = []

    class FullDisk(tf.io.TFRecordWriter):
        def write(self, record):
            records.append(record)
            if len(records) > 9:
                raise tf.errors.ResourceExhaustedError(None, None, 'No space left on device')
            super().write(record)

    monkeypatch.setattr(tf_retrain.tf.io, 'TFRecordWriter', FullDisk)
    out = job.photographs(cat=30, dog=30).main()
    assert 1 <= out.count('No space left on device. The training goes on without logs.') <= 3
    assert 'Step 29: Validation accuracy' in out
    assert job.graph().node[-1].name == 'final_result'


def read_record(graph):
    return json.loads(graph.with_name(f'{graph.name}.json').read_text())


def test_record(trained):
    """It says what the run did, and what is needed to do it again."""
    record = read_record(trained.folder / trained.flags['output_graph'])
    readme = (ROOT / 'trained_model/README.md').read_text()
    assert list(record) == re.findall(r'^\| `(\w+)` \|', readme, re.MULTILINE)
    assert record['command'][1:] == trained.arguments('--print_misclassified_test_images')
    assert record['flags'] == vars(parse(*record['command'][1:]))
    assert record['versions']['tensorflow'] == tf.__version__
    assert record['labels'] == ['red fox', 'cat', 'dog']
    assert record['network']['source'] == 'inception/classify_image_graph_def.pb'
    assert record['network']['input']['size'] == [299, 299]
    totals = {name: sum(counts.values()) for name, counts in record['images'].items()}
    assert sum(totals.values()) == 145
    test = record['test']
    confusion = np.array(test['confusion'])
    tested = len(trained.test_images())
    assert totals['testing'] == test['images'] == confusion.sum() == tested
    assert test['accuracy'] == pytest.approx(np.trace(confusion) / tested)
    low, high = test['interval']
    assert low < test['accuracy'] <= high
    assert record['unreadable'] == 0
    assert math.isfinite(record['seconds'])


def test_the_command_in_a_record_gives_the_same_graph(trained, tmp_path, monkeypatch):
    first = trained.folder / trained.flags['output_graph']
    second = tmp_path / 'g.pb'
    outputs = [f'--output_graph={second}', f'--output_labels={tmp_path}/l']
    record = read_record(first)
    _, *arguments = record['command']
    monkeypatch.chdir(trained.folder)
    tf_retrain.main(parse(*arguments, *outputs, f'--summaries_dir={tmp_path}/logs'))
    assert second.read_bytes() == first.read_bytes()
    again = read_record(second)
    for name in ('command', 'flags', 'started', 'seconds'):
        del record[name], again[name]
    assert again == record


@pytest.mark.filterwarnings('error::DeprecationWarning')
def test_no_script_does_what_is_deprecated(job, monkeypatch):
    """Neither while it is loaded nor in a run."""
    job.photographs(cat=20, dog=20)
    monkeypatch.chdir(job.folder)
    names = 'retrain_serving.py', 'tf_retrain.py', 'tf_test.py'
    serving, retrain, test = (runpy.run_path(str(ROOT / name)) for name in names)
    extras = ['--optimized_graph=o.pb', '--random_brightness=1', '--find_suspects=1']
    arguments = job.arguments(*extras, how_many_training_steps='2')
    parser = serving['create_serving_parser']()
    serving['main_serving'](parser.parse_args([*arguments, '--saved_model_dir=saved/1']))
    retrain['main'](retrain['create_parser']().parse_args(arguments))
    files = job.test_image(), job.flags['output_graph'], job.flags['output_labels']
    test['label_images'](test['create_labeling_parser']().parse_args(map(str, files)))
    assert (job.folder / 'o.pb').exists()
