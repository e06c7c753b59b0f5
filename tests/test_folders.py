"""Folders as people have them: split already, with sub-folders, links, `~`; a folder to test on."""

import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
import unicodedata
from unittest import mock

import numpy as np
import pytest
from helpers import GRAPH, LABELS, fail_once, parse, run, write_photographs

import tf_retrain
import tf_test
from tf_retrain import UserError

RED, BLUE, GREEN = (200, 60, 60), (60, 60, 200), (60, 200, 60)


@pytest.fixture
def touch(tmp_path, monkeypatch):
    """Returns a function that creates empty files; the folder is the working directory."""
    monkeypatch.chdir(tmp_path)

    def create(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    return create


def list_images(*arguments):
    return tf_retrain.list_images(parse('--image_dir=d', *arguments))


def create_split(touch, *set_folders):
    touch(
        *(f'd/{name}/{label}/{i}.jpg' for name in set_folders for label in 'ab' for i in range(9))
    )


# Split already


@pytest.mark.parametrize('names', [('train', 'val', 'test'), ('TRAIN', 'Validation', 'Test')])
def test_the_sets_are_those_of_the_folders(touch, capsys, names):
    create_split(touch, *names)
    images = list_images()
    assert images.labels == ['a', 'b']
    assert images.folders == ['a', 'b']
    sets = dict(zip(names, ('training', 'validation', 'testing'), strict=True))
    assert [sets[file.split('/')[0]] for file in images.files] == list(images.sets)
    assert [file.split('/')[1] for file in images.files] == ['a'] * 27 + ['b'] * 27
    line = f'The sets are those of the folders: 18 {names[0]}, 18 {names[1]}, 18 {names[2]}.'
    out = capsys.readouterr().out
    assert line in out
    assert re.findall(r'may cause issues. \((.*)\)', out) == [f'd/{names[0]}/{x}: 9' for x in 'ab']


def test_a_set_that_is_missing_is_drawn_from_train(touch, capsys):
    """Only for it does the percentage count."""
    create_split(touch, 'train', 'test')
    images = list_images('--validation_percentage=40', '--testing_percentage=40')
    in_test = np.array([file.startswith('test/') for file in images.files])
    assert (images.sets[in_test] == 'testing').all()
    expected = [tf_retrain.get_set(path, 0, 40) for path in np.array(images.paths)[~in_test]]
    assert list(images.sets[~in_test]) == expected
    assert 0 < expected.count('validation') < 18
    count = expected.count('validation')
    line = f'{18 - count} train, {count} validation drawn from train, 18 test.'
    assert line in capsys.readouterr().out


def test_classes_that_are_missing_in_a_set(touch, capsys):
    create_split(touch, 'train', 'val')
    touch('d/train/c/1.jpg')
    images = list_images()
    assert images.labels == ['a', 'b', 'c']
    tf_retrain.check_sets(images, parse('--image_dir=d', '--testing_percentage=0'))
    line = 'WARNING: no validation image in 1 of 3 classes: c. Put some that can be read into the '
    assert f'{line}class folders in d/val.\n' in capsys.readouterr().out
    touch('d/val/e/1.jpg')
    with pytest.raises(UserError, match='^d/train has no images of: e. Add some there.'):
        list_images()


@pytest.mark.posix
def test_a_link_that_leads_nowhere_is_named(touch, tmp_path, capsys):
    """Such as one to a drive that is not mounted."""
    touch('d/cat/1.jpg', 'd/dog/1.jpg')
    for name in ('fox', '.#notes', 'table.csv'):  # the second is a lock of Emacs
        (tmp_path / 'd' / name).symlink_to(tmp_path / 'drive/fox')
    assert list_images().labels == ['cat', 'dog']
    out = capsys.readouterr().out
    assert 'WARNING: d/fox leads nowhere. It is not used as a class.\n' in out
    assert out.count('leads nowhere') == 1


@pytest.mark.posix
@pytest.mark.parametrize('number', [errno.ENOTCONN, errno.EINVAL])
@pytest.mark.parametrize('name', ['wolf', 'St. Bernard'])
def test_a_folder_on_a_drive_that_fails_is_an_error(touch, tmp_path, monkeypatch, name, number):
    """As of a server that has gone: its class would be missing from the new graph.

    Some file systems give the second number for a damaged folder.
    """
    touch(*(f'd/{label}/{i}.jpg' for label in ('cat', 'dog', name) for i in range(9)))
    stat_of, list_of = os.stat, os.listdir

    def fail(path, original):
        if os.fsencode(path).endswith(name.encode()):
            raise OSError(number, os.strerror(number), path)
        return original(path)

    monkeypatch.setattr(os, 'stat', lambda path, **options: fail(path, stat_of))
    monkeypatch.setattr(os, 'listdir', lambda path: fail(path, list_of))
    # TensorFlow calls such a folder none.
    monkeypatch.setattr(tf_retrain.gfile, 'isdir', os.path.isdir)
    monkeypatch.chdir(tmp_path)
    message = f"^'d/{name}' cannot be listed: {os.strerror(number)}. Check the drive"
    with pytest.raises(UserError, match=message):
        tf_retrain.list_class_folders('d')
    # tf_test.py says that it cannot be read, as of an image.
    assert f'd/{name}' in tf_test.find_images('d', None)


@pytest.mark.posix
def test_a_drive_that_fails_once(touch, tmp_path, monkeypatch):
    """As sshfs does when it connects again: no class is missing from the graph, and no label."""
    touch('d/cat/1.jpg', 'd/dog/1.jpg')
    monkeypatch.chdir(tmp_path)
    errors = fail_once(monkeypatch, 'd/dog')
    assert tf_retrain.list_class_folders('d') == {'cat': ['1.jpg'], 'dog': ['1.jpg']}
    assert not errors
    errors = fail_once(monkeypatch, 'd/dog')
    assert list(tf_test.find_images('d', None)) == ['d/cat/1.jpg', 'd/dog/1.jpg']
    assert not errors


# What asks whether a path is there, mostly to leave or to replace it.
LOOKS = [
    tf_retrain.is_other_file,
    lambda path: tf_retrain.maybe_download_and_extract(
        *os.path.split(path), os.path.basename(path)
    ),
    lambda path: tf_retrain.fetch_weights(path, '', cache_subdir=''),
    tf_test.check_heatmap,
    tf_retrain.ensure_image_dir,
]


@pytest.mark.posix
@pytest.mark.parametrize('look', LOOKS[1:3])
def test_nothing_is_downloaded_to_where_a_link_leads(tmp_path, look):
    """Such as into a store of git-annex that lacks the model for the moment."""
    path = tmp_path / 'x'
    path.symlink_to(tmp_path / 'store')
    with pytest.raises(UserError, match=f"^'{path}' leads nowhere. Restore what it leads to, or"):
        look(str(path))


@pytest.mark.posix
@pytest.mark.parametrize('look', LOOKS)
def test_a_file_on_a_drive_that_fails_once_is_not_missing(tmp_path, monkeypatch, look):
    path = tmp_path / 'x'
    path.write_bytes(b'x')
    fail_once(monkeypatch, path)
    message = f"^'{path}' cannot be looked up: Input/output error. Check the drive.$"
    with pytest.raises((UserError, tf_test.UserError), match=message):
        look(str(path))
    assert [path.name for path in tmp_path.iterdir()] == ['x']


@pytest.mark.posix
def test_a_name_that_is_too_long_is_that_of_no_folder():
    with pytest.raises(UserError, match="^--image_dir: there is no folder 'x"):
        tf_retrain.ensure_image_dir(300 * 'x')


@pytest.mark.posix
def test_links_that_lead_to_themselves(touch, tmp_path, monkeypatch, capsys):
    touch('d/cat/1.jpg')
    for name in ('fox', 'notes.txt'):
        (tmp_path / 'd' / name).symlink_to(name)
    monkeypatch.chdir(tmp_path)
    assert list(tf_retrain.list_class_folders('d')) == ['cat']
    assert 'WARNING: d/fox leads nowhere.' in capsys.readouterr().out
    assert list(tf_test.find_images('d', None)) == ['d/cat/1.jpg', 'd/fox']


@pytest.mark.posix
def test_a_link_to_a_drive_that_is_not_mounted_fails_as_an_image(touch, tmp_path):
    touch('d/1.jpg')
    for name in ('drive', 'table.csv', '.hidden'):
        (tmp_path / 'd' / name).symlink_to(tmp_path / 'nowhere')
    assert list(tf_test.find_images('d', None)) == ['d/1.jpg', 'd/drive']


def test_folders_of_thumbnails_are_not_read(touch, tmp_path, capsys):
    """As a NAS makes them for each photograph."""
    touch('d/cat/1.jpg', 'd/dog/1.jpg', 'd/@eaDir/1.jpg', 'd/$RECYCLE.BIN/1.jpg')
    touch('d/cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_XL.jpg', 'd/dog/#recycle/1.jpg')
    assert list_images().files.tolist() == ['cat/1.jpg', 'dog/1.jpg']
    assert 'in folders inside it' not in capsys.readouterr().out
    found = [os.path.relpath(path, tmp_path) for path in tf_test.find_images(f'{tmp_path}/d', None)]
    assert found == ['d/cat/1.jpg', 'd/dog/1.jpg']


def test_the_folder_that_has_the_class_folders_is_named(touch):
    """As after unpacking an archive that has only the training images."""
    create_split(touch, 'train')
    with pytest.raises(UserError, match='those in d/train are used with --image_dir=d/train.$'):
        list_images()
    touch('d/.thumbnails/normal/1.jpg', 'd/cat/1.jpg', 'd/cat/old/1.jpg')
    os.symlink('loop', 'd/loop')
    shutil.rmtree('d/train')
    with pytest.raises(UserError, match='put the images of each class into a folder of its own.$'):
        list_images()


@pytest.mark.parametrize('name', ['パン', 'Gänse'])
def test_a_name_that_only_looks_the_same_in_another_set(touch, name):
    """Of two archives, one was made on a Mac."""
    create_split(touch, 'train', 'val')
    for set_folder, form in (('train', 'NFD'), ('val', 'NFC')):
        touch(f'd/{set_folder}/{unicodedata.normalize(form, name)}/1.jpg')
    match = f'^d/train has no images of: {name}. A folder there has nearly this name: give both the'
    with pytest.raises(UserError, match=match):
        list_images()


@pytest.mark.parametrize('other', ['d/loose.jpg', 'd/cat/1.jpg'])
def test_nothing_may_lie_beside_the_sets(touch, other):
    create_split(touch, 'train', 'val')
    touch('d/notes.txt', 'd/empty/notes.txt')
    list_images()
    touch(other)
    with pytest.raises(UserError, match='is in none of them. Move it elsewhere.'):
        list_images()


def test_the_advice_for_an_empty_test_folder(touch, capsys):
    create_split(touch, 'train', 'test')
    images = list_images()
    kept = images.keep(images.sets != 'testing')
    tf_retrain.report_test(kept, None, parse('--image_dir=d'))
    assert 'the test set is empty. Add images that can be read to the' in capsys.readouterr().out


@pytest.mark.posix
def test_a_linked_folder_beside_the_sets_is_not_missed(touch, tmp_path):
    create_split(touch, 'train', 'val')
    touch('elsewhere/1.jpg')
    os.symlink('train', 'd/latest')  # leads to what is used already
    os.symlink('.', 'd/all')
    assert len(list_images().files) == 36
    os.symlink(tmp_path / 'elsewhere', 'd/more')
    with pytest.raises(UserError, match="'d/more' is in none of them. Move it elsewhere."):
        list_images()


def test_a_test_folder_without_class_folders_is_left_alone(touch, capsys):
    """Kaggle's."""
    create_split(touch, 'train')
    touch('d/test/1.jpg', 'd/test/2.jpg')
    images = list_images()
    assert len(images.files) == 18
    assert set(images.files) == {f'train/{label}/{i}.jpg' for label in 'ab' for i in range(9)}
    assert 'WARNING: d/test has no class folders. It is left alone.' in capsys.readouterr().out


def test_train_and_test_are_no_classes(touch):
    touch('d/train/cat.1.jpg', 'd/test/1.jpg')
    with pytest.raises(UserError, match="'d' has test, train, without class folders. Make one fol"):
        list_images()


def test_a_class_folder_whose_images_all_get_one_set_is_a_warning(touch, capsys):
    touch('d/cat/1.jpg', 'd/dog_nohash_2/1.jpg')
    list_images()
    warning = "WARNING: '_nohash_' in d/dog_nohash_2 puts all of its images into one set."
    assert warning in capsys.readouterr().out


@pytest.mark.parametrize('is_drawn', [False, True])
def test_nohash_matters_only_to_sets_that_are_drawn(touch, capsys, is_drawn):
    names = ('train', 'test') if is_drawn else ('train', 'val', 'test')
    create_split(touch, *names)
    touch(*(f'd/{name}/c_nohash_1/1.jpg' for name in names))
    list_images()
    assert ("WARNING: '_nohash_' in d/" in capsys.readouterr().out) == is_drawn


def test_a_class_that_is_named_like_a_set_is_a_warning(touch, capsys):
    touch(*(f'd/{name}/1.jpg' for name in ('cat', 'dog', 'test1')))
    assert list_images().labels == ['cat', 'dog', 'test1']
    out = capsys.readouterr().out
    assert "WARNING: d/test1 is used as a class, 'test1'. If it holds images of several" in out
    assert out.count('is used as a class') == 1


def test_messages_name_the_folders_of_split_images_as_they_are(touch, capsys):
    create_split(touch, 'train', 'test')
    touch('d/train/C++/1.jpg', 'd/train/c/1.jpg')
    with pytest.raises(UserError, match=r"^d/train/C\+\+ and d/train/c have the same label 'c'"):
        list_images()


def test_a_file_beside_sets_without_class_folders(touch):
    touch('d/train/cat.1.jpg', 'd/test/1.jpg', 'd/labels.csv')
    with pytest.raises(UserError, match="'d' has test, train, without class folders. Make one fol"):
        list_images()


def test_a_class_whose_training_images_were_drawn_for_validation(touch):
    create_split(touch, 'train', 'test')
    images = list_images()
    sets = np.where(images.classes == 1, 'validation', images.sets)
    message = '^--image_dir: no training image of b can be used: they cannot be read, or were drawn'
    with pytest.raises(UserError, match=message):
        tf_retrain.check_sets(dataclasses.replace(images, sets=sets), parse('--image_dir=d'))


def test_hidden_folders_on_other_file_systems(tmp_path):
    """ram:// stands for gs:// and its like."""
    names = ['a.jpg', '.b/c.jpg', 'd/e.jpg', 'd/.f/g/h.jpg']
    for root in (str(tmp_path), 'ram://hidden'):
        for name in names:
            tf_retrain.gfile.makedirs(os.path.dirname(f'{root}/x/{name}'))
            with tf_retrain.gfile.GFile(f'{root}/x/{name}', 'wb') as file:
                file.write(b'x')
        assert tf_retrain.count_images(f'{root}/x') == 2


def test_images_in_hidden_folders_are_not_missed(touch, capsys):
    touch('d/a/1.jpg', 'd/b/1.jpg', 'd/a/.thumbnails/1.jpg', 'd/a/new/.thumbnails/1.jpg')
    list_images()
    out = capsys.readouterr().out
    assert 'd/a: 1 images; passed over: .thumbnails, new\n' in out
    assert 'in folders inside it' not in out


def write_split(job):
    for name, count in (('train', 40), ('val', 10), ('test', 10)):
        for label, colour in (('cat', RED), ('dog', BLUE)):
            write_photographs(job.data / name, label, count, colour)
    return job


def test_a_run_on_sets(job):
    """Cache files lie in folders of the sets; then the test set is labeled."""
    out = write_split(job).main()
    assert 'The sets are those of the folders: 80 train, 20 val, 20 test.' in out
    assert 'Final test accuracy = 100.0% (N=20)' in out
    assert 'bottlenecks/train/cat/cat 3.jpg.txt' in out
    record = json.loads((job.folder / f'{GRAPH}.json').read_text())
    assert record['folders'] == ['cat', 'dog']
    assert record['set_folders'] == {'test': 'testing', 'train': 'training', 'val': 'validation'}
    process = run('tf_test.py', 'data', GRAPH, LABELS, cwd=job.folder)
    assert process.stdout.count('\n') == 120
    assert 'In the training or validation set, and not counted: 100 more.\n' in process.stderr
    assert 'Accuracy on the 20 images whose folder is a class: 100.0%' in process.stderr


# Class folders


def test_images_in_folders_inside_a_class_folder_are_a_warning(touch, capsys):
    touch(*(f'd/{label}/{i}.jpg' for label in ('rose', 'tulip') for i in range(20)))
    touch(*(f'd/rose/2023/holiday/{i}.jpg' for i in range(15)), 'd/rose/notes.txt')
    assert len(list_images().files) == 40
    out = capsys.readouterr().out
    assert 'd/rose: 20 images; passed over: 2023 (15 images below it), notes.txt\n' in out
    assert 'WARNING: d/rose has 15 images in folders inside it, which are not used. Move' in out


@pytest.mark.posix
def test_links_are_not_followed_without_end(touch, capsys):
    """A link in a class folder leads back to the data."""
    touch(*(f'd/{name}/{i}.jpg' for name in 'ab' for i in range(3)), 'd/docs/x.txt')
    for name in ('d/a/all', 'd/a/up', 'd/b/all', 'd/docs/x', 'd/docs/y'):
        os.symlink('..', name)
    assert len(list_images().files) == 6
    assert 'images in folders inside it' not in capsys.readouterr().out


def fail_to_list(monkeypatch, folder, error):
    def fail(path, listdir=os.listdir):
        if os.fsdecode(path) == folder:
            raise error
        return listdir(path)

    monkeypatch.setattr(os, 'listdir', fail)


def test_a_folder_that_cannot_be_listed_is_no_class(touch, capsys, monkeypatch):
    touch('d/a/1.jpg', 'd/b/1.jpg', 'd/lost+found/x')
    fail_to_list(monkeypatch, 'd/lost+found', PermissionError(13, 'Permission denied'))
    assert list_images().labels == ['a', 'b']
    assert 'WARNING: d/lost+found cannot be read. It is not used' in capsys.readouterr().out


def test_an_image_dir_that_cannot_be_listed(touch, monkeypatch):
    touch('d/a/1.jpg')
    fail_to_list(monkeypatch, 'd', PermissionError(13, 'Permission denied'))
    with pytest.raises(UserError, match="^--image_dir: 'd' cannot be read. Check its rights."):
        tf_retrain.ensure_image_dir('d')


def test_an_error_of_the_drive_is_not_taken_for_the_end_of_a_folder(touch, monkeypatch):
    touch('d/a/1.jpg', 'd/b/1.jpg')
    fail_to_list(monkeypatch, 'd/b', OSError(5, 'Input/output error'))
    with pytest.raises(UserError, match="^'d/b' cannot be listed: Input/output error. Check the"):
        list_images()
    assert list(tf_test.find_images('d', None)) == ['d/a/1.jpg', 'd/b']  # the latter fails


def test_a_class_of_which_no_training_image_can_be_read(job):
    write_split(job)
    for path in (job.data / 'train/dog').iterdir():
        path.write_text('bad')
    job.fails('^--image_dir: no training image of dog can be used: they cannot be read')


def test_kinds_that_are_not_read_are_a_warning(touch, capsys):
    touch('d/a/1.jpg', 'd/b/1.jpg', 'd/a/1.CR2', 'd/a/2.cr2', 'd/a/1.MOV', 'd/a/x.txt')
    list_images()
    expected = 'WARNING: d/a has photographs of kinds that are not read: 2 .cr2, 1 .mov. Save them'
    assert expected in capsys.readouterr().out


def test_blanks_around_a_name_do_not_make_a_class(touch):
    touch('d/tulips/1.jpg', 'd/tulips /1.jpg')
    with pytest.raises(UserError, match="have the same label 'tulips'"):
        list_images()


@pytest.mark.parametrize(
    ('name', 'label'), [('Bär', 'b r'), ('C++', 'c'), ('-5', '5'), ('猫1', '1'), ('a&b', 'a b')]
)
def test_a_label_that_loses_characters_is_a_warning(touch, capsys, name, label):
    touch(f'd/{name}/1.jpg', 'd/Red_Fox-2, new/1.jpg', 'd/猫/1.jpg')
    assert label in list_images().labels
    out = capsys.readouterr().out
    assert f"WARNING: the label of d/{name} is '{label}', as only a-z and 0-9 stay." in out
    assert out.count('the label of') == 1


def test_the_home_folder(touch, tmp_path, monkeypatch):
    """Also after `=`, where bash leaves a ~ as it is."""
    monkeypatch.setenv('HOME', str(tmp_path))
    flags = ['bottleneck_dir', 'model_dir', 'output_graph', 'output_labels', 'optimized_graph']
    flags += ['summaries_dir', 'image_dir', 'tfhub_module']
    for flag in flags:
        parsed = parse('--image_dir=d', f'--{flag}=~/x')
        assert getattr(parsed, flag) == f'{tmp_path}/x'
    arguments = ['~/i', '~/g', '~/l', '--sort_into=~/s', '--heatmap=~/h']
    parsed = tf_test.create_labeling_parser().parse_intermixed_args(arguments)
    paths = [*parsed.images, parsed.graph, parsed.labels, parsed.sort_into, parsed.heatmap]
    assert paths == [f'{tmp_path}/{name}' for name in 'iglsh']


def test_other_labels_than_before_are_a_warning(job):
    warning = 'trained_model/labels.txt had other labels, or another order.'
    assert warning not in job.photographs(cat=20, dog=20).main()
    assert warning not in job.main()
    write_photographs(job.data, 'bird', 20, GREEN)
    assert warning in job.main()


def test_earlier_labels_that_cannot_be_read_do_not_stop_the_new_ones(job, monkeypatch):
    labels = job.photographs(cat=20, dog=20).folder / LABELS
    job.main()
    labels.write_text('old')

    def fail(path, opened=tf_retrain.open_file):
        if path == LABELS:
            raise tf_retrain.tf.errors.PermissionDeniedError(None, None, 'Permission denied')
        return opened(path)

    monkeypatch.setattr(tf_retrain, 'open_file', fail)
    assert 'WARNING: the comparison with the earlier labels left out (' in job.main()
    assert labels.read_text() == 'cat\ndog\n'


# A folder to label


def test_links_to_folders_are_followed(tmp_path):
    write_photographs(tmp_path / 'elsewhere', 'cat', 2, RED)
    (tmp_path / 'in/deep').mkdir(parents=True)
    (tmp_path / 'in/cat').symlink_to(tmp_path / 'elsewhere/cat')
    (tmp_path / 'in/deep/back').symlink_to(tmp_path / 'in')
    found = list(tf_test.find_images(str(tmp_path / 'in'), None))
    assert found == [str(tmp_path / f'in/cat/cat {i}.jpg') for i in range(2)]


def test_folders_two_thousand_deep(monkeypatch):
    monkeypatch.setattr(tf_test, 'is_folder', lambda path: path.endswith('d'))
    names = {2000: ['i.jpg']}
    monkeypatch.setattr(tf_test, 'list_names', lambda path: names.get(path.count('/'), ['d']))
    assert list(tf_test.find_images('d', None)) == ['d/' * 2001 + 'i.jpg']


def test_of_two_paths_to_a_folder_the_one_without_a_link_counts(tmp_path):
    write_photographs(tmp_path / 'in', 'rose', 2, RED)
    (tmp_path / 'in/all').symlink_to(tmp_path / 'in/rose')
    (tmp_path / 'a.jpg').touch()
    (tmp_path / 'in/rose/a.jpg').symlink_to(tmp_path / 'a.jpg')
    found = list(tf_test.find_images(str(tmp_path / 'in'), None))
    names = ['a.jpg', 'rose 0.jpg', 'rose 1.jpg']
    assert found == [str(tmp_path / f'in/rose/{name}') for name in names]
    (tmp_path / 'in/cat').mkdir()
    (tmp_path / 'in/cat/more').symlink_to(tmp_path / 'in/rose')  # deeper, and earlier
    assert list(tf_test.find_images(str(tmp_path / 'in'), None)) == found


@pytest.fixture
def own(trained, tmp_path):
    """Photographs in folders of classes, one of which is missing, and one folder that is none."""
    write_photographs(tmp_path / 'mine/Red_Fox', 'deep', 10, RED)
    write_photographs(tmp_path / 'mine', 'cat', 12, BLUE)
    write_photographs(tmp_path / 'mine', 'bird', 3, GREEN)
    (tmp_path / 'mine/cat/bad.jpg').write_text('bad')
    return tmp_path / 'mine'


def label(trained, *arguments, check=False):
    return run('tf_test.py', *arguments, GRAPH, LABELS, cwd=trained.folder, check=check)


def test_the_accuracy_on_class_folders(trained, own):
    process = label(trained, own)
    rows = [line.split('\t') for line in process.stdout.splitlines()]
    folders = {'Red_Fox': 'red fox', 'cat': 'cat'}
    counted = [(folders.get(row[0].split('/')[-2], 'red fox'), row[1]) for row in rows]
    counted = [pair for pair, row in zip(counted, rows, strict=True) if '/bird/' not in row[0]]
    right = sum(true == predicted for true, predicted in counted)
    assert len(counted) == 22
    low, high = tf_retrain.get_interval(right, 22)
    share = (
        f'{100 * right / 22:.1f}% (95% confidence interval: {100 * low:.1f} to {100 * high:.1f}%)'
    )
    assert f'Accuracy on the 22 images whose folder is a class: {share}\n' in process.stderr
    for name in folders.values():
        total = sum(true == name for true, _ in counted)
        own_right = counted.count((name, name))
        line = rf'^{name} +{total} +{own_right} +{total - own_right} '
        assert re.search(line, process.stderr, re.MULTILINE)
    assert (
        f'Folders that are not named like a class, and not counted: {own}/bird\n' in process.stderr
    )
    assert process.stderr.splitlines()[-1].startswith('ERROR: 1 of 26 images')


def test_ten_of_many_other_folders_are_named(capsys):
    tally = tf_test.Tally(tf_test.Classes(['cat'], ['cat'], []), None)
    tally.other_folders = {f'{i:02}' for i in range(12)}
    tf_test.report_accuracy(tally)
    line = 'not counted: 00, 01, 02, 03, 04, 05, 06, 07, 08, 09 and 2 more\n'
    assert line in capsys.readouterr().out


def test_images_without_a_label_are_counted(trained, own):
    process = label(trained, own, '--min_score=1')
    assert 'Accuracy' not in process.stderr
    assert 'Without a label, as unsure or unknown: 22 more, 100.0%\n' in process.stderr


def test_folder_labels_in_json(trained, own):
    answers = [json.loads(line) for line in label(trained, own, '--json').stdout.splitlines()]
    found = {a['image'].split('/')[-2]: a.get('folder_label') for a in answers if 'scores' in a}
    assert found == {'bird': None, 'cat': 'cat', 'deep': 'red fox'}


def test_of_the_trained_images_only_the_test_images_count(trained):
    count = len(trained.test_images())
    folders = 'data/cat', 'data/../data/dog', trained.data / 'Red_Fox'
    files = [trained.folder / name for name in (GRAPH, LABELS)]
    for images in (['data'], ['data/'], folders):
        process = label(trained, *images, check=True)
        assert f'Accuracy on the {count} images whose folder is a class: ' in process.stderr
        assert (
            f'In the training or validation set, and not counted: {145 - count} more.\n'
            in process.stderr
        )
    for folder, images in (('/', trained.data), (trained.data, '.'), (trained.data / 'cat', '..')):
        process = run('tf_test.py', images, *files, cwd=folder)
        assert f'Accuracy on the {count} images whose folder is a class: ' in process.stderr
        assert (
            f'In the training or validation set, and not counted: {145 - count} more.\n'
            in process.stderr
        )


def test_the_training_has_not_seen_what_is_deeper_than_its_images(trained, tmp_path):
    data = tmp_path / 'data'
    training = tf_test.load_graph(str(trained.folder / GRAPH)).training
    training = training._replace(absolute_image_dir=str(data), percentages=(0, 0))
    tally = tf_test.Tally(tf_test.Classes(['cat'], ['cat'], []), training)
    assert not tally.is_new(str(data / 'cat/1.jpg'))
    assert tally.is_new(str(data / 'cat/rejected/1.jpg'))
    training = training._replace(set_folders={'train': 'training', 'test': 'testing'})
    tally = tf_test.Tally(tf_test.Classes(['cat'], ['cat'], []), training)
    assert not tally.is_new(str(data / 'train/cat/1.jpg'))
    assert tally.is_new(str(data / 'train/cat/rejected/1.jpg'))
    assert tally.is_new(str(data / 'test/cat/1.jpg'))
    assert tally.is_new(str(data / 'cat/1.jpg'))  # beside the sets


@pytest.mark.posix
def test_the_training_has_seen_what_links_in_its_folder_lead_to(trained, tmp_path):
    training = tf_test.load_graph(str(trained.folder / GRAPH)).training
    for name in ('store/cat', 'data'):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / 'data/cat').symlink_to(tmp_path / 'store/cat')
    training = training._replace(absolute_image_dir=str(tmp_path / 'data'), percentages=(0, 0))
    tally = tf_test.Tally(tf_test.Classes(['cat'], ['cat'], []), training)
    assert not tally.is_new(str(tmp_path / 'data/cat/1.jpg'))
    assert not tally.is_new(str(tmp_path / 'store/cat/1.jpg'))
    (tmp_path / 'link.jpg').symlink_to(tmp_path / 'data/cat/1.jpg')
    assert not tally.is_new(str(tmp_path / 'link.jpg'))
    assert tally.is_new(str(tmp_path / 'store/1.jpg'))


