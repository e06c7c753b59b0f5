"""What a training leaves: each output, whatever becomes of the others, and nothing but files."""

import errno
import json
import os
import re
import zlib
from unittest import mock

import numpy as np
import pytest
from helpers import parse
from test_serving import parse as parse_serving

import retrain_serving
import tf_retrain
import tf_test
from tf_retrain import tf

FORBIDDEN = tf.errors.PermissionDeniedError(None, None, 'Permission denied')
NO_SPACE = tf.errors.ResourceExhaustedError(None, None, 'No space left on device')
GRAPH, LABELS = 'trained_model/unoptimized_model.pb', 'trained_model/labels.txt'
OPTIMIZED, RECORD = 'trained_model/o.pb', f'{GRAPH}.json'
OUTPUTS = {GRAPH, LABELS, OPTIMIZED, RECORD, 'saved/1/saved_model.pb'}


def serve(job, monkeypatch):
    """Does the whole job of retrain_serving.py; returns the error that it ends with, if any."""
    monkeypatch.chdir(job.folder)
    flags = job.arguments(optimized_graph=OPTIMIZED, how_many_training_steps='2')
    try:
        retrain_serving.main_serving(parse_serving(*flags, '--saved_model_dir=saved/1'))
    except retrain_serving.UserError as error:
        return str(error)
    return None


def existing(job):
    return {path for path in OUTPUTS if (job.folder / path).exists()}


@pytest.mark.parametrize(
    ('failing', 'problem'),
    [(GRAPH, NO_SPACE), (LABELS, FORBIDDEN), (OPTIMIZED, NO_SPACE), (RECORD, FORBIDDEN)],
)
def test_an_output_that_fails_is_the_only_one_that_is_missing(job, monkeypatch, failing, problem):
    def refuse(path, contents, write_whole=retrain_serving.write_whole):
        if path == failing:
            raise problem
        write_whole(path, contents)

    monkeypatch.setattr(retrain_serving, 'write_whole', refuse)
    error = serve(job.photographs(cat=20, dog=20), monkeypatch)
    # A record of a graph that is not there would only mislead.
    assert existing(job) == OUTPUTS - {failing} - ({RECORD} if failing == GRAPH else set())
    if failing == RECORD:
        assert error is None
    else:
        pattern = r'could not be written: (.*) \((.*)\)\. Written: (.*)\. (Fix this, .*)'
        missing, reason, written, advice = re.fullmatch(pattern, error).groups()
        assert (missing, reason) == (failing, problem.message)
        names = written.replace('the SavedModel', 'saved/1/saved_model.pb')
        assert set(names.split(', ')) == existing(job)
        assert advice == 'Fix this, and run the command again with a new --saved_model_dir.'


@pytest.mark.parametrize(
    ('function', 'missing'),
    [('write_saved_model', {'saved/1/saved_model.pb'}), ('fold', {OPTIMIZED})],
)
def test_the_same_for_what_fails_while_it_is_made(job, monkeypatch, function, missing):
    original = getattr(retrain_serving, function)

    def fail(*arguments):
        if function == 'fold' and arguments[-1] != 'final_result':
            return original(*arguments)
        raise ValueError('cannot be')

    monkeypatch.setattr(retrain_serving, function, fail)
    error = serve(job.photographs(cat=20, dog=20), monkeypatch)
    assert '(cannot be). Written: ' in error
    assert existing(job) == OUTPUTS - missing


def test_a_model_that_cannot_be_opened_is_named(job):
    model = job.folder / 'inception/classify_image_graph_def.pb'
    model.unlink()
    model.mkdir()
    message = "^'inception/classify_image_graph_def.pb' cannot be read: Is a directory. Check this"
    job.photographs(cat=20, dog=20).fails(message)


@pytest.mark.posix
def test_a_model_whose_drive_fails_is_named(job):
    """The model opens, and then cannot be read."""
    model = job.folder / 'inception/classify_image_graph_def.pb'
    model.unlink()
    model.symlink_to('/proc/self/mem')
    if not model.exists():
        pytest.skip('there is no file here whose read fails')
    message = "^'inception/classify_image_graph_def.pb' cannot be read: Input/output error. Check"
    job.photographs(cat=20, dog=20).fails(message)


