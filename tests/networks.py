"""Networks with the ops, names, wiring and version of the published ones, and random weights."""

import numpy as np

import tf_retrain

tf = tf_retrain.tf
AttrValue = tf.compat.v1.AttrValue

FIELDS = {bool: 'b', int: 'i', float: 'f', bytes: 's'}  # of an AttrValue
HALF = 2, b'VALID'  # stride and padding of a convolution that halves width and height
VALID = 1, b'VALID'


def make_attribute(value):
    """Returns the AttrValue of a type, a number, bytes, or a list of numbers or bytes."""
    if isinstance(value, AttrValue):
        return value
    if isinstance(value, tf.DType):
        return AttrValue(type=value.as_datatype_enum)
    if isinstance(value, list):
        values = {FIELDS[type(value[0])]: value}
        return AttrValue(list=AttrValue.ListValue(**values))
    return AttrValue(**{FIELDS[type(value)]: value})


class GraphBuilder:
    """Appends nodes to a GraphDef, and remembers how many channels each has.

    The producer version stays 0, as that of the graph of 2015 is.
    """

    def __init__(self):
        self.graph_def = tf.compat.v1.GraphDef()
        self.rng = np.random.default_rng(0)
        self.channels = {}

    def add(self, name, op, *inputs, **attributes):
        node = self.graph_def.node.add(name=name, op=op, input=inputs)
        for key, value in attributes.items():
            node.attr[key].CopyFrom(make_attribute(value))
        return name

    def node(self, name, op, *inputs, **attributes):
        """Appends a node that works on float32."""
        return self.add(name, op, *inputs, T=tf.float32, **attributes)

    def const(self, name, value):
        tensor = tf.make_tensor_proto(value)
        dtype = AttrValue(type=tensor.dtype)
        return self.add(name, 'Const', dtype=dtype, value=AttrValue(tensor=tensor))

    def numbers(self, name, shape):
        """Appends an array of ints."""
        return self.const(name, np.array(shape, np.int32))

    def weights(self, name, height, width, depth, filters):
        """Appends weights that keep the spread of what they are multiplied with."""
        stddev = np.sqrt(2 / (height * width * depth))
        return self.const(
            name, np.float32(self.rng.normal(0, stddev, [height, width, depth, filters]))
        )

    def image(self):
        """Appends what makes an image of -1..1 and 299 x 299 pixels of a JPEG file's bytes."""
        contents = self.const('DecodeJpeg/contents', b'')
        jpeg = {'channels': 3, 'ratio': 1, 'fancy_upscaling': True}
        jpeg |= {'try_recover_truncated': False, 'acceptable_fraction': 1.0}
        self.add('DecodeJpeg', 'DecodeJpeg', contents, **jpeg)
        self.add('Cast', 'Cast', 'DecodeJpeg', SrcT=tf.uint8, DstT=tf.float32)
        self.node('ExpandDims', 'ExpandDims', 'Cast', self.numbers('ExpandDims/dim', 0))
        size = self.numbers('ResizeBilinear/size', [299, 299])
        self.node('ResizeBilinear', 'ResizeBilinear', 'ExpandDims', size)
        self.node('Sub', 'Sub', 'ResizeBilinear', self.const('Sub/y', np.float32(128)))
        self.channels['Mul'] = 3
        return self.node('Mul', 'Mul', 'Sub', self.const('Mul/y', np.float32(1 / 128)))

    def conv(
        self, name, source, height, width, filters, stride=1, padding=b'SAME', scale_after=False
    ):
        """Appends a convolution, its batch norm, the check of its numbers, and a Relu."""
        weights = self.weights(
            f'{name}/conv2d_params', height, width, self.channels[source], filters
        )
        window = {'strides': [1, stride, stride, 1], 'padding': padding, 'use_cudnn_on_gpu': True}
        x = self.node(f'{name}/Conv2D', 'Conv2D', source, weights, **window)
        norm = self.batch_norm(f'{name}/batchnorm', x, filters, scale_after)
        check = f'{name}/CheckNumerics'
        self.node(check, 'CheckNumerics', norm, message=b'batchnorm')
        x = self.node(f'{name}/control_dependency', 'Identity', norm, f'^{check}')
        self.channels[name] = filters
        return self.node(name, 'Relu', x)

    def batch_norm(self, name, source, filters, scale_after):
        statistics = {
            'moving_mean': self.rng.normal(0, 0.1, filters),
            'moving_variance': self.rng.uniform(0.5, 1.5, filters),
            'beta': self.rng.normal(0, 0.1, filters),
            'gamma': self.rng.uniform(0.5, 1.5, filters),
        }
        inputs = [self.const(f'{name}/{key}', np.float32(of)) for key, of in statistics.items()]
        options = {'variance_epsilon': 0.001, 'scale_after_normalization': scale_after}
        return self.node(name, 'BatchNormWithGlobalNormalization', source, *inputs, **options)

    def pool(self, name, source, op='MaxPool', size=3, stride=2, padding=b'VALID'):
        self.channels[name] = self.channels[source]
        window = {'ksize': [1, size, size, 1], 'strides': [1, stride, stride, 1]}
        return self.node(name, op, source, padding=padding, **window)

    def tower(self, scope, source, *convs):
        """Appends convolutions, one after the other: conv, conv_1, conv_2 ..."""
        for index, conv in enumerate(convs):
            name = f'{scope}/conv_{index}' if index else f'{scope}/conv'
            source = self.conv(name, source, *conv)
        return source

    def pool_tower(self, scope, source, filters, op='AvgPool'):
        pool = self.pool(f'{scope}/pool', source, op, 3, 1, b'SAME')
        return self.tower(scope, pool, (1, 1, filters))

    def join(self, scope, *sources):
        axis = self.numbers(f'{scope}/join/concat_dim', 3)
        name = self.node(f'{scope}/join', 'Concat', axis, *sources, N=len(sources))
        self.channels[name] = sum(self.channels[source] for source in sources)
        return name

    def bottleneck(self, source, size):
        """Appends the average of all size x size cells, as a row of numbers."""
        pool = self.pool('pool_3', source, 'AvgPool', size, 1)
        shape = self.numbers('pool_3/_reshape/shape', [1, 2048])
        return self.node('pool_3/_reshape', 'Reshape', pool, shape)

    def softmax_weights(self, classes):
        values = self.rng.normal(0, 0.03, [2048, classes])
        return self.const('softmax/weights', np.float32(values))


