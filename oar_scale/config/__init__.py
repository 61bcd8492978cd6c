"""The recipe: schema, loading, cross-field checks, DeepSpeed settings. Imports no torch, ray or deepspeed."""
