"""Images in, WebDataset shards with index and manifest out."""