def build_model():
    """Returns the small model: JPEG bytes in, 2,048 numbers and the old softmax out.

    It takes a millisecond an image.
    """
    g = GraphBuilder()
    x = g.conv('conv', g.image(), 16, 16, 8, 16, b'VALID', scale_after=True)
    x = g.pool('pool', x, stride=3)
    x = g.join('mixed', g.conv('mixed/conv', x, 1, 1, 16), g.conv('mixed/tower/conv', x, 3, 3, 16))
    x = g.bottleneck(g.conv('mixed_10/conv', x, 1, 1, 2048), 6)
    x = g.node('softmax/logits', 'MatMul', x, g.softmax_weights(10))
    g.node('softmax', 'Softmax', x)
    return g.graph_def


def build_inception():
    """Returns a graph of the size and structure of the file of 2015: 994 nodes, 96 MB."""
    g = GraphBuilder()
    x = g.conv('conv', g.image(), 3, 3, 32, *HALF)
    x = g.conv('conv_1', x, 3, 3, 32, *VALID)
    x = g.pool('pool', g.conv('conv_2', x, 3, 3, 64))
    x = g.conv('conv_3', x, 1, 1, 80, *VALID)
    x = g.pool('pool_1', g.conv('conv_4', x, 3, 3, 192, *VALID))
    for scope, pooled in (('mixed', 32), ('mixed_1', 64), ('mixed_2', 64)):
        x = add_cells_of_35(g, scope, x, pooled)
    conv = g.tower('mixed_3', x, (3, 3, 384, *HALF))
    tower = g.tower('mixed_3/tower', x, (1, 1, 64), (3, 3, 96), (3, 3, 96, *HALF))
    x = g.join('mixed_3', conv, tower, g.pool('mixed_3/pool', x))
    for scope, wide in (('mixed_4', 128), ('mixed_5', 160), ('mixed_6', 160), ('mixed_7', 192)):
        x = add_cells_of_17(g, scope, x, wide)
    tower = g.tower('mixed_8/tower', x, (1, 1, 192), (3, 3, 320, *HALF))
    convs = (1, 1, 192), (1, 7, 192), (7, 1, 192), (3, 3, 192, *HALF)
    tower_1 = g.tower('mixed_8/tower_1', x, *convs)
    x = g.join('mixed_8', tower, tower_1, g.pool('mixed_8/pool', x))
    for scope, op in (('mixed_9', 'AvgPool'), ('mixed_10', 'MaxPool')):
        x = add_cells_of_8(g, scope, x, op)
    x, weights = g.bottleneck(x, 8), g.softmax_weights(1008)
    x = g.node('softmax/logits/MatMul', 'MatMul', x, weights, transpose_a=False, transpose_b=False)
    biases = g.const('softmax/biases', np.zeros(1008, np.float32))
    g.node('softmax', 'Softmax', g.node('softmax/logits', 'BiasAdd', x, biases))
    return g.graph_def


