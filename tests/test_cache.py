"""The cache of bottlenecks: what is computed and what is not, whatever happened to images, cache files and records."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from helpers import build_model, created, load_backbone, run_v1
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import tf_retrain
from tf_retrain import UserError, tf

NUMBERS = np.random.default_rng(0).normal(size=2048).astype(np.float32)
TEXT = ','.join(str(x) for x in NUMBERS)


def test_cache_files_are_those_of_the_original(trained):
    text = (trained.folder / 'bottlenecks/cat/cat 3.jpg.txt').read_text()
    numbers = np.array([float(number) for number in text.split(',')], np.float32)
    assert text == ','.join(
        str(number) for number in numbers
    )  # also: one line, no newline at its end
    expected = run_v1(
        build_model(), (trained.data / 'cat/cat 3.jpg').read_bytes(), 'pool_3/_reshape:0'
    )[0]
    np.testing.assert_allclose(numbers, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    'text',
    [
        '',
        TEXT[: len(TEXT) // 2],
        TEXT + ',1.0',
        TEXT + ',',
        TEXT.replace(',', ';'),
        TEXT.replace(TEXT.split(',')[7], 'nan', 1),
        TEXT.replace(TEXT.split(',')[7], 'inf', 1),
        TEXT.replace(TEXT.split(',')[7], 'abc', 1),
        '\0' * 18000,
        '\xff' * 100,
    ],
)
def test_a_broken_cache_file_is_missing(tmp_path, text):
    (tmp_path / 'good.txt').write_text(TEXT)
    (tmp_path / 'bad.txt').write_text(text, encoding='latin-1')
    paths = [str(tmp_path / name) for name in ('good.txt', 'bad.txt', 'absent.txt', 'good.txt')]
    bottlenecks, fingerprints = tf_retrain.read_bottlenecks(paths, 2048)
    assert list(fingerprints >= 0) == [True, False, False, True]
    assert fingerprints[0] == fingerprints[3] == tf_retrain.fingerprint(TEXT).numpy()
    np.testing.assert_array_equal(bottlenecks[[0, 3]], [NUMBERS, NUMBERS])


def test_cache_files_of_older_numpy_are_read(tmp_path):
    (tmp_path / 'old.txt').write_text(','.join(f'{x:.6g}' for x in NUMBERS))
    bottlenecks, fingerprints = tf_retrain.read_bottlenecks([str(tmp_path / 'old.txt')], 2048)
    assert fingerprints[0] >= 0
    np.testing.assert_allclose(bottlenecks[0], NUMBERS, rtol=1e-5)


VALID = ','.join(map(str, np.arange(2048, dtype=np.float32)))
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(st.binary(max_size=300), st.integers(0, len(VALID)), st.integers(0, 50))
def test_fuzzed_cache_files(tmp_path, junk, at, cut):
    """Only what Python too reads as 2,048 finite numbers is believed."""
    contents = VALID.encode()[:at] + junk + VALID.encode()[at + cut :]
    (tmp_path / 'x').write_bytes(contents)
    bottlenecks, fingerprints = tf_retrain.read_bottlenecks([str(tmp_path / 'x')], 2048)
    if fingerprints[0] >= 0:
        numbers = np.array([float(text) for text in contents.decode().split(',')], np.float32)
        np.testing.assert_array_equal(bottlenecks[0], numbers)
        assert np.isfinite(numbers).all()
    elif contents == VALID.encode():
        raise AssertionError('a valid file is not believed')


def test_write_whole_leaves_nothing_behind(tmp_path):
    path = tmp_path / ('x' * 250)
    tf_retrain.write_whole(str(path), b'one')
    tf_retrain.write_whole(str(path), b'two')
    assert path.read_bytes() == b'two'
    (tmp_path / 'folder').mkdir()
    with pytest.raises(tf.errors.OpError):
        tf_retrain.write_whole(str(tmp_path / 'folder'), b'three')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['folder', 'x' * 250]


def test_a_cold_and_a_warm_run_train_on_the_same_numbers(job, monkeypatch, capsys):
    job.photographs(cat=30, dog=30).main()
    cold = (job.folder / job.flags['output_graph']).read_bytes()
    monkeypatch.setattr(
        tf_retrain.Backbone, 'create_network', None
    )  # it would be called for a single bottleneck
    capsys.readouterr()
    job.main()
    assert 'Creating' not in capsys.readouterr().out
    assert (job.folder / job.flags['output_graph']).read_bytes() == cold
    job.main(random_seed='2')
    assert (job.folder / job.flags['output_graph']).read_bytes() != cold


def count_reads(monkeypatch):
    """Returns a list that gets the path of each file that TensorFlow reads."""
    paths, read_file = [], tf.io.read_file

    def note(path):
        paths.append(path.numpy().decode())
        return read_file(path)

    def traced(path):
        contents = tf.py_function(note, [path], tf.string)
        contents.set_shape([])
        return contents

    monkeypatch.setattr(tf_retrain.tf.io, 'read_file', traced)
    return paths


def test_each_cache_file_and_record_is_read_once_and_an_unchanged_image_never(job, monkeypatch):
    job.photographs(cat=20, dog=20)
    job.cache()
    read = count_reads(monkeypatch)
    job.cache()
    files = [str(path.relative_to(job.data)) for path in job.data.rglob('*.jpg')]
    expected = [f'bottlenecks/{file}.txt' for file in files] + [
        f'bottlenecks/.records/{file}.rec' for file in files
    ]
    assert sorted(read) == sorted(expected)


def test_broken_cache_files_are_made_again(job):
    job.photographs(cat=30, dog=30)
    job.cache()
    paths = sorted((job.folder / 'bottlenecks').rglob('*.txt'))
    whole = {path: path.read_text() for path in paths}
    paths[3].write_text('')
    paths[8].write_text(whole[paths[8]][:1000])
    paths[9].unlink()
    # Cut within its last number, as a power failure may leave it, it has 2,048 numbers all the same.
    paths[11].write_text(whole[paths[11]].rpartition(',')[0] + ',0')
    out = job.cache()
    assert out.count('Invalid float found, recreating bottleneck') == 2
    assert len(created(out)) == 4
    for path, text in whole.items():
        found, expected = (np.fromstring(numbers, sep=',') for numbers in (path.read_text(), text))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def write_original_cache(job, numbers=NUMBERS):
    """Writes cache files as the original does: nothing says which image and model they were made of."""
    for path in job.data.rglob('*.jpg'):
        cache = job.folder / 'bottlenecks' / path.relative_to(job.data)
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.with_name(f'{path.name}.txt').write_text(','.join(map(str, numbers)))


def test_a_cache_of_the_original_is_believed(job):
    job.photographs(cat=20, dog=20)
    write_original_cache(job)
    (job.folder / 'bottlenecks/cat/cat 0.jpg.txt').unlink()
    assert created(job.cache()) == ['cat/cat 0.jpg']
    for path in job.data.rglob('*.jpg'):
        os.utime(path, (1, 1))
    assert created(job.cache()) == []
    # From the first run on, a change is noticed all the same.
    Image.new('RGB', (50, 50)).save(job.data / 'cat/cat 1.jpg')
    assert created(job.cache()) == ['cat/cat 1.jpg']


def test_images_with_a_cache_file_of_the_original_are_not_read(job, monkeypatch):
    job.photographs(cat=30, dog=30)
    write_original_cache(job)
    for path in job.data.rglob('*.jpg'):
        path.write_bytes(b'')
    monkeypatch.setattr(tf_retrain.Backbone, 'create_network', None)
    assert 'is left out' not in job.cache()


# Contents, not times, decide


def copy_without_times(job, times=1):
    for _ in range(times):
        shutil.copytree(job.data, job.folder / 'copy', copy_function=shutil.copyfile)
        shutil.rmtree(job.data)
        (job.folder / 'copy').rename(job.data)


def test_the_same_images_at_new_times_are_not_computed_again(job, monkeypatch):
    """Each change of the times used to make all bottlenecks again, and more than once in a run."""
    job.photographs(cat=20, dog=20)
    assert len(created(job.cache())) == 40
    for _ in range(3):
        copy_without_times(job)
        out = job.cache()
        assert created(out) == []
        assert 'changed' not in out
    read = count_reads(monkeypatch)
    job.cache()
    assert not [name for name in read if name.endswith('.jpg')]  # the new times are recorded


def record(job, file):
    return job.folder / f'bottlenecks/.records/{file}.rec'


def test_no_image_is_computed_twice_in_a_run_whatever_is_in_the_records(job):
    job.photographs(cat=20, dog=20)
    job.cache()
    for path in job.data.rglob('*.jpg'):
        name = record(job, path.relative_to(job.data))
        ((made, size, time, model, contents),) = json.loads(name.read_text())
        facts = [
            [made + i, size + i, time + i, model, contents + i] for i in range(20)
        ]  # they contradict each other
        name.write_text(json.dumps([*facts, [made, size, time - 1, model, None]]))
    copy_without_times(job)
    changed = sorted(f'cat/{path.name}' for path in job.data.rglob('cat 1*.jpg'))
    for file in changed:
        Image.new('RGB', (50, 50)).save(job.data / file)
    out = job.cache()
    assert created(out) == changed
    assert created(job.cache()) == []


def test_a_replaced_image_gets_a_new_bottleneck(job):
    job.photographs(cat=20, dog=20)
    job.cache()
    before = (job.folder / 'bottlenecks/cat/cat 3.jpg.txt').read_text()
    path = job.data / 'cat/cat 3.jpg'
    old = path.read_bytes()
    Image.new('RGB', (50, 50)).save(path)
    os.utime(path, (1, 1))  # as a copy that keeps an older time
    out = job.cache()
    assert created(out) == ['cat/cat 3.jpg']
    assert (
        'The image or the model changed, recreating bottleneck bottlenecks/cat/cat 3.jpg.txt\n'
        in out
    )
    assert (job.folder / 'bottlenecks/cat/cat 3.jpg.txt').read_text() != before
    assert created(job.cache()) == []
    path.write_bytes(old)
    assert created(job.cache()) == ['cat/cat 3.jpg']
    assert (job.folder / 'bottlenecks/cat/cat 3.jpg.txt').read_text() == before


def test_an_image_of_another_size_at_the_same_time_is_another(job):
    job.photographs(cat=20, dog=20)
    job.cache()
    path = job.data / 'cat/cat 3.jpg'
    time = path.stat().st_mtime_ns
    Image.new('RGB', (50, 50)).save(path)
    os.utime(path, ns=(time, time))
    assert created(job.cache()) == ['cat/cat 3.jpg']


def test_another_model_computes_all_anew(job):
    job.photographs(cat=20, dog=20)
    job.cache()
    graph_def = build_model()
    weights = (
        next(node for node in graph_def.node if node.name == 'conv/conv2d_params')
        .attr['value']
        .tensor
    )
    weights.CopyFrom(tf.make_tensor_proto(tf.make_ndarray(weights) * 2))
    (job.folder / 'inception/classify_image_graph_def.pb').unlink()
    (job.folder / 'inception/classify_image_graph_def.pb').write_bytes(
        graph_def.SerializeToString()
    )
    assert len(created(job.cache())) == 40
    assert created(job.cache()) == []


def test_records_without_contents_get_them(job):
    """Those of a cache of the original have size and time of the image only. The size is believed at first."""
    job.photographs(cat=20, dog=20)
    path = job.data / 'cat/cat 3.jpg'
    with path.open('ab') as file:
        file.write(b'xx')
    write_original_cache(job)
    job.cache()
    (fact,) = json.loads(record(job, 'cat/cat 3.jpg').read_text())
    assert fact[-1] is None
    copy_without_times(job)
    assert created(job.cache()) == []
    path.write_bytes(path.read_bytes()[:-2] + b'yy')  # of the same size
    assert created(job.cache()) == ['cat/cat 3.jpg']


def test_what_cannot_be_decoded_is_tried_once(job, monkeypatch):
    job.photographs(cat=20, dog=20)
    path = job.data / 'cat/cut.jpg'
    contents = (job.data / 'cat/cat 3.jpg').read_bytes()
    path.write_bytes(contents[:600])
    assert "'data/cat/cut.jpg' is left out: jpeg::Uncompress failed." in job.cache()
    monkeypatch.setattr(tf_retrain, 'compute_bottlenecks', None)
    for times in ((1, 1), (2, 2), None):
        os.utime(path, times)
        assert "'data/cat/cut.jpg' is left out: jpeg::Uncompress failed." in job.cache()
    monkeypatch.undo()
    path.write_bytes(contents)
    assert created(job.cache()) == ['cat/cut.jpg']
    # Cut short again, it is left out, although there is a cache file now.
    path.write_bytes(contents[:600])
    for _ in range(2):
        assert "'data/cat/cut.jpg' is left out" in job.cache()


# Records


RECORDS = [
    b'',
    b'[',
    b'\xff\0',
    b'[1]',
    b'"x"',
    b'{}',
    b'[[1, 2]]',
    b'[[[], 1, 2, 3, 4]]',
    b'[{"1":1,"2":2,"3":3,"4":4,"5":5}]',
]


@pytest.mark.parametrize('contents', RECORDS)
def test_a_damaged_record_counts_for_nothing(job, contents):
    """The cache file is believed, as without a record."""
    job.photographs(cat=20, dog=20)
    job.cache()
    record(job, 'cat/cat 3.jpg').write_bytes(contents)
    assert created(job.cache()) == []
    Image.new('RGB', (50, 50)).save(job.data / 'cat/cat 3.jpg')
    assert created(job.cache()) == ['cat/cat 3.jpg']


def test_a_record_is_written_before_its_cache_file_and_keeps_what_it_had(job, monkeypatch):
    job.photographs(cat=20, dog=20)
    job.cache()
    (before,) = json.loads(record(job, 'cat/cat 3.jpg').read_text())
    written, write_whole = [], tf_retrain.write_whole

    def note(path, contents):
        written.append(path)
        write_whole(path, contents)

    monkeypatch.setattr(tf_retrain, 'write_whole', note)
    Image.new('RGB', (50, 50)).save(job.data / 'cat/cat 3.jpg')
    assert created(job.cache()) == ['cat/cat 3.jpg']
    assert [path for path in written if 'cat 3.jpg' in path] == [
        'bottlenecks/.records/cat/cat 3.jpg.rec',
        'bottlenecks/cat/cat 3.jpg.txt',
    ]
    first, second = json.loads(record(job, 'cat/cat 3.jpg').read_text())
    assert first == before
    cached = (job.folder / 'bottlenecks/cat/cat 3.jpg.txt').read_bytes()
    image = (job.data / 'cat/cat 3.jpg').read_bytes()
    status = (job.data / 'cat/cat 3.jpg').stat()
    model = load_backbone(job.folder / 'inception').checksum
    fingerprints = [int(tf_retrain.fingerprint(contents)) for contents in (cached, image)]
    assert second == [fingerprints[0], status.st_size, status.st_mtime_ns, model, fingerprints[1]]


# Folders


@pytest.mark.parametrize('name', ['bn[2]', 'b*?', 'b{a,b}'])
def test_folder_names_are_not_patterns(job, name):
    job.photographs(cat=20, dog=20)
    folders = {'bottleneck_dir': name, 'summaries_dir': f'logs {name}'}
    job.cache(**folders)
    old_time = (job.data / 'cat/cat 3.jpg').stat().st_mtime
    Image.new('RGB', (50, 50)).save(job.data / 'cat/cat 3.jpg')
    os.utime(job.data / 'cat/cat 3.jpg', (old_time, old_time))
    out = job.cache(**folders)
    assert out.count('Creating bottleneck at') == 1
    names = os.listdir(job.folder / f'logs {name}' / 'train')
    assert len([name for name in names if name.startswith('events.')]) == 1


def test_a_complete_cache_may_be_read_only(job, monkeypatch):
    """The probe for a writable folder comes when the first bottleneck is missing, and before any is computed."""
    job.photographs(cat=20, dog=20)
    job.cache()
    copy_without_times(job)  # there would be new times to record

    def refuse(path, *arguments, original, **options):
        if 'bottlenecks' in path:
            raise tf.errors.PermissionDeniedError(None, None, f'{path}; Read-only file system')
        return original(path, *arguments, **options)

    for name in ('GFile', 'remove', 'makedirs'):
        original = getattr(tf_retrain.gfile, name)
        monkeypatch.setattr(
            tf_retrain.gfile,
            name,
            lambda path, *a, o=original, n=name, **k: (
                refuse(path, *a, original=o, **k)
                if n != 'GFile' or 'w' in (*a, *k.values())
                else o(path, *a, **k)
            ),
        )
    assert created(job.cache()) == []
    (job.data / 'cat/new.jpg').write_bytes((job.data / 'cat/cat 0.jpg').read_bytes())
    monkeypatch.setattr(tf_retrain, 'compute_bottlenecks', None)
    with pytest.raises(
        UserError, match="^--bottleneck_dir: nothing can be written in 'bottlenecks/'"
    ):
        job.main()


@pytest.mark.parametrize('length', [251, 252, 255])
def test_names_up_to_the_longest_that_there_can_be(job, length):
    """An image whose cache file would have too long a name is computed in each run."""
    job.photographs(cat=20, dog=20)
    name = 'x' * (length - 4) + '.jpg'
    shutil.copy(job.data / 'cat/cat 0.jpg', job.data / 'cat' / name)
    for first in (True, False):
        out = job.cache()
        assert len(created(out)) == (41 if first else int(length > 251))
        assert out.count('File name too long. Each run computes this bottleneck.') == int(
            length > 251
        )
    assert not list((job.folder / 'bottlenecks').rglob('*.tmp'))


def test_files_that_are_no_longer_wanted_harm_nothing(job):
    job.photographs(cat=20, dog=20)
    job.cache()
    (job.data / 'cat/cat 0.jpg').unlink()
    (job.folder / 'bottlenecks/cat/.0123.tmp').write_text('half')
    (job.folder / 'bottlenecks/fox').mkdir()
    (job.folder / 'bottlenecks/fox/1.jpg.txt').write_text('1,2')
    assert created(job.cache()) == []


def test_two_runs_at_once(job):
    """They share the cache: neither waits for or spoils the other, and a third computes nothing."""
    job.photographs(cat=400, dog=400)
    processes = [
        job.fork(output_graph=f'{i}.pb', output_labels=f'{i}.txt', summaries_dir=f'{i}')
        for i in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert len(created(out)) == len(set(created(out)))
    graphs = [(job.folder / f'{i}.pb').read_bytes() for i in range(2)]
    assert graphs[0] == graphs[1]
    assert 'Creating' not in job.run().stdout


def test_full_disk_while_caching_keeps_what_was_computed(job, monkeypatch, capsys):
    job.photographs(cat=50, dog=50)
    write = tf_retrain.write_whole

    def write_whole(path, contents):
        if len(list((job.folder / 'bottlenecks').rglob('*.txt'))) == 70:
            raise tf.errors.ResourceExhaustedError(None, None, f'{path}; No space left on device')
        write(path, contents)

    with monkeypatch.context() as patch:
        patch.setattr(tf_retrain, 'write_whole', write_whole)
        with pytest.raises(tf.errors.ResourceExhaustedError):
            job.main(patch)
    capsys.readouterr()
    assert len(created(job.cache())) == 30


@pytest.mark.parametrize(
    'folders',
    [
        {'bottleneck_dir': 'data/'},
        {'bottleneck_dir': 'data/bottlenecks', 'summaries_dir': 'data/logs'},
        {'summaries_dir': 'data/'},
        {'summaries_dir': 'bottlenecks', 'model_dir': 'inception/'},
        {'output_graph': 'data/cat/graph.pb', 'output_labels': 'data/labels.txt'},
    ],
)
def test_folders_inside_one_another(job, folders):
    job.photographs(cat=20, dog=20)
    photographs = {path: path.read_bytes() for path in job.data.rglob('*.jpg')}
    for _ in range(2):
        job.cache(**folders)
    assert 'Creating' not in job.cache(**folders)
    assert {path: path.read_bytes() for path in job.data.rglob('*.jpg')} == photographs
    labels = (job.folder / folders.get('output_labels', 'trained_model/labels.txt')).read_text()
    assert labels == 'cat\ndog\n'


def test_every_path_may_be_any_that_tensorflow_reads(job, capsys):
    """All folders in TensorFlow's file system in memory, which stands for gs:// and its like."""
    job.photographs(cat=25, dog=25)
    for path in [*job.data.rglob('*.jpg'), *(job.folder / 'inception').iterdir()]:
        target = f'ram://job/{path.relative_to(job.folder)}'
        tf.io.gfile.makedirs(target.rpartition('/')[0])
        tf.io.gfile.copy(str(path), target)
    paths = {
        name: f'ram://job/{value}'
        for name, value in job.flags.items()
        if '/' in value or value == 'logs'
    }
    job.main(**paths)
    out = capsys.readouterr().out
    assert out.count('Creating bottleneck at ram://job/bottlenecks/') == 50
    job.main(**paths)
    out = capsys.readouterr().out
    assert 'Creating' not in out
    assert not re.search('WARNING: .*left out \\(', out)
    with tf.io.gfile.GFile('ram://job/trained_model/unoptimized_model.pb', 'rb') as file:
        graph_def = tf.compat.v1.GraphDef.FromString(file.read())
    scores = run_v1(graph_def, (job.data / 'dog/dog 0.jpg').read_bytes(), 'final_result:0')[0]
    assert scores.argmax() == 1
    assert [
        name for name in tf.io.gfile.listdir('ram://job/logs/train') if name.startswith('events.')
    ]
