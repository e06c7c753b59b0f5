"""The cache of bottlenecks: what is computed, whatever happened to images, files and records."""

import importlib.metadata
import itertools
import json
import os
import re
import shutil
from decimal import Decimal
from unittest import mock

import numpy as np
import pytest
from helpers import build_model, created, load_backbone, run_v1
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

import tf_retrain
from tf_retrain import UserError, gfile, tf

NUMBERS = np.random.default_rng(0).normal(size=2048).astype(np.float32)
TEXT = ','.join(map(str, NUMBERS))
CAT, DOG = 'cat/cat 3.jpg', 'dog/dog 3.jpg'


@pytest.fixture
def cached(job):
    """A job whose few photographs all have bottlenecks in the cache."""
    assert len(created(job.photographs(cat=4, dog=4).cache())) == 8
    return job


def replace(job, *files):
    for file in files:
        Image.new('RGB', (50, 50)).save(job.data / file)


def record(job, file):
    return job.folder / f'bottlenecks/.records/{file}.rec'


def read_record(job, file):
    return json.loads(record(job, file).read_text())


def read_cache(job):
    """Returns the contents of all cache files, {path: text}."""
    return {path: path.read_text() for path in sorted((job.folder / 'bottlenecks').rglob('*.txt'))}


# Cache files


def test_cache_files_are_those_of_the_original(cached):
    text = cached.cache_file(CAT).read_text()  # one line, no newline at its end
    numbers = np.array(text.split(','), np.float32)
    assert np.array_equal(numbers, cached.bottlenecks[3])
    digits = [number.rstrip('0').replace('.', '').lstrip('0') for number in text.split(',')]
    # The digits of str(), but 0.00001 in place of 1e-05.
    assert digits == [
        f'{Decimal(str(number)):f}'.rstrip('0').replace('.', '').lstrip('0') for number in numbers
    ]
    cached.check_bottlenecks(CAT, DOG)


def write_original_cache(job):
    """Writes cache files as the original does: nothing says of which image and model they are."""
    for path in job.data.rglob('*.jpg'):
        cache = job.cache_file(path.relative_to(job.data))
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(TEXT)


