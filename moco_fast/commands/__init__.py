"""Commands of `moco-fast`, one file each: a dataclass of options that can run. Imports torch only when it runs."""
