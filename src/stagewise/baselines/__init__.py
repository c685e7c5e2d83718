"""What others compute from checkpoints alone: TracIn and SOURCE, to be held against what is measured.

``intervals`` sees a run as its checkpoints do: between two of them, training is what it is at the first. This room
knows gradients, curvature and update rules; it trains nothing and samples nothing.
"""