SEVENTH = TEXT.split(',')[7]
NO_BOTTLENECKS = [
    '',
    TEXT[: len(TEXT) // 2],
    TEXT + ',1.0',
    TEXT + ',',
    TEXT.replace(',', ';'),
    TEXT.replace(SEVENTH, 'nan', 1),
    TEXT.replace(SEVENTH, 'inf', 1),
    TEXT.replace(SEVENTH, 'abc', 1),
    '\0' * 18000,
    '\xff' * 100,
]


def test_what_is_not_a_bottleneck_is_made_again(job):
    job.photographs(cat=len(NO_BOTTLENECKS), dog=2)
    write_original_cache(job)
    for i, text in enumerate(NO_BOTTLENECKS):
        job.cache_file(f'cat/cat {i}.jpg').write_text(text, encoding='latin-1')
    # As an older NumPy writes it.
    job.cache_file('dog/dog 1.jpg').write_text(','.join(f'{x:.6g}' for x in NUMBERS))
    out = job.cache()
    assert created(out) == [f'cat/cat {i}.jpg' for i in range(len(NO_BOTTLENECKS))]
    assert out.count('Invalid float found, recreating bottleneck') == len(NO_BOTTLENECKS)
    np.testing.assert_array_equal(job.bottlenecks[-2], NUMBERS)
    np.testing.assert_allclose(job.bottlenecks[-1], NUMBERS, rtol=1e-5)
    job.check_bottlenecks(*created(out))


def test_broken_cache_files_are_made_again(cached):
    whole = read_cache(cached)
    paths = list(whole)
    paths[1].write_text('')
    paths[2].write_text(whole[paths[2]][:1000])
    paths[4].unlink()
    # Cut within its last number, as after a power failure, it has 2,048 numbers all the same.
    paths[7].write_text(whole[paths[7]].rpartition(',')[0] + ',0')
    out = cached.cache()
    assert out.count('Invalid float found, recreating bottleneck') == 2
    assert len(created(out)) == 4
    for path, text in read_cache(cached).items():
        found, expected = (np.array(numbers.split(','), float) for numbers in (text, whole[path]))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


VALID = ','.join(map(str, np.arange(2048, dtype=np.float32))).encode()
DAMAGE = st.tuples(st.binary(max_size=300), st.integers(0, len(VALID)), st.integers(0, 50))


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(DAMAGE, min_size=25, max_size=30))
def test_fuzzed_cache_files(tmp_path, damages):
    """Only what Python too reads as 2,048 finite numbers is believed."""
    texts = [VALID, *(VALID[:at] + junk + VALID[at + cut :] for junk, at, cut in damages)]
    paths = [str(tmp_path / f'{i}') for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        tf_retrain.write_whole(path, text)
    bottlenecks, fingerprints = tf_retrain.read_bottlenecks(paths, 2048)
    assert fingerprints[0] >= 0
    for row in np.flatnonzero(fingerprints >= 0):
        numbers = np.array([float(text) for text in texts[row].decode().split(',')], np.float32)
        np.testing.assert_array_equal(bottlenecks[row], numbers)
        assert np.isfinite(numbers).all()


def test_write_whole_leaves_nothing_behind(tmp_path):
    path = tmp_path / ('x' * 250)
    tf_retrain.write_whole(str(path), b'one')
    tf_retrain.write_whole(str(path), b'two')
    assert path.read_bytes() == b'two'
    (tmp_path / 'folder').mkdir()
    with pytest.raises(UserError, match="/folder' is a folder. Delete it."):
        tf_retrain.write_whole(str(tmp_path / 'folder'), b'three')
    assert sorted(os.listdir(tmp_path)) == ['folder', 'x' * 250]


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    class FullDisk(gfile.GFile):
        def write(self, contents):
            super().write(contents[:2])
            self.flush()
            raise tf.errors.ResourceExhaustedError(None, None, 'disk full')

    path = tmp_path / 'file'
    tf_retrain.write_whole(str(path), b'before')
    monkeypatch.setattr(gfile, 'GFile', FullDisk)
    with pytest.raises(tf.errors.ResourceExhaustedError):
        tf_retrain.write_whole(str(path), b'after')
    assert path.read_bytes() == b'before'
    assert os.listdir(tmp_path) == ['file']


def test_a_cold_and_a_warm_run_train_on_the_same_numbers(job, monkeypatch):
    job.photographs(cat=12, dog=12).main()
    cold = job.graph()
    # It would be called for a single bottleneck.
    monkeypatch.setattr(tf_retrain.Backbone, 'create_network', None)
    assert created(job.main()) == []
    assert job.graph() == cold
    job.main(random_seed='2')
    assert job.graph() != cold


def count_reads(monkeypatch):
    """Returns a list that gets the path of each file that is read, by TensorFlow or Python."""
    paths, read_by_tensorflow, read_by_python = [], tf.io.read_file, tf_retrain.read_file

    def note(path):
        paths.append(path.numpy().decode())
        return read_by_tensorflow(path)

    def traced(path):
        contents = tf.py_function(note, [path], tf.string)
        contents.set_shape([])
        return contents

    def noted(path):
        paths.append(path)
        return read_by_python(path)

    monkeypatch.setattr(tf_retrain.tf.io, 'read_file', traced)
    monkeypatch.setattr(tf_retrain, 'read_file', noted)
    return paths


def test_each_cache_file_and_record_is_read_once_and_an_unchanged_image_never(cached, monkeypatch):
    read = count_reads(monkeypatch)
    cached.cache()
    files = [f'{label}/{label} {i}.jpg' for label in ('cat', 'dog') for i in range(4)]
    records = [f'bottlenecks/.records/{file}.rec' for file in files]
    caches = [f'bottlenecks/{file}.txt' for file in files]
    assert sorted(read) == [*records, *caches, 'inception/classify_image_graph_def.pb']


def test_an_image_whose_cache_file_is_gone_is_read_once(cached, monkeypatch):
    """Its contents cannot make up for the cache file."""
    cached.cache_file(CAT).unlink()
    read = count_reads(monkeypatch)
    assert created(cached.cache()) == [CAT]
    assert [path for path in read if path.endswith('.jpg')] == [f'data/{CAT}']


def test_a_cache_of_the_original_is_believed(job):
    job.photographs(cat=4, dog=4)
    write_original_cache(job)
    job.cache_file(DOG).unlink()
    assert created(job.cache()) == [DOG]
    for path in job.data.rglob('*.jpg'):
        os.utime(path, (1, 1))
    assert created(job.cache()) == []
    # From the first run on, a change is noticed all the same.
    replace(job, CAT)
    assert created(job.cache()) == [CAT]


def test_images_with_a_cache_file_of_the_original_are_not_read(job):
    job.photographs(cat=4, dog=4)
    write_original_cache(job)
    for path in job.data.rglob('*.jpg'):
        path.write_bytes(b'')
    out = job.cache()
    assert created(out) == []
    assert 'is left out' not in out


# Contents, not times, decide


def copy_without_times(job):
    shutil.copytree(job.data, job.folder / 'copy', copy_function=shutil.copyfile)
    shutil.rmtree(job.data)
    (job.folder / 'copy').rename(job.data)


def test_the_same_images_at_new_times_are_not_computed_again(cached, monkeypatch):
    """Each change of the times used to make all bottlenecks again, and more than once in a run."""
    for _ in range(3):
        copy_without_times(cached)
        out = cached.cache()
        assert created(out) == []
        assert 'changed' not in out
    read = count_reads(monkeypatch)
    cached.cache()
    assert not [name for name in read if name.endswith('.jpg')]  # the new times are recorded


def test_a_cache_file_that_is_not_the_one_of_its_record_is_made_again(cached):
    """Two valid files were swapped, or the record of another run was copied."""
    cat, dog = (cached.cache_file(file).read_text() for file in (CAT, DOG))
    cached.cache_file(CAT).write_text(dog)
    cached.cache_file(DOG).write_text(cat)
    out = cached.cache()
    assert created(out) == [CAT, DOG]
    assert out.count('The cache file is not the one that was written, recreating bottleneck') == 2
    cached.check_bottlenecks(CAT, DOG)


def test_an_image_that_changes_while_it_is_read_is_compared_by_the_next_run(cached, monkeypatch):
    """Later it is put back, with the size and time that it had: its bottleneck is right."""
    path = cached.data / CAT
    cached.cache_file(CAT).unlink()
    original = path.read_bytes().ljust(5000)
    another = (cached.data / DOG).read_bytes().ljust(5000)
    time = 10**18
    compute = tf_retrain.compute_bottlenecks

    def put(contents):
        path.write_bytes(contents)
        os.utime(path, ns=(time, time))

    def compute_another(*arguments, **options):
        put(another)
        try:
            yield from compute(*arguments, **options)
        finally:
            put(original)

    put(original)
    monkeypatch.setattr(tf_retrain, 'compute_bottlenecks', compute_another)
    cached.cache()
    monkeypatch.undo()
    monkeypatch.chdir(cached.folder)
    assert created(cached.cache()) == [CAT]
    cached.check_bottlenecks(CAT)


def test_images_that_are_linked_or_touched_during_a_run_are_not_computed_again(job, monkeypatch):
    """As by `cp -al`, `chmod` and `touch`, or --sort_into of tf_test.py."""
    job.photographs(cat=4, dog=4)
    compute = tf_retrain.compute_bottlenecks

    def compute_and_touch(*arguments, **options):
        for index, path in enumerate(sorted(job.data.rglob('*.jpg'))):
            os.link(path, job.folder / f'{index}.jpg') if index % 2 else path.chmod(0o600)
        (job.data / DOG).touch()
        return compute(*arguments, **options)

    monkeypatch.setattr(tf_retrain, 'compute_bottlenecks', compute_and_touch)
    assert len(created(job.cache())) == 8
    assert created(job.cache()) == []
    read = count_reads(monkeypatch)
    job.cache()
    assert not [name for name in read if name.endswith('.jpg')]  # the new times are recorded


def test_an_image_that_is_replaced_while_the_cache_gets_records(job, monkeypatch):
    """The cache file is of the old one."""
    path = job.photographs(cat=4, dog=4).data / CAT
    write_original_cache(job)
    load_header = tf_retrain.load_header

    def replace_and_load(name):
        path.write_bytes((job.data / DOG).read_bytes().ljust(5000))
        return load_header(name)

    monkeypatch.setattr(tf_retrain, 'load_header', replace_and_load)
    assert created(job.cache()) == [CAT]
    monkeypatch.undo()
    monkeypatch.chdir(job.folder)
    assert created(job.cache()) == []
    job.check_bottlenecks(CAT)


def test_an_image_that_cannot_be_decoded_is_not_read_again(cached, monkeypatch):
    (cached.data / 'cat/damaged.jpg').write_bytes(b'\xff\xd8')
    assert "'data/cat/damaged.jpg' is left out: " in cached.cache()
    read = count_reads(monkeypatch)
    assert "'data/cat/damaged.jpg' is left out: " in cached.cache()
    assert not [name for name in read if name.endswith('.jpg')]


@pytest.mark.parametrize('is_replaced', [False, True])
def test_an_image_that_cannot_be_read_while_its_file_gets_a_record(job, monkeypatch, is_replaced):
    """Its drive fails for a moment. The next run reads its orientation."""
    path = job.photographs(cat=4, dog=4).data / CAT
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(path).save(path, exif=exif)
    write_original_cache(job)
    open_file, load_files = tf_retrain.open_file, tf_retrain.load_files

    def fail_to_open(name):
        if name.endswith(CAT):
            raise UserError('Input/output error')
        return open_file(name)

    def fail_to_load(rows, paths, load):
        is_readable = np.array([not path.endswith(CAT) for path in paths], bool)
        return load_files(rows[is_readable], list(itertools.compress(paths, is_readable)), load)

    monkeypatch.setattr(tf_retrain, 'open_file', fail_to_open)
    monkeypatch.setattr(tf_retrain, 'load_files', fail_to_load)
    out = job.cache()
    assert 'sideways' not in out and 'left out' not in out
    monkeypatch.undo()
    monkeypatch.chdir(job.folder)
    if is_replaced:
        path.write_bytes((job.data / DOG).read_bytes())  # it has another size
        assert created(job.cache()) == [CAT]
        return
    assert 'that the camera stored sideways, and that are used as stored: 1.' in job.cache()
    assert 'that the camera stored sideways, and that are used as stored: 1.' in job.cache()
    read = count_reads(monkeypatch)
    job.cache()
    assert not [name for name in read if name.endswith('.jpg')]


def test_an_image_that_comes_back_during_a_run(job, monkeypatch):
    """Its drive was mounted late. Another image in its place is noticed by the next run."""
    path = job.photographs(cat=4, dog=4).data / CAT
    contents = path.read_bytes()
    get_status = tf_retrain.get_status

    def miss(name):
        return tf_retrain.Status(-1, -1, -1) if name.endswith(CAT) else get_status(name)

    def compute(*arguments, compute_bottlenecks=tf_retrain.compute_bottlenecks, **options):
        monkeypatch.setattr(tf_retrain, 'get_status', get_status)
        return compute_bottlenecks(*arguments, **options)

    monkeypatch.setattr(tf_retrain, 'get_status', miss)
    monkeypatch.setattr(tf_retrain, 'compute_bottlenecks', compute)
    assert CAT in created(job.cache())
    assert created(job.cache()) == []
    path.write_bytes((job.data / DOG).read_bytes().ljust(len(contents)))
    assert created(job.cache()) == [CAT]
    job.check_bottlenecks(CAT)


@pytest.mark.posix
def test_only_plain_files_are_opened(cached):
    """To open a FIFO waits for ever: as an image, a cache file and a record."""
    fifo = cached.data / 'cat/fifo.jpg'
    os.mkfifo(fifo)
    for path in (cached.cache_file(CAT), record(cached, DOG)):
        path.unlink()
        os.mkfifo(path)
    (cached.data / 'dog/zero.jpg').symlink_to('/dev/zero')
    out = cached.cache()
    for file in ('cat/fifo.jpg', 'dog/zero.jpg'):
        assert f"'data/{file}' is left out: it is not a plain file" in out
    assert created(out) == [CAT]
    assert created(cached.cache()) == []


@pytest.mark.posix
def test_the_target_of_a_link_in_the_cache_stays(cached):
    """Such as an object of DVC or git-annex, or a device: the link is replaced."""
    target = cached.folder / 'object'
    target.write_text('of the user')
    for path in (cached.cache_file(CAT), record(cached, CAT)):
        path.unlink()
        path.symlink_to(target)
    assert created(cached.cache()) == [CAT]
    assert target.read_text() == 'of the user'
    assert not cached.cache_file(CAT).is_symlink()
    assert not record(cached, CAT).is_symlink()
    assert created(cached.cache()) == []


def test_files_are_loaded_without_autograph(tmp_path):
    """It parses the whole script. Missing files on disk are passed over, those on ram:// tried."""
    there, missing, remote, lost = f'{tmp_path}/a', f'{tmp_path}/b', 'ram://x/c', 'ram://x/d'
    for path in (there, remote):
        tf_retrain.write_whole(path, path.encode())
    statuses = []

    def load(row, contents):
        statuses.append(tf.__internal__.autograph.control_status_ctx().status.name)
        return row, contents

    files = tf_retrain.load_files(np.arange(4), [there, missing, remote, lost], load)
    assert list(files.as_numpy_iterator()) == [(0, there.encode()), (2, remote.encode())]
    assert statuses == ['DISABLED']


def test_a_folder_in_place_of_a_cache_file_is_named(cached):
    cached.cache_file(CAT).unlink()
    cached.cache_file(CAT).mkdir()
    with pytest.raises(UserError, match=f"'bottlenecks/{CAT}.txt' is a folder. Delete it"):
        cached.cache()


def test_a_link_in_place_of_a_record_stays_if_no_other_can_be_written(cached, monkeypatch):
    """A cache file without a record would be trusted, whatever becomes of its image."""
    path = record(cached, CAT)
    path.rename(cached.folder / 'store')
    path.symlink_to(cached.folder / 'store')
    os.utime(cached.data / CAT)

    def fail(path, contents):
        raise tf.errors.ResourceExhaustedError(None, None, 'No space left on device')

    monkeypatch.setattr(tf_retrain, 'write_whole', fail)
    assert created(cached.cache()) == []
    monkeypatch.undo()
    monkeypatch.chdir(cached.folder)
    assert path.is_symlink()
    replace(cached, CAT)
    assert created(cached.cache()) == [CAT]
    cached.check_bottlenecks(CAT)
    assert not path.is_symlink()


@pytest.mark.parametrize('error', [PermissionError(13, ''), OSError(5, ''), OSError(116, '')])
def test_a_record_that_cannot_be_read_is_not_taken_for_a_missing_one(cached, monkeypatch, error):
    """It may be another user's, or a drive may fail: the cache file may be of another image."""
    replace(cached, CAT)

    def fail(path, mode):
        if path == f'bottlenecks/.records/{CAT}.rec'.encode():
            raise error
        return open(path, mode)

    monkeypatch.setattr(tf_retrain, 'open', fail, raising=False)
    out = cached.cache()
    assert f'The record cannot be read, recreating bottleneck bottlenecks/{CAT}.txt\n' in out
    assert created(out) == [CAT]
    monkeypatch.undo()
    monkeypatch.chdir(cached.folder)
    assert created(cached.cache()) == []
    cached.check_bottlenecks(CAT)


def test_a_folder_in_place_of_a_record_is_named(cached):
    record = cached.folder / f'bottlenecks/.records/{CAT}.rec'
    record.unlink()
    record.mkdir()
    cached.cache_file(CAT).unlink()
    with pytest.raises(UserError, match=f"'bottlenecks/.records/{CAT}.rec' is a folder. Delete it"):
        cached.cache()


@pytest.mark.parametrize('changed', [None, 10**9], ids=['same time', 'older'])
def test_a_replaced_image_gets_a_new_bottleneck(cached, changed):
    before = cached.cache_file(CAT).read_text()
    path = cached.data / CAT
    old = path.read_bytes()
    time = path.stat().st_mtime_ns
    replace(cached, CAT)
    os.utime(path, ns=(changed or time,) * 2)
    out = cached.cache()
    assert created(out) == [CAT]
    reason = 'The image or the model changed, recreating bottleneck'
    assert f'{reason} bottlenecks/{CAT}.txt\n' in out
    cached.check_bottlenecks(CAT)
    assert cached.cache_file(CAT).read_text() != before
    assert created(cached.cache()) == []
    path.write_bytes(old)
    assert created(cached.cache()) == [CAT]
    cached.check_bottlenecks(CAT)


def test_another_model_computes_all_anew(cached):
    graph_def = build_model()
    for node in graph_def.node:
        if node.op == 'BatchNormWithGlobalNormalization':
            node.attr['variance_epsilon'].f *= 2
    path = cached.folder / 'inception/classify_image_graph_def.pb'
    path.unlink()  # a hard link to the model of all tests
    path.write_bytes(graph_def.SerializeToString())
    assert len(created(cached.cache())) == 8
    assert created(cached.cache()) == []


def test_records_without_contents_get_them(job):
    """Those of a cache of the original have size and time of the image: the size is believed."""
    path = job.photographs(cat=4, dog=4).data / CAT
    contents = path.read_bytes()
    path.write_bytes(contents + b'xx')
    write_original_cache(job)
    job.cache()
    assert read_record(job, CAT)['digest'] is None
    copy_without_times(job)
    assert created(job.cache()) == []
    path.write_bytes(contents + b'yy')  # of the same size
    assert created(job.cache()) == [CAT]


def test_what_cannot_be_decoded_is_tried_once(cached, monkeypatch):
    path = cached.data / 'cat/cut.jpg'
    contents = (cached.data / CAT).read_bytes()
    path.write_bytes(contents[:600])
    line = "'data/cat/cut.jpg' is left out: it is JPEG, and damaged (Invalid JPEG data"
    assert line in cached.cache()
    monkeypatch.setattr(tf_retrain, 'compute_bottlenecks', None)
    for times in ((1, 1), (2, 2), None):
        os.utime(path, times)
        assert line in cached.cache()
    monkeypatch.undo()
    path.write_bytes(contents)
    assert created(cached.cache()) == ['cat/cut.jpg']
    # Cut short again, it is left out, although there is a cache file now.
    path.write_bytes(contents[:600])
    for _ in range(2):
        assert line in cached.cache()


# Records


NO_RECORDS = [
    b'',
    b'[',
    b'\xff\0',
    b'[1]',
    b'"x"',
    b'{}',
    b'[[1, 2, 3, 4, 5]]',
    b'{"size": 1}',
    b'[' * 200_000,
    b'{"size":1,"time":1,"digest":1,"model":1,"outcome":-1,"orientation":1,"bits":8,'
    b'"decoder":"","version":3}',
    b'{"size":[],"time":1,"digest":1,"model":1,"outcome":1,"orientation":1}',
]


def test_a_damaged_record_counts_for_nothing(job):
    """The cache file is believed, as without a record."""
    job.photographs(cat=len(NO_RECORDS), dog=1).cache()
    files = [f'cat/cat {i}.jpg' for i in range(len(NO_RECORDS))]
    for file, contents in zip(files, NO_RECORDS, strict=True):
        record(job, file).write_bytes(contents)
    assert created(job.cache()) == []
    replace(job, *files)
    assert created(job.cache()) == sorted(files)


RECORD = b'{"size": 1, "time": 2, "digest": 3, "model": 4, "outcome": 5, "orientation": null, '
RECORD += b'"bits": 8, "decoder": "x", "version": 3}'


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=20), st.integers(0, len(RECORD)), st.integers(0, 20))
def test_fuzzed_records(junk, at, cut):
    """A record is what it says, or nothing: an error would end every run on this cache."""
    record = tf_retrain.parse_record(RECORD[:at] + junk + RECORD[at + cut :])
    if record:
        assert record.version == tf_retrain.RECORD_VERSION
        assert record.size >= 0
        assert isinstance(record.outcome, int | str)
        assert record.outcome not in (-1, '')