@pytest.mark.parametrize('is_created', [False, True])
def test_a_graph_that_cannot_be_made_does_not_stop_the_others(job, monkeypatch, is_created):
    """It may be larger than 2 GB, or than the memory."""
    graph = mock.Mock()
    graph.SerializeToString.side_effect = MemoryError('full')
    create = mock.Mock(return_value=graph, side_effect=None if is_created else MemoryError('full'))
    monkeypatch.setattr(retrain_serving, 'create_frozen_graph', create)
    error = serve(job.photographs(cat=20, dog=20), monkeypatch)
    assert f'could not be written: {GRAPH} (full); {OPTIMIZED} (' in error
    assert existing(job) == {LABELS, 'saved/1/saved_model.pb'}


@pytest.mark.parametrize('function', ['test', 'report_test', 'write_pictures', 'create_record'])
def test_what_only_informs_is_never_what_fails(job, monkeypatch, function):
    def fail(*arguments):
        raise MemoryError('too much')

    monkeypatch.setattr(retrain_serving, function, fail)
    assert serve(job.photographs(cat=20, dog=20), monkeypatch) is None
    assert 'left out (MemoryError: too much)' in job.capsys.readouterr().out
    assert existing(job) == OUTPUTS - ({RECORD} if function == 'create_record' else set())


def test_the_record_names_its_graph(trained):
    record = json.loads((trained.folder / RECORD).read_text())
    assert record['graph_checksum'] == zlib.crc32((trained.folder / GRAPH).read_bytes())


# Graph and labels


class Killed(BaseException):
    """What stands for SIGKILL."""


def killed_after(operations, patch):
    """Makes all further operations on files fail. SIGKILL would leave no time for them either."""
    left = iter(range(operations))
    for name in ('makedirs', 'GFile', 'rename', 'remove'):
        original = getattr(tf_retrain.gfile, name)

        def operate(*arguments, original=original, **options):
            if next(left, None) is None:
                raise Killed
            return original(*arguments, **options)

        patch.setattr(tf_retrain.gfile, name, operate)


def write_training(folder, labels, operations=99):
    """Writes graph, labels and record of a tiny network; is killed after some operations."""
    graph_def = tf.compat.v1.GraphDef()
    graph_def.node.add(name='DecodeJpeg/contents', op='Const')
    graph_def.node.add(name='bottleneck', op='Identity', input=['DecodeJpeg/contents'])
    pixels = tf_retrain.InputFormat((8, 8), 0, 1)
    backbone = tf_retrain.Backbone('x', graph_def, 0, 'bottleneck', 3, pixels)
    layer = tf_retrain.FinalLayer(3, len(labels), 0.1, np.array([0, 1]))
    head = tf_retrain.Head(layer, labels)
    paths = f'--output_graph={folder}/g.pb', f'--output_labels={folder}/l.txt'
    flags = parse('--image_dir=unused', *paths)
    files = np.array([f'{label}/1.jpg' for label in labels], object)
    sets = np.full(len(labels), 'training')
    images = tf_retrain.Images('unused', labels, files, np.arange(len(labels)), sets)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(operations, patch)
        tf_retrain.write_results(images, backbone, head, None, {'problem': None}, flags, None)


def check(folder):
    """Tells whether graph and labels are of one training, as tf_test.py finds out."""
    flags = tf_test.create_labeling_parser().parse_args(
        ['x.jpg', f'{folder}/g.pb', f'{folder}/l.txt']
    )
    labels = tf_test.load_labels(flags.labels)
    graph = tf_test.load_graph(flags.graph)
    tf_test.check_labels(labels, graph, flags)
    # The record of another training is not believed.
    assert graph.training is None or graph.training.folders == graph.labels
    return labels == graph.labels


def test_a_kill_between_two_operations_never_swaps_labels(tmp_path):
    """The labels of another training, in another order: with them, a cat would be a dog."""
    mismatches = []
    for operations in range(99):
        write_training(tmp_path, ['dog', 'cat'])
        assert check(tmp_path)
        try:
            write_training(tmp_path, ['cat', 'dog'], operations)
            break
        except Killed:
            pass
        try:
            assert check(tmp_path)
        except tf_test.UserError as error:
            assert 'in another order, such as ' in str(error)
            mismatches.append(operations)
    assert operations > 9
    assert mismatches  # between the renames of the graph and of the labels
    assert check(tmp_path)


