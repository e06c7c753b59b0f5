"""Random sequences of what users do to images, cache and model: nothing stale, no work twice.

The network is a function of the file's content, so that a run takes milliseconds. To search longer:
STATEFUL_EXAMPLES=100000 python3 -m pytest tests/test_cache_stateful.py
"""

import contextlib
import itertools
import os
import pathlib
import shutil
import tempfile
import threading
import types
import zlib
from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

import tf_retrain
from tf_retrain import Images, UserError, gfile, tf

SIZE = 4
NAMES = [f'{label}/{i}.jpg' for label in ('cat', 'dog') for i in range(4)]
REMOVE, RENAME = gfile.remove, gfile.rename


def be_quiet(*arguments):
    pass


class Killed(BaseException):
    """What stands for SIGKILL: no operation on a file succeeds after it."""


def compute(content, model):
    """The bottleneck of an image; None if it cannot be decoded."""
    if content.startswith(b'bad'):
        return None
    return np.random.default_rng(zlib.crc32(content, model)).normal(size=SIZE).astype(np.float32)


def to_text(bottleneck):
    return ','.join(map(str, bottleneck))


def get_orientation(content):
    """Half of all images lie on their side."""
    return zlib.crc32(content) % 2 * 5 + 1


class Run:
    """A run in a thread. It is killed after some operations on files, or may not write at all.

    change() is called, if it is given, before step number `changed_at`: an image is read or a file
    is changed in each step.
    """

    current = threading.local()

    def __init__(
        self,
        images,
        folder,
        model,
        operations=None,
        is_read_only=False,
        change=be_quiet,
        changed_at=0,
    ):
        self.computed, self.result, self.error = Counter(), None, None
        self.operations, self.is_read_only = operations, is_read_only
        self.steps = itertools.count()
        self.change, self.changed_at = change, changed_at
        source = types.SimpleNamespace(
            source='model',
            checksum=model,
            is_upright=False,
            cache_suffix='',
            bottleneck_size=SIZE,
        )
        flags = types.SimpleNamespace(
            bottleneck_dir=str(folder), data_service=None, strict=False, tfhub_module=None
        )
        self.thread = threading.Thread(target=self.work, args=(images, source, flags))

    def work(self, images, backbone, flags):
        Run.current.run = self
        try:
            self.result = tf_retrain.cache_bottlenecks(images, backbone, flags)
        except BaseException as error:
            self.error = error

    def step(self):
        if next(self.steps) == self.changed_at:
            self.change()

    def operate(self):
        """Counts an operation that changes a file; fails where that is not possible any longer."""
        self.step()
        if self.is_read_only:
            raise tf.errors.PermissionDeniedError(None, None, 'read-only')
        if self.operations is not None:
            self.operations -= 1
            if self.operations < 0:
                raise Killed


def remove(path):
    Run.current.run.operate()
    REMOVE(path)


def rename(source, target, overwrite=False):
    Run.current.run.operate()
    RENAME(source, target, overwrite)


class Files(list):
    """Rows of tensors, with the part of a dataset's interface that the program uses."""

    def batch(self, size):
        return Files([map(tf.stack, zip(*self, strict=True))] if self else [])

    def as_numpy_iterator(self):
        return ([value.numpy() for value in row] for row in self)


def load_files(rows, paths, load):
    """Reads files as the program does, but without a pipeline, which takes long to build."""
    found = Files()
    for row, path in zip(rows, paths, strict=True):
        with contextlib.suppress(tf.errors.OpError):
            found.append(load(tf.constant(row), tf.io.read_file(path)))
    return found


def compute_bottlenecks(rows, paths, backbone, service=None):
    """Yields what the program's own yields, in batches of two, and counts it."""
    found = []
    for row, path in zip(rows, paths, strict=True):
        try:
            Run.current.run.step()
            content = pathlib.Path(path).read_bytes()
        except (FileNotFoundError, tf.errors.UnavailableError):
            continue
        Run.current.run.computed[path] += 1
        if (bottleneck := compute(content, backbone.checksum)) is not None:
            found.append((row, int(tf_retrain.compute_digest(content)), bottleneck))
    for start in range(0, len(found), 2):
        yield map(np.array, zip(*found[start : start + 2], strict=True))


def decode(content, is_upright):
    if content.startswith(b'bad'):
        raise tf_retrain.ImageError('it is damaged')


