"""The training loop and its callbacks, the ``Engine`` protocol and the plain one-process engine, optimizer, learning rate."""