def test_the_record_that_is_fuzzed_is_a_record():
    assert tf_retrain.parse_record(RECORD).outcome == 5
    assert tf_retrain.parse_record(RECORD.replace(b'5', b'-1')) is None


def test_a_cache_file_on_disk_is_always_the_one_of_its_record(cached, monkeypatch):
    """The old file goes, then the record is written, then the new file."""
    before = read_record(cached, CAT)
    done = []
    write_whole, remove = tf_retrain.write_whole, gfile.remove

    def note(path, contents):
        done.append(('write', path))
        write_whole(path, contents)

    def note_removal(path):
        done.append(('remove', path))
        remove(path)

    monkeypatch.setattr(tf_retrain, 'write_whole', note)
    monkeypatch.setattr(gfile, 'remove', note_removal)
    path = cached.data / CAT
    replace(cached, CAT)
    assert created(cached.cache()) == [CAT]
    cache_file, record_file = f'bottlenecks/{CAT}.txt', f'bottlenecks/.records/{CAT}.rec'
    assert [step for step in done if CAT in step[1]] == [
        ('remove', cache_file),
        ('write', record_file),
        ('write', cache_file),
    ]
    status = path.stat()
    assert read_record(cached, CAT) == before | {
        'size': status.st_size,
        'time': status.st_mtime_ns,
        'digest': int(tf_retrain.compute_digest(path.read_bytes())),
        'outcome': int(tf_retrain.compute_digest(cached.cache_file(CAT).read_bytes())),
    }
    assert before['model'] == load_backbone(cached.folder / 'inception').checksum


