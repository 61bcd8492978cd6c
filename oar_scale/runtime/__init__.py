"""The Ray session, stop signals, how a program ends, retries, tables."""
