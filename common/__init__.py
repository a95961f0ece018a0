"""What all rooms share: types, configuration, metrics, checkpoints."""
