"""Parts of the train step and of the training loop."""
