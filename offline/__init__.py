"""Learning from preferences: a chosen answer against named rejected ones."""
