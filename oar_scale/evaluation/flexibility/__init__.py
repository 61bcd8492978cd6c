"""The flexibility report: what do models do in orders that they were, and were not, trained for?

studies.flexibility    which models, which held-out images, which orders
  pieces               the work: a model, a measure and some images, whose result is kept
  likelihood           own orders; likelihood and predictions along any order
  comparison           from the kept results of all pieces to means, intervals and tests
"""
