"""NASNet-A and PNASNet-5 from their cells: stem, cells, head, in plain TensorFlow operations.

One builder makes every network of `models.catalog`, for inference and for training, over
variables that somebody else holds, under the names of TF-Slim. So the same code is traced into a
TF2 SavedModel, drawn into a TF1 graph, and asked for its variables' shapes.

NASNet-A: Zoph et al. 2018, arXiv:1707.07012. PNASNet-5: Liu et al. 2018, arXiv:1712.00559. Layers
and hyper-parameters are TF-Slim's; its auxiliary head is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from models.catalog import Head, NetworkSpec, Place
from models.cells import NONE, Branch, Operation
from models.runtime import tf

BATCH_NORM_EPSILON = 1e-3
BATCH_NORM_MOMENTUM = 0.99  # of the published hub modules; Slim trained with 0.9997
DROPOUT_RATE = 0.5

Variables = Callable[[str, tuple[int, ...]], tf.Variable]
"""Gives the variable of a Slim name (no ":0") and shape."""


class Network(NamedTuple):
    """A network that was built.

    `end_points` are Slim's, by name: Stem, Cell_i and Reduction_Cell_i [N, h, w, c], global_pool
    [N, F] (the features), and with a classification head Logits and Predictions (softmax) [N, C];
    all float32. `updates` are (moving statistic, its next value), empty for inference.
    """

    end_points: dict[str, tf.Tensor]
    updates: list[tuple[tf.Variable, tf.Tensor]]


def build(
    spec: NetworkSpec,
    head: Head,
    variables: Variables,
    images: tf.Tensor,
    training: bool = False,
    batch_norm_momentum: float | tf.Tensor = BATCH_NORM_MOMENTUM,
) -> Network:
    """Build `spec` on `images`, float32 [N, S, S, 3] in [0, 1], with S = `spec.image_size`.

    Where `training`, batch norm takes the batch's statistics, and drop path (at its final, maximal
    probability) and dropout are at work; moving statistics go to
    `momentum * moving + (1 - momentum) * batch` once the caller applies the `updates`.

    Raises ValueError where the images' static shape is another.
    """
    images.shape.assert_is_compatible_with([None, spec.image_size, spec.image_size, 3])
    layers = _Layers(variables, training, batch_norm_momentum)
    end_points = {}

    with tf.name_scope("hub_input"):
        net = images * 2.0 - 1.0
    net = layers.conv(net, spec.conv0_filters, "conv0", size=3, stride=2, padding="VALID")
    net = layers.batch_norm(net, "conv0_bn")
    outputs = [None, net]
    for place in spec.places():
        with tf.name_scope(place.scope):
            net = layers.cell(net, outputs[place.previous], place)
        outputs.append(net)
        if place.scope == "cell_stem_1":
            end_points["Stem"] = net
        elif place.scope != "cell_stem_0":
            end_points[place.scope.title()] = net

    with tf.name_scope("final_layer"):
        net = tf.reduce_mean(tf.nn.relu(net), axis=[1, 2])
        end_points["global_pool"] = net
        if head == "classification":
            if training:
                net = tf.nn.dropout(net, rate=DROPOUT_RATE)
            net = layers.fully_connected(net, spec.num_classes, "final_layer/FC")
            end_points["Logits"] = net
            end_points["Predictions"] = tf.nn.softmax(net)
    return Network(end_points, layers.updates)


def default_end_point(head: Head) -> str:
    """The name of the end point that a model with this head returns."""
    return "Logits" if head == "classification" else "global_pool"


def variable_shapes(spec: NetworkSpec, head: Head) -> dict[str, tuple[int, ...]]:
    """Slim's name (no ":0") and shape of every variable, in the order of creation.

    The moving statistics are among them, the auxiliary head's variables are not.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, shape: tuple[int, ...]) -> tf.Tensor:
        shapes[name] = shape
        return tf.compat.v1.placeholder(tf.float32, shape)

    with tf.Graph().as_default():
        build(spec, head, note, tf.compat.v1.placeholder(tf.float32, image_shape(spec)))
    return shapes


def image_shape(spec: NetworkSpec) -> list[int | None]:
    """The shape of a batch of images: [None, S, S, 3]."""
    return [None, spec.image_size, spec.image_size, 3]


def is_trainable(name: str) -> bool:
    """Whether the variable `name` is trained; batch norm's moving statistics are not."""
    return not name.endswith(("/moving_mean", "/moving_variance"))


def is_kernel(name: str) -> bool:
    """Whether the variable `name` is a kernel: those, depthwise ones too, have an L2 loss."""
    return name.endswith("weights")


def l2_loss(spec: NetworkSpec, kernel: tf.Variable) -> tf.Tensor:
    """The regularization loss of one kernel, a scalar: `weight_decay * sum(kernel**2) / 2`."""
    return spec.weight_decay * tf.nn.l2_loss(kernel)