def test_translated_labels_are_a_warning(tmp_path, capsys):
    write_training(tmp_path, ['dog', 'cat'])
    (tmp_path / 'l.txt').write_text('dog\nKatze\n')
    assert not check(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    expected = f"'{tmp_path}/l.txt' says 'Katze' where '{tmp_path}/g.pb' says 'cat'."
    assert line == f'WARNING: {expected} Labels may be translated, but must keep their order.'


def test_labels_of_another_training_with_as_many_classes(tmp_path, capsys):
    """No translation puts a label of the graph into the place of another one."""
    write_training(tmp_path, ['cat', 'dog', 'zebra'])
    (tmp_path / 'l.txt').write_text('bird\ncat\ndog\n')
    with pytest.raises(tf_test.UserError, match="in another order, such as 'cat'. Name files"):
        check(tmp_path)
    for merged in ('cat\ncat\nzebra\n', 'pet\npet\nzebra\n'):
        (tmp_path / 'l.txt').write_text(merged)
        assert not check(tmp_path)
        assert capsys.readouterr().err.count('WARNING') == 1


# What may be replaced


@pytest.mark.parametrize('flag', ['output_graph', 'output_labels', 'optimized_graph'])
@pytest.mark.posix
def test_only_files_are_replaced(job, flag):
    """To replace a device such as /dev/null would break the machine."""
    os.mkfifo(job.folder / 'fifo')
    message = f"^--{flag}: 'fifo' is not a plain file. Name another one.$"
    job.photographs(cat=20, dog=20).fails(message, **{flag: 'fifo'})
    assert not (job.folder / 'bottlenecks').exists()


def test_what_is_no_record_is_not_replaced_by_one(job):
    """The user has not named this file. A record is replaced, and so is an empty file."""
    path = job.folder / 'package.json'
    path.write_text('{"name": "my-app"}')
    message = "^--output_graph: the record of the run would replace 'package.json', which is no "
    job.photographs(cat=20, dog=20).fails(message, output_graph='package')
    assert path.read_text() == '{"name": "my-app"}'
    assert not (job.folder / 'bottlenecks').exists()
    path.write_text('')
    for seed in '12':
        job.main(output_graph='package', random_seed=seed)
        assert json.loads(path.read_text())['flags']['random_seed'] == int(seed)


@pytest.mark.posix
def test_files_that_may_not_be_replaced(job, monkeypatch):
    """Those of others in a sticky folder, such as the default /tmp."""
    path = job.folder / 'graph.pb'
    path.write_text('of somebody else')
    rename = os.rename

    def refuse(source, target):
        if target == os.fsencode(path):
            raise PermissionError(1, 'Operation not permitted')
        rename(source, target)

    monkeypatch.setattr(os, 'rename', refuse)
    message = r"--output_graph: '.*' cannot be replaced \(Operation not permitted\)"
    job.photographs(cat=20, dog=20).fails(message, output_graph=path)
    assert path.read_text() == 'of somebody else'


@pytest.mark.posix
def test_files_of_others_that_are_read_only_stay(job, monkeypatch):
    """The folder may be a shared one, in which this user could rename another file to theirs."""
    path = job.folder / 'graph.pb'
    path.write_text('of somebody else')
    monkeypatch.setattr(os, 'geteuid', lambda: path.stat().st_uid + 1)
    monkeypatch.setattr(os, 'access', lambda name, mode: name != os.fsencode(path))
    job.photographs(cat=20, dog=20).fails('^--output_graph: .* is read-only.', output_graph=path)
    assert path.read_text() == 'of somebody else'


@pytest.mark.posix
@pytest.mark.parametrize('flag', ['output_graph', 'output_labels', 'saved_model_dir'])
def test_a_name_that_the_drive_does_not_allow_is_found_before_any_work(job, monkeypatch, flag):
    """On a USB drive with FAT or NTFS: `--output_graph=run_$(date +%H:%M).pb`."""
    mkdir = os.mkdir

    def refuse(name, *arguments):
        if b':' in os.fsencode(name):
            raise OSError(errno.EINVAL, 'Invalid argument')
        mkdir(name, *arguments)

    monkeypatch.setattr(os, 'mkdir', refuse)
    monkeypatch.chdir(job.folder)
    flags = {'saved_model_dir': 'usb/1', flag: 'usb/12:30'}
    arguments = job.photographs(cat=4, dog=4).arguments(**flags)
    message = (
        rf"^--{flag}: 'usb/12:30' cannot be written \(Invalid argument\). Name another one, of"
    )
    with pytest.raises(retrain_serving.UserError, match=message):
        retrain_serving.main_serving(parse_serving(*arguments))
    assert not (job.folder / 'bottlenecks').exists()


def test_names_elsewhere_are_not_those_of_a_drive():
    tf_retrain.ensure_replaceable('gs://bucket/12:30', '--output_graph')


@pytest.mark.posix
def test_a_link_stays_a_link_and_its_target_is_written(job):
    target = job.folder / 'elsewhere/labels.txt'
    target.parent.mkdir()
    target.write_text('old')
    link = job.folder / 'labels.txt'
    link.symlink_to(target)
    job.photographs(cat=20, dog=20).main(output_labels='labels.txt', how_many_training_steps='2')
    assert link.is_symlink()
    assert target.read_text() == 'cat\ndog\n'
    assert os.listdir(target.parent) == ['labels.txt']


def list_mounts(monkeypatch, *paths):
    """Lets the scripts believe that the system lists `paths` among its mounts."""
    file = paths[0].parent / 'mountinfo'
    escaped = [str(path).replace(' ', '\\040') for path in paths]
    lines = [f'{n} 27 254:0 /source {path} rw - ext4 /dev/vda rw' for n, path in enumerate(escaped)]
    file.write_text('\n'.join(lines))
    for script in (tf_retrain, retrain_serving):
        monkeypatch.setattr(script, 'MOUNTS', str(file))


@pytest.mark.posix
@pytest.mark.parametrize('name', [GRAPH, LABELS, RECORD])
def test_a_file_that_is_a_mount_cannot_be_replaced(job, name, monkeypatch):
    """Docker's -v FILE:FILE makes such files. The training would be lost at its end."""
    path = job.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"command": []}')
    list_mounts(monkeypatch, path)
    message = f"^--output_.*: '{name}' is a mount point, and cannot be replaced. Mount its folder"
    job.photographs(cat=4, dog=4).fails(message)
    assert not (job.folder / 'bottlenecks').exists()


