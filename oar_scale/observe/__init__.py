"""Observability of a run: the event stream (the truth) and what reads it: console, W&B, /metrics, `oar status`.

Core never imports it: the loop takes an ``EventSink`` (``training/process.py``).
"""