def test_an_image_counts_by_the_path_that_has_a_class():
    """It may have been met before, by another path: in all/, to which links in cat/ lead."""
    classes = tf_test.Classes(['cat'], ['cat'], [tf_test.get_absolute('in')])
    tally = tf_test.Tally(classes, None)
    answer = tf_test.Answer(np.ones(1), None, 1)
    with mock.patch.object(tf_test, 'resolve', lambda path: pathlib.PurePath('1.jpg')):
        for path in ('in/all/1.jpg', 'in/cat/1.jpg', 'in/cat/1.jpg'):
            tally.add(path, answer, 'cat')
    assert tally.predictions == [0]


def test_a_training_folder_that_is_gone_is_mentioned(trained, capsys):
    """It was renamed, perhaps: the images that the graph was trained on count as new ones."""
    training = tf_test.load_graph(str(trained.folder / GRAPH)).training
    for folder, is_there in ((str(trained.data), True), ('nowhere', False)):
        found = training._replace(absolute_image_dir=folder)
        tally = tf_test.Tally(tf_test.Classes(['cat'], ['cat'], []), found, images=2, not_new=2)
        tf_test.report_tally(tally, mock.Mock(upright=False))
        out = capsys.readouterr().err
        assert ('The folder of the training, nowhere, is gone: its own images' in out) != is_there


