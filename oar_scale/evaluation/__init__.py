"""What models are worth: likelihood per order, features and distances, pictures."""
