"""What every chain saw: the store of loss traces, cell by cell, and the verdict on the chains.

Reads and judges traces; it never samples and never computes an influence.
"""