SPLIT = {'train': 'training', 'val': 'validation', 'test': 'testing'}


@pytest.mark.parametrize(
    ('set_folders', 'folders', 'gone'),
    [
        ({}, ['cat', 'dog'], []),
        ({}, ['_cat', 'dog'], ['cat']),
        ({}, ['train/cat', 'train/dog'], ['cat', 'dog']),
        (SPLIT, ['train/cat', 'train/dog', 'val/cat'], []),
        (SPLIT, ['train/cat', 'test/dog'], ['train/dog', 'val']),
    ],
)
def test_class_folders_that_are_gone_are_mentioned(tmp_path, capsys, set_folders, folders, gone):
    """A class may be missing in a set, but not in that for training."""
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    training = tf_test.Training(
        ['cat', 'dog'], 'data', *[str(tmp_path)] * 2, set_folders, (10, 10), is_upright=False
    )
    tally = tf_test.Tally(tf_test.Classes(['cat'], ['cat'], []), training, images=2, not_new=2)
    tf_test.report_tally(tally, mock.Mock(upright=False))
    found = re.findall(r'^Folders of the training are gone: (.*)\. Their', capsys.readouterr().err)
    assert found == [', '.join(gone)] * bool(gone)


def test_there_is_a_reason_if_no_image_counts(capsys):
    tally = tf_test.Tally(tf_test.Classes(['cat'], ['cat'], []), None, images=2, not_new=2)
    tf_test.report_tally(tally, mock.Mock(upright=False))
    assert (
        'In the training or validation set, and not counted: 2 more.\n' in capsys.readouterr().err
    )


