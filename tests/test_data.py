"""What a run says of its data set: near copies, and images in a wrong folder."""

import contextlib
import io
import itertools
import re
import shutil

import numpy as np
import pytest
from helpers import Job, parse, read_events

import tf_retrain
from tf_retrain import Images


def make(sets, classes, files=None, labels='ab'):
    files = files or [f'{labels[of]}/{i}.jpg' for i, of in enumerate(classes)]
    return Images('data', list(labels), np.array(files, object), np.array(classes), np.array(sets))


def find(images, bottlenecks):
    """Returns the pairs of near copies, and how many images leak."""
    found = tf_retrain.find_near_copies(images, np.array(bottlenecks, np.float32))
    return tf_retrain.get_pairs(found), sum(copy.is_leaked for copy in found)


RNG = np.random.default_rng(0)
BASE = RNG.uniform(size=[6, 50])
TRAINING, TESTING = 'training', 'testing'


def test_pairs_come_in_the_order_of_what_they_spoil():
    """Different labels before the accuracy, and that before what only wastes an image."""
    images = make([TRAINING, TRAINING, TRAINING, TESTING, TRAINING, TRAINING], [0, 0, 0, 0, 0, 1])
    bottlenecks = BASE[[0, 0, 1, 1, 2, 2]] + RNG.normal(0, 1e-4, [6, 50])
    assert find(images, bottlenecks) == ([(4, 5), (2, 3), (0, 1)], 1)


def test_only_what_is_as_alike_as_copies_counts():
    images = make([TRAINING] * 3, [0, 0, 0])
    side = np.roll(np.eye(1, 50)[0], 1)
    for cosine, expected in ((0.985, []), (0.995, [(0, 2)])):
        near = cosine * np.eye(1, 50)[0] + np.sqrt(1 - cosine**2) * side
        assert find(images, [np.eye(1, 50)[0], np.eye(50)[7], 3 * near])[0] == expected


@pytest.mark.parametrize('value', [0, 1, 0.5, 1e-30])
def test_a_bottleneck_of_equal_numbers_is_like_no_other(value):
    assert find(make([TRAINING, TESTING], [0, 1]), np.full([2, 50], value)) == ([], 0)


def test_variants_on_purpose_are_named_only_if_they_are_apart():
    files = ['a/x_nohash_1.jpg', 'a/x_nohash_2.jpg', 'a/y.jpg', 'b/x_nohash_1.jpg']
    images = make([TRAINING] * 4, [0, 0, 0, 1], files)
    assert find(images, BASE[[0, 0, 1, 1]])[0] == [(2, 3)]
    assert find(images, BASE[[0, 0, 0, 1]])[0] == [(0, 2), (1, 2)]
    assert find(make([TRAINING, TESTING] * 2, [0, 0, 0, 1], files), BASE[[0, 0, 1, 2]]) == (
        [(0, 1)],
        1,
    )


def test_a_class_of_images_that_are_all_alike_prints_a_few_lines(capsys):
    """Drawings, or the frames of a film: each image is in few pairs, of which ten are named."""
    images = make([TRAINING] * 800 + [TESTING] * 200, [0] * 1000)
    bottlenecks = np.float32(np.tile(BASE[0], [1000, 1]))
    pairs, leaked = find(images, bottlenecks)
    assert len(pairs) <= 1000
    assert leaked == 200
    near_copies = tf_retrain.find_near_copies(images, bottlenecks)
    tf_retrain.report_near_copies(images, near_copies, print_all=False)
    assert len(capsys.readouterr().out.splitlines()) == 12
    tf_retrain.report_near_copies(images, near_copies, print_all=True)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(pairs)


def test_of_many_images_those_for_training_are_not_compared_with_each_other(monkeypatch, capsys):
    monkeypatch.setattr(tf_retrain, 'MAX_COMPARED', 3)
    images = make([TRAINING, TRAINING, TRAINING, TESTING], [0, 0, 0, 1])
    assert find(images, BASE[[0, 0, 1, 1]]) == ([(2, 3)], 1)
    tf_retrain.report_near_copies(images, [], print_all=False)
    assert 'Training images were not compared' in capsys.readouterr().out


