"""Handwritten digits: which classes helped and hurt which, and when, checked by retraining.

1,797 scanned 8 x 8 digits that ship with scikit-learn, and a network of 64-32-10 units trained with Adam.
"""
