"""Images: one encoded image in, one baseline JPEG out."""
