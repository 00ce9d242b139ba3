"""The mathematics of tether: pure functions on tensors, importing torch alone.

Every function states its equation, the shape of each argument and the polarity of its masks (True = a token that the
policy emitted). Nothing here knows a model, a file, a device or a rank; denominators are passed in, never counted from
the part of a batch that happens to be at hand.
"""