def test_folders_above_the_image_argument_do_not_count(trained, tmp_path):
    """Such as a home folder."""
    write_photographs(tmp_path / 'cat/pictures', 'unsorted', 2, BLUE)
    process = label(trained, tmp_path / 'cat/pictures', check=True)
    assert process.stderr == ''
    process = label(trained, tmp_path / 'cat', check=True)
    assert 'Accuracy on the 2 images' in process.stderr
    classes = tf_test.Classes(['cat'], ['cat'], [])
    assert classes.find('x/cat/1.jpg') == 0
    assert classes.find('x/cat/inner/1.jpg') is None


def test_a_label_that_is_the_folder_of_another_class():
    classes = tf_test.Classes(['geschenk', 'gift'], ['gift', 'poison'], [])
    for index, folder in enumerate(['gift', 'poison']):
        answer = tf_test.Answer(np.eye(2)[index], None, 1)
        assert classes.get_folder(answer, classes.labels[index]) == folder
        assert classes.get_folder(answer, 'unsure') == 'unsure'
    assert classes.find('x/gift/1.jpg') == 0  # the name of a class folder comes first


@pytest.mark.parametrize(
    ('folder', 'index'), [('Red_Fox', 1), ('RED-FOX', 1), ('red fox', 1), ('Cat', 0), ('dog', None)]
)
def test_folders_in_capitals_without_a_record(folder, index):
    labels = ['cat', 'red fox']
    classes = tf_test.Classes(labels, labels, [])
    assert classes.find(f'x/{folder}/1.jpg') == index
    translated = tf_test.Classes(['Katze', 'Rotfuchs'], ['CAT', 'Red_Fox'], [])
    assert translated.find(f'x/{folder}/1.jpg') == index


