"""Rollouts: the engine, its cache and sampling, and the naive oracle it must agree with."""
