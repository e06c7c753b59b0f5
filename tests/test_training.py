"""tf_retrain.py from photographs to labels: what it prints, learns, tests and writes, and what can go wrong."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from helpers import (
    ROOT,
    DataService,
    build_model,
    check_same_bottlenecks,
    created,
    get_set,
    parse,
    read_events,
    run,
    run_new,
    run_v1,
)
from PIL import Image

import tf_retrain
from tf_retrain import UserError, tf


def test_output(trained):
    lines = trained.process.stdout.splitlines()
    stamp = r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: '
    for step in (0, 10, 20, 29):
        texts = (
            r'Train accuracy = \d+\.\d%',
            r'Cross entropy = \d+\.\d{6}',
            r'Validation accuracy = \d+\.\d% \(N=100\)',
        )
        for text in texts:
            assert (
                sum(bool(re.fullmatch(f'{stamp}Step {step}: {text}', line)) for line in lines) == 1
            )
    assert sum('Step' in line for line in lines) == 12
    paths = sorted(trained.data.rglob('*.jpg'))
    final = next(
        re.fullmatch(r'Final test accuracy = (.+)% \(N=(\d+)\)', line)
        for line in lines
        if 'Final' in line
    )
    assert int(final[2]) == len(trained.test_images())
    assert float(final[1]) > 90
    assert created(trained.process.stdout) == [
        str(path.relative_to(trained.data)) for path in paths
    ]
    assert '100 bottleneck files created.' in lines
    assert lines[0].startswith(
        f'TensorFlow {tf.__version__}, Python {sys.version.split()[0]}, CPU, network inception/'
    )
    counts = [
        sum(get_set(trained.folder, path) == name for path in paths)
        for name in ('training', 'validation')
    ]
    counts.append(len(trained.test_images()))
    assert lines[1] == '3 classes, 145 images: {} training, {} validation, {} testing'.format(
        *counts
    )
    assert lines[-3] == 'To look at the training: tensorboard --logdir logs'
    assert (
        lines[-1]
        == 'python3 tf_test.py <path to image> trained_model/unoptimized_model.pb trained_model/labels.txt'
    )
    assert (
        trained.process.stderr == ''
    )  # TensorFlow's chatter is gone, and a bar is only for a terminal


def test_misclassified_images_are_listed(trained):
    lines = trained.process.stdout.splitlines()
    start = lines.index('=== MISCLASSIFIED TEST IMAGES ===')
    listed = [
        line for line in lines[start + 1 :] if not line.startswith(('To look', 'Wrote', 'python3'))
    ]
    wrong = []
    graph_def, labels = (
        trained.graph(),
        (trained.folder / 'trained_model/labels.txt').read_text().splitlines(),
    )
    for path in trained.test_images():
        best = labels[run_v1(graph_def, path.read_bytes(), 'final_result:0')[0].argmax()]
        if best != tf_retrain.get_label(path.parent.name):
            wrong.append(f'{path.relative_to(trained.folder)!s:>70}  {best}')
    assert sorted(listed) == sorted(wrong)
    accuracy = next(line for line in lines if line.startswith('Final test accuracy'))
    number = int(re.search(r'N=(\d+)', accuracy)[1])
    assert f'= {100 * (1 - len(wrong) / number):.1f}%' in accuracy


def test_labels_file(trained):
    assert (trained.folder / 'trained_model/labels.txt').read_bytes() == b'red fox\ncat\ndog\n'


def test_a_hundred_classes_and_odd_labels(job):
    names = [f'class {i}' for i in range(98)] + ['two\nlines', '猫']
    for i, name in enumerate(names):
        (job.data / name).mkdir(parents=True)
        for j in range(3):
            Image.new('RGB', (8, 8), (i, 2 * i, 255 - i)).save(job.data / name / f'{j}.jpg')
    job.main()
    labels = (job.folder / 'trained_model/labels.txt').read_text().split('\n')
    assert len(labels) == 101
    assert labels[-1] == ''
    assert set(labels[:-1]) == {f'class {i}' for i in range(98)} | {'two lines', '猫'}


# The final layer


def test_final_layer_descends_the_gradient_of_the_cross_entropy():
    rng = np.random.default_rng(0)
    bottlenecks = rng.uniform(size=[50, 2048]).astype(np.float32)
    rows, classes = rng.integers(50, size=[3, 20]), rng.integers(4, size=[3, 20])
    layer = tf_retrain.FinalLayer(2048, 4, 0.5, [1, 2])
    weights, biases = layer.weights.astype(float), layer.biases.astype(float)
    assert np.abs(weights).max() < 0.002  # truncated at two standard deviations
    assert 0.0008 < weights.std() < 0.00095
    assert not biases.any()
    expected = []
    for row, label in zip(rows, classes, strict=True):
        x = bottlenecks[row].astype(float)
        logits = x @ weights + biases
        probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        expected.append(
            [
                -np.log(probability[np.arange(20), label]).mean(),
                (logits.argmax(axis=1) == label).mean(),
            ]
        )
        error = (probability - np.eye(4)[label]) / 20
        weights, biases = weights - 0.5 * x.T @ error, biases - 0.5 * error.sum(axis=0)
    found = [
        layer.train(bottlenecks[row], label)[2:] for row, label in zip(rows, classes, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(layer.weights, weights, atol=1e-5)
    np.testing.assert_allclose(layer.biases, biases, atol=1e-5)
    evaluation = layer.evaluate(bottlenecks[rows[0]], classes[0])
    np.testing.assert_allclose(evaluation.scores, tf.nn.softmax(evaluation.logits), atol=1e-6)
    np.testing.assert_allclose(
        evaluation.logits, bottlenecks[rows[0]] @ weights + biases, atol=1e-4
    )


def test_seeds_make_layers_alike():
    first, second, other = (
        tf_retrain.FinalLayer(2048, 3, 0.1, seed).weights for seed in ([1, 2], [1, 2], [1, 3])
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_a_training_that_diverges_ends_at_once(job):
    """Nothing of an earlier result is overwritten."""
    job.photographs(cat=25, dog=25)
    graph = job.folder / job.flags['output_graph']
    graph.parent.mkdir()
    graph.write_bytes(b'earlier')
    process = job.run(check=False, learning_rate='1e37')
    assert process.returncode == 1
    message = (
        r'ERROR: --learning_rate: the cross entropy is not finite after \d+ steps\. Lower it\.\n'
    )
    assert re.fullmatch(message, process.stderr)
    assert graph.read_bytes() == b'earlier'


def test_zero_steps_evaluate_the_untrained_layer(job, capsys):
    job.photographs(cat=30, dog=30).main(how_many_training_steps='0')
    out = capsys.readouterr().out
    assert 'Step' not in out
    assert 'Final test accuracy = ' in out
    assert len(job.graph().node) == len(build_model().node) - 3 + 8


@pytest.mark.parametrize('interval', ['7', '250'])
def test_evaluations_come_at_the_interval_and_at_the_end(job, capsys, interval):
    job.photographs(cat=25, dog=25).main(how_many_training_steps='230', eval_step_interval=interval)
    steps = re.findall(r'Step (\d+): Train', capsys.readouterr().out)
    assert [int(step) for step in steps] == sorted({*range(0, 230, int(interval)), 229})
    written = read_events(job.folder / 'logs/train')
    assert [e.step for e in written if any(v.tag == 'accuracy_1' for v in e.summary.value)] == list(
        range(230)
    )


def test_without_validation_and_test_images(job, capsys):
    flags = {'testing_percentage': '0', 'validation_percentage': '0'}
    job.photographs(cat=20, dog=20).main('--print_misclassified_test_images', **flags)
    out = capsys.readouterr().out
    assert 'Validation accuracy' not in out
    assert 'Final test accuracy: unknown' in out
    assert 'WARNING' not in out


def test_whole_sets_and_samples(job, capsys):
    job.photographs(cat=60, dog=60).main(validation_batch_size='-1', test_batch_size='7')
    out = capsys.readouterr().out
    images = [path for path in job.data.rglob('*.jpg') if get_set(job.folder, path) == 'validation']
    assert 'Step 0: Validation accuracy = ' in out
    assert set(re.findall(r'Validation accuracy = .*N=(\d+)', out)) == {str(len(images))}
    assert re.search(r'Final test accuracy = .*\(N=7\)', out)


@pytest.mark.parametrize(('right', 'count'), [(307, 337), (26, 26), (0, 10), (5, 10), (1, 1)])
def test_interval_of_the_accuracy(right, count):
    """Its bounds are the shares from which the measured one is 1.96 standard deviations away."""
    share, bounds = right / count, tf_retrain.get_interval(right, count)
    for bound in bounds:
        assert abs(share - bound) == pytest.approx(
            1.96 * math.sqrt(bound * (1 - bound) / count), abs=1e-6
        )
    assert bounds[0] <= share <= bounds[1] + 1e-9
    assert tf_retrain.get_interval(307, 337) == pytest.approx((0.876, 0.937), abs=5e-4)


def test_the_interval_is_printed_with_advice_where_it_is_wide(trained):
    lines = trained.process.stdout.splitlines()
    (i,) = [i for i, line in enumerate(lines) if line.startswith('Final test accuracy')]
    accuracy, count = re.fullmatch(r'Final test accuracy = (.+)% \(N=(\d+)\)', lines[i]).groups()
    right = round(float(accuracy) * int(count) / 100)
    low, high = (100 * bound for bound in tf_retrain.get_interval(right, int(count)))
    advice = f' About {4 * int(count)} test images would halve it.' if high - low > 10 else ''
    expected = f'95% confidence interval: {low:.1f} to {high:.1f}%.{advice}'
    assert lines[i + 1] == expected


# Outputs


def test_outputs_are_tried_before_any_work(job):
    job.photographs(cat=20, dog=20)
    (job.folder / 'file').touch()
    (job.folder / 'folder').mkdir()
    for flag, value, message in [
        ('output_graph', 'file/g.pb', "--output_graph: nothing can be written in 'file'"),
        ('output_labels', 'folder', "--output_labels: 'folder' is a folder."),
        ('output_labels', 'new/', "--output_labels: 'new/' is a folder."),
        ('optimized_graph', 'file/o.pb', "--optimized_graph: nothing can be written in 'file'"),
        ('bottleneck_dir', 'file', "--bottleneck_dir: nothing can be written in 'file'"),
        ('summaries_dir', 'file', "--summaries_dir: nothing can be written in 'file/train'"),
        (
            'final_tensor_name',
            'mixed/join',
            '--final_tensor_name: the graph already has a node named mixed/join.',
        ),
        (
            'final_tensor_name',
            'input/x',
            '--final_tensor_name: the graph already has a node named input/x.',
        ),
    ]:
        with (
            pytest.raises(UserError, match=re.escape(message)),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(tf_retrain, 'compute_bottlenecks', None)
            job.main(patch, **{flag: value})
    assert not list((job.folder / 'bottlenecks').rglob('*.txt'))


def test_outputs_must_not_overwrite_each_other_or_the_model(job):
    job.photographs(cat=20, dog=20)
    model = 'inception/classify_image_graph_def.pb'
    for changes in (
        {'output_graph': model},
        {'output_labels': f'./{model}'},
        {
            'optimized_graph': 'inception/mobilenet_v1_0.25_128/frozen_graph.pb'
        },  # also one that is not there yet
        {'output_labels': 'x', 'output_graph': 'x'},
        {'output_labels': 'x.json', 'output_graph': 'x'},
    ):
        flag, path = next(iter(changes.items()))
        named = (
            f'--{flag}: {path} is the pretrained model'
            if len(changes) == 1
            else 'must be different files'
        )
        with pytest.raises(UserError, match=re.escape(named)):
            job.main(**changes)


def test_output_folders_are_created(job):
    job.photographs(cat=20, dog=20)
    job.main(
        output_graph='new/a/g.pb',
        output_labels='new/b/l.txt',
        summaries_dir='new/logs',
    )
    assert sorted(
        p.name for p in (job.folder / 'new').rglob('*') if p.suffix in ('.pb', '.txt')
    ) == ['g.pb', 'l.txt']


@pytest.mark.parametrize('failing', ['a/output', 'b/output', 'c/output'])
def test_an_output_that_cannot_be_written_is_named(job, monkeypatch, failing):
    """Three outputs of the same name in different folders."""
    outputs = {
        'output_graph': 'a/output',
        'output_labels': 'b/output',
        'optimized_graph': 'c/output',
    }
    job.photographs(cat=20, dog=20)
    write = tf_retrain.write_whole

    def write_whole(path, contents):
        if path == failing:
            raise tf.errors.ResourceExhaustedError(None, None, f'{path}; No space left on device')
        write(path, contents)

    monkeypatch.setattr(tf_retrain, 'write_whole', write_whole)
    with pytest.raises(
        UserError,
        match=f'^{failing} cannot be written .*No space left on device.*run the same command',
    ):
        job.main(**outputs)


def test_errors_are_one_line_and_exit_code_1(job):
    process = job.run(check=False)
    assert process.returncode == 1
    assert process.stdout == ''
    message = (
        "ERROR: --image_dir: there is no folder 'data/'. Name the one with your class folders.\n"
    )
    assert process.stderr == message


def test_final_tensor_name(job):
    job.photographs(cat=20, dog=20).main(final_tensor_name='scores')
    assert job.graph().node[-1].name == 'scores'
    files = 'trained_model/unoptimized_model.pb', 'trained_model/labels.txt'
    assert len(run('tf_test.py', job.test_image(), *files, cwd=job.folder).stdout.splitlines()) == 2


# Extras


def test_an_extra_that_fails_is_a_warning(job, monkeypatch, capsys):
    """Cache files that vanish, pictures and the record that cannot be written: the graph is written all the same."""
    job.photographs(cat=30, dog=30)
    train, write_whole = tf_retrain.train, tf_retrain.write_whole

    def lose_the_cache(*arguments):
        layer = train(*arguments)
        for path in (job.folder / 'bottlenecks').rglob('*.txt'):
            path.unlink()
        return layer

    def refuse(path, contents):
        if path.endswith(('.json', 'thumbnails')):
            raise tf.errors.ResourceExhaustedError(None, None, f'{path}; No space left on device')
        write_whole(path, contents)

    monkeypatch.setattr(tf_retrain, 'train', lose_the_cache)
    monkeypatch.setattr(tf_retrain, 'find_near_copies', None)
    monkeypatch.setattr(tf_retrain, 'write_whole', refuse)
    job.main()
    out = capsys.readouterr().out
    for name in (
        'the search for duplicates',
        'the record of the run',
        'the pictures for TensorBoard',
    ):
        assert f'WARNING: {name} left out (' in out
    assert out.splitlines()[-1].startswith('python3 tf_test.py')
    assert job.graph().node[-1].name == 'final_result'
    assert (job.folder / job.flags['output_labels']).read_text() == 'cat\ndog\n'


def test_logs_that_cannot_be_written_are_a_warning(job, monkeypatch, capsys):
    job.photographs(cat=30, dog=30)

    class FullDisk(tf.io.TFRecordWriter):
        count = 0

        def write(self, record):
            FullDisk.count += 1
            if FullDisk.count > 9:
                raise tf.errors.ResourceExhaustedError(
                    None, None, 'logs/train; No space left on device'
                )
            super().write(record)

    monkeypatch.setattr(tf_retrain.tf.io, 'TFRecordWriter', FullDisk)
    job.main()
    out = capsys.readouterr().out
    assert 1 <= out.count('No space left on device. The training goes on without logs.') <= 3
    assert 'Step 29: Validation accuracy' in out
    assert job.graph().node[-1].name == 'final_result'


def test_record(trained):
    """It says what the run did, and what is needed to do it again."""
    text = (trained.folder / 'trained_model/unoptimized_model.pb.json').read_text()
    record = json.loads(text)
    readme = (ROOT / 'trained_model/README.md').read_text()
    assert list(record) == re.findall(r'^\| `(\w+)` \|', readme, re.MULTILINE)
    assert record['command'][1:] == trained.arguments('--print_misclassified_test_images')
    assert record['flags'] == vars(parse(*record['command'][1:]))
    assert record['versions']['tensorflow'] == tf.__version__
    assert record['labels'] == ['red fox', 'cat', 'dog']
    assert record['network']['source'] == 'inception/classify_image_graph_def.pb'
    assert record['network']['input']['size'] == [299, 299]
    assert sum(sum(counts.values()) for counts in record['images'].values()) == 145
    assert (
        sum(record['images']['testing'].values())
        == len(trained.test_images())
        == record['test']['images']
    )
    confusion = np.array(record['test']['confusion'])
    assert confusion.sum() == record['test']['images']
    assert record['test']['accuracy'] == pytest.approx(np.trace(confusion) / confusion.sum())
    low, high = record['test']['interval']
    assert low < record['test']['accuracy'] <= high
    assert record['unreadable'] == 0
    assert math.isfinite(record['seconds'])


def test_the_command_in_a_record_gives_the_same_graph(trained, tmp_path):
    record = json.loads((trained.folder / 'trained_model/unoptimized_model.pb.json').read_text())
    script, *arguments = record['command']
    changes = [
        f'--output_graph={tmp_path}/g.pb',
        f'--output_labels={tmp_path}/l',
        f'--summaries_dir={tmp_path}/logs',
    ]
    subprocess.run(
        [sys.executable, script, *arguments, *changes],
        cwd=trained.folder,
        check=True,
        capture_output=True,
    )
    assert (tmp_path / 'g.pb').read_bytes() == (
        trained.folder / 'trained_model/unoptimized_model.pb'
    ).read_bytes()
    again = json.loads((tmp_path / 'g.pb.json').read_text())
    volatile = ('command', 'flags', 'started', 'seconds')
    for name in volatile:
        del record[name], again[name]
    assert again == record


# The tf.data service


@pytest.mark.slow
def test_data_service_computes_every_bottleneck_once(job, monkeypatch):
    job.photographs(cat=600, dog=600)
    job.cache(bottleneck_dir='alone')
    monkeypatch.setattr(
        tf_retrain, 'run_networks', lambda networks, batches: iter(())
    )  # the workers compute it all
    with DataService() as service:
        out = job.cache(bottleneck_dir='b', data_service=service.dispatcher.target)
    assert out.count('Creating bottleneck at') == 1200
    check_same_bottlenecks(job.folder / 'alone', job.folder / 'b')


@pytest.mark.slow
def test_data_service_that_loses_a_worker(job, monkeypatch):
    job.photographs(cat=600, dog=600)
    job.cache(bottleneck_dir='alone')
    monkeypatch.setattr(tf_retrain, 'DATA_SERVICE_TIMEOUT', 10)
    here = []
    run_networks = tf_retrain.run_networks
    with DataService() as service:

        def kill_after_some(path, contents, write=tf_retrain.write_whole):
            write(path, contents)
            if len(list((job.folder / 'b').rglob('*.txt'))) == 200:
                service.workers[0].kill()

        def count(networks, batches):
            for tags, bottlenecks in run_networks(networks, batches):
                here.extend(tags)
                yield tags, bottlenecks

        monkeypatch.setattr(tf_retrain, 'write_whole', kill_after_some)
        monkeypatch.setattr(tf_retrain, 'run_networks', count)
        out = job.cache(bottleneck_dir='b', data_service=service.dispatcher.target)
    assert out.count('Creating bottleneck at') == 1200
    # A worker has a few batches in its hands: those that it is making, and those that wait to be sent.
    assert 0 < len(here) <= 16 * tf_retrain.NETWORK_BATCH_SIZE
    check_same_bottlenecks(job.folder / 'alone', job.folder / 'b')


SHORT_TIMEOUT = """
import tf_retrain
tf_retrain.DATA_SERVICE_TIMEOUT = 5
tf_retrain.run(tf_retrain.main, tf_retrain.parse_flags(tf_retrain.create_parser()))
"""


def check_computed_here(job, target):
    """Runs a job with a service that hangs: its images are computed here after a warning, and the process ends."""
    command = [sys.executable, '-c', SHORT_TIMEOUT, *job.arguments(data_service=target)]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    process = subprocess.run(
        command, cwd=job.folder, env=environment, capture_output=True, text=True, timeout=45
    )
    assert process.returncode == 0
    assert process.stderr == ''
    assert re.search(r'WARNING: grpc://\S+ failed \(nothing came for 5 s\)\.', process.stdout)
    assert re.search(r'WARNING: grpc://\S+ left out 60 of 60 images\.', process.stdout)
    assert len(created(process.stdout)) == 60


@pytest.mark.slow
def test_workers_that_hang_do_not_hold_up_the_run(job):
    """Neither when they bring nothing, nor at the end of the process."""
    job.photographs(cat=30, dog=30)
    with DataService() as service:
        for worker in service.workers:
            worker.send_signal(signal.SIGSTOP)
        check_computed_here(job, service.dispatcher.target)


@pytest.mark.slow
def test_a_dispatcher_that_hangs_does_not_hold_up_the_run(job):
    """It lets clients connect, and answers nothing."""
    job.photographs(cat=30, dog=30)
    with socket.create_server(('localhost', 0)) as dispatcher:
        check_computed_here(job, f'grpc://localhost:{dispatcher.getsockname()[1]}')


def test_a_data_service_that_fails_says_why_at_once(job, monkeypatch):
    """The rest is computed here, without the wait for what does not come."""
    job.photographs(cat=30, dog=30)
    monkeypatch.setattr(
        tf_retrain, 'DATA_SERVICE_TIMEOUT', 100_000
    )  # the test would not end in time

    def fail(*arguments):
        return lambda batches: batches.map(
            lambda tags, images: (tags, tf.debugging.check_numerics(images / 0, 'reason'))
        )

    monkeypatch.setattr(tf.data.experimental.service, 'distribute', fail)
    dispatcher = tf.data.experimental.service.DispatchServer()
    out = job.cache(data_service=dispatcher.target)
    assert re.search(r'WARNING: grpc://\S+ failed \(.*reason.*\)\.', out, re.DOTALL)
    assert re.search(r'WARNING: grpc://\S+ left out 60 of 60 images\. They are tried here\.', out)
    assert len(created(out)) == 60


def test_data_service_that_is_not_there(job):
    job.photographs(cat=20, dog=20)
    with pytest.raises(
        UserError, match='--data_service: grpc://localhost:1 does not answer .*Start it, or leave'
    ):
        job.main(data_service='grpc://localhost:1')


@pytest.mark.slow
def test_no_script_does_what_is_deprecated(job, monkeypatch):
    monkeypatch.setenv('PYTHONWARNINGS', 'error::DeprecationWarning')
    flags = (
        '--saved_model_dir=saved/1',
        '--optimized_graph=optimized.pb',
        '--random_brightness=1',
        '--find_suspects=1',
    )
    arguments = job.photographs(cat=20, dog=20).arguments(how_many_training_steps='2')
    run_new('retrain_serving.py', *arguments, *flags, cwd=job.folder)
    run_new('tf_retrain.py', *arguments, cwd=job.folder)
    run_new(
        'tf_test.py',
        job.test_image(),
        job.flags['output_graph'],
        job.flags['output_labels'],
        cwd=job.folder,
    )
    assert os.path.exists(job.folder / 'optimized.pb')