@pytest.mark.parametrize('noise', [0, 0.03, 0.045, 0.06])
@pytest.mark.parametrize('size', [4, 200])
def test_short_vectors_miss_no_pair(noise, size):
    """A plain comparison finds the same pairs, at every distance from the threshold."""
    rng = np.random.default_rng(0)
    half = rng.exponential(1, [600, size])
    bottlenecks = np.float32(
        np.concatenate([half, half * (1 + noise * rng.normal(0, 2.2, half.shape))])
    )
    images = make([TRAINING, TESTING] * 600, [0] * 1200)
    units = bottlenecks / np.linalg.norm(bottlenecks, axis=1, keepdims=True)
    is_alike = units @ units.T >= tf_retrain.DUPLICATE_SIMILARITY
    np.fill_diagonal(is_alike, False)
    pairs, leaked = find(images, bottlenecks)
    assert leaked == is_alike[1::2, ::2].any(axis=1).sum()
    assert set(itertools.chain(*pairs)) == set(np.flatnonzero(is_alike.any(axis=1)))


@pytest.fixture(scope='module')
def start(tmp_path_factory, model):
    """Returns a function that starts a job with photographs, for several tests."""
    return lambda name: Job(tmp_path_factory.mktemp(name), model).photographs(cat=60, dog=60)


def run(job, *more, **changes):
    """Does such a job inside of this process; returns what it printed."""
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
    ):
        patch.chdir(job.folder)
        tf_retrain.main(parse(*job.arguments(*more, **changes)))
    return out.getvalue()


COPIES = {f'cat/copy {i}.jpg': f'cat/cat {i}.jpg' for i in range(1, 13)}
COPIES['dog/stray.jpg'] = 'cat/cat 0.jpg'


@pytest.fixture(scope='module')
def doubled(start):
    """A job with copies, one of them under another label, and a cache of random bottlenecks."""
    job = start('doubled')
    rng = np.random.default_rng(0)
    for path in sorted(job.data.rglob('*.jpg')):
        cached = job.cache_file(path.relative_to(job.data))
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_text(','.join(map(str, rng.exponential(0.5, 2048))))
    for copy, file in COPIES.items():
        shutil.copy(job.data / file, job.data / copy)
        shutil.copy(job.cache_file(file), job.cache_file(copy))
    return job


def named(lines):
    return [line for line in lines if line.startswith('  data/')]


def test_near_copies_are_reported_before_the_training(doubled):
    lines = run(doubled).splitlines()
    mislabeled, leaked = (line for line in lines if line.startswith('WARNING: ') and 'near' in line)
    assert mislabeled.startswith('WARNING: pairs of near copies with different labels: 1. ')
    warning = 'WARNING: validation or test images with near copies in the training set'
    assert re.match(rf'{warning}: [1-9]\d*\. ', leaked)
    first, *others = named(lines)
    assert len(others) == 9
    assert 'data/cat/cat 0.jpg' in first
    assert 'data/dog/stray.jpg' in first
    assert '  and 3 more pairs of near copies, which --print_duplicates names' in lines
    steps = [i for i, line in enumerate(lines) if 'Step 0:' in line]
    assert lines.index(others[-1]) < steps[0]


def test_all_near_copies_are_named_on_demand(doubled):
    lines = named(run(doubled, '--print_duplicates').splitlines())
    assert len(lines) == 13
    for copy, file in COPIES.items():
        assert sum(f'data/{copy} (' in line and f'data/{file} (' in line for line in lines) == 1


SUSPECT = re.compile(r' *(data/.+\.jpg)  (\w+) (\d\.\d\d)  (\w+) (\d\.\d\d)')


def suspects(out):
    lines = out.splitlines()
    start = lines.index('=== SUSPECT IMAGES ===') + 1
    matches = list(itertools.takewhile(bool, map(SUSPECT.fullmatch, lines[start:])))
    assert lines[start + len(matches)].startswith('Look at these images')
    return [match.groups() for match in matches]


@pytest.fixture(scope='module')
def swapped(start):
    """A job with three photographs in the wrong folder, and what it prints of suspects."""
    job = start('swapped')
    for i in range(2):
        (job.data / f'cat/cat {i}.jpg').rename(job.data / f'dog/wrong {i}.jpg')
    (job.data / 'dog/dog 5.jpg').rename(job.data / 'cat/wrong.jpg')
    job.flags['how_many_training_steps'] = '200'
    job.out = run(job, '--find_suspects=5')
    return job


