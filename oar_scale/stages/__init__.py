"""What each stage of a run does: one file a stage, each a function from a :class:`Run` to its results."""
