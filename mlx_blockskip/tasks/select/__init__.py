"""`select`: which blocks to skip, by masking attention from image to text."""