def add_cells_of_35(g, scope, x, pooled):
    """Appends a module of 35 x 35 cells."""
    conv = g.tower(scope, x, (1, 1, 64))
    tower = g.tower(f'{scope}/tower', x, (1, 1, 48), (5, 5, 64))
    tower_1 = g.tower(f'{scope}/tower_1', x, (1, 1, 64), (3, 3, 96), (3, 3, 96))
    return g.join(scope, conv, tower, tower_1, g.pool_tower(f'{scope}/tower_2', x, pooled))


def add_cells_of_17(g, scope, x, wide):
    """Appends a module of 17 x 17 cells."""
    conv = g.tower(scope, x, (1, 1, 192))
    tower = g.tower(f'{scope}/tower', x, (1, 1, wide), (1, 7, wide), (7, 1, 192))
    convs = (1, 1, wide), (7, 1, wide), (1, 7, wide), (7, 1, wide), (1, 7, 192)
    tower_1 = g.tower(f'{scope}/tower_1', x, *convs)
    return g.join(scope, conv, tower, tower_1, g.pool_tower(f'{scope}/tower_2', x, 192))


def add_cells_of_8(g, scope, x, op):
    """Appends a module of 8 x 8 cells, two of whose towers end in two convolutions side by side."""
    ends = [g.tower(scope, x, (1, 1, 320))]
    for name, convs in (('tower', [(1, 1, 384)]), ('tower_1', [(1, 1, 448), (3, 3, 384)])):
        tower = g.tower(f'{scope}/{name}', x, *convs)
        ends.append(g.conv(f'{scope}/{name}/mixed/conv', tower, 1, 3, 384))
        ends.append(g.conv(f'{scope}/{name}/mixed/conv_1', tower, 3, 1, 384))
    return g.join(scope, *ends, g.pool_tower(f'{scope}/tower_2', x, 192, op))


