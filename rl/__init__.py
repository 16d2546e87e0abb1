"""Learning from rewards, and the learner itself."""
