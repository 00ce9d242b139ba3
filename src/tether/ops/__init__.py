"""The mathematics of tether: pure functions on tensors, importing only torch.

Every function states its equation, the shape of each argument and the polarity of its masks (True = a token that the
policy emitted). Nothing here depends on models, files, devices or ranks; denominators are passed in, never counted from
a part of a batch.
"""
