"""Commands of `moco-fast`, one file each: a dataclass of options that can run. Free of torch until it runs."""
