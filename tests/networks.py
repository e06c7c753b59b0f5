"""Networks with the ops, names, wiring and version of the published ones, and random weights."""

import functools

import numpy as np

import tf_retrain

tf = tf_retrain.tf

HALF = 2, 'VALID'  # stride and padding of a convolution that halves width and height
VALID = 1, 'VALID'

# What files of 2015 say of an op, although it is the default.
DEFAULTS = {
    'DecodeJpeg': {
        'ratio': {'i': 1},
        'fancy_upscaling': {'b': True},
        'try_recover_truncated': {'b': False},
        'acceptable_fraction': {'f': 1},
    },
    'Conv2D': {'use_cudnn_on_gpu': {'b': True}},
    'MatMul': {'transpose_a': {'b': False}, 'transpose_b': {'b': False}},
}


def exported(add):
    """Makes a function that adds ops to a graph return the graph, without what is newer than it.

    The producer version is 0, as that of the graph of 2015 is.
    """

    @functools.wraps(add)
    def build(*arguments):
        with tf.Graph().as_default():
            # Graphs of this version may have the batch norms of 2015.
            tf.graph_util.import_graph_def(tf.compat.v1.GraphDef(versions={'producer': 8}))
            add(*arguments)
            meta_graph = tf.compat.v1.train.export_meta_graph(strip_default_attrs=True)
        for node in meta_graph.graph_def.node:
            for key in ('_output_shapes', '_has_manual_control_dependencies'):
                node.attr.pop(key, None)
            for key, value in DEFAULTS.get(node.op, {}).items():
                node.attr[key].CopyFrom(tf.compat.v1.AttrValue(**value))
        meta_graph.graph_def.ClearField('versions')
        return meta_graph.graph_def

    return build


def add_numbers(name, low, high, *shape):
    """Adds random numbers, which depend on nothing but their name."""
    full_name = f'{tf.get_current_name_scope()}/{name}'
    rng = np.random.default_rng([*full_name.encode()])
    return tf.constant(rng.uniform(low, high, shape), tf.float32, name=name)


def add_weights(name, *shape):
    """Adds weights that keep the spread of what they are multiplied with."""
    limit = np.sqrt(6 / np.prod(shape[:3]))
    return add_numbers(name, -limit, limit, *shape)


# Inception. Of several scopes or ops with one name, TensorFlow numbers the later ones.


def add_image():
    """Adds what makes an image of -1..1 and 299 x 299 pixels of a JPEG file's bytes."""
    contents = tf.constant(b'', name='DecodeJpeg/contents')
    x = tf.cast(tf.io.decode_jpeg(contents, 3), tf.float32)
    x = tf.compat.v1.image.resize_bilinear(tf.expand_dims(x, 0), [299, 299])
    return tf.multiply(tf.subtract(x, 128), 1 / 128)


def add_conv(x, height, width, filters, stride=1, padding='SAME', scale_after=False):
    """Adds a convolution, its batch norm, the check of its numbers, and a Relu."""
    with tf.name_scope('conv') as scope:
        weights = add_weights('conv2d_params', height, width, x.shape[3], filters)
        x = tf.raw_ops.BatchNormWithGlobalNormalization(
            t=tf.nn.conv2d(x, weights, stride, padding),
            m=add_numbers('batchnorm/moving_mean', -0.2, 0.2, filters),
            v=add_numbers('batchnorm/moving_variance', 0.5, 1.5, filters),
            beta=add_numbers('batchnorm/beta', -0.2, 0.2, filters),
            gamma=add_numbers('batchnorm/gamma', 0.5, 1.5, filters),
            variance_epsilon=0.001,
            scale_after_normalization=scale_after,
            name='batchnorm',
        )
        with tf.control_dependencies([tf.debugging.check_numerics(x, 'batchnorm')]):
            x = tf.identity(x, 'control_dependency')
        return tf.nn.relu(x, scope)


def add_tower(x, *convs, pool=None):
    """Adds convolutions, one after the other, and before them perhaps a pooling."""
    with tf.name_scope('tower'):
        if pool:
            x = pool(x, 3, 1, 'SAME', name='pool')
        for conv in convs:
            x = add_conv(x, *conv)
        return x