@pytest.mark.skipif(not os.path.exists(tf_retrain.MOUNTS), reason='only Linux lists its mounts')
def test_mounts_are_what_the_system_lists(tmp_path, monkeypatch):
    assert tf_retrain.is_mount_point(b'/proc')
    assert not tf_retrain.is_mount_point(bytes(tmp_path))
    list_mounts(monkeypatch, tmp_path / 'a b', tmp_path / 'c')
    names = ['a b', 'c', 'a', 'a\\040b', '']
    listed = [name for name in names if tf_retrain.is_mount_point(bytes(tmp_path / name))]
    assert listed == ['a b', 'c']
    monkeypatch.setattr(tf_retrain, 'MOUNTS', '/nowhere')
    assert tf_retrain.is_mount_point(b'/')


@pytest.mark.posix
def test_a_saved_model_does_not_replace_a_mount_or_a_link(job, monkeypatch):
    job.photographs(cat=20, dog=20)
    for name in ('mount', 'target'):
        (job.folder / name).mkdir()
    (job.folder / 'link').symlink_to('target')
    (job.folder / 'dangling').symlink_to('nowhere')
    list_mounts(monkeypatch, job.folder / 'mount')
    monkeypatch.chdir(job.folder)
    for name, reason in (
        ('mount', 'mount point. Name a new folder in it: mount/1$'),
        ('link', 'symbolic link. Name a new folder in it: link/1$'),
        ('dangling', 'symbolic link. Name another folder.$'),
    ):
        flags = job.arguments(f'--saved_model_dir={name}')
        message = f"^--saved_model_dir: '{name}' is a {reason}"
        with pytest.raises(retrain_serving.UserError, match=message):
            retrain_serving.main_serving(parse_serving(*flags))
    assert not (job.folder / 'bottlenecks').exists()


