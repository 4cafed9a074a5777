"""Fine-tune an exported model through hub.load, to tell from which photograph a crop comes.

    python -m pipeline.models export --network nasnet_mobile --head feature_vector \\
        --format saved_model --seed 0 --output out/nasnet_mobile
    python examples/finetune_hub_load.py --model out/nasnet_mobile

The loop is written out, with the module's own variables and regularization losses.
"""

import argparse

import numpy as np
import tensorflow as tf
import tensorflow_hub as hub
import tf_keras
from finetune_keras_layer import PHOTOGRAPHS, crops

BATCH = 16


def main(argv: list[str] | None = None) -> tuple[list[float], float]:
    """Fine-tune; gives the loss of each epoch and how far the moving averages went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR", help="a TF2 SavedModel")
    parser.add_argument("--epochs", type=int, default=5, metavar="N")
    parser.add_argument("--images", type=int, default=64, metavar="N")
    args = parser.parse_args(argv)

    module = hub.load(args.model)
    serve = module.signatures["serving_default"]
    size = serve.structured_input_signature[1]["inputs"].shape[1]
    (output,) = serve.structured_outputs.values()
    head = tf.Variable(tf.zeros([output.shape[1], len(PHOTOGRAPHS)]))
    variables = [*module.trainable_variables, head]
    optimizer = tf_keras.optimizers.SGD(0.05, momentum=0.9)
    optimizer.build(variables)

    @tf.function
    def step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            vectors = module(images, training=True, batch_norm_momentum=0.997)
            errors = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, vectors @ head)
            loss = tf.reduce_mean(errors)
            total = loss + tf.add_n([regularize() for regularize in module.regularization_losses])
        gradients = tape.gradient(total, variables)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return loss

    averages = [variable for variable in module.variables if "/moving_" in variable.name]
    before = [variable.numpy() for variable in averages]
    images, labels = crops(args.images, size, seed=0)
    losses = []
    for epoch in range(args.epochs):
        order = np.random.default_rng(epoch).permutation(len(images))
        batches = np.array_split(order, max(1, len(order) // BATCH))
        losses.append(float(np.mean([step(images[batch], labels[batch]) for batch in batches])))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
    moved = max(np.abs(new - old).max() for new, old in zip(averages, before, strict=True))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"{len(averages)} moving averages went up to {moved:.3g} far")
    return losses, float(moved)


if __name__ == "__main__":
    main()
