"""Which blocks a training run skips."""
