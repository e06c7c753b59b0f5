"""How the model gets into --model_dir: found, unpacked, or downloaded from a misbehaving server."""

import contextlib
import gzip
import io
import os
import re
import socket
import tarfile
import threading
import zlib

import pytest
from helpers import build_model, load_backbone, send, serve
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import tf_retrain
from tf_retrain import UserError

GRAPH = 'classify_image_graph_def.pb'
ARCHIVE = 'inception-2015-12-05.tgz'
NO_ARCHIVE = f'bytes came, and are not a .tgz with {GRAPH}'
DAMAGED = f'{ARCHIVE} is damaged, or has no {GRAPH} in it: renamed to'


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
def whole(model):
    return archive(**{GRAPH: model.read_bytes(), 'LICENSE': b'free'})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(tf_retrain.time, 'sleep', lambda seconds: None)


@pytest.fixture
def server(monkeypatch):
    """Serves DATA_URL by the given answers, the last of them ever after; returns the requests."""
    with contextlib.ExitStack() as stack:

        def start(*answers):
            requests = []

            def answer(handler):
                requests.append(handler.path)
                answers[min(len(requests), len(answers)) - 1](handler)

            url = stack.enter_context(serve(answer))
            monkeypatch.setattr(tf_retrain, 'DATA_URL', f'{url}/{ARCHIVE}')
            return requests

        yield start


def body(contents, **options):
    return lambda handler: send(handler, contents, **options)


def fetch(folder):
    return tf_retrain.maybe_download_and_extract(str(folder), tf_retrain.DATA_URL, GRAPH)


def names(folder):
    return sorted(os.listdir(folder))


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


def test_download(tmp_path, server, capsys, whole, model):
    requests = server(body(whole))
    load_backbone(tmp_path / 'new')
    assert requests == [f'/{ARCHIVE}']
    assert names(tmp_path / 'new') == [GRAPH, ARCHIVE]
    assert (tmp_path / 'new' / GRAPH).read_bytes() == model.read_bytes()
    assert (tmp_path / 'new' / ARCHIVE).read_bytes() == whole
    assert re.search(rf'>> Downloading {ARCHIVE} 100\.0%\n$', capsys.readouterr().err)


def test_a_broken_connection_is_tried_again(tmp_path, server, whole):
    broken = body(whole[:9000], length=len(whole))
    requests = server(*[broken] * (tf_retrain.DOWNLOAD_ATTEMPTS - 1), body(whole))
    load_backbone(tmp_path)
    assert len(requests) == tf_retrain.DOWNLOAD_ATTEMPTS
    assert names(tmp_path) == [GRAPH, ARCHIVE]


def test_the_progress_of_a_download_of_unknown_size(tmp_path, server, capsys, whole):
    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(whole)

    server(answer)
    load_backbone(tmp_path)
    shown = capsys.readouterr().err
    assert f'>> Downloading {ARCHIVE} {len(whole) / 1e6:.1f} MB\n' in shown
    assert '%' not in shown


def test_a_broken_archive_is_renamed_and_downloaded_again(tmp_path, server, capsys, whole):
    (tmp_path / ARCHIVE).write_bytes(whole[:-100])
    server(body(whole))
    load_backbone(tmp_path)
    assert names(tmp_path) == [GRAPH, ARCHIVE, f'{ARCHIVE}.broken']
    assert DAMAGED in capsys.readouterr().out


def test_an_archive_that_unpacks_to_too_much(tmp_path, monkeypatch, whole, model):
    """Not more than the limit is ever in memory, whatever a few bytes unpack to."""
    path = tmp_path / ARCHIVE
    path.write_bytes(whole)
    size = len(gzip.decompress(whole))
    for limit, expected in ((size, b''), (size + 1, model.read_bytes())):
        monkeypatch.setattr(tf_retrain, 'MAX_ARCHIVE_SIZE', limit)
        assert tf_retrain.extract(path.read_bytes(), GRAPH) == expected


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (lambda whole: body(b'', status=500), 'HTTPError: HTTP Error 500'),
        (lambda whole: body(b'', status=404), 'HTTPError: HTTP Error 404'),
        (lambda whole: body(b'<html>Sign in</html>'), f'20 {NO_ARCHIVE}'),
        (lambda whole: body(whole[:-9]), NO_ARCHIVE),
        (lambda whole: body(whole + b'more'), NO_ARCHIVE),
        (lambda whole: body(b'', length=50), '0 of 50 bytes came'),
        (lambda whole: lambda handler: handler.wfile.write(b'hello\n'), 'BadStatusLine'),
        (lambda whole: lambda handler: None, 'RemoteDisconnected'),
    ],
    ids=['500', '404', 'HTML', 'short', 'long', 'nothing', 'no HTTP', 'hangs up'],
)
def test_no_whole_archive(tmp_path, server, whole, change, reason):
    requests = server(change(whole))
    with pytest.raises(UserError) as error:
        fetch(tmp_path)
    assert len(requests) == tf_retrain.DOWNLOAD_ATTEMPTS
    message = str(error.value)
    assert reason in message
    assert tf_retrain.DATA_URL in message
    assert f'save it as {tmp_path / ARCHIVE}' in message
    assert '\n' not in message
    assert not {GRAPH, ARCHIVE} & {*names(tmp_path)}


