"""Observability of a run: the event stream (the truth), the live console, the W&B projection and the HTML report.

May be imported from everywhere, and itself imports only errors, config and storage.
"""