def halve(x):
    return tf.nn.max_pool2d(x, 3, 2, 'VALID', name='pool')


def join(*towers):
    return tf.raw_ops.Concat(concat_dim=3, values=towers, name='join')


def add_bottleneck(x, size):
    """Adds the average of all size x size cells, as a row of numbers."""
    x = tf.nn.avg_pool2d(x, size, 1, 'VALID', name='pool_3')
    return tf.reshape(x, [1, 2048], name='pool_3/_reshape')


def add_softmax_weights(classes):
    return add_numbers('softmax/weights', -0.05, 0.05, 2048, classes)


@exported
def build_model():
    """Returns the small model: JPEG bytes in, 2,048 numbers and the old softmax out.

    It takes a millisecond an image.
    """
    x = add_conv(add_image(), 16, 16, 8, 16, 'VALID', scale_after=True)
    x = tf.nn.max_pool2d(x, 3, 3, 'VALID', name='pool')
    with tf.name_scope('mixed'):
        x = join(add_conv(x, 1, 1, 16), add_tower(x, (3, 3, 16)))
    with tf.name_scope('mixed_10'):
        x = add_conv(x, 1, 1, 2048)
    x = tf.matmul(add_bottleneck(x, 6), add_softmax_weights(10), name='softmax/logits')
    tf.nn.softmax(x, name='softmax')


@exported
def build_inception():
    """Returns a graph of the size and structure of the file of 2015: 994 nodes, 96 MB."""
    x = add_conv(add_image(), 3, 3, 32, *HALF)
    x = add_conv(x, 3, 3, 32, *VALID)
    x = halve(add_conv(x, 3, 3, 64))
    x = add_conv(x, 1, 1, 80, *VALID)
    x = halve(add_conv(x, 3, 3, 192, *VALID))
    for pooled in (32, 64, 64):
        x = add_cells_of_35(x, pooled)
    with tf.name_scope('mixed'):
        conv = add_conv(x, 3, 3, 384, *HALF)
        tower = add_tower(x, (1, 1, 64), (3, 3, 96), (3, 3, 96, *HALF))
        x = join(conv, tower, halve(x))
    for wide in (128, 160, 160, 192):
        x = add_cells_of_17(x, wide)
    with tf.name_scope('mixed'):
        tower = add_tower(x, (1, 1, 192), (3, 3, 320, *HALF))
        tower_1 = add_tower(x, (1, 1, 192), (1, 7, 192), (7, 1, 192), (3, 3, 192, *HALF))
        x = join(tower, tower_1, halve(x))
    x = add_cells_of_8(x, tf.nn.avg_pool2d)
    x = add_bottleneck(add_cells_of_8(x, tf.nn.max_pool2d), 8)
    x = tf.matmul(x, add_softmax_weights(1008), name='softmax/logits/MatMul')
    biases = add_numbers('softmax/biases', 0, 0, 1008)
    tf.nn.softmax(tf.nn.bias_add(x, biases, name='softmax/logits'), name='softmax')


def add_cells_of_35(x, pooled):
    """Adds a module of 35 x 35 cells."""
    with tf.name_scope('mixed'):
        return join(
            add_conv(x, 1, 1, 64),
            add_tower(x, (1, 1, 48), (5, 5, 64)),
            add_tower(x, (1, 1, 64), (3, 3, 96), (3, 3, 96)),
            add_tower(x, (1, 1, pooled), pool=tf.nn.avg_pool2d),
        )


def add_cells_of_17(x, wide):
    """Adds a module of 17 x 17 cells."""
    convs = (1, 1, wide), (7, 1, wide), (1, 7, wide), (7, 1, wide), (1, 7, 192)
    with tf.name_scope('mixed'):
        return join(
            add_conv(x, 1, 1, 192),
            add_tower(x, (1, 1, wide), (1, 7, wide), (7, 1, 192)),
            add_tower(x, *convs),
            add_tower(x, (1, 1, 192), pool=tf.nn.avg_pool2d),
        )


