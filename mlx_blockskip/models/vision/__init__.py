"""Image encoders, with which pictures are compared: DINO, DINOv2, CLIP."""
