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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tf_retrain
from tf_retrain import UserError

GRAPH = 'classify_image_graph_def.pb'
ARCHIVE = 'inception-2015-12-05.tgz'
NO_ARCHIVE = f'bytes came, and are not a .tgz with {GRAPH}'


def member(name, contents=b'', kind=tarfile.REGTYPE):
    """Returns a file of an archive, or something else in it, which leads out of it."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(contents), kind, '/etc/passwd'
    return info, contents


def pack(*members):
    """Returns a .tgz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for info, contents in members:
            tar.addfile(info, io.BytesIO(contents))
    return buffer.getvalue()


MODEL = build_model().SerializeToString()
LICENSE = member('LICENSE', b'free')
WHOLE = pack(member(GRAPH, MODEL), LICENSE)


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


@pytest.mark.parametrize('found', [{GRAPH: MODEL}, {GRAPH: MODEL, ARCHIVE: b'x'}, {ARCHIVE: WHOLE}])
def test_what_is_there_is_used_without_a_network(tmp_path, monkeypatch, found):
    monkeypatch.setattr(tf_retrain, 'download', None)
    for name, contents in found.items():
        (tmp_path / name).write_bytes(contents)
    assert load_backbone(tmp_path).source == str(tmp_path / GRAPH)
    assert names(tmp_path) == sorted({GRAPH, *found})


def test_download(tmp_path, server, capsys):
    requests = server(body(WHOLE))
    load_backbone(tmp_path / 'new')
    assert requests == [f'/{ARCHIVE}']
    found = {path.name: path.read_bytes() for path in (tmp_path / 'new').iterdir()}
    assert found == {GRAPH: MODEL, ARCHIVE: WHOLE}
    assert re.search(rf'>> Downloading {ARCHIVE} 100\.0%\n$', capsys.readouterr().err)


def test_a_broken_connection_is_tried_again(tmp_path, server):
    broken = body(WHOLE[:9000], length=len(WHOLE))
    requests = server(broken, broken, body(WHOLE))
    load_backbone(tmp_path)
    assert len(requests) == tf_retrain.DOWNLOAD_ATTEMPTS == 3
    assert names(tmp_path) == [GRAPH, ARCHIVE]


def test_the_progress_of_a_download_of_unknown_size(tmp_path, server, capsys):
    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(WHOLE)

    server(answer)
    load_backbone(tmp_path)
    shown = capsys.readouterr().err
    assert f'>> Downloading {ARCHIVE} {len(WHOLE) / 1e6:.1f} MB\n' in shown
    assert '%' not in shown


@pytest.mark.parametrize(('more', 'expected'), [(0, b''), (1, MODEL)])
def test_an_archive_that_unpacks_to_too_much(monkeypatch, more, expected):
    """Not more than the limit is ever in memory, whatever a few bytes unpack to."""
    monkeypatch.setattr(tf_retrain, 'MAX_ARCHIVE_SIZE', len(gzip.decompress(WHOLE)) + more)
    assert tf_retrain.extract(WHOLE, GRAPH) == expected


@pytest.mark.parametrize('size', ['abc', 3 * 10**9, 10**30])
def test_an_archive_with_an_odd_header(size):
    info, contents = member(GRAPH, MODEL)
    info.pax_headers = {'GNU.sparse.size': str(size)}
    assert tf_retrain.extract(pack((info, contents)), GRAPH) == b''


def test_an_archive_that_is_compressed_twice():
    """There is a limit to what the outer one unpacks to, and there would be none to the inner."""
    assert tf_retrain.extract(gzip.compress(WHOLE), GRAPH) == b''