def test_an_old_cache_file_without_a_record_goes_first_too(cached, monkeypatch):
    """An image changes right after the run began: then no record says that the file is trusted."""
    record(cached, CAT).unlink()
    before = cached.cache_file(CAT).read_text()

    def trust(cache, original=tf_retrain.BottleneckCache.trust_unrecorded):
        replace(cached, CAT)
        original(cache)

    def stop(path, contents, write_whole=tf_retrain.write_whole):
        write_whole(path, contents)
        if path.endswith(f'{CAT}.rec'):
            raise KeyboardInterrupt

    monkeypatch.setattr(tf_retrain.BottleneckCache, 'trust_unrecorded', trust)
    monkeypatch.setattr(tf_retrain, 'write_whole', stop)
    with pytest.raises(KeyboardInterrupt):
        cached.cache()
    assert not cached.cache_file(CAT).exists()
    monkeypatch.undo()
    monkeypatch.chdir(cached.folder)
    cached.cache()
    assert cached.cache_file(CAT).read_text() != before


def test_a_cache_file_is_not_written_without_its_record(job, monkeypatch):
    """The next run would trust it, whatever became of the image."""
    (job.folder / 'bottlenecks').mkdir()
    (job.folder / 'bottlenecks/.records').touch()  # in place of the folder
    job.photographs(cat=4, dog=4)
    with pytest.raises(tf.errors.OpError, match='.records'):
        job.cache()
    assert read_cache(job) == {}