@pytest.mark.parametrize('folder', ['Кот', 'КОТ', 'кот'])
def test_folders_in_capitals_of_other_alphabets(folder):
    classes = tf_test.Classes(['кот', 'собака'], ['Кот', 'Собака'], [])
    assert classes.find(f'x/{folder}/1.jpg') == 0
    assert classes.find('x/ХАТА/1.jpg') is None
    translated = tf_test.Classes(['Кот', 'Собака'], ['cat', 'dog'], [])
    assert translated.find(f'x/{folder}/1.jpg') == 0
    classes = tf_test.Classes(['КОТ', 'Кот'], ['КОТ', 'Кот'], [])
    assert classes.find(f'x/{folder}/1.jpg') == (0 if folder == 'КОТ' else 1)


def test_labels_that_a_translation_has_merged(trained, own, tmp_path):
    (tmp_path / 'labels.txt').write_text('animal\nanimal\ndog\n')
    flags = f'--sort_into={tmp_path}/sorted'
    process = run(
        'tf_test.py', own, GRAPH, tmp_path / 'labels.txt', flags, cwd=trained.folder, check=False
    )
    rows = [line.split('\t') for line in process.stdout.splitlines()]
    counted = [row[1] == 'animal' for row in rows if '/bird/' not in row[0]]
    assert f'whose folder is a class: {100 * np.mean(counted):.1f}%' in process.stderr
    assert 'cat' in os.listdir(tmp_path / 'sorted')


