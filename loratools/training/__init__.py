"""What needs a model that runs: it is loaded with transformers, from a folder, and never downloaded."""
