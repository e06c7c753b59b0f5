"""What a run says of its data set: near copies, and images in a wrong folder."""

import itertools
import re
import shutil
from unittest import mock

import numpy as np
import pytest
from helpers import Job, created, parse, read_events
from PIL import Image

import tf_retrain
from tf_retrain import get_set

RNG = np.random.default_rng(0)
BASE = RNG.uniform(size=[13, 2048])


@pytest.fixture
def compare(job, monkeypatch):
    """Returns what a run prints that finds given bottlenecks for the images class/name.

    Those with "test" in their name are for testing, all others for training.
    """

    def compare(names, bottlenecks, *more, **changes):
        for name in names:
            path = job.data / f'{name}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        found = np.float32(bottlenecks)
        monkeypatch.setattr(tf_retrain, 'cache_bottlenecks', lambda images, *_: (images, found, {}))
        return job.main(*more, **{'how_many_training_steps': '1', **changes})

    def get_set(path, *percentages):
        return 'testing' if 'test' in path else 'training'

    monkeypatch.setattr(tf_retrain, 'get_set', get_set)
    return compare


def pairs(out):
    """Returns the pairs of near copies that a run has named."""
    line = r'^  data/(.+)\.jpg \(\w+\), data/(.+)\.jpg \(\w+\)$'
    return re.findall(line, out, re.MULTILINE)


def count_leaked(out):
    """Returns how many images for testing are like one for training."""
    match = re.search(r'^WARNING: validation or test images with .*: (\d+)\. ', out, re.MULTILINE)
    return int(match[1]) if match else 0


def test_pairs_come_in_the_order_of_what_they_spoil(compare):
    """Different labels before the accuracy, and that before what only wastes an image."""
    names = 'a/1', 'a/2', 'a/3', 'a/4 test', 'a/5', 'b/6'
    out = compare(names, BASE[[0, 0, 1, 1, 2, 2]] + RNG.normal(0, 1e-4, [6, 2048]))
    assert out.count('\nNear copies, the worst first:\n  data/a/5.jpg ') == 1
    assert pairs(out) == [('a/5', 'b/6'), ('a/3', 'a/4 test'), ('a/1', 'a/2')]
    assert 'WARNING: pairs of near copies with different labels: 1. ' in out
    assert count_leaked(out) == 1
    assert out.index('near copies') < out.index('Step 0')


@pytest.mark.parametrize(('cosine', 'expected'), [(0.985, []), (0.995, [('a/1', 'b/3')])])
def test_only_what_is_as_alike_as_copies_counts(compare, cosine, expected):
    first, second, side = np.eye(3, 2048)
    near = cosine * first + np.sqrt(1 - cosine**2) * side
    assert pairs(compare(['a/1', 'a/2', 'b/3'], [first, second, 3 * near])) == expected


@pytest.mark.parametrize('size', [5, 37, 1001])
def test_the_bound_rules_out_no_pair(size):
    """A plain comparison finds the same pairs, also where the last group has fewer numbers."""
    half = np.float32(RNG.exponential(1, [60, size]))
    near = half * (1 + RNG.normal(0, 0.1, half.shape))
    bottlenecks = np.float32(np.concatenate([half, near]))
    units = bottlenecks / np.linalg.norm(bottlenecks, axis=1, keepdims=True)
    expected = np.argwhere(np.triu(units @ units.T, 1) >= tf_retrain.DUPLICATE_SIMILARITY)
    found = set()
    for rows, others, similarity in tf_retrain.compare_bottlenecks(bottlenecks, np.arange(120)):
        near_rows, near_others = np.nonzero(similarity >= tf_retrain.DUPLICATE_SIMILARITY)
        found |= {*zip(rows[near_rows].tolist(), others[near_others].tolist(), strict=True)}
    assert len(expected) > 20
    assert {(row, other) for row, other in found if row < other} == {*map(tuple, expected.tolist())}


@pytest.mark.parametrize('value', [0, 1, 0.5, 1e-30])
def test_a_bottleneck_of_equal_numbers_is_like_no_other(compare, value):
    assert 'near copies' not in compare(['a/1', 'b/2 test'], np.full([2, 2048], value))


@pytest.mark.parametrize(
    ('rows', 'expected', 'test'),
    [
        ([0, 0, 1, 1], [('a/y', 'b/x_nohash_1')], ''),
        ([0, 0, 0, 1], [('a/x_nohash_1', 'a/y'), ('a/x_nohash_2', 'a/y')], ''),
        ([0, 0, 1, 2], [('a/x_nohash_1', 'a/x_nohash_2test')], 'test'),
    ],
)
def test_variants_on_purpose_are_named_only_if_they_are_apart(compare, rows, expected, test):
    out = compare(['a/x_nohash_1', f'a/x_nohash_2{test}', 'a/y', 'b/x_nohash_1'], BASE[rows])
    assert pairs(out) == expected
    assert count_leaked(out) == (test != '')