@pytest.mark.parametrize(
    'name', ['scores/', 'final_training_ops/labels', 'Mul', 'familiarity', 'Familiarity']
)
def test_names_that_the_output_cannot_have_are_known_before_any_work(job, name):
    job.photographs(cat=20, dog=20).fails('^--final_tensor_name: ', final_tensor_name=name)
    assert not (job.folder / 'bottlenecks').exists()


@pytest.mark.posix
@pytest.mark.parametrize('flag', ['output_graph', 'output_labels', 'optimized_graph'])
def test_a_name_that_is_too_long_is_found_before_any_work(job, flag):
    path = 'trained_model/' + 'x' * 300
    message = f"^--{flag}: '{path}.*' cannot be written \\(File name too long\\). Name another one"
    job.photographs(cat=4, dog=4)
    assert job.fails(message, **{flag: path}) == ''


@pytest.mark.parametrize('output', [GRAPH, LABELS, RECORD])
def test_a_link_that_leads_to_a_folder_that_cannot_be_made_is_found_first(job, output):
    """Such as one on a drive that is not there."""
    (job.folder / 'file').touch()
    (job.folder / output).parent.mkdir(exist_ok=True)
    (job.folder / output).symlink_to(job.folder / 'file/missing/output')
    job.photographs(cat=20, dog=20).fails('^--output_(graph|labels): nothing can be written in ')
    assert not (job.folder / 'bottlenecks').exists()


@pytest.mark.posix
@pytest.mark.parametrize('output', [GRAPH, LABELS, RECORD])
@pytest.mark.parametrize('is_there', [False, True])
def test_a_link_to_a_name_that_is_not_utf8_is_found_first(job, output, is_there):
    """Such as a name of an old project. TensorFlow cannot rename a file to it."""
    target = os.fsencode(job.folder) + b'/f\xfcr'
    if is_there:
        open(target, 'w').close()
    (job.folder / output).parent.mkdir(exist_ok=True)
    os.symlink(target, os.fsencode(job.folder / output))
    message = "^--output_(graph|labels): '.*' is a link to a path that is not UTF-8"
    job.photographs(cat=20, dog=20).fails(message)
    assert not (job.folder / 'bottlenecks').exists()


@pytest.mark.posix
def test_an_image_outside_of_the_folder_is_no_output(job):
    """A link leads to its class folder."""
    job.photographs(cat=20, dog=20)
    (job.data / 'cat').rename(job.folder / 'elsewhere')
    (job.data / 'cat').symlink_to(job.folder / 'elsewhere')
    image = job.folder / 'elsewhere/cat 1.jpg'
    before = image.read_bytes()
    job.fails('^--output_labels: .* is what the training reads', output_labels=str(image))
    for name in ('h.pb', 'k.pb.json'):
        (job.folder / name).symlink_to(image)
    job.fails('^--output_graph: .* is what the training reads', output_graph='h.pb')
    job.fails("^--output_graph: .* replace 'k.pb.json', which is no record", output_graph='k.pb')
    assert image.read_bytes() == before


@pytest.mark.parametrize('flag', ['output_labels', 'bottleneck_dir', 'summaries_dir', 'model_dir'])
@pytest.mark.parametrize('path', ['new', 'new/deep/file'])
def test_an_output_is_no_folder_of_the_run(job, flag, path):
    """The folder is made only after the outputs were looked at, and before they are written."""
    inner = f'{path}/labels.txt' if flag == 'output_labels' else path
    outer = 'new' if flag == 'output_labels' or '/' in path else path
    job.photographs(cat=20, dog=20)
    message = f"^--output_graph: '{outer}' is used as a folder by another flag"
    job.fails(message, **{'output_graph': outer, flag: inner})
    assert sorted(path.name for path in job.folder.iterdir()) == ['data', 'inception']


