"""Whatever is in a folder, wherever a run is stopped: nothing is lost, and one line says what is wrong."""

import contextlib
import fcntl
import http.server
import json
import os
import pathlib
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, Job, build_model, run, run_v1
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import tf_retrain
import tf_test
from tf_retrain import UserError, tf

PIXELS = np.random.default_rng(0).integers(0, 256, [30, 40, 3], np.uint8)


def save(path, image_format, image=None, **options):
    (image or Image.fromarray(PIXELS)).save(path, image_format, **options)


def read_by_the_graph(path):
    """The reason why the graph's own decoder refuses an image, or None."""
    try:
        run_v1(build_model(), path.read_bytes(), 'pool_3/_reshape:0')
    except tf.errors.OpError as error:
        return error.message


def caching(job, monkeypatch, capsys, *more, **changes):
    """Runs the job without training; returns its output."""
    job.main(monkeypatch, *more, how_many_training_steps='0', **changes)
    return capsys.readouterr().out


def created(out):
    return set(re.findall(r'Creating bottleneck at bottlenecks/(.*)\.txt', out))


GOOD = {
    'png named.jpg': lambda p: save(p, 'PNG'),
    'gif named.jpg': lambda p: save(p, 'GIF'),
    'cmyk.jpg': lambda p: save(p, 'JPEG', Image.fromarray(PIXELS).convert('CMYK')),
    'grey.jpg': lambda p: save(p, 'JPEG', Image.fromarray(PIXELS).convert('L')),
    '16 bit.png': lambda p: save(p, 'PNG', Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)),
    'palette.png': lambda p: save(p, 'PNG', Image.fromarray(PIXELS).convert('P')),
    'transparent.png': lambda p: save(p, 'PNG', Image.fromarray(PIXELS).convert('RGBA')),
    'one.jpg': lambda p: save(p, 'JPEG', Image.new('RGB', (1, 1))),
    'quote\'s "and", comma.jpg': lambda p: save(p, 'JPEG'),
    '100 %s %d {x} $HOME `x`.jpg': lambda p: save(p, 'JPEG'),
    'new\nline.jpg': lambda p: save(p, 'JPEG'),
    'caf\u00e9.jpg': lambda p: save(p, 'JPEG'),
    'cafe\u0301.jpg': lambda p: save(p, 'JPEG'),
    '猫.JPEG': lambda p: save(p, 'JPEG'),
    '-flag.jpg': lambda p: save(p, 'JPEG'),
    'x' * 246 + '.jpg': lambda p: save(p, 'JPEG'),
}
BAD = {
    'empty.jpg': (lambda p: p.touch(), 'it is empty'),
    'truncated.jpg': (lambda p: (save(p, 'JPEG'), p.write_bytes(p.read_bytes()[:600])), 'Invalid JPEG data'),
    'bmp.jpg': (lambda p: save(p, 'BMP'), 'it is a BMP image'),
    'webp.jpg': (lambda p: save(p, 'WEBP'), 'it is a WebP image'),
    'tiff.jpg': (lambda p: save(p, 'TIFF'), 'it is a TIFF image'),
    'heic.jpg': (lambda p: p.write_bytes(b'\0\0\0\x24ftypheic' + b'\0' * 50), 'it is a HEIC or AVIF image'),
    'html.jpg': (lambda p: p.write_text('<!doctype html><title>404</title>'), 'it is a web page'),
    'resource.jpg': (lambda p: p.write_bytes(b'\0\5\x16\7' + b'\0' * 50), 'it is what macOS keeps beside a file'),
    'text.png': (lambda p: p.write_text('hello'), 'Unknown image file format'),
    'moving.gif': (
        lambda p: save(p, 'GIF', save_all=True, append_images=[Image.new('RGB', (40, 30))]),
        'animated gif',
    ),
    'folder.jpg': (lambda p: p.mkdir(), 'Is a directory'),
    'dangling.jpg': (lambda p: p.symlink_to('nowhere'), 'No such file'),
}


