"""The networks and the loading of models: the only home of TensorFlow."""
