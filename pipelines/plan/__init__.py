"""Order and augmentation as data: pure functions, numpy in, numpy out."""
