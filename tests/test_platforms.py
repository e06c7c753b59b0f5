"""Other systems, and other places where a run starts: what they lack is taken away here."""

import _multiprocessing
import contextlib
import io
import multiprocessing
import ntpath
import os
import pathlib
import shutil
import signal
import sys
import tarfile
import threading
import types
from unittest import mock

import forks
import pytest
from helpers import GRAPH, LABELS, ROOT, created, parse, run, run_new

import tf_retrain
import tf_test

tf = tf_retrain.tf
SCRIPTS = ('tf_retrain.py', 'retrain_serving.py', 'tf_test.py')
OTHER_SYSTEM = ROOT / 'tests/programs/other_system.py'
needs_proc = pytest.mark.skipif(
    not os.path.exists('/proc/self/fd'), reason='only Linux tells which files a process has open'
)

# Windows and macOS


@needs_proc
def test_without_what_windows_lacks(job):
    """TensorBoard has the logs of the first run open when the second one begins."""
    job.photographs(cat=30, dog=30)
    first = run(OTHER_SYSTEM, ROOT / SCRIPTS[0], *job.arguments(), cwd=job.folder)
    assert len(created(first.stdout)) == 60
    logs = set(job.folder.glob('logs/*/*'))
    flags = [*job.arguments(), '--saved_model_dir=saved/1']
    second = run(OTHER_SYSTEM, ROOT / SCRIPTS[1], *flags, cwd=job.folder)
    (line,) = [line for line in second.stdout.splitlines() if 'WARNING: logs' in line]
    assert all(f'logs/{path.parent.name}/{path.name}' in line for path in logs)
    assert line.endswith('On Windows, end TensorBoard before the next run.')
    assert logs < set(job.folder.glob('logs/*/*'))
    assert (job.folder / 'saved/1/saved_model.pb').exists()
    assert first.stderr == second.stderr == ''
    labelling = [ROOT / SCRIPTS[2], 'data', GRAPH, LABELS, '--sort_into=sorted']
    run(OTHER_SYSTEM, *labelling, cwd=job.folder)
    copies = list(job.folder.glob('sorted/*/*.jpg'))
    assert len(copies) == 60
    assert {path.stat().st_nlink for path in copies} == {1}


@pytest.fixture
def windows(monkeypatch):
    """Has the functions of this process take the separator of Windows."""
    monkeypatch.setattr(os, 'sep', '\\')


def test_the_split_is_the_same_on_windows(tmp_path, windows, monkeypatch):
    """However --image_dir is typed there. On Linux, a backslash is part of a name."""
    monkeypatch.chdir(tmp_path)
    for i in range(100):
        path = pathlib.Path(f'd/{"ab"[i % 2]}/{i}.jpg')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, 'sep', '/')
        expected = tf_retrain.list_images(parse('--image_dir=d')).sets.tolist()
        assert tf_retrain.get_set('data\\cat\\cat.0.jpg', 10, 10) == 'training'
    assert tf_retrain.get_set('data\\cat\\cat.0.jpg', 10, 10) == 'testing'
    monkeypatch.setattr(os.path, 'join', ntpath.join)
    isdir, listdir = tf.io.gfile.isdir, os.listdir
    monkeypatch.setattr(tf.io.gfile, 'isdir', lambda path: isdir(path.replace('\\', '/')))
    monkeypatch.setattr(os, 'listdir', lambda path: listdir(path.replace(b'\\', b'/')))
    monkeypatch.setattr(tf_retrain, 'may_be_folder', tf.io.gfile.isdir)
    for typed in ('d', 'd/', 'd\\'):
        images = tf_retrain.list_images(parse(f'--image_dir={typed}'))
        assert images.paths[0] in ('d\\a\\0.jpg', 'd/a\\0.jpg')
        assert images.sets.tolist() == expected


FORBIDDEN = [
    ('a<b>c:d"e|f?g*h\\i', 'a_b_c_d_e_f_g_h_i'),
    ('a\tb', 'a_b'),
    ('what?!', 'what_!'),
    ('a.', 'a_'),
    (' x ', ' x_'),
    ('a. .', 'a. _'),
    ('CON', '_CON'),
    ('nul.txt', '_nul.txt'),
    ('com1', '_com1'),
    ('LPT9 .a', '_LPT9 .a'),
    ('console', 'console'),
    ('com10', 'com10'),
    ('red fox', 'red fox'),
    ('猫', '猫'),
]