@pytest.mark.parametrize('path', ['logs/train', 'logs/suspects', 'logs'])
def test_an_output_is_no_log_folder(job, path):
    job.photographs(cat=20, dog=20)
    job.fails(f"^--output_graph: '{path}' is used as a folder by another flag", output_graph=path)


@pytest.mark.parametrize('path', ['cat', '.records', 'cat/cat 0.jpg.txt', '.records/cat/x.rec'])
def test_an_output_is_no_part_of_the_cache(job, path):
    job.photographs(cat=20, dog=20)
    message = '^--output_labels: bottlenecks/.* is in the cache. Name another file'
    job.fails(message, output_labels=f'bottlenecks/{path}')
    job.main(output_labels='bottlenecks/labels.txt', how_many_training_steps='1')


@pytest.mark.parametrize('folder', ['module', 'module/cache'])
@pytest.mark.parametrize('flag', ['bottleneck_dir', 'summaries_dir'])
def test_nothing_is_written_into_the_module(job, flag, folder):
    """Its checksum would change, and the next run would compute all bottlenecks again."""
    (job.folder / 'module').mkdir()
    message = f'^--{flag}: {folder} is in the folder of the module'
    job.photographs(cat=20, dog=20).fails(message, '--tfhub_module=module', **{flag: folder})
    assert os.listdir(job.folder / 'module') == []
    flags = job.arguments('--tfhub_module=module', '--saved_model_dir=module/1')
    with pytest.raises(retrain_serving.UserError, match='^--saved_model_dir: module/1 is in the f'):
        retrain_serving.main_serving(parse_serving(*flags))


@pytest.mark.parametrize(
    'name', ['inception-2015-12-05.tgz', 'mobilenet_v1_0.25_128_frozen.tgz', 'models/vgg16.h5']
)
def test_the_archive_of_a_model_is_no_output(job, name):
    job.photographs(cat=20, dog=20)
    job.fails('^--output_graph: .* is the pretrained model', output_graph=f'inception/{name}')
    (job.folder / 'link.pb').symlink_to(job.folder / 'inception' / name)
    (job.folder / 'inception' / name).parent.mkdir(exist_ok=True)
    job.fails('^--output_graph: .* is the pretrained model', output_graph='link.pb')
    url = f'file://{job.folder}/inception/{name}'
    job.fails('^--output_graph: .* is the pretrained model', output_graph=url)


def test_a_version_that_may_be_served_stays(job):
    (job.folder / 'served/1/variables').mkdir(parents=True)
    (job.folder / 'served/1/saved_model.pb').write_text('a SavedModel')
    job.photographs(cat=4, dog=4)
    for name in ('saved_model.pb', 'graph.pb'):
        message = f"^--output_graph: 'served/1/{name}' is in the folder of a SavedModel. Name anoth"
        job.fails(message, output_graph=f'served/1/{name}')
    assert sorted(os.listdir(job.folder / 'served/1')) == ['saved_model.pb', 'variables']


@pytest.mark.parametrize('name', [GRAPH, LABELS, RECORD])
def test_files_that_are_read_only_stay(job, name):
    """The user keeps a good model in this way. The original could not write there, either."""
    path = job.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"command": []}')
    path.chmod(0o444)
    job.photographs(cat=4, dog=4).fails(f"^--output_.*: '{name}' is read-only. Make it writable")
    path.chmod(0o644)
    job.main()
    assert path.read_bytes() != b'{"command": []}'


def test_what_cannot_be_read_in_the_place_of_the_record_stays(job, monkeypatch):
    """It may be a file of another user, in a folder that both may write to."""
    path = job.folder / RECORD
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"secret": 1}')
    open_plainly = open

    def refuse(name, *arguments, **options):
        if name == RECORD.encode():
            raise PermissionError(errno.EACCES, 'Permission denied')
        return open_plainly(name, *arguments, **options)

    monkeypatch.setattr('builtins.open', refuse)
    job.photographs(cat=4, dog=4).fails(
        f"^'{RECORD}' cannot be read: Permission denied. Check this"
    )
    assert path.read_text() == '{"secret": 1}'


