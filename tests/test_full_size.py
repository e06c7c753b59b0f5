"""A network of the size of the published one, real photographs and real bottlenecks."""

import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from helpers import SHARED, created, label_images, read_cache, run_v1_on_all
from networks import build_inception

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SHARED / 'data').exists(), reason='there is no ../shared'),
]


def test_cats_and_dogs(job):
    """From the archive to the label of an image; bottlenecks equal those of the published ops."""
    for label in ('cat', 'dog'):
        (job.data / label).mkdir(parents=True)
        for path in sorted((SHARED / 'data/cats_dogs_sample' / label).iterdir())[:20]:
            shutil.copy(path, job.data / label)
    network = build_inception()
    (job.folder / 'full_size').mkdir()
    (job.folder / 'graph').write_bytes(network.SerializeToString())
    archive = job.folder / 'full_size/inception-2015-12-05.tgz'
    with tarfile.open(archive, 'w:gz', compresslevel=0) as tar:
        tar.add(job.folder / 'graph', 'classify_image_graph_def.pb')

    out = job.main(model_dir='full_size/', how_many_training_steps='100')
    assert len(created(out)) == 40
    count = len(job.test_images())
    assert re.search(rf'Final test accuracy = \d+\.\d% \(N={count}\)', out)
    assert len(job.graph().node) == 998 + 19  # and the familiarity

    paths = sorted((job.data / 'dog').iterdir())
    assert label_images(job.folder, paths[:1]).shape == (1, 2)
    found = np.array([read_cache(job.cache_file(f'dog/{path.name}')) for path in paths])
    images = [path.read_bytes() for path in paths]
    expected = np.concatenate(run_v1_on_all(network, images, 'pool_3/_reshape:0'))
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max(axis=1).min())


def test_flowers_reach_the_accuracy_of_the_original(job):
    """The original reaches 91.1 % on the bottlenecks that it wrote itself."""
    unpack = [sys.executable, str(SHARED / 'data/unpack_flowers.py'), str(job.folder)]
    subprocess.run(unpack, check=True)
    out = job.main(image_dir='flower_photos', random_seed='0', how_many_training_steps='4000')
    assert 'Creating bottleneck' not in out
    accuracy, count = re.search(r'Final test accuracy = (.+)% \(N=(\d+)\)', out).groups()
    assert count == '353'
    assert float(accuracy) >= 90
    labels = (job.folder / job.flags['output_labels']).read_text()
    assert labels == 'daisy\ndandelion\nroses\nsunflowers\ntulips\n'
    events = sum(path.stat().st_size for path in (job.folder / 'logs').rglob('events.*'))
    assert 1e6 < events < 10e6