def test_what_the_graph_decodes_is_used(job, monkeypatch, capsys):
    job.photographs(cat=20, dog=20)
    for name, write in GOOD.items():
        write(job.data / 'cat' / name)
        assert read_by_the_graph(job.data / 'cat' / name) is None
    out = caching(job, monkeypatch, capsys)
    assert 'is left out' not in out
    for name in GOOD:
        numbers = np.array((job.folder / 'bottlenecks/cat' / f'{name}.txt').read_text().split(','), float)
        expected = run_v1(build_model(), (job.data / 'cat' / name).read_bytes(), 'pool_3/_reshape:0')[0]
        np.testing.assert_allclose(numbers, expected, atol=1e-5 * np.abs(expected).max())
    assert 'Creating' not in caching(job, monkeypatch, capsys)


def test_what_it_cannot_decode_is_named_once_and_remembered(job, monkeypatch, capsys):
    job.photographs(cat=20, dog=20)
    for name, (write, _) in BAD.items():
        write(job.data / 'cat' / name)
        assert not (job.data / 'cat' / name).is_file() or read_by_the_graph(job.data / 'cat' / name)
    out = caching(job, monkeypatch, capsys)
    for name, (_, reason) in BAD.items():
        (line,) = [line for line in out.splitlines() if name in line]
        assert line.startswith(f"WARNING: 'data/cat/{name}' is left out: ")
        assert reason in line
    assert f'WARNING: {len(BAD)} of {40 + len(BAD)} images are left out.' in out
    assert len(created(out)) == 40

    # They are not tried again, but named again, as they still need to be replaced.
    monkeypatch.setattr(tf_retrain, 'decode_image', None)
    again = caching(job, monkeypatch, capsys)
    assert [line for line in again.splitlines() if 'left out' in line] == [
        line for line in out.splitlines() if 'left out' in line
    ]
    monkeypatch.undo()

    # One that is mended is used.
    save(job.data / 'cat/text.png', 'PNG')
    out = caching(job, monkeypatch, capsys)
    assert created(out) == {'cat/text.png'}
    assert f'WARNING: {len(BAD) - 1} of' in out


def test_huge_image(job, monkeypatch, capsys):
    job.photographs(cat=20, dog=20)
    save(job.data / 'cat/huge.jpg', 'JPEG', Image.new('RGB', (12_000, 9_000), (200, 60, 60)))
    assert 'cat/huge.jpg' in created(caching(job, monkeypatch, capsys))


