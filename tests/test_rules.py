"""The rules: labels, split, cache files, fold, sampling, the final layer, flags."""

import hashlib
import pathlib

import numpy as np
import pytest
from conftest import build_model, run_v1, write_photographs

import tf_retrain
from tf_retrain import UserError, tf


@pytest.mark.parametrize(
    ('folder', 'label'),
    [
        ('cat', 'cat'),
        ('Red_Fox', 'red fox'),
        ('a-b', 'a b'),
        ('Crêpe  2', 'cr pe 2'),
        ('a\nb', 'a b'),
        ('_x_', ' x '),
        ('猫', '猫'),
        ('犬\n小', '犬 小'),
        ('---', '---'),
        (' ', ''),
    ],
)
def test_labels(folder, label):
    assert tf_retrain.get_label(folder) == label


# `printf PATH | sha1sum`, its last 27 bits as a percentage of 2**27 - 1: 4.138, 5.085, 15.728, 50.347
@pytest.mark.parametrize(
    ('path', 'category'),
    [
        ('data/cat/cat.2.jpg', 'validation'),
        ('data/cat/cat.9.jpg', 'validation'),
        ('data/cat/cat.0.jpg', 'testing'),
        ('data/cat/cat.1.jpg', 'training'),
    ],
)
def test_split(path, category):
    assert tf_retrain.get_category(path, 10, 10) == category


def original_category(path, testing_percentage, validation_percentage):
    """The formula of the reference, written out again in other words."""
    share = int.from_bytes(hashlib.sha1(path.split('_nohash_')[0].encode()).digest(), 'big') % 2**27 / (2**27 - 1)
    if share * 100 < validation_percentage:
        return 'validation'
    return 'testing' if share * 100 < validation_percentage + testing_percentage else 'training'


def test_split_follows_the_formula_and_ignores_nohash():
    paths = [f'data/{folder}/{i}.jpg' for folder in ('cat', 'Ünï') for i in range(2000)]
    found = [tf_retrain.get_category(path, 15, 25) for path in paths]
    assert found == [original_category(path, 15, 25) for path in paths]
    assert abs(found.count('testing') / len(found) - 0.15) < 0.03
    assert abs(found.count('validation') / len(found) - 0.25) < 0.03
    for i in range(100):
        same = {tf_retrain.get_category(f'd/{i}_nohash_{suffix}.jpg', 30, 30) for suffix in 'abcdef'}
        assert len(same) == 1


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def test_image_lists_are_sorted_and_complete(tmp_path, monkeypatch, capsys):
    touch(tmp_path, *(f'd/{folder}/{i}.jpg' for folder in ('zebra', 'Ant', 'bee') for i in range(40)))
    touch(tmp_path, 'd/bee/x.JPG', 'd/bee/y.Jpeg', 'd/bee/z.png', 'd/bee/._0.jpg', 'd/bee/a.webp', 'd/bee/b.webp')
    touch(tmp_path, 'd/bee/sub/deep.jpg', 'd/.hidden/1.jpg', 'd/empty/notes.txt', 'd/loose.jpg', 'd/bee/README')
    monkeypatch.chdir(tmp_path)
    lists = tf_retrain.create_image_lists('d/', 10, 10)
    assert list(lists) == ['ant', 'bee', 'zebra']
    for sets in lists.values():
        for category in tf_retrain.CATEGORIES:
            assert sets[category] == sorted(sets[category])
            for name in sets[category]:
                assert original_category(f'd/{sets["dir"]}/{name}', 10, 10) == category
    assert sum(len(lists['bee'][category]) for category in tf_retrain.CATEGORIES) == 43
    out = capsys.readouterr().out
    assert 'd/bee: 43 images; passed over: 1 without ending, 2 .webp, 1 folder, 1 hidden\n' in out
    assert 'WARNING: d/ has 1 images beside the class folders' in out
    assert 'WARNING: d/empty has no images, and is not taken for a class.\n' in out