@dataclass
class _Layers:
    """Slim's layers: each asks for its variables under the scope that it is given."""

    variables: Variables
    training: bool
    momentum: float | tf.Tensor
    updates: list[tuple[tf.Variable, tf.Tensor]] = field(default_factory=list)

    def conv(
        self,
        x: tf.Tensor,
        filters: int,
        scope: str,
        size: int = 1,
        stride: int = 1,
        padding: str = "SAME",
    ) -> tf.Tensor:
        kernel = self.variables(f"{scope}/weights", (size, size, x.shape[-1], filters))
        return tf.nn.conv2d(x, kernel, stride, padding)

    def fully_connected(self, x: tf.Tensor, width: int, scope: str) -> tf.Tensor:
        weights = self.variables(f"{scope}/weights", (x.shape[-1], width))
        return tf.nn.bias_add(x @ weights, self.variables(f"{scope}/biases", (width,)))

    def batch_norm(self, x: tf.Tensor, scope: str) -> tf.Tensor:
        gamma, beta, mean, variance = (
            self.variables(f"{scope}/{name}", (x.shape[-1],))
            for name in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        y, batch_mean, batch_variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=gamma,
            offset=beta,
            mean=[] if self.training else mean,
            variance=[] if self.training else variance,
            epsilon=BATCH_NORM_EPSILON,
            is_training=self.training,
        )
        if self.training:
            # The operation normalises with the biased batch variance and hands back the unbiased.
            for moving, batch in ((mean, batch_mean), (variance, batch_variance)):
                self.updates.append((moving, batch + self.momentum * (moving - batch)))
        return y

    def squeeze(
        self, x: tf.Tensor, filters: int, scope: str, norm: str, stride: int = 1
    ) -> tf.Tensor:
        """ReLU, 1x1 convolution, batch norm."""
        return self.batch_norm(self.conv(tf.nn.relu(x), filters, scope, stride=stride), norm)

    def separable(
        self, x: tf.Tensor, size: int, filters: int, stride: int, scope: str
    ) -> tf.Tensor:
        """Two stages of ReLU, depthwise, pointwise, batch norm; the first has the stride."""
        for stage, step in ((1, stride), (2, 1)):
            name = f"{size}x{size}_{stage}"
            layer = f"{scope}/separable_{name}"
            channels = x.shape[-1]
            depthwise = self.variables(f"{layer}/depthwise_weights", (size, size, channels, 1))
            pointwise = self.variables(f"{layer}/pointwise_weights", (1, 1, channels, filters))
            x = tf.nn.depthwise_conv2d(tf.nn.relu(x), depthwise, [1, step, step, 1], "SAME")
            x = self.batch_norm(tf.nn.conv2d(x, pointwise, 1, "SAME"), f"{scope}/bn_sep_{name}")
        return x

    def factorized_reduction(self, x: tf.Tensor, filters: int, scope: str) -> tf.Tensor:
        """Halve the height and width: even and odd pixels side by side in the channels."""
        odd = tf.pad(x, [[0, 0], [0, 1], [0, 1], [0, 0]])[:, 1:, 1:, :]
        half = filters // 2
        paths = [
            self.conv(x, half, f"{scope}/path1_conv", stride=2),
            self.conv(odd, filters - half, f"{scope}/path2_conv", stride=2),
        ]
        return self.batch_norm(tf.concat(paths, axis=3), f"{scope}/final_path_bn")

    def adjust(self, previous: tf.Tensor, net: tf.Tensor, filters: int, scope: str) -> tf.Tensor:
        """Give `previous` the width of `net` in pixels, and `filters` channels."""
        if previous.shape[2] != net.shape[2]:
            return self.factorized_reduction(tf.nn.relu(previous), filters, scope)
        if previous.shape[3] != filters:
            return self.squeeze(previous, filters, f"{scope}/prev_1x1", f"{scope}/prev_bn")
        return previous

    def operation(
        self, x: tf.Tensor, operation: Operation, filters: int, stride: int, scope: str
    ) -> tf.Tensor:
        """Apply one branch's operation."""
        kind, size = operation
        if kind == "separable":
            return self.separable(x, size, filters, stride, scope)
        if kind == "identity":
            if stride == 1 and x.shape[-1] == filters:
                return x
            return self.squeeze(x, filters, f"{scope}/1x1", f"{scope}/bn_1", stride)
        pool = tf.nn.max_pool2d if kind == "maximum" else tf.nn.avg_pool2d
        x = pool(x, size, stride, "SAME")
        if x.shape[-1] == filters:
            return x
        return self.batch_norm(self.conv(x, filters, f"{scope}/1x1"), f"{scope}/bn_1")

    def branch(
        self, states: list[tf.Tensor], branch: Branch, place: Place, scope: str
    ) -> tf.Tensor:
        """Apply one branch to its hidden state; only the cell's two inputs are strided."""
        operation, state = branch
        stride = place.stride if state < 2 else 1
        x = self.operation(states[state], operation, place.filters, stride, scope)
        drops = self.training and operation != NONE and place.keep_prob < 1
        return drop_path(x, place.keep_prob) if drops else x

    def cell(self, net: tf.Tensor, previous: tf.Tensor | None, place: Place) -> tf.Tensor:
        """One cell on `net` and the output before it (None: there is none, take `net` itself)."""
        scope, filters = place.scope, place.filters
        second = net if previous is None else self.adjust(previous, net, filters, scope)
        first = self.squeeze(net, filters, f"{scope}/1x1", f"{scope}/beginning_bn")
        states = [first, second]
        for index, (left, right) in enumerate(place.cell.combinations):
            with tf.name_scope(f"comb_iter_{index}"):
                iteration = f"{scope}/comb_iter_{index}"
                states.append(
                    self.branch(states, left, place, f"{iteration}/left")
                    + self.branch(states, right, place, f"{iteration}/right")
                )
        return tf.concat([states[index] for index in place.cell.outputs], axis=3)


def drop_path(x: tf.Tensor, keep_prob: float) -> tf.Tensor:
    """Zero whole examples of `x` [N, h, w, c], each with probability 1 - `keep_prob`.

    What stays is divided by `keep_prob`, so that the expectation is `x`.
    """
    draw = tf.random.uniform([tf.shape(x)[0], 1, 1, 1])
    return x / keep_prob * tf.floor(keep_prob + draw)