def test_ten_pairs_are_named_and_all_on_demand(compare):
    names = [f'{label}/{i:02}' for label in 'ab' for i in range(13)]
    images = names, np.tile(BASE, [2, 1])
    out = compare(*images)
    assert len(pairs(out)) == 10
    assert '\n  and 3 more pairs of near copies, which --print_duplicates names\n' in out
    expected = list(zip(names[:13], names[13:], strict=True))
    assert sorted(pairs(compare(*images, '--print_duplicates'))) == expected


def test_of_images_that_are_all_alike_each_is_in_few_pairs(compare):
    """Drawings, or the frames of a film."""
    names = [f'a/{i:04}{"test" if i >= 800 else ""}' for i in range(1000)]
    out = compare([*names, 'b/x'], [*[BASE[0]] * 1000, BASE[1]], '--print_duplicates')
    assert len(pairs(out)) <= 1000
    assert count_leaked(out) == 200


def test_of_many_images_those_for_training_are_not_compared_with_each_other(compare, monkeypatch):
    monkeypatch.setattr(tf_retrain, 'MAX_COMPARED', 3)
    out = compare(['a/1', 'a/2', 'a/3', 'b/4 test'], BASE[[0, 0, 1, 1]])
    assert pairs(out) == [('a/3', 'b/4 test')]
    assert count_leaked(out) == 1
    assert 'Training images were not compared' in out


@pytest.mark.parametrize('noise', [0, 0.03, 0.045, 0.06])
@pytest.mark.parametrize('size', [4, 200])
def test_no_pair_is_missed(compare, noise, size):
    """A plain comparison finds the same pairs, at every distance from the threshold."""
    rng = np.random.default_rng(0)
    half = rng.exponential(1, [600, size])
    bottlenecks = np.zeros([1200, 2048], np.float32)
    bottlenecks[:600, :size] = half
    bottlenecks[600:, :size] = half * (1 + noise * rng.normal(0, 2.2, half.shape))
    units = bottlenecks / np.linalg.norm(bottlenecks, axis=1, keepdims=True)
    is_alike = units @ units.T >= tf_retrain.DUPLICATE_SIMILARITY
    np.fill_diagonal(is_alike, False)
    names = [f'{label}/{i:03}{"test" * (i % 2)}' for label in 'ab' for i in range(600)]
    out = compare(names, bottlenecks, '--print_duplicates')
    assert count_leaked(out) == is_alike[1::2, ::2].any(axis=1).sum()
    expected = itertools.compress(names, is_alike.any(axis=1))
    assert {*itertools.chain(*pairs(out))} == {*expected}


def test_copies_of_photographs(job):
    """A run finds them, and so does one that has all bottlenecks from the cache."""
    copies = {}
    for i, colour in enumerate(itertools.product((0, 170), repeat=3)):
        label = ('cat', 'dog')[i % 2]
        copies[f'{label}/{i}'] = f'{label}/copy {i}' if i else 'dog/stray'
        path = job.data / label / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 30), colour).save(path)
    for name, copy in copies.items():
        shutil.copy(job.data / f'{name}.jpg', job.data / f'{copy}.jpg')
    sets = [[get_set(f'data/{name}.jpg', 40, 10) for name in pair] for pair in copies.items()]
    leaked = sum(pair.count('training') == 1 for pair in sets)
    assert 0 < leaked < 8
    for count in (16, 0):
        out = job.main('--print_duplicates', testing_percentage='40')
        assert len(created(out)) == count
        assert pairs(out)[0] == ('cat/0', 'dog/stray')
        assert sorted(pairs(out)) == sorted(copies.items())
        assert 'WARNING: pairs of near copies with different labels: 1. ' in out
        assert count_leaked(out) == leaked
        assert out.index('near copies') < out.index('Step 0')


# Suspects


def suspects(out):
    """Returns (image, its label, score, best label, score) of the suspects, as printed."""
    _, _, rest = out.partition('=== SUSPECT IMAGES ===\n')
    listed, _, _ = rest.partition('Look at these images')
    line = re.compile(r' *data/(.+\.jpg)  (\w+) (\d\.\d\d)  (\w+) (\d\.\d\d)')
    return [line.fullmatch(text).groups() for text in listed.splitlines()]


@pytest.fixture(scope='module')
def swapped(tmp_path_factory, model):
    """A job with three photographs in the wrong folder, and what it prints of suspects."""
    job = Job(tmp_path_factory.mktemp('swapped'), model).photographs(cat=60, dog=60)
    for i in range(2):
        (job.data / f'cat/cat {i}.jpg').rename(job.data / f'dog/wrong {i}.jpg')
    (job.data / 'dog/dog 5.jpg').rename(job.data / 'cat/wrong.jpg')
    job.flags['how_many_training_steps'] = '200'
    job.suspects = suspects(job.run('--find_suspects=5').stdout)
    return job