@pytest.fixture
def open_job(model):
    """A job in a folder that every user may enter, as the tests may run as root, who may read everything."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(pathlib.Path(folder), model).photographs(cat=20, dog=20)
        for path in (job.folder, *job.folder.rglob('*')):
            path.chmod(0o777)
        yield job


def test_image_without_read_permission(open_job, monkeypatch, capsys):
    (open_job.data / 'cat/cat 0.jpg').chmod(0)
    nobody = 65534
    user = os.geteuid()
    if user == 0:
        os.seteuid(nobody)
    try:
        out = caching(open_job, monkeypatch, capsys)
    finally:
        monkeypatch.undo()
        os.seteuid(user)
    assert re.search(r"'data/cat/cat 0\.jpg' is left out: .*[Pp]ermission denied", out)
    assert len(created(out)) == 39


def test_image_that_vanishes(job, monkeypatch, capsys):
    """Between the listing and the reading, a photograph is deleted."""
    job.photographs(cat=20, dog=20)

    def list_and_delete(*arguments, original=tf_retrain.create_image_lists):
        lists = original(*arguments)
        (job.data / 'cat/cat 0.jpg').unlink()
        return lists

    monkeypatch.setattr(tf_retrain, 'create_image_lists', list_and_delete)
    out = caching(job, monkeypatch, capsys)
    assert re.search(r"WARNING: 'data/cat/cat 0.jpg' is left out: .*No such file", out)


def test_names_that_are_not_unicode(job):
    job.photographs(cat=20, dog=20)
    with open(os.fsencode(job.data / 'cat') + b'/\xe9t\xe9.jpg', 'w'):
        pass
    process = job.run(check=False)
    assert process.returncode == 1
    assert process.stderr == "ERROR: 'data/cat' has a file whose name is not UTF-8, b'\\xe9t\\xe9.jpg'. Rename it.\n"


def test_strict_makes_the_first_unreadable_image_an_error(job, monkeypatch):
    job.photographs(cat=20, dog=20)
    (job.data / 'dog/bad.jpg').write_text('<html>')
    with pytest.raises(UserError, match=r"^--strict: 'data/dog/bad\.jpg' is left out: it is a web page"):
        job.main(monkeypatch, '--strict')
    assert len(list((job.folder / 'bottlenecks').rglob('*.txt'))) == 40


def test_fewer_than_two_classes_remain(job):
    job.photographs(cat=20)
    (job.data / 'dog').mkdir()
    (job.data / 'dog/bad.jpg').write_text('<html>')
    process = job.run(check=False)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("ERROR: No image in the class folder 'dog' can be read.")


def test_a_replaced_image_gets_a_new_bottleneck(job, monkeypatch, capsys):
    job.photographs(cat=20, dog=20)
    caching(job, monkeypatch, capsys)
    before = (job.folder / 'bottlenecks/cat/cat 3.jpg.txt').read_text()
    path = job.data / 'cat/cat 3.jpg'
    save(path, 'JPEG')
    os.utime(path, (1, 1))  # as a copy that keeps an older time
    assert created(caching(job, monkeypatch, capsys)) == {'cat/cat 3.jpg'}
    assert (job.folder / 'bottlenecks/cat/cat 3.jpg.txt').read_text() != before
    assert created(caching(job, monkeypatch, capsys)) == set()


def test_another_model_computes_all_anew(job, monkeypatch, capsys):
    job.photographs(cat=20, dog=20)
    caching(job, monkeypatch, capsys)
    graph_def = build_model()
    weights = next(node for node in graph_def.node if node.name == 'conv/conv2d_params').attr['value'].tensor
    weights.CopyFrom(tf.make_tensor_proto(tf.make_ndarray(weights) * 2))
    (job.folder / 'inception/classify_image_graph_def.pb').unlink()
    (job.folder / 'inception/classify_image_graph_def.pb').write_bytes(graph_def.SerializeToString())
    assert len(created(caching(job, monkeypatch, capsys))) == 40
    assert created(caching(job, monkeypatch, capsys)) == set()


def test_a_cache_of_the_original_is_trusted(job, monkeypatch, capsys):
    """Nothing says which image and model it was made of; files of the original among ours are trusted too."""
    job.photographs(cat=20, dog=20)
    numbers = np.random.default_rng(0).uniform(size=2048).astype(np.float32)
    for path in job.data.rglob('*.jpg'):
        cache = job.folder / 'bottlenecks' / path.relative_to(job.data)
        cache.parent.mkdir(parents=True, exist_ok=True)
        if path.name != 'cat 0.jpg':
            cache.with_name(f'{path.name}.txt').write_text(','.join(map(str, numbers)))
    assert created(caching(job, monkeypatch, capsys)) == {'cat/cat 0.jpg'}
    os.utime(job.data / 'cat/cat 1.jpg', (1, 1))
    assert created(caching(job, monkeypatch, capsys)) == set()


def test_a_cache_file_that_changed_under_our_hands_is_not_believed(job, monkeypatch, capsys):
    """Cut within its last number, as a power failure may leave it, it has 2,048 numbers all the same."""
    job.photographs(cat=20, dog=20)
    caching(job, monkeypatch, capsys)
    path = job.folder / 'bottlenecks/cat/cat 3.jpg.txt'
    text = path.read_text()
    path.write_text(text.rpartition(',')[0] + ',0')
    assert created(caching(job, monkeypatch, capsys)) == {'cat/cat 3.jpg'}
    assert path.read_text() == text


def test_a_journal_cut_short_counts_for_nothing(job, monkeypatch, capsys):
    job.photographs(cat=20, dog=20)
    caching(job, monkeypatch, capsys)
    (journal,) = (job.folder / 'bottlenecks').glob('.provenance-*')
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 40
    assert [type(value) for value in json.loads(lines[0])] == [str, int, list]
    (job.folder / 'bottlenecks/.provenance-x.jsonl').write_bytes(b'\xff\0[1]\n"x"\n[[],1,[1]]\n' + lines[3][:20])
    journal.write_bytes(b''.join(lines)[:-10])
    assert created(caching(job, monkeypatch, capsys)) == set()


def test_files_that_are_no_longer_wanted_harm_nothing(job, monkeypatch, capsys):
    job.photographs(cat=20, dog=20)
    caching(job, monkeypatch, capsys)
    (job.data / 'cat/cat 0.jpg').unlink()
    (job.folder / 'bottlenecks/cat/.0123.tmp').write_text('half')
    (job.folder / 'bottlenecks/fox').mkdir()
    (job.folder / 'bottlenecks/fox/1.jpg.txt').write_text('1,2')
    assert created(caching(job, monkeypatch, capsys)) == set()


def test_two_runs_at_once(job):
    """They share the cache: neither waits for or spoils the other, and a third computes nothing."""
    job.photographs(cat=400, dog=400)
    processes = [job.start(output_graph=f'{i}.pb', output_labels=f'{i}.txt', summaries_dir=f'{i}') for i in range(2)]
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
    graphs = [(job.folder / f'{i}.pb').read_bytes() for i in range(2)]
    assert graphs[0] == graphs[1]
    assert 'Creating' not in job.run().stdout


def test_outputs_must_not_eat_each_other(job, monkeypatch):
    job.photographs(cat=20, dog=20)
    model = 'inception/classify_image_graph_def.pb'
    for changes in (
        {'output_graph': model},
        {'output_labels': f'./{model}'},
        {'output_labels': 'x', 'output_graph': 'x'},
    ):
        with pytest.raises(UserError, match='the pretrained model|must be different files'):
            job.main(monkeypatch, **changes)


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
def test_folders_inside_one_another(job, monkeypatch, capsys, folders):
    job.photographs(cat=20, dog=20)
    photographs = {path: path.read_bytes() for path in job.data.rglob('*.jpg')}
    for _ in range(2):
        caching(job, monkeypatch, capsys, **folders)
    out = caching(job, monkeypatch, capsys, **folders)
    assert 'Creating' not in out
    assert {path: path.read_bytes() for path in job.data.rglob('*.jpg')} == photographs
    labels = (job.folder / folders.get('output_labels', 'trained_model/labels.txt')).read_text()
    assert labels == 'cat\ndog\n'


def test_full_output_folder_leaves_the_layer_elsewhere(job, monkeypatch, tmp_path):
    job.photographs(cat=20, dog=20)
    write = tf_retrain.write_whole

    def write_whole(path, contents):
        if path == 'trained_model/unoptimized_model.pb':
            raise tf.errors.ResourceExhaustedError(None, None, f'{path}; No space left on device')
        write(path, contents)

    monkeypatch.setattr(tf_retrain, 'write_whole', write_whole)
    monkeypatch.setattr(tf_retrain.tempfile, 'tempdir', str(tmp_path))
    with pytest.raises(UserError, match='No space left on device') as error:
        job.main(monkeypatch)
    folder = re.search(r'are in (.*): move them', str(error.value))[1]
    assert os.path.dirname(folder) == str(tmp_path)
    graph_def = tf.compat.v1.GraphDef.FromString(open(f'{folder}/unoptimized_model.pb', 'rb').read())
    assert graph_def.node[-1].name == 'final_result'
    assert open(f'{folder}/labels.txt').read() == 'cat\ndog\n'


def test_full_disk_while_caching_keeps_what_was_computed(job, monkeypatch, capsys):
    job.photographs(cat=50, dog=50)
    write = tf_retrain.write_whole

    def write_whole(path, contents):
        if len(list((job.folder / 'bottlenecks').rglob('*.txt'))) == 70:
            raise tf.errors.ResourceExhaustedError(None, None, f'{path}; No space left on device')
        write(path, contents)

    monkeypatch.setattr(tf_retrain, 'write_whole', write_whole)
    with pytest.raises(tf.errors.ResourceExhaustedError):
        job.main(monkeypatch)
    monkeypatch.undo()
    capsys.readouterr()
    assert len(created(caching(job, monkeypatch, capsys))) == 30


def test_sigterm_says_that_the_run_stopped(job):
    job.photographs(cat=30, dog=30)
    process = job.start(how_many_training_steps='100000000')
    for line in process.stdout:
        if 'Step 100:' in line:
            break
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 'Traceback' not in out
    assert out.splitlines()[-1].startswith('Stopped.')


def test_ctrl_c_while_downloading_keeps_what_came(job):
    """A server sends a thousand bytes, and then nothing more."""
    job.photographs(cat=20, dog=20)
    (job.folder / 'inception/classify_image_graph_def.pb').unlink()
    release = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', '5000')
            self.end_headers()
            self.wfile.write(b'x' * 1000)
            release.wait(60)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        program = (
            f'import runpy, sys, urllib.request as r; o = r.urlopen; '
            f'r.urlopen = lambda q, **k: o("http://127.0.0.1:{httpd.server_port}/", **k); '
            f'sys.argv[0] = {str(ROOT / "tf_retrain.py")!r}; runpy.run_path(sys.argv[0], run_name="__main__")'
        )
        command = [sys.executable, '-c', program, *job.arguments()]
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
        process = subprocess.Popen(command, cwd=job.folder, **pipes)
        time.sleep(8)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        release.set()
        httpd.shutdown()
    assert process.returncode == 130
    assert 'Traceback' not in out
    assert out.splitlines()[-1].startswith('Stopped.')
    assert (job.folder / 'inception' / 'inception-2015-12-05.tgz.part').exists()


def test_in_a_terminal_of_20_columns(job):
    """The bar is drawn again and again, below the lines."""
    job.photographs(cat=100, dog=100)
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 20, 0, 0))
    command = [sys.executable, str(ROOT / 'tf_retrain.py'), *job.arguments()]
    process = subprocess.Popen(command, cwd=job.folder, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    out = b''
    with contextlib.suppress(OSError):  # what Linux raises when the other side has closed
        while block := os.read(screen, 1 << 16):
            out += block
    assert process.wait(timeout=60) == 0
    lines = out.decode().splitlines()
    assert lines[-1].startswith('python3 tf_test.py ')
    assert sum('Creating bottleneck at' in line for line in lines) == 200
    assert sum('Bottlenecks' in part for part in out.decode().split('\r')) > 2


@pytest.mark.parametrize('seconds', [0.2, 0.5, 1, 2])
def test_ctrl_c_at_the_start(job, seconds):
    job.photographs(cat=30, dog=30)
    process = job.start(how_many_training_steps='100000000')
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert 'Traceback' not in out


def test_a_terminal_of_20_columns_and_a_plain_locale(job):
    job.photographs(cat=20, dog=20)
    (job.data / '猫').mkdir()
    for i in range(20):
        save(job.data / '猫' / f'{i}.jpg', 'JPEG')
    environment = {**os.environ, 'COLUMNS': '20', 'LANG': 'C', 'LC_ALL': 'C'}
    process = run('tf_retrain.py', *job.arguments(), cwd=job.folder, env=environment)
    assert (job.folder / 'trained_model/labels.txt').read_text(encoding='utf-8') == 'cat\ndog\n猫\n'
    arguments = ['data/猫/0.jpg', job.flags['output_graph'], job.flags['output_labels']]
    process = run('tf_test.py', *arguments, cwd=job.folder, env=environment)
    assert '猫 (score = ' in process.stdout
    assert run('tf_retrain.py', '--help', env=environment).stdout


def test_a_hundred_classes_and_odd_labels(job, monkeypatch, capsys):
    names = [f'class {i}' for i in range(98)] + ['two\nlines', '猫']
    for i, name in enumerate(names):
        (job.data / name).mkdir(parents=True)
        for j in range(3):
            Image.new('RGB', (8, 8), (i, 2 * i, 255 - i)).save(job.data / name / f'{j}.jpg')
    job.main(monkeypatch)
    labels = (job.folder / 'trained_model/labels.txt').read_text().split('\n')
    assert len(labels) == 101
    assert labels[-1] == ''
    assert set(labels[:-1]) == {f'class {i}' for i in range(98)} | {'two lines', '猫'}


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
VALID = ','.join(map(str, np.arange(2048, dtype=np.float32)))


@FUZZ
@given(st.binary(max_size=300), st.integers(0, len(VALID)), st.integers(0, 50))
def test_fuzzed_cache_files(tmp_path, junk, at, cut):
    """Only what Python too reads as 2,048 finite numbers is believed."""
    contents = VALID.encode()[:at] + junk + VALID.encode()[at + cut :]
    (tmp_path / 'x').write_bytes(contents)
    bottlenecks, _, valid = tf_retrain.read_bottlenecks([str(tmp_path / 'x')], 2048)
    try:
        numbers = np.array([float(text) for text in contents.decode().split(',')], np.float32)
    except ValueError:
        numbers = np.zeros(0)
    if valid[0]:
        np.testing.assert_array_equal(bottlenecks[0], numbers)
        assert np.isfinite(numbers).all()


@FUZZ
@given(st.binary(max_size=200), st.integers(0, 1000), st.sampled_from(['JPEG', 'PNG', 'GIF']), st.booleans())
def test_fuzzed_images(tmp_path, junk, at, image_format, cut):
    path = tmp_path / 'x.jpg'
    save(path, image_format)
    contents = path.read_bytes()
    path.write_bytes(contents[:at] + junk + (b'' if cut else contents[at + len(junk) :]))
    assert '\n' not in tf_retrain.why_unreadable(str(path))


@FUZZ
@given(st.binary(max_size=200), st.integers(0, 300_000), st.booleans())
@example(b'\0', 152, False)  # renames a node that others read
def test_fuzzed_graphs(tmp_path, junk, at, cut):
    contents = build_model().SerializeToString()
    path = tmp_path / tf_retrain.MODEL_GRAPH_NAME
    path.write_bytes(contents[:at] + junk + (b'' if cut else contents[at + len(junk) :]))
    try:
        assert tf_retrain.load_backbone('inception_v3', str(tmp_path)).networks
    except UserError as error:
        assert str(path) in str(error)


@FUZZ
@given(st.sampled_from(['image', 'graph', 'labels']), st.binary(max_size=200), st.integers(0, 300_000), st.booleans())
@example('graph', b'', 0, True)
@example('labels', b'\xff', 0, True)
def test_fuzzed_labelling(trained, tmp_path, which, junk, at, cut):
    """Whatever is in the three files of tf_test.py, it answers with scores or with one line."""
    files = {
        'image': trained.data / 'cat/cat 0.jpg',
        'graph': trained.folder / 'trained_model/unoptimized_model.pb',
        'labels': trained.folder / 'trained_model/labels.txt',
    }
    contents = files[which].read_bytes()
    at %= len(contents)
    (tmp_path / which).write_bytes(contents[:at] + junk + (b'' if cut else contents[at + len(junk) :]))
    with contextlib.suppress(tf_test.UserError):
        tf_test.label_image(**{name: str(path) for name, path in {**files, which: tmp_path / which}.items()})


@FUZZ
@given(st.text(max_size=40).filter(lambda name: '\0' not in name and '/' not in name))
def test_fuzzed_labels(name):
    label = tf_retrain.get_label(name)
    assert len(label.splitlines()) <= 1
    assert label == '' or f'{label}\n'.encode().decode().splitlines() == [label]


@pytest.mark.slow
def test_kills_at_any_moment(job, model, tmp_path_factory):
    """SIGKILL at 30 moments of caching and training; then the graph is that of a run which nobody disturbed."""
    flags = {'how_many_training_steps': '1000'}
    job.photographs(cat=400, dog=400)
    undisturbed = Job(tmp_path_factory.mktemp('undisturbed'), model)
    undisturbed.data.symlink_to(job.data)
    began = time.monotonic()
    undisturbed.run(**flags)
    duration = time.monotonic() - began
    rng = np.random.default_rng(0)
    computed = []
    for moment in rng.uniform(0.5, 0.95, 30) * duration:
        process = job.start(**flags)
        try:
            out, _ = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
        computed += re.findall(r'Creating bottleneck at (.*)', out)
    computed += re.findall(r'Creating bottleneck at (.*)', job.run(**flags).stdout)
    assert job.graph() == undisturbed.graph()
    # At each kill a batch may be computed and not yet written.
    assert len(computed) - len(set(computed)) <= 30 * tf_retrain.NETWORK_BATCH_SIZE