def test_a_failure_for_lack_of_memory_is_not_recorded(cached, monkeypatch):
    """libjpeg then calls a photograph damaged: it is tried again at each run."""
    path = cached.data / 'cat/cut.jpg'
    contents = (cached.data / CAT).read_bytes()
    path.write_bytes(contents[:600])
    assert not tf_retrain.is_memory_scarce()
    empty = np.empty

    def refuse(shape, *arguments, **options):
        if np.prod(shape) > 2**31:
            raise MemoryError
        return empty(shape, *arguments, **options)

    monkeypatch.setattr(np, 'empty', refuse)
    assert ', size 600), or the memory is full\n' in cached.cache()
    assert not record(cached, 'cat/cut.jpg').exists()


def test_the_version_of_pi_heif_is_a_part_of_the_decoder():
    """A newer one may read what an older one could not."""
    assert tf_retrain.DECODER.endswith(f', pi-heif {importlib.metadata.version("pi-heif")}')


def test_a_new_decoder_tries_again_what_could_not_be_decoded(cached, monkeypatch):
    path = cached.data / 'cat/cut.jpg'
    path.write_bytes((cached.data / CAT).read_bytes()[:600])
    cached.cache()
    tried = []
    monkeypatch.setattr(tf_retrain, 'DECODER', 'TensorFlow 3')
    compute = tf_retrain.compute_bottlenecks

    def note(rows, paths, *arguments, **options):
        tried.extend(paths)
        return compute(rows, paths, *arguments, **options)

    monkeypatch.setattr(tf_retrain, 'compute_bottlenecks', note)
    for _ in range(2):
        assert "'data/cat/cut.jpg' is left out" in cached.cache()
        assert tried == ['data/cat/cut.jpg']


