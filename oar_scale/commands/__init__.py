"""What verbs do beside running stages: checkpoints, shards, samples, status and verification of an extraction."""