@pytest.mark.parametrize(
    ('answer', 'reason'),
    [
        (body(b'', status=500), 'HTTPError: HTTP Error 500'),
        (body(b'', status=404), 'HTTPError: HTTP Error 404'),
        (body(b'<html>Sign in</html>'), f'20 {NO_ARCHIVE}'),
        (body(WHOLE[:-9]), NO_ARCHIVE),
        (body(WHOLE + b'more'), NO_ARCHIVE),
        (body(b'', length=50), '0 of 50 bytes came'),
        (lambda handler: handler.wfile.write(b'hello\n'), 'BadStatusLine'),
        (lambda handler: None, 'RemoteDisconnected'),
    ],
    ids=['500', '404', 'HTML', 'short', 'long', 'nothing', 'no HTTP', 'hangs up'],
)
def test_no_whole_archive(tmp_path, server, answer, reason):
    requests = server(answer)
    url = re.escape(tf_retrain.DATA_URL)
    with pytest.raises(UserError, match=f'^{url} .*{reason}.* save it as {tmp_path / ARCHIVE}.$'):
        fetch(tmp_path)
    assert len(requests) == tf_retrain.DOWNLOAD_ATTEMPTS
    assert names(tmp_path) == []


def test_a_download_that_breaks_off_ends_its_line(tmp_path, monkeypatch, server, capsys):
    monkeypatch.setattr(tf_retrain, 'MAX_ARCHIVE_SIZE', 10)
    server(body(WHOLE))
    with pytest.raises(UserError, match='more than 10 bytes came'):
        fetch(tmp_path)
    assert capsys.readouterr().err.endswith('\n')


def test_a_server_that_hangs(tmp_path, monkeypatch, server):
    monkeypatch.setattr(tf_retrain, 'DOWNLOAD_TIMEOUT', 0.2)
    done = threading.Event()
    server(lambda handler: done.wait(60))
    with pytest.raises(UserError, match='timed out'):
        fetch(tmp_path)
    done.set()


def test_downloads_in_threads_leave_the_settings_of_the_program():
    """Each of two trainings in one program may download at the same time."""
    before = socket.getdefaulttimeout(), socket.getaddrinfo
    has_begun = threading.Event()

    def download():
        with tf_retrain.download_timeout():
            has_begun.set()

    with tf_retrain.download_timeout():
        other = threading.Thread(target=download)
        other.start()
        assert not has_begun.wait(0.1)
    other.join()
    assert has_begun.is_set()
    assert (socket.getdefaulttimeout(), socket.getaddrinfo) == before


def test_an_unreachable_server(tmp_path, monkeypatch):
    with socket.socket() as deaf:
        deaf.bind(('127.0.0.1', 0))  # nobody listens there, and nobody else can
        url = f'http://127.0.0.1:{deaf.getsockname()[1]}/{ARCHIVE}'
        monkeypatch.setattr(tf_retrain, 'DATA_URL', url)
        with pytest.raises(UserError, match='Connection refused'):
            fetch(tmp_path)


@pytest.mark.parametrize(
    'other',
    [
        member('../outside', b'x'),
        member('/tmp/outside/../../../etc/x'),
        member('link', kind=tarfile.SYMTYPE),
        member('device', kind=tarfile.CHRTYPE),
        member(GRAPH, kind=tarfile.SYMTYPE),
        member(f'../{GRAPH}', b'x'),
    ],
    ids=['parent', 'absolute', 'link', 'device', 'a link as graph', 'a graph outside'],
)
def test_nothing_but_the_graph_leaves_an_archive(tmp_path, other):
    folder = tmp_path / 'model'
    folder.mkdir()
    assert tf_retrain.extract(pack(other, LICENSE), GRAPH) == b''
    (folder / ARCHIVE).write_bytes(pack(other, member(f'./{GRAPH}', b'the graph')))
    fetch(folder)
    assert names(tmp_path) == ['model']
    assert names(folder) == [GRAPH, ARCHIVE]
    assert not (folder / GRAPH).is_symlink()
    assert (folder / GRAPH).read_bytes() == b'the graph'