@pytest.mark.posix
def test_outputs_keep_their_rights(job):
    """Those of a private graph, for example."""
    job.photographs(cat=20, dog=20).main()
    names = GRAPH, LABELS, RECORD
    for name in names:
        (job.folder / name).chmod(0o600)
    job.main()
    assert {(job.folder / name).stat().st_mode & 0o777 for name in names} == {0o600}


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid(), reason='only root has all groups')
def test_outputs_keep_their_group(tmp_path):
    """Such as that of a web server."""
    path = tmp_path / 'x.pb'
    path.touch(0o640)
    os.chown(path, -1, 12345)
    tf_retrain.write_whole(str(path), b'new')
    assert (path.stat().st_gid, path.stat().st_mode & 0o777) == (12345, 0o640)


@pytest.mark.posix
@pytest.mark.parametrize(('before', 'after'), [(0o640, 0o600), (0o664, 0o644), (0o604, 0o604)])
def test_another_group_gets_no_rights_that_not_all_have(tmp_path, monkeypatch, before, after):
    """This user may not be in the group of the old file."""
    path = tmp_path / 'x.pb'
    path.touch()
    path.chmod(before)
    monkeypatch.setattr(os, 'chown', mock.Mock(side_effect=OSError(errno.EINVAL, 'no such group')))
    tf_retrain.write_whole(str(path), b'new')
    assert path.stat().st_mode & 0o777 == after


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid(), reason='only root gives files away')
def test_rights_of_files_of_other_users_are_not_kept(tmp_path):
    """In a cache that several users share, the next one must be able to read the new file."""
    path = tmp_path / 'x.txt'
    for owner, is_kept in ((os.geteuid(), True), (12345, False)):
        path.write_text('old')
        path.chmod(0o600)
        os.chown(path, owner, -1)
        tf_retrain.write_whole(str(path), b'new')
        assert path.read_text() == 'new'
        assert (path.stat().st_mode & 0o777 == 0o600) == is_kept


def test_names_in_errors_of_tensorflow_are_whole():
    error = tf.errors.NotFoundError(None, None, 'dog [[2]].pb; No such file')
    assert tf_retrain.describe(error) == 'dog [[2]].pb; No such file'
    error = tf.errors.NotFoundError(None, None, '{{v1}}/cat [Op: 3].pb; No such file [Op:ReadFile]')
    assert tf_retrain.describe(error) == '{{v1}}/cat [Op: 3].pb; No such file'


def test_errors_of_tensorflow_say_the_reason():
    """Those of a session, and those of a function that a dataset has traced."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        image = tf.io.decode_jpeg(b'')
        with pytest.raises(tf.errors.InvalidArgumentError) as failed:
            session.run(image)
    assert tf_retrain.describe(failed.value) == 'Input is empty'
    with pytest.raises(ValueError, match='in user code:\n') as failed:
        tf.data.Dataset.range(1).map(lambda number: tf.reshape([1, 2], [3]))
    assert tf_retrain.describe(failed.value).startswith('Cannot reshape a tensor with 2 elements')


def test_the_path_in_an_error_stays_relative():
    assert tf_retrain.describe(OSError('../b/x.tmp; No space left.')) == '../b/x.tmp; No space left'


def test_an_error_without_a_message_has_a_name():
    assert tf_retrain.describe(KeyboardInterrupt()) == 'KeyboardInterrupt'


@pytest.mark.posix
def test_the_folder_above_the_target_of_a_link(tmp_path, monkeypatch):
    """The split depends on --image_dir as typed: so other paths stay."""
    (tmp_path / 'real/deep').mkdir(parents=True)
    (tmp_path / 'link').symlink_to('real/deep')
    monkeypatch.chdir(tmp_path)
    assert tf_retrain.to_path('link/../x') == f'{tmp_path.resolve()}/real/x'
    for path in ('real/../x', '../data/', 'link/x', 'a..b', '/..'):
        assert tf_retrain.to_path(path) == path


def test_urls_of_files_are_decoded():
    """As file managers write them."""
    assert tf_retrain.to_path('file:///my%20data/%C3%A4') == '/my data/ä'
    assert tf_retrain.to_path('my%20data') == 'my%20data'
    assert tf_retrain.to_path('file://localhost/data') == '/data'
    assert tf_retrain.to_path('file:///a%00b') == '/a%00b'
