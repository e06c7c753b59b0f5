"""Familiarity: which images are unlike those of the training, in the graph and in tf_test.py."""

import json

import numpy as np
import pytest
from helpers import check_familiarity, parse, read_events
from PIL import Image
from test_labelling import FILES, GRAPH, LABELS, Labeling

import tf_retrain
import tf_test
from tf_retrain import Familiarity, Images, tf

RNG = np.random.default_rng(0)


def make(sets, classes):
    classes = np.array(classes)
    files = np.array([f'{index}/{i}.jpg' for i, index in enumerate(classes)], object)
    labels = [str(index) for index in range(classes.max() + 1)]
    return Images('data', labels, files, classes, np.array(sets))


def evaluate(bottlenecks, familiarity):
    return tf_retrain.compute_familiarity(tf.constant(bottlenecks, tf.float32), familiarity).numpy()


def find(images, bottlenecks, *flags):
    flags = parse('--image_dir=data', '--random_seed=1', *flags)
    return tf_retrain.find_familiarity(images, np.float32(bottlenecks), flags)


def test_references_are_drawn_class_by_class():
    """As many of each class as there are, up to the limit in all."""
    classes = [0] * 900 + [1] * 100 + [2] * 3
    images = make(['training'] * 1003, classes)
    rows = tf_retrain.choose_references(images, np.random.default_rng(0))
    assert len(set(rows)) == len(rows) == 500
    assert np.bincount(images.classes[rows]).tolist() == [397, 100, 3]
    # Each turn has every class that still has images.
    assert set(images.classes[rows[:3]]) == {0, 1, 2}


@pytest.mark.parametrize(('classes', 'expected'), [(400, 500), (800, 800), (6000, 5000)])
def test_number_of_references(classes, expected):
    images = make(['training'] * 12_000, np.sort(np.arange(12_000) % classes))
    rows = tf_retrain.choose_references(images, np.random.default_rng(0))
    assert len(rows) == expected


def test_similarity_is_that_of_the_third_nearest_other_image():
    """An image does not vouch for itself, and neither does a near copy."""
    bottlenecks = np.float32(RNG.uniform(size=[40, 50]))
    bottlenecks[7] = bottlenecks[3] * 1.001
    references = np.arange(0, 40, 2)
    units = bottlenecks / np.linalg.norm(bottlenecks, axis=1, keepdims=True)
    rows = np.arange(40)
    images = make(['training'] * 40, [0] * 40)
    found = tf_retrain.measure_similarities(images, bottlenecks, rows, references)
    for row in rows:
        cosines = [units[row] @ units[other] for other in references if other != row]
        third = sorted(cosine for cosine in cosines if cosine < 0.99)[-3]
        assert found[row] == pytest.approx(third, abs=1e-5)