# Folders


def test_folder_names_are_not_patterns(job):
    name = 'b[2]*?{a,b}'
    flags = {'bottleneck_dir': name, 'summaries_dir': f'logs {name}', 'how_many_training_steps': 0}
    job.photographs(cat=4, dog=4).main(**flags)
    replace(job, CAT)
    assert job.main(**flags).count('Creating bottleneck at') == 1
    names = os.listdir(job.folder / f'logs {name}' / 'train')
    assert len([name for name in names if name.startswith('events.')]) == 1


@pytest.mark.posix
@pytest.mark.parametrize('has_records', [True, False])
def test_a_complete_cache_may_be_read_only(cached, monkeypatch, has_records):
    """The folder is probed when the first bottleneck is missing, before any is computed."""
    if not has_records:  # as of the original
        shutil.rmtree(cached.folder / 'bottlenecks/.records')
    copy_without_times(cached)  # there would be new times to record

    def refuse(path, *arguments, **options):
        raise tf.errors.PermissionDeniedError(None, None, f'{path}; Read-only file system')

    def open_to_read(path, mode='r', open_file=gfile.GFile):
        return open_file(path, mode) if 'r' in mode else refuse(path)

    changes = {'GFile': open_to_read, 'remove': refuse, 'makedirs': refuse, 'rename': refuse}
    for name, change in changes.items():
        monkeypatch.setattr(gfile, name, change)
    assert created(cached.cache()) == []
    (cached.data / 'cat/lost.jpg').symlink_to('nowhere')
    assert 'left out: ' in cached.cache()
    shutil.copy(cached.data / CAT, cached.data / 'cat/new.jpg')
    monkeypatch.setattr(tf_retrain, 'compute_bottlenecks', None)
    message = "^--bottleneck_dir: nothing can be written in 'bottlenecks/'"
    with pytest.raises(UserError, match=message):
        cached.cache()


