"""The third stage: what training changed, in losses and in answers."""
