"""What the model, the training utilities and the scripts are built on, a topic per file."""
