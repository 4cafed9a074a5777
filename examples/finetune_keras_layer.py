"""Fine-tune an exported model through hub.KerasLayer, to tell from which photograph a crop comes.

    python -m pipeline.models export --network nasnet_mobile --head feature_vector \\
        --format saved_model --seed 0 --output out/nasnet_mobile
    python examples/finetune_keras_layer.py --model out/nasnet_mobile

hub.KerasLayer is a layer of Keras 2, which is tf_keras today.
"""

import argparse

import numpy as np
import skimage.data
import tensorflow as tf
import tensorflow_hub as hub
import tf_keras

PHOTOGRAPHS = (
    skimage.data.astronaut,
    skimage.data.chelsea,
    skimage.data.coffee,
    skimage.data.rocket,
)


def crops(count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random crops: float32 [count, size, size, 3] in [0, 1], and the photograph of each."""
    draw = np.random.default_rng(seed)
    photographs = [photograph() for photograph in PHOTOGRAPHS]
    labels = draw.integers(len(photographs), size=count)
    images = []
    for label in labels:
        height, width, _ = photographs[label].shape
        side = draw.integers(150, 300)
        y, x = draw.integers(height - side), draw.integers(width - side)
        crop = photographs[label][y : y + side, x : x + side] / 255
        images.append(tf.image.resize(crop, [size, size], antialias=True))
    return np.stack(images).astype(np.float32), labels


def main(argv: list[str] | None = None) -> tuple[list[float], float]:
    """Fine-tune; gives the loss of each epoch and how far the moving averages went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR", help="a TF2 SavedModel")
    parser.add_argument("--epochs", type=int, default=5, metavar="N")
    parser.add_argument("--images", type=int, default=64, metavar="N")
    args = parser.parse_args(argv)

    tf_keras.utils.set_random_seed(0)
    layer = hub.KerasLayer(args.model, trainable=True, arguments={"batch_norm_momentum": 0.997})
    _, inputs = layer.resolved_object.signatures["serving_default"].structured_input_signature
    size = inputs["inputs"].shape[1]
    model = tf_keras.Sequential([layer, tf_keras.layers.Dense(len(PHOTOGRAPHS))])
    model.build([None, size, size, 3])
    model.compile(
        tf_keras.optimizers.SGD(0.01, momentum=0.9),
        tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    averages = [weight for weight in layer.weights if "/moving_" in weight.name]
    before = [weight.numpy() for weight in averages]
    images, labels = crops(args.images, size, seed=0)
    losses = model.fit(images, labels, batch_size=16, epochs=args.epochs, verbose=2)
    moved = max(np.abs(new - old).max() for new, old in zip(averages, before, strict=True))
    print(f"loss {losses.history['loss'][0]:.3f} -> {losses.history['loss'][-1]:.3f}")
    print(f"{len(averages)} moving averages went up to {moved:.3g} far")
    return losses.history["loss"], float(moved)


if __name__ == "__main__":
    main()