def test_a_cache_may_be_read_only_after_an_update_of_the_decoders(cached, monkeypatch):
    """Images that could not be decoded are tried again, by other versions of the libraries."""
    (cached.data / 'cat/empty.jpg').touch()
    cached.cache()
    probe = mock.Mock(side_effect=UserError('read-only'))
    monkeypatch.setattr(tf_retrain, 'ensure_writable_dir', probe)
    monkeypatch.setattr(tf_retrain, 'DECODER', 'a newer one')
    assert 'left out: it is empty' in cached.cache()
    (cached.data / 'cat/empty.jpg').write_bytes(b'x')
    with pytest.raises(UserError, match='^read-only$'):
        cached.cache()
    (cached.data / 'cat/empty.jpg').unlink()
    shutil.copy(cached.data / CAT, cached.data / 'cat/new.jpg')
    with pytest.raises(UserError, match='^read-only$'):
        cached.cache()


@pytest.mark.posix
def test_names_up_to_the_longest_that_there_can_be(cached):
    """An image whose cache file would have too long a name is computed in each run."""
    fits, *too_long = [f'cat/{"x" * (length - 4)}.jpg' for length in (251, 252, 255)]
    for file in (fits, *too_long):
        shutil.copy(cached.data / CAT, cached.data / file)
    for files in ([fits, *too_long], too_long):
        out = cached.cache()
        assert created(out) == files
        assert out.count('the name is too long, or the drive does not allow it. Each run') == 2
    assert not list((cached.folder / 'bottlenecks').rglob('*.tmp'))


