"""VQ for images and its training; prompts: SentencePiece, open_clip text towers, class labels, features."""