def test_an_image_that_is_named_twice_counts_once(trained, own):
    process = label(trained, own, own / 'cat', '--top=1')
    assert process.stdout.count('\n') == 37
    assert 'Accuracy on the 22 images' in process.stderr


def test_a_name_that_is_not_utf_8_in_the_data_of_the_training(trained):
    odd = os.fsencode(trained.data / 'cat') + b'/\xe4.jpg'
    with open(odd, 'wb') as file:
        file.write(trained.test_image().read_bytes())
    try:
        process = label(trained, 'data', check=True)
    finally:
        os.remove(odd)
    assert process.stdout.count('\n') == 146


def test_both_folders_of_a_set_are_named(touch, capsys):
    create_split(touch, 'train', 'val', 'valid')
    list_images('--testing_percentage=0')
    assert ' 18 train, 36 val+valid, 0 testing drawn from train.' in capsys.readouterr().out


def test_images_of_a_set_with_a_folder_that_cannot_be_read(touch, capsys):
    """No percentage is to blame for its empty classes, whether images are missing or damaged."""
    create_split(touch, 'train', 'test')
    images = list_images()
    is_of_b_in_test = np.array([file.startswith('test/b/') for file in images.files])
    flags = parse('--image_dir=d', '--testing_percentage=0')
    tf_retrain.check_sets(images.keep(~is_of_b_in_test), flags)
    line = 'WARNING: no testing image in 1 of 2 classes: b. Put some that can be read into the '
    assert f'{line}class folders in d/test.\n' in capsys.readouterr().out


