"""Image sources, WebDataset shards and their manifests, the sample plan and the stream."""
