"""SANA (NVIDIA, MIT): linear attention over few, deep latents; 0.6B, 1.6B and 4.8B, SANA 1.5 and Sprint."""