def read_header(file):
    Run.current.run.step()
    return tf_retrain.Header(get_orientation(file.read()), 8)


# All that is replaced in the program.
PATCHES = [
    mock.patch.multiple(
        tf_retrain,
        load_files=load_files,
        compute_bottlenecks=compute_bottlenecks,
        decode=decode,
        read_header=read_header,
        run_ahead=iter,  # each run has its thread
    ),
    mock.patch.multiple(gfile, remove=remove, rename=rename),
    mock.patch.object(tf_retrain, 'print', be_quiet, create=True),
    mock.patch.object(tf_retrain.tqdm, 'write', be_quiet),
]


def fail(cache, name):
    raise tf.errors.UnavailableError(None, None, 'the drive is away')


# What may become of an image, or of the drive, during a run.
CHANGES = [
    lambda cache, name: cache.replace(name, False),
    lambda cache, name: cache.replace(name, True),
    lambda cache, name: cache.image(name).unlink(),
    fail,
]


class Cache(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.model, self.clock, self.lengths = 1, 10**18, itertools.count(10)
        self.stack = contextlib.ExitStack()
        for patch in PATCHES:
            self.stack.enter_context(patch)
        for name in (NAMES[0], NAMES[4]):
            self.replace(name, False)
        self.run_once()

    def teardown(self):
        self.stack.close()
        shutil.rmtree(self.folder)

    def image(self, name):
        return self.folder / 'data' / name

    def cached(self, name):
        return self.folder / 'cache' / f'{name}.txt'

    def names(self):
        return [name for name in NAMES if self.image(name).exists()]

    def table(self):
        names = self.names()
        classes = np.array([name > 'd' for name in names], int)
        sets = np.full(len(names), 'training')
        return Images(
            str(self.folder / 'data'), ['cat', 'dog'], np.array(names, object), classes, sets
        )

    def start(self, **options):
        run = Run(self.table(), self.folder / 'cache', self.model, **options)
        run.thread.start()
        return run

    def expected(self, name):
        """Returns the bottleneck that an image should have now; None if there can be none."""
        path = self.image(name)
        return compute(path.read_bytes(), self.model) if path.exists() else None

    def is_cached(self, name):
        expected, cached = self.expected(name), self.cached(name)
        return expected is not None and cached.exists() and cached.read_text() == to_text(expected)

    def look(self):
        """Returns {name: whether its cache file is what it should be}."""
        return {name: self.is_cached(name) for name in self.names()}

    def check(self, run, before):
        """Whatever became of a run: it computed no image twice, and none that the cache had."""
        run.thread.join()
        for name, was_cached in before.items():
            assert run.computed[str(self.image(name))] <= (not was_cached), name
        if run.result is None:
            return
        images, bottlenecks, _ = run.result
        found = dict(zip(images.files, bottlenecks, strict=True))
        expected = {name: self.expected(name) for name in before}
        assert list(found) == [name for name in before if expected[name] is not None]
        for name in found:
            np.testing.assert_array_equal(found[name], expected[name], name)

    def check_finished(self, run, before):
        self.check(run, before)
        readable = [name for name in before if self.expected(name) is not None]
        if {name[:3] for name in readable} == {'cat', 'dog'}:
            assert run.error is None, run.error
            assert all(map(self.is_cached, readable))
            orientations = [get_orientation(self.image(name).read_bytes()) for name in readable]
            assert run.result[2]['sideways'] == orientations.count(6)
        else:
            assert isinstance(run.error, UserError) and 'can be read' in str(run.error)

    @rule()
    def run_once(self):
        before = self.look()
        self.check_finished(self.start(), before)
        again = self.start()
        self.check(again, self.look())
        assert not again.computed, 'a second run computes nothing'

    @rule()
    def run_twice_at_once(self):
        before = self.look()
        runs = [self.start(), self.start()]
        for run in runs:
            run.thread.join()
        for run in runs:
            self.check_finished(run, before)

    @rule(operations=st.integers(0, 20))
    def run_and_kill(self, operations):
        before = self.look()
        self.check(self.start(operations=operations), before)

    @rule()
    def run_on_a_read_only_cache(self):
        before = self.look()
        run = self.start(is_read_only=True)
        self.check(run, before)
        if all(before.values()):
            assert run.error is None
        elif run.error is not None:
            assert isinstance(run.error, UserError)
            assert not run.computed

    @rule(name=st.sampled_from(NAMES), is_bad=st.booleans())
    def replace(self, name, is_bad):
        self.image(name).parent.mkdir(parents=True, exist_ok=True)
        content = (b'bad' if is_bad else b'\xff\xd8').ljust(next(self.lengths), b'x')
        self.image(name).write_bytes(content)
        self.touch(name)

    @rule(
        name=st.sampled_from(NAMES),
        is_new=st.booleans(),
        has_records=st.booleans(),
        change=st.sampled_from(CHANGES),
        changed_at=st.integers(0, 16),
    )
    def change_during_a_run(self, name, is_new, has_records, change, changed_at):
        """Afterwards, the image is put back with the time that it had, if it was touched."""
        path = self.image(name)
        if is_new:
            self.replace(name, False)
        if not path.exists():
            return
        if not has_records:
            self.delete_the_records()
        content, time = path.read_bytes(), path.stat().st_mtime_ns
        run = self.start(change=lambda: change(self, name), changed_at=changed_at)
        run.thread.join()
        if change != fail:
            path.write_bytes(content)
            os.utime(path, ns=(time, time))
        self.run_once()

    @rule(name=st.sampled_from(NAMES))
    def touch(self, name):
        if self.image(name).exists():
            self.clock += 1
            os.utime(self.image(name), ns=(self.clock, self.clock))

    @rule()
    def copy_the_folder(self):
        for name in NAMES:
            self.touch(name)

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name):
        if sum(other[:3] == name[:3] for other in self.names()) > 1:
            self.image(name).unlink(missing_ok=True)

    @rule(name=st.sampled_from(NAMES), other=st.sampled_from(NAMES))
    def swap(self, name, other):
        if name != other and {name, other} <= {*self.names()}:
            aside = self.image(name).rename(self.folder / 'aside')
            self.image(other).rename(self.image(name))
            aside.rename(self.image(other))

    @rule(name=st.sampled_from(NAMES), share=st.floats(0, 0.7))
    def cut_a_cache_file(self, name, share):
        if self.cached(name).exists():
            text = self.cached(name).read_text()
            self.cached(name).write_text(text[: int(len(text) * share)])

    @rule(name=st.sampled_from(NAMES))
    def delete_a_cache_file(self, name):
        self.cached(name).unlink(missing_ok=True)

    def delete_the_records(self):
        """A cache file without a record is believed, as documented: all are made current first."""
        self.run_once()
        shutil.rmtree(self.folder / 'cache/.records')
        unreadable = [name for name in NAMES if self.expected(name) is None]
        for name in unreadable:
            self.cached(name).unlink(missing_ok=True)
        return unreadable

    @rule()
    def run_without_records(self):
        unreadable = self.delete_the_records()
        run = self.start()
        run.thread.join()
        assert {*run.computed} <= {str(self.image(name)) for name in unreadable}

    @rule(model=st.integers(1, 2))
    def change_the_model(self, model):
        self.model = model


@pytest.mark.slow
def test_whatever_users_do():
    examples = int(os.environ.get('STATEFUL_EXAMPLES', 40))
    search = settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(Cache, settings=search)


@pytest.mark.parametrize('has_records', [False, True])
@pytest.mark.parametrize('change', CHANGES)
def test_an_image_that_changes_at_any_step_of_a_run(change, has_records):
    """And that is put back with its time afterwards."""
    for changed_at in range(13):  # a run has 12 steps at most
        cache = Cache()
        try:
            cache.replace(NAMES[1], False)
            cache.change_during_a_run(NAMES[0], True, has_records, change, changed_at)
        finally:
            cache.teardown()


@pytest.mark.parametrize('is_reverted', [False, True])
@pytest.mark.parametrize('operations', range(10))
def test_a_run_that_is_killed_after_any_operation(operations, is_reverted):
    """A cache file is the one of its record, or it is missing."""
    cache = Cache()
    try:
        before = cache.image(NAMES[0]).read_bytes()
        cache.replace(NAMES[0], False)
        cache.run_and_kill(operations)
        if is_reverted:
            cache.image(NAMES[0]).write_bytes(before)
            cache.touch(NAMES[0])
        cache.run_once()
    finally:
        cache.teardown()
