"""The full-size stand-in for the published model, real photographs and real bottlenecks, where they are at hand."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import SHARED, load_backbone, run, run_v1_on_all

import tf_retrain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SHARED / 'inception_2015/make_graph.py').exists(), reason='there is no ../shared'
    ),
]


@pytest.fixture(scope='module')
def stand_in(tmp_path_factory):
    folder = tmp_path_factory.mktemp('inception')
    subprocess.run(
        [sys.executable, str(SHARED / 'inception_2015/make_graph.py'), str(folder)], check=True
    )
    return folder


def test_cats_and_dogs(stand_in, tmp_path):
    """The command of README.md, from the archive on; then a few bottlenecks against the unfolded graph."""
    (tmp_path / 'data').symlink_to(SHARED / 'data/cats_dogs_sample')
    (tmp_path / 'inception').mkdir()
    os.link(stand_in / 'inception-2015-12-05.tgz', tmp_path / 'inception/inception-2015-12-05.tgz')
    command = (
        '--bottleneck_dir=bottlenecks/ --how_many_training_steps 500 --model_dir=inception/ '
        '--output_graph=trained_model/unoptimized_model.pb --output_labels=trained_model/labels.txt --image_dir=data/'
    )
    out = run('tf_retrain.py', *command.split(), '--summaries_dir=logs', cwd=tmp_path).stdout
    assert '300 bottleneck files created.' in out
    assert re.search(r'Final test accuracy = \d+\.\d% \(N=26\)', out)
    graph, labels = 'trained_model/unoptimized_model.pb', 'trained_model/labels.txt'
    image = next((tmp_path / 'data/cat').iterdir())
    scores = run('tf_test.py', image, graph, labels, cwd=tmp_path).stdout
    assert sorted(line.split(' (score = ')[0] for line in scores.splitlines()) == ['cat', 'dog']
    frozen = tf_retrain.tf.compat.v1.GraphDef.FromString((tmp_path / graph).read_bytes())
    assert len(frozen.node) == 997

    paths = sorted((tmp_path / 'data/dog').iterdir())[:20]
    cached = [f'{tmp_path}/bottlenecks/dog/{path.name}.txt' for path in paths]
    found, fingerprints = tf_retrain.read_bottlenecks(cached, 2048)
    assert (fingerprints >= 0).all()
    unfolded = load_backbone(stand_in).graph_def
    images = [path.read_bytes() for path in paths]
    expected = np.concatenate(run_v1_on_all(unfolded, images, 'pool_3/_reshape:0'))
    largest = np.abs(expected).max(axis=1, keepdims=True)
    assert np.abs(found - expected).max(initial=0) <= 1e-5 * largest.min()


def test_flowers_reach_the_accuracy_of_the_original(stand_in, tmp_path):
    """The original reaches 91.1 % on the bottlenecks that it wrote itself."""
    subprocess.run(
        [sys.executable, str(SHARED / 'data/unpack_flowers.py'), '.'], cwd=tmp_path, check=True
    )
    arguments = [
        '--image_dir=flower_photos',
        '--bottleneck_dir=bottlenecks',
        f'--model_dir={stand_in}',
    ]
    outputs = [
        '--output_graph=g.pb',
        '--output_labels=l.txt',
        '--summaries_dir=logs',
        '--random_seed=0',
    ]
    out = run('tf_retrain.py', *arguments, *outputs, cwd=tmp_path).stdout
    assert 'Creating bottleneck' not in out
    accuracy, number = re.search(r'Final test accuracy = (.+)% \(N=(\d+)\)', out).groups()
    assert number == '353'
    assert float(accuracy) >= 90
    assert (tmp_path / 'l.txt').read_text() == 'daisy\ndandelion\nroses\nsunflowers\ntulips\n'
    events = sum(path.stat().st_size for path in (tmp_path / 'logs').rglob('events.*'))
    assert 1e6 < events < 10e6
