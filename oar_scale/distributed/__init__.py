"""Training among many processes: the DeepSpeed engine, workers under Ray Train or torchrun, sharded checkpoints, elastic sizes."""
