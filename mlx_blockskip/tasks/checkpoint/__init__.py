"""From a name to an opened model, encoder or adapter."""
