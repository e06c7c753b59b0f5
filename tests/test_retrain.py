"""tf_retrain.py from the command line, from photographs to graph, labels and logs."""

import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import build_model, category, run, run_v1
from PIL import Image

import tf_retrain
from tf_retrain import tf


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
            assert sum(bool(re.fullmatch(f'{stamp}Step {step}: {text}', line)) for line in lines) == 1
    assert sum('Step' in line for line in lines) == 12
    paths = sorted(trained.data.rglob('*.jpg'))
    test_images = sum(category(trained.folder, path) == 'testing' for path in paths)
    final = next(re.fullmatch(r'Final test accuracy = (.+)% \(N=(\d+)\)', line) for line in lines if 'Final' in line)
    assert int(final[2]) == test_images
    assert float(final[1]) > 90
    created = {line.removeprefix('Creating bottleneck at ') for line in lines if line.startswith('Creating')}
    assert created == {f'bottlenecks/{path.relative_to(trained.data)}.txt' for path in paths}
    assert '100 bottleneck files created.' in lines
    assert lines[-1] == 'python3 tf_test.py <path to image> trained_model/unoptimized_model.pb trained_model/labels.txt'
    # Only the progress bar is left on stderr: TensorFlow's chatter is gone.
    assert [line for line in trained.process.stderr.splitlines() if line and 'Bottlenecks:' not in line] == []
    assert 'image/s]' in trained.process.stderr


def test_misclassified_images_are_listed(trained):
    lines = trained.process.stdout.splitlines()
    start = lines.index('=== MISCLASSIFIED TEST IMAGES ===')
    listed = [line for line in lines[start + 1 :] if not line.startswith(('Wrote', 'python3'))]
    wrong = []
    graph_def, labels = trained.graph(), (trained.folder / 'trained_model/labels.txt').read_text().splitlines()
    for path in sorted(trained.data.rglob('*.jpg')):
        if category(trained.folder, path) == 'testing':
            best = labels[run_v1(graph_def, path.read_bytes(), 'final_result:0')[0].argmax()]
            if best != tf_retrain.get_label(path.parent.name):
                wrong.append(f'{path.relative_to(trained.folder)!s:>70}  {best}')
    assert sorted(listed) == sorted(wrong)
    accuracy = next(line for line in lines if line.startswith('Final test accuracy'))
    number = int(re.search(r'N=(\d+)', accuracy)[1])
    assert f'= {100 * (1 - len(wrong) / number):.1f}%' in accuracy


def test_cache_files_are_those_of_the_original(trained):
    path = trained.data / 'cat' / 'cat 3.jpg'
    text = (trained.folder / 'bottlenecks/cat/cat 3.jpg.txt').read_text()
    numbers = np.array([float(number) for number in text.split(',')], np.float32)
    assert text == ','.join(str(number) for number in numbers)  # also: one line, no newline at its end
    expected = run_v1(build_model(), path.read_bytes(), 'pool_3/_reshape:0')[0]
    np.testing.assert_allclose(numbers, expected, atol=1e-5 * np.abs(expected).max())


def test_labels_file(trained):
    assert (trained.folder / 'trained_model/labels.txt').read_bytes() == b'red fox\ncat\ndog\n'


def test_frozen_graph(trained):
    graph_def = trained.graph()
    assert not graph_def.versions.producer
    model = {node.name: node for node in build_model().node}
    names = [node.name for node in graph_def.node]
    kept = [name for name in model if not name.startswith('softmax')]
    assert names[: len(kept)] == kept
    for node in graph_def.node[: len(kept)]:
        assert node == model[node.name]
    added = {node.name: (node.op, list(node.input), sorted(node.attr)) for node in graph_def.node[len(kept) :]}
    scope = 'final_training_ops'
    weights, biases = f'{scope}/weights/final_weights', f'{scope}/biases/final_biases'
    assert added == {
        'input/BottleneckInputPlaceholder': ('PlaceholderWithDefault', ['pool_3/_reshape'], ['dtype', 'shape']),
        weights: ('Const', [], ['dtype', 'value']),
        f'{weights}/read': ('Identity', [weights], ['T']),
        biases: ('Const', [], ['dtype', 'value']),
        f'{biases}/read': ('Identity', [biases], ['T']),
        f'{scope}/Wx_plus_b/MatMul': (
            'MatMul',
            ['input/BottleneckInputPlaceholder', f'{weights}/read'],
            ['T', 'transpose_a', 'transpose_b'],
        ),
        f'{scope}/Wx_plus_b/add': ('AddV2', [f'{scope}/Wx_plus_b/MatMul', f'{biases}/read'], ['T']),
        'final_result': ('Softmax', [f'{scope}/Wx_plus_b/add'], ['T']),
    }
    nodes = {node.name: node for node in graph_def.node}
    shape = nodes['input/BottleneckInputPlaceholder'].attr['shape'].shape
    assert [dim.size for dim in shape.dim] == [-1, 2048]
    assert tf.make_ndarray(nodes[weights].attr['value'].tensor).shape == (2048, 3)


