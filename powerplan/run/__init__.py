"""A training run as a whole: what it holds in memory, sends between devices, takes in time and costs.

`plan.py` has the way in. One device is a run too: all degrees are 1 then.
"""
