"""Exact answers: the tree and its data, what a network learns of them, and influence, in closed form or by quadrature.

``tree`` makes the data; ``modes`` says what is learnt when; ``removal`` what is learnt without some items; ``response``
is the derivative by an item's weight, ``two_times`` the same by when the item is shown; ``kernels`` are what items
share at a moment; ``double_well`` is a posterior with two phases. Nothing here trains, samples or draws, and nothing
here knows the rest of the study.
"""