def events(folder):
    """Returns the events of a run, as TensorBoard would read them."""
    (path,) = folder.glob('events.out.tfevents.*')
    return list(tf.compat.v1.train.summary_iterator(str(path)))


SCALARS = [
    f'final_training_ops/{v}/summaries/{s}_1' for v in ('weights', 'biases') for s in ('mean', 'stddev', 'max', 'min')
]
HISTOGRAMS = [
    'final_training_ops/weights/summaries/histogram',
    'final_training_ops/biases/summaries/histogram',
    'final_training_ops/Wx_plus_b/pre_activations',
    'activations',
]


def test_summaries(trained):
    for name in ('train', 'validation'):
        written = events(trained.folder / 'logs' / name)
        assert written[0].file_version == 'brain.Event:2'
        steps = {}
        for event in written:
            for value in event.summary.value:
                steps.setdefault(value.tag, []).append(event.step)
                kind = value.WhichOneof('value')
                assert kind == ('histo' if value.tag in HISTOGRAMS else 'simple_value')
        losses = list(range(30)) if name == 'train' else [0, 10, 20, 29]
        expected = dict.fromkeys([*SCALARS, *HISTOGRAMS], [0, 10, 20, 29])
        assert steps == {**expected, 'cross_entropy_1': losses, 'accuracy_1': losses}


def test_logged_graph_has_no_weights(trained):
    (graph,) = [event.graph_def for event in events(trained.folder / 'logs' / 'train') if event.graph_def]
    logged = tf.compat.v1.GraphDef.FromString(graph)
    assert [node.name for node in logged.node] == [node.name for node in trained.graph().node]
    assert len(graph) < 20_000 < trained.graph().ByteSize()
    assert not any(event.graph_def for event in events(trained.folder / 'logs' / 'validation'))


def test_a_second_run_computes_nothing_and_gives_the_same(trained, monkeypatch, capsys, tmp_path):
    graph = (trained.folder / 'trained_model/unoptimized_model.pb').read_bytes()
    monkeypatch.setattr(tf_retrain.Backbone, 'create_network', None)  # it would be called for a single bottleneck
    elsewhere = {'output_graph': str(tmp_path / 'g.pb'), 'summaries_dir': str(tmp_path / 'logs')}
    trained.main(monkeypatch, **elsewhere)
    assert 'Creating' not in capsys.readouterr().out
    assert (tmp_path / 'g.pb').read_bytes() == graph
    trained.main(monkeypatch, **elsewhere, random_seed='2')
    assert (tmp_path / 'g.pb').read_bytes() != graph


def test_images_with_a_cache_file_of_the_original_are_not_read(job, monkeypatch, capsys):
    job.photographs(cat=30, dog=30)
    job.main(monkeypatch)
    (journal,) = (job.folder / 'bottlenecks').glob('.provenance-*')
    journal.unlink()  # the original writes none
    for path in job.data.rglob('*.jpg'):
        path.write_bytes(b'')
    capsys.readouterr()
    monkeypatch.setattr(tf_retrain.Backbone, 'create_network', None)
    job.main(monkeypatch)
    assert 'is left out' not in capsys.readouterr().out


