"""`train`: setting a run up, its records, its loop, its optimizer, and its checkpoints."""
