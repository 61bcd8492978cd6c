"""A run: where its parts lie, and what its stages have left."""