def test_broken_cache_files_are_made_again(job, monkeypatch, capsys):
    job.photographs(cat=30, dog=30)
    job.main(monkeypatch)
    paths = sorted((job.folder / 'bottlenecks').rglob('*.txt'))
    whole = {path: path.read_text() for path in paths}
    paths[3].write_text('')
    paths[8].write_text(whole[paths[8]][:1000])
    paths[9].unlink()
    capsys.readouterr()
    job.main(monkeypatch)
    out = capsys.readouterr().out
    assert out.count('Invalid float found, recreating bottleneck') == 2
    assert out.count('Creating bottleneck at') == 3
    for path, text in whole.items():
        np.testing.assert_allclose(
            np.fromstring(path.read_text(), sep=','), np.fromstring(text, sep=','), rtol=1e-4, atol=1e-6
        )


def test_zero_steps_evaluate_the_untrained_layer(job, monkeypatch, capsys):
    job.photographs(cat=30, dog=30).main(monkeypatch, how_many_training_steps='0')
    out = capsys.readouterr().out
    assert 'Step' not in out
    assert 'Final test accuracy = ' in out
    assert len(job.graph().node) == len(build_model().node) - 3 + 8


@pytest.mark.parametrize('interval', ['7', '250'])
def test_evaluations_come_at_the_interval_and_at_the_end(job, monkeypatch, capsys, interval):
    job.photographs(cat=25, dog=25).main(monkeypatch, how_many_training_steps='230', eval_step_interval=interval)
    steps = re.findall(r'Step (\d+): Train', capsys.readouterr().out)
    assert [int(step) for step in steps] == sorted({*range(0, 230, int(interval)), 229})
    losses = [e.step for e in events(job.folder / 'logs/train') if any(v.tag == 'accuracy_1' for v in e.summary.value)]
    assert losses == list(range(230))


def test_tiny_classes_never_crash(job, monkeypatch, capsys):
    """Three images a class leave sets empty, which the original met with a ZeroDivisionError."""
    job.photographs(cat=3, dog=3, fox=3).main(monkeypatch)
    out = capsys.readouterr().out
    assert out.count('WARNING: Folder has less than 20 images, which may cause issues.') == 3
    assert 'WARNING: no testing image in' in out
    assert 'WARNING: no validation image in' in out
    assert (job.folder / 'trained_model/labels.txt').exists()


def test_without_validation_and_test_images(job, monkeypatch, capsys):
    flags = {'testing_percentage': '0', 'validation_percentage': '0'}
    job.photographs(cat=20, dog=20).main(monkeypatch, '--print_misclassified_test_images', **flags)
    out = capsys.readouterr().out
    assert 'Validation accuracy' not in out
    assert 'Final test accuracy: unknown' in out
    assert 'WARNING' not in out


def test_whole_sets_and_samples(job, monkeypatch, capsys):
    job.photographs(cat=60, dog=60).main(monkeypatch, validation_batch_size='-1', test_batch_size='7')
    out = capsys.readouterr().out
    images = [path for path in job.data.rglob('*.jpg') if category(job.folder, path) == 'validation']
    assert 'Step 0: Validation accuracy = ' in out
    assert set(re.findall(r'Validation accuracy = .*N=(\d+)', out)) == {str(len(images))}
    assert re.search(r'Final test accuracy = .*\(N=7\)', out)


def test_png_gif_and_misnamed_files_are_used(job, monkeypatch, capsys):
    job.photographs(cat=20, dog=20)
    with Image.open(job.data / 'cat' / 'cat 0.jpg') as image:
        image.save(job.data / 'cat' / 'a.png')
        image.save(job.data / 'cat' / 'b.gif')
        image.save(job.data / 'cat' / 'png named.jpg', 'PNG')
    job.main(monkeypatch)
    assert 'is left out' not in capsys.readouterr().out
    assert {p.name for p in (job.folder / 'bottlenecks/cat').iterdir()} >= {
        'a.png.txt',
        'b.gif.txt',
        'png named.jpg.txt',
    }