class MobilenetBuilder(GraphBuilder):
    """Appends what the frozen MobileNets of 2017 consist of."""

    def read(self, name):
        """Appends the node that reads a weight."""
        return self.node(f'{name}/read', 'Identity', name, _class=[f'loc:@{name}'.encode()])

    def kernel(self, name, *shape):
        return self.read(self.weights(name, *shape))

    def vector(self, name, size):
        values = np.abs(self.rng.normal(1, 0.1, size))
        return self.read(self.const(name, np.float32(values)))

    def layer(self, name, op, source, weights, filters, stride):
        """Appends a convolution, its batch norm, and a Relu6."""
        strides = [1, stride, stride, 1]
        x = self.node(f'{name}/convolution', op, source, weights, strides=strides, padding=b'SAME')
        keys = 'moving_mean', 'moving_variance', 'beta', 'gamma'
        mean, variance, beta, gamma = (
            self.vector(f'{name}/BatchNorm/{key}', filters) for key in keys
        )
        norm = f'{name}/BatchNorm/batchnorm'
        x = self.node(f'{norm}/mul_1', 'Mul', x, f'{norm}/mul')
        x = self.node(f'{norm}/add_1', 'Add', x, f'{norm}/sub')
        epsilon = self.const(f'{norm}/add/y', np.float32(0.001))
        self.node(f'{norm}/add', 'Add', variance, epsilon)
        self.node(f'{norm}/Rsqrt', 'Rsqrt', f'{norm}/add')
        self.node(f'{norm}/mul', 'Mul', f'{norm}/Rsqrt', gamma)
        self.node(f'{norm}/mul_2', 'Mul', mean, f'{norm}/mul')
        self.node(f'{norm}/sub', 'Sub', beta, f'{norm}/mul_2')
        self.channels[f'{name}/Relu6'] = filters
        return self.node(f'{name}/Relu6', 'Relu6', x)


def build_mobilenet(side):
    """Returns a small network with the names, ops and layout of the published MobileNet v1."""
    g = MobilenetBuilder()
    shape = tf.TensorShape([1, side, side, 3]).as_proto()
    g.add('input', 'Placeholder', dtype=tf.float32, shape=AttrValue(shape=shape))
    scope = 'MobilenetV1/Conv2d_0'
    kernel = g.kernel(f'{scope}/weights', 8, 8, 3, 16)
    x = g.layer(scope, 'Conv2D', 'input', kernel, 16, 8)
    scope = 'MobilenetV1/Conv2d_1_depthwise'
    kernel = g.kernel(f'{scope}/depthwise_weights', 3, 3, 16, 1)
    x = g.layer(scope, 'DepthwiseConv2dNative', x, kernel, 16, 1)
    x = g.pool('MobilenetV1/Logits/AvgPool_1a/AvgPool', x, 'AvgPool', side // 8)
    scope = 'MobilenetV1/Logits/Conv2d_1c_1x1'
    kernel = g.kernel(f'{scope}/weights', 1, 1, 16, 1001)
    window = {'strides': [1, 1, 1, 1], 'padding': b'SAME'}
    x = g.node(f'{scope}/convolution', 'Conv2D', x, kernel, **window)
    biases = g.vector('MobilenetV1/Logits/biases', 1001)
    x = g.node(f'{scope}/BiasAdd', 'BiasAdd', x, biases)
    x = g.node('MobilenetV1/Logits/SpatialSqueeze', 'Squeeze', x, squeeze_dims=[1, 2])
    scope = 'MobilenetV1/Predictions'
    x = g.node(f'{scope}/Reshape', 'Reshape', x, g.numbers(f'{scope}/Reshape/shape', [-1, 1001]))
    g.node(f'{scope}/Softmax', 'Softmax', x)
    # The published graphs are not in topological order either.
    return tf.compat.v1.GraphDef(node=reversed(g.graph_def.node))


def write_mobilenet(model_dir, size):
    """Writes the small MobileNet v1 as the one of a size, such as '0.25_128'; returns its path."""
    graph_def = build_mobilenet(int(size.split('_')[1]))
    path = model_dir / f'mobilenet_v1_{size}' / 'frozen_graph.pb'
    path.parent.mkdir(parents=True)
    path.write_bytes(graph_def.SerializeToString())
    return path