def test_files_that_are_no_longer_wanted_harm_nothing(cached):
    (cached.data / CAT).unlink()
    cached.cache_file('cat/.0123').with_suffix('.tmp').write_text('half')
    (cached.folder / 'bottlenecks/fox').mkdir()
    cached.cache_file('fox/1.jpg').write_text('1,2')
    assert created(cached.cache()) == []


def test_two_runs_at_once(job):
    """They share the cache: neither waits for or spoils the other, and a third computes nothing."""
    job.photographs(cat=100, dog=100)
    processes = [
        job.fork(output_graph=f'{i}.pb', output_labels=f'{i}.txt', summaries_dir=f'{i}')
        for i in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert len(created(out)) == len(set(created(out)))
    first, second = ((job.folder / f'{i}.pb').read_bytes() for i in range(2))
    assert first == second
    assert created(job.cache()) == []


def test_full_disk_while_caching_keeps_what_was_computed(job, monkeypatch):
    write_whole = tf_retrain.write_whole

    def fill_up(path, contents):
        if len(read_cache(job)) == 14:
            raise tf.errors.ResourceExhaustedError(None, None, f'{path}; No space left on device')
        write_whole(path, contents)

    monkeypatch.setattr(tf_retrain, 'write_whole', fill_up)
    with pytest.raises(tf.errors.ResourceExhaustedError):
        job.photographs(cat=10, dog=10).cache()
    monkeypatch.undo()
    job.capsys.readouterr()
    assert len(created(job.cache())) == 6


@pytest.mark.parametrize(
    'folders',
    [
        {'bottleneck_dir': 'data/', 'summaries_dir': 'data/'},
        {
            'bottleneck_dir': 'data/bottlenecks',
            'summaries_dir': 'data/logs',
            'output_graph': 'data/cat/graph.pb',
            'output_labels': 'data/labels.txt',
        },
        {'bottleneck_dir': 'inception/', 'summaries_dir': 'inception/'},
    ],
    ids=['with the images', 'among the images', 'with the model'],
)
def test_folders_inside_one_another(job, folders):
    job.photographs(cat=12, dog=12)
    photographs = {path: path.read_bytes() for path in job.data.rglob('*.jpg')}
    job.main(**folders)
    assert 'Creating' not in job.main(**folders)
    assert {path: path.read_bytes() for path in job.data.rglob('*.jpg')} == photographs
    labels = job.folder / folders.get('output_labels', job.flags['output_labels'])
    assert labels.read_text() == 'cat\ndog\n'


def test_every_path_may_be_any_that_tensorflow_reads(job):
    """All folders in TensorFlow's file system in memory, which stands for gs:// and its like."""
    job.photographs(cat=12, dog=12)
    for path in [*job.data.rglob('*.jpg'), *(job.folder / 'inception').iterdir()]:
        target = f'ram://job/{path.relative_to(job.folder)}'
        gfile.makedirs(os.path.dirname(target))
        gfile.copy(str(path), target)
    paths = {
        name: f'ram://job/{value}'
        for name, value in job.flags.items()
        if '/' in value or value == 'logs'
    }
    assert job.main(**paths).count('Creating bottleneck at ram://job/bottlenecks/') == 24
    out = job.main(**paths)
    assert 'Creating' not in out
    assert not re.search('WARNING: .*left out \\(', out)
    with gfile.GFile('ram://job/trained_model/unoptimized_model.pb', 'rb') as file:
        graph_def = tf.compat.v1.GraphDef.FromString(file.read())
    scores = run_v1(graph_def, (job.data / 'dog/dog 0.jpg').read_bytes(), 'final_result:0')[0]
    assert scores.argmax() == 1
    with gfile.GFile('ram://job/trained_model/unoptimized_model.pb.json') as file:
        assert json.loads(file.read())['image_dir'] == 'ram://job/data/'
    names = gfile.listdir('ram://job/logs/train')
    assert [name for name in names if name.startswith('events.')]