def test_unreadable_images_are_named_and_left_out(job, monkeypatch, capsys):
    job.photographs(cat=30, dog=30)
    (job.data / 'cat/empty.jpg').touch()
    photograph = (job.data / 'cat/cat 0.jpg').read_bytes()
    (job.data / 'cat/short.jpg').write_bytes(photograph[: len(photograph) // 2])
    (job.data / 'dog/page.jpg').write_text('<!doctype html>')
    (job.data / 'dog/folder.jpg').mkdir()
    job.main(monkeypatch)
    out = capsys.readouterr().out
    for name in ('cat/empty.jpg', 'cat/short.jpg', 'dog/page.jpg', 'dog/folder.jpg'):
        assert len(re.findall(rf"WARNING: 'data/{name}' is left out: .+", out)) == 1
    assert 'WARNING: 4 of 64 images are left out.' in out
    assert len(list((job.folder / 'bottlenecks').rglob('*.txt'))) == 60


def test_a_class_without_readable_images(job):
    job.photographs(cat=20, dog=20)
    (job.data / 'fox').mkdir()
    (job.data / 'fox/1.jpg').write_bytes(b'not an image')
    process = job.run(check=False)
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert last == "ERROR: No image in the class folder 'fox' can be read. Add some, or remove the folder."
    assert len(list((job.folder / 'bottlenecks').rglob('*.txt'))) == 40  # what was computed is kept


@pytest.mark.parametrize(
    'distortion', ['--flip_left_right', '--random_crop=10', '--random_scale=10', '--random_brightness=10']
)
def test_training_with_distortions(job, monkeypatch, distortion):
    job.photographs(cat=25, dog=25)
    job.main(monkeypatch, distortion, how_many_training_steps='12', train_batch_size='40')
    distorted = job.graph()
    job.main(monkeypatch, distortion, how_many_training_steps='12', train_batch_size='40')
    assert job.graph() == distorted  # with the same seed
    job.main(monkeypatch, how_many_training_steps='12', train_batch_size='40')
    assert job.graph() != distorted
    scores = run_v1(distorted, (job.data / 'cat/cat 0.jpg').read_bytes(), 'final_result:0')[0]
    assert scores.argmax() == 0
    losses = [e.step for e in events(job.folder / 'logs/train') if any(v.tag == 'accuracy_1' for v in e.summary.value)]
    assert losses == list(range(12))


def test_final_tensor_name(job, monkeypatch):
    job.photographs(cat=20, dog=20).main(monkeypatch, final_tensor_name='scores')
    assert job.graph().node[-1].name == 'scores'
    process = run(
        'tf_test.py', job.test_image(), 'trained_model/unoptimized_model.pb', 'trained_model/labels.txt', cwd=job.folder
    )
    assert len(process.stdout.splitlines()) == 2


def test_only_event_files_are_removed_from_the_logs(job, monkeypatch):
    job.photographs(cat=20, dog=20)
    keep = [
        'train/notes.txt',
        'train/other/events.out.tfevents.1',
        'mine/events.out.tfevents.1',
        'events.out.tfevents.2',
    ]
    for name in (*keep, 'train/events.out.tfevents.123.host', 'validation/events.out.tfevents.123.host.v2'):
        (job.folder / 'logs' / name).parent.mkdir(parents=True, exist_ok=True)
        (job.folder / 'logs' / name).write_text('x')
    job.main(monkeypatch)
    assert all((job.folder / 'logs' / name).read_text() == 'x' for name in keep)
    assert len(events(job.folder / 'logs/train')) > 10
    assert len(events(job.folder / 'logs/validation')) == 5


def test_outputs_are_tried_before_any_work(job):
    job.photographs(cat=20, dog=20)
    (job.folder / 'file').touch()
    (job.folder / 'folder').mkdir()
    for flag, value, message in [
        ('output_graph', 'file/g.pb', "--output_graph: nothing can be written in 'file'"),
        ('output_labels', 'folder', "--output_labels: 'folder' is a folder."),
        ('output_labels', 'new/', "--output_labels: 'new/' is a folder."),
        ('bottleneck_dir', 'file', "--bottleneck_dir: nothing can be written in 'file'"),
        ('summaries_dir', 'file', "--summaries_dir: nothing can be written in 'file/train'"),
        ('final_tensor_name', 'mixed/join', '--final_tensor_name: the graph has another mixed/join.'),
    ]:
        with pytest.raises(tf_retrain.UserError, match=re.escape(message)), pytest.MonkeyPatch.context() as patch:
            job.main(patch, **{flag: value})
    assert not list((job.folder / 'bottlenecks').rglob('*.txt'))


def test_output_folders_are_created(job, monkeypatch):
    job.photographs(cat=20, dog=20)
    job.main(monkeypatch, output_graph='new/a/g.pb', output_labels='new/b/l.txt', summaries_dir='new/logs')
    assert sorted(p.name for p in (job.folder / 'new').rglob('*') if p.suffix in ('.pb', '.txt')) == ['g.pb', 'l.txt']


def test_errors_are_one_line_and_exit_code_1(job):
    process = job.run(check=False)
    assert process.returncode == 1
    assert process.stdout == ''
    message = "ERROR: --image_dir: there is no folder 'data/'. Name the one that holds your class folders.\n"
    assert process.stderr == message


def test_usage_errors_are_exit_code_2():
    process = run('tf_retrain.py', '--image_dir', 'data/', '--no_such_flag', '1', check=False)
    assert process.returncode == 2
    process = run('tf_retrain.py', check=False)
    assert process.returncode == 2
    assert '--image_dir: name the folder' in process.stderr.splitlines()[-1]


def test_help_names_every_flag_and_default():
    text = run('tf_retrain.py', '--help').stdout
    for flag, default in vars(tf_retrain.create_parser().parse_args(['--image_dir=x'])).items():
        assert f'--{flag}' in text
        assert default in ('x', None) or default is False or f'(default: {default})' in re.sub(r'\s+', ' ', text)
    assert len(text.splitlines()) <= 80 >= max(map(len, text.split('the usual command')[0].splitlines()))


def test_a_model_of_another_kind(job, monkeypatch):
    job.photographs(cat=20, dog=20)
    path = job.folder / 'inception/classify_image_graph_def.pb'
    path.unlink()
    path.write_bytes(b'<html>')
    with pytest.raises(tf_retrain.UserError, match='classify_image_graph_def.pb is not a TensorFlow graph'):
        job.main(monkeypatch)
    graph_def = build_model()
    del graph_def.node[-6:]
    path.write_bytes(graph_def.SerializeToString())
    with pytest.raises(tf_retrain.UserError, match=r'it lacks pool_3, pool_3/_reshape\.'):
        job.main(monkeypatch)


def interrupt_at(process, pattern, wait=0):
    """Reads the output up to a line that matches, waits, sends Ctrl-C, and returns all lines so far."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            time.sleep(wait)
            process.send_signal(signal.SIGINT)
            return lines
    raise AssertionError(''.join(lines))


def test_ctrl_c_stops_training_and_keeps_what_was_learned(job):
    job.photographs(cat=30, dog=30)
    process = job.start(how_many_training_steps='100000000')
    interrupt_at(process, 'Step 1000: Train')
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert 'Ctrl-C: what was learned so far will be tested and written.' in out
    assert 'Final test accuracy = ' in out
    scores = run_v1(job.graph(), (job.data / 'dog/dog 0.jpg').read_bytes(), 'final_result:0')[0]
    assert scores.argmax() == 1
    assert (job.folder / 'trained_model/labels.txt').exists()


def test_a_second_ctrl_c_quits(job):
    job.photographs(cat=30, dog=30)
    process = job.start('--random_brightness=1', how_many_training_steps='100000', train_batch_size='6000')
    interrupt_at(process, 'Step 0: Train', wait=0.5)  # in the middle of step 1, which takes seconds
    interrupt_at(process, 'Ctrl-C: what was learned')
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 'Traceback' not in out
    assert out.splitlines()[-1].startswith('Stopped. All bottlenecks computed so far are kept')
    assert not (job.folder / 'trained_model/unoptimized_model.pb').exists()


def test_ctrl_c_while_caching_keeps_what_was_computed(job):
    job.photographs(cat=2000, dog=2000)
    process = job.start()
    interrupt_at(process, '100 bottleneck files created')
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 'Traceback' not in out
    files = list((job.folder / 'bottlenecks').rglob('*'))
    done = [path for path in files if path.suffix == '.txt']
    assert 100 <= len(done) < 4000
    assert tf_retrain.read_bottlenecks([str(path) for path in done], 2048)[2].all()
    assert not list((job.folder / 'bottlenecks').rglob('*.tmp'))  # no half-written file stays


class DataService:
    """A dispatcher in this process, and two worker processes."""

    WORKER = """
import sys
import tensorflow as tf
service = tf.data.experimental.service
server = service.WorkerServer(service.WorkerConfig(dispatcher_address=sys.argv[1]))
print('up', flush=True)
server.join()
"""

    def __enter__(self):
        self.dispatcher = tf.data.experimental.service.DispatchServer()
        command = [sys.executable, '-c', self.WORKER, self.dispatcher.target.removeprefix('grpc://')]
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.DEVNULL}
        self.workers = [subprocess.Popen(command, **pipes) for _ in range(2)]
        assert [worker.stdout.readline() for worker in self.workers] == [b'up\n', b'up\n']
        return self

    def __exit__(self, *exception):
        for worker in self.workers:
            worker.kill()
            worker.wait()


@pytest.mark.slow
def test_data_service_computes_every_bottleneck_once(job, monkeypatch, capsys):
    job.photographs(cat=600, dog=600)
    job.main(monkeypatch, how_many_training_steps='0', bottleneck_dir='alone')
    monkeypatch.setattr(tf_retrain, 'run_networks', None)  # all is computed by the workers
    capsys.readouterr()
    with DataService() as service:
        job.main(monkeypatch, how_many_training_steps='0', bottleneck_dir='b', data_service=service.dispatcher.target)
    assert capsys.readouterr().out.count('Creating bottleneck at') == 1200
    assert_same_bottlenecks(job.folder / 'alone', job.folder / 'b')


@pytest.mark.slow
def test_data_service_that_loses_a_worker(job, monkeypatch, capsys):
    job.photographs(cat=600, dog=600)
    job.main(monkeypatch, how_many_training_steps='0', bottleneck_dir='alone')
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
        capsys.readouterr()
        job.main(monkeypatch, how_many_training_steps='0', bottleneck_dir='b', data_service=service.dispatcher.target)
    assert capsys.readouterr().out.count('Creating bottleneck at') == 1200
    # A worker has a few batches in its hands: those that it is making, and those that wait to be fetched.
    assert 0 < len(here) <= 16 * tf_retrain.NETWORK_BATCH_SIZE
    assert_same_bottlenecks(job.folder / 'alone', job.folder / 'b')


def assert_same_bottlenecks(expected_dir, found_dir):
    paths = [path.relative_to(expected_dir) for path in expected_dir.rglob('*.txt')]
    assert sorted(paths) == sorted(path.relative_to(found_dir) for path in found_dir.rglob('*.txt'))
    expected, found = (
        tf_retrain.read_bottlenecks([str(d / path) for path in paths], 2048) for d in (expected_dir, found_dir)
    )
    assert expected[2].all()
    assert found[2].all()
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5 * np.abs(expected[0]).max())


def test_data_service_that_is_not_there(job, monkeypatch):
    job.photographs(cat=20, dog=20)
    with pytest.raises(tf_retrain.UserError, match='--data_service: no dispatcher answers at grpc://localhost:1 '):
        job.main(monkeypatch, data_service='grpc://localhost:1')


def test_every_path_may_be_any_that_tensorflow_reads(job, monkeypatch, capsys):
    """All folders in TensorFlow's file system in memory, which stands for gs:// and its like."""
    job.photographs(cat=25, dog=25)
    for path in [*job.data.rglob('*.jpg'), *(job.folder / 'inception').iterdir()]:
        target = f'ram://job/{path.relative_to(job.folder)}'
        tf.io.gfile.makedirs(target.rpartition('/')[0])
        tf.io.gfile.copy(str(path), target)
    paths = {name: f'ram://job/{value}' for name, value in job.flags.items() if '/' in value or value == 'logs'}
    job.main(monkeypatch, **paths)
    out = capsys.readouterr().out
    assert out.count('Creating bottleneck at ram://job/bottlenecks/') == 50
    job.main(monkeypatch, **paths)
    assert 'Creating' not in capsys.readouterr().out
    with tf.io.gfile.GFile('ram://job/trained_model/unoptimized_model.pb', 'rb') as file:
        graph_def = tf.compat.v1.GraphDef.FromString(file.read())
    scores = run_v1(graph_def, (job.data / 'dog/dog 0.jpg').read_bytes(), 'final_result:0')[0]
    assert scores.argmax() == 1
    assert tf.io.gfile.glob('ram://job/logs/train/events.*')