@pytest.mark.parametrize('typed', ['d', 'd/', 'd//', './d', '../{name}/d/'])
def test_the_path_is_hashed_as_typed(tmp_path, monkeypatch, typed):
    touch(tmp_path, *(f'd/{folder}/{i}.jpg' for folder in ('a', 'b') for i in range(50)))
    monkeypatch.chdir(tmp_path)
    typed = typed.format(name=tmp_path.name)
    lists = tf_retrain.create_image_lists(typed, 30, 30)
    prefix = typed if typed.endswith('/') else typed + '/'
    for label, sets in lists.items():
        for category in tf_retrain.CATEGORIES:
            assert all(original_category(f'{prefix}{label}/{name}', 30, 30) == category for name in sets[category])


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ([], "--image_dir: 'd' has no class folder with images"),
        (['d/1.jpg', 'd/2.jpg'], "--image_dir: 'd' has no class folder with images"),
        (['d/cat/1.jpg'], "--image_dir: 'd' has 1 class folder with images"),
        (['d/Cat/1.jpg', 'd/cat/1.jpg'], "d/Cat and d/cat have the same label 'cat'"),
        (['d/a-b/1.jpg', 'd/a b/1.jpg'], "d/a b and d/a-b have the same label 'a b'"),
        (['d/ /1.jpg', 'd/cat/1.jpg'], 'blank label'),
    ],
)
def test_folders_that_make_no_classes(tmp_path, monkeypatch, files, message):
    (tmp_path / 'd').mkdir()
    touch(tmp_path, *files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message.replace('.', r'\.')):
        tf_retrain.create_image_lists('d', 10, 10)


LISTS = {
    'a': {'dir': 'A', 'training': ['1', '2', '3'], 'testing': [], 'validation': ['4']},
    'b': {'dir': 'b', 'training': ['5'], 'testing': ['6', '7'], 'validation': []},
    'c': {'dir': 'c', 'training': [], 'testing': ['8'], 'validation': []},
}


def test_rows_point_at_the_listed_images():
    images = tf_retrain.list_images(LISTS)
    assert images[0] == ('a', 'training', 'A/1')
    for category in tf_retrain.CATEGORIES:
        first, count = tf_retrain.get_rows(LISTS, category)
        for label, start, number in zip(LISTS, first, count, strict=True):
            assert [file.split('/')[1] for _, _, file in images[start : start + number]] == LISTS[label][category]
            assert {(a, b) for a, b, _ in images[start : start + number]} <= {(label, category)}


def test_sampling_is_uniform_over_classes_then_images():
    rows = tf_retrain.get_rows(LISTS, 'training')
    drawn, classes = tf_retrain.get_random_cached_bottlenecks(np.random.default_rng(0), rows, (100, 60))
    assert drawn.shape == classes.shape == (100, 60)
    images = tf_retrain.list_images(LISTS)
    assert {images[row][:2] for row in drawn.ravel()} == {('a', 'training'), ('b', 'training')}  # c has none
    share = np.bincount(classes.ravel()) / classes.size
    np.testing.assert_allclose(share, [0.5, 0.5], atol=0.03)
    of_a = np.bincount(drawn[classes == 0])
    np.testing.assert_allclose(of_a / of_a.sum(), 1 / 3, atol=0.03)


def test_minus_one_takes_every_image_of_the_set_once():
    rows = tf_retrain.get_rows(LISTS, 'testing')
    drawn, classes = tf_retrain.get_random_cached_bottlenecks(np.random.default_rng(0), rows, -1)
    images = tf_retrain.list_images(LISTS)
    assert [images[row][2] for row in drawn] == ['b/6', 'b/7', 'c/8']
    assert list(classes) == [1, 1, 2]