@pytest.mark.parametrize(('label', 'folder'), FORBIDDEN)
def test_labels_that_windows_forbids_as_names(tmp_path, windows, monkeypatch, label, folder):
    (tmp_path / 'x.jpg').write_text('x')
    tf_test.place(str(tmp_path / 'x.jpg'), label, str(tmp_path / 'sorted'))
    assert os.listdir(tmp_path / 'sorted') == [folder]
    monkeypatch.setattr(os, 'sep', '/')
    assert tf_test.to_file_name(label) == label  # as ever elsewhere


@pytest.mark.parametrize(
    ('handle', 'linux', 'other'),
    [
        ('https://x.com/m/1?tf-hub-format=compressed', '~x.com~m~1?tf-', '~x.com~m~1_tf-'),
        ('C:\\modules\\m', '_C~\\modules\\m', '_C~_modules_m'),
    ],
)
def test_cache_files_of_a_module(monkeypatch, handle, linux, other):
    """The handle is part of their names."""
    monkeypatch.setattr(tf_retrain, 'open_tfhub_module', lambda handle: (0, None))
    function = tf.function(lambda images: images[:, 0, 0])
    monkeypatch.setattr(
        tf_retrain,
        'find_feature_vector',
        lambda module, handle: (function, tf_retrain.InputFormat((4, 4), 0, 255), 3),
    )
    assert linux in tf_retrain.load_tfhub_module(handle).cache_suffix
    monkeypatch.setattr(os, 'sep', '\\')
    assert other in tf_retrain.load_tfhub_module(handle).cache_suffix


def test_paths_that_are_too_long_for_windows(job, windows, monkeypatch):
    """Each run computes such a bottleneck; such an image is not sorted; the others go on."""

    def refuse(path, contents, write_whole=tf_retrain.write_whole):
        if len(os.path.abspath(path)) >= 260:
            raise tf.errors.NotFoundError(None, None, 'The system cannot find the path specified.')
        write_whole(path, contents)

    def link(source, target):
        raise FileNotFoundError(2, 'No such file or directory', source, None, target)

    monkeypatch.setattr(tf_retrain, 'write_whole', refuse)
    job.photographs(cat=20, dog=20)
    length = 260 - len(f'{job.folder}/bottlenecks/.records/cat/.jpg.rec')
    for name in ('x' * length, 'y' * (length - 1)):
        shutil.copy(job.data / 'cat/cat 0.jpg', job.data / f'cat/{name}.jpg')
    for count in (42, 1):
        out = job.cache()
        assert len(created(out)) == count
        (line,) = [line for line in out.splitlines() if 'the name is too long' in line]
        assert 'xxx' in line
    monkeypatch.setattr(tf_test, 'link_or_copy', link)
    for name, problem in (('x' * 250, 'too long for Windows'), ('x', 'No such file')):
        assert not tf_test.try_to_place(str(job.data / 'cat/cat 0.jpg'), name, str(job.folder))
        assert problem in job.capsys.readouterr().err


def test_a_network_in_an_archive_on_windows(monkeypatch):
    name = tf_retrain.MOBILENET_GRAPH_NAME.format('1.0_224')
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode='w:gz') as tar:
        member = tarfile.TarInfo(f'./{name}')
        member.size = 5
        tar.addfile(member, io.BytesIO(b'graph'))
    monkeypatch.setattr(tf_retrain, 'os', types.SimpleNamespace(path=ntpath))
    assert tf_retrain.extract(archive.getvalue(), name) == b'graph'


# Notebooks, threads and IDEs


class Screen:
    """A standard output that can do no more than what print() needs."""

    def __init__(self):
        self.text = ''

    def write(self, text):
        self.text += text
        return len(text)


def use_screen(monkeypatch):
    """Has this process print on such an output; a fixture would come before that of pytest."""
    screen = Screen()
    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, screen)
    return screen