def add_forked_tower(x, *convs):
    """Adds convolutions, and after them two side by side, which are returned."""
    with tf.name_scope('tower'):
        for conv in convs:
            x = add_conv(x, *conv)
        with tf.name_scope('mixed'):
            return add_conv(x, 1, 3, 384), add_conv(x, 3, 1, 384)


def add_cells_of_8(x, pool):
    """Adds a module of 8 x 8 cells."""
    with tf.name_scope('mixed'):
        return join(
            add_conv(x, 1, 1, 320),
            *add_forked_tower(x, (1, 1, 384)),
            *add_forked_tower(x, (1, 1, 448), (3, 3, 384)),
            add_tower(x, (1, 1, 192), pool=pool),
        )


# MobileNet

# What is added is small, or it would be most of a bottleneck, and all images would be alike.
SMALL = -0.02, 0.02
NEAR_1 = 0.8, 1.2


def read(weights):
    """Adds the node that reads weights, and has to be where they are."""
    with tf.compat.v1.colocate_with(weights):
        # The slash says that the name is whole.
        return tf.identity(weights, f'{weights.op.name}/read/')


def add_layer(x, convolve, weights, stride):
    """Adds a convolution, its batch norm, and a Relu6."""
    x = convolve(x, read(weights), [1, stride, stride, 1], 'SAME', name='convolution')
    ranges = {'moving_mean': SMALL, 'moving_variance': NEAR_1, 'beta': SMALL, 'gamma': NEAR_1}
    with tf.name_scope('BatchNorm'):
        statistics = [read(add_numbers(key, *of, x.shape[3])) for key, of in ranges.items()]
        x = tf.nn.batch_normalization(x, *statistics, 0.001)
    return tf.nn.relu6(x)


@exported
def build_mobilenet(side):
    """Returns a small network with the names, ops and layout of the published MobileNet v1."""
    x = tf.compat.v1.placeholder(tf.float32, [1, side, side, 3], 'input')
    with tf.name_scope('MobilenetV1/Conv2d_0'):
        x = add_layer(x, tf.nn.conv2d, add_weights('weights', 8, 8, 3, 16), 8)
    with tf.name_scope('MobilenetV1/Conv2d_1_depthwise'):
        weights = add_weights('depthwise_weights', 3, 3, 16, 1)
        x = add_layer(x, tf.compat.v1.nn.depthwise_conv2d_native, weights, 1)
    with tf.name_scope('MobilenetV1/Logits'):
        x = tf.nn.avg_pool2d(x, side // 8, 2, 'VALID', name='AvgPool_1a/AvgPool')
        biases = read(add_numbers('biases', *SMALL, 1001))
        with tf.name_scope('Conv2d_1c_1x1'):
            weights = read(add_weights('weights', 1, 1, 16, 1001))
            x = tf.nn.bias_add(tf.nn.conv2d(x, weights, 1, 'SAME', name='convolution'), biases)
        x = tf.squeeze(x, [1, 2], 'SpatialSqueeze')
    with tf.name_scope('MobilenetV1/Predictions'):
        tf.nn.softmax(tf.reshape(x, [-1, 1001]))


def write_mobilenet(model_dir, size):
    """Writes the small MobileNet v1 as the one of a size, such as '0.25_128'; returns its path."""
    graph_def = build_mobilenet(int(size.split('_')[1]))
    for node in graph_def.node:
        node.op = node.op.replace('AddV2', 'Add')  # that of 2017
    # The published graphs are not in topological order either.
    nodes = reversed(graph_def.node)
    path = model_dir / f'mobilenet_v1_{size}' / 'frozen_graph.pb'
    path.parent.mkdir(parents=True)
    path.write_bytes(tf.compat.v1.GraphDef(node=nodes).SerializeToString())
    return path


def save_function(path, function):
    """Saves a module that gives function(images) for images of 8 x 8 pixels."""
    module = tf.Module()
    module.__call__ = tf.function(function, input_signature=[tf.TensorSpec([None, 8, 8, 3])])
    module.__call__.get_concrete_function()
    tf.saved_model.save(module, str(path))
