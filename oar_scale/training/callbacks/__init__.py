"""What happens at certain steps beside the training itself: a file each.

Every rank has all of them and calls them in the same order after each step, so they may be collective. What one has to remember goes
into the checkpoints through ``state``.
"""
