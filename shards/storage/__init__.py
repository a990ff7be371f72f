"""Storage: bytes of files and objects, and the archives written to them."""
