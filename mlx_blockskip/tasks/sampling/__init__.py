"""From noise to pictures: the denoising loop, and what several commands draw with it."""