def test_images_in_the_wrong_folder_are_the_first_suspects(swapped):
    assert {(path, label, best) for path, label, _, best, _ in swapped.suspects[:3]} == {
        ('dog/wrong 0.jpg', 'dog', 'cat'),
        ('dog/wrong 1.jpg', 'dog', 'cat'),
        ('cat/wrong.jpg', 'cat', 'dog'),
    }
    scores = [float(score) for _, _, score, _, _ in swapped.suspects]
    assert len(scores) == 5
    assert sorted(scores) == scores
    for _, _, score, _, best_score in swapped.suspects[:3]:
        assert float(score) < 0.5 < float(best_score)


def test_suspects_in_tensorboard(swapped):
    events = read_events(swapped.folder / 'logs/suspects')
    values = [value for event in events for value in event.summary.value]
    expected = ['{} {}  {} {}/{}'.format(*words, path) for path, *words in swapped.suspects]
    assert [value.tag for value in values] == expected
    for value in values:
        assert value.image.width
        assert value.image.encoded_image_string.startswith(b'\x89PNG')


def test_the_search_changes_nothing(swapped):
    """Neither the images nor, with the same seed, the graph. It may be for more than there are."""
    graph = swapped.graph()
    swapped.run()
    assert swapped.graph() == graph
    out = swapped.run('--find_suspects=1000', output_graph='other.pb').stdout
    assert len(suspects(out)) == len(list(swapped.data.rglob('*.jpg'))) == 120


def test_each_image_is_scored_by_a_layer_that_never_saw_it(compare):
    """Each has a bottleneck that is at right angles to all others: nothing can be known of it."""
    names = [f'{label}/{i:02}' for label in 'ab' for i in range(25)]
    flags = {'how_many_training_steps': '100', 'learning_rate': '1'}
    out = compare(names, 9 * np.eye(50, 2048), '--find_suspects=50', **flags)
    scores = [float(score) for _, _, score, _, _ in suspects(out)]
    assert len(scores) == 50
    assert scores == pytest.approx([0.5] * 50, abs=0.1)


def test_cross_validation(monkeypatch):
    """Each image is in one test, all others are trained on, and the scores are probabilities."""
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
    classes = np.repeat([0, 1], 25)
    files = np.array([f'{"ab"[of]}/{i}.jpg' for i, of in enumerate(classes)], object)
    images = tf_retrain.Images('data', ['a', 'b'], files, classes, np.full(50, 'training'))
    bottlenecks = np.random.default_rng(0).uniform(size=[50, 8]).astype(np.float32)
    bottlenecks[:, 0] = np.arange(50)  # which image it is
    flags = parse('--image_dir=data', '--how_many_training_steps=30')
    blocks = tf_retrain.cross_validate(images, bottlenecks, flags)
    scores = np.concatenate([block for _, block in blocks])
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    assert [len(rows) for _, rows in tests] == [10] * tf_retrain.FOLDS
    assert set().union(*(rows for _, rows in tests)) == {*range(50)}
    assert min(trained for trained, _ in tests) > 30


def test_scores_come_in_blocks(compare, monkeypatch):
    """Of many images and classes, all scores together would fill the memory."""
    names = [f'{label}/{i:02}' for label in 'ab' for i in range(25)]
    job = names, RNG.uniform(size=[50, 2048]), '--find_suspects=50'
    expected = suspects(compare(*job))
    monkeypatch.setattr(tf_retrain, 'EVALUATED_ROWS', 3)
    assert suspects(compare(*job)) == expected
    images = tf_retrain.list_images(parse('--image_dir=data'))
    flags = parse('--image_dir=data', '--how_many_training_steps=1')
    blocks = [rows for rows, _ in tf_retrain.cross_validate(images, np.float32(job[1]), flags)]
    assert {len(rows) for rows in blocks} == {3, 1}
    assert sorted(np.concatenate(blocks)) == list(range(50))


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
        ('report_near_copies', 'near copies'),
        ('cross_validate', 'suspects'),
        ('report_suspects', 'suspects'),
    ],
)
def test_the_training_goes_on_without_a_search_that_fails(job, monkeypatch, name, search):
    monkeypatch.setattr(tf_retrain, name, mock.Mock(side_effect=MemoryError('too much')))
    out = job.photographs(cat=12, dog=12).main('--find_suspects=2')
    assert f'WARNING: the search for {search} left out (MemoryError: too much)' in out
    assert 'Step 29: Train accuracy' in out
    assert job.graph().node[-1].name == 'final_result'
