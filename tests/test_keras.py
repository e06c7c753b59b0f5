"""What Keras exports as a module: the kinds of layers of its applications, at toy size."""

import keras
import numpy as np
from helpers import classify_images, label_images, load_signatures, read_cache, resize
from keras.src.applications import convnext, efficientnet_v2, mobilenet_v3, resnet

from tf_retrain import tf

SIDE = 64
OPTIONS = {'include_top': False, 'weights': None, 'pooling': 'avg'}


def create_efficientnet():
    """A fused block, and two with depthwise convolutions and squeeze-and-excitation."""
    blocks = efficientnet_v2.DEFAULT_BLOCKS_ARGS['efficientnetv2-b0']
    blocks = [{**blocks[1], 'num_repeat': 1}, {**blocks[5], 'num_repeat': 2}]
    name = 'efficientnetv2-b0'  # the networks of this name normalize each channel
    return efficientnet_v2.EfficientNetV2(0.1, 1, SIDE, blocks_args=blocks, name=name, **OPTIONS)


def create_mobilenet():
    """Inverted residual blocks, one of them with squeeze-and-excitation and hard swish."""

    def stack(x, kernel, activation, ratio):
        block = mobilenet_v3._inverted_res_block
        x = block(x, 1, 16, 3, 1, None, mobilenet_v3.relu, 0)
        return block(x, 3, 24, kernel, 2, ratio, activation, 1)

    return mobilenet_v3.MobileNetV3(stack, 16, **OPTIONS)


def create_convnext():
    """Grouped convolutions, layer normalization, GELU and layer scale."""
    return convnext.ConvNeXt([1, 1, 1, 1], [8, 8, 16, 24], **OPTIONS)


def create_resnet():
    """Two residual blocks that begin with a batch norm."""
    stack = resnet.stack_residual_blocks_v2
    return resnet.ResNet(lambda x: stack(x, 8, 2, name='conv2'), True, True, **OPTIONS)


NETWORKS = [  # with what turns pixels from 0 to 1 into those that the network wants
    (create_efficientnet, (255, 0)),
    (create_mobilenet, (255, 0)),
    (create_convnext, (255, 0)),
    (create_resnet, (2, -1)),
]


def test_networks_of_keras(job):
    """Four networks, exported as inception/README.md shows: trained, labeled, served."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    pixels = keras.Input([SIDE, SIDE, 3])
    features = []
    for create, scaling in NETWORKS:
        network = create()
        # Untrained batch norms and layer scales do next to nothing.
        for variable in network.weights:
            if len(variable.shape) == 1 and variable.dtype == 'float32':
                variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        features.append(network(keras.layers.Rescaling(*scaling)(pixels)))
    keras.Model(pixels, keras.layers.Concatenate()(features)).export(
        str(job.folder / 'module'), verbose=False
    )
    flags = ['--tfhub_module=module', '--saved_model_dir=saved/1', '--how_many_training_steps=3']
    job.photographs(cat=20, dog=20).run(*flags, script='retrain_serving.py')

    images = job.test_images()
    caches = [job.cache_file(f'{image.relative_to(job.data)}_module') for image in images]
    bottlenecks = np.stack([read_cache(cache) for cache in caches])
    *ends, size = np.cumsum([feature.shape[1] for feature in features])
    assert bottlenecks.shape[1] == size
    resized = np.concatenate([resize(image, [SIDE, SIDE]) for image in images]) / 255
    expected = keras.Model(pixels, features)(resized)
    for ours, theirs in zip(np.split(bottlenecks, ends, axis=1), expected, strict=True):
        spread = np.ptp(theirs, axis=0).max()
        assert spread > 1e-3 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * spread)

    scores = label_images(job.folder, images)
    assert np.ptp(scores) > 0.01
    signatures = load_signatures(job.folder)
    np.testing.assert_allclose(classify_images(signatures, images), scores, atol=1e-5)
    rows = signatures['predict_rows'](image=tf.constant([path.read_bytes() for path in images]))
    best_first = np.argsort(-scores)
    np.testing.assert_array_equal(rows['labels'], np.array([b'cat', b'dog'])[best_first])
    expected = np.take_along_axis(scores, best_first, 1)
    np.testing.assert_allclose(rows['scores'], expected, atol=1e-5)
