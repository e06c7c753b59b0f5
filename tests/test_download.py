"""How the model gets into --model_dir: found, unpacked, or downloaded from a server that misbehaves."""

import contextlib
import gzip
import io
import re
import tarfile
import threading

import pytest
from helpers import build_model, load_backbone, send, serve
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import tf_retrain

GRAPH = 'classify_image_graph_def.pb'
ARCHIVE = 'inception-2015-12-05.tgz'


def archive(**files):
    """Returns a .tgz with the given files; {name: contents, or a TarInfo}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for name, contents in files.items():
            if isinstance(contents, tarfile.TarInfo):
                tar.addfile(contents)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(contents)
                tar.addfile(info, io.BytesIO(contents))
    return buffer.getvalue()


@pytest.fixture(scope='module')
def whole():
    return archive(**{GRAPH: build_model().SerializeToString(), 'LICENSE': b'free'})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(tf_retrain.time, 'sleep', lambda seconds: None)


@contextlib.contextmanager
def server(monkeypatch, answer):
    """Serves DATA_URL by answer(handler, number of the request); yields the list of the Range headers that came."""
    ranges = []

    def count(handler):
        ranges.append(handler.headers.get('Range'))
        answer(handler, len(ranges))

    with serve(count) as url:
        monkeypatch.setattr(tf_retrain, 'DATA_URL', f'{url}/{ARCHIVE}')
        yield ranges


def resume(handler, contents, end=None):
    """Answers a Range request as a server does that can resume."""
    start = int((handler.headers.get('Range') or 'bytes=0-')[6:-1])
    if start >= len(contents):
        return send(handler, b'', status=416)
    send(handler, contents[start:end], len(contents) - start, 206 if start else 200)


def fetch(folder):
    return tf_retrain.maybe_download_and_extract(
        str(folder), tf_retrain.DATA_URL, tf_retrain.MODEL_GRAPH_NAME
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_graph_is_used_as_it_is(tmp_path, monkeypatch):
    (tmp_path / GRAPH).write_bytes(b'x')
    monkeypatch.setattr(tf_retrain, 'download', None)
    assert fetch(tmp_path) == str(tmp_path / GRAPH)
    assert names(tmp_path) == [GRAPH]


def test_the_archive_is_unpacked_without_a_network(tmp_path, monkeypatch, whole):
    (tmp_path / ARCHIVE).write_bytes(whole)
    monkeypatch.setattr(tf_retrain, 'download', None)
    load_backbone(tmp_path)
    assert names(tmp_path) == [GRAPH, ARCHIVE]


def test_download(tmp_path, monkeypatch, capsys, whole):
    with server(monkeypatch, lambda handler, _: send(handler, whole)) as ranges:
        load_backbone(tmp_path / 'new')
    assert ranges == [None]
    assert names(tmp_path / 'new') == [GRAPH, ARCHIVE]
    assert re.search(rf'>> Downloading {ARCHIVE} 100\.0%\n$', capsys.readouterr().err)


def test_a_broken_connection_is_resumed(tmp_path, monkeypatch, whole):
    third = len(whole) // 3
    with server(
        monkeypatch, lambda h, n: resume(h, whole, end=n * third if n < 3 else None)
    ) as ranges:
        load_backbone(tmp_path)
    assert ranges == [None, f'bytes={third}-', f'bytes={2 * third}-']


def test_a_connection_that_breaks_often_is_resumed_as_long_as_something_comes(
    tmp_path, monkeypatch, whole
):
    part = len(whole) // 9
    with server(
        monkeypatch, lambda h, n: resume(h, whole, end=n * part if n < 9 else None)
    ) as ranges:
        load_backbone(tmp_path)
    assert len(ranges) == 9 > tf_retrain.DOWNLOAD_ATTEMPTS


def test_the_progress_of_a_download_of_unknown_size(tmp_path, monkeypatch, capsys, whole):
    def answer(handler, _):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(whole)

    with server(monkeypatch, answer):
        load_backbone(tmp_path)
    shown = capsys.readouterr().err
    assert f'>> Downloading {ARCHIVE} {len(whole) / 1e6:.1f} MB\n' in shown
    assert '%' not in shown


def test_a_later_run_resumes(tmp_path, monkeypatch, whole):
    (tmp_path / f'{ARCHIVE}.part').write_bytes(whole[:1000])
    with server(monkeypatch, lambda handler, _: resume(handler, whole)) as ranges:
        load_backbone(tmp_path)
    assert ranges == ['bytes=1000-']
    assert names(tmp_path) == [GRAPH, ARCHIVE]


def test_a_server_that_cannot_resume_is_asked_for_all(tmp_path, monkeypatch, whole):
    (tmp_path / f'{ARCHIVE}.part').write_bytes(whole[:1000])
    with server(monkeypatch, lambda handler, _: send(handler, whole)):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    'part', [b'x' * 1000, b'x' * 100_000_000], ids=['wrong start', 'longer than the file']
)
def test_a_part_that_does_not_fit_is_dropped(tmp_path, monkeypatch, whole, part):
    (tmp_path / f'{ARCHIVE}.part').write_bytes(part)
    with server(monkeypatch, lambda handler, _: resume(handler, whole)):
        load_backbone(tmp_path)


def test_a_broken_archive_is_renamed_and_downloaded_again(tmp_path, monkeypatch, capsys, whole):
    (tmp_path / ARCHIVE).write_bytes(whole[:-100])
    with server(monkeypatch, lambda handler, _: send(handler, whole)):
        load_backbone(tmp_path)
    assert names(tmp_path) == [GRAPH, ARCHIVE, f'{ARCHIVE}.broken']
    assert f'{ARCHIVE} is damaged, or has no {GRAPH} in it: renamed to' in capsys.readouterr().out


def test_an_archive_that_unpacks_to_too_much(tmp_path, monkeypatch, whole):
    """Not more than the limit is ever in memory, whatever a few bytes unpack to."""
    size = len(gzip.decompress(whole))
    (tmp_path / ARCHIVE).write_bytes(whole)
    monkeypatch.setattr(tf_retrain, 'MAX_ARCHIVE_SIZE', size)
    assert tf_retrain.extract(str(tmp_path / ARCHIVE), GRAPH) == b''
    monkeypatch.setattr(tf_retrain, 'MAX_ARCHIVE_SIZE', size + 1)
    assert tf_retrain.extract(str(tmp_path / ARCHIVE), GRAPH) == build_model().SerializeToString()


@pytest.mark.parametrize(
    ('answer', 'reason'),
    [
        (lambda h, n, body: send(h, b'', status=500), 'HTTPError: HTTP Error 500'),
        (lambda h, n, body: send(h, b'', status=404), 'HTTPError: HTTP Error 404'),
        (
            lambda h, n, body: send(h, b'<html>Sign in</html>'),
            f'20 of 20 bytes came, and are not a .tgz with {GRAPH}',
        ),
        (lambda h, n, body: send(h, body[:-9]), f'bytes came, and are not a .tgz with {GRAPH}'),
        (
            lambda h, n, body: send(h, body + b'more'),
            f'bytes came, and are not a .tgz with {GRAPH}',
        ),
        (lambda h, n, body: send(h, b'', length=50), '0 of 50 bytes came'),
        (lambda h, n, body: h.wfile.write(b'hello\n'), 'BadStatusLine'),
        (lambda h, n, body: None, 'RemoteDisconnected'),
    ],
    ids=['500', '404', 'HTML', 'short', 'long', 'nothing', 'no HTTP', 'hangs up'],
)
def test_no_whole_archive(tmp_path, monkeypatch, whole, answer, reason):
    with server(monkeypatch, lambda handler, number: answer(handler, number, whole)) as ranges:
        with pytest.raises(tf_retrain.UserError) as error:
            fetch(tmp_path)
    assert len(ranges) == tf_retrain.DOWNLOAD_ATTEMPTS
    message = str(error.value)
    assert reason in message
    assert tf_retrain.DATA_URL in message
    assert f'save it as {tmp_path / ARCHIVE}' in message
    assert '\n' not in message
    assert ARCHIVE not in names(tmp_path)


def test_a_server_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(tf_retrain, 'DOWNLOAD_TIMEOUT', 0.2)
    done = threading.Event()
    with server(monkeypatch, lambda handler, number: done.wait(10)):
        with pytest.raises(tf_retrain.UserError, match='timed out'):
            fetch(tmp_path)
        done.set()


def test_an_unreachable_server(tmp_path, monkeypatch):
    monkeypatch.setattr(tf_retrain, 'DATA_URL', f'http://127.0.0.1:1/{ARCHIVE}')
    with pytest.raises(tf_retrain.UserError, match='Connection refused'):
        fetch(tmp_path)


def link(name, kind, target=''):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    'member',
    [
        {'../outside': b'x'},
        {'/tmp/outside': link('/tmp/outside/../../../etc/x', tarfile.REGTYPE)},
        {'link': link('link', tarfile.SYMTYPE, '/etc/passwd')},
        {'device': link('device', tarfile.CHRTYPE)},
        {GRAPH: link(GRAPH, tarfile.SYMTYPE, '/etc/passwd')},
        {f'../{GRAPH}': b'x'},
    ],
    ids=['parent', 'absolute', 'link', 'device', 'a link as graph', 'a graph outside'],
)
def test_nothing_but_the_graph_leaves_an_archive(tmp_path, member):
    folder = tmp_path / 'model'
    folder.mkdir()
    (folder / ARCHIVE).write_bytes(archive(**member, LICENSE=b'free'))
    assert tf_retrain.extract(str(folder / ARCHIVE), GRAPH) == b''
    (folder / ARCHIVE).write_bytes(archive(**member, **{f'./{GRAPH}': b'the graph'}))
    assert fetch(folder) == str(folder / GRAPH)
    assert names(folder) == [GRAPH, ARCHIVE]
    assert (folder / GRAPH).read_bytes() == b'the graph'
    assert not (folder / GRAPH).is_symlink()
    assert names(tmp_path) == ['model']


@pytest.mark.parametrize(
    'contents', [gzip.compress(b'x' * 5000), archive(LICENSE=b'free')], ids=['no tar', 'no graph']
)
def test_an_archive_without_the_graph(tmp_path, monkeypatch, capsys, whole, contents):
    (tmp_path / ARCHIVE).write_bytes(contents)
    with server(monkeypatch, lambda handler, _: send(handler, contents)):
        with pytest.raises(
            tf_retrain.UserError, match=f'bytes came, and are not a .tgz with {GRAPH}'
        ):
            fetch(tmp_path)
    assert f'{ARCHIVE} is damaged, or has no {GRAPH} in it: renamed to' in capsys.readouterr().out
    assert names(tmp_path) == [f'{ARCHIVE}.broken']
    with server(monkeypatch, lambda handler, _: send(handler, whole)):
        load_backbone(tmp_path)
    assert names(tmp_path) == [GRAPH, ARCHIVE, f'{ARCHIVE}.broken']


def test_a_model_of_another_kind(tmp_path):
    path = tmp_path / GRAPH
    path.write_bytes(b'<html>')
    with pytest.raises(
        tf_retrain.UserError,
        match=rf'{GRAPH} is damaged or another graph \(.+\)\. Delete it and run',
    ):
        load_backbone(tmp_path)
    graph_def = build_model()
    del graph_def.node[-6:]
    path.write_bytes(graph_def.SerializeToString())
    message = rf'\(pool_3 is not in graph\)\. Delete it and run again to download {tf_retrain.DATA_URL}\.$'
    with pytest.raises(tf_retrain.UserError, match=message):
        load_backbone(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200), st.integers(0, 300_000), st.booleans())
@example(b'\0', 152, False)  # renames a node that others read
def test_fuzzed_graphs(tmp_path, junk, at, cut):
    contents = build_model().SerializeToString()
    path = tmp_path / GRAPH
    path.write_bytes(contents[:at] + junk + (b'' if cut else contents[at + len(junk) :]))
    try:
        assert load_backbone(tmp_path).networks
    except tf_retrain.UserError as error:
        assert str(path) in str(error)