@pytest.mark.parametrize(
    'contents',
    [WHOLE[:-100], gzip.compress(b'x' * 5000), pack(LICENSE)],
    ids=['short', 'no tar', 'no graph'],
)
def test_an_archive_without_the_graph_is_renamed(tmp_path, server, capsys, contents):
    (tmp_path / ARCHIVE).write_bytes(contents)
    server(body(contents))
    with pytest.raises(UserError, match=NO_ARCHIVE):
        fetch(tmp_path)
    damaged = f'{ARCHIVE} is damaged, or has no {GRAPH} in it: renamed to'
    assert damaged in capsys.readouterr().out
    assert names(tmp_path) == [f'{ARCHIVE}.broken']
    server(body(WHOLE))
    load_backbone(tmp_path)
    assert names(tmp_path) == [GRAPH, ARCHIVE, f'{ARCHIVE}.broken']


def test_a_damaged_archive_is_renamed_and_downloaded_again(tmp_path, server, capsys):
    """In one run."""
    (tmp_path / ARCHIVE).write_bytes(WHOLE[:-100])
    server(body(WHOLE))
    load_backbone(tmp_path)
    assert names(tmp_path) == [GRAPH, ARCHIVE, f'{ARCHIVE}.broken']
    assert f'{ARCHIVE} is damaged, or has no {GRAPH} in it' in capsys.readouterr().out


def lacking(*names):
    """Returns the model without the names of some nodes."""
    graph_def = build_model()
    for node in graph_def.node:
        node.name = 'x' if node.name in names else node.name
    return graph_def.SerializeToString()


def cut_a_constant():
    """Returns the model with too few numbers in its largest constant."""
    graph_def = build_model()
    node = max(graph_def.node, key=lambda node: node.ByteSize())
    tensor = node.attr['value'].tensor
    tensor.tensor_content = tensor.tensor_content[:-40]
    return graph_def.SerializeToString()


@pytest.mark.parametrize(
    ('contents', 'reason'),
    [
        (b'<html>', 'Error parsing message.*'),
        (lacking('pool_3'), 'pool_3 is not in graph'),
        (lacking('Cast'), ".*'Cast'.*"),
        (cut_a_constant(), 'cannot reshape array of size .*'),
    ],
)
def test_a_model_of_another_kind(tmp_path, contents, reason):
    (tmp_path / GRAPH).write_bytes(contents)
    advice = f'Delete it and run again to download {tf_retrain.DATA_URL}'
    message = rf'{GRAPH} is damaged or another graph \({reason}\)\. {advice}\.$'
    with pytest.raises(UserError, match=message):
        load_backbone(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200), st.integers(0, 300_000), st.booleans())
def test_fuzzed_graphs(tmp_path, junk, at, cut):
    path = tmp_path / GRAPH
    path.write_bytes(MODEL[:at] + junk + (b'' if cut else MODEL[at + len(junk) :]))
    try:
        assert load_backbone(tmp_path).networks
    except UserError as error:
        assert str(path) in str(error)


def test_a_wrong_byte_in_the_compressed_part_of_an_archive():
    """The first one, whose bits 1 and 2 are the type of the block: there is no type 3."""
    damaged = bytearray(gzip.compress(gzip.decompress(WHOLE)))
    damaged[10] |= 0b110
    with pytest.raises(zlib.error):
        gzip.decompress(damaged)
    assert tf_retrain.extract(bytes(damaged), GRAPH) == b''


@pytest.mark.parametrize('name', ['classify_image_graph_def.pb', 'inception-2015-12-05.tgz'])
@pytest.mark.posix
def test_a_model_that_is_no_plain_file(job, name):
    """To read a FIFO would wait for ever."""
    (job.folder / 'inception/classify_image_graph_def.pb').unlink()
    os.mkfifo(job.folder / 'inception' / name)
    job.photographs(cat=20, dog=20).fails(f"'inception/{name}' is not a plain file. Delete it")
