"""`doctor`: what this machine is, what fits it, whether results are right on it, and how fast it is."""