def test_images_in_the_wrong_folder_are_the_first_suspects(swapped):
    found = suspects(swapped.out)
    assert len(found) == 5
    paths = {path for path, *_ in found[:3]}
    assert paths == {'data/dog/wrong 0.jpg', 'data/dog/wrong 1.jpg', 'data/cat/wrong.jpg'}
    for path, own, score, best, best_score in found[:3]:
        assert own == path.split('/')[1]
        assert {own, best} == {'cat', 'dog'}
        assert float(score) < 0.5 < float(best_score)
    scores = [row[2] for row in found]
    assert scores == sorted(scores)


def test_suspects_in_tensorboard(swapped):
    events = read_events(swapped.folder / 'logs/suspects')
    values = [value for event in events for value in event.summary.value]
    for value, (path, *words) in zip(values, suspects(swapped.out), strict=True):
        label = '{} {}  {} {}'.format(*words)
        assert value.tag == f'{label}/{path.removeprefix("data/")}'
        assert value.image.width
        assert value.image.encoded_image_string.startswith(b'\x89PNG')


def test_the_search_changes_nothing(swapped):
    """Neither the images nor, with the same seed, the graph. It may be for more than there are."""
    graph = swapped.graph()
    run(swapped)
    assert swapped.graph() == graph
    assert len(suspects(run(swapped, '--find_suspects=1000', output_graph='other.pb'))) == 120
    assert len(list(swapped.data.rglob('*.jpg'))) == 120


def test_each_image_is_scored_by_a_layer_that_never_saw_it(monkeypatch):
    tests = []

    class Recording(tf_retrain.FinalLayer):
        trained = frozenset()

        def train(self, bottlenecks, classes):
            self.trained |= {*bottlenecks[:, 0]}
            return super().train(bottlenecks, classes)

        def evaluate(self, bottlenecks, classes):
            if not self.trained & {*bottlenecks[:, 0]}:
                tests.append((len(self.trained), {*bottlenecks[:, 0]}))
            return super().evaluate(bottlenecks, classes)

    monkeypatch.setattr(tf_retrain, 'FinalLayer', Recording)
    images = make([TRAINING] * 50, [0, 1] * 25)
    bottlenecks = np.random.default_rng(0).uniform(size=[50, 8]).astype(np.float32)
    bottlenecks[:, 0] = np.arange(50)  # which image it is
    flags = parse('--image_dir=x', '--how_many_training_steps=30')
    scores = tf_retrain.cross_validate(images, bottlenecks, flags)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    assert [len(rows) for _, rows in tests] == [10] * tf_retrain.FOLDS
    assert set().union(*(rows for _, rows in tests)) == {*range(50)}
    assert min(trained for trained, _ in tests) > 30


@pytest.mark.parametrize(
    'counts', [{'cat': 1, 'dog': 1}, {'cat': 1, 'dog': 40}, {'cat': 3, 'dog': 3, 'fox': 3}]
)
def test_few_images(job, counts):
    flags = {'testing_percentage': '0', 'validation_percentage': '0'}
    out = job.photographs(**counts).main('--find_suspects=2', **flags)
    assert len(suspects(out)) == 2
    assert ('the only image is always a suspect: cat' in out) == (counts['cat'] == 1)
    assert (job.folder / 'trained_model/labels.txt').exists()


@pytest.mark.parametrize(
    ('name', 'search'),
    [
        ('find_near_copies', 'near copies'),
        ('cross_validate', 'suspects'),
        ('report_suspects', 'suspects'),
    ],
)
def test_the_training_goes_on_without_a_search_that_fails(job, monkeypatch, name, search):
    def fail(*arguments):
        raise MemoryError('too much')

    monkeypatch.setattr(tf_retrain, name, fail)
    out = job.photographs(cat=12, dog=12).main('--find_suspects=2')
    assert f'WARNING: the search for {search} left out (MemoryError: too much)' in out
    assert 'Step 29: Train accuracy' in out
    assert job.graph().node[-1].name == 'final_result'
