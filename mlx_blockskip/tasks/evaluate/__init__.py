"""`evaluate`: what an adapter has learned, and what it has changed besides."""