def test_sorted_images_can_go_back_into_the_data(trained, tmp_path, monkeypatch, capsys):
    label(trained, 'data', f'--sort_into={tmp_path}/sorted', check=True)
    assert sorted(os.listdir(tmp_path / 'sorted')) == ['Red_Fox', 'cat', 'dog']
    # Without a record, the folders have the names of the labels.
    (tmp_path / 'graph.pb').write_bytes((trained.folder / GRAPH).read_bytes())
    image = trained.data / 'Red_Fox/Red_Fox 0.jpg'
    files = tmp_path / 'graph.pb', trained.folder / LABELS
    run('tf_test.py', image, *files, f'--sort_into={tmp_path}/again')
    assert os.listdir(tmp_path / 'again') == ['red fox']


@pytest.mark.posix
def test_what_is_no_record_is_ignored(tmp_path):
    """A FIFO would be waited for."""
    os.mkfifo(tmp_path / 'fifo.json')
    (tmp_path / 'deep.json').write_text('[' * 200_000)
    for name in ('fifo', 'deep'):
        assert tf_test.load_training(str(tmp_path / name), b'') is None


def test_a_record_of_another_training_is_a_warning(trained, tmp_path):
    record = json.loads((trained.folder / f'{GRAPH}.json').read_text())
    (tmp_path / 'graph.pb').write_bytes((trained.folder / GRAPH).read_bytes())
    files = tmp_path / 'graph.pb', trained.folder / LABELS
    image = trained.test_image()
    cases = [({}, False), ({'graph_checksum': 1}, True), ({'flags': []}, False)]
    cases += [({'folders': [name] * 3}, False) for name in ('a\0', '\ud800', 1)]
    cases += [({'set_folders': {name: 'training'}}, False) for name in ('a\0', '\ud800')]
    cases += [({'set_folders': [[5, 5]]}, False)]
    endless = record['flags'] | {'testing_percentage': float('inf')}
    cases.append(({'flags': endless}, False))
    for changes, warns in cases:
        (tmp_path / 'graph.pb.json').write_text(json.dumps(record | changes))
        process = run('tf_test.py', image, *files)
        assert ('is of another training than' in process.stderr) == warns
        assert process.stdout.count('score') == 3