def test_empty_sets_are_named_in_one_line(capsys):
    tf_retrain.warn_of_empty_sets(LISTS, {'training': 80, 'testing': 10, 'validation': 0})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2  # none for validation, as 0 % was asked for
    assert 'no training image in 1 of 3 classes' in lines[0]
    assert ': c. ' in lines[0]
    assert 'no testing image in 1 of 3 classes' in lines[1]
    assert ': a. ' in lines[1]
    nothing = {label: {**sets, 'training': []} for label, sets in LISTS.items()}
    with pytest.raises(UserError, match='training set'):
        tf_retrain.warn_of_empty_sets(nothing, {})


NUMBERS = np.random.default_rng(0).normal(size=2048).astype(np.float32)
TEXT = ','.join(str(x) for x in NUMBERS)


@pytest.mark.parametrize(
    'text',
    [
        '',
        TEXT[: len(TEXT) // 2],
        TEXT + ',1.0',
        TEXT + ',',
        TEXT.replace(',', ';'),
        TEXT.replace(TEXT.split(',')[7], 'nan', 1),
        TEXT.replace(TEXT.split(',')[7], 'inf', 1),
        TEXT.replace(TEXT.split(',')[7], 'abc', 1),
        '\0' * 18000,
        '\xff' * 100,
    ],
)
def test_a_broken_cache_file_is_missing(tmp_path, text):
    (tmp_path / 'good.txt').write_text(TEXT)
    (tmp_path / 'bad.txt').write_text(text, encoding='latin-1')
    paths = [str(tmp_path / name) for name in ('good.txt', 'bad.txt', 'absent.txt', 'good.txt')]
    bottlenecks, fingerprints, valid = tf_retrain.read_bottlenecks(paths, 2048)
    assert list(valid) == [True, False, False, True]
    assert fingerprints[0] == fingerprints[3] == tf_retrain.fingerprint(TEXT).numpy()
    np.testing.assert_array_equal(bottlenecks[[0, 3]], [NUMBERS, NUMBERS])


def test_cache_files_of_older_numpy_are_read(tmp_path):
    (tmp_path / 'old.txt').write_text(','.join(f'{x:.6g}' for x in NUMBERS))
    bottlenecks, _, valid = tf_retrain.read_bottlenecks([str(tmp_path / 'old.txt')], 2048)
    assert valid.all()
    np.testing.assert_allclose(bottlenecks[0], NUMBERS, rtol=1e-5)


def test_write_whole_leaves_nothing_behind(tmp_path):
    path = tmp_path / ('x' * 250)
    tf_retrain.write_whole(str(path), b'one')
    tf_retrain.write_whole(str(path), b'two')
    assert path.read_bytes() == b'two'
    (tmp_path / 'folder').mkdir()
    with pytest.raises(tf.errors.OpError):
        tf_retrain.write_whole(str(tmp_path / 'folder'), b'three')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['folder', 'x' * 250]


def test_folded_network_equals_the_graph(tmp_path, model):
    write_photographs(tmp_path, 'x', 5, (90, 140, 60))
    backbone = tf_retrain.load_backbone('inception_v3', str(model.parent))
    before = backbone.graph_def.SerializeToString(deterministic=True)
    paths = sorted(str(path) for path in (tmp_path / 'x').iterdir())
    folded = {node.op for node in backbone.fold().node}
    assert folded.isdisjoint({'BatchNormWithGlobalNormalization', 'CheckNumerics'})
    (rows, bottlenecks), *rest = tf_retrain.compute_bottlenecks(paths, backbone)
    assert not rest
    assert list(rows) == [0, 1, 2, 3, 4]
    for path, bottleneck in zip(paths, bottlenecks, strict=True):
        expected = run_v1(build_model(), pathlib.Path(path).read_bytes(), 'pool_3/_reshape:0')[0]
        np.testing.assert_allclose(bottleneck, expected, atol=1e-5 * np.abs(expected).max())
    # The frozen graph is copied from it, so nothing may have changed it.
    assert backbone.graph_def.SerializeToString(deterministic=True) == before


def test_several_devices_share_the_batches():
    """With two networks, as with two GPUs, every batch comes back once and with its own tags."""
    networks = [lambda x: x * 1.0, lambda x: x * 1.0]
    batches = tf.data.Dataset.range(103).map(lambda i: (i, tf.cast(i, tf.float32))).batch(4)
    found = [
        pair for tags, values in tf_retrain.run_networks(networks, batches) for pair in zip(tags, values, strict=True)
    ]
    assert found == [(i, float(i)) for i in range(103)]


SIZE = (299, 299)


def distortion_flags(**values):
    return tf_retrain.create_parser().parse_args(
        ['--image_dir=x', *(f'--{name}={value}' for name, value in values.items())]
    )


def test_distortions(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 400, dtype=np.uint8)[:, None], [300, 1, 3]).reshape(300, 400, 3)
    plain = tf_retrain.resize_image(ramp, SIZE).numpy()
    flags = distortion_flags()
    assert not tf_retrain.should_distort_images(flags)
    seeds = np.array([[0, i] for i in range(40)], np.int32)

    def distorted(flags):
        assert tf_retrain.should_distort_images(flags)
        return np.stack([tf_retrain.distort_image(ramp, seed, SIZE, flags).numpy() for seed in seeds])

    np.testing.assert_allclose(tf_retrain.distort_image(ramp, seeds[0], SIZE, flags), plain, atol=1e-3)
    flipping = tf_retrain.create_parser().parse_args(['--image_dir=x', '--flip_left_right'])
    flipped = [not np.allclose(image, plain) for image in distorted(flipping)]
    assert 8 <= sum(flipped) <= 32
    mirrored = distorted(flipping)[flipped.index(True)]
    np.testing.assert_allclose(mirrored, plain[:, ::-1])

    factors = distorted(distortion_flags(random_brightness=30)).mean(axis=(1, 2, 3)) / plain.mean()
    assert 0.7 <= factors.min() < 0.8
    assert 1.2 < factors.max() <= 1.3

    # A margin of 20 % leaves 1 / 1.2 of the ramp to be seen; where it begins differs from image to image.
    cropped = distorted(distortion_flags(random_crop=20))
    seen = cropped[:, 0, -1, 0] - cropped[:, 0, 0, 0]
    np.testing.assert_allclose(seen, 255 / 1.2, rtol=0.02)
    assert np.ptp(cropped[:, 0, 0, 0]) > 10

    seen = np.ptp(distorted(distortion_flags(random_scale=50))[:, 0, :, 0], axis=1)
    assert 255 / 1.5 * 0.98 < seen.min() < 255 / 1.35
    assert 255 / 1.15 < seen.max() <= 255