def fail(flags):
    raise tf_retrain.UserError('no\nluck')


def test_a_run_in_a_notebook(job, monkeypatch):
    """Its handlers of Ctrl-C and SIGTERM come back after each run, however it ends."""
    handlers = [lambda *arguments: None, signal.SIG_IGN]
    monkeypatch.chdir(job.photographs(cat=20, dog=20).folder)
    screen = use_screen(monkeypatch)
    before = list(map(signal.getsignal, tf_retrain.STOP_SIGNALS))
    try:
        for number, handler in zip(tf_retrain.STOP_SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
        for _ in range(2):
            tf_retrain.run(tf_retrain.main, parse(*job.arguments()))
            assert list(map(signal.getsignal, tf_retrain.STOP_SIGNALS)) == handlers
        with pytest.raises(SystemExit, match='^1$'):
            tf_retrain.run(fail, None)
        with pytest.raises(SystemExit, match='^130$'):
            tf_retrain.run(lambda flags: signal.raise_signal(signal.SIGINT), None)
        assert list(map(signal.getsignal, tf_retrain.STOP_SIGNALS)) == handlers
    finally:
        for number, handler in zip(tf_retrain.STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)
    assert screen.text.count('Final test accuracy = ') == 2
    assert 'ERROR: no luck\n' in screen.text


def test_a_run_in_a_thread(job, monkeypatch):
    """While the main thread has a run of its own; an error is shown there, too."""
    monkeypatch.chdir(job.photographs(cat=20, dog=20).folder)
    screen = use_screen(monkeypatch)
    flags = parse(*job.arguments())

    def run_job(job_of_thread):
        with contextlib.suppress(SystemExit):  # pytest would warn of it
            tf_retrain.run(job_of_thread, flags)

    def run_in_thread(job_of_thread):
        thread = threading.Thread(target=run_job, args=[job_of_thread])
        thread.start()
        thread.join()

    run_in_thread(tf_retrain.main)
    assert 'Final test accuracy = ' in screen.text
    tf_retrain.run(lambda flags: run_in_thread(tf_retrain.main), flags)
    assert screen.text.count('Final test accuracy = ') == 2
    run_in_thread(fail)
    assert screen.text.endswith('ERROR: no luck\n')


def test_an_import_without_standard_error(tmp_path):
    """Programs of Windows without a console have none, such as IDLE."""
    program = f'import sys; sys.path.insert(0, {str(ROOT)!r}); import tf_retrain, tf_test; print(1)'
    with forks.Fork(['-c', program], tmp_path, ['out', None]) as process:
        process.communicate()
    assert process.returncode == 0
    assert (tmp_path / 'out').read_text() == '1\n'


# An import that fails

CPUINFO = 'processor\t: 0\nflags\t\t: fpu sse4_2 {}\nbugs\t\t: none\n'


@pytest.mark.parametrize('script', [tf_retrain, tf_test])
def test_processors(monkeypatch, script):
    def set_processor(text):
        monkeypatch.setattr(script, 'open', lambda path: io.StringIO(text), raising=False)

    for text in (CPUINFO.format('avx avx2'), 'Features\t: fp asimd\n', ''):
        set_processor(text)
        script.ensure_avx()
    set_processor(CPUINFO.format('avx2fake'))
    with pytest.raises(ImportError, match='this processor has no AVX instructions'):
        script.ensure_avx()


NO_AVX = """
import builtins, io, runpy, sys
original = builtins.open
def open_fake(path, *arguments, **options):
    if path == '/proc/cpuinfo':
        return io.StringIO('flags : fpu sse4_2')
    return original(path, *arguments, **options)
builtins.open = open_fake
sys.argv = {arguments!r}
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def get_arguments(script):
    arguments = ['x.jpg', 'g.pb', 'l.txt'] if script == 'tf_test.py' else ['--image_dir=data']
    return [str(ROOT / script), *arguments]


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_processor_without_avx_is_one_line(script):
    process = forks.run(['-c', NO_AVX.format(arguments=get_arguments(script))])
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith('ERROR: this processor has no AVX instructions')


@pytest.mark.parametrize(
    ('script', 'contents', 'start'),
    [
        ('tf_retrain.py', '[]', 'ERROR: TensorFlow cannot be imported (AttributeError('),
        # That is of Keras 2.
        ('tf_test.py', '{"backend": "theano"}', "ERROR: The labels file 'l.txt' cannot be read"),
    ],
)
def test_settings_of_keras_that_do_not_fit(tmp_path, script, contents, start):
    """TensorFlow imports Keras, which reads them, whatever the network is."""
    (tmp_path / 'keras.json').write_text(contents)
    environment = {**os.environ, 'KERAS_HOME': str(tmp_path)}
    arguments = get_arguments(script)[1:]
    process = run_new(script, *arguments, check=False, env=environment, cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(start)  # TensorFlow may have said more


BROKEN = """
import os
os.write(2, b'libfoo says why\\n')
raise ImportError('libfoo.so.1: cannot open shared object file')
"""


FULL_DRIVE = """
import tempfile
tempfile.tempdir = None
tempfile._candidate_tempdir_list = lambda: ['/missing']  # no file can be written there
tempfile.gettempdir()
"""
# {what stands for TensorFlow: what the program says}. What libraries write is shown only then.
FAILED_IMPORTS = {
    BROKEN: [
        'libfoo says why',
        'ERROR: libfoo.so.1: cannot open shared object file. See "Problems" in README.md.',
    ],
    FULL_DRIVE: [
        "ERROR: No usable temporary directory found in ['/missing']. Make space there, or set "
        'TMPDIR to a folder on another drive.'
    ],
}


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('module', FAILED_IMPORTS)
def test_tensorflow_cannot_be_imported(tmp_path, script, module):
    (tmp_path / 'tensorflow.py').write_text(module)
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    process = run_new(script, *get_arguments(script)[1:], check=False, env=environment)
    assert process.returncode == 1
    assert process.stderr.splitlines() == FAILED_IMPORTS[module]


def test_without_a_folder_for_temporary_files(monkeypatch, capfd):
    """What the libraries write is lost, and the error is not."""
    fail = mock.Mock(side_effect=FileNotFoundError(2, 'No usable temporary directory found'))
    monkeypatch.setattr(tf_retrain.tempfile, 'TemporaryFile', fail)
    with pytest.raises(ImportError, match='^no$'), tf_retrain.silenced_libraries():
        os.write(2, b'lost')
        raise ImportError('no')
    os.write(2, b'shown')
    assert capfd.readouterr().err == 'shown'


def test_no_more_threads(job, monkeypatch):
    """The user has as many processes as the system allows."""
    job.photographs(cat=4, dog=4)
    flags = parse(*job.arguments())
    monkeypatch.chdir(job.folder)
    images = tf_retrain.list_images(flags)
    backbone = tf_retrain.load_backbone(flags)
    fail = mock.Mock(side_effect=RuntimeError("can't start new thread"))
    monkeypatch.setattr(tf_retrain.threading.Thread, 'start', fail)
    with pytest.raises(
        tf_retrain.UserError, match="^can't start new thread: too many programs run. Close"
    ):
        tf_retrain.cache_bottlenecks(images, backbone, flags)


def test_no_space_for_semaphores(job, monkeypatch):
    """/dev/shm is full or missing, as in some containers."""
    fail = mock.Mock(side_effect=OSError(28, 'No space left on device'))
    monkeypatch.setattr(_multiprocessing, 'SemLock', fail)
    with pytest.raises(OSError, match='No space'):
        multiprocessing.Lock()
    job.photographs(cat=30, dog=30)
    assert 'python3 tf_test.py' in job.main('--flip_left_right').splitlines()[-1]


def test_how_to_activate_the_environment_on_windows(windows):
    line = tf_retrain.explain_import_error(ModuleNotFoundError("No module named 'numpy'"))
    assert r'Run `.venv\Scripts\activate` first' in line


def test_urls_of_windows_become_paths(monkeypatch):
    monkeypatch.setattr(os, 'sep', '\\')
    assert tf_retrain.to_path('file:///C:/my%20data') == 'C:/my data'