def test_near_copies_do_not_vouch_in_small_classes():
    """Of a class with few references, one near copy leaves enough, and only near copies do not."""
    bottlenecks = np.float32(RNG.uniform(size=[12, 50]))
    bottlenecks[1] = bottlenecks[0] * 1.001  # one of two other images of its class
    bottlenecks[[4, 5]] = bottlenecks[3] * 1.001  # both others
    images = make(['training'] * 12, np.arange(12) // 3)
    rows = np.arange(12)
    found = tf_retrain.measure_similarities(images, bottlenecks, rows, rows)
    units = bottlenecks / np.linalg.norm(bottlenecks, axis=1, keepdims=True)
    cosines = np.sort(units @ units.T, axis=1)
    assert found[0] == pytest.approx(cosines[0, -5], abs=1e-5)  # without itself and its near copy
    assert found[3] == pytest.approx(cosines[3, -4], abs=1e-5)  # without itself


def test_familiarity_is_the_share_of_own_images_that_are_no_more_similar():
    directions = np.eye(4, dtype=np.float32)
    familiarity = Familiarity(directions[:3], np.float32([-1, 0, 0.5, 0.6, 0.7]))
    images = directions * 5  # each is like one reference, or none: the third nearest has 0
    mixed = directions[:3].sum(axis=0, keepdims=True)  # 0.577 to each
    found = evaluate([*images, *mixed, np.zeros(4), np.full(4, np.nan)], familiarity)
    np.testing.assert_allclose(found, [0.4, 0.4, 0.4, 0.4, 0.6, 0.4, 0], atol=1e-6)


def test_own_images_are_uniform_and_others_are_not():
    """Two classes in a space of many numbers: foreign images are in another direction."""
    centers = RNG.uniform(size=[3, 200])
    own = np.concatenate([center + RNG.uniform(size=[300, 200]) for center in centers[:2]])
    sets = np.where(np.arange(600) % 5 == 0, 'testing', 'training')
    images = make(sets, [0] * 300 + [1] * 300)
    familiarity = find(images, own)
    assert len(familiarity.similarities) == 600
    new = np.concatenate([center + RNG.uniform(size=[300, 200]) for center in centers[:2]])
    assert 0.01 <= (evaluate(new, familiarity) <= 0.05).mean() <= 0.1
    foreign = centers[2] + RNG.uniform(size=[300, 200])
    assert (evaluate(foreign, familiarity) <= 0.05).mean() > 0.99


def test_an_own_image_has_one_familiarity_however_it_is_computed():
    """Its similarity is compared with itself, and has other last digits in another batch."""
    own = RNG.uniform(size=[300, 300])
    sets = np.where(np.arange(300) % 2, 'testing', 'training')
    familiarity = find(make(sets, np.arange(300) // 150), own)
    tested = own[sets == 'testing']
    alone = np.concatenate([evaluate([image], familiarity) for image in tested])
    np.testing.assert_array_equal(evaluate(tested, familiarity), alone)


@pytest.mark.parametrize('count', [2, 3, 4])
@pytest.mark.parametrize('value', ['random', 'equal', 'zero'])
def test_few_or_equal_images(count, value):
    """There may be no third nearest image."""
    values = {'random': RNG.uniform(size=[count, 8]), 'equal': np.ones([count, 8])}
    bottlenecks = values.get(value, np.zeros([count, 8]))
    familiarity = find(make(['training'] * count, [0, *[1] * (count - 1)]), bottlenecks)
    found = evaluate(RNG.uniform(size=[5, 8]), familiarity)
    assert ((found >= 0) & (found <= 1)).all()


def test_the_graph_and_the_record_say_it(trained):
    """The similarities are those of all images; what the old tools ask for is as before."""
    record = json.loads((trained.folder / f'{GRAPH}.json').read_text())
    nodes = {node.name: node for node in trained.graph().node}
    (comparison,) = (node for node in nodes.values() if node.op == 'LessEqual')
    own = tf.make_ndarray(nodes[comparison.input[0]].attr['value'].tensor)
    assert record['familiarity']['images'] == own.size == 145
    for percent, similarity in record['familiarity']['similarities'].items():
        assert similarity == pytest.approx(np.percentile(own, int(percent)))
    (event,) = (e for e in read_events(trained.folder / 'logs/test') if e.summary.value)
    (value,) = (value for value in event.summary.value if value.tag == 'familiarity')
    assert value.histo.num == 145
    assert nodes['final_result'].input == ['final_training_ops/Wx_plus_b/add']
    ops = {node.op for name, node in nodes.items() if name.startswith('familiarity')}
    assert ops == {'Const', 'Square', 'Sum', 'Maximum', 'Rsqrt', 'Mul', 'MatMul', 'TopKV2'} | {
        'Min', 'LessEqual', 'Cast', 'Mean', 'Identity'
    }  # fmt: skip


def test_a_failure_leaves_a_graph_without_it(job, monkeypatch):
    monkeypatch.setattr(tf_retrain, 'measure_similarities', None)
    out = job.photographs(cat=20, dog=20).main()
    assert 'WARNING: the familiarity left out (TypeError: ' in out
    assert '--unknown' not in out
    flags = tf_test.create_labeling_parser().parse_args(['x.jpg', GRAPH, LABELS, '--unknown=5'])
    with pytest.raises(tf_test.UserError, match="^--unknown: '.*' does not say .* Train again"):
        tf_test.label_images(flags)


def test_least_familiar_images_are_named(job):
    job.photographs(cat=30, dog=30)
    rainbow = np.linspace(0, 255, 30 * 40 * 3).reshape(30, 40, 3).astype(np.uint8)
    Image.fromarray(rainbow).save(job.data / 'cat/palm.jpg')
    out = job.main('--find_suspects=3', how_many_training_steps='2')
    lines = out.splitlines()
    start = lines.index('=== LEAST FAMILIAR IMAGES ===')
    assert lines[start + 1].split() == ['data/cat/palm.jpg', 'cat', 'familiarity', '0.0164']
    assert len([line for line in lines if '  familiarity ' in line]) == 3
    assert 'add --unknown 10 to the command below: see README.md.' in out  # for 61 images


# tf_test.py


@pytest.fixture
def label(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained.folder)
    return Labeling(capsys)


@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
    path = tmp_path_factory.mktemp('foreign') / 'rainbow.png'
    Image.fromarray(RNG.integers(0, 255, [64, 64, 3], np.uint8)).save(path)
    return path


def test_unknown_takes_the_place_of_the_label(trained, label, foreign, tmp_path):
    """In words and in folders; the other lines, and JSON, stay."""
    own = trained.data / 'dog/dog 7.jpg'
    flags = '--unknown=2', f'--sort_into={tmp_path}'
    lines = label(own, foreign, *flags)
    assert [line.split('\t')[1] for line in lines] == ['dog', 'unknown']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['dog', 'unknown']
    own_answer, foreign_answer = map(json.loads, label(own, foreign, '--json', *flags))
    assert own_answer['familiarity'] > 0.02 >= foreign_answer['familiarity']
    assert 'unknown' not in foreign_answer['labels']
    images = [path.read_bytes() for path in (own, foreign)]
    found = [own_answer['familiarity'], foreign_answer['familiarity']]
    check_familiarity(found, trained.graph(), images)


def test_one_foreign_image_is_a_warning(trained, foreign, monkeypatch, capsys):
    """Its lines stay those of the original."""
    monkeypatch.chdir(trained.folder)
    tf_test.label_images(tf_test.create_labeling_parser().parse_args([str(foreign), *FILES]))
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    expected = 'this image is unlike nearly all images of the training, so the scores mean little.'
    assert err == f'WARNING: {expected}\n'


def test_a_class_that_is_called_unknown_is_no_refusal():
    tally = tf_test.Tally(tf_test.Classes(['cat', 'unknown'], ['cat', 'unknown'], []), None)
    answer = tf_test.Answer(np.array([0.1, 0.9]), np.float32(0), 1)
    tally.add('x.jpg', answer, 'unknown')
    assert tally.unfamiliar == 1


def test_foreign_images_among_others_are_counted(trained, foreign, monkeypatch, capsys):
    monkeypatch.chdir(trained.folder)
    images = foreign, trained.data / 'dog/dog 7.jpg', foreign
    for flags in ([], ['--unknown=2']):
        arguments = map(str, [*images, *FILES, *flags])
        tf_test.label_images(tf_test.create_labeling_parser().parse_args(arguments))
        err = capsys.readouterr().err
        line = 'WARNING: 2 of 3 images are unlike nearly all images of the training, so their '
        advice = "scores mean little. --unknown 5 labels them 'unknown'.\n"
        assert err == ('' if flags else f'{line}{advice}')


def test_the_share_that_is_refused_is_the_one_that_was_asked_for(trained, label):
    """Of one's own images, about a twentieth with 5."""
    lines = label(*trained.data.glob('*/*.jpg'), '--unknown=20')
    refused = np.mean([line.split('\t')[1] == 'unknown' for line in lines])
    assert 0.01 < refused <= 0.21