def test_final_layer_descends_the_gradient_of_the_cross_entropy():
    rng = np.random.default_rng(0)
    bottlenecks = rng.uniform(size=[50, 2048]).astype(np.float32)
    rows, classes = rng.integers(50, size=[3, 20]), rng.integers(4, size=[3, 20])
    layer = tf_retrain.FinalLayer(2048, 4, 0.5, [1, 2])
    weights, biases = layer.weights.astype(float), layer.biases.astype(float)
    assert np.abs(weights).max() < 0.002  # truncated at two standard deviations
    assert 0.0008 < weights.std() < 0.00095
    assert not biases.any()
    expected = []
    for row, label in zip(rows, classes, strict=True):
        x = bottlenecks[row].astype(float)
        logits = x @ weights + biases
        probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        expected.append([-np.log(probability[np.arange(20), label]).mean(), (logits.argmax(axis=1) == label).mean()])
        error = (probability - np.eye(4)[label]) / 20
        weights, biases = weights - 0.5 * x.T @ error, biases - 0.5 * error.sum(axis=0)
    found = [layer.train(bottlenecks[row], label) for row, label in zip(rows, classes, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(layer.weights, weights, atol=1e-5)
    np.testing.assert_allclose(layer.biases, biases, atol=1e-5)
    logits, activations, _, _ = layer.evaluate(bottlenecks[rows[0]], classes[0])
    np.testing.assert_allclose(activations, tf.nn.softmax(logits), atol=1e-6)
    np.testing.assert_allclose(logits, bottlenecks[rows[0]] @ weights + biases, atol=1e-4)


def test_seeds_make_layers_alike():
    first, second, other = (tf_retrain.FinalLayer(2048, 3, 0.1, seed).weights for seed in ([1, 2], [1, 2], [1, 3]))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_histogram_keeps_the_moments():
    values = np.random.default_rng(0).normal(size=[7, 30])
    histogram = tf_retrain.histogram(values)
    assert histogram.num == sum(histogram.bucket) == 210
    assert (histogram.min, histogram.max) == (values.min(), values.max())
    np.testing.assert_allclose([histogram.sum, histogram.sum_squares], [values.sum(), (values**2).sum()])
    assert len(tf_retrain.histogram(np.zeros(5)).bucket) == 30


USAGE_ERRORS = [
    ('--testing_percentage=-1', 'from 0 to 100'),
    ('--validation_percentage=101', 'from 0 to 100'),
    ('--testing_percentage=ten', 'invalid int value'),
    ('--testing_percentage=50 --validation_percentage=50', 'below 100'),
    ('--how_many_training_steps=-1', '0 or more'),
    ('--eval_step_interval=0', '1 or more'),
    ('--train_batch_size=0', '1 or more'),
    ('--train_batch_size=-1', '1 or more'),
    ('--validation_batch_size=0', 'nor -1'),
    ('--test_batch_size=-2', 'nor -1'),
    ('--learning_rate=0', 'above 0'),
    ('--learning_rate=nan', 'above 0'),
    ('--learning_rate=inf', 'above 0'),
    ('--random_crop=-1', 'from 0 to 100'),
    ('--random_seed=-1', '0 or more'),
    ('--final_tensor_name=', 'letters'),
    ('--final_tensor_name=a:0', 'letters'),
    ('--data_service=localhost:5000', 'grpc://HOST:PORT'),
    ('--image_dir=', '--image_dir: name the folder'),
    ('--no_such_flag=1', 'there is no flag --no_such_flag. See --help.'),
    ('--learn_rate=1', 'there is no flag --learn_rate. Did you mean --learning_rate?'),
    ('extra', 'there is no flag extra. See --help.'),
    ('--architecture=inception_v4', 'mobilenet_0.25_128'),
    ('--architecture=mobilenet_1.0_224 --tfhub_module=m', 'both name a network'),
]


@pytest.mark.parametrize(('arguments', 'message'), USAGE_ERRORS)
def test_wrong_flags_are_usage_errors(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        tf_retrain.create_parser().parse_args(['--image_dir=data/', *arguments.split()])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_defaults_are_those_of_the_original():
    assert vars(tf_retrain.create_parser().parse_args(['--image_dir', 'data/'])) == {
        'image_dir': 'data/',
        'output_graph': '/tmp/output_graph.pb',
        'output_labels': '/tmp/output_labels.txt',
        'summaries_dir': '/tmp/retrain_logs',
        'how_many_training_steps': 4000,
        'learning_rate': 0.01,
        'testing_percentage': 10,
        'validation_percentage': 10,
        'eval_step_interval': 10,
        'train_batch_size': 100,
        'test_batch_size': -1,
        'validation_batch_size': 100,
        'print_misclassified_test_images': False,
        'model_dir': '/tmp/imagenet',
        'bottleneck_dir': '/tmp/bottleneck',
        'final_tensor_name': 'final_result',
        'flip_left_right': False,
        'random_crop': 0,
        'random_scale': 0,
        'random_brightness': 0,
        'random_seed': None,
        'strict': False,
        'data_service': None,
        'architecture': 'inception_v3',
        'tfhub_module': None,
        'optimized_graph': None,
    }