def test_a_server_that_hangs(tmp_path, monkeypatch, server):
    monkeypatch.setattr(tf_retrain, 'DOWNLOAD_TIMEOUT', 0.2)
    done = threading.Event()
    server(lambda handler: done.wait(60))
    with pytest.raises(UserError, match='timed out'):
        fetch(tmp_path)
    done.set()


def test_an_unreachable_server(tmp_path, monkeypatch):
    with socket.socket() as deaf:
        deaf.bind(('127.0.0.1', 0))  # nobody listens there, and nobody else can
        url = f'http://127.0.0.1:{deaf.getsockname()[1]}/{ARCHIVE}'
        monkeypatch.setattr(tf_retrain, 'DATA_URL', url)
        with pytest.raises(UserError, match='Connection refused'):
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
    path, graph = folder / ARCHIVE, folder / GRAPH
    path.write_bytes(archive(**member, LICENSE=b'free'))
    assert tf_retrain.extract(path.read_bytes(), GRAPH) == b''
    path.write_bytes(archive(**member, **{f'./{GRAPH}': b'the graph'}))
    assert fetch(folder) == str(graph)
    assert names(folder) == [GRAPH, ARCHIVE]
    assert graph.read_bytes() == b'the graph'
    assert not graph.is_symlink()
    assert names(tmp_path) == ['model']


@pytest.mark.parametrize(
    'contents', [gzip.compress(b'x' * 5000), archive(LICENSE=b'free')], ids=['no tar', 'no graph']
)
def test_an_archive_without_the_graph(tmp_path, server, capsys, whole, contents):
    (tmp_path / ARCHIVE).write_bytes(contents)
    server(body(contents))
    with pytest.raises(UserError, match=NO_ARCHIVE):
        fetch(tmp_path)
    assert DAMAGED in capsys.readouterr().out
    assert names(tmp_path) == [f'{ARCHIVE}.broken']
    server(body(whole))
    load_backbone(tmp_path)
    assert names(tmp_path) == [GRAPH, ARCHIVE, f'{ARCHIVE}.broken']


def test_a_model_of_another_kind(tmp_path):
    path = tmp_path / GRAPH
    advice = f'Delete it and run again to download {tf_retrain.DATA_URL}'
    path.write_bytes(b'<html>')
    message = rf'{GRAPH} is damaged or another graph \(.+\)\. {advice}\.$'
    with pytest.raises(UserError, match=message):
        load_backbone(tmp_path)
    graph_def = build_model()
    del graph_def.node[-6:]
    path.write_bytes(graph_def.SerializeToString())
    with pytest.raises(UserError, match=rf'\(pool_3 is not in graph\)\. {advice}\.$'):
        load_backbone(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200), st.integers(0, 300_000), st.booleans())
@example(b'\0', 152, False)  # renames a node that others read
def test_fuzzed_graphs(tmp_path, model, junk, at, cut):
    contents = model.read_bytes()
    path = tmp_path / GRAPH
    path.write_bytes(contents[:at] + junk + (b'' if cut else contents[at + len(junk) :]))
    try:
        assert load_backbone(tmp_path).networks
    except UserError as error:
        assert str(path) in str(error)


def test_a_wrong_byte_in_the_compressed_part_of_an_archive(whole):
    """The first one, whose bits 1 and 2 are the type of the block: there is no type 3."""
    damaged = bytearray(gzip.compress(gzip.decompress(whole)))
    damaged[10] |= 0b110
    with pytest.raises(zlib.error):
        gzip.decompress(damaged)
    assert tf_retrain.extract(bytes(damaged), GRAPH) == b''
